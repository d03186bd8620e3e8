"""Going around the layers: descriptors and offsets of bytes that lie plainly in files.

For whoever moves so much that the kernel should do it: the copy engine. All calls are made
inside of a request of the target's graph, on ranges that nobody else writes to.

1. A file is made long enough (under its size lock) before bytes go to its new part: threads
   that append do not wait for each other's bytes, and no truncation cuts them off.
2. What went into a file is noted at its node, so that a flush reaches it.
"""

from __future__ import annotations

import os
from errno import EBADF, EINVAL, ETXTBSY, EXDEV

from diskwright.block.record import Record
from diskwright.system import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from diskwright.block.child import Child
    from diskwright.block.mapping import Place
    from diskwright.block.node import Node

#: Clones and places begin at multiples of this, which every file system's blocks divide.
BLOCK = 4096


#: Bytes that go into a file with one call. A file system keeps longer writes in folios of 2 MiB
#: where it can, and the system then has to search, now and then for long, for free ones.
LONGEST_WRITE = 1536 << 10

#: Where no file has bytes.
_NOWHERE = 1 << 62

#: Nobody goes around where this is set: whatever goes wrong then is not for that reason.
SWITCH = "DISKWRIGHT_NO_BYPASS"
is_open = not os.environ.get(SWITCH)


class Spot(Record):
    """Bytes in a file: its node, its descriptor, and an offset there."""

    __slots__ = ("descriptor", "node", "offset")

    def __init__(self, node: Node, descriptor: int, offset: int) -> None:
        self.node = node
        self.descriptor = descriptor
        self.offset = offset


def spot_of(child: Child | None, host_offset: int) -> Spot | None:
    """Where bytes at `host_offset` of a child lie, if it is a file that lends itself."""
    if child is None or not is_open:
        return None
    node = child.node
    lent = node.lend()
    while lent is not None and not node.is_protocol:
        if node.data_child is None:
            return None
        node = node.data_child.node
    return None if lent is None else Spot(node, lent[0], host_offset + lent[1])


def read_around(child: Child, host_offset: int, view: memoryview) -> bool:
    """Fill `view` from a child's file; False where it has to be read through the child.

    For bytes that nobody can move meanwhile. What fails here fails there too, with its error.
    """
    spot = spot_of(child, host_offset)
    if spot is None:
        return False
    try:
        with child.node.graph.request():
            return host.read_into(spot.descriptor, spot.offset, view) == len(view)
    except OSError:
        return False


def plain_spot(node: Node, offset: int, length: int) -> Spot | None:
    """Where [offset, offset + length) of a writable node lies, if plainly and in one run."""
    at = node.locate(offset, length, write=True)
    if at < 0 or node.changes_bytes or node.read_only or node.broken or node.detect_zeroes:
        return None
    if node.watching:
        return None
    if node.data_child is None:
        return None
    return spot_of(node.data_child, at)


def write_place(place: Place, view: memoryview, runs: Iterable[tuple[int, int]]) -> None:
    """Fill a place from its beginning with `view`, which is not longer than it.

    Args:
        place: host space that this is the only one to write to.
        view: what it shall read as.
        runs: (start, stop) in `view` of all that it does not read as already.

    Raises:
        IOFailure: the system could not write.
    """
    child = place.child
    node = child.node
    lent = node.lend() if node.is_protocol and is_open else None
    if lent is None:
        child.event("write_aio")
        child.write(place.host_offset, view)
        return
    make_room(Spot(node, lent[0], place.host_offset), len(view))
    try:
        for start, stop in runs:
            for at in range(start, stop, LONGEST_WRITE):
                part = view[at : min(at + LONGEST_WRITE, stop)]
                host.write_all(lent[0], place.host_offset + lent[1] + at, part)
    except OSError as error:
        raise node.failure(error, "Could not write to") from error
    finally:
        node.unflushed = True


def make_room(spot: Spot, length: int) -> None:
    """Make the file reach to the end of what is about to be written."""
    stop = spot.offset + length
    if stop > spot.node.size:
        spot.node.reach(stop)


def could_share(source: Spot, target: Node) -> bool:
    """Whether the file system may share blocks of these files.

    It is asked to share some from behind the end of all files: where it can do that, it refuses
    these; where not, it says that.
    """
    lent = None if target.data_child is None else spot_of(target.data_child, 0)
    if lent is None:
        return False
    try:
        host.clone_range(source.descriptor, _NOWHERE, lent.descriptor, _NOWHERE, length=BLOCK)
    except (OSError, AttributeError) as error:
        return getattr(error, "errno", None) == EINVAL
    return True


def share(source: Spot, target: Spot, length: int, *, known: bool) -> bool:
    """Let both files have the same blocks; False where the file system does not do that.

    Both offsets must be multiples of BLOCK, and the length too.

    Args:
        known: it has done that before. Else the file gets no longer by an attempt in vain.

    Raises:
        IOFailure: anything else went wrong.
    """
    return _moved(_cloned, source, target, length, known=known)


def offload(source: Spot, target: Spot, length: int, *, known: bool) -> bool:
    """Let the kernel copy; False where it does not, with perhaps a part of it done.

    Args:
        known: as for `share`.

    Raises:
        IOFailure: anything else went wrong.
    """
    return _moved(_copied, source, target, length, known=known)


def _moved(
    move: Callable[[Spot, Spot, int], bool],
    source: Spot,
    target: Spot,
    length: int,
    *,
    known: bool,
) -> bool:
    if known:
        make_room(target, length)
        done = move(source, target, length)
    else:
        with target.node.size_lock:  # nobody cuts off what comes behind the end
            done = move(source, target, length)
    if done:
        target.node.written(target.offset + length)
    return done


def _cloned(source: Spot, target: Spot, length: int) -> bool:
    try:
        host.clone_range(
            source.descriptor, source.offset, target.descriptor, target.offset, length=length
        )
    except (OSError, AttributeError) as error:
        return _refused(error, target)
    return True


def _copied(source: Spot, target: Spot, length: int) -> bool:
    done = 0
    try:
        while done < length:
            count = host.copy_range(
                source.descriptor,
                source.offset + done,
                target.descriptor,
                target.offset + done,
                length=length - done,
            )
            if not count:
                return False
            done += count
    except (OSError, AttributeError) as error:
        return _refused(error, target)
    finally:
        target.node.unflushed = True
    return True


def _refused(error: Exception, target: Spot) -> bool:
    if not isinstance(error, OSError):
        return False
    if error.errno in (*host.UNSUPPORTED, EXDEV, EINVAL, EBADF, ETXTBSY):
        return False
    raise target.node.failure(error, "Could not write to") from error
