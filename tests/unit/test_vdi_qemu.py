"""VDI images beside QEMU: the same bytes, content, maps, check lines, words about damaged ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.unit.vm_images import (
    content,
    create,
    opened,
    our_map,
    qemu,
    qemu_content,
    qemu_create,
    qemu_map,
    qemu_opens,
    qemu_scribble,
    scribble,
    we_open_here,
)

pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("real")]

MIB, GIB = 1 << 20, 1 << 30
UUIDS = slice(0x188, 0x1A8)
VARIANTS: list[dict[str, object]] = [{}, {"static": "on"}, {"static": "off"}]


def ids(options: object) -> str:
    return (
        "-".join(map(str, options.values())) if isinstance(options, dict) and options else "plain"
    )


def without_identity(raw: bytes) -> bytes:
    return raw[: UUIDS.start] + bytes(32) + raw[UUIDS.stop :]


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_what_is_created_is_what_qemu_creates(
    tmp_path: Path, rng: random.Random, options: dict[str, object]
) -> None:
    theirs, ours = tmp_path / "theirs.vdi", tmp_path / "ours.vdi"
    sizes = [0, 1, 511, 512, 513, MIB, MIB + 1, 128 * MIB, 129 * MIB, 100 * GIB]
    for size in sizes + [rng.randrange(GIB) for _ in range(10)]:
        if options.get("static") == "on":
            size %= 8 * MIB
        assert qemu_create("vdi", theirs, size, **options) == ""
        create("vdi", ours, -(-size // 512) * 512, **options)
        assert without_identity(ours.read_bytes()) == without_identity(theirs.read_bytes()), size
        assert we_open_here("vdi", theirs) == qemu_opens("vdi", theirs)


@pytest.mark.parametrize("size", [0x1FFFFF8000000 + 512, 600 << 40, 1 << 52])
def test_sizes_that_qemu_refuses_are_refused_in_its_words(tmp_path: Path, size: int) -> None:
    said = qemu_create("vdi", tmp_path / "disk.vdi", size)
    with pytest.raises(Exception) as caught:
        create("vdi", tmp_path / "ours.vdi", size)
    assert said == f"qemu-img: disk.vdi: {caught.value.qemu_message}\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", VARIANTS[:2], ids=ids)
def test_both_write_one_image_in_turns(
    tmp_path: Path, rng: random.Random, options: dict[str, object]
) -> None:
    path = tmp_path / "disk.vdi"
    create("vdi", path, rng.randrange(3 * MIB, 20 * MIB) // 512 * 512, **options)
    model = bytearray(len(content("vdi", path)))
    for turn in range(4):
        if turn % 2:
            qemu_scribble("vdi", path, model, rng, 6)
        else:
            with opened("vdi", path, writable=True) as node:
                scribble(node, model, rng, 6)
        assert content("vdi", path) == model
        assert qemu_content("vdi", path) == model
        assert our_map("vdi", path) == qemu_map("vdi", path)
        assert checked_by_us(path) == checked_by_qemu(path)


def test_the_same_writes_leave_the_same_file(tmp_path: Path, rng: random.Random) -> None:
    theirs, ours = tmp_path / "theirs.vdi", tmp_path / "ours.vdi"
    assert qemu_create("vdi", theirs, 30 * MIB) == ""
    ours.write_bytes(theirs.read_bytes())
    offsets = [rng.randrange(30 * MIB - 5000) for _ in range(10)]
    words = [word for offset in offsets for word in ("-c", f"write -P 7 {offset} 5000")]
    assert qemu("qemu-io", "-f", "vdi", *words, theirs.name, cwd=tmp_path).returncode == 0
    with opened("vdi", ours, writable=True) as node:
        for offset in offsets:
            node.write(offset, b"\x07" * 5000)
    assert without_identity(ours.read_bytes()) == without_identity(theirs.read_bytes())


def checked_by_qemu(path: Path) -> tuple[list[str], list[int]]:
    """The lines and counts of `qemu-img check`."""
    words = ("check", "-f", "vdi")
    shown = qemu("qemu-img", *words, path.name, cwd=path.parent)
    found = json.loads(qemu("qemu-img", *words, "--output=json", path.name, cwd=path.parent).stdout)
    lines = [line for line in shown.stderr.splitlines() if line.startswith("ERROR")]
    counts = ("corruptions", "leaks", "check-errors", "image-end-offset", "total-clusters")
    return lines, [found.get(name, 0) for name in counts]


def checked_by_us(path: Path) -> tuple[list[str], list[int]]:
    lines: list[str] = []
    with opened("vdi", path) as node:
        found = node.check(report=lines.append)
    counts = [found.corruptions, found.leaks, found.check_errors, found.image_end_offset]
    return lines, [*counts, found.total_clusters]


@pytest.mark.parametrize(
    "words",
    [
        {0: 0, 1: 0},
        {0: 0, 1: 0, 2: 0},
        {0: 6},
        {0: 5, 1: 100},
        {0: 0x7FFFFFFF, 3: 0xFFFFFFFD},
        {1: 0xFFFFFFFE},
        {0: 0xFFFFFFFF},
        {4: 3},
    ],
)
@pytest.mark.parametrize("count", [None, 0, 2, 7, 0xFFFFFFFF])
def test_check_says_what_qemu_says(
    tmp_path: Path, words: dict[int, int], count: int | None
) -> None:
    path = tmp_path / "disk.vdi"
    assert qemu_create("vdi", path, 6 * MIB) == ""
    model = bytearray(6 * MIB)
    qemu_scribble("vdi", path, model, random.Random(3), 5)
    raw = bytearray(path.read_bytes())
    for index, word in words.items():
        raw[512 + 4 * index : 516 + 4 * index] = word.to_bytes(4, "little")
    if count is not None:
        raw[0x184:0x188] = count.to_bytes(4, "little")
    path.write_bytes(raw)
    assert checked_by_us(path) == checked_by_qemu(path)


@pytest.mark.parametrize(
    ("offset", "value", "size"),
    [
        *((0x40, 0, 4), (0x44, 0x10000, 4), (0x44, 0x20003, 4)),
        *((0x4C, kind, 4) for kind in (0, 1, 2, 3, 4, 99)),
        *((0x154, value, 4) for value in (0, 1, 511, 1024, 0xFFFFFE00)),
        *((0x158, value, 4) for value in (0, 100, 512, 0xFFFFFE00)),
        *((0x168, value, 4) for value in (0, 511, 1024, 4096)),
        *((0x170, value, 8) for value in (0, 1, 5 * MIB, 6 * MIB + 1, 1 << 50, (1 << 64) - 1)),
        *((0x178, value, 4) for value in (0, 1, 3 * MIB, 0xFFFFFFFF)),
        *((0x180, value, 4) for value in (0, 5, 7, 0x1FFFFF81, 0xFFFFFFFF)),
        *((0x1A8, 1, 1), (0x1B8, 1, 1), (0x1C8, 1, 1)),
    ],
)
def test_damaged_headers_in_qemus_words(tmp_path: Path, offset: int, value: int, size: int) -> None:
    path = tmp_path / "disk.vdi"
    assert qemu_create("vdi", path, 6 * MIB) == ""
    raw = bytearray(path.read_bytes())
    raw[offset : offset + size] = value.to_bytes(size, "little")
    path.write_bytes(raw)
    assert we_open_here("vdi", path) == qemu_opens("vdi", path)


@pytest.mark.parametrize("length", [0, 1, 0x44, 200, 0x180, 511, 512, 514, 1023])
def test_cut_images_in_qemus_words(tmp_path: Path, length: int) -> None:
    path = tmp_path / "disk.vdi"
    assert qemu_create("vdi", path, 6 * MIB) == ""
    path.write_bytes(path.read_bytes()[:length])
    assert we_open_here("vdi", path) == qemu_opens("vdi", path)
