"""The drivers; each imports `block`, `wire`, `codecs`, `crypto` and `system`, never another driver."""
