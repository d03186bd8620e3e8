"""NBD as a protocol driver: the client's side of a server's export."""
