"""Dirty bitmaps: which granules of a disk were written since somebody began to look.

A `DirtyBitmap` has a bit for each granule. Memory: its bits are kept in pages of 8 KiB; a page
of zeroes takes none, a page of ones is shared, so that a whole disk that is zeroed costs little.
The worst case, scattered writes, is a bit for each granule.

A node marks what `Node.watching` has, after the bytes were written and while the request is
inside the gate: whoever clears a bit and then reads gets the new bytes, or the bit again.
Where a bitmap watches, nobody goes around the node's operations.

A `BitmapStore` is what a format keeps in its images; a driver reads and saves.
"""

from __future__ import annotations

from _thread import allocate_lock
from array import array

from diskwright.block.cancel import check_cancelled
from diskwright.block.record import Record
from diskwright.errors import DiskwrightError, NotFoundError, OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from diskwright.block.node import Node

_PAGE = 8192
_PAGE_BITS = _PAGE * 8
_ONES = b"\xff" * _PAGE
_WORD_ONES = (1 << 64) - 1

#: Granularities are powers of two, as QEMU has it; finer than a sector is of no use.
SMALLEST = 512
#: QEMU's number for a granularity has 32 bits.
_LARGEST = 1 << 31
#: The granularity that is chosen is a cluster, within these.
_CHOSEN = (4096, 65536)


class BitmapInfo(Record):
    """What is told of a bitmap.

    Attributes:
        name: it has one, unique in its node.
        granularity: bytes of the disk a bit stands for.
        enabled: writes are noted.
        inconsistent: it was in use when its writer ended without saving it: it can only be
            removed.
    """

    __slots__ = ("enabled", "granularity", "inconsistent", "name")

    def __init__(
        self, name: str, granularity: int, *, enabled: bool = True, inconsistent: bool = False
    ) -> None:
        self.name = name
        self.granularity = granularity
        self.enabled = enabled
        self.inconsistent = inconsistent


class DirtyBitmap:
    """A bit for each granule of a disk; all ranges are in bytes of the disk. Thread-safe.

    Attributes:
        name, granularity, enabled, inconsistent: as in `BitmapInfo`.
        size: of the disk.
    """

    __slots__ = ("_lock", "_pages", "_shift", "enabled", "inconsistent", "name", "size")

    def __init__(
        self,
        name: str,
        granularity: int,
        size: int,
        *,
        enabled: bool = True,
        inconsistent: bool = False,
    ) -> None:
        self.name = name
        self.size = size
        self.enabled = enabled
        self.inconsistent = inconsistent
        self._shift = granularity.bit_length() - 1
        self._pages: dict[int, bytearray | bytes] = {}  # a page of ones is `_ONES` itself
        self._lock = allocate_lock()

    @property
    def granularity(self) -> int:
        """Bytes of the disk a bit stands for."""
        return 1 << self._shift

    @property
    def bits(self) -> int:
        """How many granules the disk has; the last one may be a part of one."""
        return -(-self.size >> self._shift)

    def info(self) -> BitmapInfo:
        """What is told of it."""
        return BitmapInfo(
            self.name, self.granularity, enabled=self.enabled, inconsistent=self.inconsistent
        )

    # ------------------------------------------------------------------------------- changes

    def set(self, offset: int, length: int) -> None:
        """Note that [offset, offset + length) was written; what lies past the end counts not."""
        stop = min(offset + length, self.size)
        if stop > offset:
            with self._lock:
                self._set_bits(offset >> self._shift, ((stop - 1) >> self._shift) + 1)

    def _set_bits(self, first: int, stop: int) -> None:
        pages = self._pages
        for number in range(first // _PAGE_BITS, (stop - 1) // _PAGE_BITS + 1):
            base = number * _PAGE_BITS
            low, high = max(first - base, 0), min(stop - base, _PAGE_BITS)
            if high - low == _PAGE_BITS:
                pages[number] = _ONES
                continue
            page = pages.get(number)
            if page is _ONES:
                continue
            if page is None:
                page = pages[number] = bytearray(_PAGE)
            assert isinstance(page, bytearray)
            _set_in(page, low, high)

    def clear(self) -> None:
        """Forget all that was noted."""
        with self._lock:
            self._pages.clear()

    def resize(self, size: int) -> None:
        """The disk has another size now; what is added is not dirty."""
        with self._lock:
            self.size = size
            self._trim()

    def _trim(self) -> None:
        """Drop the bits that stand for nothing."""
        bits = self.bits
        number, inside = divmod(bits, _PAGE_BITS)
        for behind in [
            one for one in self._pages if one > number or (one == number and not inside)
        ]:
            del self._pages[behind]
        page = self._pages.get(number)
        if page is not None:
            kept = int.from_bytes(page, "little") & ((1 << inside) - 1)
            self._pages[number] = bytearray(kept.to_bytes(_PAGE, "little"))

    def merge(self, other: DirtyBitmap) -> None:
        """Note all that `other` has noted too; its granularity may be another one.

        Raises:
            OptionError: it is of a disk of another size.
        """
        if other is self:
            return
        if other.size != self.size:
            raise OptionError(
                f"Bitmaps are of different sizes (destination size is {self.size}, source size "
                f"is {other.size}) and can't be merged",
                field="merge",
            )
        if other._shift != self._shift:
            for offset, length in other.runs():
                self.set(offset, length)
            return
        for number in sorted(other._pages):
            check_cancelled()
            with other._lock:
                theirs = bytes(other._pages.get(number, b""))
            if theirs:
                with self._lock:
                    self._merge_page(number, theirs)

    def _merge_page(self, number: int, theirs: bytes) -> None:
        ours = self._pages.get(number)
        if theirs == _ONES:
            self._pages[number] = _ONES
        elif ours is None:
            self._pages[number] = bytearray(theirs)
        elif ours is not _ONES:
            both = int.from_bytes(ours, "little") | int.from_bytes(theirs, "little")
            self._pages[number] = bytearray(both.to_bytes(_PAGE, "little"))

    # --------------------------------------------------------------------------------- looks

    def runs(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """(offset, length) of each dirty run in the range, in order and with gaps between.

        Whole granules, but for the range's ends. What is noted meanwhile may be seen or not.
        """
        end = self.size if length is None else min(offset + length, self.size)
        if offset >= end:
            return
        start = stop = -1
        for low, high in self._bit_runs(offset >> self._shift, -(-end >> self._shift)):
            if low != stop:
                if stop > start:
                    yield self._as_bytes(start, stop, offset, end)
                start = low
            stop = high
        if stop > start:
            yield self._as_bytes(start, stop, offset, end)

    def _as_bytes(self, start: int, stop: int, offset: int, end: int) -> tuple[int, int]:
        first = max(start << self._shift, offset)
        return first, min(stop << self._shift, end) - first

    def _bit_runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Runs of ones in [first, stop); neighbours may come one after the other."""
        pages = [
            one for one in self._pages if first // _PAGE_BITS <= one <= (stop - 1) // _PAGE_BITS
        ]
        for number in sorted(pages):
            check_cancelled()
            base = number * _PAGE_BITS
            with self._lock:
                page = self._pages.get(number)
                page = page if page is _ONES or page is None else bytes(page)
            found = [(0, _PAGE_BITS)] if page is _ONES else _runs_in(page or b"")
            for low, high in found:
                low, high = max(base + low, first), min(base + high, stop)
                if low < high:
                    yield low, high

    def dirty_bytes(self) -> int:
        """How much of the disk is noted, in whole granules but for the disk's end."""
        return sum(length for _, length in self.runs())

    def copy(self, name: str) -> DirtyBitmap:
        """Another one with the same content, which notes nothing."""
        made = DirtyBitmap(name, self.granularity, self.size, enabled=False)
        with self._lock:
            made._pages = {
                number: page if page is _ONES else bytearray(page)
                for number, page in self._pages.items()
            }
        return made

    def take_over(self, other: DirtyBitmap) -> None:
        """Have the bits of `other`, a copy that nobody needs any more."""
        with self._lock:
            self._pages = other._pages

    # ---------------------------------------------------------------------------- as it is stored

    def pieces(self, length: int) -> Iterator[tuple[int, bytes]]:
        """(number, bytes) of each piece of `length` bytes that is not all zeroes, in order.

        As images have them: bit x is bit x mod 8 of byte x / 8, the lowest one first.
        """
        last = -1
        for page in sorted(self._pages):
            for number in range(page * _PAGE // length, (page * _PAGE + _PAGE - 1) // length + 1):
                if number <= last:
                    continue
                last = number
                data = self._bytes_at(number * length, length)
                if any(data):
                    yield number, data

    def _bytes_at(self, first: int, length: int) -> bytes:
        parts = []
        position, stop = first, first + length
        while position < stop:
            number, inside = divmod(position, _PAGE)
            count = min(_PAGE - inside, stop - position)
            with self._lock:
                page = self._pages.get(number)
                parts.append(bytes(count) if page is None else bytes(page[inside : inside + count]))
            position += count
        return b"".join(parts)

    def load(self, first: int, data: bytes) -> None:
        """Take over stored bytes from byte `first` of the bitmap on; bits behind its end drop."""
        with self._lock:
            position = 0
            while position < len(data):
                number, inside = divmod(first + position, _PAGE)
                part = data[position : position + _PAGE - inside]
                position += len(part)
                if any(part):
                    self._load_part(number, inside, part)
            self._trim()

    def _load_part(self, number: int, inside: int, part: bytes) -> None:
        page = self._pages.get(number)
        if part == _ONES:
            self._pages[number] = _ONES
            return
        if page is None or page is _ONES:
            page = self._pages[number] = bytearray(page or _PAGE)
        assert isinstance(page, bytearray)
        page[inside : inside + len(part)] = part

    def load_ones(self, first: int, length: int) -> None:
        """Take over `length` stored bytes of ones from byte `first` of the bitmap on."""
        stop = min((first + length) * 8, self.bits)
        if stop > first * 8:
            with self._lock:
                self._set_bits(first * 8, stop)


def _set_in(page: bytearray, low: int, high: int) -> None:
    """Set the bits [low, high) of a page."""
    first, last = low >> 3, (high - 1) >> 3
    head, tail = 0xFF << (low & 7) & 0xFF, 0xFF >> (7 - ((high - 1) & 7))
    if first == last:
        page[first] |= head & tail
        return
    page[first] |= head
    page[first + 1 : last] = _ONES[: last - first - 1]
    page[last] |= tail


def _runs_in(page: bytes) -> Iterator[tuple[int, int]]:
    """Runs of ones in a page, as bits."""
    if not any(page):
        return
    words = array("Q", page)
    if array("H", b"\1\0")[0] != 1:
        words.byteswap()
    for index, word in enumerate(words):
        if not word:
            continue
        base = index * 64
        if word == _WORD_ONES:
            yield base, base + 64
            continue
        while word:
            low = (word & -word).bit_length() - 1
            ones = ~(word >> low)
            count = (ones & -ones).bit_length() - 1
            yield base + low, base + low + count
            word &= ~(((1 << count) - 1) << low)


# ------------------------------------------------------------------------------------ in an image


class BitmapStore:
    """The bitmaps of an image; a driver derives from it. Changes are made under exclusive.

    Args:
        node: whose they are.
        bitmaps: in the image's order; contents may come later, by `content`.
    """

    def __init__(self, node: Node, bitmaps: Iterable[DirtyBitmap]) -> None:
        self.node = node
        self.bitmaps: dict[str, DirtyBitmap] = {}
        for bitmap in bitmaps:
            self.require_new(bitmap.name)
            self.bitmaps[bitmap.name] = bitmap

    # ----------------------------------------------------------------- what the driver gives

    def content(self, name: str) -> DirtyBitmap:
        """A usable bitmap with its bits, read from the image if they were not yet."""
        return self.usable(name)

    def check_new(self, bitmap: DirtyBitmap) -> None:
        """Refuse a bitmap that the image could not hold.

        Raises:
            UnsupportedError: it could not.
        """

    def save(self, changed: str) -> None:
        """Make a change of the bitmap of this name durable; memory has it already."""

    # ------------------------------------------------------------------------------- changes

    def require_new(self, name: str) -> None:
        """Refuse a name that is taken.

        Raises:
            OptionError: it is.
        """
        if name in self.bitmaps:
            raise OptionError(f"Bitmap already exists: {name}", field="name")

    def usable(self, name: str) -> DirtyBitmap:
        """The bitmap of this name.

        Raises:
            NotFoundError: there is none.
            UnsupportedError: it is inconsistent.
        """
        bitmap = self.bitmaps.get(name)
        if bitmap is None:
            raise NotFoundError(f"Dirty bitmap '{name}' not found", errno=2)
        if bitmap.inconsistent:
            sentence = f"Bitmap '{name}' is inconsistent and cannot be used"
            raise UnsupportedError(
                sentence,
                qemu=f"{sentence}\nTry block-dirty-bitmap-remove to delete this bitmap from disk",
                hint="remove it; what it knew is lost",
                kind="inconsistent",
            )
        return bitmap

    def add(self, bitmap: DirtyBitmap) -> None:
        """Keep a new one."""
        self.require_new(bitmap.name)
        self.check_new(bitmap)
        self.bitmaps[bitmap.name] = bitmap
        try:
            self.save(bitmap.name)
        except BaseException:
            del self.bitmaps[bitmap.name]
            raise

    def remove(self, name: str) -> None:
        """Drop one, be it inconsistent."""
        if name not in self.bitmaps:
            self.usable(name)
        before = dict(self.bitmaps)
        del self.bitmaps[name]
        try:
            self.save(name)
        except BaseException:
            self.bitmaps = before
            raise

    def clear(self, name: str) -> None:
        """Forget what one has noted."""
        bitmap = self.content(name)
        self._change_bits(bitmap, bitmap.clear)

    def enable(self, name: str, enabled: bool) -> None:
        """Let one note writes from now on, or not any more."""
        bitmap = self.content(name)
        before, bitmap.enabled = bitmap.enabled, enabled
        try:
            self.save(name)
        except BaseException:
            bitmap.enabled = before
            raise

    def merge(self, name: str, source: DirtyBitmap) -> None:
        """Note in one what another one has noted."""
        bitmap = self.content(name)
        self._change_bits(bitmap, lambda: bitmap.merge(source))

    def _change_bits(self, bitmap: DirtyBitmap, change: Callable[[], None]) -> None:
        """All of a change and its saving, or nothing."""
        before = bitmap.copy(bitmap.name)
        try:
            change()
            self.save(bitmap.name)
        except BaseException:
            bitmap.take_over(before)
            raise


def new_bitmap(
    node: Node, name: str, granularity: int | None = None, *, enabled: bool = True
) -> DirtyBitmap:
    """An empty bitmap for `node`; without a granularity it is a cluster, 4 KiB to 64 KiB.

    Raises:
        OptionError: it has no name, or the granularity is none.
    """
    if not name:
        raise OptionError("Bitmap name cannot be empty", field="name")
    if not granularity:
        lowest, highest = _CHOSEN
        granularity = max(min(node.limits.cluster_size or highest, highest), lowest)
    if not SMALLEST <= granularity <= _LARGEST or granularity & (granularity - 1):
        raise OptionError(
            f"Granularity must be power of 2 and at least {SMALLEST}", field="granularity"
        )
    return DirtyBitmap(name, granularity, node.size, enabled=enabled)


def no_store(node: Node, name: str) -> DiskwrightError:
    """The error for a node that keeps no bitmaps."""
    return UnsupportedError(
        f"{node.describe()}: the {node.driver} format keeps no bitmaps, so not '{name}'",
        qemu=f"Can't store persistent bitmaps to {node.node_name}: Operation not supported",
        field="bitmaps",
    )
