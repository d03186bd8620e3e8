"""Nodes offered to other programs."""
