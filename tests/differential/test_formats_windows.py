"""Disks inside of files: raw with `offset` and `size`, and names that carry options."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.differential.formats_pattern import Pattern
from tests.differential.formats_workbench import Bench
from tests.differential.option_matrix import KIB, MIB

pytestmark = pytest.mark.peer

#: (offset, size or None) of a window in a file of 3 MiB
WINDOWS = (
    (0, None),
    (512, None),
    (65536, 1 * MIB),
    (1 * MIB, 2 * MIB),
    (1536, 1023 * KIB + 512),
    (3 * MIB - 512, None),
    (0, 512),
)
FILE_SIZE = 3 * MIB


def options(offset: int, size: int | None, name: str = "file") -> str:
    """The window as `--image-opts` takes it."""
    words = f"driver=raw,offset={offset},file.driver=file,file.filename={name}"
    return words if size is None else f"{words},size={size}"


def filled(bench: Bench, rng: random.Random, name: str = "file") -> None:
    bench.img(f"create -q -f raw {name} {FILE_SIZE}", by=0)
    pattern = Pattern(FILE_SIZE, 4096, rng, stamps=bench.stamps)
    bench.write(name, "raw", pattern.fill(40, encodes=False, discards=False))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_window(window: tuple[int, int | None], both, folder: Path, rng: random.Random) -> None:
    """Looked at, converted from, compared, converted into."""
    offset, size = window
    bench = Bench(both, folder)
    filled(bench, rng)
    words = options(offset, size)
    for command in ("info", "info --output=json", "map", "map --output=json", "check"):
        bench.same(f"{command} --image-opts {words}")
    bench.img(f"convert --image-opts -O qcow2 {words} packed", by=1)
    view = bench.look("packed", "qcow2")
    assert view.content
    bench.img(f"convert --image-opts -O raw {words} flat", by=1)
    wanted = (bench.wanted.folder / "file").read_bytes()
    stop = FILE_SIZE if size is None else offset + size
    assert all(content == wanted[offset:stop] for content in bench.files("flat"))
    flat = "driver=raw,file.filename=flat"
    bench.img(f"compare --image-opts {words} {flat}", by=1)
    filled(bench, rng, "other")
    bench.write("flat", "raw", ["write -P 0x3c 0 512"], by=1)
    into = options(offset, size, "other")
    line = f"convert --image-opts -n --target-image-opts {flat} {into}"
    bench.img(line, by=1)
    changed = bench.files("other")
    assert all(content == changed[0] for content in changed)
    assert changed[0][offset : offset + 512] == b"\x3c" * 512
    before = (bench.wanted.folder / "file").read_bytes()
    assert len(changed[0]) == len(before)


@pytest.mark.parametrize(
    "words",
    [
        options(FILE_SIZE, None),
        options(FILE_SIZE + 512, None),
        options(0, FILE_SIZE + 512),
        options(1 * MIB, FILE_SIZE),
        options(0, 0),
        options(511, None),
        options(0, 1000),
        options(1000, 1000),
    ],
)
def test_window_at_the_edge(words: str, both, folder: Path) -> None:
    """Windows that reach out of the file, or amid a sector, are taken or refused alike.

    Where the file ends amid a sector of the window, QEMU's `map` ends by an assertion.
    """
    bench = Bench(both, folder, crossed=False)
    bench.img(f"create -q -f raw file {FILE_SIZE}", by=0)
    bench.same(f"info --output=json --image-opts {words}")
    if "offset=511" not in words:
        bench.same(f"map --output=json --image-opts {words}")


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vpc"])
def test_format_in_a_window(format: str, both, folder: Path, rng: random.Random) -> None:
    """An image that begins amid a file, written to through the window and read back."""
    bench = Bench(both, folder)
    bench.img(f"create -q -f {format} disk 3M", by=0)
    pattern = Pattern(3 * MIB, 65536, rng, stamps=bench.stamps)
    bench.write("disk", format, pattern.fill(6, encodes=False, discards=False))
    for lineage in bench.lineages:
        content = (lineage.folder / "disk").read_bytes()
        (lineage.folder / "shifted").write_bytes(b"\xff" * 4096 + content)
    words = f"driver={format},file.driver=raw,file.offset=4096,file.file.filename=shifted"
    for command in ("info --output=json", "map --output=json", "check"):
        bench.same(f"{command} --image-opts {words}")
    bench.img(f"convert --image-opts -O raw {words} flat", by=1)
    bench.look("flat", "raw")
    if format == "qcow2":
        bench.img(f"snapshot --image-opts -c s {words}", by=1)
        bench.same(f"check --image-opts {words}")
        bench.same(f"snapshot --image-opts -l {words}")
