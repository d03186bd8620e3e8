"""The drivers; each imports `block`, `wire`, `codecs`, `crypto`, `system`, never another driver."""
