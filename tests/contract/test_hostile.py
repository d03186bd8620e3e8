"""Truncated and flipped images of each row: errors of ours, bounded time, an unchanged file."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from diskwright.errors import DiskwrightError
from tests.contract.disk import Disk, noise
from tests.contract.rows import Row, rows

#: One opening, reading and checking of three megabytes may not take longer.
SECONDS_EACH = 20

ROWS = rows(lambda row: row.cache == "writeback" and "detect" not in row.name)


def _image(row: Row, folder: Path, rng: random.Random) -> list[Path]:
    """An image with something of everything in it; returns its files."""
    path = str(folder / "image")
    row.create(path)
    with row.open(path) as node:
        disk = Disk(node)
        for _ in range(6):
            offset = rng.randrange(node.size - 40_000)
            disk.write(offset, noise(rng, 40_000))
        disk.zero(1 << 20, 100_000)
        encoder = node.encoder()
        if encoder is not None:
            disk.write_unit(2, noise(rng, 64) * (encoder.unit // 64))
        if row.snapshots:
            from diskwright.block.info import SnapshotInfo

            node.snapshot_create(SnapshotInfo("", "kept"))
            disk.write(0, noise(rng, 40_000))
    return [Path(name) for name in row.files(path)]


def _look(row: Row, path: Path) -> None:
    """All that only reads, and nothing of it may raise but errors of ours."""
    began = time.monotonic()
    try:
        with row.open(str(path), read_only=True) as node:
            node.info()
            node.snapshots()
            size = min(node.size, 1 << 22)
            for offset in (0, size // 2, max(size - 4096, 0)):
                _quietly(lambda offset=offset: node.read(offset, min(4096, size - offset)))
            _quietly(lambda: node.read(0, size))
            _quietly(lambda: list(node.extents(0, size)))
            _quietly(lambda: list(node.resolve(0, size)))
            if node.can_check:
                _quietly(node.check)
    except DiskwrightError as error:
        _assert_clear(error)
    assert time.monotonic() - began < SECONDS_EACH


def _assert_clear(error: DiskwrightError) -> None:
    """One line that says something."""
    assert str(error).strip()
    assert "\n" not in str(error)


def _quietly(action) -> None:
    try:
        action()
    except DiskwrightError as error:
        _assert_clear(error)


def _scribble(row: Row, path: Path) -> None:
    """Opening for writing and writing may be refused; nothing else may go wrong."""
    try:
        with row.open(str(path)) as node:
            for offset in (0, node.size // 2):
                _quietly(lambda offset=offset: node.write(offset, b"x" * min(600, node.size)))
            _quietly(lambda: node.write_zeroes(0, min(65536, node.size)))
            _quietly(lambda: node.discard(0, min(1 << 20, node.size)))
            _quietly(node.flush)
    except DiskwrightError as error:
        _assert_clear(error)


@ROWS
def test_truncated_images(row: Row, tmp_path: Path, rng):
    files = _image(row, tmp_path, rng)
    whole = [path.read_bytes() for path in files]
    lengths = {0, 1, 4, 511, 512, 513, 1024, 4096, 65535, 65536, 131072}
    lengths |= {len(whole[0]) - 1, len(whole[0]) - 512, len(whole[0]) // 2}
    for length in sorted(at for at in lengths if 0 <= at < len(whole[0])):
        files[0].write_bytes(whole[0][:length])
        before = [path.read_bytes() for path in files]
        _look(row, files[0])
        assert [path.read_bytes() for path in files] == before, f"cut to {length}: it was changed"


def _flipped(whole: bytes, rng: random.Random) -> bytes:
    """One to three changes, most of them where headers and tables are."""
    changed = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        reach = rng.choice((128, 1024, 4096, 140_000, 400_000, len(changed)))
        at = rng.randrange(min(reach, len(changed)))
        what = rng.randrange(4)
        if what == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif what == 2:
            at &= ~7
            number = rng.choice((0, 1, (1 << 64) - 1, 1 << 63, 1 << 62, 1 << 40, 0xFFFFFFFF))
            changed[at : at + 8] = number.to_bytes(8, rng.choice(("big", "little")))
        else:
            at &= ~7
            source = rng.randrange(len(changed)) & ~7
            changed[at : at + 8] = changed[source : source + 8]
    return bytes(changed[: len(whole)])


def _flip(row: Row, folder: Path, rng: random.Random, count: int) -> None:
    files = _image(row, folder, rng)
    whole = [path.read_bytes() for path in files]
    for number in range(count):
        lied = _flipped(whole[0], rng)
        files[0].write_bytes(lied)
        _look(row, files[0])
        assert files[0].read_bytes() == lied, f"image {number} was changed by reading it"
        assert [path.read_bytes() for path in files[1:]] == whole[1:]
        _scribble(row, files[0])
        for path, data in zip(files[1:], whole[1:], strict=True):
            path.write_bytes(data)


@ROWS
def test_flipped_images(row: Row, tmp_path: Path, rng):
    _flip(row, tmp_path, rng, 12)


@pytest.mark.slow
@ROWS
def test_many_flipped_images(row: Row, tmp_path: Path, rng):
    _flip(row, tmp_path, rng, 300)


@rows(lambda row: row.driver != "raw" and row.name not in ("vpc-fixed", "vpc-4k"))
@pytest.mark.parametrize("other", ["nothing", "text", "noise"])
def test_other_files(row: Row, tmp_path: Path, other: str, rng):
    """What is no image of the format is refused by name."""
    path = tmp_path / "other"
    contents = {"nothing": b"", "text": b"no image\n" * 1000, "noise": rng.randbytes(100_000)}
    path.write_bytes(contents[other])
    Path(f"{path}.data").write_bytes(b"")
    with pytest.raises(DiskwrightError) as caught:
        row.open(str(path), read_only=True)
    assert caught.value.kind == "format", caught.value
    assert path.read_bytes() == contents[other]


@rows()
def test_a_file_that_is_not_there(row: Row, tmp_path: Path):
    with pytest.raises(DiskwrightError) as caught:
        row.open(str(tmp_path / "missing"))
    assert caught.value.kind == "not-found"
    assert not list(tmp_path.iterdir())


@rows()
def test_a_folder_is_no_image(row: Row, tmp_path: Path):
    with pytest.raises(DiskwrightError):
        row.open(str(tmp_path), read_only=True)
    with pytest.raises(DiskwrightError):
        row.open(str(tmp_path))
