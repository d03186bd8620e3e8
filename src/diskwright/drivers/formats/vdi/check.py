"""What `check` counts in a VDI image, in the words of `qemu-img check`."""

from __future__ import annotations

from diskwright.block.info import CheckResult
from diskwright.drivers.formats.vdi.header import FREE, ZERO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.drivers.formats.vdi.tables import VdiTables

#: Lines reported; a damaged map of half a billion words would fill a disk with them.
MAX_LINES = 100_000


def check(node: VdiTables, report: Callable[[str], None]) -> CheckResult:
    """Look for blocks used twice, numbers out of range, and a wrong count."""
    result = CheckResult()
    blocks = node.header.blocks
    seen = bytearray(blocks)
    allocated = 0
    for first, words in node.map_windows():
        if words.count(FREE) == len(words):
            continue
        for at, word in enumerate(words):
            if word >= ZERO:
                continue
            if word >= blocks:
                text = f"ERROR: block index {first + at} too large, is {word}"
            else:
                allocated += 1
                if not seen[word]:
                    seen[word] = 1
                    continue
                text = f"ERROR: block index {word} also used by {word}"
            result.corruptions += 1
            if result.corruptions <= MAX_LINES:
                report(text)
    if allocated != node.header.blocks_allocated:
        result.corruptions += 1
        report(
            f"ERROR: allocated blocks mismatch, is {allocated}, "
            f"should be {node.header.blocks_allocated}"
        )
    return result
