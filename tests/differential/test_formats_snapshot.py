"""Snapshots that one side takes, applies and deletes in images of the other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.differential import option_matrix
from tests.differential.formats_pattern import Pattern
from tests.differential.formats_workbench import Bench, content_and_info, create, layout_free
from tests.differential.option_matrix import Combo

pytestmark = pytest.mark.peer

FAST = option_matrix.singles("qcow2")[::4]
ROWS = [
    pytest.param(combo, id=combo.name, marks=[] if combo in FAST else pytest.mark.slow)
    for combo in sorted({*option_matrix.pairs("qcow2"), *FAST})
]

SECOND = "tŵo, a second"


@pytest.mark.parametrize("combo", ROWS)
def test_snapshots(combo: Combo, both, folder: Path, rng: random.Random) -> None:
    """Two snapshots, writes between, going back and forth, deleting; sides take turns.

    With `refcount_bits=2` nothing is compressed: three pieces in one cluster already have the
    highest count. Nor is there a second snapshot beside the first: going back to one counts a
    cluster once more before it counts the other state's once less. Before 1.1 QEMU takes
    clusters for zeroes over a backing file that ours leaves.

    Where a refcount cannot be 2 (`refcount_bits=1`) both refuse. What QEMU began then leaks; ours
    leaves the image as it was. Both refuse with an external data file, too.
    """
    bench = Bench(both, folder)
    create(bench, combo, rng)
    pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
    narrow = combo.row["refcount_bits"] == "2"
    encodes = combo.encodes and not narrow
    no_zeroes = combo.backing is not None and combo.row["compat"] == "0.10"
    alike = content_and_info if no_zeroes else layout_free
    bench.write("disk", "qcow2", pattern.fill(6, encodes=encodes))
    none = combo.row["refcount_bits"] == "1" or combo.data_file is not None
    if bench.img("snapshot -c one disk", by=1, code=None).code:
        assert none
        bench.look("disk", "qcow2", alike=content_and_info)
        bench.sound("disk")
        return
    assert not none
    bench.look("disk", "qcow2", alike=alike)
    bench.write("disk", "qcow2", pattern.fill(4, encodes=False), by=1)
    if narrow:
        bench.img("snapshot -a one disk", by=0)
        bench.img("snapshot -d one disk", by=1)
    bench.img(["snapshot", "-c", SECOND, "disk"], by=0)
    bench.write("disk", "qcow2", pattern.fill(3, encodes=False), by=0)
    bench.look("disk", "qcow2", alike=alike)
    if not narrow:
        bench.img("snapshot -a one disk", by=1)
        bench.look("disk", "qcow2", alike=alike)
        bench.write("disk", "qcow2", pattern.fill(3, encodes=False), by=0)
        bench.img("snapshot -d one disk", by=1)
        bench.look("disk", "qcow2", alike=alike)
    bench.img(["snapshot", "-a", SECOND, "disk"], by=0)
    bench.img(["snapshot", "-d", SECOND, "disk"], by=1)
    view = bench.look("disk", "qcow2", alike=alike)
    assert view.snapshots == ""


def test_many_snapshots(both, folder: Path, rng: random.Random) -> None:
    """A table of more than one cluster, with names of every length, from both sides."""
    combo = option_matrix.default("qcow2", cluster_size="512")
    bench = Bench(both, folder)
    create(bench, combo, rng)
    pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
    for number in range(10):
        bench.write("disk", "qcow2", pattern.fill(2, encodes=False), by=number // 2 % 2)
        name = "n" * (number * 7) + str(number)
        bench.img(["snapshot", "-c", name, "disk"], by=number % 2)
    bench.look("disk", "qcow2")
    for number in (3, 9, 1):
        name = "n" * (number * 7) + str(number)
        bench.img(["snapshot", "-d", name, "disk"], by=number % 2)
    bench.img(["snapshot", "-c", "again", "disk"], by=1)
    bench.img(["snapshot", "-a", "5", "disk"], by=0)
    bench.img(["snapshot", "-a", "again", "disk"], by=1)
    bench.look("disk", "qcow2")


def test_vm_state_is_kept(both, folder: Path, rng: random.Random) -> None:
    """Bytes beyond the disk, where QEMU saves a machine, come and go with their snapshot."""
    bench = Bench(both, folder)
    combo = option_matrix.default("qcow2")
    create(bench, combo, rng)
    bench.write("disk", "qcow2", ["write -P 3 0 70000"])
    for lineage in bench.lineages:
        state = "write -b -P 0x5a 0 99840"
        done = both[0].io.run("-f", "qcow2", "-c", state, "disk", cwd=lineage.folder)
        assert done.code == 0, done
    bench.img("snapshot -c state disk", by=1)
    bench.write("disk", "qcow2", ["write -P 4 0 70000"], by=1)
    bench.look("disk", "qcow2")
    bench.img("snapshot -a state disk", by=1)
    bench.look("disk", "qcow2")
    for lineage in bench.lineages:
        state = "read -b -P 0x5a 0 99840"
        done = both[0].io.run("-f", "qcow2", "-c", state, "disk", cwd=lineage.folder)
        assert done.code == 0, done
        assert "Pattern verification failed" not in done.out, lineage.history()
    bench.img("snapshot -d state disk", by=1)
    bench.look("disk", "qcow2")
