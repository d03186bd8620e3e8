"""Refcounts: how many times each host cluster is named; where free ones are found.

Refcounts only rise before something names a cluster, and only fall in `release`, when the
table that named it is durable without it. So writing them first is always safe.

Source: QEMU, docs/interop/qcow2.txt, "Host cluster management".
"""

from __future__ import annotations

from array import array

from diskwright.block.mapped import NeedWork
from diskwright.errors import FormatError, NoSpaceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.table_cache import Slice, Table
    from diskwright.drivers.formats.qcow2.driver import Qcow2

_TYPECODES = {8: "B", 16: "H", 32: "I", 64: "Q"}

#: Bits 9 to 55 of table entries are offsets.
OFFSET_MASK = 0x00FFFFFFFFFFFE00

#: Refcount slices are at most this long, so that loading one stays cheap.
_MAX_SLICE = 1 << 16


class Refcounts:
    """The refcount table and blocks of one image. All methods: under the metadata lock."""

    def __init__(self, node: Qcow2) -> None:
        header = node.header
        self._node = node
        self.bits = header.refcount_bits
        self.maximum = (1 << self.bits) - 1
        self.cluster_size = header.cluster_size
        self.cluster_bits = header.cluster_bits
        self.block_entries = header.cluster_size * 8 // self.bits
        self._slice_bytes = min(header.cluster_size, _MAX_SLICE)
        self._slice_entries = self._slice_bytes * 8 // self.bits
        assert node.cache is not None
        self.blocks: Table = node.cache.table(
            "refcount block",
            typecode=_TYPECODES.get(self.bits, "B"),
            byteorder="big",
            slice_bytes=self._slice_bytes,
            rank=0,
            event="refblock_load",
        )
        self._table_slices: Table = node.cache.table(
            "refcount table",
            typecode="Q",
            byteorder="big",
            slice_bytes=512,
            rank=1,
        )
        self.table: array[int] = array("Q")  # resident copy of the refcount table
        self.hint = 0  # no free cluster lies below

    def load(self) -> None:
        """Read the refcount table."""
        header = self._node.header
        length = header.refcount_table_clusters * header.cluster_size
        data = self._node.file.read(header.refcount_table_offset, length)
        self.table = self._table_slices.decode(data)
        self.hint = 0

    # ----------------------------------------------------------------------------- one refcount

    def _slice(self, cluster: int) -> tuple[Slice, int] | None:
        """The slice with the cluster's refcount and the index in it; None: no block, so 0."""
        block, inside = divmod(cluster, self.block_entries)
        if block >= len(self.table) or not self.table[block] & OFFSET_MASK:
            return None
        entry = self.table[block]
        if entry & (self.cluster_size - 1):
            raise FormatError(
                f"Refblock offset {entry:#x} unaligned (reftable index: {block:#x})",
                field="refcount table entry",
                value=entry,
                path=self._node.filename,
            )
        part, index = divmod(inside, self._slice_entries)
        return self.blocks.get(entry + part * self._slice_bytes), index

    def _value(self, items: array[int], index: int) -> int:
        if self.bits >= 8:
            return items[index]
        per_byte = 8 // self.bits
        shift = index % per_byte * self.bits
        return items[index // per_byte] >> shift & self.maximum

    def _store(self, items: array[int], index: int, value: int) -> None:
        if self.bits >= 8:
            items[index] = value
            return
        per_byte = 8 // self.bits
        shift = index % per_byte * self.bits
        byte = items[index // per_byte] & ~(self.maximum << shift)
        items[index // per_byte] = byte | value << shift

    def get(self, cluster: int) -> int:
        """The refcount of a host cluster."""
        found = self._slice(cluster)
        return 0 if found is None else self._value(found[0].items, found[1])

    def set(self, cluster: int, value: int) -> None:
        """Change a refcount whose block exists."""
        found = self._slice(cluster)
        assert found is not None
        self._store(found[0].items, found[1], value)
        found[0].dirty()

    def touch(self, host_offset: int, length: int) -> None:
        """Fetch the slices for a host range, so that a change after it cannot miss."""
        if length <= 0:
            return
        cluster = host_offset >> self.cluster_bits
        last = (host_offset + length - 1) >> self.cluster_bits
        while cluster <= last:
            self._slice(cluster)
            cluster = (cluster // self._slice_entries + 1) * self._slice_entries

    def add(self, host_offset: int, length: int, step: int) -> None:
        """Add `step` to the refcount of every cluster of a host range."""
        first = host_offset >> self.cluster_bits
        last = (host_offset + length - 1) >> self.cluster_bits
        self.touch(host_offset, length)
        for cluster in range(first, last + 1):
            value = self.get(cluster) + step
            if value < 0:
                continue  # the image said so wrongly; a check will tell
            self.set(cluster, min(value, self.maximum))
            if not value:
                self.hint = min(self.hint, cluster)

    # ------------------------------------------------------------------------ finding free ones

    def find(self, count: int) -> tuple[int, int]:
        """(first, length) of free clusters, at least one and at most `count`, contiguous.

        Their refcount block exists. May raise TableMiss and NeedWork; changes nothing.
        """
        cluster = self.hint
        while True:
            block = cluster // self.block_entries
            if (block * self.block_entries) << self.cluster_bits >= 1 << 56:
                raise NoSpaceError("A qcow2 file cannot be longer than 2^56 bytes", errno=27)
            found = self._slice(cluster)
            if found is None:
                raise NeedWork(lambda block=block: self._add_block(block))  # type: ignore[misc]
            items, index = found[0].items, found[1]
            start = self._first_free(items, index)
            base = cluster - index
            if start < 0:
                cluster = base + self._slice_entries
                self.hint = max(self.hint, cluster)
                continue
            length = self._free_run(items, start, count)
            return base + start, length

    def _first_free(self, items: array[int], index: int) -> int:
        if self.bits >= 8:
            try:
                return items.index(0, index)
            except ValueError:
                return -1
        for at in range(index, self._slice_entries):
            if not self._value(items, at):
                return at
        return -1

    def _free_run(self, items: array[int], start: int, count: int) -> int:
        stop = min(start + count, self._slice_entries)
        if self.bits >= 8 and not any(items[start:stop]):
            return stop - start
        length = 1
        while start + length < stop and not self._value(items, start + length):
            length += 1
        return length

    def take(self, count: int) -> tuple[int, int]:
        """Find free clusters and count them once; (host offset, clusters)."""
        first, length = self.find(count)
        for cluster in range(first, first + length):
            self.set(cluster, 1)
        if first == self.hint:
            self.hint = first + length
        return first << self.cluster_bits, length

    def take_contiguous(self, count: int) -> int:
        """Exactly `count` contiguous clusters, counted once; their host offset.

        May span blocks. Used for tables; the caller has the graph to itself or the lock.
        """
        first = self._contiguous(count)
        for cluster in range(first, first + count):
            self.set(cluster, 1)
        return first << self.cluster_bits

    def _contiguous(self, count: int) -> int:
        start = self.hint
        length = 0
        cluster = start
        while length < count:
            found = self._slice(cluster)
            if found is None:
                block = cluster // self.block_entries
                raise NeedWork(lambda: self._add_block(block))
            if self._value(found[0].items, found[1]):
                start, length = cluster + 1, 0
            else:
                length += 1
            cluster += 1
        return start

    # ---------------------------------------------------------------------------------- growth

    def _add_block(self, block: int) -> None:
        """Make the refcount block `block`; without the metadata lock held by the caller."""
        node = self._node
        with node.metadata_lock:
            if block < len(self.table) and self.table[block] & OFFSET_MASK:
                return
            if block >= len(self.table):
                self._grow_table(block)
            index = block * self.block_entries
            # The block lies in the first cluster that it describes, so it needs no other.
            host = index << self.cluster_bits
            self._make_block(block, host)
            node.note_used(host + self.cluster_size)

    def _make_block(self, block: int, host: int) -> None:
        header = self._node.header
        place = header.refcount_table_offset + block * 8
        key = place & ~511
        items = self.table[(key - header.refcount_table_offset) // 8 :][:64]
        for part in range(0, self.cluster_size, self._slice_bytes):
            self.blocks.create(host + part)
        table_slice = self._table_slices.create(key)
        table_slice.items[: len(items)] = items
        table_slice.items[(place - key) // 8] = host
        self.table[block] = host
        self.set(host >> self.cluster_bits, 1)

    def _grow_table(self, block: int) -> None:
        """Move the refcount table to where it can be longer; durable on return.

        The new table lies, with blocks of its own, behind everything that is in use.
        """
        node, header, size = self._node, self._node.header, self.cluster_size
        entries = max(block + 1, len(self.table) * 3 // 2 + 1)
        clusters = -(-entries * 8 // size)
        first_block = len(self.table)
        # All of it goes to clusters that the first new block describes.
        start = first_block * self.block_entries
        blocks = 1
        while blocks * self.block_entries < blocks + clusters:
            blocks += 1
        clusters = max(clusters, -(-(first_block + blocks) * 8 // size))
        table = self.table[:]
        table.extend([0] * (clusters * size // 8 - len(table)))
        counts = array(self.blocks.typecode, bytes(blocks * size))
        for used in range(blocks + clusters):
            self._store(counts, used, 1)
        base = start << self.cluster_bits
        for number in range(blocks):
            table[first_block + number] = base + number * size
        old_offset, old_length = header.refcount_table_offset, len(self.table) * 8
        if len(table) * 8 > 8 << 20:
            raise NoSpaceError("The refcount table would be longer than 8 MiB", errno=27)
        self._write_dirty_blocks()
        node.file.write(base, self.blocks.encode(counts))
        node.file.write(base + blocks * size, self._table_slices.encode(table))
        node.file.flush()
        self._table_slices.slices.clear()
        header.refcount_table_offset = base + blocks * size
        header.refcount_table_clusters = clusters
        self._flush_old_table()
        node.write_header()
        self.table = table
        node.note_used(base + (blocks + clusters) * size)
        if self._resident(old_offset, old_length):
            self.add(old_offset, old_length, -1)

    def _write_dirty_blocks(self) -> None:
        """Blocks that only the new table names must be on disk before it is."""
        cache = self._node.cache
        assert cache is not None
        for found in list(cache.dirty_slices.values()):
            if found.table is self.blocks:
                self._node.file.write(found.key, self.blocks.encode(found.items))

    def _flush_old_table(self) -> None:
        """Changes of the table that moved are in the new one already."""
        cache = self._node.cache
        assert cache is not None
        for key, found in list(cache.dirty_slices.items()):
            if found.table is self._table_slices:
                del cache.dirty_slices[key]
                cache.dirty_bytes -= found.table.slice_bytes

    def _resident(self, host_offset: int, length: int) -> bool:
        """Whether the old table's refcounts can be lowered without reading; else they leak."""
        first = host_offset >> self.cluster_bits
        last = (host_offset + length - 1) >> self.cluster_bits
        for cluster in range(first, last + 1):
            block, inside = divmod(cluster, self.block_entries)
            key = (self.table[block] & OFFSET_MASK) + inside // self._slice_entries * self._slice_bytes
            if self.blocks.peek(key) is None:
                return False
        return True
