"""qcow2 with extended L2 entries, or with its data in a file of their own: commands say the same.

Images are made and changed by both sides; qemu-io writes to each, so that both are looked at in
states that QEMU left.
"""

from __future__ import annotations

import os
import re
import struct
import time
from pathlib import Path
from random import Random

import pytest

import diskwright
from tests.differential.img_pairs import Pair, timeless
from tests.differential.lock_holders import lock_bytes
from tests.differential.programs import ended

pytestmark = pytest.mark.peer

MIB = 1 << 20
OFFSET = 0x00FFFFFFFFFFFE00


@pytest.fixture
def pair(real, ours, tmp_path) -> Pair:
    return Pair(real["qemu-img"], ours, tmp_path)


def write(pair: Pair, real, image: str, *commands: str) -> None:
    """Let qemu-io run commands on the image of each folder."""
    words = [word for command in commands for word in ("-c", command)]
    for folder in pair.folders:
        done = real["qemu-io"].run("-d", "unmap", *words, image, cwd=folder)
        assert done.code == 0, done


def looks_same(pair: Pair, image: str) -> None:
    """All that tells of an image tells the same of both."""
    for line in ("info", "info --output=json", "map", "map --output=json", "check"):
        pair.same(f"{line} {image}", form=timeless)
    pair.same_disks(image)


WRITES = (
    "write -P 1 10k 3k",
    "write -P 2 0 512",
    "write -z 4k 2k",
    "write -P 3 1M 130k",
    "write -z -u 1M 64k",
    "write -z 1100k 32k",
    "discard 1M 128k",
    "write -P 4 2047k 2k",
)

OPTIONS = [
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,preallocation=metadata",
    "extended_l2=on,preallocation=full",
    "data_file=d",
    "data_file=d,data_file_raw=on",
    "data_file=d,preallocation=metadata",
    "data_file=d,preallocation=falloc",
    "data_file=d,preallocation=full",
    "data_file=d,extended_l2=on",
    "data_file=d,extended_l2=on,preallocation=metadata",
    "data_file=d,lazy_refcounts=on",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_images_are_made_grown_and_shrunk(pair, real, options):
    pair.same(f"create -f qcow2 -o {options} a 4M", expect=0)
    pair.same_files("a", *(["d"] if "data_file" in options else []))
    looks_same(pair, "a")
    write(pair, real, "a", *WRITES)
    looks_same(pair, "a")
    for line in ("6M", "--shrink 3M", "--preallocation=metadata 5M", "--preallocation=full 6M"):
        pair.same(_resize(line), expect=0)
        looks_same(pair, "a")
    write(pair, real, "a", "write -P 7 4M 100k")
    looks_same(pair, "a")
    pair.same("snapshot -c s a")
    pair.same("convert -O raw a out", expect=0)
    pair.same_files("out")


def _resize(line: str) -> str:
    *flags, size = line.split()
    return " ".join(["resize", *flags, "a", size])


@pytest.mark.parametrize(
    "options",
    [
        "extended_l2=on",
        "extended_l2=on,preallocation=metadata",
        "data_file=d",
        "data_file=d,extended_l2=on",
    ],
)
def test_over_a_backing_file(pair, real, options):
    pair.prepare("create -f raw base 3M", "create -f qcow2 other 4M")
    for folder in pair.folders:
        (folder / "base").write_bytes(bytes(range(256)) * (3 * MIB // 256))
    pair.same(f"create -f qcow2 -b base -F raw -o {options} a 4M", expect=0)
    looks_same(pair, "a")
    write(pair, real, "a", *WRITES)
    looks_same(pair, "a")
    pair.same("rebase -b other -F qcow2 a", expect=0)
    pair.same_disks("a")
    pair.same("rebase -b base -F raw a", expect=0)
    pair.same_disks("a")
    pair.same("commit a", expect=0)
    pair.same_files("base")
    pair.same("map --output=json a")
    pair.same_disks("a")
    write(pair, real, "a", "write -P 9 1M 1k")
    pair.same("rebase -b '' a", expect=0)
    pair.same_disks("a")


@pytest.mark.parametrize("how", ["", "-S 0", "-S 16k", "-S 3k", "-m 1", "-n"])
@pytest.mark.parametrize("options", ["extended_l2=on", "extended_l2=on,cluster_size=16k"])
def test_empty_subclusters_are_left_out(pair, options, how):
    image = bytearray(4 * MIB - 512)
    places = Random(7)
    for _ in range(60):
        start, length = places.randrange(len(image)) >> 11 << 11, places.choice((2048, 4096, 70000))
        image[start : start + length] = b"\x5a" * min(length, len(image) - start)
    for folder in pair.folders:
        (folder / "src").write_bytes(image)
    if how == "-n":
        pair.prepare(f"create -f qcow2 -o {options} a 4M")
    made = "" if how == "-n" else f"-o {options}"
    pair.same(f"convert {how} -f raw -O qcow2 {made} src a", expect=0)
    looks_same(pair, "a")


@pytest.mark.parametrize("size", ["1013k", "3M"])
@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options", ["compat=1.1", "extended_l2=on", "data_file=d", "data_file=d,extended_l2=on"]
)
def test_growing_over_a_longer_backing_file(pair, real, options, mode, size):
    """What the backing file has behind the old end does not show, whatever is reserved there."""
    for folder in pair.folders:
        (folder / "base").write_bytes(b"\xff" * MIB)
    pair.prepare(f"create -f qcow2 -b base -F raw -o {options} a 503k")
    pair.same(f"resize --preallocation={mode} a {size}", expect=0)
    pair.same_disks("a")
    if mode in ("off", "metadata") or "data_file" in options:
        pair.same("map --output=json a")
    write(pair, real, "a", "read -P 0xff 0 503k", "read -P 0 503k 510k")


def test_a_name_that_does_not_fit_into_the_header(pair):
    pair.prepare("create -f qcow2 -o cluster_size=512 a 1M")
    pair.same(f"rebase -u -b {'n' * 500} -F raw a", expect=1)


def test_the_first_cluster_of_a_data_file_keeps_its_place(pair, real, io):
    """Its offset is 0, which says elsewhere that there is no place."""
    pair.prepare("create -f qcow2 -o data_file=d,extended_l2=on,preallocation=metadata a 1M")
    for program, folder in zip((real["qemu-io"], io), pair.folders, strict=True):
        assert program.run("-c", "write -z 0 64k", "a", cwd=folder).code == 0
    pair.same("map --output=json a", expect=0)
    pair.same("check a", expect=0)


def test_nothing_compressed_goes_into_a_data_file(pair, real):
    """It is the first data that are refused; where there are none it succeeds, or says nothing."""
    pair.prepare(
        "create -f raw zeroes 1M",
        "create -f raw base 1M",
        "create -f qcow2 -o data_file=d -b base -F raw over",
        "create -f qcow2 -o data_file=e target 1M",
    )
    write(pair, real, "base", "write -P 7 640k 64k")
    pair.same("rebase -c -b zeroes -F raw over", expect=1)
    pair.same("convert -c -n -O qcow2 base target", expect=1)
    pair.same("map --output=json over", expect=0)
    wanted, got = pair.run("convert", "-c", "-n", "-O", "qcow2", "zeroes", "target")
    assert wanted.code == got.code == 1
    assert not wanted.err, "QEMU says why now: say the same"
    pair.same("rebase -u -b zeroes -F raw over", expect=0)
    pair.same("rebase -c -b '' over", expect=0)


@pytest.mark.parametrize(
    "line",
    [
        "convert -f raw -O qcow2 -o data_file=x src y",
        "convert -W -f raw -O qcow2 -o data_file=x,cluster_size=2M src y",
        "convert -S 0 -f raw -O qcow2 -o data_file=x,extended_l2=on src y",
        "convert -n -f raw -O qcow2 src y",
        "commit top",
        'rebase -b "" y',
    ],
)
def test_disks_that_end_inside_a_cluster_of_a_data_file(pair, real, line):
    for folder in pair.folders:
        (folder / "src").write_bytes(bytes(range(1, 252)) * 1000)
    pair.prepare(
        "create -f qcow2 -b src -F raw -o data_file=d y",
        "create -f qcow2 -b y -F qcow2 top",
    )
    write(pair, real, "top", "write -P 7 100k 148992")
    pair.same(line, expect=0)
    pair.same_disks("y")
    pair.same("check y", expect=0)


@pytest.mark.parametrize(
    "line",
    [
        "create -f qcow2 -o data_file_raw=on x 1M",
        "create -f qcow2 -o data_file=y,compat=0.10 x 1M",
        "create -f qcow2 -b a -F qcow2 -o data_file=y,data_file_raw=on x",
        "create -f qcow2 -o data_file= x 1M",
        "create -f qcow2 -o data_file=none/y x 1M",
        "create -f qcow2 -o data_file=json:{} x 1M",
        "create -f qcow2 -o extended_l2=on,compat=0.10 x 1M",
        "create -f qcow2 -o extended_l2=on,cluster_size=8k x 1M",
        "create -f qcow2 -b a -F qcow2 -o preallocation=metadata x",
        "convert -c -O qcow2 -o data_file=y src x",
        "rebase -u -b src -F raw r",
        "map --image-opts driver=qcow2,file.filename=b,data-file.filename=src",
        "map --image-opts driver=qcow2,file.filename=a,data-file.filename=src",
        "map --image-opts driver=qcow2,file.filename=a,data-file.driver=file,data-file.filename=d",
        "map --image-opts "
        "driver=qcow2,file.filename=a,data-file.driver=raw,data-file.file.filename=d",
        "info --image-opts driver=qcow2,file.filename=b,data-file.filename=src",
        "snapshot -a nosuch a",
        "snapshot -d nosuch a",
        "snapshot -c new a",
        "map nameless",
        "check nameless",
        "info nameless",
        "map moved/a",
        "info moved/a",
    ],
)
def test_what_does_not_go(pair, line):
    pair.prepare(
        "create -f qcow2 -o data_file=d a 4M",
        "create -f qcow2 b 4M",
        "create -f qcow2 -o data_file=rd,data_file_raw=on r 4M",
        "create -f raw src 4M",
    )
    for folder in pair.folders:
        (folder / "src").write_bytes(b"x" * 4 * MIB)
        image = (folder / "a").read_bytes()
        (folder / "nameless").write_bytes(image.replace(b"DATA", b"XATA", 1))
        (folder / "moved").mkdir()
        (folder / "moved" / "a").write_bytes(image.replace(b"\1d\0", b"\1q\0", 1))
    pair.same(line, form=timeless)


@pytest.mark.parametrize("line", ["create {} t 2M", "convert -O qcow2 {} s.raw t"])
@pytest.mark.parametrize(
    ("link", "there"), [("symbolic", False), ("symbolic", True), ("hard", True)]
)
def test_a_data_file_that_leads_to_the_image(pair, line, link, there):
    """What is there stays as it was, and what is not is not made; qemu-img removes both."""
    pair.prepare("create -f raw s.raw 2M")
    for folder in pair.folders:
        if there:
            (folder / "t").write_bytes(b"precious")
        if link == "hard":
            (folder / "d").hardlink_to(folder / "t")
        else:
            (folder / "d").symlink_to("t")
    words = line.format("-f qcow2 -o data_file=d" if "create" in line else "-o data_file=d")
    done = pair.run(*words.split())
    assert [each.code for each in done] == [1, 1]
    assert all('Failed to get shared "resize" lock' in each.err for each in done), done
    assert all("[d]?" in each.err for each in done), done
    place = pair.folders[1] / "t"
    assert (place.read_bytes() if place.exists() else None) == (b"precious" if there else None)


@pytest.mark.parametrize("name", ["file:d", "file:a:b", "./d", "sub/../d"])
def test_the_name_of_a_data_file_is_a_path(pair, name):
    for folder in pair.folders:
        (folder / "sub").mkdir()
    pair.same(f"create -f qcow2 -o data_file={name} t 1M", expect=0)
    pair.same("info t", expect=0, form=timeless)
    pair.same(f"convert -O qcow2 -o data_file={name}2 t u", expect=0)
    pair.same("info u", expect=0, form=timeless)


@pytest.mark.parametrize("raw", ["on", "off"])
def test_who_asks_for_no_data_needs_no_data_file(pair, raw):
    """The size and the format of a backing file, and what `info` tells, are in the image."""
    pair.prepare(f"create -f qcow2 -o data_file=d,data_file_raw={raw} base 2M")
    pair.prepare("create -f qcow2 -b base -F qcow2 middle")
    for folder in pair.folders:
        (folder / "d").unlink()
    for line in (
        "create -f qcow2 -b base -F qcow2 over",
        "create -f qcow2 -b middle -F qcow2 high",
    ):
        pair.same(line, expect=0)
    pair.same("info --backing-chain high", expect=0, form=timeless)
    for line in ("create -f qcow2 -b base over", "map high", "convert -O raw over out"):
        pair.same(line, expect=1)


@pytest.mark.parametrize("words", ["", "-r", "-r -U"])
def test_a_data_file_is_locked_as_qemu_locks_it(real, io, tmp_path, words):
    made = real["qemu-img"].run(*"create -q -f qcow2 -o data_file=d t 2M".split(), cwd=tmp_path)
    assert made.code == 0, made
    seen = []
    for program in (real["qemu-io"], io):
        holder = program.start(*words.split(), "t", "-c", "sleep 60000", cwd=tmp_path)
        with ended(holder):
            deadline = time.monotonic() + 20
            while not lock_bytes(tmp_path / "t") and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3)  # the locks are taken one by one
            seen.append([lock_bytes(tmp_path / name) for name in ("t", "d")])
    assert seen[0] == seen[1]
    assert seen[0][1]


def test_an_image_in_its_own_data_file_leaves_nothing(pair):
    done = pair.run("create", "-q", "-f", "qcow2", "-o", "data_file=x", "x", "1M")
    assert [each.code for each in done] == [1, 1]
    assert all('Failed to get shared "resize" lock' in each.err for each in done), done
    assert [(folder / "x").exists() for folder in pair.folders] == [False, False]


def patch_l2(image: Path, index: int, word: int, value) -> None:
    """Change a word of an entry of the first L2 table of an image with extended entries."""
    data = bytearray(image.read_bytes())
    l1 = struct.unpack_from(">Q", data, 40)[0]
    place = (struct.unpack_from(">Q", data, l1)[0] & OFFSET) + index * 16 + word * 8
    struct.pack_into(">Q", data, place, value(struct.unpack_from(">Q", data, place)[0]))
    image.write_bytes(data)


DAMAGE = {
    "data and zero at once": (0, 1, lambda bits: bits | 1 << 32),
    "the flag of zero clusters": (0, 0, lambda entry: entry | 1),
    "a reserved bit": (0, 0, lambda entry: entry | 4),
    "a compressed cluster's bitmap": (4, 1, lambda bits: 5),
    "an unaligned cluster": (0, 0, lambda entry: entry + 512),
    "subclusters of nothing": (2, 1, lambda bits: 3),
    "a cluster behind the end": (1, 0, lambda entry: entry | 1 << 40),
    "no flag of a sole cluster": (0, 0, lambda entry: entry & ~(1 << 63)),
}


def _placeless(text: str) -> str:
    """`text` without where an error is: QEMU names where the run begins that ends with it."""
    return re.sub(r"at offset \d+", "at offset N", text)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_extended_entries_are_told_and_repaired(pair, real, name):
    pair.prepare("create -f qcow2 -o extended_l2=on a 4M")
    write(pair, real, "a", "write -P 1 0 128k", "write -c -P 2 256k 64k")
    for folder in pair.folders:
        patch_l2(folder / "a", *DAMAGE[name])
    pair.same("convert -O raw a out", form=_placeless)
    for line in ("check a", "check -r leaks a", "check -r all a", "check a", "info a"):
        pair.same(line, form=timeless)


@pytest.mark.parametrize("bitmap", [0, 4 << 32])
def test_a_damaged_cluster_without_data_is_repaired(pair, real, bitmap):
    """What of it reads as zero still does, and the rest is the backing file's."""
    for folder in pair.folders:
        (folder / "base").write_bytes(b"\xff" * MIB)
    pair.prepare("create -f qcow2 -o extended_l2=on -b base -F raw a")
    write(pair, real, "a", "write -P 1 0 128k")
    for folder in pair.folders:
        patch_l2(folder / "a", 0, 0, lambda entry: entry + 512)
        patch_l2(folder / "a", 0, 1, lambda bits: bitmap)
    for line in ("check a", "check -r all a", "check a", "map --output=json a"):
        pair.same(line, form=timeless)
    pair.same_disks("a")


def test_the_data_file_is_not_the_image(pair):
    said = pair.programs[1].run(
        "create", "-f", "qcow2", "-o", "data_file=x", "x", "1M", cwd=pair.folders[1]
    )
    assert said.code == 1
    assert 'Failed to get shared "resize" lock' in said.err


def test_a_raw_data_file_is_always_what_the_image_reads(real, folder, rng):
    image, data = folder / "a", folder / "d"
    options = {"data_file": str(data), "data_file_raw": True, "cluster_size": 4096}
    size = 300 * 1024 + 512
    diskwright.create(image, size, options=options, format="qcow2")
    with diskwright.open(image, read_only=False) as node:
        for _ in range(60):
            start = rng.randrange(size)
            length = min(rng.randrange(1, 20000), size - start)
            act = rng.randrange(4)
            if act == 0:
                node.write_zeroes(start, length, unmap=bool(rng.randrange(2)))
            elif act == 1:
                node.discard(start, length)
            else:
                node.write(start, rng.randbytes(length))
            assert data.read_bytes() == node.read(0, size)
    assert os.path.getsize(data) == size
