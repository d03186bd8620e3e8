"""The snapshot table, as a check and a repair see it."""

from __future__ import annotations

import errno

from diskwright.block.info import Repair
from diskwright.block.notice import complain
from diskwright.drivers.formats.qcow2.header import MAX_SNAPSHOTS
from diskwright.drivers.formats.qcow2.snapshots import COMPLETE_EXTRA, MAX_EXTRA, Cuts, load
from diskwright.errors import FormatError, IOFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.drivers.formats.qcow2.check import Checker
    from diskwright.drivers.formats.qcow2.snapshots import Snapshot


class SnapshotTableCheck:
    """One look at it.

    Args:
        checker: takes what is found, and what is to be repaired.
    """

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self._length = 0  # bytes of the table, as its entries have it

    def load(self) -> list[Snapshot]:
        """The snapshots, as far as a repair keeps them.

        Raises:
            IOFailure: the table cannot be read.
        """
        checker = self._checker
        cuts = Cuts() if checker.repair == Repair.ALL else None
        self._require()
        try:
            found, self._length = load(checker.node, cuts)
        except FormatError as error:
            complain(f"ERROR failed to read the snapshot table: {error.qemu_message}")
            raise IOFailure(str(error), errno=errno.EFBIG, qemu="File too large") from error
        if cuts is not None:
            self._report_cuts(cuts)
            if cuts.extra or cuts.overhanging or cuts.surplus:
                checker.mending.snapshots = found
                checker.mending.old_table_length = self._length
        for number, snapshot in enumerate(found):
            if checker.node.header.version < 3 or len(snapshot.extra) >= COMPLETE_EXTRA:
                continue
            checker.damage(f"snapshot table entry {number} is incomplete", mends=True)
            if checker.repair == Repair.ALL:
                checker.mending.snapshots = found
                checker.mending.old_table_length = self._length
        return found

    def count(self) -> None:
        """Count the table's clusters."""
        checker, length = self._checker, self._length
        counts = checker.count(checker.node.header.snapshots_offset, length)
        checker.mending.old_table_counted = length if counts else 0

    def keep(self, snapshots: list[Snapshot]) -> None:
        """Before a repair: count what is there of a table that an entry has end behind the file.

        As far as nobody else has a use for it, and something is allocated. QEMU counts nothing of
        such a table, so that its repair gives it away. A whole repair stores it anew, where there
        is room for the entries as they say they are.
        """
        checker, mending = self._checker, self._checker.mending
        if not snapshots or mending.old_table_counted or checker.repair == Repair.NONE:
            return
        if mending.snapshots is not None:
            return  # it is stored anew, and away from where it is
        first = checker.node.header.snapshots_offset >> checker.bits
        stop = first
        while not checker.counter.get(stop) and checker.is_allocated(stop):
            stop += 1
        if stop > first:
            checker.add(first, stop - 1)
            mending.old_table_counted = (stop - first) << checker.bits
            if checker.repair == Repair.ALL:
                mending.snapshots = snapshots
                mending.old_table_length = self._length

    def _require(self) -> None:
        """Refuse a snapshot table of too many entries, or one where none can be.

        A repair drops those that are too many.

        Raises:
            IOFailure: it is one.
        """
        checker = self._checker
        header = checker.node.header
        drops = checker.repair == Repair.ALL
        if drops and not header.nb_snapshots:
            self._forget_place()
        over = 0 if drops else max(header.nb_snapshots - MAX_SNAPSHOTS, 0)
        try:
            header.require_snapshots(of_any_length=drops)
        except FormatError as error:
            text = error.qemu_message
            complain(f"ERROR {text[0].lower()}{text[1:]}")
            if over:
                checker.report(
                    f"You can force-remove all {over} overhanging snapshots with qemu-img check "
                    "-r all"
                )
            number = errno.EFBIG if over else errno.EINVAL
            raise IOFailure(str(error), errno=number) from error

    def _forget_place(self) -> None:
        """Without snapshots no table is missed; a place that cannot be one only hinders."""
        checker = self._checker
        header = checker.node.header
        try:
            header.require_snapshots()
        except FormatError:
            checker.damage("the place of a snapshot table without snapshots", mends=True)
            header.snapshots_offset = 0
            checker.node.write_header()

    def _report_cuts(self, cuts: Cuts) -> None:
        checker = self._checker
        for number, length in cuts.extra:
            checker.report(
                f"Discarding too much extra metadata in snapshot table entry {number} "
                f"({length} > {MAX_EXTRA})"
            )
        if cuts.surplus:
            checker.report(f"Discarding {cuts.surplus} overhanging snapshots")
        if cuts.overhanging:
            checker.report(
                f"Discarding {cuts.overhanging} overhanging snapshots (snapshot table is too big)"
            )
        checker.result.corruptions_fixed += len(cuts.extra) + cuts.overhanging + cuts.surplus
