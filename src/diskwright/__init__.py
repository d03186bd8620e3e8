"""Diskwright: disks and their images, as a library, as commands, and as servers."""
