"""Operations on file systems of their own: one that gets full, and one that shares blocks."""

from __future__ import annotations

import os
import subprocess

import pytest

import diskwright
from diskwright.errors import NoSpaceError
from tests.conftest import require
from tests.rooms import ROOT

MIB = 1 << 20
SCRIPT = ROOT / "tests" / "peers" / "fs.sh"


def mounted(folder, *words: str):
    """Mount a file system at `folder`; skips where that is not possible."""
    kind, *rest = words
    argv = ["tmpfs", folder] if kind == "tmpfs" else ["mount", kind, folder]
    done = subprocess.run([SCRIPT, *argv, *rest], capture_output=True, text=True, check=False)
    if done.returncode:
        require(f"a file system of our own: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with room for 8 MiB, which is the current one."""
    folder = tmp_path / "small"
    mounted(folder, "tmpfs", "8M")
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.chdir(tmp_path)
    subprocess.run([SCRIPT, "umount", folder], check=False)


@pytest.fixture
def sharing(tmp_path, monkeypatch):
    """A folder on XFS."""
    folder = tmp_path / "xfs"
    mounted(folder, "xfs", "512M")
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.chdir(tmp_path)
    subprocess.run([SCRIPT, "umount", folder], check=False)


def sound(real, folder, name: str) -> None:
    done = real["qemu-img"].run("check", name, cwd=folder)
    assert done.code in (0, 3), done  # leaks are no damage


@pytest.mark.parametrize("format", ["raw", "qcow2", "vdi"])
@pytest.mark.parametrize("compress", [False, True])
def test_a_conversion_that_does_not_fit_leaves_nothing(small, tmp_path, rng, format, compress):
    if compress and format != "qcow2":
        pytest.skip("only qcow2 compresses")
    (tmp_path / "disk.raw").write_bytes(rng.randbytes(12 * MIB))
    with pytest.raises(NoSpaceError) as caught:
        diskwright.convert(tmp_path / "disk.raw", "to", target_format=format, compress=compress)
    assert caught.value.qemu_message.endswith("No space left on device")
    assert os.listdir() == []


def test_a_commit_that_does_not_fit_loses_nothing(small, tmp_path, real, rng):
    diskwright.create("base.qcow2", "32M", format="qcow2")
    top = tmp_path / "top.qcow2"
    diskwright.create(top, format="qcow2", backing=small / "base.qcow2", backing_format="qcow2")
    with diskwright.open(top, read_only=False) as node:
        node.write(0, written := rng.randbytes(20 * MIB))
    with pytest.raises(NoSpaceError):
        diskwright.commit(top)
    with diskwright.open(top) as node:
        assert node.read(0, len(written)) == written
    sound(real, small, "base.qcow2")
    sound(real, small, str(top))


def test_a_rebase_that_does_not_fit_changes_nothing(small, tmp_path, real, rng):
    base = tmp_path / "base.qcow2"
    diskwright.create(base, "32M", format="qcow2")
    with diskwright.open(base, read_only=False) as node:
        node.write(0, written := rng.randbytes(20 * MIB))
    diskwright.create("top.qcow2", format="qcow2", backing=base, backing_format="qcow2")
    policy = diskwright.FollowAll()
    with pytest.raises(NoSpaceError):
        diskwright.rebase("top.qcow2", None, policy=policy)
    with diskwright.open("top.qcow2", policy=policy) as node:
        assert node.info().backing_filename == str(base)
        assert node.read(0, len(written)) == written
    sound(real, small, "top.qcow2")


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("qcow2", ""),
        ("qcow2", "cluster_size=512"),
        ("qcow2", "cluster_size=4k,refcount_bits=64"),
        ("qcow2", "extended_l2=on"),
        ("qcow2", "lazy_refcounts=on"),
        ("vdi", ""),
        ("vpc", ""),
    ],
)
def test_what_was_written_before_the_disk_was_full_is_kept(small, real, rng, format, options):
    """Tables are written later, but their space is taken with what they name."""
    diskwright.create("a", "64M", format=format, options=options)
    with diskwright.open("a", format=format, read_only=False) as node:
        node.write(MIB, written := rng.randbytes(2 * MIB))
        with pytest.raises(NoSpaceError):
            node.write(8 * MIB, rng.randbytes(16 * MIB))
    with diskwright.open("a", format=format) as node:
        assert node.read(MIB, len(written)) == written
    if format != "vpc":  # QEMU does not check such
        assert real["qemu-img"].run("check", "-f", format, "a", cwd=small).code == 0


def test_a_filter_passes_on_what_is_to_have_room(small, rng):
    diskwright.create("a", "64M", format="qcow2")
    below = {"driver": "blkdebug", "image": {"driver": "file", "filename": "a"}}
    with diskwright.open({"driver": "qcow2", "file": below}, read_only=False) as node:
        node.write(0, b"\1" * MIB)
        with pytest.raises(NoSpaceError):
            node.write(8 * MIB, rng.randbytes(16 * MIB))
    with diskwright.open("a") as node:
        assert node.read(0, MIB) == b"\1" * MIB


def test_a_first_table_with_holes_has_room(small, rng):
    """A copy of an image may have holes wherever there are zeroes."""
    diskwright.create("a", "64M", format="qcow2", options="cluster_size=4k")
    with diskwright.open("a") as node:
        place = node.header.l1_table_offset
    subprocess.run(["fallocate", "-p", "-o", str(place), "-l", "4096", "a"], check=True)
    with diskwright.open("a", read_only=False) as node:
        node.write(0, b"\1" * 4096)
        with pytest.raises(NoSpaceError):
            node.write(8 * MIB, rng.randbytes(16 * MIB))
    with diskwright.open("a") as node:
        assert node.read(0, 4096) == b"\1" * 4096


def test_room_that_nobody_took_is_forgotten(tmp_path):
    path = tmp_path / "a"
    diskwright.create(path, "1M", format="qcow2")
    with diskwright.open(path, read_only=False) as node:
        for number in range(1000):
            node._hold_room(node.file, ((number * 4096, 4096),))
        assert len(node._held_room) < 100


def test_nothing_is_reserved_where_nothing_is_promised(tmp_path, monkeypatch):
    """The calls would cost an import in each convert, whose target is unsafe until it is done."""
    from diskwright.drivers.protocols.file import driver as file

    monkeypatch.setattr(file.host, "reserve", None)
    (tmp_path / "a").write_bytes(b"\1" * MIB)
    diskwright.convert(tmp_path / "a", tmp_path / "b", source_format="raw", target_format="qcow2")
    diskwright.create(tmp_path / "c", "1M", format="qcow2")
    with diskwright.open(tmp_path / "c", read_only=False) as node, pytest.raises(TypeError):
        node.write(0, b"\1")


def test_a_new_image_that_does_not_fit_leaves_nothing(small):
    with pytest.raises(NoSpaceError):
        diskwright.create("big.raw", "64M", options={"preallocation": "full"})
    with pytest.raises(NoSpaceError):
        diskwright.create("big.qcow2", "64M", format="qcow2", options="preallocation=full")
    assert os.listdir() == []


@pytest.mark.usefixtures("ways_around")
@pytest.mark.parametrize(("source", "target"), [("raw", "qcow2"), ("qcow2", "raw")])
def test_blocks_are_really_shared(sharing, real, rng, source, target):
    with open("disk.raw", "wb") as file:
        file.write(rng.randbytes(33 * MIB))
        file.truncate(48 * MIB)
    real["qemu-img"].run("convert", "-O", source, "disk.raw", "from", cwd=sharing)
    before = os.statvfs(".").f_bavail
    made = diskwright.convert("from", "to", source_format=source, target_format=target)
    used = (before - os.statvfs(".").f_bavail) * os.statvfs(".").f_frsize
    assert made.copied.shared_bytes >= 33 * MIB
    assert used < 4 * MIB
    words = ("compare", "-f", "raw", "-F", target, "disk.raw", "to")
    assert real["qemu-img"].run(*words, cwd=sharing).code == 0
    if target == "qcow2":
        assert real["qemu-img"].run("check", "to", cwd=sharing).code == 0
