"""L1 and L2 tables: where a guest cluster lies, and how that changes.

Ranks on disk: refcount blocks 0, refcount table 1, header 2, L2 3, L1 4. So a cluster is
counted before an L2 entry names it, and an L2 table is written before the L1 table names it.

Source: QEMU, docs/interop/qcow2.txt, "Cluster mapping".
"""

from __future__ import annotations

from array import array

from diskwright.block.extent import DATA, READS_ZERO, UNALLOCATED
from diskwright.block.mapped import Allocation, Freed, Place, Run, Unit
from diskwright.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    PLAIN_LIMIT,
    WITHOUT_COPIED,
    is_empty,
    number,
    runs,
)
from diskwright.drivers.formats.qcow2.guard import GuardedNode
from diskwright.drivers.formats.qcow2.header import Incompatible
from diskwright.drivers.formats.qcow2.standard_l2 import Pending, StandardL2
from diskwright.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskwright.block.mapped import Encoder
    from diskwright.block.table_cache import Slice, Table

#: An L1 slice is what a device writes as one, so that no entry of it can be torn.
_L1_SLICE = 512


class Qcow2Tables(GuardedNode):
    """The mapping half of the driver."""

    reserves_space = True
    backing_may_change = True

    #: bits of an L2 entry that are 0 where it names nothing
    empty_mask = WITHOUT_COPIED
    #: and those that are 0 where it names no cluster, but may be of a kind
    name_mask = OFFSET_MASK
    packed_end = 0  # where the next compressed cluster may begin; 0: in a cluster of its own
    external = False  # the guest's data are in a file of their own, at the guest's offsets
    virgin = 0  # space from here on was never used, so it reads as zero

    def set_up_tables(self) -> None:
        """Declare the tables, once the header is known."""
        header = self.header
        self.cluster_size = size = header.cluster_size
        self._bits = header.cluster_bits
        self._mask = size - 1
        self._slice_bytes = self.settings.l2_slice_bytes
        self._entry_bytes = header.l2_entry_bytes
        self._slice_count = self._slice_bytes // self._entry_bytes
        self.slice_mask = self._slice_count - 1
        self.per_l2 = size // self._entry_bytes
        self.l1_shift = header.l1_shift
        # A guest offset shifted by this is a byte in its L2 table; masked, that of a slice.
        self._entry_shift = self._bits - 3
        self.key_mask = (size - 1) & ~(self._slice_bytes - 1)
        self._size_shift = 62 - (self._bits - 8)  # of compressed entries
        assert self.cache is not None
        self.l2_table: Table = self.cache.table(
            "L2",
            typecode="Q",
            byteorder="big",
            slice_bytes=self._slice_bytes,
            rank=3,
            event="l2_load",
            write_event="l2_update",
        )
        self.l1_slices: Table = self.cache.table(
            "L1",
            typecode="Q",
            byteorder="big",
            slice_bytes=_L1_SLICE,
            rank=4,
            write_event="l1_update",
        )
        self._l2 = self.l2_table.slices
        self._choose_entries()

    def _choose_entries(self) -> None:
        """Standard L2 entries, or extended ones; data in this file, or beside it.

        The hot path does not ask at every request which of them there are: methods are replaced in
        the node, which mypy is told to let pass.
        """
        self.external = self.data is not self.file
        if self.header.incompatible_features & Incompatible.EXTENDED_L2:
            from diskwright.drivers.formats.qcow2.extended_l2 import ExtendedL2

            extended = ExtendedL2(self)
            self.entries: StandardL2 = extended
            self.fill_size = 1 << extended.unit_bits
            self.locate = extended.locate  # type: ignore[method-assign]
            self.has_block = self._has_block  # type: ignore[method-assign]
        else:
            self.entries = StandardL2(self)
            self.fill_size = self.cluster_size
        if self.external:
            self.empty_mask |= COPIED  # with this flag offset 0 is a place, too
            self.name_mask |= COPIED
            inner = self.locate

            def locate(offset: int, length: int, *, write: bool = False) -> int:
                place = inner(offset, length, write=write)
                return place if place == offset or place < 0 else -1

            self.locate = locate  # type: ignore[method-assign]

    def load_l1(self) -> None:
        """Read the active L1 table."""
        header = self.header
        self.l1 = self.read_l1(header.l1_table_offset, header.l1_size)

    def read_l1(self, offset: int, entries: int) -> array[int]:
        """An L1 table from the file."""
        return self.l1_slices.decode(self.file.read(offset, entries * 8)) if entries else array("Q")

    def active_l1(self) -> array[int]:
        """A copy of the active L1 table, also where the node shows a snapshot."""
        header = self.header
        return self.read_l1(header.l1_table_offset, header.l1_size)

    def note_used(self, stop: int) -> None:
        """Host space up to `stop` has been handed out: it is not virgin any more."""
        self.virgin = max(self.virgin, stop)

    # -------------------------------------------------------------------------------- mapping

    def locate(self, offset: int, length: int, *, write: bool = False) -> int:
        """See `Node.locate`: two indexings, one dict look-up, some compares."""
        within = offset & self._mask
        if within + length > self.cluster_size:
            return -1
        base = self.l1[offset >> self.l1_shift] & OFFSET_MASK
        found = self._l2.get(base + (offset >> self._entry_shift & self.key_mask))
        if found is None:
            return -1 if write or base or self.backing else READS_ZERO
        found.used = True
        entry = found.items[offset >> self._bits & self.slice_mask]
        host = entry & WITHOUT_COPIED
        if host & self._mask or not 0 < host < PLAIN_LIMIT:
            return -1 if write or entry or self.backing else READS_ZERO
        if write and (entry < COPIED or host in self.metadata):
            return -1
        return host + within

    def _l2_slice(self, cluster: int) -> Slice | None:
        """The slice with a guest cluster's entry; None where there is no L2 table."""
        base = self.l1[cluster // self.per_l2] & OFFSET_MASK
        if not base:
            return None
        if base & self._mask:
            index = number(cluster // self.per_l2)
            self.corrupt(f"L2 table offset {number(base)} unaligned (L1 index: {index})")
        return self.l2_table.get(base + (cluster * self._entry_bytes & self.key_mask))

    def map(self, offset: int, length: int, *, write: bool = False) -> Run:
        """See `MappedBase.map`. A run stays inside of one L2 slice."""
        cluster = offset >> self._bits
        found = self._l2_slice(cluster)
        if found is None:
            return Run(UNALLOCATED, min(length, self._empty_until(cluster, length) - offset))
        first = cluster & self.slice_mask
        stop = min(first - cluster + ((offset + length - 1) >> self._bits) + 1, self._slice_count)
        words = self.entries.words
        entry = found.items[first * words : (first + 1) * words]  # other threads change it
        within = offset & self._mask
        if entry[0] & COMPRESSED:
            unit = self.unit_of(cluster, entry[0])
            return Run(DATA, self.cluster_size - within, child=self.file, plain=False, unit=unit)
        return self.entries.run(found, entry, (cluster, stop), within=within, write=write)

    def _empty_until(self, cluster: int, length: int) -> int:
        """Where the run of missing L2 tables that begins at `cluster` ends, in bytes."""
        index = cluster // self.per_l2
        last = min((((cluster << self._bits) + length) >> self.l1_shift) + 1, len(self.l1))
        index += 1
        while index < last and not self.l1[index] & OFFSET_MASK:
            index += 1
        return index << self.l1_shift

    def unaligned(self, cluster: int, host: int, *, write: bool, zero: bool) -> None:
        """Tell of a cluster that begins nowhere."""
        if write:
            kind = "Preallocated zero cluster" if zero else "Data cluster"
            guest = number(cluster << self._bits)
            self.corrupt(f"{kind} offset {number(host)} unaligned (guest offset: {guest})")
        table = number(self.l1[cluster // self.per_l2] & OFFSET_MASK)
        index = number(cluster % self.per_l2)
        self.corrupt(
            f"Cluster allocation offset {number(host)} unaligned "
            f"(L2 offset: {table}, L2 index: {index})"
        )

    def require_same(self, cluster: int, entry: int) -> None:
        """Refuse an entry that names another place of the data file than the guest's."""
        host = entry & OFFSET_MASK
        if entry & self.name_mask and host != cluster << self._bits:
            index = number(cluster % self.per_l2)
            self.corrupt(
                f"External data file host cluster offset {number(host)} does not match guest "
                f"cluster offset: {number(cluster << self._bits)}, L2 index: {index})"
            )

    def unreadable(self, cluster: int, *, write: bool) -> None:
        """Tell of an entry that says two things at once; QEMU's readers do with two blanks."""
        table = number(self.l1[cluster // self.per_l2] & OFFSET_MASK)
        index = number(cluster % self.per_l2)
        gap = " " if write else "  "
        self.corrupt(f"Invalid cluster entry found{gap}(L2 offset: {table}, L2 index: {index})")

    def _has_block(self, offset: int) -> bool:
        cluster = offset >> self._bits
        found = self._l2_slice(cluster)
        if found is None:
            return False
        return self.entries.is_owned(found.items[(cluster & self.slice_mask) * self.entries.words])

    def has_l2(self, cluster: int) -> bool:
        """Whether there is an L2 table for a guest cluster."""
        return self.l1[cluster // self.per_l2] & OFFSET_MASK != 0

    def unit_of(self, cluster: int, entry: int) -> Unit:
        """The encoded piece that a compressed entry names."""
        host, length = self.payload_of(entry)
        return Unit(
            cluster << self._bits,
            self.cluster_size,
            self.file,
            host_offset=host,
            host_length=length,
        )

    def payload_of(self, entry: int) -> tuple[int, int]:
        """(host offset, length) of a compressed cluster's payload, to the end of a sector."""
        host = entry & ((1 << self._size_shift) - 1)
        sectors = (entry >> self._size_shift & ((1 << (62 - self._size_shift)) - 1)) + 1
        return host, sectors * 512 - (host & 511)

    # ------------------------------------------------------------------------------ allocation

    def own_l2_slice(self, cluster: int) -> Slice:
        """The slice with a guest cluster's entry, in an L2 table that nobody else names."""
        index = cluster // self.per_l2
        entry = self.l1[index]
        if not entry & OFFSET_MASK or not entry & COPIED:
            entry = self._new_l2(index, entry & OFFSET_MASK)
        elif self.misplaced:
            self.guard_table(entry & OFFSET_MASK)
        return self.l2_table.get(
            (entry & OFFSET_MASK) + (cluster * self._entry_bytes & self.key_mask)
        )

    def _new_l2(self, index: int, old: int) -> int:
        """Give L1 entry `index` an L2 table of its own, a copy of `old` if that is not 0."""
        size, step = self.cluster_size, self._slice_bytes
        if old & self._mask:
            self.corrupt(f"L2 table offset {number(old)} unaligned (L1 index: {number(index)})")
        parts = [self.l2_table.get(old + at) for at in range(0, size, step)] if old else []
        self.refcounts.touch(old, size if old else 0)
        place = self.header.l1_table_offset + index * 8
        l1_slice = self.l1_slices.get(place & -_L1_SLICE)
        self.refcounts.need_room(place & -_L1_SLICE, _L1_SLICE)
        host = self.refcounts.take(1, table="L2 table")
        self.refcounts.blocks.promise()  # lazy refcounts or not, tables are counted: as in QEMU
        if old:
            self.happens("l2_alloc_cow_read")
        self.happens("l2_alloc_write")
        for part, at in enumerate(range(0, size, step)):
            made = self.l2_table.create(host + at)
            if parts:
                made.items[:] = parts[part].items
        self.note_metadata("active-l2", [host])
        l1_slice.items[(place & (_L1_SLICE - 1)) // 8] = host | COPIED
        l1_slice.dirty()
        self.l1[index] = host | COPIED
        if old:
            self.retire([Freed(self.file, old, size, slice=l1_slice, token="L2")])
        return host | COPIED

    def drop_l2(self, index: int) -> None:
        """Forget an L2 table and all that it names. Under the metadata lock."""
        entry, size, step = self.l1[index], self.cluster_size, self._slice_bytes
        host = entry & OFFSET_MASK
        if host & self._mask:
            self.corrupt(f"L2 table offset {number(host)} unaligned (L1 index: {number(index)})")
        parts = [self.l2_table.get(host + at) for at in range(0, size if host else 0, step)]
        place = self.header.l1_table_offset + index * 8
        l1_slice = self.l1_slices.get(place & -_L1_SLICE)
        l1_slice.items[(place & (_L1_SLICE - 1)) // 8] = 0
        l1_slice.dirty()
        self.l1[index] = 0
        freed = [
            space
            for part in parts
            for space in self.freed(self.entries.descriptors(part.items), l1_slice)
        ]
        if host:
            freed.append(Freed(self.file, host, size, slice=l1_slice, sole=True, token="L2"))
        for space in freed:
            space.sole &= bool(entry & COPIED)
        self.retire([space for space in freed if not space.kept])

    def allocate(self, offset: int, length: int) -> Allocation:
        """See `MappedBase.allocate`."""
        return self.entries.allocate(self.own_l2_slice(offset >> self._bits), offset, length)

    def take_data(self, offset: int, count: int) -> int:
        """Host space for `count` guest clusters from guest offset `offset` on."""
        return offset if self.external else self.refcounts.take(count)

    def guard_data(self, host_offset: int, length: int) -> None:
        """Refuse to have host space written as data that holds metadata."""
        if not self.external:
            self.guard(host_offset, length)

    def is_virgin(self, host: int, before: int) -> bool:
        """Whether space was never used, if `virgin` was `before` when it was taken."""
        return host >= before and not self.external

    def link(self, offset: int, length: int, host: int, *, filled: bool) -> int:
        """Let guest clusters without data name host clusters; the bytes done.

        Under the metadata lock; ends at the end of an L2 slice. `filled`: see `linked`. Room that
        was reserved for them is given up.
        """
        cluster = offset >> self._bits
        found = self.own_l2_slice(cluster)
        index = cluster & self.slice_mask
        count = min(length >> self._bits, self._slice_count - index)
        made, words = self.entries.linked(host, count, filled=filled), self.entries.words
        freed = self.freed(found.items[index * words : (index + count) * words : words], found)
        found.items[index * words : (index + count) * words] = made
        found.dirty()
        self.retire([space for space in freed if not space.kept])
        return count << self._bits

    def publish(self, allocation: Allocation, start: int, stop: int) -> Sequence[Freed]:
        """See `MappedBase.publish`."""
        return self.entries.publish(allocation, start, stop)

    def freed(self, entries: array[int], named_by: Slice | None) -> list[Freed]:
        """What entries name, when they go."""
        found: list[Freed] = []
        if is_empty(entries):
            return found
        for index, count in runs(entries, self.cluster_size):
            entry = entries[index]
            if entry & COMPRESSED:
                host, length = self.payload_of(entry)
            else:
                host, length = entry & OFFSET_MASK, count << self._bits
            if not entry & COMPRESSED and host & self._mask:
                self.note_damage(f"Cannot free unaligned cluster {number(host)}")
            if not self._may_free(host, length, packed=bool(entry & COMPRESSED)):
                continue  # a damaged entry: better a leak
            if self.external:  # the same place is used again, without anybody's leave
                if entry < COPIED:
                    continue
                found.append(Freed(self.data, host, length, slice=None))
                found[-1].kept = True
                continue
            sole = entry >= COPIED and not entry & COMPRESSED
            found.append(Freed(self.file, host, length, slice=named_by, sole=sole))
        return found

    def _may_free(self, host: int, length: int, *, packed: bool) -> bool:
        if self.external:
            return not packed and not host & self._mask
        if packed:
            clusters = range(host & ~self._mask, host + length, self.cluster_size)
        elif not host or host & self._mask:
            return False
        else:
            clusters = range(host, host + length, self.cluster_size)
        return self.metadata.isdisjoint(clusters)

    def abandon(self, allocation: Allocation) -> None:
        """See `MappedBase.abandon`."""
        pending = allocation.token
        assert isinstance(pending, Pending)
        if pending.reused:
            return
        self.packed_end = 0  # it may lie in what becomes free
        for place in allocation.places:
            if not self.external and self._can_count(place.host_offset, place.length):
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
        host, length, size = freed.host_offset, freed.length, self.cluster_size
        self.refcounts.touch(host, length)
        self.happens("cluster_free")
        if freed.token is not None:
            self.metadata.difference_update(range(host, host + length, size))
        if freed.token == "L2":
            for at in range(0, length, self._slice_bytes):
                self.l2_table.forget(host + at)
        if host & ~self._mask <= self.packed_end <= host + length + self._mask:
            self.packed_end = 0  # the cluster may become somebody else's
        self.refcounts.add(host, length, -1)

    # -------------------------------------------------------------------------------- unmapping

    def unmap(
        self, offset: int, length: int, to: int, *, keep: bool
    ) -> tuple[int, Sequence[Freed]]:
        """See `MappedBase.unmap`."""
        return self.entries.unmap(offset, length, to, keep=keep)

    def freed_but_kept(self, part: array[int], found: Slice) -> list[Freed]:
        """What goes where the space of plain clusters is kept: compressed ones."""
        return self.freed(array("Q", [entry for entry in part if entry & COMPRESSED]), found)

    def emptied(self, part: array[int]) -> list[Freed]:
        """Space that stays allocated although its content is gone."""
        owned = [entry if entry >= COPIED and not entry & COMPRESSED else 0 for entry in part]
        found = self.freed(array("Q", owned), None)
        for space in found:
            space.kept = True
        return found

    # -------------------------------------------------------------------------------- encoded

    def decode(self, unit: Unit, encoded: memoryview, out: memoryview) -> None:
        """See `MappedBase.decode`."""
        if self.header.compression_type:
            from diskwright.codecs import zstd as codec
        else:
            from diskwright.codecs import deflate as codec  # type: ignore[no-redef]
        try:
            codec.decode_into(encoded, out)
        except FormatError as error:
            error.kind = "io"  # as QEMU tells of it
            raise

    def encoder(self) -> Encoder | None:
        """Compresses clusters as the header says; None where the data are beside the image."""
        if self.external:
            return None
        from diskwright.drivers.formats.qcow2.compression import ClusterEncoder

        return ClusterEncoder(self.cluster_size, self.header.compression_type)

    def allocate_encoded(self, offset: int, length: int, host_length: int) -> Allocation:
        """See `MappedBase.allocate_encoded`: payloads share clusters, byte by byte."""
        cluster = offset >> self._bits
        found = self.own_l2_slice(cluster)
        host = self._room_for(host_length)
        self.happens("cluster_alloc_bytes", "l2_update_compressed")
        sectors = ((host & 511) + host_length - 1) >> 9
        entry = COMPRESSED | sectors << self._size_shift | host
        pending = Pending(found, cluster & self.slice_mask, host, encoded=entry)
        place = Place(offset, host_length, self.file, host_offset=host)
        return Allocation(offset, length, [place], token=pending)

    def _room_for(self, length: int) -> int:
        """Byte-granular host space, counted in every cluster it touches."""
        counts, start = self.refcounts, self.packed_end
        room = -start & self._mask if start else 0
        if room and counts.get(start >> self._bits) >= counts.maximum:
            room = 0
        if room >= length:
            counts.add(start, length, 1)
            self.packed_end = start + length
            return start
        host = counts.take(1, packed=True)
        if room and host == start + room:  # the next cluster: go on across the border
            counts.add(start, 1, 1)
            host = start
        self.packed_end = host + length
        return host
