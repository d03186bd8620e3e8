"""What happens between a checked request and a driver's hook: padding, cutting, falling back.

Both faces of a node end here: `Node`'s public operations after the gate, `Child`'s at once.

Padding: where a node's `request_alignment` is above one, a write that is not aligned reads the
blocks at its edges first. On such a node *every* write holds a range lock on its aligned span,
so nobody's bytes are lost between that read and the write; other nodes never pad and take none.
"""

from __future__ import annotations

from diskwright.block.cancel import check_cancelled
from diskwright.block.extent import DATA, UNALLOCATED, ZERO, Extent
from diskwright.block.limits import MAX_LENGTH
from diskwright.errors import (
    BrokenNodeError,
    IOFailure,
    RangeError,
    ReadOnlyError,
    UnsupportedError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskwright.block.child import Child
    from diskwright.block.node import Node

UNMAP = 1
FAST = 2
FUA = 4

#: The longest piece that is bounced or zeroed through a buffer of ours.
PIECE = 1 << 20
#: How much is brought up from a backing file between two looks at who else wants the node.
_NEAR = 1 << 22

_ZEROES = bytes(1 << 16)


def zero_flags(unmap: bool, fast: bool, fua: bool) -> int:
    """The flags of a zero request as one number."""
    return unmap * UNMAP | fast * FAST | fua * FUA


def fill_zero(view: memoryview) -> None:
    """Make every byte of `view` zero."""
    length = len(view)
    for start in range(0, length, len(_ZEROES)):
        part = min(len(_ZEROES), length - start)
        view[start : start + part] = _ZEROES[:part] if part < len(_ZEROES) else _ZEROES


def is_zero(view: memoryview) -> bool:
    """Whether every byte is zero."""
    length = len(view)
    if length < 8 or view[0] == 0 == view[length - 1]:
        data = bytes(view) if length <= len(_ZEROES) else None
        if data is not None:
            return data == _ZEROES[:length]
        for start in range(0, length, len(_ZEROES)):
            part = bytes(view[start : start + len(_ZEROES)])
            if part != _ZEROES[: len(part)]:
                return False
        return True
    return False


def check_range(node: Node, offset: int, length: int) -> None:
    """Refuse what reaches outside of the node."""
    if (offset | length) < 0 or offset + length > node.size:  # which floats cannot be asked
        raise RangeError(
            f"Bytes {offset} to {offset + length} are outside of {node.describe()}, "
            f"which has {node.size}",
            node=node.node_name,
            offset=offset,
        )


def check_unit(node: Node, offset: int, length: int) -> None:
    """Refuse what is no unit of the node's encoder; the last one may end with the node."""
    encoder = node.encoder()
    if encoder is None:
        raise UnsupportedError(f"{node.describe()} stores nothing encoded", node=node.node_name)
    whole = length == encoder.unit or offset + length == node.size
    if offset < 0 or offset >= node.size or offset % encoder.unit or not whole:
        raise RangeError(
            f"{length} bytes at {offset} are no unit of {node.describe()}, "
            f"whose units have {encoder.unit}",
            node=node.node_name,
            offset=offset,
        )


def check_writable(node: Node) -> None:
    """Refuse to write to a read-only or broken node."""
    if node.read_only:
        raise ReadOnlyError(f"{node.describe()} is read-only", node=node.node_name)
    check_trusted(node)


def check_trusted(node: Node) -> None:
    """Refuse what a broken node cannot promise: writes, and that anything is durable."""
    if node.broken is not None:
        error = BrokenNodeError(
            f"{node.describe()} refuses writes since: {node.broken}",
            node=node.node_name,
            hint="reopen it; what was flushed before is safe",
        )
        error.kind = node.broken_kind
        raise error


# ------------------------------------------------------------------------------ reads


def read_padded(node: Node, offset: int, view: memoryview) -> None:
    """Read; zeroes beyond the node's end."""
    length = len(view)
    stop = offset + length
    if stop > node.size:
        node.refresh_size()
        if stop > node.size:
            inside = max(node.size - offset, 0)
            fill_zero(view[inside:])
            view = view[:inside]
            if not inside:
                return
    read_checked(node, offset, view)


def read_checked(node: Node, offset: int, view: memoryview) -> None:
    """Read a range that lies inside of the node."""
    if node.copy_on_read and len(view):
        populate_checked(node.unfiltered, offset, len(view), zeroes=True)
    limits = node.limits
    alignment = limits.request_alignment
    if alignment > 1 and (offset | len(view)) & (alignment - 1):
        _read_unaligned(node, offset, view)
        return
    longest = limits.max_transfer
    if not longest or len(view) <= longest:
        if len(view):
            node._read_into(offset, view)
        return
    for start in range(0, len(view), longest):
        node._read_into(offset + start, view[start : start + longest])


def _read_unaligned(node: Node, offset: int, view: memoryview) -> None:
    mask = node.limits.request_alignment - 1
    piece = min(PIECE, node.limits.max_transfer or PIECE)
    done, length = 0, len(view)
    while done < length:
        start = (offset + done) & ~mask
        stop = min((offset + length + mask) & ~mask, start + piece)
        bounce = node.aligned_buffer(stop - start)
        node._read_into(start, bounce)
        skip = offset + done - start
        part = min(length - done, stop - start - skip)
        view[done : done + part] = bounce[skip : skip + part]
        done += part


def populate(node: Node, offset: int, length: int) -> None:
    """Bring a range up, piece by piece: who wants the node to itself need not wait for all."""
    stop = offset + length
    while True:
        check_cancelled()
        with node.graph.request():
            node._check_open()
            check_range(node, offset, stop - offset)
            end = min((offset // _NEAR + 1) * _NEAR, stop)
            populate_checked(node, offset, end - offset, zeroes=False)
        if end == stop:
            return
        offset = end


def populate_checked(node: Node, offset: int, length: int, *, zeroes: bool) -> None:
    """Bring a range up from the backing file, where there is one.

    With `zeroes`, what reads as zero is noted too, and needs no backing file.
    """
    if node.backing is not None or (zeroes and node.can_have_backing):
        check_writable(node)
        node.before_write()
        node._populate(offset, length, zeroes)


# ----------------------------------------------------------------------------- writes


def write_checked(node: Node, offset: int, view: memoryview, fua: bool) -> None:
    """Write a range that lies inside of the node, which is writable."""
    check_writable(node)
    length = len(view)
    if not length:
        return
    if node.detect_zeroes and is_zero(view):
        flags = zero_flags(node.detect_zeroes == "unmap", False, fua)
        zero_checked(node, offset, length, flags)
        return
    node.before_write()
    alignment = node.limits.request_alignment
    try:
        if alignment > 1:
            start, stop = offset & -alignment, (offset + length + alignment - 1) & -alignment
            with node.pads.span(start, stop):
                if (offset | length) & (alignment - 1):
                    _write_unaligned(node, offset, view)
                else:
                    _write_cut(node, offset, view, False)
                node.written(offset + length)
        else:
            _write_cut(node, offset, view, fua and node.supports_fua)
            node.written(offset + length)
    finally:
        if node.watching:
            note(node, offset, length)
    if node.write_through or (fua and (alignment > 1 or not node.supports_fua)):
        node.flush_inside()


def note(node: Node, offset: int, length: int) -> None:
    """Let the bitmaps that watch a node know that a range was written, or in part."""
    for bitmap in node.watching:
        bitmap.set(offset, length)


def _write_cut(node: Node, offset: int, view: memoryview, fua: bool) -> None:
    longest = node.limits.max_transfer
    if not longest or len(view) <= longest:
        node._write(offset, view, fua)
        return
    for start in range(0, len(view), longest):
        node._write(offset + start, view[start : start + longest], fua)


def _write_unaligned(node: Node, offset: int, view: memoryview) -> None:
    alignment = node.limits.request_alignment
    mask = alignment - 1
    piece = min(PIECE, node.limits.max_transfer or PIECE)
    done, length = 0, len(view)
    while done < length:
        start = (offset + done) & ~mask
        stop = min((offset + length + mask) & ~mask, start + piece)
        bounce = node.aligned_buffer(stop - start)
        skip = offset + done - start
        part = min(length - done, stop - start - skip)
        _read_edges(node, start, bounce, skip=skip, part=part)
        bounce[skip : skip + part] = view[done : done + part]
        node._write(start, bounce, False)
        done += part


def _read_edges(node: Node, start: int, bounce: memoryview, *, skip: int, part: int) -> None:
    """Read the units of which `bounce` gets only a part: `part` bytes from `skip` on.

    A node that injects faults hears of it, as of QEMU's padding.
    """
    alignment, length = node.limits.request_alignment, len(bounce)
    tail = skip + part < length
    hook = _padding_hook(node)
    if skip and tail and length == alignment:
        hook("pwritev_rmw_head")
        hook("pwritev_rmw_tail")
        node._read_into(start, bounce)
        hook("pwritev_rmw_after_head")
        hook("pwritev_rmw_after_tail")
        return
    if skip:
        hook("pwritev_rmw_head")
        node._read_into(start, bounce[:alignment])
        hook("pwritev_rmw_after_head")
    if tail:
        hook("pwritev_rmw_tail")
        node._read_into(start + length - alignment, bounce[length - alignment :])
        hook("pwritev_rmw_after_tail")


def _padding_hook(node: Node) -> Callable[[str], None]:
    """Whom padding is told: the node, or the storage that it pads for."""
    place: Node | None = node
    while place is not None:
        if place.event_hook is not None:
            return place.event_hook
        place = None if place.data_child is None else place.data_child.node
    return _unheard


def _unheard(event: str) -> None:
    return


def zero_checked(node: Node, offset: int, length: int, flags: int) -> None:
    """Make a range read as zero, by the hook or else through a buffer."""
    check_writable(node)
    if not length:
        return
    node.before_write()
    alignment = node.limits.request_alignment
    try:
        if alignment > 1:
            first, last = offset & -alignment, (offset + length + alignment - 1) & -alignment
            with node.pads.span(first, last):
                _zero_parts(node, offset, length, flags)
        else:
            _zero_parts(node, offset, length, flags)
        node.written(offset + length)
    finally:
        note(node, offset, length)
    if flags & FUA or node.write_through:
        node.flush_inside()


def _zero_parts(node: Node, offset: int, length: int, flags: int) -> None:
    """The aligned middle by the hook, the edges as bytes."""
    alignment = max(node.limits.request_alignment, 1)
    start = min((offset + alignment - 1) & -alignment, offset + length)
    stop = max((offset + length) & -alignment, start)
    if offset + length == node.size:
        stop = max(offset + length, start)
    if flags & FAST and (start != offset or stop != offset + length):
        raise UnsupportedError(f"{node.describe()} cannot zero that range fast")
    if start > offset:
        write_zero_bytes(node, offset, start - offset)
    if stop > start:
        try:
            unmap = UNMAP if node.can_unmap else 0
            node._write_zeroes(start, stop - start, flags & (FAST | unmap))
        except UnsupportedError:
            if flags & FAST:
                raise
            write_zero_bytes(node, start, stop - start)
    if offset + length > stop:
        write_zero_bytes(node, stop, offset + length - stop)


def write_zero_bytes(node: Node, offset: int, length: int) -> None:
    """Write zeroes as data, in bounded pieces; the caller holds what padding needs."""
    zeroes = memoryview(bytes(min(length, PIECE)))
    alignment = node.limits.request_alignment
    done = 0
    while done < length:
        part = min(length - done, PIECE)
        if alignment > 1:
            _write_unaligned(node, offset + done, zeroes[:part])
        else:
            _write_cut(node, offset + done, zeroes[:part], False)
        done += part


def discard_checked(node: Node, offset: int, length: int) -> None:
    """Discard the whole units inside of the range; the node's end counts as a boundary.

    A filter passes parts of its units on: what is below may have smaller ones. Bitmaps note all
    of the range, as QEMU's do.
    """
    check_writable(node)
    if not node.can_unmap or not length:
        return
    unit = max(node.limits.request_alignment, 1)
    if not node.is_filter:
        unit = max(node.limits.discard_alignment, unit)
    start = (offset + unit - 1) // unit * unit
    stop = offset + length
    if stop != node.size:
        stop = stop // unit * unit
    node.before_write()
    try:
        if stop > start:
            node._discard(start, stop - start)
            node.written(0)
    finally:
        note(node, offset, length)


# ---------------------------------------------------------------------- size and extents


def grow_for(child: Child, offset: int, size: int) -> None:
    """Let a write from `offset` to `size`, past the end of a child, grow it, if the edge may.

    Every edge may fill the last unit of a child that pads.
    """
    from diskwright.block.permission import RESIZE

    node = child.node
    if child.parent is not None and not child.used & RESIZE:
        node.refresh_size()
        unit = max(node.limits.request_alignment, 1)
        padded = offset < node.size and size <= -(-node.size // unit) * unit
        if size > node.size and not padded:
            raise RangeError(
                f"{child.user_text()} may not make {node.describe()} longer",
                node=node.node_name,
            )
    elif not node.is_protocol and not node.is_filter:
        grow(node, size, "off")  # the others grow by being written to: one step, or none


def grow(node: Node, size: int, preallocation: str) -> None:
    """Make a node at least `size` long, under its size lock."""
    check_writable(node)
    with node.size_lock:
        if size > node.size:
            node._truncate(size, False, preallocation)
            node.size = max(node.size, size)
            node.unflushed = True


def _check_size(node: Node, size: int) -> None:
    """Refuse a size that no disk has, whatever the driver; as QEMU, before it is asked."""
    if size > MAX_LENGTH:
        beyond = f"offset({size}) exceeds maximum({MAX_LENGTH})"
        raise RangeError(
            f"A size of {size} bytes is impossible",
            node=node.node_name,
            qemu="Image size cannot be negative" if size >= 1 << 63 else beyond,
        )
    if size < 0:
        raise RangeError(f"A size of {size} bytes is impossible", node=node.node_name)


def truncate_checked(node: Node, size: int, exact: bool, preallocation: str) -> None:
    """Change a node's size; the caller has the graph to itself."""
    check_writable(node)
    _check_size(node, size)
    node.settle()
    node.before_write()
    node._prepare_resize(size)
    with node.size_lock:
        node._truncate(size, exact, preallocation)
        node.size = max(size, node.size) if not exact else node.size
        node.unflushed = True
    node.size_changed()


def walk_extents(node: Node, offset: int, length: int, depth: int | None) -> Iterator[Extent]:
    """The runs of [offset, offset + length), this node's and, through it, its backing chain's.

    Args:
        node: whose bytes they are.
        offset, length: must lie inside of the node.
        depth: how many backing files to follow; None for all.
    """
    position, stop = offset, offset + length
    while position < stop:
        moved = position
        for extent in node._extents(position, stop - position):
            run = extent.clipped(position, stop)
            if run.length <= 0:
                continue
            yield from _through(node, run, depth)
            position = run.end
            if position >= stop:
                return
        if position == moved:
            raise IOFailure(f"{node.describe()} has no extent at {position}", offset=position)


def _through(node: Node, run: Extent, depth: int | None) -> Iterator[Extent]:
    """A run of this layer, or what the backing file shows there."""
    backing = node.unfiltered.backing
    if run.kind != UNALLOCATED or run.allocated or backing is None or depth == 0:
        yield run
        return
    inside = min(run.length, max(backing.node.size - run.offset, 0))
    if inside:
        below = walk_extents(backing.node, run.offset, inside, None if depth is None else depth - 1)
        for extent in below:
            extent.depth += 1
            yield extent
    if inside < run.length:
        yield Extent(
            run.offset + inside, run.length - inside, ZERO, allocated=True, depth=run.depth + 1
        )


def shown_extents(child: Child, offset: int, length: int) -> Iterator[Extent]:
    """The runs of a child as its parent shows them that passes it on and has nothing of its own.

    Whether it is zero what the child's backing file shows, only a read tells: such a run is DATA
    that is not allocated. No layer of the parent's stands for it.
    """
    below = child.node.unfiltered
    backed = 0 if below.backing is None else below.backing.node.size
    for run in child.extents(offset, length, depth=0):
        if run.kind != UNALLOCATED:
            yield run
        elif run.offset < backed:
            yield Extent(run.offset, run.length, DATA, allocated=False)
        else:
            yield Extent(run.offset, run.length, ZERO, allocated=not below.can_have_backing)


def bottom_extents(node: Node, offset: int, length: int) -> Iterator[Extent]:
    """As `walk_extents` of this layer, with host offsets in the bottom protocol node."""
    for extent in walk_extents(node, offset, length, 0):
        child = extent.child
        if child is None or extent.host_offset is None or extent.encoded:
            yield extent
            continue
        ends_here = child.node.is_protocol or child.node.changes_bytes
        yield from (extent,) if ends_here else _lower(extent)


def _lower(extent: Extent) -> Iterator[Extent]:
    child, host = extent.child, extent.host_offset
    assert child is not None
    assert host is not None
    inside = min(extent.length, max(child.node.size - host, 0))
    for lower in bottom_extents(child.node, host, inside):
        kind = extent.kind if extent.kind != DATA or lower.kind == DATA else lower.kind
        yield Extent(
            extent.offset + lower.offset - host,
            lower.length,
            kind,
            allocated=extent.allocated,
            encoded=lower.encoded,
            depth=extent.depth,
            child=lower.child,
            host_offset=lower.host_offset,
            stored=lower.stored,
        )
    if inside < extent.length:
        yield Extent(extent.offset + inside, extent.length - inside, ZERO, depth=extent.depth)
