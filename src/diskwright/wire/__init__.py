"""Protocols as bytes and messages: no socket, no thread, no node."""
