"""Making an image longer or shorter, and reserving host space for what is added."""

from __future__ import annotations

from array import array

from diskwright.drivers.formats.qcow2.header import MAX_L1_BYTES
from diskwright.drivers.formats.qcow2.transaction import Transaction
from diskwright.errors import UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.drivers.formats.qcow2.driver import Qcow2


def resize(node: Qcow2, size: int, preallocation: str) -> None:
    """Change the virtual size; the caller has the graph to itself.

    Raises:
        UnsupportedError: the size is no multiple of 512, the image has snapshots whose size
            could not be told afterwards, or preallocation was asked for a shrink.
    """
    if size & 511:
        raise UnsupportedError("The new size must be a multiple of 512")
    header = node.header
    if header.version < 3 and header.nb_snapshots and size != node.size:
        raise UnsupportedError("Can't resize a v2 image which has snapshots")
    entries = max(-(-size // (1 << node._l1_shift)), 1)
    if entries * 8 > MAX_L1_BYTES:
        raise UnsupportedError("The L1 table would be too large", qemu="File too large")
    if size < node.size:
        if preallocation != "off":
            raise UnsupportedError("Preallocation can't be used for shrinking images")
        _shrink(node, size)
    elif size > node.size:
        _grow(node, size, entries, preallocation)


def _grow(node: Qcow2, size: int, entries: int, preallocation: str) -> None:
    header, old = node.header, node.size
    if entries > header.l1_size:
        change = Transaction(node)
        made = node.l1[:]
        made.extend([0] * (entries - len(made)))
        change.activate(made, header.l1_table_offset, header.l1_size)
        change.commit()
    node.size = size
    if node.backing is not None and node.backing.size > old:
        node.hide_backing(old, min(size, node.backing.size))
    if preallocation != "off":
        preallocate(node, old, size, preallocation)
    node.settle()
    header.size = size
    node.write_header()
    node.file.flush()


def _shrink(node: Qcow2, size: int) -> None:
    """Free what lies beyond the new end, in one step with the new size."""
    header = node.header
    change = Transaction(node)
    made = node.l1[:]
    first = -(-size // node.cluster_size)

    def visit(index: int, entry: int, items: array[int]) -> None:
        start = index * node._per_l2
        if start + node._per_l2 <= first:
            return
        keep = max(first - start, 0)
        gone = items[keep:]
        if not any(gone):
            return
        change.change_named(gone, -1)
        change.change(entry & 0x00FFFFFFFFFFFE00, node.cluster_size, -1)
        made[index] = 0
        if keep:
            kept = items[:keep]
            kept.extend([0] * len(gone))
            made[index] = change.write(node.l2_table.encode(kept)) | 1 << 63

    change.each_l2(node.l1, visit)
    if made != node.l1:
        change.activate(made, header.l1_table_offset, header.l1_size)
    header.size = size
    change.commit()
    cut_file(node)


def cut_file(node: Qcow2) -> None:
    """Give back what lies behind the last cluster in use."""
    refcounts = node.refcounts
    last = 0
    for block in range(len(refcounts.table) - 1, -1, -1):
        if not refcounts.table[block]:
            continue
        for inside in range(refcounts.block_entries - 1, -1, -1):
            if refcounts.get(block * refcounts.block_entries + inside):
                last = block * refcounts.block_entries + inside
                break
        if last:
            break
    end = (last + 1) * node.cluster_size
    if last and end < node.file.size:
        node.file.truncate(end)
        node._virgin = end


def preallocate(node: Qcow2, start: int, stop: int, mode: str) -> None:
    """Give every unallocated cluster of [start, stop) host space that reads as zero."""
    from diskwright.block.extent import UNALLOCATED

    size = node.cluster_size
    position = start // size * size
    end = -(-stop // size) * size
    while position < end:
        run = node.map(position, min(stop, node.size) - position) if position < node.size else None
        if run is not None and run.kind != UNALLOCATED:
            position += run.length
            position = -(-position // size) * size
            continue
        length = end - position if run is None else -(-run.length // size) * size
        allocation = node._allocate(position, length)
        try:
            for place in allocation.places:
                host_end = place.host_offset + place.length
                if place.zeroed:
                    node.file.grow(host_end, "off" if mode == "metadata" else mode)
                else:
                    node.file.write_zeroes(place.host_offset, place.length)
        except BaseException:
            node._abandon(allocation)
            raise
        node._publish(allocation, position, position + allocation.length)
        position += allocation.length


__all__ = ["cut_file", "preallocate", "resize"]
