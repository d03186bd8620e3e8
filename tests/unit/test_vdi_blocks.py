"""Writing VDI images: blocks and their numbers, parents by identifier, what is refused."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

import diskwright
from diskwright.block.opener import Opener, open_image
from diskwright.block.policy import FollowNothing, SameFolder
from diskwright.drivers.formats.vdi.header import FREE, ZERO, Header
from diskwright.errors import (
    DiskwrightError,
    FormatError,
    NotFoundError,
    OptionError,
    UnsupportedError,
)
from tests.unit.vm_images import content, create, opened, patched, scribble

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.vdi"
    create("vdi", path, 9 * MIB)
    return path


def header_of(path: Path) -> Header:
    return Header.parse(path.read_bytes()[:512])


def words_of(path: Path) -> list[int]:
    raw, header = path.read_bytes(), header_of(path)
    table = raw[header.map_offset : header.map_end]
    return [int.from_bytes(table[at : at + 4], "little") for at in range(0, len(table), 4)]


def test_blocks_get_numbers_in_the_order_of_their_first_writes(image: Path) -> None:
    with opened("vdi", image, writable=True) as node:
        for block in (4, 0, 7):
            node.write(block * MIB + 100, b"x")
    words = words_of(image)
    assert [words[4], words[0], words[7]] == [0, 1, 2]
    assert words.count(FREE) == 6
    assert header_of(image).blocks_allocated == 3


@pytest.mark.parametrize(
    "options", [{}, {"static": True}, {"block_size": 4096}, {"block_size": 8 * MIB}]
)
def test_random_writes_against_a_model(
    tmp_path: Path, rng: random.Random, options: dict[str, object]
) -> None:
    path = tmp_path / "disk.vdi"
    create("vdi", path, 7 * MIB + 512, **options)
    model = bytearray(7 * MIB + 512)
    for _ in range(3):
        with opened("vdi", path, writable=True) as node:
            scribble(node, model, rng, 12)
            assert node.read(0, node.size) == model
        assert content("vdi", path) == model
        with opened("vdi", path) as node:
            assert node.check().clean


def test_extra_bytes_before_blocks_are_kept_apart(image: Path) -> None:
    header = header_of(image)
    header.block_extra = 512
    patched(image, 0, header.pack())
    with opened("vdi", image, writable=True) as node:
        node.write(MIB - 100, b"y" * 300)
        model = node.read(0, node.size)
    assert model[MIB - 101 : MIB + 201] == b"\0" + b"y" * 300 + b"\0"
    raw = image.read_bytes()
    assert raw[header.data_offset : header.data_offset + 512] == bytes(512)
    assert raw[header.data_offset + 512 + MIB - 100 :][:100] == b"y" * 100


def test_a_count_too_low_does_not_make_a_block_be_used_twice(image: Path) -> None:
    with opened("vdi", image, writable=True) as node:
        node.write(0, b"a" * MIB)
        node.write(MIB, b"b" * MIB)
    header = header_of(image)
    header.blocks_allocated = 1
    patched(image, 0, header.pack())
    with opened("vdi", image, writable=True) as node:
        assert node.check().corruptions == 1
        node.write(5 * MIB, b"c" * MIB)
        assert node.read(0, 2 * MIB) == b"a" * MIB + b"b" * MIB
    assert len({word for word in words_of(image) if word < FREE}) == 3
    with opened("vdi", image) as node:
        assert node.check().clean


@pytest.mark.parametrize("word", [9, 1000, ZERO - 1])
def test_a_block_that_cannot_be_is_an_error_where_it_is_read(image: Path, word: int) -> None:
    patched(image, header_of(image).map_offset + 8, word.to_bytes(4, "little"))
    with opened("vdi", image) as node:
        assert node.read(0, 2 * MIB) == bytes(2 * MIB)
        with pytest.raises(FormatError, match="block map") as caught:
            node.read(2 * MIB, 1)
        assert caught.value.value == word
        assert node.check().corruptions == 1


def test_overlapping_tables_are_not_written(image: Path) -> None:
    header = header_of(image)
    header.data_offset = header.map_offset
    patched(image, 0, header.pack())
    before = image.read_bytes()
    with opened("vdi", image, writable=True) as node, pytest.raises(FormatError):
        node.write(0, b"x")
    assert image.read_bytes() == before


def test_there_is_no_resize_and_no_repair(image: Path) -> None:
    from diskwright.block.info import Repair

    with opened("vdi", image, writable=True) as node:
        assert not node.can_resize
        with pytest.raises(UnsupportedError) as caught:
            node.truncate(20 * MIB)
        assert caught.value.qemu_message == "Image format driver does not support resize"
        with pytest.raises(UnsupportedError):
            node.check(Repair.ALL)


@pytest.mark.parametrize("static", [False, True])
def test_lies_end_in_an_error_of_ours(tmp_path: Path, rng: random.Random, static: bool) -> None:
    made = tmp_path / "made.vdi"
    create("vdi", made, 3 * MIB, static=static)
    with opened("vdi", made, writable=True) as node:
        node.write(MIB, b"x" * 100_000)
    whole = made.read_bytes()
    path = tmp_path / "lie.vdi"
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice((0x40, 0x140)) + rng.randrange(0x100)
            raw[rng.choice((at, 512 + rng.randrange(12)))] = rng.choice((0, 1, 2, 254, 255, 128))
        if rng.random() < 0.3:
            del raw[rng.randrange(len(raw)) :]
        path.write_bytes(raw)
        try:
            with opened("vdi", path, writable=True) as node:
                node.read(0, min(node.size, 4 * MIB))
                node.write(min(max(node.size - 1, 0), MIB + 77), b"y"[: node.size])
        except DiskwrightError:
            pass


# -------------------------------------------------------------------------------------- parents


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.vdi"
    create("vdi", path, 5 * MIB)
    with opened("vdi", path, writable=True) as node:
        node.write(0, b"from the base" * 100)
    return path


def test_a_chain_of_differencing_images(base: Path, rng: random.Random) -> None:
    model = bytearray(content("vdi", base))
    chain = [base]
    for name in ("one.vdi", "two.vdi"):
        top = base.parent / name
        create("vdi", top, 0, backing=chain[-1].name)
        with opened("vdi", top, writable=True) as node:
            scribble(node, model, rng, 8)
            assert node.read(0, node.size) == model
        assert content("vdi", top) == model
        chain.append(top)


def test_zeroes_hide_the_parent_and_emptying_shows_it(base: Path) -> None:
    top = base.parent / "top.vdi"
    create("vdi", top, 0, backing="base.vdi")
    size = top.stat().st_size
    with opened("vdi", top, writable=True) as node:
        node.write_zeroes(0, MIB)
        assert node.read(0, MIB) == bytes(MIB)
        node.flush()
        assert words_of(top)[0] == ZERO
        node.write(2 * MIB, b"x")
        node.make_empty()
        assert node.read(0, 4) == b"from"
    assert top.stat().st_size == size


@pytest.mark.parametrize(("folder", "below"), [(".", "base.vdi"), ("Snapshots", "../base.vdi")])
def test_the_parent_is_found_where_virtualbox_keeps_it(base: Path, folder: str, below: str) -> None:
    (base.parent / folder).mkdir(exist_ok=True)
    top = base.parent / folder / "{top}.vdi"
    create("vdi", top, 0, backing=below)
    base.rename(base.parent / "another name")
    with opened("vdi", top) as node:
        assert node.read(0, 4) == b"from"
        assert node.info().backing_filename == below.replace("base.vdi", "another name")
    with open_image(Opener(follow_backing=False), str(top)) as node:
        assert node.info().backing_format == "vdi"


def test_a_missing_parent_is_named_with_how_to_give_another(base: Path, tmp_path: Path) -> None:
    top = base.parent / "top.vdi"
    create("vdi", top, 0, backing="base.vdi")
    (tmp_path / "far").mkdir()
    moved = base.rename(tmp_path / "far" / "base.vdi")
    with pytest.raises(NotFoundError) as caught:
        opened("vdi", top)
    assert "backing.file.filename" in (caught.value.hint or "")
    backing = {"driver": "vdi", "file": {"driver": "file", "filename": str(moved)}}
    with opened("vdi", top, backing=backing) as node:
        assert node.read(0, 4) == b"from"
    with open_image(Opener(follow_backing=False), str(top)) as node:
        (role, text, _) = node.info().references[0]
        assert role == "backing file"
        assert "the VDI image" in text
        assert node.info().backing_filename == text


def test_a_chain_whose_end_is_missing_is_no_chain(base: Path) -> None:
    middle, top = base.parent / "middle.vdi", base.parent / "top.vdi"
    create("vdi", middle, 0, backing="base.vdi")
    create("vdi", top, 0, backing="middle.vdi")
    assert len(diskwright.info(top, chain=True).chain()) == 3
    base.unlink()
    assert (diskwright.info(middle).details.backing_filename or "").startswith("the VDI image")
    for name in (middle, top):
        with pytest.raises(NotFoundError) as caught:
            diskwright.info(name, chain=True)
        assert caught.value.qemu_message.startswith(f"Could not open '{middle}': The parent of")


def test_a_parent_that_was_written_to_is_refused(base: Path) -> None:
    top = base.parent / "top.vdi"
    create("vdi", top, 0, backing="base.vdi")
    with opened("vdi", base, writable=True) as node:
        node.write(0, b"later")
    with pytest.raises(FormatError, match="was written to after"):
        opened("vdi", top)


@pytest.mark.parametrize("copy", ["copy.vdi", "copy of the base"])
def test_two_files_that_may_be_the_parent_are_both_refused(base: Path, copy: str) -> None:
    """A copy has the parent's identifier: taking one of them would be a guess."""
    top = base.parent / "top.vdi"
    create("vdi", top, 0, backing="base.vdi")
    shutil.copy(base, base.parent / copy)
    before = base.read_bytes()
    for writable in (False, True):
        with pytest.raises(FormatError, match="is not clear") as caught:
            opened("vdi", top, writable=writable)
        assert f"'{base}'" in caught.value.message
        assert f"'{base.parent / copy}'" in caught.value.message
        assert "backing.file.filename" in (caught.value.hint or "")
        assert caught.value.hint_always
    backing = {"file": {"driver": "file", "filename": str(base.parent / copy)}}
    with opened("vdi", top, backing=backing) as node:
        assert node.read(0, 4) == b"from"
    with open_image(Opener(follow_backing=False), str(top)) as node:
        assert node.info().full_backing_filename is None
        assert isinstance(node.info().backing_error, FormatError)
    assert base.read_bytes() == before


def test_links_to_the_parent_are_one_file(base: Path) -> None:
    top = base.parent / "top.vdi"
    create("vdi", top, 0, backing="base.vdi")
    (base.parent / "link.vdi").symlink_to("base.vdi")
    with opened("vdi", top) as node:
        assert node.read(0, 4) == b"from"


def test_both_folders_of_virtualbox_are_looked_at(base: Path) -> None:
    (base.parent / "Snapshots").mkdir()
    top = base.parent / "Snapshots" / "top.vdi"
    create("vdi", top, 0, backing="../base.vdi")
    shutil.copy(base, top.parent / "base.vdi")
    with pytest.raises(FormatError, match="is not clear"):
        opened("vdi", top)


@pytest.mark.parametrize("other", ["another VDI", "no VDI"])
def test_a_parent_that_was_given_and_is_none_is_refused(base: Path, other: str) -> None:
    top, wrong = base.parent / "top.vdi", base.parent / "wrong.vdi"
    create("vdi", top, 0, backing="base.vdi")
    create("vdi", wrong, 5 * MIB)
    driver = "raw" if other == "no VDI" else "vdi"
    backing = {"driver": driver, "file": {"driver": "file", "filename": str(wrong)}}
    slow = {"driver": "throttle", "limits": {"iops-total": 10**6}, "file": backing}
    for spec in (backing, slow):
        with pytest.raises(FormatError, match="is not the parent of"):
            opened("vdi", top, writable=True, backing=spec)


def test_policies_decide_about_the_parent(base: Path) -> None:
    (base.parent / "Snapshots").mkdir()
    top = base.parent / "Snapshots" / "top.vdi"
    create("vdi", top, 0, backing="../base.vdi")
    for policy in (FollowNothing(), SameFolder()):
        with pytest.raises(DiskwrightError):
            open_image(Opener(policy=policy), str(top))


def test_a_pipe_beside_the_image_does_not_block(base: Path) -> None:
    top = base.parent / "top.vdi"
    create("vdi", top, 0, backing="base.vdi")
    base.unlink()
    os.mkfifo(base)
    with pytest.raises(NotFoundError):
        opened("vdi", top)


@pytest.mark.parametrize(
    ("size", "options", "field"),
    [
        (9 * MIB, {"backing": "base.vdi"}, "size"),
        (0, {"backing": "base.vdi", "static": True}, "static"),
        (MIB, {"block_size": 3 << 20}, "block_size"),
        (MIB, {"block_size": 256}, "block_size"),
    ],
)
def test_creations_that_cannot_be(
    base: Path, size: int, options: dict[str, object], field: str
) -> None:
    with pytest.raises(OptionError) as caught:
        create("vdi", base.parent / "top.vdi", size, **options)
    assert caught.value.field == field


def test_a_backing_file_for_an_image_without_parent_is_refused(base: Path) -> None:
    with pytest.raises(OptionError) as caught:
        opened("vdi", base, backing={"driver": "null-co"})
    assert caught.value.qemu == "Block format 'vdi' does not support the option 'backing.driver'"
