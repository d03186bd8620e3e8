"""convert between every two formats, with the flags that say how, and compare's verdicts.

Where both leave holes, they need not be the same ones: QEMU looks at pieces of its buffer, and
widens data to `-S`; ours looks at the whole run. So targets are alike in content, `info` and
what is compressed, and ours takes no more room than QEMU's.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.differential import option_matrix
from tests.differential.formats_pattern import Pattern
from tests.differential.formats_workbench import (
    Bench,
    View,
    content_and_info,
    create,
    create_base,
    look_at,
    map_lines,
)
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
            if "-c" in flags and not chosen.encodes:
                chosen = default("qcow2", compression_type="zstd")
            found.append(Case(sources[turn % len(sources)], chosen, tuple(flags)))
            turn += 1
    return found


CASES = cases()
ROWS = [
    pytest.param(case, id=case.name, marks=[] if number % 9 == 0 else pytest.mark.slow)
    for number, case in enumerate(CASES)
]


def spends(view: View) -> int:
    """Bytes of a disk that take room."""
    return sum(entry["length"] for entry in json.loads(view.map) if entry["data"])


def look_at_target(
    bench: Bench, name: str, format: str, *, layered: bool = False, spends_less: bool = True
) -> None:
    """The targets of all lineages: see the module's text.

    Args:
        bench, name, format: which.
        layered: there is a backing file, and what it hides may be told in two ways.
        spends_less: ours takes no more room than QEMU's.
    """

    def alike(view: View) -> str:
        check = json.loads(view.check) if format == "qcow2" else {}
        compressed = layered or check.get("compressed-clusters", 0)
        return f"{content_and_info(view)}\n{compressed}"

    wanted = bench.look(name, format, alike=alike)
    if spends_less and not layered:
        for lineage in bench.lineages:
            view = look_at(bench.both, lineage.folder, name, format)[0]
            assert spends(view) <= spends(wanted), f"{wanted}\n{view}\n{lineage.history()}"


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
    options = case.target.words_for("target")
    words = ["-o", options] if options else []
    if "-n" in case.flags:
        size = case.source.size + (case.source.unit if case.source.format == "vpc" else 0)
        bench.img(["create", "-q", "-f", target, *words, "target", str(size)], by=0)
        words = []
        if "--target-is-zero" not in case.flags:
            bench.write("target", target, [f"write -P 0xee 0 {case.source.size // 1024 * 512}"])
    line = ["convert", *case.flags, "-f", source, "-O", target, *words, "disk", "target"]
    bench.img(line, by=1)
    # QEMU looks for zeroes in each subcluster's run, and leaves out shorter ones than -S says,
    # or than a cluster of a target whose data file has room for all.
    kept = case.target.data_file is not None and not case.target.encodes
    finer = case.source.row.get("extended_l2") == "on" and ("-S" in case.flags or kept)
    look_at_target(bench, "target", target, spends_less=not finer)
    if target == "qcow2":
        bench.sound("target")
    bench.img(["compare", "-f", source, "-F", target, "disk", "target"], by=1)


@pytest.mark.parametrize("flags", [[], ["-S", "0"], ["-c"], ["-n"]], ids=" ".join)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_converted_over_a_backing_file(
    format: str, flags: list[str], both, folder: Path, rng: random.Random
) -> None:
    """-B leaves in the backing file what is there.

    Zeroes behind the end of the backing file are zero clusters or nothing; either is right.
    """
    bench = Bench(both, folder)
    combo = default("qcow2", backing=f"{format}-shorter", cluster_size="16k")
    make_source(bench, combo, rng)
    backing = ["-B", "base", "-F", format]
    if "-n" in flags:
        bench.img(f"create -q -f qcow2 -b base -F {format} target {combo.size}", by=0)
        backing = ["-B", "base"]
    bench.img(["convert", *flags, "-O", "qcow2", *backing, "disk", "target"], by=1)
    look_at_target(bench, "target", "qcow2", layered=True)
    bench.sound("target")
    if "-c" in flags:
        for lineage in bench.lineages:
            view = look_at(both, lineage.folder, "target", "qcow2")[0]
            check = json.loads(view.check)
            packed = check.get("compressed-clusters", 0)
            assert packed == check["allocated-clusters"], f"{view}\n{lineage.history()}"


@pytest.mark.parametrize("name", ["one", "snapshot.id=1", "snapshot.name=second", "2"])
def test_converted_from_a_snapshot(name: str, both, folder: Path, rng: random.Random) -> None:
    """-l reads a snapshot."""
    bench = Bench(both, folder)
    combo = default("qcow2", cluster_size="4k")
    make_source(bench, combo, rng)
    bench.img("snapshot -c one disk", by=0)
    bench.write("disk", "qcow2", ["write -P 0x77 4096 100352"], by=1)
    bench.img("snapshot -c second disk", by=0)
    bench.write("disk", "qcow2", ["write -P 0x78 65536 200704"], by=1)
    bench.img(["convert", "-l", name, "-O", "raw", "disk", "target"], by=1)
    look_at_target(bench, "target", "raw")
    bench.img(["convert", "-l", name, "-c", "-O", "qcow2", "disk", "packed"], by=1)
    look_at_target(bench, "packed", "qcow2")


def test_a_snapshot_of_another_size(both, folder: Path) -> None:
    """-l gives a snapshot the size that it had; QEMU gives it the disk's size of today.

    So QEMU loses what lay behind the end of a disk that has shrunk. Ours must not.
    """
    bench = Bench(both, folder)
    bench.img("create -q -f qcow2 disk 1M", by=0)
    bench.write("disk", "qcow2", ["write -P 0x77 0 1048576"])
    bench.img("snapshot -c whole disk", by=0)
    bench.img("resize -q disk 2M", by=1)
    for lineage in bench.lineages:
        by_qemu = lineage.sides[1] is both[0]
        done = lineage.run(["convert", "-l", "whole", "-O", "raw", "disk", "target"], by=1)
        assert done.code == 0, done
        found = (lineage.folder / "target").read_bytes()
        assert found[: 1 << 20] == b"\x77" * (1 << 20)
        assert len(found) == (2 << 20 if by_qemu else 1 << 20)
        assert not any(found[1 << 20 :])


@pytest.mark.parametrize("format", FORMATS)
def test_fully_allocated(format: str, both, folder: Path, rng: random.Random) -> None:
    """-S 0 leaves no hole, whatever the source is."""
    bench = Bench(both, folder)
    make_source(bench, default("qcow2"), rng)
    bench.img(["convert", "-S", "0", "-O", format, "disk", "target"], by=1)
    bench.look("target", format, alike=lambda view: "\n".join([view.content, *map_lines(view.map)]))


def test_converted_from_several(both, folder: Path, rng: random.Random) -> None:
    """Sources of every format, one behind the other."""
    bench = Bench(both, folder)
    names = []
    for format in FORMATS:
        combo = default(format)
        bench.img(f"create -q -f {format} part.{format} {combo.size}", by=0)
        pattern = Pattern(combo.size, 65536, rng, stamps=bench.stamps)
        commands = pattern.fill(4, encodes=False, discards=False)
        bench.write(f"part.{format}", format, commands)
        names.append(f"part.{format}")
    bench.img(["convert", "-O", "qcow2", *names, "whole"], by=1)
    look_at_target(bench, "whole", "qcow2")
    bench.img(["convert", "-O", "raw", *reversed(names), "whole.raw"], by=1)
    look_at_target(bench, "whole.raw", "raw")


# ---------------------------------------------------------------------------------- compare


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(one, other, marks=[] if one <= other else pytest.mark.slow)
        for one, other in itertools.product(FORMATS, FORMATS)
    ],
)
def test_compared(one: str, other: str, both, folder: Path, rng: random.Random) -> None:
    """Verdicts over the same disk, one changed sector, and sizes that differ.

    With -s QEMU sees a difference where one run, as its driver tells it, reaches the end of the
    disk and the other does not. vdi and vpc tell each block by itself there, ours do not.
    """
    bench = Bench(both, folder)
    strict = not {one, other} & {"vdi", "vpc"}
    size = 3 << 20
    options = {"vpc": ["-o", "force_size=on"]}
    pattern = Pattern(size, 65536, rng, stamps=bench.stamps)
    commands = pattern.fill(6, encodes=False, discards=False)
    for name, format, by in (("one", one, 0), ("two", other, 1)):
        words = ["create", "-q", "-f", format, *options.get(format, []), name]
        bench.img([*words, str(size)], by=by)
        bench.write(name, format, commands, by=by)
    line = ["compare", "-f", one, "-F", other, "one", "two"]
    assert bench.img(line).out == "Images are identical.\n"
    if strict:
        bench.same(" ".join(["compare -s", *line[1:]]))
    sector = rng.randrange(size // 512)
    bench.write("two", other, [f"write -P 0x5b {sector * 512} 512"], by=1)
    assert f"{sector * 512}!" in bench.img(line, code=1).out
    if strict:
        bench.same(" ".join(["compare -s", *line[1:]]))
    grown = ["create", "-q", "-f", other, *options.get(other, []), "large", str(size + 65536)]
    bench.img(grown, by=1)
    bench.write("large", other, commands, by=1)
    line[-1] = "large"
    bench.img(line, code=0)
    bench.same(" ".join(["compare -s", *line[1:]]))
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
    bench.same("compare -s disk flat")
    bench.img("compare flat base", code=1)
    bench.img("compare disk base", code=1)
