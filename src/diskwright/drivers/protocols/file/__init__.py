"""Files of the host, and its devices."""
