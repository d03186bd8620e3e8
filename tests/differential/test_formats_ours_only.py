"""Images that QEMU does not make, or reads wrongly, beside what it does with them.

QEMU has no differencing VDI, and opens a differencing VHD as if it were a dynamic one: what lies
in the parent it returns as zeroes, without a word. Ours reads the parent. Should one of these
tests fail because QEMU has become better, the text of docs/ that says so has to follow.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.differential.formats_pattern import Pattern
from tests.differential.formats_workbench import Bench, Side, look_at
from tests.differential.option_matrix import MIB

pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("beyond_qemu")]

SIZE = 8 * MIB


def run(side: Side, folder: Path, *words: str) -> str:
    done = side.img.run(*words, cwd=folder)
    assert done.code == 0, f"{words}\n{done}"
    return done.out


def write(side: Side, folder: Path, format: str, name: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = side.io.run("-f", format, *words, name, cwd=folder)
    assert done.code == 0, done


def content(side: Side, folder: Path, format: str, name: str) -> bytes:
    run(side, folder, "convert", "-f", format, "-O", "raw", name, "content")
    found = (folder / "content").read_bytes()
    (folder / "content").unlink()
    return found


@pytest.mark.parametrize("maker", [0, 1], ids=["over QEMU's", "over ours"])
def test_differencing_vhd(maker: int, both, folder: Path) -> None:
    """Ours reads the parent's sectors; QEMU returns zeroes for them, and no error."""
    qemu, our = both
    parent = both[maker]
    run(parent, folder, "create", "-q", "-f", "vpc", "-o", "force_size=on", "parent.vhd", str(SIZE))
    write(parent, folder, "vpc", "parent.vhd", f"write -P 0x11 0 {SIZE}")
    run(our, folder, "create", "-q", "-f", "vpc", "-o", "backing=parent.vhd", "child.vhd")
    write(our, folder, "vpc", "child.vhd", "write -P 0x22 4096 1024", "write -P 0x33 3145728 512")
    wanted = bytearray(b"\x11" * SIZE)
    wanted[4096:5120] = b"\x22" * 1024
    wanted[3145728:3146240] = b"\x33" * 512
    found = content(our, folder, "vpc", "child.vhd")
    assert len(found) >= SIZE
    assert found[:SIZE] == wanted
    theirs = content(qemu, folder, "vpc", "child.vhd")
    assert theirs[4096:5120] == b"\x22" * 1024
    assert theirs[:4096] == bytes(4096), "QEMU reads parents of VHDs now: say so in the docs"
    assert content(qemu, folder, "vpc", "parent.vhd")[:SIZE] == b"\x11" * SIZE


def test_differencing_vdi(both, folder: Path) -> None:
    """QEMU refuses it; ours reads the parent that the image names."""
    qemu, our = both
    run(qemu, folder, "create", "-q", "-f", "vdi", "parent.vdi", str(SIZE))
    write(qemu, folder, "vdi", "parent.vdi", f"write -P 0x11 0 {SIZE}")
    run(our, folder, "create", "-q", "-f", "vdi", "-o", "backing=parent.vdi", "child.vdi")
    write(our, folder, "vdi", "child.vdi", "write -P 0x22 4096 1024")
    wanted = bytearray(b"\x11" * SIZE)
    wanted[4096:5120] = b"\x22" * 1024
    assert content(our, folder, "vdi", "child.vdi") == wanted
    done = qemu.img.run("info", "-f", "vdi", "child.vdi", cwd=folder)
    assert done.code == 1, f"QEMU opens differencing VDIs now: say so in the docs\n{done}"


def test_compressed_after_a_compressed_cluster_was_freed(both, folder: Path) -> None:
    """Space of the freed cluster goes to plain data; what is compressed next goes elsewhere.

    QEMU 10.0.2 goes on behind the freed piece and so writes into the data: told the same, it
    leaves an image in which its own check finds a data cluster with refcount 2.
    """
    qemu, our = both
    run(our, folder, "create", "-q", "-f", "qcow2", "disk", "4M")
    commands = (
        "write -c -P 1 2752512 65536",
        "write -z -u 2752512 65536",
        "write -P 2 524288 393216",
        "write -c -P 3 262144 65536",
    )
    write(our, folder, "qcow2", "disk", *commands)
    assert qemu.img.run("check", "disk", cwd=folder).code == 0
    wanted = bytearray(4 * MIB)
    wanted[524288 : 524288 + 393216] = b"\x02" * 393216
    wanted[262144 : 262144 + 65536] = b"\x03" * 65536
    assert content(qemu, folder, "qcow2", "disk") == wanted


@pytest.mark.parametrize("block_size", ["1M", "4k", "64k", "2M"])
def test_vdi_block_sizes(block_size: str, both, folder: Path, rng: random.Random) -> None:
    """QEMU reads blocks of 1 MiB alone and refuses others; ours reads all it makes."""
    qemu, our = both
    words = ["create", "-q", "-f", "vdi", "-o", f"block_size={block_size}", "disk", str(SIZE)]
    run(our, folder, *words)
    (folder / "work").mkdir()
    (folder / "stamps").mkdir()
    pattern = Pattern(SIZE, 65536, rng, stamps=folder / "stamps")
    commands = pattern.fill(8, encodes=False, discards=False)
    (folder / "disk").rename(folder / "work" / "disk")
    write(our, folder / "work", "vdi", "disk", *commands)
    pattern.verify(content(our, folder / "work", "vdi", "disk"))
    assert "No errors were found" in run(our, folder / "work", "check", "-f", "vdi", "disk")
    done = qemu.img.run("info", "-f", "vdi", "disk", cwd=folder / "work")
    assert done.code == (block_size != "1M"), done


@pytest.mark.parametrize("block_size", ["2M", "512k", "16k", "8M"])
def test_vpc_block_sizes(block_size: str, both, folder: Path, rng: random.Random) -> None:
    """QEMU makes blocks of 2 MiB and reads others; each side writes what the other made."""
    _, our = both
    bench = Bench(both, folder)
    words = ["create", "-q", "-f", "vpc", "-o", f"block_size={block_size},force_size=on"]
    pattern = Pattern(SIZE, 65536, rng, stamps=bench.stamps)
    commands = pattern.fill(8, encodes=False, discards=False)
    for lineage in bench.lineages:
        run(our, lineage.folder, *words, "disk", str(SIZE))
    bench.write("disk", "vpc", commands[:5], by=0)
    bench.write("disk", "vpc", commands[5:], by=1)
    for lineage in bench.lineages:
        real, ours = look_at(both, lineage.folder, "disk", "vpc")
        assert real == ours, lineage.history()
        pattern.verify(bench.content("disk", "vpc", lineage))


def test_a_snapshot_has_the_size_that_its_disk_had(real, ours, beyond_qemu, folder: Path) -> None:
    for line in (
        "create -q -f qcow2 image 1M",
        "snapshot -c small image",
        "resize -q image 3M",
    ):
        assert real["qemu-img"].run(*line.split(), cwd=folder).code == 0
    words = ["convert", "-l", "small", "-O", "raw", "image"]
    for program, size in ((real["qemu-img"], 3 << 20), (ours, 1 << 20)):
        assert program.run(*words, "out", cwd=folder).code == 0
        assert (folder / "out").stat().st_size == size


def test_a_refused_create_leaves_what_was_there(real, ours, beyond_qemu, folder: Path) -> None:
    words = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=3", "image", "1M"]
    for program, stays in ((real["qemu-img"], False), (ours, True)):
        (folder / "image").write_text("precious")
        assert program.run(*words, cwd=folder).code == 1
        assert (folder / "image").exists() is stays
    assert (folder / "image").read_text() == "precious"
