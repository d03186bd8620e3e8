"""Every field of every table of qcow2 images damaged: checked and repaired as QEMU does it.

Where ours does otherwise on purpose there is a reason (`REASONS`; the commands' page tells users
of each), and what it leaves must be as good: see `complaint`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.differential.damage_cases import LAYOUTS, values
from tests.differential.damage_run import Bench, Outcome
from tests.differential.programs import REPOSITORY

pytestmark = pytest.mark.peer

#: In the quick suite one damage of so many is tried, of a field of each layout.
ONE_OF = 150


#: What a disk shows by such damages are tables that a repair changes.
SHOWN = ("the header", "the refcount table", "the refcount block", "the snapshot table")
#: And these, where QEMU's repair forgets snapshots: it changes more of their flags.
SHOWN_BESIDE = ("the l1", "the l2")


class Case:
    """A damage: where, what is wrong, the value that is put there."""

    def __init__(self, layout: str, field: str, text: str, value: int) -> None:
        self.layout = layout
        self.field = field
        self.text = text
        self.value = value

    @property
    def table(self) -> str:
        """What the field is a part of."""
        return self.field.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.layout}: {self.field} = {self.value:#x} ({self.text})"


Reason = Callable[[Case, Outcome], bool]


def _not_built(case: Case, outcome: Outcome) -> bool:
    return case.field in ("header.version", "header.crypt_method") and outcome.wanted.code == 1


def _table_at_zero(case: Case, outcome: Outcome) -> bool:
    return case.field == "header.l1_table_offset" and case.value == 0


def _block_outside(case: Case, outcome: Outcome) -> bool:
    return "is outside image" in outcome.wanted.err


def _qemu_gave_up(case: Case, outcome: Outcome) -> bool:
    """It found that a write would hit metadata, or died, in the middle of a repair."""
    words = (
        "Marking image as corrupt",
        "Check failed",
        "No medium",
        "qcow2_free_clusters failed",
        "exceeding the end of the file",  # of a table: all of it is given up
    )
    told = any(word in outcome.wanted.err for word in words)
    return "-r" in outcome.line and (told or outcome.wanted.code < 0)


def _snapshots_forgotten(case: Case, outcome: Outcome) -> bool:
    """It writes a header without them as it is opened to be repaired."""
    rewrites = "bitmaps" in case.layout or case.field == "header.autoclear_features"
    return rewrites and "-r" in outcome.line and "snapshots" in case.layout + case.field


def _table_kept(case: Case, outcome: Outcome) -> bool:
    """It counts nothing of such a table, and frees it."""
    behind = "exceeding the end of the file" in outcome.wanted.err
    return case.field.startswith("snapshot ") and "-r" in outcome.line and behind


def _place_forgotten(case: Case, outcome: Outcome) -> bool:
    return case.field == "header.snapshots_offset" and "without snapshots" in outcome.got.err


def _bitmaps_kept(case: Case, outcome: Outcome) -> bool:
    return "bitmaps" in case.layout and "-r" in outcome.line


def _header_lost(case: Case, outcome: Outcome) -> bool:
    """It took the header's cluster for a table: what it left is no image any more."""
    return "-r" in outcome.line and "-exit 63" in outcome.state.splitlines()


#: What the commands' page says of it -> whether it is why ours does otherwise.
REASONS: dict[str, Reason] = {
    "whose L1 table lies over its header": _table_at_zero,
    "a refcount block that lies outside of the file": _block_outside,
    "Where tables lie over each other": _qemu_gave_up,
    "keeps the snapshots of an image with bitmaps": _snapshots_forgotten,
    "keeps the room of a snapshot table": _table_kept,
    "forgets the place of a snapshot table without snapshots": _place_forgotten,
    "leaves bitmaps as they are": _bitmaps_kept,
    "never takes the header's cluster": _header_lost,
    "": _not_built,  # a release of its own brings it
}


def test_users_are_told_of_each_reason():
    page = (REPOSITORY / "docs/reference/commands/README.md").read_text()
    assert [words for words in REASONS if words not in page] == []


def _shows_tables(case: Case) -> bool:
    """Whether a disk shows tables of the image, which a repair changes."""
    without_data_file = case.layout == "data file" and case.field == "header.incompatible_features"
    return case.text in SHOWN or without_data_file


def complaint(bench: Bench, case: Case, outcome: Outcome) -> str:
    """Why what ours left is not as good as what QEMU left, or "".

    What QEMU's whole repair makes sound, and not by forgetting snapshots, ours makes sound.
    Nothing is worse than it was before, and every disk shows what it showed before or shows
    after QEMU's repair, if it could be read then.
    """
    if not 0 <= outcome.got.code <= 3 or "Traceback" in outcome.got.err:
        return "it died"
    if "-r" not in outcome.line:
        return ""
    files = bench.damaged(case.layout, case.field, case.value)
    before, theirs, ours = bench.portraits(files)
    kept = theirs.snapshots == before.snapshots
    leaks_only = outcome.line.startswith("check -r leaks")
    if theirs.sound and kept and not leaks_only and not ours.sound:
        return "QEMU made it sound"
    if ours.wrong > max(before.wrong, theirs.wrong):
        return f"{ours.wrong} things are wrong, before {before.wrong}"
    for name, shown in ours.disks.items():
        if _shows_tables(case) or (case.text in SHOWN_BESIDE and not kept):
            continue
        known = {before.disks.get(name), theirs.disks.get(name)} - {None}
        if known and shown not in known:
            return f"the disk {name} shows something new"
    lost = (before.disks.keys() & theirs.disks.keys()) - ours.disks.keys()
    return f"disks are gone: {lost}" if lost else ""


@pytest.fixture(scope="module")
def bench(real, ours, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(real, ours, tmp_path_factory.mktemp("repair"))


def cases_of(bench: Bench, layout: str) -> list[Case]:
    """Every damage of a layout."""
    places, _ = bench.layout(layout)
    return [
        Case(layout, field, text, value)
        for field in places.fields
        for text, value in values(places, field)
    ]


def trouble(bench: Bench, case: Case) -> list[str]:
    """How ours differs without a reason, or is worse with one."""
    found = []
    files = bench.damaged(case.layout, case.field, case.value)
    for outcome in bench.outcomes(files):
        if not outcome.said and not outcome.state:
            continue
        why = [name for name, holds in REASONS.items() if holds(case, outcome)]
        worse = complaint(bench, case, outcome) if why else ""
        if not why or worse:
            words = f"{outcome.said}\n--state--\n{outcome.state}"[:3000]
            found.append(f"{case}\n{outcome.line} {why}: {worse}\n{words}")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_of_damages(layout: str, bench: Bench):
    cases = cases_of(bench, layout)
    first = list(LAYOUTS).index(layout)  # others of each layout
    found = [line for case in cases[first::ONE_OF] for line in trouble(bench, case)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_damage(layout: str, bench: Bench):
    found = [line for case in cases_of(bench, layout) for line in trouble(bench, case)]
    assert not found, f"{len(found)}\n" + "\n".join(found)
