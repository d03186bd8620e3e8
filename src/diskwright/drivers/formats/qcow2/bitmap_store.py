"""The persistent bitmaps of an open image: in use while they note writes, saved at a clean end.

Invariants (tests/crash, tests/unit/test_qcow2_bitmaps.py):

1. Before the first byte of the guest's changes, every enabled bitmap has its bits in memory, and
   its flag in-use is durable: after a crash it is known to be behind. QEMU sets the flag of all
   bitmaps as it opens an image; a disabled one misses nothing, so here it stays as it is.
2. Bits, tables and the directory go to free clusters; then the header names the new directory,
   with new refcounts, by one write (transaction.py). Only the flag in-use is set in place.
3. A clean end saves what was in use and clears the flag; on failure the flag stays, unless the
   image has the bits already.

Source: QEMU, docs/interop/qcow2.txt, "Bitmaps".
"""

from __future__ import annotations

from array import array
from itertools import zip_longest

from diskwright.block.bitmap import BitmapStore, DirtyBitmap
from diskwright.block.cancel import check_cancelled
from diskwright.block.notice import complain
from diskwright.drivers.formats.qcow2 import bitmaps
from diskwright.drivers.formats.qcow2.bitmaps import ALL_ONES, AUTO, IN_USE, Entry
from diskwright.drivers.formats.qcow2.entries import OFFSET_MASK
from diskwright.drivers.formats.qcow2.extensions import Bitmaps
from diskwright.drivers.formats.qcow2.header import Autoclear
from diskwright.drivers.formats.qcow2.transaction import Transaction
from diskwright.errors import (
    DiskwrightError,
    FormatError,
    NoSpaceError,
    UnsupportedError,
    strerror_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskwright.drivers.formats.qcow2.driver import Qcow2

#: Bytes that all bitmaps of an image that note writes may have in memory.
_MAX_MEMORY = 2 << 30


class Qcow2Bitmaps(BitmapStore):
    """See the module's text.

    Raises:
        FormatError: the directory or a table is absurd.
    """

    node: Qcow2

    def __init__(self, node: Qcow2) -> None:
        found = bitmaps.load(node)
        super().__init__(node, (_unread(node, entry) for entry in found))
        self._entries = {entry.name: entry for entry in found}
        self._changed: set[str] = set()  # their bits in the image are old
        self._writing = ""  # the one that is being saved
        usable = [entry for entry in self._entries.values() if not entry.flags & IN_USE]
        if sum(entry.table_entries for entry in usable) * node.cluster_size > _MAX_MEMORY:
            raise FormatError(
                f"The bitmaps of {node.describe()} would take more than {_MAX_MEMORY} bytes",
                field="bitmap directory",
            )
        self._unread = {entry.name for entry in usable}
        for entry in usable:
            bitmaps.read_table(node, entry)

    # ------------------------------------------------------------------------------- reading

    def content(self, name: str) -> DirtyBitmap:
        """See BitmapStore."""
        bitmap = self.usable(name)
        if name in self._unread:
            self._read(bitmap, self._entries[name])
            self._unread.discard(name)
        return bitmap

    def _read(self, bitmap: DirtyBitmap, entry: Entry) -> None:
        node, size = self.node, self.node.cluster_size
        for number, item in enumerate(bitmaps.read_table(node, entry)):
            if item & OFFSET_MASK:
                check_cancelled()
                bitmap.load(number * size, node.file.read(item & OFFSET_MASK, size))
            elif item & ALL_ONES:
                bitmap.load_ones(number * size, size)

    # ------------------------------------------------------------------------------- in use

    def activate(self) -> None:
        """Let the enabled bitmaps note writes; before the first one."""
        noting = self._noting()
        for bitmap in noting:
            self.content(bitmap.name)
        self._mark_in_use(bitmap.name for bitmap in noting)
        self.node.watch(noting)

    def _noting(self) -> list[DirtyBitmap]:
        return [one for one in self.bitmaps.values() if one.enabled and not one.inconsistent]

    def _mark_in_use(self, names: Iterable[str]) -> None:
        """Set the flag where it is, durably; nothing else of the directory changes."""
        node = self.node
        for name in names:
            self._entries[name].flags |= IN_USE
            self._changed.add(name)
        extension = bitmaps.extension_of(node)
        if extension is not None and self._changed:
            self._write_entries(extension)

    def _write_entries(self, extension: Bitmaps) -> None:
        """Write the directory over itself: the flags of its entries are other ones."""
        data = b"".join(entry.pack() for entry in self._entries.values())
        self.node.file.write(extension.directory_offset, data)
        self.node.file.flush()

    def finish(self) -> None:
        """A clean end: save what was in use."""
        self.node.watch(())
        if not self._changed:
            return
        try:
            self._save(live=False)
        except DiskwrightError as error:
            self._use_no_more()
            if not self._changed and isinstance(error, NoSpaceError):
                return  # nothing had to be written
            words = f"Failed to write bitmap '{self._writing}' to file: {strerror_of(error)}"
            if any(self._entries[name].flags & IN_USE for name in self._changed):
                place = f"inactivation of node '{self.node.node_name}'"
                words = f"Lost persistent bitmaps during {place}: {words}"
            complain(words)
            error.qemu = "Error while closing the image: Invalid argument"
            raise

    def _use_no_more(self) -> None:
        """Where the image has the bits of a bitmap in use already, clear its flag in place.

        That needs no room, which there may be none of.
        """
        node = self.node
        extension = bitmaps.extension_of(node)
        if node.broken or extension is None:
            return
        same = {name for name in self._changed if self._is_stored(name)}
        before = {name: self._entries[name].flags for name in same}
        for name in same:
            self._entries[name].flags &= ~IN_USE
        try:
            if same:
                self._write_entries(extension)
        except DiskwrightError:  # told by whoever could not save them
            for name, flags in before.items():
                self._entries[name].flags = flags
        else:
            self._changed -= same

    def _is_stored(self, name: str) -> bool:
        """Whether the image has a bitmap as it is in memory."""
        entry, bitmap, size = self._entries[name], self.bitmaps[name], self.node.cluster_size
        stored = _unread(self.node, entry)
        try:
            self._read(stored, entry)
        except DiskwrightError:  # of another length, where the disk has got another size
            return False
        return all(
            ours == theirs for ours, theirs in zip_longest(bitmap.pieces(size), stored.pieces(size))
        )

    def store_anew(self, name: str) -> None:
        """A part of a bitmap lies outside of the file: let `finish` save what there is of it."""
        if name in self.bitmaps and not self.bitmaps[name].inconsistent:
            self.content(name)
            self._changed.add(name)

    def begin_resize(self, size: int) -> None:
        """No table fits a disk of another size: until the new ones are there, all are in use.

        Raises:
            UnsupportedError: one of them is inconsistent, or nothing is to remain.
        """
        if not size:
            raise UnsupportedError("A disk of no bytes has no bitmaps", hint="remove them before")
        for name in self.bitmaps:
            self.usable(name)
        for name in self.bitmaps:
            self.content(name)
        self._mark_in_use(self.bitmaps)

    def end_resize(self) -> None:
        """The node has its new size, or kept the old one.

        Where it is not known which tables the header names, nothing more is written.
        """
        if self.node.broken:
            return
        for bitmap in self.bitmaps.values():
            bitmap.resize(self.node.header.size)
        self._save(live=self.node.writes_begun)

    # ------------------------------------------------------------------------------- saving

    def check_new(self, bitmap: DirtyBitmap) -> None:
        """See BitmapStore."""
        words = self._objection(bitmap)
        if words:
            text = f"Can't make bitmap '{bitmap.name}' persistent in '{self.node.node_name}'"
            raise UnsupportedError(f"{text}: {words}", field="bitmaps")

    def _objection(self, bitmap: DirtyBitmap) -> str:
        node = self.node
        bits = bitmap.granularity.bit_length() - 1
        room = bitmaps.table_entries(node, node.header.size, bits) * node.cluster_size
        entry = Entry.of(bitmap.name, bits, 0)
        if not room:
            return "A disk of no bytes has no bitmaps"
        if node.header.version < 3:
            return "Cannot store dirty bitmaps in qcow2 v2 files"
        if len(entry.raw_name) > bitmaps.MAX_NAME:
            return f"Name length exceeds maximum ({bitmaps.MAX_NAME} characters)"
        if room > bitmaps.MAX_BITMAP_BYTES:
            return "Too much space will be occupied by the bitmap. Use larger granularity"
        if len(self._entries) >= bitmaps.MAX_BITMAPS:
            return "Maximum number of persistent bitmaps is already reached"
        directory = sum(len(one.pack()) for one in (*self._entries.values(), entry))
        if directory > bitmaps.MAX_DIRECTORY:
            return "Not enough space in the bitmap directory"
        return ""

    def save(self, changed: str) -> None:
        """See BitmapStore."""
        before = set(self._changed)
        live = self.node.writes_begun
        if changed in self.bitmaps and not self.bitmaps[changed].inconsistent:
            self._changed.add(changed)
        try:
            self._save(live=live)
        except BaseException:
            self._changed = before
            raise
        if live:
            self.node.watch(self._noting())

    def _save(self, *, live: bool) -> None:
        """Write what changed, and a directory; `live`: those that note writes stay in use."""
        node = self.node
        change = Transaction(node)
        extension = bitmaps.extension_of(node)
        if extension is not None:
            change.change(extension.directory_offset, extension.directory_size, -1)
        for name, entry in self._entries.items():
            if name not in self.bitmaps:
                self._free(change, entry)
        made = {
            name: self._saved(change, bitmap, live=live) for name, bitmap in self.bitmaps.items()
        }
        directory = b"".join(entry.pack() for entry in made.values())
        place = None
        features = node.header.autoclear_features & ~Autoclear.BITMAPS
        if made:
            place = Bitmaps(len(made), change.write(directory), len(directory))
            features |= Autoclear.BITMAPS
        change.fields["autoclear_features"] = features
        change.extensions = node.extensions.with_bitmaps(place)
        change.commit()
        self._entries = made
        self._changed = {name for name, entry in made.items() if self._is_behind(name, entry)}

    def _is_behind(self, name: str, entry: Entry) -> bool:
        return bool(entry.flags & IN_USE) and not self.bitmaps[name].inconsistent

    def _saved(self, change: Transaction, bitmap: DirtyBitmap, *, live: bool) -> Entry:
        """The entry of a bitmap, whose bits are written if they have to be."""
        self._writing = bitmap.name
        entry = self._entries.get(bitmap.name)
        if bitmap.inconsistent and entry is not None:
            return entry
        in_use = live and bitmap.enabled
        bits = bitmap.granularity.bit_length() - 1
        made = Entry.of(bitmap.name, bits, in_use * IN_USE | bitmap.enabled * AUTO)
        if entry is not None:
            made.raw_name = entry.raw_name
            if in_use or bitmap.name not in self._changed:
                made.table_offset, made.table_entries = entry.table_offset, entry.table_entries
                return made
            self._free(change, entry)
        made.table_offset, made.table_entries = self._write_bits(change, bitmap, bits)
        return made

    def _write_bits(self, change: Transaction, bitmap: DirtyBitmap, bits: int) -> tuple[int, int]:
        """(offset, entries) of a new table; its clusters are written."""
        node, size = self.node, self.node.cluster_size
        count = bitmaps.table_entries(node, bitmap.size, bits)
        table = array("Q", bytes(8 * count))
        ones = b"\xff" * size
        for number, data in bitmap.pieces(size):
            if number >= count:
                break
            check_cancelled()
            if data == ones:
                table[number] = ALL_ONES
            else:
                table[number] = change.take(1)
                node.file.write(table[number], data)
        return change.write(node.l1_slices.encode(table)), count

    def _free(self, change: Transaction, entry: Entry) -> None:
        """Count a bitmap's clusters no more; a damaged table must not free what others have."""
        node = self.node
        mask, end = node.cluster_size - 1, node.file.size + node.cluster_size
        for offset, length in bitmaps.areas_of(node, entry):
            span = range(offset, offset + length, node.cluster_size)
            if not offset & mask and offset + length <= end and node.metadata.isdisjoint(span):
                change.change(offset, length, -1)


def _unread(node: Qcow2, entry: Entry) -> DirtyBitmap:
    return DirtyBitmap(
        entry.name,
        1 << entry.bits,
        node.header.size,
        enabled=bool(entry.flags & AUTO),
        inconsistent=bool(entry.flags & IN_USE),
    )
