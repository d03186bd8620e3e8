"""Disks that grow and shrink, by either side in images of the other."""

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
    look_at,
)
from tests.differential.option_matrix import MIB, SECTOR, Combo

pytestmark = pytest.mark.peer


def _refused(combo: Combo) -> bool:
    """Whether QEMU does not grow it: no "zero" before 1.1, and the backing file has something.

    A disk that was shrunk may have become the shorter one. See test_grown_where_qemu_refuses.
    """
    return combo.row.get("compat") == "0.10" and combo.backing is not None


FAST = [
    *option_matrix.singles("qcow2")[1::4],
    *(combo for format in ("raw", "vdi", "vpc") for combo in option_matrix.singles(format)),
]
ROWS = [
    pytest.param(combo, id=combo.name, marks=[] if combo in FAST else pytest.mark.slow)
    for combo in sorted({*option_matrix.pairs("qcow2"), *FAST})
    if not _refused(combo)
]
MODES = ("off", "metadata", "falloc", "full")


@pytest.mark.parametrize("combo", ROWS)
def test_resized(combo: Combo, both, folder: Path, rng: random.Random) -> None:
    """Grown with every kind of preallocation, shrunk, written to again; sides take turns.

    Only the first step preallocates: see test_preallocated_over_freed_space.

    The part of a cluster between the old end and the new one takes QEMU a cluster; ours looks
    whether the backing file has anything but zeroes there, and leaves a zero cluster as it is.
    """
    bench = Bench(both, folder)
    create(bench, combo, rng)
    simple = combo.format in ("vdi", "vpc")
    pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
    bench.write("disk", combo.format, pattern.fill(5, encodes=combo.encodes, discards=not simple))
    loose = simple or combo.backing is not None or combo.row["extent"] == "tiny"
    alike = content_and_info if loose else layout_free
    size = combo.size
    steps = [rng.choice(MODES), "off", "shrink", "off", "shrink"]
    for number, step in enumerate(steps):
        words = ["resize", "-q", "-f", combo.format]
        if step == "shrink":
            size = rng.randrange(SECTOR, size, SECTOR)
            if combo.format == "qcow2":  # see test_shrunk_amid_a_cluster
                size = max(size // combo.unit, 1) * combo.unit
            words += ["--shrink"]
        else:
            size += rng.randrange(1, 3 * min(combo.unit, MIB) // SECTOR) * SECTOR
            words += [f"--preallocation={step}"]
        done = bench.img([*words, "disk", str(size)], by=(number + 1) % 2, code=None)
        bench.look("disk", combo.format, alike=alike)
        if done.code:
            return  # refused by both, for the same reason
        if combo.format != "raw" or size >= combo.size:
            pattern = Pattern(size, combo.unit, rng, stamps=bench.stamps)
            more = pattern.fill(2, encodes=False, discards=not simple)
            bench.write("disk", combo.format, more, by=number % 2)
    bench.look("disk", combo.format, alike=alike)


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_shrunk_amid_a_cluster(compat: str, both, folder: Path) -> None:
    """Grown again, a disk has zeroes where it was cut off; QEMU shows what had been there."""
    bench = Bench(both, folder)
    bench.img(f"create -q -f qcow2 -o compat={compat} disk 262144", by=0)
    bench.write("disk", "qcow2", ["write -P 7 0 262144"])
    bench.img("resize -q --shrink disk 33280", by=1)
    bench.look("disk", "qcow2")
    for lineage in bench.lineages:
        done = lineage.run(["resize", "-q", "disk", "131072"], by=1)
        assert done.code == 0, done
        real, ours = look_at(both, lineage.folder, "disk", "qcow2")
        assert real == ours
        found = bench.content("disk", "qcow2", lineage)
        by_qemu = lineage.sides[1] is both[0]
        assert found[:33280] == b"\7" * 33280
        assert found[33280:65536] == (b"\7" if by_qemu else b"\0") * (65536 - 33280)
        assert not any(found[65536:])
    bench.sound("disk")


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocated_over_freed_space(mode: str, both, folder: Path) -> None:
    """What a disk grows by reads as zero, wherever in the file it comes to lie.

    QEMU gives it clusters that were tables before, and what they said is read then.
    """
    bench = Bench(both, folder)
    bench.img("create -q -f qcow2 -o cluster_size=512 disk 524288", by=0)
    bench.write("disk", "qcow2", ["write -P 7 0 524288"])
    bench.img("resize -q --shrink disk 131072", by=1)
    for lineage in bench.lineages:
        words = ["resize", "-q", f"--preallocation={mode}", "disk", "393216"]
        done = lineage.run(words, by=1)
        assert done.code == 0, done
        real, ours = look_at(both, lineage.folder, "disk", "qcow2")
        assert real == ours
        found = bench.content("disk", "qcow2", lineage)
        assert found[:131072] == b"\7" * 131072
        if lineage.sides[1] is not both[0]:
            assert not any(found[131072:]), lineage.history()
    bench.sound("disk")


def test_grown_over_a_longer_backing_file(both, folder: Path, rng: random.Random) -> None:
    """What the backing file has behind the old end does not come to light."""
    bench = Bench(both, folder)
    combo = option_matrix.default("qcow2", backing="qcow2-longer")
    create(bench, combo, rng)
    bench.img(f"resize -q disk {combo.backing_size}", by=1)
    bench.look("disk", "qcow2", alike=content_and_info)
    found = bench.content("disk", "qcow2")
    assert found[combo.size :].count(0) == len(found) - combo.size


def test_grown_where_qemu_refuses(both, folder: Path, rng: random.Random) -> None:
    """Before 1.1 there is no way to say "zero": ours writes zeroes, QEMU gives up."""
    bench = Bench(both, folder)
    combo = option_matrix.default("qcow2", backing="raw-longer", compat="0.10")
    create(bench, combo, rng)
    words = ["resize", "-q", "disk", str(combo.backing_size)]
    for lineage in bench.lineages:
        by_qemu = lineage.sides[1] is both[0]
        assert lineage.run(words, by=1).code == by_qemu, lineage.history()
        if not by_qemu:
            real, ours = look_at(both, lineage.folder, "disk", "qcow2")
            assert real == ours
            found = bench.content("disk", "qcow2", lineage)
            assert len(found) == combo.backing_size
            assert found[combo.size :].count(0) == len(found) - combo.size
    bench.sound("disk")


def test_snapshots_of_other_sizes(both, folder: Path, rng: random.Random) -> None:
    """Each snapshot remembers its disk's size; going to one brings it back."""
    combo = option_matrix.default("qcow2", cluster_size="4k")
    bench = Bench(both, folder)
    create(bench, combo, rng)
    pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
    bench.write("disk", "qcow2", pattern.fill(5, encodes=True))
    bench.img("snapshot -c small disk", by=1)
    bench.img(f"resize -q disk {3 * combo.size}", by=0)
    bench.write("disk", "qcow2", [f"write -P 9 {2 * combo.size} 65536"], by=1)
    bench.img("snapshot -c large disk", by=1)
    bench.look("disk", "qcow2")
    bench.img("resize -q --shrink disk 1M", by=1, code=None)
    bench.look("disk", "qcow2")
    bench.img("snapshot -a small disk", by=1)
    bench.look("disk", "qcow2")
    bench.img("snapshot -a large disk", by=0)
    bench.look("disk", "qcow2")
