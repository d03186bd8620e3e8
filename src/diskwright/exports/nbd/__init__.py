"""NBD exports: a server, what it offers, and the conversation with each client."""
