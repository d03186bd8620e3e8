"""Differencing VHD images: whose names lead to the parent, what is refused, what libvhdi reads."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from diskwright.block.opener import MAX_DEPTH, Opener, open_image
from diskwright.block.policy import FollowNothing, SameFolder
from diskwright.drivers.formats.vpc.driver import Vpc
from diskwright.drivers.formats.vpc.header import SECTOR, DynamicHeader, Footer, Locator
from diskwright.errors import (
    DiskwrightError,
    FormatError,
    NotFoundError,
    OptionError,
    PolicyError,
    UnsupportedError,
)
from tests.conftest import require
from tests.unit.vm_images import content, create, opened, patched, scribble

MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.vhd"
    create("vpc", path, 5 * MIB)
    with opened("vpc", path, writable=True) as node:
        node.write(0, b"from the base" * 100)
        node.write(3 * MIB - 7, b"in two blocks")
    return path


def header_of(path: Path) -> DynamicHeader:
    return DynamicHeader.parse(path.read_bytes()[512:1536], 0)


def renamed(path: Path, names: dict[bytes, bytes], own: str = "") -> None:
    """Give an image other names of its parent, where its own ones were."""
    header = header_of(path)
    header.locators = [Locator(b"\0\0\0\0", 0, 0) for _ in range(8)]
    header.parent_name = own.encode("utf-16-be").ljust(512, b"\0")
    offset = 1536
    for at, (code, raw) in enumerate(names.items()):
        assert offset + len(raw) <= header.table_offset
        header.locators[at] = Locator(code, len(raw), len(raw), 0, offset)
        patched(path, offset, raw)
        offset += len(raw)
    patched(path, 512, header.sealed())


# ------------------------------------------------------------------------------------- reading


def test_what_an_image_has_not_is_its_parents(base: Path, rng: random.Random) -> None:
    model = bytearray(content("vpc", base))
    before = base.read_bytes()
    chain = [base]
    for name in ("one.vhd", "two.vhd", "three.vhd"):
        top = base.parent / name
        create("vpc", top, 0, backing=chain[-1].name)
        with opened("vpc", top, writable=True) as node:
            assert node.size == len(model)
            assert node.read(0, node.size) == model
            scribble(node, model, rng, 8)
            assert node.read(0, node.size) == model
            assert node.check().clean
        assert content("vpc", top) == model
        chain.append(top)
    assert base.read_bytes() == before


def test_zeroes_hide_the_parent(base: Path) -> None:
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    with opened("vpc", top, writable=True) as node:
        node.write_zeroes(5, 1000)
        assert node.read(0, 7) == b"from \0\0"
        node.write_zeroes(0, node.size)
        assert node.read(0, node.size) == bytes(node.size)


def test_a_differencing_image_can_be_emptied(base: Path) -> None:
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    size = top.stat().st_size
    with opened("vpc", top, writable=True) as node:
        node.write(0, b"x" * MIB)
        node.make_empty()
        assert node.read(0, 4) == b"from"
        node.write(0, b"yy")
        assert node.read(0, 4) == b"yyom"
        node.make_empty()
    assert top.stat().st_size == size
    assert content("vpc", top) == content("vpc", base)


@pytest.mark.parametrize(
    "options", [{"subformat": "fixed"}, {"force_size": True}, {"block_size": 65536}]
)
def test_parents_of_every_kind(tmp_path: Path, options: dict[str, object]) -> None:
    create("vpc", tmp_path / "base.vhd", 5 * MIB + 512, **options)
    with opened("vpc", tmp_path / "base.vhd", writable=True) as node:
        node.write(node.size - 5, b"final")
        size = node.size
    create("vpc", tmp_path / "top.vhd", size, backing="base.vhd")
    with opened("vpc", tmp_path / "top.vhd") as node:
        assert node.size == size
        assert node.read(size - 5, 5) == b"final"


# --------------------------------------------------------------------------------------- names


def utf16(text: str) -> bytes:
    return text.encode("utf-16-le")


@pytest.mark.parametrize(
    ("names", "own"),
    [
        ({b"W2ru": utf16(".\\base.vhd")}, ""),
        ({b"W2ru": utf16("base.vhd")}, ""),
        ({b"W2ru": ".\\base.vhd".encode("utf-16-be")}, ""),
        ({b"W2ku": utf16("C:\\disks\\base.vhd")}, ""),
        ({b"W2ku": utf16("\\\\server\\share\\base.vhd")}, ""),
        ({b"Wi2r": b".\\base.vhd\0"}, ""),
        ({b"Wi2k": b"D:\\base.vhd"}, ""),
        ({b"MacX": b"file://localhost/Users/me/base.vhd"}, ""),
        ({b"MacX": b"file:///Users/me/b%61se.vhd"}, ""),
        ({}, "C:\\Virtual Machines\\base.vhd"),
        ({}, "base.vhd"),
        ({b"W2ru": utf16(".\\gone.vhd"), b"W2ku": utf16("C:\\base.vhd")}, "wrong.vhd"),
        ({b"????": b"nobody knows"}, "base.vhd"),
    ],
)
def test_names_of_every_platform(base: Path, names: dict[bytes, bytes], own: str) -> None:
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    renamed(top, names, own)
    with opened("vpc", top) as node:
        assert node.read(0, 4) == b"from"
        assert node.info().full_backing_filename == f"{base.parent}/base.vhd"


def test_a_whole_path_of_this_system(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    top = folder / "top.vhd"
    create("vpc", top, 0, backing=str(base))
    renamed(top, {b"W2ku": utf16(str(base))})
    with opened("vpc", top) as node:
        assert node.read(0, 4) == b"from"


def test_a_parent_in_another_folder(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    folder.mkdir()
    create("vpc", folder / "top.vhd", 0, backing="../base.vhd")
    with opened("vpc", folder / "top.vhd") as node:
        assert node.info().backing_filename == "../base.vhd"
        assert node.read(0, 4) == b"from"
    # both are moved together
    moved = tmp_path / "moved"
    moved.mkdir()
    folder.rename(moved / "snapshots")
    base.rename(moved / "base.vhd")
    with opened("vpc", moved / "snapshots" / "top.vhd") as node:
        assert node.read(0, 4) == b"from"


def test_a_name_is_a_path_and_nothing_else(base: Path) -> None:
    """What looks like a protocol or JSON in an image is a file's name."""
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    for name in ("null-co://", 'json:{"driver":"null-co"}', "nbd:localhost:1"):
        renamed(top, {b"W2ru": utf16(name)}, own=name)
        with pytest.raises(NotFoundError):
            opened("vpc", top)


def test_what_is_created_says_where_the_parent_is(base: Path) -> None:
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    raw, header = top.read_bytes(), header_of(top)
    assert header.parent_id == Footer.parse(base.read_bytes()[:SECTOR], 0).unique_id
    assert header.parent_name.decode("utf-16-be").rstrip("\0") == "base.vhd"
    said = {entry.code: raw[entry.offset :][: entry.length] for entry in header.locators[:2]}
    assert said == {b"W2ru": utf16(".\\base.vhd"), b"W2ku": utf16(str(base))}
    assert all(entry.offset + entry.space <= header.table_offset for entry in header.locators[:2])


def test_blocks_never_overwrite_the_names(base: Path) -> None:
    """Windows puts them behind the table, where the first block would come to lie."""
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    raw, header = bytearray(top.read_bytes()), header_of(top)
    end = len(raw) - SECTOR
    header.locators[0].offset = end + 3 * SECTOR
    header.locators[0].space = 0x10000
    header.locators[1].code = b"\0\0\0\0"
    name = utf16(".\\base.vhd")
    tail = bytes(3 * SECTOR) + name.ljust(0x10000, b"\0")
    top.write_bytes(bytes(raw[:512]) + header.sealed() + bytes(raw[1536:end]) + tail + raw[end:])
    with opened("vpc", top, writable=True) as node:
        node.write(0, b"x" * 5000)
    after = top.read_bytes()
    assert after[end + 3 * SECTOR :][: len(name)] == name
    word = int.from_bytes(after[header.table_offset :][:4], "big")
    assert word * SECTOR >= end + 3 * SECTOR + 0x10000


# ------------------------------------------------------------------------------------ refusals


def test_a_missing_parent_is_named_with_how_to_give_another(base: Path) -> None:
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    other = base.rename(base.parent / "renamed.vhd")
    with pytest.raises(NotFoundError) as caught:
        opened("vpc", top)
    assert "'base.vhd'" in caught.value.message
    assert "backing.file.filename" in (caught.value.hint or "")
    backing = {"driver": "vpc", "file": {"driver": "file", "filename": str(other)}}
    with opened("vpc", top, backing=backing) as node:
        assert node.read(0, 4) == b"from"
    with opened("vpc", top, backing=None) as node:  # said to be left out
        assert node.backing is None


def test_a_look_at_the_image_alone_needs_no_parent(base: Path) -> None:
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    base.unlink()
    with open_image(Opener(follow_backing=False), str(top)) as node:
        info = node.info()
    assert info.features == ["differencing"]
    assert (info.backing_filename, info.backing_format) == ("base.vhd", "vpc")
    assert ("backing file", "base.vhd", "vpc") in info.references


def test_another_image_in_the_parents_place(base: Path) -> None:
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    base.unlink()
    create("vpc", base, 5 * MIB)
    with pytest.raises(FormatError, match="is not the parent of") as caught:
        opened("vpc", top)
    assert caught.value.field == "parent_id"


@pytest.mark.parametrize("driver", ["vpc", "raw"])
def test_a_parent_that_was_given_and_is_none_is_refused(base: Path, driver: str) -> None:
    top, wrong = base.parent / "top.vhd", base.parent / "wrong.vhd"
    create("vpc", top, 0, backing="base.vhd")
    create("vpc", wrong, 5 * MIB)
    file = {"driver": "file", "filename": str(wrong)}
    backing = {"driver": driver, "file": file}
    slow = {"driver": "throttle", "limits": {"iops-total": 10**6}, "file": backing}
    for spec in (backing, slow, {"file": file}):
        with pytest.raises(FormatError, match="is not the parent of") as caught:
            opened("vpc", top, writable=True, backing=spec)
        assert caught.value.hint_always


def test_a_fixed_parent_can_be_given_without_its_driver(tmp_path: Path) -> None:
    """A fixed VHD is taken for a raw image when it is guessed."""
    create("vpc", tmp_path / "base.vhd", 5 * MIB, subformat="fixed")
    create("vpc", tmp_path / "top.vhd", 0, backing="base.vhd")
    backing = {"file": {"driver": "file", "filename": str(tmp_path / "base.vhd")}}
    with opened("vpc", tmp_path / "top.vhd", backing=backing) as node:
        assert node.backing is not None
        assert node.backing.node.driver == "vpc"


def test_an_image_that_is_its_own_parent(base: Path) -> None:
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    renamed(top, {b"W2ru": utf16(".\\top.vhd")})
    header = header_of(top)
    header.parent_id = Footer.parse(top.read_bytes()[:SECTOR], 0).unique_id
    patched(top, 512, header.sealed())
    with pytest.raises(DiskwrightError, match="leads back to itself"):
        opened("vpc", top)


def test_a_circle_of_parents(base: Path) -> None:
    one, two = base.parent / "one.vhd", base.parent / "two.vhd"
    create("vpc", one, 0, backing="base.vhd")
    create("vpc", two, 0, backing="one.vhd")
    renamed(one, {b"W2ru": utf16("..\\" + base.parent.name + "\\two.vhd")})
    header = header_of(one)
    header.parent_id = Footer.parse(two.read_bytes()[:SECTOR], 0).unique_id
    patched(one, 512, header.sealed())
    with pytest.raises(DiskwrightError, match="leads back to itself"):
        opened("vpc", two)


def test_more_images_over_each_other_than_are_followed(base: Path) -> None:
    for number in range(MAX_DEPTH + 1):
        below = f"{number - 1}.vhd" if number else "base.vhd"
        create("vpc", base.parent / f"{number}.vhd", 0, backing=below)
    with opened("vpc", base.parent / f"{MAX_DEPTH - 1}.vhd") as node:
        assert node.read(0, 4) == b"from"
    with pytest.raises(UnsupportedError, match="over each other"):
        opened("vpc", base.parent / f"{MAX_DEPTH}.vhd")


def test_a_policy_decides_about_the_parent(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "apart"
    folder.mkdir()
    top = folder / "top.vhd"
    create("vpc", top, 0, backing="../base.vhd")
    for policy in (FollowNothing(), SameFolder()):
        with pytest.raises(PolicyError):
            open_image(Opener(policy=policy), str(top))


def test_a_pipe_in_the_parents_place_does_not_block(base: Path) -> None:
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    base.unlink()
    os.mkfifo(base)
    with pytest.raises(NotFoundError):
        opened("vpc", top)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"subformat": "fixed"}, "subformat"), ({"backing": "nbd:localhost:1"}, "backing")],
)
def test_creations_that_cannot_be(base: Path, options: dict[str, object], field: str) -> None:
    with pytest.raises(OptionError) as caught:
        create("vpc", base.parent / "top.vhd", 0, **{"backing": "base.vhd", **options})
    assert caught.value.field == field


def test_the_size_is_the_parents(base: Path) -> None:
    with pytest.raises(OptionError) as caught:
        create("vpc", base.parent / "top.vhd", 9 * MIB, backing="base.vhd")
    assert caught.value.field == "size"


def test_a_backing_file_for_an_image_without_parent_is_refused(base: Path) -> None:
    with pytest.raises(OptionError) as caught:
        opened("vpc", base, backing={"driver": "null-co"})
    assert caught.value.qemu == "Block format 'vpc' does not support the option 'backing.driver'"


# ------------------------------------------------------------------------------------- libvhdi


def mounted_content(image: Path, mount: Path) -> dict[str, bytes]:
    """What vhdimount shows: vhdi1 is the oldest of the chain, the last one the image itself."""
    if shutil.which("vhdimount") is None or not os.path.exists("/dev/fuse"):
        require("vhdimount of libvhdi-utils, and FUSE")
    mount.mkdir()
    done = subprocess.run(
        ["vhdimount", str(image), str(mount)], capture_output=True, text=True, timeout=60
    )
    try:
        if done.returncode and "fuse" in (done.stdout + done.stderr).lower():
            require("the right to mount with FUSE")
        assert done.returncode == 0, done.stdout + done.stderr
        return {entry.name: entry.read_bytes() for entry in sorted(mount.iterdir())}
    finally:
        unmount = (["fusermount", "-u"], ["fusermount3", "-u"], ["umount"])
        words = next(words for words in unmount if shutil.which(words[0]))
        subprocess.run([*words, str(mount)], capture_output=True, check=False)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("options", "top_options"),
    [({}, {}), ({"subformat": "fixed"}, {}), ({"force_size": True}, {"block_size": 524288})],
)
def test_libvhdi_reads_what_we_wrote_with_its_parent_beside_it(
    tmp_path: Path, rng: random.Random, options: dict[str, object], top_options: dict[str, object]
) -> None:
    base, top = tmp_path / "base.vhd", tmp_path / "top.vhd"
    create("vpc", base, 7 * MIB, **options)
    with opened("vpc", base, writable=True) as node:
        model = bytearray(node.size)
        scribble(node, model, rng, 15)
    lower = bytes(model)
    create("vpc", top, 0, backing="base.vhd", **top_options)
    with opened("vpc", top, writable=True) as node:
        scribble(node, model, rng, 10)
        for _ in range(60):  # single sectors, and less
            offset = rng.randrange(node.size - 600)
            node.write(offset, b"few" * 50)
            model[offset : offset + 150] = b"few" * 50
    shown = mounted_content(top, tmp_path / "mounted")
    assert list(shown) == ["vhdi1", "vhdi2"]
    assert shown["vhdi1"] == lower
    assert shown["vhdi2"] == model
    told = subprocess.run(["vhdiinfo", str(top)], capture_output=True, text=True, check=True)
    assert "Differential" in told.stdout
    assert "base.vhd" in told.stdout


def test_bits_of_single_sectors_are_read(base: Path) -> None:
    """Others set bits one by one; a sector whose bit is clear is the parent's."""
    with opened("vpc", base, writable=True) as node:
        node.write(0, b"P" * 8192)
    top = base.parent / "top.vhd"
    create("vpc", top, 0, backing="base.vhd")
    with opened("vpc", top, writable=True) as node:
        node.write(0, b"C" * 8192)
        assert isinstance(node, Vpc)
    header = header_of(top)
    word = int.from_bytes(top.read_bytes()[header.table_offset :][:4], "big")
    patched(top, word * SECTOR, bytes([0b01011000, 0b00000001]))
    wanted = b"".join(bit * SECTOR for bit in (b"P", b"C", b"P", b"C", b"C", *[b"P"] * 10, b"C"))
    with opened("vpc", top, writable=True) as node:
        assert node.read(0, 8192) == wanted
        node.write(700, b"x" * 10)
        wanted = wanted[:700] + b"x" * 10 + wanted[710:]
        assert node.read(0, 8192) == wanted
    assert content("vpc", top)[:8192] == wanted
