"""`dd`, `bench` and `measure` on images of every option, filled by either side."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.differential import option_matrix
from tests.differential.formats_pattern import Pattern
from tests.differential.formats_workbench import Bench, content_and_info, create
from tests.differential.option_matrix import Combo

pytestmark = pytest.mark.peer

FAST = [
    *option_matrix.singles("qcow2"),
    *(combo for name in ("raw", "vdi", "vpc") for combo in option_matrix.singles(name)),
]
ROWS = [
    pytest.param(combo, id=combo.name, marks=() if combo in FAST else pytest.mark.slow)
    for name in option_matrix.AXES
    for combo in sorted({*option_matrix.pairs(name), *option_matrix.singles(name)})
]
WRITES = 8


def filled(combo: Combo, both, folder: Path, rng: random.Random) -> Bench:
    """All four lineages with a filled image; the second side of each works on it next."""
    bench = Bench(both, folder)
    create(bench, combo, rng)
    pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
    discards = combo.format not in ("vdi", "vpc")
    commands = pattern.fill(WRITES, encodes=combo.encodes, discards=discards)
    bench.write("disk", combo.format, commands)
    return bench


@pytest.mark.parametrize("combo", ROWS)
def test_blocks_copied(combo: Combo, both, folder: Path, rng: random.Random) -> None:
    bench = filled(combo, both, folder, rng)
    block = rng.choice((combo.unit, 512, 3000, 1 << 20))
    words = [f"bs={block}", f"skip={rng.randrange(3)}"]
    if rng.random() < 0.5:
        words.append(f"count={rng.randrange(3, 2000)}")
    target = rng.choice(("raw", "qcow2", "vdi", "vpc"))
    bench.img(["dd", "-f", combo.format, "-O", target, "if=disk", "of=copy", *words])
    bench.look("copy", target)


@pytest.mark.parametrize("combo", ROWS)
def test_written_side_by_side(combo: Combo, both, folder: Path, rng: random.Random) -> None:
    bench = filled(combo, both, folder, rng)
    length = min(rng.choice((512, 4096, 5000, combo.unit)), combo.size)
    step = rng.choice((length, length + 512, 3 * length))
    # A request that would reach over the end fails: so many fit before it.
    fitting = (combo.size - length) // step + 1
    bench.img(
        [
            *("bench", "-w", "-f", combo.format, "--pattern", "77"),
            *("-c", str(min(fitting, 200)), "-s", str(length), "-S", str(step)),
            *("-d", "8", "--flush-interval", "16"),
            "disk",
        ]
    )
    bench.look("disk", combo.format, alike=content_and_info)
    if combo.checks:
        bench.sound("disk")
    bench.img(["bench", "-f", combo.format, "-c", "50", "-s", "512", "disk"])


@pytest.mark.parametrize("combo", ROWS)
def test_measured(combo: Combo, both, folder: Path, rng: random.Random) -> None:
    bench = filled(combo, both, folder, rng)
    bench.same(f"measure -f {combo.format} disk")
    bench.same(f"measure -f {combo.format} -O qcow2 --output=json disk")
    if combo.format == "qcow2" and combo.words:
        bench.same(f"measure -f qcow2 -O qcow2 -o {combo.words} disk")
