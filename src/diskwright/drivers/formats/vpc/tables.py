"""The block allocation table and the sector bitmaps of a dynamic or differencing VHD.

A word of the table is the sector of a block's bitmap, after which its bytes lie. In a
differencing image a sector whose bit is clear is the parent's; elsewhere bits say nothing
that a reader needs (QEMU ignores them), but they are kept as other programs expect them.

Invariants (tests/unit/test_vpc.py, tests/crash):

1. The file ends with a valid footer whenever it is at rest on disk: it grows by a footer at its
   new end, made durable before anything is written where the old one was. A device, which has
   the length it has, gets its footer behind the last block as it is closed; till then there is
   the one at its beginning.
2. On disk, data come first, then bitmaps, then the table, with barriers between: a block that
   the table names has its bitmap, and a sector that a bitmap claims has its bytes. A crash leaks.
3. The first free byte is after everything that the headers and the table name, as QEMU has it.
4. A block without a word is written where nothing was (`zeroed`) or as a whole, unless its
   bitmap says sector by sector what is there.
"""

from __future__ import annotations

from array import array

from diskwright.block.extent import DATA, READS_ZERO, UNALLOCATED, ZERO
from diskwright.block.mapped import (
    TO_BACKING,
    TO_ZERO,
    Allocation,
    Freed,
    MappedNode,
    NeedWork,
    Place,
    Run,
)
from diskwright.block.record import Record
from diskwright.drivers.formats.vpc.header import FREE, SECTOR, DynamicHeader, Footer
from diskwright.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskwright.block.child import Child
    from diskwright.block.table_cache import Slice, Table

#: Words of the table that are cached and written as one: a sector.
WORDS = SECTOR // 4
_ALL_FREE = b"\xff" * SECTOR

#: Sectors whose bits are in one sector of a bitmap.
BITS = SECTOR * 8

#: Sectors that become a differencing image's own together: libvhdi takes all sectors after the
#: first one that is set in a byte of a bitmap for set, so we write whole bytes.
UNIT_SECTORS = 8
UNIT = UNIT_SECTORS * SECTOR

#: Bytes of the table that a scan looks at at a time.
WINDOW = 1 << 20

#: The file grows by this many blocks at least, and shrinks back when it is closed: every
#: growth waits for the disk (invariant 1).
GROW_BLOCKS = 16
GROW_BYTES = 64 << 20

#: Blocks whose bitmaps are known to be full, so that they may be overwritten without a look.
MAX_FULL = 1 << 20


class Grant(Record):
    """What `allocate` found: the block's place, new or not, and the slices to change."""

    __slots__ = ("block", "fresh", "index", "maps", "piece")

    def __init__(
        self, index: int, block: int, *, fresh: bool, piece: Slice, maps: list[Slice]
    ) -> None:
        self.index = index
        self.block = block
        self.fresh = fresh
        self.piece = piece
        self.maps = maps


class VpcTables(MappedNode):
    """The mapping half of the VPC node."""

    file: Child
    footer: Footer
    dynamic: DynamicHeader | None = None  # None: a fixed image
    table: Table
    bitmaps: Table
    differencing = False

    _shift = 0  # block size as a power of two
    _mask = 0
    _bitmap_bytes = 0
    _entries = 0
    _table_offset = 0
    _free = 0  # first byte that nothing uses; the footer's place or before it
    _virgin = 0  # from here on the file has never been written
    _room = 0  # the file ends here, or later, with a footer that is durable
    _grown = False
    _full: set[int]  # indices of blocks whose bitmaps are all ones

    def set_up_tables(self, dynamic: DynamicHeader) -> None:
        """Take over the dynamic disk header."""
        self.dynamic = dynamic
        self._shift = dynamic.block_size.bit_length() - 1
        self._mask = dynamic.block_size - 1
        self._bitmap_bytes = dynamic.bitmap_bytes
        self._entries = dynamic.max_table_entries
        self._table_offset = dynamic.table_offset
        self._full = set()
        self.cluster_size = dynamic.block_size
        self.fill_size = UNIT if self.differencing else dynamic.block_size

    # ----------------------------------------------------------------------------------- finding

    def locate(self, offset: int, length: int, *, write: bool = False) -> int:
        """Where the range lies, if one block has all of it and the tables are in memory."""
        if self.dynamic is None:
            return offset
        index = offset >> self._shift
        within = offset & self._mask
        if within + length > self._mask + 1:
            return -1
        items = self.table.peek(self._table_offset + (index // WORDS) * SECTOR)
        if items is None:
            return -1
        word = items[index % WORDS]
        if word == FREE:
            return -1 if write or self.differencing else READS_ZERO
        block = word * SECTOR
        if self.differencing:
            if not self._all_here(block, within, length, write=write):
                return -1
        elif write and index not in self._full:
            return -1
        return block + self._bitmap_bytes + within

    def _all_here(self, block: int, within: int, length: int, *, write: bool) -> bool:
        """Whether the bits of a range, to `write` those of whole units, are known to be set."""
        first, last = within // SECTOR, (within + length - 1) // SECTOR
        if write:
            first, last = first & -UNIT_SECTORS, last | (UNIT_SECTORS - 1)
        items = self.bitmaps.peek(block + first // BITS * SECTOR)
        if items is None or first // BITS != last // BITS:
            return False
        return _ones(items, first % BITS, last % BITS + 1) > last - first

    def map(self, offset: int, length: int, *, write: bool = False) -> Run:
        """See MappedBase.map."""
        if self.dynamic is None:
            return Run(DATA, length, child=self.file, host_offset=offset, writable=True)
        index = offset >> self._shift
        within = offset & self._mask
        word = self._word(index)
        if word == FREE:
            blocks = self._free_blocks(index, (offset + length - 1) >> self._shift)
            kind = UNALLOCATED if self.differencing else ZERO
            return Run(kind, min((blocks << self._shift) - within, length))
        block = word * SECTOR
        length = min(length, self._mask + 1 - within)
        host = block + self._bitmap_bytes + within
        if self.differencing:
            return self._map_sectors(block, within, length, write=write)
        writable = not write or index in self._full or self._fill_known(index, block)
        return Run(DATA, length, child=self.file, host_offset=host, writable=writable)

    def _map_sectors(self, block: int, within: int, length: int, *, write: bool) -> Run:
        """The run of sectors that are here, or of those that are the parent's.

        A sector in a unit that is here in part is overwritten like a new one, under the range
        lock: whoever completes the unit reads and writes it again.
        """
        sector = within // SECTOR
        items = self.bitmaps.get(block + sector // BITS * SECTOR).items
        at = sector % BITS
        unit = at & -UNIT_SECTORS
        writable = not write
        if write and (full := _ones(items, unit, BITS) & -UNIT_SECTORS):
            count, kind, writable = full - (at - unit), DATA, True
        elif count := _ones(items, at, unit + UNIT_SECTORS if write else BITS):
            kind = DATA
        else:
            # One at least, which there was a moment ago: another thread may set it just now.
            count, kind = max(_zeroes(items, at, BITS), 1), UNALLOCATED
        run_length = min(count * SECTOR - within % SECTOR, length)
        if kind != DATA:
            return Run(kind, run_length)
        host = block + self._bitmap_bytes + within
        return Run(DATA, run_length, child=self.file, host_offset=host, writable=writable)

    def _fill_known(self, index: int, block: int) -> bool:
        """Whether a block's bitmap is all ones; remembered if it is."""
        for key in self._bitmap_keys(block):
            items = self.bitmaps.get(key).items
            if _ones(items, 0, min(BITS, (self._mask + 1) // SECTOR)) < min(
                BITS, (self._mask + 1) // SECTOR
            ):
                return False
        self._note_full(index)
        return True

    def _note_full(self, index: int) -> None:
        if len(self._full) >= MAX_FULL:
            self._full.clear()
        self._full.add(index)

    def _bitmap_keys(self, block: int) -> range:
        return range(block, block + self._bitmap_bytes, SECTOR)

    def _key(self, index: int) -> int:
        return self._table_offset + index // WORDS * SECTOR

    def _word(self, index: int) -> int:
        word = self.table.get(self._key(index)).items[index % WORDS]
        if word != FREE and self._is_outside(word):
            raise FormatError(
                f"Block {index} of {self.describe()} lies outside of the file",
                field="block allocation table",
                value=word,
                offset=self._table_offset + index * 4,
            )
        return word

    def _is_outside(self, word: int) -> bool:
        """Whether a block reaches beyond the file, also when its size is looked at again."""
        last = word * SECTOR + self._bitmap_bytes + self._mask
        if last < self._limit():
            return False
        self.file.node.refresh_size()
        return last >= self._limit()

    def _limit(self) -> int:
        """Where blocks must end; the file's end rounded up, as its last sector may be short."""
        return -(-self.file.size // SECTOR) * SECTOR

    def _free_blocks(self, index: int, last: int) -> int:
        """How many blocks from `index` to `last` have no place."""
        count = 1
        while index + count <= last:
            items = self.table.get(self._key(index + count)).items
            at = (index + count) % WORDS
            if not at and items.tobytes() == _ALL_FREE:
                count += WORDS
            elif items[at] == FREE:
                count += 1
            else:
                break
        return min(count, last + 1 - index)

    # ----------------------------------------------------------------------------------- scanning

    def table_windows(self) -> Iterator[tuple[int, bytes]]:
        """(index of the first word, words as on disk) of the table, in bounded pieces."""
        position, stop = 0, self._entries * 4
        while position < stop:
            part = min(WINDOW, stop - position)
            yield position // 4, self.file.read(self._table_offset + position, part)
            position += part

    def find_free(self) -> int:
        """The first byte after everything that the table names; it must be inside of the file.

        Raises:
            FormatError: the file was cut off.
        """
        whole = self._bitmap_bytes + self._mask + 1
        free = -(-(self._table_offset + self._entries * 4) // SECTOR) * SECTOR
        if self.differencing:
            free = max(free, self._names_end())
        if free <= self._limit():
            last = -1
            for _, raw in self.table_windows():
                if raw != raw[:4] * (len(raw) // 4):
                    last = max(last, _largest(self.table.decode(raw)))
                else:
                    last = max(last, _largest(self.table.decode(raw[:4])))
            if last >= 0:
                free = max(free, last * SECTOR + whole)
        if free > self._limit():
            raise FormatError(
                "block-vpc: free_data_block_offset points after the end of file. "
                "The image has been truncated.",
                field="block allocation table",
                value=free,
                expected=self.file.size,
            )
        return free

    def _names_end(self) -> int:
        """Where the space of the parent's names ends, as far as it is inside of the file."""
        assert self.dynamic is not None
        ends = [entry.end for entry in self.dynamic.locators if entry.length]
        limit = self._limit() - SECTOR  # the footer is last
        return max((-(-end // SECTOR) * SECTOR for end in ends if end <= limit), default=0)

    def hidden_bytes(self) -> Iterator[tuple[int, int]]:
        """(offset in the file, length) of sectors that blocks have and that are the parent's."""
        for index in range(self._entries):
            if (word := self._word(index)) == FREE:
                continue
            for key in self._bitmap_keys(word * SECTOR):
                first = (key - word * SECTOR) * 8
                yield from self._clear_runs(word * SECTOR + self._bitmap_bytes, key, first)

    def _clear_runs(self, data: int, key: int, first: int) -> Iterator[tuple[int, int]]:
        """(offset in the file, length) of the sectors whose bits in one piece are clear.

        Args:
            data: where the block's bytes begin.
            key: where the piece of the bitmap lies.
            first: the sector of its first bit.
        """
        items = self.bitmaps.get(key).items
        at, stop = 0, min((self._mask + 1) // SECTOR - first, BITS)
        while at < stop:
            at += _ones(items, at, stop)
            count = _zeroes(items, at, stop) if at < stop else 0
            if count:
                yield data + (first + at) * SECTOR, count * SECTOR
            at += count

    # ------------------------------------------------------------------------------ begin and end

    def prepare_writes(self) -> None:
        """Learn where room is; see to it that the file ends with a footer (invariant 1)."""
        self._free = self.find_free()
        self._grown = False
        self._virgin = self._room = limit = self._limit()
        self._full.clear()
        last = limit - SECTOR
        if not self.file.node.can_grow:
            self._grown = self._free <= last  # a footer follows the last block, if it fits
            return
        if last < self._free or self.file.read(last, SECTOR) != self.footer.pack():
            self._room = 0
            self._grow_file(max(self._free, limit) + SECTOR, blocks_ahead=0)

    def cut_file(self) -> None:
        """End the file after the last block, with the footer there first."""
        stop = self._free + SECTOR
        if self.file.size <= stop and not self._grown:
            return
        self.file.write(self._free, self.footer.pack())
        self.file.flush()
        self._grown = False
        self._room = stop
        if self.file.node.can_grow:  # a device keeps its size
            self.file.truncate(stop)

    # ---------------------------------------------------------------------------------- allocating

    def allocate(self, offset: int, length: int) -> Allocation:
        """See MappedBase.allocate: a part of one block."""
        index = offset >> self._shift
        within = offset & self._mask
        length = min(length, self._mask + 1 - within)
        piece = self.table.get(self._key(index))
        word = piece.items[index % WORDS]
        if word != FREE:
            block = word * SECTOR
            maps = [self.bitmaps.get(key) for key in self._touched_keys(block, within, length)]
            grant = Grant(index, block, fresh=False, piece=piece, maps=maps)
            return self._granted(grant, offset, length, zeroed=False)
        block = self._free
        stop = block + self._bitmap_bytes + self._mask + 1
        if self._room < stop + SECTOR:
            ahead = min(GROW_BLOCKS - 1, GROW_BYTES // (stop - block)) if self._bitmap_bytes else 0
            raise NeedWork(lambda: self._grow_file(stop + SECTOR, blocks_ahead=ahead))
        fill = 0 if self.differencing else 0xFF
        maps = [self.bitmaps.create(key, fill) for key in self._bitmap_keys(block)]
        self._free = stop
        grant = Grant(index, block, fresh=True, piece=piece, maps=maps)
        # a block without a bitmap begins where a footer was
        zeroed = block + self._bitmap_bytes >= self._virgin and self._bitmap_bytes > 0
        return self._granted(grant, offset, length, zeroed=zeroed)

    def has_block(self, offset: int) -> bool:
        """See MappedBase.has_block."""
        index = offset >> self._shift
        return self.table.get(self._key(index)).items[index % WORDS] != FREE

    def _granted(self, grant: Grant, offset: int, length: int, *, zeroed: bool) -> Allocation:
        host = grant.block + self._bitmap_bytes + (offset & self._mask)
        place = Place(offset, length, self.file, host_offset=host, fresh=grant.fresh, zeroed=zeroed)
        return Allocation(offset, length, [place], token=grant)

    def _touched_keys(self, block: int, within: int, length: int) -> range:
        """The sectors of a block's bitmap that speak of a range."""
        first, last = within // SECTOR // BITS, (within + length - 1) // SECTOR // BITS
        return range(block + first * SECTOR, block + (last + 1) * SECTOR, SECTOR)

    def _grow_file(self, size: int, *, blocks_ahead: int) -> None:
        """Make the file longer by giving it a footer at its new end; invariant 1.

        It ends with whole blocks, so the bitmap of a block to come covers the footer.
        """
        with self.size_lock:  # one after the other: a late one must not write into a block
            if self._room >= size:
                return
            ahead = blocks_ahead * (self._bitmap_bytes + self._mask + 1)
            self._grown = True
            self.file.write(size + ahead - SECTOR, self.footer.pack())
            self.file.flush()
            self._room = size + ahead

    def publish(self, allocation: Allocation, start: int, stop: int) -> Sequence[Freed]:
        """See MappedBase.publish."""
        grant = allocation.token
        assert isinstance(grant, Grant)
        if self.differencing:
            first = (start & self._mask) // SECTOR
            self._set_bits(grant, first, first + (stop - start) // SECTOR)
        elif not grant.fresh:
            for piece in grant.maps:
                piece.items[:] = array("B", _ALL_FREE)
                piece.dirty()
        if not self.differencing:
            self._note_full(grant.index)
        if grant.fresh:
            grant.piece.items[grant.index % WORDS] = grant.block // SECTOR
            grant.piece.dirty()
        return ()

    def _set_bits(self, grant: Grant, first: int, stop: int) -> None:
        """Sectors [first, stop) of the block are here now."""
        for piece in grant.maps:
            base = (piece.key - grant.block) * 8
            low, high = max(first - base, 0), min(stop - base, BITS)
            if low < high:
                _set(piece.items, low, high)
                piece.dirty()

    def abandon(self, allocation: Allocation) -> None:
        """See MappedBase.abandon: the last block is taken back, others leak until reopened."""
        grant = allocation.token
        assert isinstance(grant, Grant)
        if not grant.fresh:
            return
        for key in self._bitmap_keys(grant.block):
            self.bitmaps.forget(key)
        stop = grant.block + self._bitmap_bytes + self._mask + 1
        if stop == self._free:
            self._free = grant.block
            self._virgin = max(self._virgin, stop)

    def unmap(
        self, offset: int, length: int, to: int, *, keep: bool
    ) -> tuple[int, Sequence[Freed]]:
        """See MappedBase.unmap: what is zero stays so; sectors can be given to the parent."""
        if self.dynamic is None or to != (TO_BACKING if self.differencing else TO_ZERO):
            return 0, ()
        index = offset >> self._shift
        within = offset & self._mask
        word = self.table.get(self._key(index)).items[index % WORDS]
        if word == FREE:
            blocks = self._free_blocks(index, (offset + length - 1) >> self._shift)
            return min((blocks << self._shift) - within, length), ()
        if to == TO_ZERO:
            return 0, ()
        length = min(length, self._mask + 1 - within)
        block = word * SECTOR
        maps = [self.bitmaps.get(key) for key in self._touched_keys(block, within, length)]
        for piece in maps:
            base = (piece.key - block) * 8
            low = max(within // SECTOR - base, 0)
            high = min(-(-(within + length) // SECTOR) - base, BITS)
            _clear(piece.items, low, high)
            piece.dirty()
        return length, ()


# --------------------------------------------------------------------------------------- bits
# The first sector of a bitmap is the highest bit of its first byte, so a bitmap read as a
# big-endian number has its sectors in order from the top.


def _ones(items: array[int], at: int, stop: int) -> int:
    """How many bits from `at` on are set, in a row, before `stop`."""
    first = at >> 3
    raw = items[first : (stop + 7) >> 3].tobytes()
    bits = len(raw) * 8 - (at & 7)
    clear = ~int.from_bytes(raw, "big") & ((1 << bits) - 1)
    return min(bits - clear.bit_length(), stop - at)


def _zeroes(items: array[int], at: int, stop: int) -> int:
    """How many bits from `at` on are clear, in a row, before `stop`."""
    first = at >> 3
    raw = items[first : (stop + 7) >> 3].tobytes()
    bits = len(raw) * 8 - (at & 7)
    found = int.from_bytes(raw, "big") & ((1 << bits) - 1)
    return min(bits - found.bit_length(), stop - at)


def _mask_of(low: int, high: int, size: int) -> int:
    return ((1 << (high - low)) - 1) << (size * 8 - high)


def _set(items: array[int], low: int, high: int) -> None:
    value = int.from_bytes(items.tobytes(), "big") | _mask_of(low, high, len(items))
    items[:] = array("B", value.to_bytes(len(items), "big"))


def _clear(items: array[int], low: int, high: int) -> None:
    value = int.from_bytes(items.tobytes(), "big") & ~_mask_of(low, high, len(items))
    items[:] = array("B", value.to_bytes(len(items), "big"))


def _largest(words: array[int]) -> int:
    """The largest word that is a block's, or -1."""
    return max(words) if FREE not in words else max(filter(FREE.__ne__, words), default=-1)
