"""Images of every option, filled by either side and read by both: content, info, map, check."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.differential import option_matrix
from tests.differential.formats_pattern import Pattern
from tests.differential.formats_workbench import (
    Bench,
    content_and_info,
    create,
    layout_free,
)
from tests.differential.option_matrix import Combo

pytestmark = pytest.mark.peer

FAST = [
    *option_matrix.singles("qcow2"),
    *(combo for name in ("raw", "vdi", "vpc") for combo in option_matrix.pairs(name)),
]
SLOW = [combo for combo in option_matrix.pairs("qcow2") if combo not in FAST]
ROWS = [
    *(pytest.param(combo, id=combo.name) for combo in FAST),
    *(pytest.param(combo, id=combo.name, marks=pytest.mark.slow) for combo in SLOW),
]
WRITES = 12


def test_the_rows_are_what_they_say() -> None:
    option_matrix.check_rows()
    assert len(ROWS) == len({row.id for row in ROWS})


@pytest.mark.parametrize("combo", ROWS)
def test_filled(combo: Combo, both, folder: Path, rng: random.Random) -> None:
    """Each side makes and fills an image; both say the same of either.

    Where QEMU does nothing on a discard (vdi, vpc), ours gives the space back, so there none is
    made. Where it has no way to say "zero" (there, and qcow2 before 1.1 over a backing file), it
    takes a block for what ours sees to be zero already.
    """
    bench = Bench(both, folder, crossed=False)
    create(bench, combo, rng)
    simple = combo.format in ("vdi", "vpc")
    pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
    commands = pattern.fill(WRITES, encodes=combo.encodes, discards=not simple)
    bench.write("disk", combo.format, commands)
    no_zeroes = simple or (combo.backing is not None and combo.row["compat"] == "0.10")
    bench.look("disk", combo.format, alike=content_and_info if no_zeroes else layout_free)
    if combo.backing is None:
        pattern.verify(bench.content("disk", combo.format))
