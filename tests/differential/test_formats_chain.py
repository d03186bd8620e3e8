"""rebase and commit: overlays of every option over files of both sides."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.differential import option_matrix
from tests.differential.formats_pattern import Pattern
from tests.differential.formats_workbench import (
    Bench,
    View,
    content_and_info,
    create,
)
from tests.differential.option_matrix import Combo, default

pytestmark = pytest.mark.peer

OVERLAYS = sorted(combo for combo in option_matrix.pairs("qcow2") if combo.backing is not None)
FAST = OVERLAYS[::20]
ROWS = [
    pytest.param(combo, id=combo.name, marks=[] if combo in FAST else pytest.mark.slow)
    for combo in OVERLAYS
]
#: which formats take a commit, or stand under an overlay
BASES = ("raw", "qcow2", "vdi", "vpc")


def content_and_compressed(view: View) -> str:
    """Content, `info`, and how much of what has content is compressed."""
    check = json.loads(view.check)
    return f"{content_and_info(view)}\n{check.get('compressed-clusters', 0)}"


def fill(bench: Bench, combo: Combo, rng: random.Random, *, by: int = 0, count: int = 6) -> None:
    pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
    discards = combo.format in ("raw", "qcow2")
    encodes = combo.encodes and by == 0  # QEMU compresses only what is not there yet
    commands = pattern.fill(count, encodes=encodes, discards=discards)
    bench.write("disk", combo.format, commands, by=by)


def second_base(bench: Bench, combo: Combo, rng: random.Random) -> str:
    """Another backing file, `other`, of another format and size; returns its format."""
    format = "raw" if combo.backing.format == "qcow2" else "qcow2"
    size = rng.choice([combo.size, combo.backing_size, combo.size + combo.unit])
    bench.img(f"create -q -f {format} other {size}", by=0)
    pattern = Pattern(size, 65536, rng, stamps=bench.stamps)
    bench.write("other", format, pattern.fill(5, encodes=False, discards=False))
    return format


@pytest.mark.parametrize("combo", ROWS)
def test_rebased(combo: Combo, both, folder: Path, rng: random.Random) -> None:
    """Onto another file, in name only and back, then onto none: what is read stays the same."""
    bench = Bench(both, folder)
    create(bench, combo, rng)
    fill(bench, combo, rng)
    before = bench.look("disk", "qcow2", alike=content_and_info).content
    format = second_base(bench, combo, rng)
    bench.img(f"rebase -b other -F {format} disk", by=1)
    assert bench.look("disk", "qcow2", alike=content_and_info).content == before
    bench.img(f"rebase -u -b base -F {combo.backing.format} disk", by=0)
    bench.look("disk", "qcow2", alike=content_and_info)
    bench.img(f"rebase -u -b other -F {format} disk", by=1)
    assert bench.look("disk", "qcow2", alike=content_and_info).content == before
    fill(bench, combo, rng, by=1, count=2)
    after = bench.look("disk", "qcow2", alike=content_and_info).content
    # QEMU's `rebase -c` ends at an assertion where clusters are in use in part.
    compress = ["-c"] if rng.random() < 0.5 and combo.row["extended_l2"] == "off" else []
    bench.img(["rebase", *compress, "-b", "", "disk"], by=1)
    assert bench.look("disk", "qcow2", alike=content_and_compressed).content == after
    bench.sound("disk")


@pytest.mark.parametrize("combo", ROWS)
def test_committed(combo: Combo, both, folder: Path, rng: random.Random) -> None:
    """The base takes over what its overlay has, and grows with it; the overlay is emptied."""
    bench = Bench(both, folder)
    create(bench, combo, rng)
    fill(bench, combo, rng)
    keep = ["-d"] if rng.random() < 0.4 else []
    before = bench.look("disk", "qcow2", alike=content_and_info).content
    bench.img(["commit", *keep, "disk"], by=1)
    after = bench.look("disk", "qcow2", alike=content_and_info)
    assert after.content == before
    bench.look("base", combo.backing.format, alike=content_and_info)
    fill(bench, combo, rng, by=1, count=3)
    bench.img("commit -q disk", by=1)
    bench.look("disk", "qcow2", alike=content_and_info)
    bench.look("base", combo.backing.format, alike=content_and_info)
    bench.sound("disk")


@pytest.mark.parametrize("format", BASES)
def test_committed_through_a_chain(format: str, both, folder: Path, rng: random.Random) -> None:
    """Into a file in the middle, then into the lowest one, which may be of any format."""
    bench = Bench(both, folder)
    below = default(format, **({"force_size": "on"} if format == "vpc" else {}))
    words = ["-o", below.words] if below.words else []
    bench.img(["create", "-q", "-f", format, *words, "low", str(below.size)], by=0)
    pattern = Pattern(below.size, below.unit, rng, stamps=bench.stamps)
    bench.write("low", format, pattern.fill(5, encodes=False, discards=False))
    bench.img(f"create -q -f qcow2 -b low -F {format} middle", by=0)
    bench.img("create -q -f qcow2 -o cluster_size=4k -b middle -F qcow2 disk", by=1)
    overlay = Pattern(below.size, 4096, rng, stamps=bench.stamps)
    bench.write("middle", "qcow2", overlay.fill(4, encodes=False))
    bench.write("disk", "qcow2", overlay.fill(6, encodes=False), by=1)
    before = bench.look("disk", "qcow2", alike=content_and_info).content
    bench.img("commit -b middle disk", by=1)
    view = bench.look("middle", "qcow2", alike=content_and_info)
    assert view.content == before
    bench.write("disk", "qcow2", overlay.fill(3, encodes=False), by=0)
    before = bench.look("disk", "qcow2", alike=content_and_info).content
    bench.img("commit -b low disk", by=1)
    view = bench.look("low", format, alike=content_and_info)
    assert view.content == before


def test_rebased_where_layers_agree(both, folder: Path, rng: random.Random) -> None:
    """A safe rebase copies only what differs between the two files: the maps are the same."""
    bench = Bench(both, folder)
    combo = default("qcow2", backing="raw-shorter")
    create(bench, combo, rng)
    for lineage in bench.lineages:
        base = bytearray((lineage.folder / "base").read_bytes())
        base[5 * combo.unit : 5 * combo.unit + 3] = b"new"
        (lineage.folder / "changed").write_bytes(base)
    bench.img("rebase -b changed -F raw disk", by=1)
    bench.look("disk", "qcow2")
    bench.img(["rebase", "-b", "", "disk"], by=1)
    bench.look("disk", "qcow2")
