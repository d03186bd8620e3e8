"""Which subclusters have data or are zero, after the same commands by QEMU and by us."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.differential.io_pairs import IoPair, commands

pytestmark = pytest.mark.peer


def entries(path: Path) -> list[tuple[bool, int]]:
    """(whether there is room, the bitmap) of each entry of the first L2 table."""
    image = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", image, struct.unpack_from(">Q", image, 40)[0])
    l2 = l1 & 0xFFFFFFFFFFFE00
    if not l2:
        return []
    found = [struct.unpack_from(">QQ", image, l2 + 16 * index) for index in range(64)]
    return [(bool(entry & 0xFFFFFFFFFFFE00), bitmap) for entry, bitmap in found]


def compared(pair: IoPair) -> None:
    wanted, got = (entries(folder / "i") for folder in pair.folders)
    assert got == wanted or not any(map(any, wanted + got))
    pair.img(pair.folders[1], "check -q i")


@pytest.mark.parametrize("before", ["write -q 0 1k", "write -q 2048k 35k", "write -q 2050k 4k"])
@pytest.mark.parametrize(
    "request_",
    [
        "write -z 2048k 35k",
        "write -z -u 2048k 35k",
        "write -z 2050k 33k",
        "write -z 1984k 99k",
        "write -z -u 1984k 99k",
        "write -z 2049k 34k",
        "discard 2048k 35k",
        "discard 0 64k",
    ],
)
def test_the_last_cluster(before, request_, real, io, tmp_path: Path) -> None:
    """Of a disk whose size is no multiple of clusters."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        (folder / "i").unlink()
        pair.img(folder, "create -q -f qcow2 -o extended_l2=on i 2083k")
        done = real["qemu-io"].run(*commands([before]), "-f", "qcow2", "i", cwd=folder)
        assert done.code == 0
    pair.agree(request_, "read -P 0 2060k 10k", expect=None)
    compared(pair)


@pytest.mark.parametrize("before", ["write -q 0 1k", "write -q 0 36k"])
@pytest.mark.parametrize("request_", ["write -z 32k 4k", "write -z -u 32k 4k", "write -z -u 0 36k"])
def test_a_last_cluster_that_ends_with_a_subcluster(before, request_, real, io, tmp_path):
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        (folder / "i").unlink()
        pair.img(folder, "create -q -f qcow2 -o extended_l2=on,cluster_size=32k i 36k")
        done = real["qemu-io"].run(*commands([before]), "-f", "qcow2", "i", cwd=folder)
        assert done.code == 0
    pair.agree(request_, expect=0)
    compared(pair)


@pytest.mark.parametrize("backing", ["", "-b base -F raw"])
def test_a_discard_of_zeroes_without_room(backing, real, io, tmp_path: Path) -> None:
    """Where no backing file shows they stay as they are."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        (folder / "i").unlink()
        os.truncate(folder / "base", 1 << 20)
        pair.img(folder, f"create -q -f qcow2 -o extended_l2=on {backing} i 1M")
        done = real["qemu-io"].run(*commands(["write -q -z 0 32k"]), "-f", "qcow2", "i", cwd=folder)
        assert done.code == 0
    pair.agree("discard 0 64k", expect=0)
    compared(pair)


@pytest.mark.parametrize("options", ["", "-c"])
def test_rebased(options, real, ours, io, tmp_path: Path) -> None:
    """What comes up from the old backing file takes subclusters; if compressed, clusters."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    pair.programs = (real["qemu-img"], ours)
    for folder in pair.folders:
        for name, below in (("low", ""), ("mid", "-b low -F qcow2"), ("i", "-b mid -F qcow2")):
            (folder / name).unlink(missing_ok=True)
            pair.img(
                folder, f"create -q -f qcow2 -o cluster_size=1M,extended_l2=on {below} {name} 3M"
            )
        words = commands(["write -q -P 1 32k 32k", "write -q -P 2 960k 32k", "write -q 2M 32k"])
        assert real["qemu-io"].run(*words, "-f", "qcow2", "mid", cwd=folder).code == 0
    pair.same(f"rebase {options} -f qcow2 -b low -F qcow2 i", expect=0)
    compared(pair)
    pair.same("map --output=json i", expect=0)


@pytest.mark.parametrize("before", ["read -q 0 1k", "write -q 2048k 4k", "write -q 2048k 35k"])
@pytest.mark.parametrize("size", ["2100k", "3000k"])
@pytest.mark.parametrize("preallocation", ["off", "metadata"])
@pytest.mark.parametrize("beside", ["", ",data_file=beside", ",data_file=beside,data_file_raw=on"])
def test_grown(before, size, preallocation, beside, real, ours, tmp_path: Path) -> None:
    """What has nothing in the last cluster stays so, as nothing shows there."""
    pair = IoPair(real, ours, tmp_path, "qcow2")
    pair.programs = (real["qemu-img"], ours)
    for folder in pair.folders:
        (folder / "i").unlink()
        pair.img(folder, f"create -q -f qcow2 -o extended_l2=on{beside} i 2083k")
        done = real["qemu-io"].run(*commands([before]), "-f", "qcow2", "i", cwd=folder)
        assert done.code == 0
    pair.same(f"resize -q --preallocation={preallocation} i {size}", expect=0)
    compared(pair)
    pair.same("map --output=json i", expect=0)


def test_grown_beside_a_longer_data_file(real, ours, tmp_path: Path) -> None:
    """It has whole clusters from the beginning, and is not cut."""
    pair = IoPair(real, ours, tmp_path, "qcow2")
    pair.programs = (real["qemu-img"], ours)
    form = "cluster_size=16k,preallocation=metadata,data_file=beside,data_file_raw=on"
    for folder in pair.folders:
        (folder / "i").unlink()
        pair.img(folder, f"create -q -f qcow2 -o {form} i 1058304")
    for preallocation, size in (("full", 1061888), ("off", 1062400), ("off", 2 << 20)):
        pair.same(f"resize -q --preallocation={preallocation} i {size}", expect=0)
        pair.same_files("beside")


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("size", [4213248, 4 << 20, (4 << 20) + 512])
def test_grown_over_room_that_was_reserved(real, ours, tmp_path, mode, size):
    """The last cluster has room, of which nothing is in use: what is not used any more is freed."""
    qemu = real["qemu-img"]
    contents = []
    for name, img in (("theirs", qemu), ("ours", ours)):
        options = "cluster_size=1M,extended_l2=on,preallocation=metadata"
        for line in (
            "create -q -f raw base 8M",
            f"create -q -f qcow2 -b base -F raw -o {options} {name} {size}",
        ):
            assert qemu.run(*line.split(), cwd=tmp_path).code == 0
        (tmp_path / "base").write_bytes(b"b" * (8 << 20))
        done = img.run("resize", f"--preallocation={mode}", name, str(size + 357888), cwd=tmp_path)
        assert done.code == 0, done
        done = qemu.run("check", name, cwd=tmp_path)
        assert done.code == 0, done
        assert qemu.run("convert", "-O", "raw", name, "out", cwd=tmp_path).code == 0
        contents.append((tmp_path / "out").read_bytes())
    assert contents[0] == contents[1]
