"""QEMU's four permissions: what an edge uses of a node, and what it lets others do.

The bit number of a permission is also the number of its lock byte in an image file
(100 + n held, 200 + n not shared), which is how processes see one another.
"""

from __future__ import annotations

CONSISTENT_READ = 1
WRITE = 2
WRITE_UNCHANGED = 4
RESIZE = 8
ALL = 15

#: bit number -> QEMU's name in its error lines
NAMES = ("consistent read", "write", "write unchanged", "resize")


class Role:
    """What a child is to its parent."""

    STORAGE = 0  #: a format's file: metadata and data
    FILTERED = 1  #: what a filter (and raw) passes through
    BACKING = 2  #: shown where the parent has nothing
    DATA = 3  #: data only, the metadata are elsewhere


def default_permissions(
    role: int, used: int, shared: int, *, read_only: bool, commits: bool = False
) -> tuple[int, int]:
    """What an edge of `role` uses and shares when its parent is used and shared as given.

    Args:
        role: a `Role`.
        used: the sum of what the parent's own users use.
        shared: what all of them share.
        read_only: whether the parent was opened read-only.
        commits: whether the parent's content is being written down into its backing file.

    Returns:
        (used, shared) of the edge.
    """
    if role == Role.FILTERED:
        return used, shared
    if role == Role.BACKING:
        # Somebody who writes below would change what the overlay shows, unless all of the
        # overlay's users can live with that.
        shared_below = CONSISTENT_READ | WRITE_UNCHANGED
        if shared & WRITE or commits:
            shared_below |= WRITE | RESIZE
        # While it is written to, nobody is promised a consistent view of it, as in QEMU.
        return 0 if commits else used & CONSISTENT_READ, shared_below
    used_below = CONSISTENT_READ
    if not read_only:
        # Metadata are written even where the guest writes nothing; growing is part of it.
        used_below |= WRITE | RESIZE
    if role == Role.DATA:
        return used_below, shared & ~RESIZE
    return used_below, ALL & ~(WRITE | RESIZE)


def describe(bits: int) -> str:
    """Names of the permissions in `bits`, joined by commas."""
    return ", ".join(name for n, name in enumerate(NAMES) if bits >> n & 1)
