"""Comparisons: what qemu-img says of the same two images, in the same words."""

from __future__ import annotations

import os
import threading

import pytest

import diskwright
from diskwright.errors import CancelledError, IOFailure
from diskwright.operations.compare import compare_images, first_difference
from diskwright.operations.opening import Image

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, size: int, *parts: tuple[int, bytes]) -> None:
    with open(name, "wb") as file:
        file.truncate(size)
        for offset, data in parts:
            file.seek(offset)
            file.write(data)


def agree(real, folder, first: str, second: str, *, strict: bool = False):
    """Our comparison, after checking that qemu-img prints the same and ends alike."""
    words = ("-s",) if strict else ()
    theirs = real["qemu-img"].run("compare", *words, first, second, cwd=folder)
    ours = compare_images(Image(first), Image(second), strict=strict)
    assert ours.lines == theirs.out.splitlines()
    assert ours.identical == (theirs.code == 0)
    return ours


@pytest.mark.parametrize("offset", [0, 1, 511, 512, 65_636, 2 * MIB - 1, 2 * MIB, 4 * MIB - 1])
@pytest.mark.parametrize("filled", [False, True])
def test_the_first_sector_that_differs(folder, real, offset, filled):
    base = b"\xa5" * 4 * MIB if filled else b""
    write("one", 4 * MIB, (0, base))
    write("two", 4 * MIB, (0, base), (offset, b"x"), (min(offset + 3000, 4 * MIB - 1), b"y"))
    found = agree(real, folder, "one", "two")
    assert found.offset == offset // 512 * 512
    assert found.reason == "content"
    assert agree(real, folder, "two", "one").offset == found.offset


def test_formats_and_layers_do_not_matter(folder, real, rng):
    write("disk", 3 * MIB, (100_000, rng.randbytes(500_000)), (2 * MIB, rng.randbytes(5000)))
    diskwright.convert("disk", "disk.qcow2", target_format="qcow2", compress=True)
    diskwright.create("over.qcow2", format="qcow2", backing="disk.qcow2", backing_format="qcow2")
    for first, second in (("disk", "disk.qcow2"), ("over.qcow2", "disk"), ("disk", "disk")):
        assert agree(real, folder, first, second).identical
    with diskwright.open("over.qcow2", read_only=False) as node:
        node.write_zeroes(0, 65536)  # was zero before
    assert agree(real, folder, "over.qcow2", "disk").identical


def test_sizes(folder, real):
    write("short", MIB, (0, b"same"))
    write("long", 2 * MIB, (0, b"same"))
    write("more", 2 * MIB, (0, b"same"), (MIB + 70_000, b"x"))
    found = agree(real, folder, "short", "long")
    assert (found.identical, found.first_size, found.second_size) == (True, MIB, 2 * MIB)
    assert agree(real, folder, "long", "short").identical
    assert agree(real, folder, "short", "more").offset == MIB + 69_632
    assert agree(real, folder, "short", "long", strict=True).reason == "size"


def test_strict_wants_the_same_runs(folder, real):
    for name in ("one.qcow2", "two.qcow2"):
        diskwright.create(name, "2M", format="qcow2")
    assert agree(real, folder, "one.qcow2", "two.qcow2", strict=True).identical
    with diskwright.open("two.qcow2", read_only=False) as node:
        node.write(MIB, bytes(65536))
    found = agree(real, folder, "one.qcow2", "two.qcow2", strict=True)
    assert (found.reason, found.offset) == ("allocation", 0)  # the run there is longer in one
    assert agree(real, folder, "one.qcow2", "two.qcow2").identical


def test_an_error_of_reading_names_image_and_offset(folder, real):
    write("disk", MIB, (0, b"d" * MIB))
    with open("rules", "w") as file:
        file.write('[inject-error]\nevent = "read_aio"\nerrno = "5"\nsector = "0"\n')
    with pytest.raises(IOFailure) as caught:
        compare_images(Image("disk"), Image("blkdebug:rules:disk", format="raw"))
    words = ("compare", "-F", "raw", "disk", "blkdebug:rules:disk")
    theirs = real["qemu-img"].run(*words, cwd=folder)
    assert f"qemu-img: {caught.value.qemu_message}" == theirs.err.strip()


def test_progress_and_cancel(folder):
    write("one", 8 * MIB, (0, b"x" * 8 * MIB))
    seen = []
    diskwright.compare("one", "one", progress=lambda done, total: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == 8 * MIB
    flag = threading.Event()
    with pytest.raises(CancelledError):
        diskwright.compare("one", "one", cancel=flag, progress=lambda *_: flag.set())


def test_an_earlier_difference_wins_however_the_threads_run(folder, rng):
    write("one", 16 * MIB, (0, b"x" * 16 * MIB))
    for _ in range(5):
        places = sorted(rng.randrange(16 * MIB) for _ in range(20))
        write("two", 16 * MIB, (0, b"x" * 16 * MIB), *((place, b"y") for place in places))
        assert diskwright.compare("one", "two").offset == places[0] // 512 * 512


def test_first_difference(rng):
    for _ in range(200):
        length = rng.choice((1, 511, 512, 513, 5000, 70_000))
        left = bytearray(length)
        place = rng.randrange(length)
        left[place] = 1
        assert first_difference(bytes(left), bytes(length)) == place // 512 * 512


def test_writers_are_kept_out(folder):
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    with diskwright.open("disk.qcow2", read_only=False):
        with pytest.raises(diskwright.DiskwrightError):
            diskwright.compare("disk.qcow2", "disk.qcow2")
        assert diskwright.compare("disk.qcow2", "disk.qcow2", force_share=True).identical
    assert os.path.exists("disk.qcow2")
