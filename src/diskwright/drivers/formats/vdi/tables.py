"""The block map of a VDI image: where blocks lie, and how they come to lie there.

Invariants (tests/unit/test_vdi.py, tests/crash):

1. On disk the header's count is at least one more than every block number in the map: it is
   written, with the data, before the map. A crash between them leaks a block. The other order
   would let QEMU and VirtualBox, which put a new block at number `count`, overwrite one in use.
2. Numbers below the count that no word of the map has (leaked, or given back) are handed out
   first, so the count becomes again what `check` counts.
3. Blocks begin where the file ended or later (`zeroed`), or are written as a whole.
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
    NeedGrowth,
    Place,
    Run,
)
from diskwright.block.record import Record
from diskwright.drivers.formats.vdi import header as layout
from diskwright.drivers.formats.vdi.header import COUNT_WORD, FREE, SECTOR, Header
from diskwright.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskwright.block.child import Child
    from diskwright.block.table_cache import Slice, Table

#: Words of the map that are cached and written as one: a sector.
WORDS = SECTOR // 4
_ALL_FREE = b"\xff" * SECTOR

#: Bytes of the map that a scan looks at at a time.
WINDOW = 1 << 20

#: Lost blocks that are found again at once; more of them wait for the next opening.
MAX_HOLES = 1 << 16

#: Images of more blocks (64 TiB) are not searched for them: a byte a block is too much memory.
MAX_SEARCHED = 1 << 26


class Grant(Record):
    """Block numbers from `first` on, for the words of `piece` that an allocation covers.

    `head` is the header, whose count goes back where the numbers do; None: they were in use.
    """

    __slots__ = ("first", "head", "piece")

    def __init__(self, first: int, head: Slice | None, piece: Slice) -> None:
        self.first = first
        self.head = head
        self.piece = piece


class VdiTables(MappedNode):
    """The mapping half of the VDI node."""

    file: Child
    header: Header
    map_table: Table
    head_table: Table

    _next = 0  # the number after the last block in use
    _holes: list[int]  # numbers below it that nothing uses, descending
    _virgin = 0  # from here on the file has never been written

    # ----------------------------------------------------------------------------------- finding

    def locate(self, offset: int, length: int, *, write: bool = False) -> int:
        """Where the range lies, if all of it is in one block whose map word is in memory."""
        header = self.header
        index, within = divmod(offset, header.block_size)
        if within + length > header.block_size:
            return -1
        items = self.map_table.peek(header.map_offset + (index // WORDS) * SECTOR)
        if items is None:
            return -1
        number = items[index % WORDS]
        if number >= header.blocks:
            return -1 if write or number != FREE or header.is_differencing else READS_ZERO
        return header.data_offset + number * header.block_stride + header.block_extra + within

    def map(self, offset: int, length: int, *, write: bool = False) -> Run:
        """See MappedBase.map: blocks in a row that follow one another in the file, or are not."""
        header = self.header
        size = header.block_size
        index, within = divmod(offset, size)
        last = min((offset + length - 1) // size, header.blocks - 1)
        word = self._word(index)
        kind = self._kind(index, word)
        # extra bytes before each block end a run of data, but nothing else does
        step = 0 if kind != DATA else 1 if not header.block_extra else -1
        count = 1
        while index + count <= last and step >= 0:
            items, at = self._items(index + count)
            if not step and not at and word == FREE and items.tobytes() == _ALL_FREE:
                count += WORDS
            elif items[at] != word + count * step:
                break
            else:
                count += 1
        run_length = min(count * size - within, length)
        if kind != DATA:
            return Run(kind, run_length)
        return Run(
            DATA,
            run_length,
            child=self.file,
            host_offset=self.block_offset(word) + within,
            writable=True,
        )

    def block_offset(self, number: int) -> int:
        """Where the bytes of block `number` of the data area begin in the file."""
        header = self.header
        return header.data_offset + number * header.block_stride + header.block_extra

    def _key(self, index: int) -> int:
        return self.header.map_offset + index // WORDS * SECTOR

    def _items(self, index: int) -> tuple[array[int], int]:
        return self.map_table.get(self._key(index)).items, index % WORDS

    def _word(self, index: int) -> int:
        items, at = self._items(index)
        return items[at]

    def _kind(self, index: int, word: int) -> int:
        """DATA, or what a block without data reads as."""
        if word == layout.ZERO:
            return ZERO
        if word == FREE:
            return UNALLOCATED if self.header.is_differencing else ZERO
        if word >= self.header.blocks:
            raise FormatError(
                f"The block map of {self.describe()} has block {index} at number {word}, "
                f"but there are {self.header.blocks}",
                field="block map",
                value=word,
                offset=self.header.map_offset + index * 4,
                hint="check the image",
            )
        return DATA

    # ----------------------------------------------------------------------------------- scanning

    def map_windows(self) -> Iterator[tuple[int, bytes]]:
        """(index of the first word, words as on disk) of the map; what the file lacks is zero."""
        header = self.header
        position, stop = header.map_offset, header.map_end
        while position < stop:
            part = min(WINDOW, stop - position)
            yield (position - header.map_offset) // 4, self.file.read(position, part)
            position += part

    def scan(self) -> None:
        """Learn which block numbers are in use; nothing may be dirty.

        The map is believed, the header's count only where the file has that many blocks.
        """
        header = self.header
        blocks, allocated, last = header.blocks, 0, -1
        self.file.node.refresh_size()
        self._virgin = self.file.size
        for _, raw in self.map_windows():
            if raw != raw[:4] * (len(raw) // 4):
                words = [word for word in self.map_table.decode(raw) if word < blocks]
                allocated += len(words)
                last = max(last, max(words, default=-1))
            elif (word := self.map_table.decode(raw[:4])[0]) < blocks:
                allocated += len(raw) // 4
                last = max(last, word)
        there = -(-(self._virgin - header.data_offset) // header.block_stride)
        self._next = max(last + 1, min(header.blocks_allocated, there, blocks))
        self._holes = self._find_holes() if allocated < self._next else []

    def _find_holes(self) -> list[int]:
        if self._next > MAX_SEARCHED:
            return []
        used = bytearray(self._next)
        for _, raw in self.map_windows():
            for word in self.map_table.decode(raw):
                if word < self._next:
                    used[word] = 1
        holes: list[int] = []
        number = used.find(0)
        while number >= 0 and len(holes) < MAX_HOLES:
            holes.append(number)
            number = used.find(0, number + 1)
        return holes[::-1]

    # ---------------------------------------------------------------------------------- allocating

    def allocate(self, offset: int, length: int) -> Allocation:
        """See MappedBase.allocate: numbers in a row for blocks of one sector of the map."""
        header = self.header
        index = offset // header.block_size
        count = min(-(-length // header.block_size), WORDS - index % WORDS)
        head = self.head_table.get(0)
        piece = self.map_table.get(self._key(index))
        in_use = piece.items[index % WORDS]
        if in_use < header.blocks:
            return self._granted(index, 1, Grant(in_use, None, piece), zeroed=False)
        if self._holes:
            first, count = self._holes[-1], 1
        else:
            first = self._next
            count = min(self._free_words(piece, index, count), header.blocks - first)
        if count <= 0:
            raise FormatError(
                f"The block map of {self.describe()} uses blocks more than once",
                field="blocks_allocated",
                value=first,
                hint="check the image; its content can still be copied",
            )
        stop = header.data_offset + (first + count) * header.block_stride
        if self.file.size < stop:
            raise NeedGrowth(self.file, stop)
        if self._holes:
            self._holes.pop()
            return self._granted(index, 1, Grant(first, head, piece), zeroed=False)
        self._set_count(head, first + count)
        zeroed = self.block_offset(first) >= self._virgin
        return self._granted(index, count, Grant(first, head, piece), zeroed=zeroed)

    def _free_words(self, piece: Slice, index: int, count: int) -> int:
        """How many of `count` blocks from `index` on have none and can follow one another."""
        if self.header.block_extra:
            return 1
        at = index % WORDS
        for ahead in range(1, count):
            if piece.items[at + ahead] < self.header.blocks:
                return ahead
        return count

    def _granted(self, index: int, count: int, grant: Grant, *, zeroed: bool) -> Allocation:
        size = self.header.block_size
        place = Place(
            index * size,
            count * size,
            self.file,
            host_offset=self.block_offset(grant.first),
            fresh=grant.head is not None,
            zeroed=zeroed,
        )
        return Allocation(place.offset, place.length, [place], token=grant)

    def _set_count(self, head: Slice, count: int) -> None:
        self._next = count
        head.items[COUNT_WORD] = count
        head.dirty()

    def publish(self, allocation: Allocation, start: int, stop: int) -> Sequence[Freed]:
        """See MappedBase.publish."""
        grant = allocation.token
        assert isinstance(grant, Grant)
        if grant.head is None:
            return ()
        size = self.header.block_size
        for offset in range(start, stop, size):
            number = grant.first + (offset - allocation.offset) // size
            grant.piece.items[offset // size % WORDS] = number
        grant.piece.dirty()
        used = -(-(stop - start) // size)
        self._give_back(grant.first + used, allocation.length // size - used)
        return ()

    def abandon(self, allocation: Allocation) -> None:
        """See MappedBase.abandon."""
        grant = allocation.token
        assert isinstance(grant, Grant)
        if grant.head is None:
            return
        count = allocation.length // self.header.block_size
        if grant.first + count == self._next:
            # the numbers are taken back, though not what was perhaps written there
            self._virgin = max(self._virgin, self.block_offset(self._next))
            self._set_count(grant.head, grant.first)
        else:
            self._give_back(grant.first, count)

    def _give_back(self, first: int, count: int) -> None:
        if count:
            self._holes.extend(range(first, first + count))
            self._holes.sort(reverse=True)

    def unmap(
        self, offset: int, length: int, to: int, *, keep: bool
    ) -> tuple[int, Sequence[Freed]]:
        """See MappedBase.unmap: what has no block becomes zero; blocks stay, save TO_BACKING."""
        header = self.header
        size = header.block_size
        index = offset // size
        stop = min(-(-(offset + length) // size), index - index % WORDS + WORDS)
        piece = self.map_table.get(self._key(index))
        freed: list[Freed] = []
        first = index
        while index < stop:
            word = piece.items[index % WORDS]
            if to == TO_BACKING and header.is_differencing:
                if word < header.blocks:
                    freed.append(self._freed(word, piece))
                self._set_word(piece, index, FREE)
            elif to == TO_ZERO and word >= layout.ZERO:
                if header.is_differencing:
                    self._set_word(piece, index, layout.ZERO)
            else:
                break
            index += 1
        return max(min(index * size - offset, length), 0) if index > first else 0, freed

    def _set_word(self, piece: Slice, index: int, word: int) -> None:
        if piece.items[index % WORDS] != word:
            piece.items[index % WORDS] = word
            piece.dirty()

    def _freed(self, number: int, piece: Slice) -> Freed:
        return Freed(
            self.file,
            self.block_offset(number),
            self.header.block_size,
            slice=piece,
            sole=True,
            token=number,
        )

    def release(self, freed: Freed) -> None:
        """See MappedBase.release."""
        self._give_back(int(freed.token), 1)  # type: ignore[call-overload]  # a block, here
