"""One module a command: what it takes, the operation it calls, what it prints."""
