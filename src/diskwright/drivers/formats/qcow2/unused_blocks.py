"""Refcount blocks in which nothing is counted any more: the table ceases to name them.

An image that became shorter has them at its end. The table is durable without a block before the
block's own cluster is given back, so that a crash leaves a leak at worst.
"""

from __future__ import annotations

from diskwright.block.cancel import check_cancelled
from diskwright.drivers.formats.qcow2.entries import REFTABLE_RESERVED, named, number
from diskwright.errors import DiskwrightError, strerror_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.drivers.formats.qcow2.driver import Qcow2


def drop(node: Qcow2) -> None:
    """Give up all such blocks; the caller has the graph to itself.

    Raises:
        IOFailure: the table names a block that cannot be, which is noted in the image.
    """
    try:
        _drop(node)
    except DiskwrightError as error:
        error.qemu = f"Failed to discard unused refblocks: {strerror_of(error)}"
        raise


def _drop(node: Qcow2) -> None:
    refcounts = node.refcounts
    node.settle()
    unused = [block for block, _ in named(refcounts.table) if _is_unused(node, block)]
    if not unused:
        return
    freed = node.under_lock(lambda: refcounts.forget_blocks(unused))
    node.settle()
    gone = set(unused)
    for space in freed:
        block = (space.host_offset >> node.header.cluster_bits) // refcounts.block_entries
        if block not in gone and not _place(node, block):
            host = number(space.host_offset)
            node.corrupt(f"Refblock at {host} is not covered by the refcount structures")
    node.under_lock(lambda: node.retire(freed))
    node.settle()


def _place(node: Qcow2, block: int) -> int:
    """Where a block lies; 0: there is none."""
    table = node.refcounts.table
    host = table[block] & ~REFTABLE_RESERVED if block < len(table) else 0
    if host & (node.cluster_size - 1):
        text = f"Offset {number(host)} is unaligned"
        node.corrupt(f"Cannot get entry from refcount block cache: {text}")
    return host


def _is_unused(node: Qcow2, block: int) -> bool:
    """Whether a block counts nothing but itself."""
    check_cancelled()
    refcounts, host = node.refcounts, _place(node, block)
    if not host:
        return False
    own_block, own = divmod(host >> node.header.cluster_bits, refcounts.block_entries)
    first = 0
    for key in range(host, host + node.cluster_size, refcounts.blocks.slice_bytes):
        counts = refcounts.width.unpack(refcounts.blocks.get(key).items)
        if own_block == block and first <= own < first + len(counts):
            counts[own - first] = 0
        if counts.count(0) != len(counts):
            return False
        first += len(counts)
    return True
