"""What `check` looks at in a VHD: more than QEMU, which has no check for this format.

A block that lies outside of the file is not found here: such an image cannot be opened.
"""

from __future__ import annotations

from array import array

from diskwright.block.info import CheckResult, Repair
from diskwright.drivers.formats.vpc.header import (
    DYNAMIC_BYTES,
    DYNAMIC_CHECKSUM_OFFSET,
    FOOTER_BYTES,
    FREE,
    SECTOR,
    checksum,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.drivers.formats.vpc.tables import VpcTables

#: Lines reported; a damaged table of half a billion words would fill a disk with them.
MAX_LINES = 100_000


class Checker:
    """One run over headers and table: blocks that overlap each other or a header, wrong copies."""

    def __init__(self, node: VpcTables, repair: int, report: Callable[[str], None]) -> None:
        assert node.dynamic is not None
        self._node = node
        self._dynamic = node.dynamic
        self._mends = repair == Repair.ALL
        self._report = report
        self._result = CheckResult()

    def run(self) -> CheckResult:
        """Count, and report a line for each thing found."""
        node = self._node
        self._check_blocks()
        free = node.find_free()
        self._check_header()
        self._check_footer(free)
        self._result.image_end_offset = free + FOOTER_BYTES
        return self._result

    def _check_blocks(self) -> None:
        """Blocks in the order of the file: each must begin after what is before it."""
        node, result = self._node, self._result
        whole = self._dynamic.bitmap_bytes + self._dynamic.block_size
        room = node.file.size // whole
        places = self._places(room)
        result.allocated_clusters = len(places)
        result.total_clusters = -(-node.size // self._dynamic.block_size)
        if len(places) > room:
            self._error(f"ERROR: more blocks than the {room} that the file has room for")
        stop, before = -(-self._metadata_end() // SECTOR), "the headers"
        for word in sorted(places):
            if word < stop:
                self._error(f"ERROR: the block at sector {word} overlaps {before}")
            if word + whole // SECTOR > stop:
                stop, before = word + whole // SECTOR, f"the block at sector {word}"

    def _places(self, room: int) -> array[int]:
        """The sectors of all blocks; a few more than there is room for are enough."""
        node = self._node
        places = array("I")
        for _, raw in node.table_windows():
            if raw.count(b"\xff") != len(raw):
                places.extend(word for word in node.table.decode(raw) if word != FREE)
                if len(places) > room:
                    break
        return places

    def _metadata_end(self) -> int:
        """Where the first block can begin."""
        dynamic = self._dynamic
        header = self._node.footer.data_offset + DYNAMIC_BYTES
        return max(header, dynamic.table_offset + dynamic.table_bytes)

    def _check_header(self) -> None:
        node, at = self._node, self._node.footer.data_offset
        raw = node.file.read(at, DYNAMIC_BYTES)
        stored = int.from_bytes(raw[DYNAMIC_CHECKSUM_OFFSET:][:4], "big")
        right = checksum(raw, DYNAMIC_CHECKSUM_OFFSET)
        if stored == right:
            return
        self._error(f"ERROR: the checksum of the header is 0x{stored:08x}, not 0x{right:08x}")
        if self._mends:
            node.file.write(at, self._dynamic.sealed())
            node.file.flush()
            self._mended()

    def _check_footer(self, free: int) -> None:
        """The last sector must be what the first one is."""
        node = self._node
        at = max(-(-node.file.size // SECTOR) * SECTOR - FOOTER_BYTES, 0)
        if at >= free and node.file.read(at, FOOTER_BYTES) == node.footer.pack():
            return
        self._error("ERROR: the file does not end with the footer that it begins with")
        if self._mends:
            node.prepare_writes()
            node.cut_file()
            self._mended()

    def _mended(self) -> None:
        self._result.corruptions -= 1
        self._result.corruptions_fixed += 1

    def _error(self, line: str) -> None:
        self._result.corruptions += 1
        if self._result.corruptions <= MAX_LINES:
            self._report(line)


def check(node: VpcTables, repair: int, report: Callable[[str], None]) -> CheckResult:
    """See Checker; a fixed image that could be opened has nothing that could be wrong."""
    if node.dynamic is None:
        return CheckResult()
    return Checker(node, repair, report).run()
