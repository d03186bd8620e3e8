"""convert between every two formats, with the flags that say how, and compare's verdicts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.differential import option_matrix
from tests.differential.formats_pattern import Pattern
from tests.differential.formats_workbench import Bench, Side, create, create_base, room, sides
from tests.differential.option_matrix import Combo, default

pytestmark = pytest.mark.peer

FORMATS = ("raw", "qcow2", "vdi", "vpc")
#: what `-S` and its companions are tried with
FLAGS = (
    [],
    ["-S", "0"],
    ["-S", "4k"],
    ["-S", "64k"],
    ["-p"],
    ["-m", "3", "-W"],
    ["-n"],
    ["-c"],
    ["-n", "--target-is-zero"],
)


class Case(NamedTuple):
    """A source, a target and flags."""

    source: Combo
    target: Combo
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join([self.source.name, "to", self.target.name, *self.flags])


def _target_rows(format: str) -> tuple[Combo, ...]:
    rows = option_matrix.singles(format)
    return tuple(row for row in rows if row.backing is None)


def cases() -> list[Case]:
    """Every pair of formats with every flag that it takes; create options in turn."""
    found = []
    turn = 0
    for source, target in itertools.product(FORMATS, FORMATS):
        sources, targets = _target_rows(source), _target_rows(target)
        for flags in FLAGS:
            if "-c" in flags and target != "qcow2":
                continue
            chosen = targets[turn % len(targets)]
            if "-c" in flags and chosen.row["preallocation"] != "off":
                chosen = default("qcow2", compression_type="zstd")
            found.append(Case(sources[turn % len(sources)], chosen, tuple(flags)))
            turn += 1
    return found


CASES = cases()
ROWS = [
    pytest.param(case, id=case.name, marks=[] if number % 4 == 0 else pytest.mark.slow)
    for number, case in enumerate(CASES)
]


@pytest.fixture
def both(real, ours) -> tuple[Side, Side]:
    return sides(real, ours)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with room(tmp_path) as made:
        yield made


def make_source(bench: Bench, combo: Combo, rng: random.Random) -> None:
    create(bench, combo, rng)
    pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
    discards = combo.format in ("raw", "qcow2")
    bench.write("disk", combo.format, pattern.fill(8, encodes=combo.encodes, discards=discards))


@pytest.mark.parametrize("case", ROWS)
def test_converted(case: Case, both, folder: Path, rng: random.Random) -> None:
    """The second side converts what the first one made; the targets are alike."""
    bench = Bench(both, folder)
    make_source(bench, case.source, rng)
    source, target = case.source.format, case.target.format
    words = ["-o", case.target.words] if case.target.words else []
    if "-n" in case.flags:
        size = case.source.size + (case.source.unit if case.source.format == "vpc" else 0)
        bench.img(["create", "-q", "-f", target, *words, "target", str(size)], by=0)
        words = []
        if "--target-is-zero" not in case.flags:
            bench.write("target", target, [f"write -P 0xee 0 {case.source.size // 1024 * 512}"])
    line = ["convert", *case.flags, "-f", source, "-O", target, *words, "disk", "target"]
    bench.img(line, by=1)
    bench.look("target", target)
    bench.img(["compare", "-f", source, "-F", target, "disk", "target"], by=1)


@pytest.mark.parametrize("flags", [[], ["-S", "0"], ["-c"], ["-n"]], ids=" ".join)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_converted_over_a_backing_file(
    format: str, flags: list[str], both, folder: Path, rng: random.Random
) -> None:
    """-B leaves in the backing file what is there."""
    bench = Bench(both, folder)
    combo = default("qcow2", backing=f"{format}-shorter", cluster_size="16k")
    make_source(bench, combo, rng)
    backing = ["-B", "base", "-F", format]
    if "-n" in flags:
        bench.img(f"create -q -f qcow2 -b base -F {format} target {combo.size}", by=0)
        backing = ["-B", "base"]
    bench.img(["convert", *flags, "-O", "qcow2", *backing, "disk", "target"], by=1)
    bench.look("target", "qcow2")


@pytest.mark.parametrize("name", ["one", "snapshot.id=1", "snapshot.name=second", "2"])
def test_converted_from_a_snapshot(name: str, both, folder: Path, rng: random.Random) -> None:
    """-l reads a snapshot, of its own size."""
    bench = Bench(both, folder)
    combo = default("qcow2", cluster_size="4k")
    make_source(bench, combo, rng)
    bench.img("snapshot -c one disk", by=0)
    bench.img(f"resize -q disk {combo.size + 70000 // 512 * 512}", by=1)
    bench.write("disk", "qcow2", ["write -P 0x77 4096 100352"], by=1)
    bench.img("snapshot -c second disk", by=0)
    bench.write("disk", "qcow2", [f"write -P 0x78 {combo.size} 4096"], by=1)
    bench.img(["convert", "-l", name, "-O", "raw", "disk", "target"], by=1)
    bench.look("target", "raw")
    bench.img(["convert", "-l", name, "-c", "-O", "qcow2", "disk", "packed"], by=1)
    bench.look("packed", "qcow2")


def test_converted_from_several(both, folder: Path, rng: random.Random) -> None:
    """Sources of every format, one behind the other."""
    bench = Bench(both, folder)
    names = []
    for format in FORMATS:
        combo = default(format)
        size = combo.size if format != "vpc" else 4 << 20
        bench.img(f"create -q -f {format} part.{format} {size}", by=0)
        pattern = Pattern(combo.size, 65536, rng, stamps=bench.stamps)
        commands = pattern.fill(4, encodes=False, discards=False)
        bench.write(f"part.{format}", format, commands)
        names.append(f"part.{format}")
    bench.img(["convert", "-O", "qcow2", *names, "whole"], by=1)
    bench.look("whole", "qcow2")
    bench.img(["convert", "-O", "raw", *reversed(names), "whole.raw"], by=1)
    bench.look("whole.raw", "raw")


# ---------------------------------------------------------------------------------- compare


@pytest.mark.parametrize(("one", "other"), list(itertools.product(FORMATS, FORMATS)))
def test_compared(one: str, other: str, both, folder: Path, rng: random.Random) -> None:
    """Verdicts over the same disk, one changed sector, and sizes that differ."""
    bench = Bench(both, folder)
    size = 3 << 20
    options = {"vpc": ["-o", "force_size=on"]}
    pattern = Pattern(size, 65536, rng, stamps=bench.stamps)
    commands = pattern.fill(6, encodes=False, discards=False)
    for name, format, by in (("one", one, 0), ("two", other, 1)):
        words = ["create", "-q", "-f", format, *options.get(format, []), name]
        bench.img([*words, str(size)], by=by)
        bench.write(name, format, commands, by=by)
    line = ["compare", "-f", one, "-F", other, "one", "two"]
    strict = [line[0], "-s", *line[1:]]
    assert bench.img(line).out == "Images are identical.\n"
    bench.img(strict, code=None)
    sector = rng.randrange(size // 512)
    bench.write("two", other, [f"write -P 0x5b {sector * 512} 512"], by=1)
    assert f"{sector * 512}!" in bench.img(line, code=1).out
    bench.img(strict, code=1)
    grown = ["create", "-q", "-f", other, *options.get(other, []), "large", str(size + 65536)]
    bench.img(grown, by=1)
    bench.write("large", other, commands, by=1)
    line[-1] = strict[-1] = "large"
    bench.img(line, code=0)
    bench.img(strict, code=1)
    bench.write("large", other, [f"write -P 1 {size + 512} 512"], by=1)
    bench.img(line, code=1)


def test_compared_with_a_chain(both, folder: Path, rng: random.Random) -> None:
    """An overlay beside what it shows, flat."""
    bench = Bench(both, folder)
    combo = default("qcow2", backing="raw-longer")
    create_base(bench, combo, rng)
    bench.img(f"create -q -f qcow2 -b base -F raw disk {combo.size}", by=0)
    pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
    bench.write("disk", "qcow2", pattern.fill(6, encodes=True))
    bench.img("convert -O raw disk flat", by=1)
    bench.img("compare disk flat")
    bench.img("compare -s disk flat", code=None)
    bench.img("compare flat base", code=1)
    bench.img("compare disk base", code=1)
