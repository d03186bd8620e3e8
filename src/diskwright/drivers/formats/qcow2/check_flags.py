"""The flag COPIED of the active tables, held against the refcounts as they will be."""

from __future__ import annotations

from array import array

from diskwright.block.cancel import check_cancelled
from diskwright.block.info import Repair
from diskwright.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    is_empty,
    runs,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.drivers.formats.qcow2.check import Checker


class FlagCheck:
    """One look at all flags.

    Args:
        checker: has counted and compared.
        fixes: what it repairs of the refcounts: 1 leaks, 2 corruptions.
    """

    def __init__(self, checker: Checker, fixes: int) -> None:
        self.checker = checker
        self.fixes = fixes
        repair = checker.repair
        self.mends = repair == Repair.ALL or (repair == Repair.LEAKS and checker.sound)
        self._kept: tuple[int, array[int] | None] = (-1, None)

    def run(self) -> None:
        """Report every flag that is wrong, and note what it is to be."""
        checker = self.checker
        node, mending, size = checker.node, checker.mending, checker.size
        for index, entry in enumerate(node.active_l1()):
            host = entry & OFFSET_MASK
            if not host:
                continue
            check_cancelled()
            count = self._refcount(host)
            if count is not None and (count == 1) != (entry >= COPIED):
                text = f"L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}"
                if self._flag(text):
                    mending.l1_flags[index] = COPIED if count == 1 else 0
            if host < checker.file_size:
                items = node.l2_table.decode(node.file.read(host, size))
                mending.patch(host, items)
                self._check_l2(host, node.entries.descriptors(items))

    def _check_l2(self, host: int, items: array[int]) -> None:
        if is_empty(items):
            return
        node = self.checker.node
        for start, length in runs(items, self.checker.size):
            entry = items[start]
            if entry & COMPRESSED or not entry & node.name_mask:
                continue
            if self._are_right(entry, length):
                continue
            for at in range(start, start + length):
                entry = items[at]
                count = 1 if node.external else self._refcount(entry & OFFSET_MASK)
                if count is None or (count == 1) == (entry >= COPIED):
                    continue
                if self._flag(f"data cluster: l2_entry={entry:x} refcount={count}"):
                    self.checker.mending.flags[host, at] = COPIED if count == 1 else 0

    def _are_right(self, entry: int, length: int) -> bool:
        """Whether a run of entries that begins with `entry` has the flag as it is to be."""
        checker = self.checker
        if checker.node.external:
            return entry >= COPIED
        first, chunk = (entry & OFFSET_MASK) >> checker.bits, checker.counter.chunk
        stop = first + length
        while first < stop:
            number, at = divmod(first, chunk)
            last = min(at + stop - first, chunk)
            counts = self._settled(number)
            if counts is not None:
                part = counts[at:last]
                ones = array(part.typecode, (1,)) * len(part)
                if part != ones if entry >= COPIED else part.count(1):
                    return False
            first += last - at
        return True

    def _flag(self, text: str) -> bool:
        checker, mends = self.checker, self.mends
        checker.report(f"{'Repairing' if mends else 'ERROR'} OFLAG_COPIED {text}")
        checker.result.corruptions_fixed += mends
        checker.result.corruptions += not mends
        return mends

    def _refcount(self, host: int) -> int | None:
        """The refcount as it is, or will be after the repair; None where it cannot be read."""
        number, at = divmod(host >> self.checker.bits, self.checker.counter.chunk)
        counts = self._settled(number)
        return None if counts is None else counts[at]

    def _settled(self, number: int) -> array[int] | None:
        """The refcounts of a chunk, as `_refcount`."""
        if self._kept[0] != number:
            self._kept = (number, self._settle(number))
        return self._kept[1]

    def _settle(self, number: int) -> array[int] | None:
        checker = self.checker
        none = array("I", (0,)) * checker.counter.chunk
        wanted = checker.counter.chunks.get(number, none)
        if self.fixes == 3:
            return wanted
        if checker.is_unreadable(number):
            return None
        stored = checker.stored(number)
        if stored is None:
            return none
        return array(stored.typecode, map(min, stored, wanted)) if self.fixes & 1 else stored
