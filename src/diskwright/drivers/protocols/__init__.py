"""Protocols: they reach outside of the process; see the package above for what they import."""
