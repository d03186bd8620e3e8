"""Making an image longer or shorter, and reserving host space for what is added."""

from __future__ import annotations

from array import array

from diskwright.block.cancel import check_cancelled
from diskwright.block.extent import DATA, UNALLOCATED
from diskwright.block.mapped import TO_BACKING
from diskwright.drivers.formats.qcow2.data_file import is_raw
from diskwright.drivers.formats.qcow2.entries import COPIED, OFFSET_MASK
from diskwright.drivers.formats.qcow2.header import MAX_L1_BYTES
from diskwright.drivers.formats.qcow2.transaction import Transaction
from diskwright.errors import (
    DiskwrightError,
    IOFailure,
    OptionError,
    Step,
    UnsupportedError,
    strerror_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.drivers.formats.qcow2.driver import Qcow2

#: What can be reserved for what is added.
PREALLOCATION = ("off", "metadata", "falloc", "full")

#: Tables are moved if the file becomes shorter by at least this many clusters.
_WORTH_MOVING = 16

#: Freed pieces that may wait for the tables that named them to be written.
_MAX_RETIRED = 4096


def resize(node: Qcow2, size: int, preallocation: str) -> None:
    """Change the virtual size; the caller has the graph to itself.

    Raises:
        UnsupportedError: the size is no multiple of 512, the image has snapshots whose size
            could not be told afterwards, or preallocation was asked for a shrink.
        OptionError: there is no such preallocation.
    """
    if preallocation not in PREALLOCATION:
        raise OptionError(f"Invalid preallocation mode: {preallocation}", field="preallocation")
    if size & 511:
        raise UnsupportedError("The new size must be a multiple of 512")
    header = node.header
    if header.version < 3 and header.nb_snapshots:
        raise UnsupportedError("Can't resize a v2 image which has snapshots")
    if -(-size >> node.l1_shift) * 8 > MAX_L1_BYTES:
        raise UnsupportedError(
            f"{size} bytes need an L1 table of more than {MAX_L1_BYTES} bytes",
            qemu="Failed to grow the L1 table: File too large",
            hint="an image with larger clusters can be longer",
        )
    if size < node.size:
        if preallocation != "off":
            raise UnsupportedError("Preallocation can't be used for shrinking an image")
        _shrink(node, size)
    elif size > node.size:
        _grow(node, size, preallocation)
    else:
        _drop_behind(node, size)  # once more, if a shrink was interrupted


def _grow(node: Qcow2, size: int, preallocation: str) -> None:
    header, old = node.header, node.size
    _drop_behind(node, old)  # a machine's state, or what an interrupted shrink left
    lengthen_l1(node, size)
    if node.external:
        if is_raw(header) and preallocation == "off":
            preallocation = "metadata"
        mode = preallocation if preallocation in ("falloc", "full") else "off"
        if node.data.size < size:  # whole clusters may have been reserved there
            node.data.truncate(size, preallocation=mode)
    node.size = size
    node.size_cache(size)
    boundary = min(-(-old // node.cluster_size) * node.cluster_size, size)
    shows = node.backing.size if node.backing is not None else 0
    try:
        in_one_run = preallocation in ("falloc", "full")  # which goes before all else
        if not in_one_run:
            _hide_end(node, old, boundary, shows > old)
        if preallocation != "off":
            preallocate(node, old, size, preallocation, hides=shows > old)
        elif boundary < min(shows, size):
            node.hide_backing(boundary, size)  # all of it: a longer one may be named later
        if in_one_run:
            _hide_end(node, old, boundary, shows > old)
        node.settle()
    except BaseException:
        node.size = old
        raise
    header.size = size
    node.write_header()


def _hide_end(node: Qcow2, old: int, boundary: int, shows: bool) -> None:
    """Let what the last cluster has behind the old end read as zero.

    Subclusters that have nothing stay so, unless a backing file `shows` there.
    """
    edge = min(-(-old // node.fill_size) * node.fill_size, boundary)
    for start, stop in ((old, edge), (edge, boundary)):
        if start < stop and (shows or not node.reads_zero(start, stop)):
            node.hide_backing(start, stop)


def lengthen_l1(node: Qcow2, size: int) -> None:
    """Make room in the L1 table."""
    header = node.header
    missing = -(-size >> node.l1_shift) - header.l1_size
    if missing <= 0:
        return
    change = Transaction(node)
    made = node.l1[:]
    made.extend([0] * missing)
    try:
        change.activate(made, header.l1_table_offset, header.l1_size)
        change.commit()
    except DiskwrightError as error:
        error.qemu = strerror_of(error)
        error.within("Failed to grow the L1 table")
        raise


def _shrink(node: Qcow2, size: int) -> None:
    """Write the new size, which decides; then free what lies behind the new end.

    What a crash leaves there is dropped before the image grows again.
    """
    from diskwright.drivers.formats.qcow2 import unused_blocks

    if node.external and not node.data.node.can_grow:
        node.data.truncate(size)  # it keeps its size, and says so before anything is given up
    node.settle()
    unused_blocks.drop(node)  # a damaged table is to be met before anything is given up
    node.header.size = size
    node.write_header()
    node.size = size
    passes, node.pass_discard = node.pass_discard, True
    try:
        _drop_behind(node, size)
    finally:
        node.pass_discard = passes
    unused_blocks.drop(node)
    cut_file(node)
    if node.external:
        node.data.truncate(size)


def _drop_behind(node: Qcow2, end: int) -> None:
    """Let no entry behind guest offset `end` name anything."""
    first = -(-end // node.cluster_size) * node.cluster_size
    table = -(-end >> node.l1_shift)
    boundary = min(table, len(node.l1)) << node.l1_shift
    if first < boundary and node.l1[table - 1] & OFFSET_MASK & (node.cluster_size - 1):
        boundary = first  # damaged: a check will tell of it
    position = first
    while position < boundary:
        run = node.map(position, boundary - position)
        # Only where there is something: a table that a snapshot shares would be copied.
        if run.kind != UNALLOCATED or run.child is not None:
            node._unmap(position, boundary, TO_BACKING, keep=False)
            break
        position += run.length
    for index in range(table, len(node.l1)):
        if node.l1[index]:
            check_cancelled()
            # mypy infers no types of a lambda's defaults
            node.under_lock(lambda index=index: node.drop_l2(index))  # type: ignore[misc]
            _bound_memory(node)
    if table < len(node.l1):
        node.file.event("l1_shrink_write_table")
        node.file.event("l1_shrink_free_l2_clusters")
    node.settle()


def give_back_end(node: Qcow2) -> None:
    """Make the file as short as what is in use allows."""
    _move_down(node)
    cut_file(node)


def _move_down(node: Qcow2) -> None:
    """Move the tables that lie at the file's end to where there is room now."""
    used = node.refcounts.count_used()
    if node.refcounts.last_used() < used + _WORTH_MOVING:
        return
    limit = used << node.header.cluster_bits
    change = Transaction(node, discard=True)
    made = node.l1[:]

    def visit(index: int, entry: int, items: array[int]) -> None:
        host = entry & OFFSET_MASK
        if host >= limit and entry & COPIED:
            change.change(host, node.cluster_size, -1)
            made[index] = change.write(node.l2_table.encode(items)) | COPIED

    change.each_l2(node.l1, visit)
    change.activate(made, node.header.l1_table_offset, node.header.l1_size)
    change.move_blocks(limit)
    change.commit()


def cut_file(node: Qcow2) -> None:
    """Give back what lies behind the last cluster in use."""
    end = (node.refcounts.last_used() + 1) << node.header.cluster_bits
    if end < node.file.size:
        try:
            node.file.truncate(end)
        except UnsupportedError:
            return  # a device keeps its size
        node.virgin = end


def preallocate(node: Qcow2, start: int, stop: int, mode: str, *, hides: bool = False) -> None:
    """Give every unallocated cluster of [start, stop) host space that reads as zero.

    Args:
        node: the image.
        start, stop: in bytes.
        mode: "metadata", or what the file is asked to do: "falloc", "full".
        hides: the backing file must not show through space of which nothing is written.
    """
    size = node.cluster_size
    position = start // size * size
    end = -(-stop // size) * size
    if position < start and not (
        node.map(position, size).kind == UNALLOCATED and node.reads_zero(position, start)
    ):
        position += size
    if mode != "metadata" and not node.external:
        _preallocate_data(node, position, end, mode, hides=hides)
        return
    first = position
    while position < end:
        check_cancelled()
        # One table at a time: more would be looked at again for the next one.
        run = node.map(
            position, min(end, (position >> node.l1_shift) + 1 << node.l1_shift) - position
        )
        if run.kind != UNALLOCATED or run.child is not None:
            position = -(-(position + run.length) // size) * size
            continue
        position += _reserve(node, position, -(-run.length // size) * size, stop)
        _bound_memory(node)
    if start < stop < end and not node.external:
        _fill_last(node, stop, end - stop)
    if hides and first < stop:
        node.hide_backing(first, stop, keep=True)


def _reserve(node: Qcow2, position: int, length: int, stop: int) -> int:
    """Give clusters that have nothing host space; returns for how many bytes it was done.

    Args:
        node: the image.
        position, length: the clusters, in bytes.
        stop: where the disk will end.
    """
    if node.entries.words > 1:  # they stay empty, so what the space holds does not matter
        count = length >> node.header.cluster_bits
        with Step("Allocating clusters failed"):
            node.under_lock(lambda: node.own_l2_slice(position >> node.header.cluster_bits))
            host = node.under_lock(lambda: node.take_data(position, count))
        if node.external:
            _link_all(node, position, position + length, host)
            return length
        used = -(-min(length, stop - position) // node.fill_size) * node.fill_size
        _grow_to(node, host, used)
        _link_all(node, position, position + length, host)
        return length
    with Step("Allocating clusters failed"):
        allocation = node._allocate(position, length)
    try:
        for place in allocation.places if not node.external else ():  # that has its length
            node.file.grow(place.host_offset + place.length)  # a device refuses
            if not place.zeroed:
                node.file.write_zeroes(place.host_offset, place.length)
    except BaseException:
        node._abandon(allocation)
        raise
    node._publish(allocation, position, position + allocation.length)
    return allocation.length


def _fill_last(node: Qcow2, stop: int, length: int) -> None:
    """Reserve what the last cluster has behind the image's end, as QEMU does."""
    run = node.map(stop, length)
    if run.kind == DATA and run.child is not None:
        run.child.write_zeroes(run.host_offset, length)


def _preallocate_data(node: Qcow2, start: int, stop: int, mode: str, *, hides: bool) -> None:
    """One run of clusters for all of it, behind refcount structures that describe them."""
    bits, refcounts = node.header.cluster_bits, node.refcounts
    if not node.file.node.can_grow:
        raise UnsupportedError(
            f"Preallocation mode '{mode}' unsupported for this non-regular file"
        ).within("Failed to resize underlying file")
    node.file.node.refresh_size()
    first = max(-(-node.file.size >> bits), refcounts.last_used() + 1)
    count = (stop - start) >> bits
    tables = -(-count // node.per_l2) + 1  # one more for where the run begins: QEMU's sum
    with Step("Failed to resize refcount structures"):
        node.under_lock(lambda: refcounts.reserve(first, count + tables))
    node.settle()  # the old refcount table is free then
    if not count:
        return
    kept = refcounts.hint
    refcounts.hint = (refcounts.last_used()) + 1
    host = node.under_lock(lambda: refcounts.take(count))
    refcounts.hint = kept
    _grow_to(node, host, count << bits, mode)
    _link_all(node, start, stop, host, filled=hides)


def _grow_to(node: Qcow2, host: int, length: int, mode: str = "off") -> None:
    """Let the file have clusters that were taken; give them back if it cannot."""
    try:
        node.file.grow(host + length, mode)
    except BaseException as error:
        node.under_lock(lambda: node.refcounts.add(host, length, -1))
        if isinstance(error, IOFailure):
            error.within("Failed to resize underlying file")
        raise


def _link_all(node: Qcow2, start: int, stop: int, host: int, *, filled: bool = False) -> None:
    """Let guest clusters name a run of host clusters; those that none names are given back.

    Args:
        node: the image.
        start, stop: the guest clusters, in bytes.
        host: where the run begins.
        filled: what lies there is their content, also where an entry can say that it is not.
    """
    done = 0
    try:
        while start + done < stop:
            check_cancelled()

            def link(at: int = done) -> int:
                return node.link(start + at, stop - start - at, host + at, filled=filled)

            done += node.under_lock(link)
            _bound_memory(node)
    except BaseException:
        rest = stop - start - done
        node.under_lock(lambda: node.refcounts.add(host + done, rest, -1))
        raise


def _bound_memory(node: Qcow2) -> None:
    assert node.cache is not None
    full = node.cache.dirty_bytes > node.cache.capacity_bytes // 2
    if full or node.retired_pieces > _MAX_RETIRED:
        node.flush_inside()
