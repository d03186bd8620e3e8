"""Diskwright: disks and their images, as a library, as commands, and as servers."""

__version__ = "0.1.0"
