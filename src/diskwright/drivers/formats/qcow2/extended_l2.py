"""Extended L2 entries: a cluster's descriptor, and a bitmap of the states of its 32 subclusters.

Bits 0 to 31 of the bitmap say which subclusters have data in the cluster, bits 32 to 63 which
read as zero; with neither, the backing file shows. A cluster may be named although none of its
subclusters has data: room that is reserved.

Both words of an entry are read by one indexing and written by one assignment, so that a reader
without a lock never sees half of a change.

Source: QEMU, docs/interop/qcow2.txt, "Extended L2 Entries", "Subcluster Allocation Bitmap".
"""

from __future__ import annotations

from array import array

from diskwright.block.extent import DATA, READS_ZERO, UNALLOCATED, ZERO
from diskwright.block.mapped import TO_ANY, TO_ZERO, Allocation, Freed, Place, Run
from diskwright.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO_FLAG,
    is_empty,
)
from diskwright.drivers.formats.qcow2.standard_l2 import Pending, StandardL2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskwright.block.table_cache import Slice
    from diskwright.drivers.formats.qcow2.tables import Qcow2Tables

#: Subclusters of a cluster.
SUBCLUSTERS = 32
_SUBCLUSTER_BITS = 5
#: All subclusters have data; all read as zero.
ALL_DATA = (1 << SUBCLUSTERS) - 1
ALL_ZERO = ALL_DATA << SUBCLUSTERS


def is_impossible(bitmap: int) -> bool:
    """Whether a subcluster has data and reads as zero at once."""
    return bitmap >> SUBCLUSTERS & bitmap != 0


def _ones(bits: int) -> int:
    """How many bits from the lowest on are set."""
    return (~bits & (bits + 1)).bit_length() - 1


def _pairs(descriptors: array[int], bitmaps: array[int]) -> array[int]:
    made = array("Q", bytes(16 * len(descriptors)))
    made[::2] = descriptors
    made[1::2] = bitmaps
    return made


class ExtendedL2(StandardL2):
    """The entries of an image with extended L2 entries."""

    words = 2

    def __init__(self, node: Qcow2Tables) -> None:
        super().__init__(node)
        self.unit_bits = self.bits - _SUBCLUSTER_BITS
        self._l2 = node.l2_table.slices

    def descriptors(self, items: array[int]) -> array[int]:
        """See StandardL2."""
        return items[::2]

    def with_descriptors(self, items: array[int], descriptors: array[int]) -> array[int]:
        """See StandardL2."""
        return _pairs(descriptors, items[1::2])

    def without_room(self, items: array[int]) -> array[int]:
        """See StandardL2."""
        return array("Q", [0, items[1] & ALL_ZERO])

    def to_count(self, items: array[int]) -> tuple[array[int], dict[int, list[str]]]:
        """See StandardL2."""
        named = items[::2]
        wrong: dict[int, list[str]] = {}
        for index, bitmap in enumerate(items[1::2]):
            entry = named[index]
            if not entry and not bitmap:
                continue
            lines = self._wrong(index, entry, bitmap)
            if lines:
                wrong[index] = lines
            if not entry & COMPRESSED:
                plain = entry & ~(L2_RESERVED | ZERO_FLAG)
                room = entry & OFFSET_MASK and not bitmap & ALL_DATA
                named[index] = plain | ZERO_FLAG if room else plain
        return named, wrong

    def _wrong(self, index: int, entry: int, bitmap: int) -> list[str]:
        """What a check tells of an entry, in QEMU's words."""
        if entry & COMPRESSED:
            if not bitmap:
                return []
            return [
                f"ERROR compressed cluster {index} with non-zero subcluster allocation "
                f"bitmap, entry=0x{entry & ~COPIED:016x}"
            ]
        lines = []
        if entry & L2_RESERVED:
            lines.append(f"ERROR found l2 entry with reserved bits set: {entry:x}")
        if entry & self.node.name_mask:
            if is_impossible(bitmap):
                lines.append(
                    f"ERROR offset={entry & OFFSET_MASK:x}: Allocated cluster has corrupted "
                    "subcluster allocation bitmap"
                )
        elif bitmap & ALL_DATA:
            lines.append("ERROR: Unallocated cluster has non-zero subcluster allocation map")
        return lines

    def _units(self, start: int, stop: int) -> int:
        """The bitmap of the subclusters that the bytes [start, stop) of a cluster touch."""
        last = -(-stop >> self.unit_bits)
        return (1 << last) - (1 << (start >> self.unit_bits))

    # ------------------------------------------------------------------------------- mapping

    def locate(self, offset: int, length: int, *, write: bool = False) -> int:
        """See `Node.locate`."""
        node = self.node
        within = offset & self.mask
        if within + length > self.size:
            return -1
        base = node.l1[offset >> node.l1_shift] & OFFSET_MASK
        found = self._l2.get(base + (offset >> self.bits - 4 & node.key_mask))
        if found is None:
            return -1 if write or base or node.backing else READS_ZERO
        found.used = True
        at = (offset >> self.bits & node.slice_mask) * 2
        entry, bitmap = found.items[at : at + 2]
        wanted = self._units(within, within + length)
        host = entry & OFFSET_MASK
        if bitmap & wanted != wanted or entry & COMPRESSED or not host or host & self.mask:
            zero = bitmap >> SUBCLUSTERS & wanted == wanted and not bitmap & wanted
            return READS_ZERO if zero and not write and not entry & COMPRESSED else -1
        if bitmap >> SUBCLUSTERS & wanted or (write and (entry < COPIED or host in node.metadata)):
            return -1
        return host + within

    def run(
        self, found: Slice, state: array[int], where: tuple[int, int], *, within: int, write: bool
    ) -> Run:
        """See StandardL2; a run may begin and end inside of a cluster."""
        cluster, stop = where
        items, index = found.items, cluster & self.node.slice_mask
        entry, bitmap = state
        host = entry & OFFSET_MASK
        if self.node.external:
            self.node.require_same(cluster, entry)
        if host & self.mask:
            self.node.unaligned(cluster, host, write=write, zero=not bitmap & ALL_DATA)
        if self._is_invalid(entry, bitmap):
            self.node.unreadable(cluster, write=write)
        kind, count = self._state(bitmap, within >> self.unit_bits)
        length = (count << self.unit_bits) - (within & ((1 << self.unit_bits) - 1))
        end = within + length
        step = self.size if entry & self.node.name_mask else 0
        index += 1
        expected = entry + step
        while end & self.mask == 0 and index < stop:
            following, bitmap = items[index * 2 : index * 2 + 2]
            if following != expected or self._is_invalid(following, bitmap):
                break
            next_kind, count = self._state(bitmap, 0)
            if next_kind != kind:
                break
            end += count << self.unit_bits
            expected += step
            index += 1
        if not entry & self.node.name_mask:
            return Run(kind, end - within)
        owned = entry >= COPIED
        if write and owned and kind == DATA:
            self.node.guard_data(host, -(-end // self.size) * self.size)
        return Run(
            kind,
            end - within,
            child=self.node.data,
            host_offset=host + within,
            writable=owned and kind == DATA,
            reserved=owned and kind != DATA,
        )

    def _is_invalid(self, entry: int, bitmap: int) -> bool:
        nowhere = not entry & self.node.name_mask  # which is nothing here
        return is_impossible(bitmap) or (nowhere and bitmap & ALL_DATA != 0)

    def _state(self, bitmap: int, first: int) -> tuple[int, int]:
        """(kind of subcluster `first`, how many from it on are of that kind)."""
        data, zero = (bitmap & ALL_DATA) >> first, bitmap >> SUBCLUSTERS >> first
        if data & 1:
            return DATA, _ones(data)
        if zero & 1:
            return ZERO, _ones(zero)
        rest = data | zero
        left = SUBCLUSTERS - first
        return UNALLOCATED, (rest & -rest).bit_length() - 1 if rest else left

    def has_block(self, found: Slice, index: int) -> bool:
        """See `MappedBase.has_block`."""
        return self.is_owned(found.items[index * 2])

    # ---------------------------------------------------------------------------- allocation

    def allocate(self, found: Slice, offset: int, length: int) -> Allocation:
        """See `MappedBase.allocate`: the cluster that is there, or new ones."""
        index = offset >> self.bits & self.node.slice_mask
        entry, bitmap = found.items[index * 2 : index * 2 + 2]
        if self.is_owned(entry):
            return self._fill(found, offset, length)
        if entry & COMPRESSED:
            return self._replace(found, offset, 0, self.size)
        if entry & OFFSET_MASK and bitmap & ALL_DATA:
            within = offset & self.mask
            have = bitmap & ALL_DATA
            first = (have & -have).bit_length() - 1 << self.unit_bits
            last = have.bit_length() << self.unit_bits
            stop = min(within + length, self.size)
            return self._replace(found, offset, min(first, within), max(last, stop))
        return self._new(found, offset, length)

    def _fill(self, found: Slice, offset: int, length: int) -> Allocation:
        """Room in clusters that the entries name already, contiguous ones."""
        items, index = found.items, offset >> self.bits & self.node.slice_mask
        within, entry = offset & self.mask, items[index * 2]
        end, at, expected = self.size, index + 1, entry + self.size
        while end < within + length and at * 2 < len(items) and items[at * 2] == expected:
            end += self.size
            expected += self.size
            at += 1
        host = entry & OFFSET_MASK
        length = self.within_disk(offset, min(length, end - within))
        self.node.guard_data(host, end)
        child = self.node.data
        place = Place(offset, length, child, host_offset=host + within, fresh=False)
        return Allocation(offset, length, [place], token=Pending(found, index, host, reused=True))

    def _replace(self, found: Slice, offset: int, start: int, stop: int) -> Allocation:
        """A new cluster for one with data that cannot be changed: [start, stop) of it is filled."""
        node, index = self.node, offset >> self.bits & self.node.slice_mask
        before, guest = node.virgin, offset & ~self.mask
        stop = start + self.within_disk(guest + start, stop - start)
        host = node.take_data(guest, 1)
        place = Place(
            guest + start,
            stop - start,
            node.data,
            host_offset=host + start,
            zeroed=node.is_virgin(host, before),
        )
        token = Pending(found, index, host, reused=node.external)
        return Allocation(guest + start, stop - start, [place], token=token)

    def _new(self, found: Slice, offset: int, length: int) -> Allocation:
        """New clusters for entries without data: the first one, and empty ones behind it."""
        node, items = self.node, found.items
        index, within = offset >> self.bits & node.slice_mask, offset & self.mask
        count, end = 1, self.size
        while end < within + length and (index + count) * 2 < len(items):
            if items[(index + count) * 2]:
                break
            end += self.size
            count += 1
        before = node.virgin
        host = node.take_data(offset & ~self.mask, count)
        length = self.within_disk(offset, min(length, end - within))
        place = Place(
            offset,
            length,
            node.data,
            host_offset=host + within,
            zeroed=node.is_virgin(host, before),
        )
        token = Pending(found, index, host, reused=node.external)
        return Allocation(offset, length, [place], token=token)

    def linked(self, host: int, count: int, *, filled: bool = True) -> array[int]:
        """See StandardL2."""
        return _pairs(super().linked(host, count), array("Q", [ALL_DATA * filled]) * count)

    def publish(self, allocation: Allocation, start: int, stop: int) -> Sequence[Freed]:
        """See `MappedBase.publish`."""
        pending = allocation.token
        assert isinstance(pending, Pending)
        items = pending.slice.items
        if pending.encoded:
            first, made = pending.index, array("Q", [pending.encoded, 0])
        else:
            base = allocation.offset & ~self.mask
            skip = (start - base) >> self.bits
            first, begin = pending.index + skip, base + (skip << self.bits)
            made = self._filled(
                items[first * 2 : (first + (-(-(stop - begin) >> self.bits))) * 2],
                pending.host + (skip << self.bits),
                start - begin,
                stop - begin,
                keeps=pending.reused,
            )
        last = first + len(made) // 2
        old = items[first * 2 : last * 2 : 2]
        freed = [] if pending.reused else self.node.freed(old, pending.slice)
        items[first * 2 : last * 2] = made
        pending.slice.dirty()
        return freed

    def _filled(
        self, old: array[int], host: int, start: int, stop: int, *, keeps: bool
    ) -> array[int]:
        """Entries whose bytes [start, stop) have data in clusters from `host` on.

        Args:
            old: the items as they are.
            host: of the first cluster.
            start, stop: in bytes from the first cluster's beginning.
            keeps: they name these clusters already, and so what has data there stays.
        """
        count = len(old) // 2
        bitmaps = array("Q", [ALL_DATA]) * count
        for at in {0, count - 1}:
            first, last = max(start - at * self.size, 0), min(stop - at * self.size, self.size)
            made = self._units(first, last)
            kept = old[at * 2 + 1] if keeps else old[at * 2 + 1] & ALL_ZERO
            bitmaps[at] = kept & ~(made << SUBCLUSTERS) | made
        return _pairs(super().linked(host, count), bitmaps)

    # ----------------------------------------------------------------------------- unmapping

    def unmap(
        self, offset: int, length: int, to: int, *, keep: bool
    ) -> tuple[int, Sequence[Freed]]:
        """See `MappedBase.unmap`: whole clusters as ever, or subclusters of one."""
        node, stop = self.node, offset + length
        # QEMU zeroes the disk's last cluster as a whole, but neither from its inside on, nor where
        # the disk ends within a subcluster, unless that is the cluster's first: it zeroes it by
        # itself.
        last = node.size & -node.fill_size
        partly = offset & self.mask or last not in (node.size, offset)
        if stop >= node.size and (to != TO_ZERO or not partly):
            stop = -(-stop // self.size) * self.size
        if offset & self.mask or stop - offset < self.size:
            end = min(stop, (offset | self.mask) + 1)
            return self._unmap_inside(offset, end, to, length)
        return super().unmap(offset, min(length, (stop - offset) & ~self.mask), to, keep=keep)

    def _unmap_inside(
        self, offset: int, stop: int, to: int, length: int
    ) -> tuple[int, Sequence[Freed]]:
        """Subclusters of one cluster, which keeps its room."""
        done = min(stop - offset, length)
        if to == TO_ANY:
            return done, ()  # QEMU discards whole clusters
        node, cluster = self.node, offset >> self.bits
        if to != TO_ZERO and not node.has_l2(cluster):
            return done, ()
        found = node.own_l2_slice(cluster)
        at = (cluster & node.slice_mask) * 2
        entry, bitmap = found.items[at : at + 2]
        if entry & COMPRESSED or is_impossible(bitmap):
            return 0, ()
        units = self._units(offset & self.mask, (offset & self.mask) + stop - offset)
        made = bitmap & ~(units | units << SUBCLUSTERS)
        if to == TO_ZERO:
            made |= units << SUBCLUSTERS
        if made != bitmap:
            found.items[at : at + 2] = array("Q", [entry, made])
            found.dirty()
        return done, ()

    def _unmapped(self, part: array[int], *, zeroes: bool, fills: bool, keeps: bool) -> array[int]:
        """See StandardL2."""
        named, bitmaps = part[::2], part[1::2]
        if not zeroes:
            return array("Q", bytes(8 * len(part)))
        if fills or keeps:
            made = array("Q", [ALL_ZERO]) * len(bitmaps)
        elif is_empty(part):
            return part
        else:
            pairs = zip(named, bitmaps, strict=True)
            made = array("Q", [ALL_ZERO if entry else bitmap for entry, bitmap in pairs])
        stays = [
            entry if keeps and entry & self.node.name_mask and not entry & COMPRESSED else 0
            for entry in named
        ]
        return _pairs(array("Q", stays), made)
