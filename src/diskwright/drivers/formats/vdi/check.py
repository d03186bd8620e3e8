"""What `check` counts in a VDI image, in the words of `qemu-img check`."""

from __future__ import annotations

from diskwright.block.info import CheckResult
from diskwright.drivers.formats.vdi.header import COUNT_WORD, ZERO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.drivers.formats.vdi.tables import VdiTables

#: Lines reported; a damaged map of half a billion words would fill a disk with them.
MAX_LINES = 100_000


class Checker:
    """One run over the block map: blocks used twice, numbers out of range, a wrong count."""

    def __init__(self, node: VdiTables, report: Callable[[str], None]) -> None:
        self._node = node
        self._report = report
        self._blocks = node.header.blocks
        self._seen = bytearray()  # a bit for each block number, as long as needed
        self._allocated = 0
        self._result = CheckResult()

    def run(self) -> CheckResult:
        """Count, and report a line for each thing found."""
        decode = self._node.map_table.decode
        for first, raw in self._node.map_windows():
            if raw == raw[:4] * (len(raw) // 4):
                self._uniform(first, len(raw) // 4, decode(raw[:4])[0])
                continue
            for at, word in enumerate(decode(raw)):
                if word < ZERO:
                    self._used(first + at, word)
        stored = self._node.head_table.get(0).items[COUNT_WORD]
        if self._allocated != stored:
            self._result.corruptions += 1
            self._report(
                f"ERROR: allocated blocks mismatch, is {self._allocated}, should be {stored}"
            )
        return self._result

    def _uniform(self, first: int, count: int, word: int) -> None:
        """Many words alike: holes of the file, or nothing allocated."""
        if word >= ZERO:
            return
        lines = min(count, max(MAX_LINES - self._result.corruptions, 1))
        for index in range(first, first + lines):
            self._used(index, word)
        self._result.corruptions += count - lines
        if word < self._blocks:
            self._allocated += count - lines

    def _used(self, index: int, word: int) -> None:
        if word >= self._blocks:
            self._error(f"ERROR: block index {index} too large, is {word}")
            return
        self._allocated += 1
        place, bit = word >> 3, 1 << (word & 7)
        if place >= len(self._seen):
            self._seen.extend(bytes(max(place + 1 - len(self._seen), len(self._seen))))
        if self._seen[place] & bit:
            self._error(f"ERROR: block index {word} also used by {word}")
        self._seen[place] |= bit

    def _error(self, line: str) -> None:
        self._result.corruptions += 1
        if self._result.corruptions <= MAX_LINES:
            self._report(line)


def check(node: VdiTables, report: Callable[[str], None]) -> CheckResult:
    """See Checker."""
    return Checker(node, report).run()
