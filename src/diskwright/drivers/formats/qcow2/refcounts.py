"""Refcounts: how many times each host cluster is named; where free ones are found.

Refcounts only rise before something names a cluster, and only fall in `release`, when the
table that named it is durable without it. So writing them first is always safe.

A new refcount block is written before the table names it, a longer table before the header
does, and the old one is retired then. Free clusters are chosen as QEMU chooses them.

Source: QEMU, docs/interop/qcow2.txt, "Host cluster management".
"""

from __future__ import annotations

from array import array

from diskwright.block.cancel import check_cancelled
from diskwright.block.mapped import Freed, NeedWork
from diskwright.block.table_cache import TableMiss
from diskwright.drivers.formats.qcow2.entries import (
    REFTABLE_RESERVED,
    add_to_counts,
    named,
    number,
    used_length,
)
from diskwright.drivers.formats.qcow2.header import MAX_REFTABLE_BYTES
from diskwright.errors import NoSpaceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.table_cache import Slice, Table
    from diskwright.drivers.formats.qcow2.driver import Qcow2

#: Slices are at most this long, so that loading one stays cheap.
_MAX_BLOCK_SLICE = 1 << 16
_MAX_TABLE_SLICE = 1 << 12

#: Host offsets are below this.
_END = 1 << 56

#: The header's fixed part and most of its extensions; what a device writes as one.
SECTOR = 512


#: What happens as a longer refcount table takes over.
_GROWTH = (
    "reftable_grow",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
)


class Width:
    """How refcounts of one width are stored: below a byte several share one, lowest first."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.maximum = (1 << bits) - 1
        self.typecode = {16: "H", 32: "I", 64: "Q"}.get(bits, "B")
        self.per_byte = 8 // bits if bits < 8 else 0

    def get(self, items: array[int], index: int) -> int:
        """The refcount at `index` of stored items."""
        if not self.per_byte:
            return items[index]
        byte, at = divmod(index, self.per_byte)
        return items[byte] >> at * self.bits & self.maximum

    def put(self, items: array[int], index: int, value: int) -> None:
        """Change the refcount at `index` of stored items."""
        if not self.per_byte:
            items[index] = value
            return
        byte, at = divmod(index, self.per_byte)
        shift = at * self.bits
        items[byte] = items[byte] & ~(self.maximum << shift) | value << shift

    def unpack(self, items: array[int]) -> array[int]:
        """One array item a refcount."""
        if not self.per_byte:
            return items[:]
        raw = items.tobytes()
        counts = bytearray(len(raw) * self.per_byte)
        for at in range(self.per_byte):
            shift = at * self.bits
            table = bytes([byte >> shift & self.maximum for byte in range(256)])
            counts[at :: self.per_byte] = raw.translate(table)
        return array("B", counts)

    def pack(self, counts: array[int]) -> array[int]:
        """The inverse of `unpack`."""
        if not self.per_byte:
            return counts[:]
        raw = counts.tobytes()
        whole = 0
        for at in range(self.per_byte):
            part = int.from_bytes(raw[at :: self.per_byte], "little")
            whole |= part << at * self.bits
        return array("B", whole.to_bytes(len(raw) // self.per_byte, "little"))

    def first_zero(self, items: array[int], index: int) -> int:
        """The first refcount from `index` on that is 0, or -1."""
        if not self.per_byte:
            try:
                return items.index(0, index)
            except ValueError:
                return -1
        counts = self.unpack(items[index // self.per_byte :])
        try:
            return counts.index(0, index % self.per_byte) + index // self.per_byte * self.per_byte
        except ValueError:
            return -1

    def zero_run(self, items: array[int], start: int, stop: int) -> int:
        """How many refcounts from `start`, below `stop`, are 0 one after the other."""
        if not self.per_byte and items[start:stop].count(0) == stop - start:
            return stop - start
        at = start
        while at < stop and not self.get(items, at):
            at += 1
        return at - start

    def fill_ones(self, items: array[int], start: int, count: int) -> None:
        """Make `count` refcounts from `start` on 1."""
        if not self.per_byte:
            items[start : start + count] = array(self.typecode, [1]) * count
            return
        for at in range(start, start + count):
            self.put(items, at, 1)


class Refcounts:
    """The refcount table and blocks of one image. All methods: under the metadata lock."""

    def __init__(self, node: Qcow2) -> None:
        header = node.header
        self._node = node
        self.width = Width(header.refcount_bits)
        self.maximum = self.width.maximum
        self.cluster_size = header.cluster_size
        self.cluster_bits = header.cluster_bits
        self.block_entries = header.cluster_size * 8 // header.refcount_bits
        self._slice_bytes = min(header.cluster_size, _MAX_BLOCK_SLICE)
        self._slice_entries = self._slice_bytes * 8 // header.refcount_bits
        assert node.cache is not None
        self.blocks: Table = node.cache.table(
            "refcount block",
            typecode=self.width.typecode,
            byteorder="big",
            slice_bytes=self._slice_bytes,
            rank=0,
            event="refblock_load",
            write_event="refblock_update_part",
        )
        self._table_slice_bytes = min(header.cluster_size, _MAX_TABLE_SLICE)
        self._table_slices: Table = node.cache.table(
            "refcount table",
            typecode="Q",
            byteorder="big",
            slice_bytes=self._table_slice_bytes,
            rank=1,
            write_event="reftable_update",
        )
        self._header_slices: Table = node.cache.table(
            "header", typecode="B", byteorder="big", slice_bytes=SECTOR, rank=2
        )
        self.table: array[int] = array("Q")  # the whole refcount table
        self.hint = 0  # where looking for free clusters begins

    def load(self) -> None:
        """Read the refcount table."""
        header = self._node.header
        length = header.refcount_table_clusters * header.cluster_size
        self._node.file.event("reftable_load")
        data = self._node.file.read(header.refcount_table_offset, length)
        self.table = self._table_slices.decode(data)
        self.hint = 0

    # ----------------------------------------------------------------------------- one refcount

    def block_offset(self, block: int) -> int:
        """Where a refcount block lies; 0: there is none, all its refcounts are 0."""
        entry = self.table[block] & ~REFTABLE_RESERVED if block < len(self.table) else 0
        if entry & (self.cluster_size - 1) or entry >> 56:
            self._node.corrupt(
                f"Refblock offset {number(entry)} unaligned (reftable index: {number(block)})"
            )
        return entry

    def _slice(self, cluster: int) -> tuple[Slice, int] | None:
        """The slice with the cluster's refcount and the index in it; None: no block, so 0."""
        block, inside = divmod(cluster, self.block_entries)
        offset = self.block_offset(block)
        if not offset:
            return None
        part, index = divmod(inside, self._slice_entries)
        return self.blocks.get(offset + part * self._slice_bytes), index

    def get(self, cluster: int) -> int:
        """The refcount of a host cluster."""
        found = self._slice(cluster)
        return 0 if found is None else self.width.get(found[0].items, found[1])

    def touch(self, host_offset: int, length: int) -> None:
        """Fetch the slices for a host range, so that a change after it cannot miss."""
        if length <= 0:
            return
        cluster = host_offset >> self.cluster_bits
        last = (host_offset + length - 1) >> self.cluster_bits
        missing: list[int] = []
        while cluster <= last:
            try:
                self._slice(cluster)
            except TableMiss as miss:
                missing += miss.keys
            cluster = (cluster // self._slice_entries + 1) * self._slice_entries
        if missing:  # all at once: the hook begins anew after each miss
            raise TableMiss(self.blocks, *missing)

    def add(self, host_offset: int, length: int, step: int) -> None:
        """Add `step`, 1 or -1, to the refcount of every cluster of a host range.

        A refcount that is too low already stays 0: a check will tell.
        """
        self.touch(host_offset, length)
        cluster = host_offset >> self.cluster_bits
        stop = (host_offset + length - 1 >> self.cluster_bits) + 1
        while cluster < stop:
            found = self._slice(cluster)
            end = min(stop, (cluster // self._slice_entries + 1) * self._slice_entries)
            if found is not None:
                self._add_inside(found[0], found[1], end - cluster, step)
                if step < 0:
                    self.hint = min(self.hint, cluster)
            cluster = end

    def _add_inside(self, found: Slice, index: int, count: int, step: int) -> None:
        items, width = found.items, self.width
        low, high = (1, self.maximum) if step < 0 else (0, self.maximum - 1)
        part = items[index : index + count]
        if not width.per_byte and low <= min(part) and max(part) <= high:
            add_to_counts(items, index, index + count, step)
        else:
            for at in range(index, index + count):
                value = width.get(items, at)
                if low <= value <= high:
                    width.put(items, at, value + step)
        found.dirty()

    def last_used(self) -> int:
        """The last host cluster that is counted. Not under the lock."""
        for block in range(used_length(self.table) - 1, -1, -1):
            offset = self.block_offset(block)
            for part in range(self.cluster_size // self._slice_bytes - 1 if offset else -1, -1, -1):
                counts = self.width.unpack(self.blocks.get(offset + part * self._slice_bytes).items)
                if used := used_length(counts):
                    return block * self.block_entries + part * self._slice_entries + used - 1
        return 0

    def uses(self, wanted: int) -> bool:
        """Whether at least `wanted` host clusters are in use. Not under the lock."""
        return self.count_used(wanted) >= wanted

    def count_used(self, enough: int = 1 << 62) -> int:
        """How many host clusters are in use; ends once it has `enough`. Not under the lock."""
        used = 0
        for block, _ in named(self.table):
            offset = self.block_offset(block)
            for part in range(self.cluster_size // self._slice_bytes if offset else 0):
                counts = self.width.unpack(self.blocks.get(offset + part * self._slice_bytes).items)
                used += len(counts) - counts.count(0)
                if used >= enough:
                    return used
        return used

    # ------------------------------------------------------------------------ finding free ones

    def take(self, count: int, *, table: str = "", packed: bool = False) -> int:
        """Find `count` contiguous free clusters and count them once; the host offset.

        May raise TableMiss before it changes anything that matters. Where a `table` is to lie
        there, or a compressed cluster (`packed`), the first cluster of the file is no place for
        it, whatever writes are held against.

        Raises:
            NoSpaceError: a file cannot be that long.
        """
        start = self._find(count)
        stop = start + count
        first, last = start // self.block_entries, (stop - 1) // self.block_entries
        missing = [block for block in range(first, last + 1) if not self.block_offset(block)]
        if table or missing:  # new blocks come behind, where the file mostly ends
            begin = start if table else stop
            self.hint = start  # what was looked at need not be again
            self.need_room(
                begin << self.cluster_bits, stop + len(missing) - begin << self.cluster_bits
            )
        before, self.hint = self.hint, stop
        self._node.happens("cluster_alloc", "refblock_alloc")
        try:
            for block in missing:
                if not self.block_offset(block):
                    self._add_block(block)
            if not start and (table or packed):
                what = table or "compressed cluster"
                self._node.corrupt(f"Preventing invalid allocation of {what} at offset 0")
            self._node.guard(start << self.cluster_bits, count << self.cluster_bits)
            self._count(start, stop)
        except BaseException:
            self.hint = before
            raise
        return start << self.cluster_bits

    def _find(self, count: int) -> int:
        """The first of `count` free clusters in a row, at or behind `hint`."""
        start = cluster = self.hint
        while cluster < start + count:
            if cluster << self.cluster_bits >= _END:
                raise NoSpaceError("A qcow2 file cannot be longer than 2^56 bytes", errno=27)
            check_cancelled()
            found = self._sought(cluster, start, count)
            if found is None:
                cluster = (cluster // self.block_entries + 1) * self.block_entries
                continue
            items, index = found[0].items, found[1]
            end = cluster - index + self._slice_entries
            if cluster == start:
                free = self.width.first_zero(items, index)
                start = cluster = cluster - index + free if free >= 0 else end
                if free < 0:
                    continue
                index = free
            room = min(start + count, end) - cluster
            run = self.width.zero_run(items, index, index + room)
            cluster += run
            if run < room:
                start = cluster = cluster + 1
        return start

    def _sought(self, cluster: int, start: int, count: int) -> tuple[Slice, int] | None:
        """As `_slice`, for a search that has come to `cluster`.

        A slice that is missing costs no new search through all that was looked at already. As
        with QEMU, room that was too small is not looked at again.
        """
        try:
            return self._slice(cluster)
        except TableMiss as miss:
            if cluster > start:
                rest = start + count - cluster
                self.touch(cluster << self.cluster_bits, rest << self.cluster_bits)
                raise
            self.hint = cluster
            keys = miss.keys
            # Not pinned: if it is full, nobody needs it again.
            raise NeedWork(lambda: self._load(keys)) from None

    def _load(self, keys: tuple[int, ...]) -> None:
        for key in keys:
            self.blocks.get(key)

    def _count(self, start: int, stop: int) -> None:
        """Make the refcounts of free clusters 1; fetches all slices first."""
        self.touch(start << self.cluster_bits, (stop - start) << self.cluster_bits)
        self._node.note_used(stop << self.cluster_bits)
        while start < stop:
            found = self._slice(start)
            assert found is not None
            end = min(stop, start - found[1] + self._slice_entries)
            self.width.fill_ones(found[0].items, found[1], end - start)
            found[0].dirty()
            start = end

    # ---------------------------------------------------------------------------------- growth

    def _add_block(self, block: int) -> None:
        """Make the refcount block `block`, in the first free cluster, as QEMU does."""
        if block >= len(self.table):
            base = -(-max(self.hint, block * self.block_entries) // self.block_entries)
            self._new_table(base * self.block_entries, 0, exact=False)
            if self.block_offset(block):
                return
        place = self._find(1)
        own = place // self.block_entries
        if own != block and not self.block_offset(own):
            self._add_block(own)
            place = self._find(1)
        if place // self.block_entries != block:
            self._slice(place)  # now, so that nothing is missing once something was changed
        host = place << self.cluster_bits
        self._node.guard(host, self.cluster_size)
        self._node.happens("refblock_alloc_write", "refblock_alloc_hookup")
        self._create_blocks(host, 1)
        self.table[block] = host
        self._dirty_table(block, block + 1)
        self._node.note_metadata("refcount-block", [host])
        self._count(place, place + 1)
        self.blocks.promise()  # the table must not name what is not there
        self.hint = max(self.hint, place + 1)

    def forget_blocks(self, blocks: list[int]) -> list[Freed]:
        """Let the table name blocks no more that count nothing.

        Returns the space that they leave, to be retired once the table is durable.
        """
        freed: list[Freed] = []
        for block in blocks:
            host = self.table[block] & ~REFTABLE_RESERVED
            self.table[block] = 0
            self._dirty_table(block, block + 1)
            for key in range(host, host + self.cluster_size, self._slice_bytes):
                self.blocks.forget(key)
            size = self.cluster_size
            freed.append(Freed(self._node.file, host, size, slice=None, token="block"))
        return freed

    def need_room(self, host: int, length: int) -> None:
        """A new table is not to fail for want of space when it is written."""
        self._node.need_room(self._node.file, (host, length))

    def _create_blocks(self, host: int, count: int) -> None:
        """Slices for `count` blocks from `host` on, all zero."""
        for key in range(host, host + count * self.cluster_size, self._slice_bytes):
            self.blocks.create(key)

    def _dirty_table(self, first: int, stop: int) -> None:
        """Have the entries [first, stop) of the refcount table written."""
        offset, step = self._node.header.refcount_table_offset, self._table_slice_bytes
        per_slice = step // 8
        for index in range(first // per_slice, (stop - 1) // per_slice + 1):
            made = self._table_slices.create(offset + index * step)
            made.items[:] = self.table[index * per_slice : (index + 1) * per_slice]

    def reserve(self, first: int, extra: int) -> None:
        """A new table, and blocks for `extra` clusters behind it, from cluster `first` on.

        The next search begins behind them.
        """
        if first % self.block_entries and not self.block_offset(first // self.block_entries):
            first = -(-first // self.block_entries) * self.block_entries
        self.hint = self._new_table(first, extra, exact=True)

    def _new_table(self, first: int, extra: int, *, exact: bool) -> int:
        """Go on with a longer table, which lies with the new blocks from `first` on.

        In memory only: the ranks put blocks, table and header on disk in this order. Returns
        the cluster behind them.
        """
        node, header, size = self._node, self._node.header, self.cluster_size
        missing, clusters = self._plan(first, extra, exact)
        stop = first + len(missing) + clusters
        if clusters * size > MAX_REFTABLE_BYTES:
            raise NoSpaceError("The refcount table would be longer than 8 MiB", errno=27)
        base, length = first << self.cluster_bits, (stop - first) << self.cluster_bits
        self.touch(base, length)
        node.guard(base, length)
        self.need_room(base, length)
        node.happens(*_GROWTH)
        old_offset, old_length = header.refcount_table_offset, len(self.table) * 8
        for key in range(old_offset, old_offset + old_length, self._table_slice_bytes):
            self._table_slices.forget(key)
        self._create_blocks(base, len(missing))
        self.table.extend([0] * (clusters * size // 8 - len(self.table)))
        for place, block in enumerate(missing):
            self.table[block] = base + place * size
        self._count(first, stop)
        self.blocks.promise()
        header.refcount_table_offset = base + len(missing) * size
        header.refcount_table_clusters = clusters
        self._dirty_table(0, len(self.table))
        split = base + len(missing) * size
        node.note_metadata("refcount-block", range(base, split, size))
        node.note_metadata("refcount-table", range(split, base + length, size))
        old = Freed(node.file, old_offset, old_length, slice=self._dirty_header(), token="table")
        node.retire([old])
        return stop

    def _plan(self, first: int, extra: int, exact: bool) -> tuple[list[int], int]:
        """The blocks that have to be new, and how many clusters the table takes."""
        per_block = self.block_entries
        begin = -(-first // per_block)
        missing: list[int] = []
        clusters = 0
        while True:
            check_cancelled()
            last = -(-(first + len(missing) + clusters + extra) // per_block)
            if not exact:  # as many as QEMU makes
                last = max(last, begin - (-last // per_block))
            made = [block for block in range(begin, last) if not self.block_offset(block)]
            entries = max(last if exact else last * 3 // 2, len(self.table))
            needed = max(-(-entries * 8 // self.cluster_size), clusters)
            if len(made) <= len(missing) and needed == clusters:
                return missing, clusters
            missing, clusters = made, needed

    def _dirty_header(self) -> Slice:
        """Have the header's first sector written, between the refcount table and the L2."""
        found = self._header_slices.slices.get(0)
        if found is None:
            found = self._header_slices.create(0)
        found.items[:] = array("B", self._node.first_sector())
        found.dirty()
        return found

    def header_changed(self) -> None:
        """The header was written directly: what waits to be written must not undo that."""
        found = self._header_slices.slices.get(0)
        if found is not None:
            found.items[:] = array("B", self._node.first_sector())
