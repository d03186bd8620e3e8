"""blkdebug: faults at chosen moments; driver.py is the node, rules.py what it obeys."""
