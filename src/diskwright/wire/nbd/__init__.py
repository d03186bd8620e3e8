"""NBD, both sides: NetworkBlockDevice/nbd, doc/proto.md, is the source of all of it."""
