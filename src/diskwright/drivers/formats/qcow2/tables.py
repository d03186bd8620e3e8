"""L1 and L2 tables: where a guest cluster lies, and how that changes.

Ranks on disk: refcount blocks 0, refcount table 1, L2 2, L1 3. So a cluster is counted before
an L2 entry names it, and an L2 table is written before the L1 table names it.

Source: QEMU, docs/interop/qcow2.txt, "Cluster mapping".
"""

from __future__ import annotations

from array import array

from diskwright.block.extent import DATA, UNALLOCATED, ZERO
from diskwright.block.mapped import (
    TO_BACKING,
    TO_ZERO,
    Allocation,
    Encoder,
    Freed,
    MappedNode,
    Place,
    Run,
    Unit,
)
from diskwright.block.record import Record
from diskwright.drivers.formats.qcow2.refcounts import OFFSET_MASK
from diskwright.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskwright.block.child import Child
    from diskwright.block.table_cache import Slice, Table
    from diskwright.drivers.formats.qcow2.header import Header
    from diskwright.drivers.formats.qcow2.refcounts import Refcounts

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO_FLAG = 1
_PLAIN_LIMIT = 1 << 56

#: L2 slices are at most this long.
_MAX_SLICE = 1 << 16


class Pending(Record):
    """What `publish` needs of an allocation: the L2 slice, first entry, host offsets."""

    __slots__ = ("count", "encoded", "host", "index", "reused", "slice")

    def __init__(self, slice_: Slice, index: int, host: int, count: int) -> None:
        self.slice = slice_
        self.index = index
        self.host = host
        self.count = count
        self.reused = False  # a preallocated zero cluster's own space
        self.encoded = 0  # the entry of a compressed cluster


class Qcow2Tables(MappedNode):
    """The mapping half of the driver."""

    file: Child
    header: Header
    refcounts: Refcounts
    l1: array[int]

    def set_up_tables(self) -> None:
        """Declare the tables, once the header is known."""
        header = self.header
        self.cluster_size = self.fill_size = size = header.cluster_size
        self._bits = header.cluster_bits
        self._mask = size - 1
        self._slice_bytes = min(size, _MAX_SLICE)
        self._slice_count = self._slice_bytes // 8
        self._slice_mask = self._slice_count - 1
        self._slice_shift = self._slice_count.bit_length() - 1
        self._per_l2 = size // 8
        self._l1_shift = self._bits + self._per_l2.bit_length() - 1
        self._l2_mask = self._per_l2 - 1
        self._size_shift = 62 - (self._bits - 8)  # of compressed entries
        assert self.cache is not None
        self.l2_table: Table = self.cache.table(
            "L2", typecode="Q", byteorder="big", slice_bytes=self._slice_bytes, rank=2, event="l2_load"
        )
        self.l1_slices: Table = self.cache.table(
            "L1", typecode="Q", byteorder="big", slice_bytes=512, rank=3
        )
        self._l2 = self.l2_table.slices

    def load_l1(self) -> None:
        """Read the active L1 table."""
        header = self.header
        self.l1 = self.read_l1(header.l1_table_offset, header.l1_size)

    def read_l1(self, offset: int, entries: int) -> array[int]:
        """An L1 table from the file."""
        return self.l1_slices.decode(self.file.read(offset, entries * 8)) if entries else array("Q")

    def note_used(self, stop: int) -> None:
        """Host space up to `stop` has been handed out: it is not virgin any more."""
        self._virgin = max(self._virgin, stop)

    # -------------------------------------------------------------------------------- mapping

    def locate(self, offset: int, length: int, *, write: bool = False) -> int:
        """See `Node.locate`: one dict look-up, two indexings and a compare."""
        within = offset & self._mask
        if within + length > self.cluster_size:
            return -1
        cluster = offset >> self._bits
        base = self.l1[offset >> self._l1_shift] & OFFSET_MASK
        part = (cluster & self._l2_mask) >> self._slice_shift
        found = self._l2.get(base + part * self._slice_bytes)
        if found is None or not base:
            return -1
        found.used = True
        entry = found.items[cluster & self._slice_mask]
        host = entry & ~COPIED
        if not 511 < host < _PLAIN_LIMIT or host & 511 or (write and entry < COPIED):
            return -1
        return host + within

    def _l2_slice(self, cluster: int) -> Slice | None:
        """The slice with a guest cluster's entry; None where there is no L2 table."""
        base = self.l1[cluster // self._per_l2] & OFFSET_MASK
        if not base:
            return None
        if base & self._mask:
            raise self._corrupt(f"L2 table offset {base:#x} unaligned (L1 index: {cluster // self._per_l2:#x})")
        part = (cluster & self._l2_mask) >> self._slice_shift
        return self.l2_table.get(base + part * self._slice_bytes)

    def _corrupt(self, text: str) -> FormatError:
        return FormatError(
            f"{self.describe()}: {text}; run a check",
            path=self.filename,
            hint="check the image: diskwright-img check",
        )

    def map(self, offset: int, length: int, *, write: bool = False) -> Run:
        """See `MappedBase.map`. A run stays inside of one L2 slice."""
        cluster = offset >> self._bits
        found = self._l2_slice(cluster)
        if found is None:
            return Run(UNALLOCATED, min(length, self._empty_until(cluster, length) - offset))
        items, first = found.items, cluster & self._slice_mask
        stop = min(first - cluster + ((offset + length - 1) >> self._bits) + 1, self._slice_count)
        entry = items[first]
        within = offset & self._mask
        if entry & COMPRESSED:
            unit = self._unit(cluster, entry)
            return Run(DATA, self.cluster_size - within, child=self.file, plain=False, unit=unit)
        host = entry & OFFSET_MASK
        if entry & ZERO_FLAG and self.header.version >= 3:
            return self._zero_run(items, first, stop, within)
        if not host:
            count = 1
            while first + count < stop and not items[first + count] & ~COPIED:
                count += 1
            return Run(UNALLOCATED, (count << self._bits) - within)
        return self._data_run(items, first, stop, within)

    def _empty_until(self, cluster: int, length: int) -> int:
        """Where the run of missing L2 tables that begins at `cluster` ends, in bytes."""
        index = cluster // self._per_l2
        last = min((((cluster << self._bits) + length) >> self._l1_shift) + 1, len(self.l1))
        index += 1
        while index < last and not self.l1[index] & OFFSET_MASK:
            index += 1
        return index << self._l1_shift

    def _zero_run(self, items: array[int], first: int, stop: int, within: int) -> Run:
        entry = items[first]
        host = entry & OFFSET_MASK
        count = 1
        while first + count < stop:
            after = items[first + count]
            wanted = (host + (count << self._bits)) if host else 0
            if after & COMPRESSED or not after & ZERO_FLAG or after & OFFSET_MASK != wanted:
                break
            count += 1
        length = (count << self._bits) - within
        if host:
            return Run(ZERO, length, child=self.file, host_offset=host + within)
        return Run(ZERO, length)

    def _data_run(self, items: array[int], first: int, stop: int, within: int) -> Run:
        entry = items[first]
        host = entry & OFFSET_MASK
        if host & self._mask:
            raise self._corrupt(f"Cluster allocation offset {host:#x} unaligned")
        expected = entry + self.cluster_size
        count = 1
        while first + count < stop and items[first + count] == expected:
            expected += self.cluster_size
            count += 1
        length = (count << self._bits) - within
        return Run(
            DATA, length, child=self.file, host_offset=host + within, writable=entry >= COPIED
        )

    def _unit(self, cluster: int, entry: int) -> Unit:
        host = entry & ((1 << self._size_shift) - 1)
        sectors = (entry >> self._size_shift & ((1 << (62 - self._size_shift)) - 1)) + 1
        return Unit(
            cluster << self._bits,
            self.cluster_size,
            self.file,
            host_offset=host,
            host_length=sectors * 512 - (host & 511),
        )

    # ------------------------------------------------------------------------------ allocation

    def _own_l2_slice(self, cluster: int) -> Slice:
        """The slice with a guest cluster's entry, in an L2 table that nobody else names."""
        index = cluster // self._per_l2
        entry = self.l1[index]
        part = (cluster & self._l2_mask) >> self._slice_shift
        if not entry & OFFSET_MASK or not entry & COPIED:
            entry = self._new_l2(index, entry & OFFSET_MASK)
        return self.l2_table.get((entry & OFFSET_MASK) + part * self._slice_bytes)

    def _new_l2(self, index: int, old: int) -> int:
        """Give L1 entry `index` an L2 table of its own, a copy of `old` if that is not 0."""
        size, step = self.cluster_size, self._slice_bytes
        parts = [self.l2_table.get(old + at) for at in range(0, size, step)] if old else []
        self.refcounts.touch(old, size if old else 0)
        place = self.header.l1_table_offset + index * 8
        l1_slice = self.l1_slices.get(place & ~511)
        host, _ = self.refcounts.take(1)
        for number, at in enumerate(range(0, size, step)):
            made = self.l2_table.create(host + at)
            if parts:
                made.items[:] = parts[number].items
        self.note_used(host + size)
        self.l1[index] = l1_slice.items[(place & 511) // 8] = host | COPIED
        l1_slice.dirty()
        if old:
            self.retire([Freed(self.file, old, size, slice=l1_slice, token="L2")])
        return host | COPIED

    def allocate(self, offset: int, length: int) -> Allocation:
        """See `MappedBase.allocate`: contiguous clusters inside of one L2 slice."""
        cluster = offset >> self._bits
        found = self._own_l2_slice(cluster)
        index = cluster & self._slice_mask
        count = min(length >> self._bits, self._slice_count - index)
        entry = found.items[index]
        reused = entry & OFFSET_MASK
        if entry & ZERO_FLAG and entry >= COPIED and reused and not entry & COMPRESSED:
            count = self._reusable(found.items, index, count)
            pending = Pending(found, index, reused, count)
            pending.reused = True
            place = Place(offset, count << self._bits, self.file, host_offset=reused)
            return Allocation(offset, count << self._bits, [place], token=pending)
        host, count = self.refcounts.take(count)
        virgin = host >= self._virgin
        self.note_used(host + (count << self._bits))
        place = Place(offset, count << self._bits, self.file, host_offset=host, zeroed=virgin)
        pending = Pending(found, index, host, count)
        return Allocation(offset, count << self._bits, [place], token=pending)

    def _reusable(self, items: array[int], index: int, count: int) -> int:
        run, expected = 1, items[index] + self.cluster_size
        while run < count and items[index + run] == expected:
            run += 1
            expected += self.cluster_size
        return run

    def publish(self, allocation: Allocation, start: int, stop: int) -> Sequence[Freed]:
        """See `MappedBase.publish`."""
        pending = allocation.token
        assert isinstance(pending, Pending)
        items, index = pending.slice.items, pending.index
        freed: list[Freed] = []
        if pending.encoded:
            freed += self._freed(items[index], pending.slice)
            items[index] = pending.encoded
        else:
            first = (start - allocation.offset) >> self._bits
            last = (stop - allocation.offset) >> self._bits
            host = pending.host | COPIED
            for at in range(first, last):
                if not pending.reused and items[index + at]:
                    freed += self._freed(items[index + at], pending.slice)
                items[index + at] = host + (at << self._bits)
        pending.slice.dirty()
        return freed

    def _freed(self, entry: int, named_by: Slice) -> list[Freed]:
        """What an entry named, when it goes."""
        if entry & COMPRESSED:
            unit = self._unit(0, entry)
            return [Freed(self.file, unit.host_offset, unit.host_length, slice=named_by)]
        host = entry & OFFSET_MASK
        if not host:
            return []
        sole = entry >= COPIED
        return [Freed(self.file, host, self.cluster_size, slice=named_by, sole=sole)]

    def abandon(self, allocation: Allocation) -> None:
        """See `MappedBase.abandon`."""
        pending = allocation.token
        assert isinstance(pending, Pending)
        if pending.reused:
            return
        for place in allocation.places:
            if self._can_count(place.host_offset, place.length):
                self.refcounts.add(place.host_offset, place.length, -1)

    def _can_count(self, host_offset: int, length: int) -> bool:
        """Whether a refcount can be changed now; if not, the cluster leaks."""
        from diskwright.block.table_cache import TableMiss

        try:
            self.refcounts.touch(host_offset, length)
        except TableMiss:
            return False
        return True

    def release(self, freed: Freed) -> None:
        """See `MappedBase.release`."""
        self.refcounts.touch(freed.host_offset, freed.length)
        if freed.token == "L2":
            for at in range(0, freed.length, self._slice_bytes):
                self.l2_table.forget(freed.host_offset + at)
        first, last = freed.host_offset >> self._bits, (freed.host_offset + freed.length - 1) >> self._bits
        if first <= self._packed_end >> self._bits <= last:
            self._packed_end = 0  # the cluster may become somebody else's
        self.refcounts.add(freed.host_offset, freed.length, -1)

    # -------------------------------------------------------------------------------- unmapping

    def unmap(self, offset: int, length: int, to: int, *, keep: bool) -> tuple[int, Sequence[Freed]]:
        """See `MappedBase.unmap`. Version 2 has no zero clusters."""
        zeroes = self.header.version >= 3
        shows = self.backing is not None
        if not zeroes and shows and to != TO_BACKING:
            return 0, ()
        cluster = offset >> self._bits
        stop = (offset + length + self._mask) >> self._bits
        target = ZERO_FLAG if zeroes and to != TO_BACKING else 0
        if not self.l1[cluster // self._per_l2] & OFFSET_MASK and (not shows or to == TO_BACKING):
            end = min((cluster // self._per_l2 + 1) * self._per_l2, stop)
            return min((end << self._bits) - offset, length), ()
        found = self._own_l2_slice(cluster)
        index = cluster & self._slice_mask
        count = min(stop - cluster, self._slice_count - index)
        freed: list[Freed] = []
        for at in range(index, index + count):
            freed += self._unmap_entry(found, at, target, keep=keep and to == TO_ZERO)
        return min((count << self._bits) - (offset & self._mask), length), freed

    def _unmap_entry(self, found: Slice, at: int, target: int, *, keep: bool) -> list[Freed]:
        entry = found.items[at]
        if not entry and (not target or self.backing is None):
            return []
        kept = keep and target and entry >= COPIED and entry & OFFSET_MASK and not entry & COMPRESSED
        made = entry | target if kept else target
        if made == entry:
            return []
        found.items[at] = made
        found.dirty()
        return [] if kept else self._freed(entry, found)

    # -------------------------------------------------------------------------------- encoded

    def decode(self, unit: Unit, encoded: memoryview, out: memoryview) -> None:
        """See `MappedBase.decode`."""
        if self.header.compression_type:
            from diskwright.codecs import zstd as codec
        else:
            from diskwright.codecs import deflate as codec  # type: ignore[no-redef]
        codec.decode_into(encoded, out)

    def encoder(self) -> Encoder:
        """Compresses clusters as the header says."""
        from diskwright.drivers.formats.qcow2.compression import ClusterEncoder

        return ClusterEncoder(self.cluster_size, self.header.compression_type)

    def allocate_encoded(self, offset: int, length: int, host_length: int) -> Allocation:
        """See `MappedBase.allocate_encoded`: payloads share clusters, byte by byte."""
        cluster = offset >> self._bits
        found = self._own_l2_slice(cluster)
        host = self._room_for(host_length)
        pending = Pending(found, cluster & self._slice_mask, host, 1)
        sectors = ((host & 511) + host_length - 1) >> 9
        pending.encoded = COMPRESSED | sectors << self._size_shift | host
        place = Place(offset, host_length, self.file, host_offset=host)
        return Allocation(offset, length, [place], token=pending)

    def _room_for(self, length: int) -> int:
        """Byte-granular host space, counted in every cluster it touches."""
        start = self._packed_end
        room = -start & self._mask if start else 0
        if room >= length and self.refcounts.get(start >> self._bits) < self.refcounts.maximum:
            self.refcounts.add(start, length, 1)
            self._packed_end = start + length
            return start
        if room and self.refcounts.get(start >> self._bits) < self.refcounts.maximum:
            self.refcounts.touch(start, room)
            host, _ = self.refcounts.take(1)
            self.note_used(host + self.cluster_size)
            if host == start + room:  # the next cluster: go on across the border
                self.refcounts.add(start, 1, 1)
                self._packed_end = start + length
                return start
        else:
            host, _ = self.refcounts.take(1)
            self.note_used(host + self.cluster_size)
        self._packed_end = host + length
        return host

    _packed_end = 0
    _virgin = 0


__all__ = ["COMPRESSED", "COPIED", "TO_ZERO", "ZERO_FLAG", "Qcow2Tables"]
