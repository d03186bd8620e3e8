"""What is around an image is bad: a circle of backing files, one that is gone, no room, no leave.

Each command ends with QEMU's exit code and one line, and leaves a consistent image or none.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.differential.img_pairs import plain
from tests.differential.programs import REPOSITORY, Program, Result

MIB = 1 << 20
ROOM = "3M"

#: Exit codes of `qemu-img check` for an image that lost nothing: fine, leaks, no check.
SOUND = (0, 3, 63)


def sound(qemu_img: Program, path: Path, format: str) -> str:
    """Nothing, or what is wrong with an image that a command left."""
    if not path.exists() or format == "raw":
        return ""
    done = qemu_img.run("check", "-f", format, str(path), cwd=path.parent)
    is_count = format == "vdi" and "allocated blocks mismatch" in done.err
    return "" if done.code in SOUND or is_count else f"{path.name}: {done}"


def is_clear(got: Result, wanted: Result | None = None) -> bool:
    """Whether there is one line, or as many as QEMU has, in the program's words."""
    most = 1 if wanted is None else max(1, len(wanted.err.splitlines()))
    return 1 <= len(got.err.splitlines()) <= most and "-img: " in got.err


# ---------------------------------------------------------------------------- circles of images


@pytest.fixture(scope="module")
def circle(real, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("circle")
    for line in (
        "create -q -f qcow2 a 4M",
        "create -q -f qcow2 -u -b a -F qcow2 b 4M",
        "rebase -u -b b -F qcow2 a",
        "create -q -f qcow2 self 4M",
        "rebase -u -b self -F qcow2 self",
    ):
        assert real["qemu-img"].run(*line.split(), cwd=folder).code == 0
    return folder


@pytest.mark.parametrize("name", ["a", "self"])
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("info --backing-chain NAME", 1),
        ("map NAME", 1),
        ("check NAME", 1),
        ("convert -O raw NAME out", 1),
        ("compare NAME b", 2),
        ("commit NAME", 1),
        ("rebase -b a -F qcow2 NAME", 1),
        ("resize NAME +1M", 1),
        ("snapshot -c one NAME", 1),
    ],
)
def test_a_circle_of_backing_files_is_seen(line, code, name, circle, ours):
    """QEMU's tools do not end there, so they are not asked."""
    before = {path.name: path.read_bytes() for path in circle.iterdir()}
    got = ours.run(*line.replace("NAME", name).split(), cwd=circle, timeout=30)
    assert got.code == code, got
    assert is_clear(got), got
    assert {path.name: path.read_bytes() for path in circle.iterdir()} == before


def test_a_circle_can_be_looked_at_and_mended(circle, real, ours):
    for program in (real["qemu-img"], ours):
        assert program.run("info", "a", cwd=circle).code == 0
    assert ours.run("rebase", "-u", "-b", "", "self", cwd=circle).code == 0
    assert ours.run("check", "self", cwd=circle).code == 0


# ------------------------------------------------------------------- a backing file that is gone


@pytest.mark.parametrize(
    "line",
    [
        "info image",
        "info --backing-chain image",
        "map image",
        "check image",
        "convert -O raw image out",
        "compare image image",
        "commit image",
        "rebase -b other -F qcow2 image",
        "rebase -u -b other -F qcow2 image",
        "resize image +1M",
        "snapshot -c one image",
        "create -f qcow2 -b gone -F qcow2 new",
        "create -f qcow2 -u -b gone -F qcow2 new 1M",
    ],
)
def test_a_backing_file_is_gone(line, real, ours, tmp_path):
    results = []
    for program in (real["qemu-img"], ours):
        folder = tmp_path / program.name
        folder.mkdir()
        for words in (
            "create -q -f qcow2 gone 1M",
            "create -q -f qcow2 other 1M",
            "create -q -f qcow2 -b gone -F qcow2 image",
        ):
            assert real["qemu-img"].run(*words.split(), cwd=folder).code == 0
        (folder / "gone").unlink()
        before = (folder / "image").read_bytes()
        results.append(program.run(*line.split(), cwd=folder))
        changed = (folder / "image").read_bytes() != before
        assert changed == (results[-1].code == 0 and line.startswith("rebase -u")), results[-1]
    wanted, got = results
    assert got.code == wanted.code, f"{got}\n{wanted}"
    if got.code:
        assert is_clear(got, wanted) and "No such file or directory" in got.err, got


# -------------------------------------------------------------------------- a disk that is full


class Places:
    """Small file systems, one for each program, beside a folder with room."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[Path] = []

    def small(self, name: str) -> Path:
        """A file system with little room."""
        place = self.folder / name / "small"
        place.parent.mkdir()
        self._call("tmpfs", str(place), ROOM)
        self.made.append(place)
        return place

    def _call(self, *words: str) -> None:
        subprocess.run([REPOSITORY / "tests/peers/fs.sh", *words], check=True, capture_output=True)

    def close(self) -> None:
        """Unmount all."""
        for place in self.made:
            self._call("umount", str(place))


@pytest.fixture
def places(tmp_path) -> Iterator[Places]:
    if os.geteuid():
        require("root, to mount small file systems")
    made = Places(tmp_path)
    try:
        yield made
    finally:
        made.close()


FULL = [
    # (line, format of the image `small/…`, its name, lines that make what there is before)
    ("convert -f raw -O FORMAT big small/new", "new"),
    ("convert -c -f raw -O qcow2 big small/new", "new"),
    ("create -q -f FORMAT -o PREALLOCATE small/new 8M", "new"),
    ("resize -q -f FORMAT --preallocation=full small/image 16M", "image"),
    ("resize -q -f qcow2 --preallocation=metadata small/image 2T", "image"),
    ("snapshot -c one small/image", "image"),
    ("commit -q overlay", "image"),
    ("rebase -q -b '' small/overlay", "overlay"),
    ("rebase -q -c -b '' small/overlay", "overlay"),
]


def full_cases() -> Iterator[tuple[str, str, str]]:
    full = {"qcow2": "preallocation=full", "raw": "preallocation=full"}
    for line, name in FULL:
        formats = ["qcow2", "raw", "vdi", "vpc"] if "FORMAT" in line else ["qcow2"]
        for format in formats:
            if format in full or not ("PREALLOCATE" in line or "resize" in line):
                words = line.replace("FORMAT", format)
                yield words.replace("PREALLOCATE", full.get(format, "")), format, name


@pytest.mark.parametrize(("line", "format", "name"), list(full_cases()))
def test_the_disk_is_full(line, format, name, places, real, ours):
    results = []
    for program in (real["qemu-img"], ours):
        small = places.small(program.name)
        folder = small.parent
        _furnish(real["qemu-img"], folder, line, format)
        before = (folder / "big").read_bytes()
        results.append(program.run(*shlex.split(line), cwd=folder))
        assert (folder / "big").read_bytes() == before
        assert not sound(real["qemu-img"], small / name, format)
        if "overlay" in line:
            overlay = next(folder.glob("**/overlay"))
            words = ["compare", "-q", "-f", "raw", "-F", "qcow2", "big", str(overlay)]
            assert real["qemu-img"].run(*words, cwd=folder).code == 0, "content was lost"
    wanted, got = results
    assert got.code == wanted.code == 1, f"{got}\n{wanted}"
    assert "No space left on device" in got.err, got
    assert is_clear(got, wanted), f"{got}\n{wanted}"
    if line.startswith(("create", "resize", "snapshot")):
        assert plain(got.err) == plain(wanted.err)
    if line.startswith(("commit", "rebase", "convert")):
        assert sentence(got) == sentence(wanted)


PARTS = [
    ("qcow2", "cluster_size=512", "Could not write qcow2 header: No space left on device"),
    ("qcow2", "cluster_size=4k", "Could not write qcow2 header: No space left on device"),
    ("qcow2", "cluster_size=64k", "Could not write qcow2 header: No space left on device"),
    ("vdi", "static=off", "Error writing header"),
    ("vdi", "static=on", "Error writing header"),
    ("vpc", "subformat=dynamic", "Unable to create or write VHD header"),
    ("vpc", "subformat=fixed", "Unable to write VHD header: No space left on device"),
]


@pytest.mark.parametrize(("format", "option", "first"), PARTS)
def test_there_is_room_for_a_part_of_a_new_image(format, option, first, places, real, ours):
    """For none of it, its header, its first table, or all: what has none is named."""
    results = []
    for program in (real["qemu-img"], ours):
        small = places.small(program.name)
        told = []
        for left in (0, 1, 2, 17, 33, 49, 64):
            (small / "fill").write_bytes(bytes(_free(small) - left * 4096))
            line = f"create -q -f {format} -o {option} new 100M"
            done = program.run(*line.split(), cwd=small)
            told.append((done.code, plain(done.err)))
            if program is ours:  # QEMU leaves what it has of some formats
                assert (small / "new").exists() == (done.code == 0)
            for made in small.iterdir():
                made.unlink()
        results.append(told)
    assert results[0] == results[1]
    assert results[0][0] == (1, f"PROGRAM: new: {first}\n")
    assert results[0][-1] == (0, "")


@pytest.mark.parametrize("bits", [1, 64])
def test_there_is_no_room_for_other_refcounts(bits, places, real, ours):
    results = []
    for program in (real["qemu-img"], ours):
        small = places.small(program.name)
        assert (
            real["qemu-img"].run("create", "-q", "-f", "qcow2", "image", "1M", cwd=small).code == 0
        )
        (small / "fill").write_bytes(bytes(_free(small)))
        before = (small / "image").read_bytes()
        done = program.run("amend", "-o", f"refcount_bits={bits}", "image", cwd=small)
        results.append((done.code, plain(done.err)))
        assert not sound(real["qemu-img"], small / "image", "qcow2")
    assert (
        results[0]
        == results[1]
        == (1, "PROGRAM: Failed to write refblock: No space left on device\n")
    )
    assert (small / "image").read_bytes()[: len(before)] == before


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


FULL_OF_BITMAPS = [
    # (line, whether it is done without room)
    ("amend -f qcow2 -o lazy_refcounts=on image", True),
    ("rebase -u -b other -F qcow2 image", True),
    ("resize image 9M", False),
    ("resize --shrink image 4M", False),
    ("resize image 1T", False),
    ("snapshot -c one image", False),
    ("bitmap --remove image first", False),
    ("bitmap --clear image first", False),
    ("bitmap --disable image first", False),
    ("bitmap --merge first image second", False),
    ("bitmap --add image third", False),
]


@pytest.mark.parametrize(("line", "is_done"), FULL_OF_BITMAPS)
def test_bitmaps_outlive_a_full_disk(line, is_done, places, real, ours):
    """Those that nothing was noted in: QEMU loses them, or says so."""
    small, img = places.small(ours.name), real["qemu-img"]
    for words in (
        "create -q -f qcow2 base 8M",
        "create -q -f qcow2 other 8M",
        "create -q -f qcow2 -b base -F qcow2 image 8M",
        "bitmap --add -g 512 image first",
    ):
        assert img.run(*words.split(), cwd=small).code == 0
    assert real["qemu-io"].run("-c", "write -q 0 1M", "image", cwd=small).code == 0
    assert img.run("bitmap", "--add", "-g", "64k", "image", "second", cwd=small).code == 0
    bitmaps = _bitmaps(img, small)
    _fill_up(small)
    done = ours.run(*line.split(), cwd=small)
    assert done.code == (0 if is_done else 1), done
    assert len(done.err.splitlines()) == (0 if is_done else 1), done
    assert is_done or done.err.endswith("No space left on device\n")
    assert _bitmaps(img, small) == bitmaps
    assert not sound(img, small / "image", "qcow2")


def test_bitmaps_that_do_not_fit_their_disk_any_more(places, real, ours):
    """Their tables are too long for a disk that has shrunk, and there is no room for others."""
    small, img = places.small(ours.name), real["qemu-img"]
    for words in (
        "create -q -f qcow2 -o cluster_size=4k image 40M",
        "bitmap --add -g 512 image first",
    ):
        assert img.run(*words.split(), cwd=small).code == 0
    assert real["qemu-io"].run("-c", "write -q 0 64k", "image", cwd=small).code == 0
    _fill_up(small)
    done = ours.run("resize", "--shrink", "image", "4M", cwd=small)
    assert "Lost persistent bitmaps" in done.err
    (left,) = _bitmaps(img, small)
    assert "in-use" in left["flags"]
    assert not sound(img, small / "image", "qcow2")


def _bitmaps(qemu_img: Program, folder: Path) -> object:
    """What `info` tells of the image's bitmaps."""
    done = qemu_img.run("info", "-U", "--output=json", "image", cwd=folder)
    return json.loads(done.out)["format-specific"]["data"]["bitmaps"]


@pytest.mark.parametrize("unmaps", [True, False], ids=["unmap", "keep"])
@pytest.mark.parametrize("format", ["qcow2", "vpc", "vdi"])
def test_what_was_discarded_on_a_full_disk_is_room(format, unmaps, places, real, io):
    """At once, without a flush before: a guest that trims can go on writing."""
    results = []
    for program in (real["qemu-io"], io):
        small = places.small(program.name)
        made = real["qemu-img"].run("create", "-q", "-f", format, "i", "64M", cwd=small)
        assert made.code == 0
        lines = [f"write -P {n + 1} {n}M 1M" for n in range(4)]
        lines += [
            "discard 1M 2M",
            "write -P 200 40M 1M",
            "write -P 201 41M 64k",
            "read -P 200 40M 1M",
        ]
        words = [word for line in lines for word in ("-c", line)]
        done = program.run(
            "-f", format, "-d", "unmap" if unmaps else "ignore", *words, "i", cwd=small
        )
        results.append([line for line in done.out.splitlines() if "ops; " not in line])
        results[-1].append(done.err)
        assert not sound(real["qemu-img"], small / "i", format)
    assert "No space left on device" in "".join(results[0])
    assert results[0] == results[1]


def sentence(result: Result) -> str:
    """The error line, but for where in the disk it was: pieces that are written differ."""
    return re.sub(r"byte \d+", "byte N", plain(result.err))


def _furnish(qemu_img: Program, folder: Path, line: str, format: str) -> None:
    """What the line needs, and then no room beyond 64 KiB where it has something there."""
    (folder / "big").write_bytes(random.Random(1).randbytes(8 * MIB))
    lines = []
    if "image" in line:
        lines = [f"create -q -f {format} small/image 8M"]
    if line.startswith("commit"):
        lines = [
            "create -q -f qcow2 small/image 8M",
            "create -q -f qcow2 -b small/image -F qcow2 overlay",
            "convert -n -f raw -O qcow2 big overlay",
        ]
    if line.startswith("rebase"):
        lines = ["create -q -f qcow2 -b ../big -F raw small/overlay"]
    for words in lines:
        done = qemu_img.run(*words.split(), cwd=folder)
        assert done.code == 0, done
    if line.startswith("snapshot"):
        _fill_up(folder / "small")


def _fill_up(folder: Path) -> None:
    """Leave no room in a small file system."""
    with open(folder / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            pass  # it is full


# ------------------------------------------------------------------- a file system without leave


@pytest.mark.parametrize(
    "line",
    [
        "create -q -f qcow2 small/new 1M",
        "create -q -f vdi small/new 1M",
        "create -q -f vpc small/new 1M",
        "create -q -f raw small/new 1M",
        "convert -f raw -O qcow2 big small/new",
        "convert -f raw -O raw big small/new",
        "resize -f qcow2 small/image +1M",
        "snapshot -c one small/image",
        "check -r all small/image",
        "rebase -u -b '' small/image",
        "commit overlay",
        "info small/image",
        "check small/image",
        "compare small/image small/image",
    ],
)
def test_the_file_system_is_read_only(line, places, real, ours):
    results = []
    for program in (real["qemu-img"], ours):
        small = places.small(program.name)
        folder = small.parent
        (folder / "big").write_bytes(bytes(MIB))
        for words in (
            "create -q -f qcow2 small/image 1M",
            "create -q -f qcow2 -b small/image -F qcow2 overlay",
        ):
            assert real["qemu-img"].run(*words.split(), cwd=folder).code == 0
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        results.append(program.run(*shlex.split(line), cwd=folder))
        assert not (small / "new").exists()
    wanted, got = results
    assert got.code == wanted.code, f"{got}\n{wanted}"
    if got.code:
        assert "Read-only file system" in got.err, got
        assert is_clear(got, wanted), got


@pytest.mark.parametrize("line", ["info pipe", "map -f raw pipe", "convert pipe copy"])
def test_a_fifo_is_refused_where_qemu_waits(line, real, ours, tmp_path):
    """Where we differ: somebody would have to write to it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(subprocess.TimeoutExpired):
        real["qemu-img"].run(*line.split(), cwd=tmp_path, timeout=0.5)
    refused = ours.run(*line.split(), cwd=tmp_path)
    assert refused.code == 1
    assert is_clear(refused), refused
    assert not (tmp_path / "copy").exists()


# ---------------------------------------------------------------------- several at the same time


def test_several_make_the_same_image_at_once(real, ours, tmp_path):
    """Whoever says that it succeeded leaves a file, whole and of one of them."""
    (tmp_path / "raw").write_bytes(random.Random(8).randbytes(4 * MIB) + bytes(4 * MIB))
    for _ in range(6):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        words = ["convert", "-f", "raw", "-O", "qcow2", "raw", "same"]
        started = [ours.start(*words, cwd=tmp_path, **quiet) for _ in range(4)]
        codes = [process.wait(timeout=60) for process in started]
        for process in started:
            process.stdin.close()
        assert set(codes) <= {0, 1}, codes
        if 0 in codes:
            compared = real["qemu-img"].run("compare", "raw", "same", cwd=tmp_path)
            assert compared.code == 0, compared
            (tmp_path / "same").unlink()
