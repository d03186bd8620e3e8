"""Commit and rebase: layers that change, and a disk that looks the same afterwards."""

from __future__ import annotations

import os
import random
import threading

import pytest

import diskwright
from diskwright.errors import CancelledError, DiskwrightError

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def overlay(name: str, below: str, size: int | None = None) -> None:
    diskwright.create(name, size, format="qcow2", backing=below, backing_format="qcow2")


def scribble(name: str, rng: random.Random, count: int = 12) -> None:
    with diskwright.open(name, read_only=False) as node:
        for _ in range(count):
            length = rng.choice((1, 512, 5000, 70_000, 300_000))
            offset = rng.randrange(node.size - length)
            if rng.random() < 0.25:
                node.write_zeroes(offset, length)
            else:
                node.write(offset, rng.randbytes(length))


def content(name: str) -> bytes:
    with diskwright.open(name) as node:
        return node.read(0, node.size)


def sound(real, folder, *names: str) -> None:
    for name in names:
        done = real["qemu-img"].run("check", "-f", "qcow2", name, cwd=folder)
        assert done.code == 0, done


@pytest.fixture
def chain(folder, rng):
    """base <- middle <- top, each with something of its own."""
    diskwright.create("base.qcow2", SIZE, format="qcow2")
    overlay("middle.qcow2", "base.qcow2")
    overlay("top.qcow2", "middle.qcow2")
    for name in ("base.qcow2", "middle.qcow2", "top.qcow2"):
        scribble(name, rng)
    return folder


def test_commit_empties_the_overlay(chain, real):
    before, base = content("top.qcow2"), content("base.qcow2")
    made = diskwright.commit("top.qcow2")
    assert made.emptied
    assert content("middle.qcow2") == content("top.qcow2") == before
    assert content("base.qcow2") == base
    with diskwright.open("top.qcow2") as node:
        assert {extent.allocated for extent in node.extents(0, SIZE, depth=0)} == {False}
    sound(real, chain, "base.qcow2", "middle.qcow2", "top.qcow2")


def test_commit_gives_back_the_end_of_the_file(folder, real):
    diskwright.create("base.qcow2", 64 << 20, format="qcow2")
    overlay("top.qcow2", "base.qcow2", 64 << 20)
    new = (folder / "top.qcow2").stat().st_size
    with diskwright.open("top.qcow2", read_only=False) as node:
        node.write(0, b"x" * (24 << 20))
    diskwright.commit("top.qcow2")
    assert (folder / "top.qcow2").stat().st_size <= new + 65536
    sound(real, folder, "base.qcow2", "top.qcow2")


def test_commit_to_the_base(chain, real):
    before = content("top.qcow2")
    made = diskwright.commit("top.qcow2", base="base.qcow2")
    assert not made.emptied
    assert content("base.qcow2") == content("top.qcow2") == before
    sound(real, chain, "base.qcow2", "middle.qcow2", "top.qcow2")
    assert diskwright.info("top.qcow2").details.backing_filename == "middle.qcow2"


def test_commit_can_keep_the_overlay(chain):
    before = content("top.qcow2")
    assert not diskwright.commit("top.qcow2", keep=True).emptied
    assert content("middle.qcow2") == before
    with diskwright.open("top.qcow2") as node:
        assert True in {extent.allocated for extent in node.extents(0, SIZE, depth=0)}


@pytest.mark.parametrize("sizes", [(1, 2, 3), (3, 2, 1), (2, 1, 3), (1, 3, 2)])
@pytest.mark.parametrize("base", [None, "base.qcow2"])
def test_commit_between_sizes(folder, real, rng, sizes, base):
    """What is committed is what the overlay showed, and the same as qemu-img commits."""
    first, second, third = (size * MIB for size in sizes)
    diskwright.create("base.qcow2", first, format="qcow2")
    overlay("middle.qcow2", "base.qcow2", second)
    overlay("top.qcow2", "middle.qcow2", third)
    for name in ("base.qcow2", "middle.qcow2", "top.qcow2"):
        scribble(name, rng, 4)
    before = content("top.qcow2")
    os.mkdir("theirs")
    for name in ("base.qcow2", "middle.qcow2", "top.qcow2"):
        with open(name, "rb") as source, open(f"theirs/{name}", "wb") as target:
            target.write(source.read())
    diskwright.commit("top.qcow2", base=base)
    target = base or "middle.qcow2"
    assert content(target)[:third] == before
    extra = () if base is None else ("-b", base)
    done = real["qemu-img"].run("commit", *extra, "top.qcow2", cwd=folder / "theirs")
    assert done.code == 0, done
    assert content(f"theirs/{target}") == content(target)
    sound(real, folder, "base.qcow2", "middle.qcow2", "top.qcow2")


def test_commit_into_raw(folder, rng):
    with open("base.raw", "wb") as file:
        file.write(rng.randbytes(SIZE))
    diskwright.create("top.qcow2", format="qcow2", backing="base.raw", backing_format="raw")
    scribble("top.qcow2", rng)
    before = content("top.qcow2")
    diskwright.commit("top.qcow2")
    with open("base.raw", "rb") as file:
        assert file.read() == before


def test_a_cancelled_commit_loses_nothing(chain, real):
    before = content("top.qcow2")
    flag = threading.Event()
    with pytest.raises(CancelledError):
        diskwright.commit("top.qcow2", cancel=flag, progress=lambda *_: flag.set())
    assert content("top.qcow2") == before
    sound(real, chain, "base.qcow2", "middle.qcow2", "top.qcow2")


def test_commits_that_cannot_be(chain, real):
    for words, how in (
        (("-b", "gone.qcow2", "top.qcow2"), ("top.qcow2", {"base": "gone.qcow2"})),
        (("base.qcow2",), ("base.qcow2", {})),
        (("gone",), ("gone", {})),
    ):
        theirs = real["qemu-img"].run("commit", *words, cwd=chain)
        with pytest.raises(DiskwrightError) as caught:
            diskwright.commit(how[0], **how[1])
        assert f"qemu-img: {caught.value.qemu_message}" == theirs.err.strip()


# ------------------------------------------------------------------------------------------ rebase


@pytest.mark.parametrize("compress", [False, True])
def test_rebase_keeps_what_is_shown(chain, real, rng, compress):
    before = content("top.qcow2")
    diskwright.create("other.qcow2", SIZE, format="qcow2")
    scribble("other.qcow2", rng)
    diskwright.rebase("top.qcow2", "other.qcow2", backing_format="qcow2", compress=compress)
    assert diskwright.info("top.qcow2").details.backing_filename == "other.qcow2"
    assert content("top.qcow2") == before
    sound(real, chain, "top.qcow2")
    assert "identical" not in (
        real["qemu-img"].run("compare", "top.qcow2", "other.qcow2", cwd=chain).out
    )


def own_units(name: str) -> set[int]:
    """The clusters that the image decides itself."""
    return {
        unit
        for run in diskwright.map(name)
        if run.depth == 0 and run.present
        for unit in range(run.start >> 16, (run.start + run.length + 65535) >> 16)
    }


@pytest.mark.parametrize("target", ["base.qcow2", "short.qcow2", "long.qcow2", None])
def test_rebase_copies_what_qemu_copies(chain, real, target):
    diskwright.create("short.qcow2", MIB, format="qcow2")
    diskwright.create("long.qcow2", 2 * SIZE, format="qcow2")
    with diskwright.open("long.qcow2", read_only=False) as node:
        node.write(0, b"l" * 2 * SIZE)
    with open("top.qcow2", "rb") as source, open("theirs.qcow2", "wb") as copy:
        copy.write(source.read())
    before = content("top.qcow2")
    diskwright.rebase("top.qcow2", target, backing_format="qcow2" if target else None)
    words = ("-b", target, "-F", "qcow2") if target else ("-b", "")
    done = real["qemu-img"].run("rebase", *words, "theirs.qcow2", cwd=chain)
    assert done.code == 0, done
    assert content("top.qcow2") == before
    assert own_units("top.qcow2") == own_units("theirs.qcow2")
    sound(real, chain, "top.qcow2")


def test_unsafe_rebase_changes_the_name_only(chain, real):
    made = diskwright.rebase("top.qcow2", "moved.qcow2", backing_format="qcow2", unsafe=True)
    assert made.copied_bytes == 0
    assert diskwright.info("top.qcow2").details.backing_filename == "moved.qcow2"
    diskwright.rebase("top.qcow2", None, unsafe=True)
    assert diskwright.info("top.qcow2").details.backing_filename is None
    sound(real, chain, "top.qcow2")


def test_a_cancelled_rebase_shows_what_it_showed(chain, real):
    before = content("top.qcow2")
    flag = threading.Event()
    with pytest.raises(CancelledError):
        diskwright.rebase("top.qcow2", None, cancel=flag, progress=lambda *_: flag.set())
    assert content("top.qcow2") == before
    assert diskwright.info("top.qcow2").details.backing_filename == "middle.qcow2"
    sound(real, chain, "top.qcow2")


@pytest.mark.parametrize(
    ("words", "how"),
    [
        (("-b", "base.qcow2"), {"backing": "base.qcow2"}),
        (("-b", "gone", "-F", "qcow2"), {"backing": "gone", "backing_format": "qcow2"}),
        (("-b", "base.qcow2", "-F", "nope"), {"backing": "base.qcow2", "backing_format": "nope"}),
        (("-u", "-b", "gone"), {"backing": "gone", "unsafe": True}),
        (("-b", "top.qcow2", "-F", "qcow2"), {"backing": "top.qcow2", "backing_format": "qcow2"}),
    ],
)
def test_rebases_that_cannot_be(chain, real, words, how):
    theirs = real["qemu-img"].run("rebase", *words, "top.qcow2", cwd=chain)
    with pytest.raises(DiskwrightError) as caught:
        diskwright.rebase("top.qcow2", how.pop("backing"), **how)
    ours = f"qemu-img: {caught.value.qemu_message}".splitlines()
    assert ours[: len(theirs.err.splitlines())] == theirs.err.strip().splitlines()


# ----------------------------------------------------------------- what names its own kind only


@pytest.fixture(params=["vdi", "vpc"])
def format(request) -> str:
    return request.param


@pytest.fixture
def differencing(folder, rng, format):
    """top <- base in a format with parents, and an image that could be the parent instead."""
    for name in ("base", "other"):
        diskwright.create(name, SIZE, format=format)
        scribble(name, rng)
    made = diskwright.create("top", format=format, backing="base")
    with diskwright.open("base") as node:
        assert made.size == node.size
    assert (made.backing, made.backing_format) == ("base", format)
    assert f" backing=base size={made.size}" in made.announcement
    scribble("top", rng)
    return folder


def test_commit_of_the_middle_leaves_what_is_above(differencing, format, rng):
    diskwright.create("above", format=format, backing="top")
    scribble("above", rng)
    before = content("above")
    diskwright.commit("above")
    diskwright.commit("top")
    assert content("above") == content("base") == before


def test_rebase_of_a_differencing_image(differencing, format):
    before = content("top")
    made = diskwright.rebase("top", "other")
    assert (made.backing, made.backing_format) == ("other", format)
    assert content("top") == before
    with diskwright.open("top") as node:
        assert node.backing.node.filename.endswith("other")
        assert node.check().clean
    (differencing / "base").unlink()
    assert content("top") == before


def test_unsafe_rebase_of_a_differencing_image(differencing, format):
    """The name and the identifier change; long names find another place."""
    before = content("top")
    (differencing / "far").mkdir()
    for name in ("far/" + "n" * 200, "far/m", "back"):
        os.replace("base", name)
        if format == "vdi":  # which looks beside the image, and keeps no name
            os.replace(name, "base")
            name = "base"
        made = diskwright.rebase("top", name, unsafe=True)
        assert (made.backing, made.copied_bytes) == (name, 0)
        assert content("top") == before
        with diskwright.open("top", read_only=False) as node:
            assert node.check().clean
            node.write(0, before[:100])
        os.replace(name, "base")
        assert diskwright.rebase("top", "base", unsafe=True).backing == "base"
    diskwright.rebase("top", "other", unsafe=True)
    (differencing / "base").unlink()
    with diskwright.open("top") as node:
        assert node.read(0, 100) == before[:100]


@pytest.mark.parametrize("unsafe", [False, True])
def test_a_differencing_image_becomes_one_without_parent(differencing, real, format, unsafe):
    before = content("top")
    with diskwright.open("top") as node:
        own = [(run.offset, run.end) for run in node.extents(0, SIZE, depth=0) if run.allocated]
    diskwright.rebase("top", None, unsafe=unsafe)
    wanted = before
    if unsafe:
        wanted = bytearray(len(before))
        for start, stop in own:
            wanted[start:stop] = before[start:stop]
    (differencing / "base").unlink()
    assert content("top")[:SIZE] == wanted[:SIZE]
    with diskwright.open("top", read_only=False) as node:
        assert node.check().clean
        node.write(SIZE - 5000, b"more" * 100)
    copy = differencing / "copy"
    words = ("convert", "-f", format, "-O", "raw", "top", "copy")
    assert real["qemu-img"].run(*words, cwd=differencing).code == 0
    assert copy.read_bytes() == content("top")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"backing": "raw"}, "image, as a parent must be"),
        ({"backing": "gone"}, "image, as a parent must be"),
        ({"backing": "other", "backing_format": "raw"}, "image, as a parent must be"),
        ({"backing": "longer"}, "they must be alike"),
        ({"backing": "top"}, "its own parent"),
    ],
)
def test_parents_that_cannot_be(differencing, format, words, sentence):
    diskwright.create("longer", SIZE * 2, format=format)
    diskwright.create("raw", SIZE, format="raw")
    before = content("top")
    with pytest.raises(DiskwrightError, match=sentence):
        diskwright.rebase("top", unsafe=True, **words)
    assert content("top") == before


def test_create_needs_a_parent_of_its_kind(differencing, format):
    diskwright.create("raw", SIZE, format="raw")
    for words in ({"backing": "raw"}, {"backing": "gone"}, {"options": {"backing": "raw"}}):
        with pytest.raises(DiskwrightError, match="Could not open the backing file '(raw|gone)'"):
            diskwright.create("new", format=format, **words)
        assert not os.path.exists("new")
    with pytest.raises(DiskwrightError, match=f"is a {format} image too, not raw"):
        diskwright.create("new", format=format, backing="base", backing_format="raw")
    with pytest.raises(DiskwrightError, match="same filename"):
        diskwright.create("base", format=format, options={"backing": "base"})


def test_convert_over_a_parent(differencing, format):
    diskwright.convert("top", "copy", target_format=format, backing="base")
    assert content("copy") == content("top")
    assert diskwright.info("copy").details.backing_filename == "base"


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_rebase_hides_what_the_new_file_has_behind_the_old_ones_end(folder, compat):
    diskwright.create("short", SIZE // 2, format="raw")
    with open("long", "wb") as file:
        file.write(b"x" * SIZE)
    diskwright.create(
        "top.qcow2",
        SIZE,
        format="qcow2",
        backing="short",
        backing_format="raw",
        options={"compat": compat},
    )
    diskwright.rebase("top.qcow2", "long", backing_format="raw")
    assert content("top.qcow2") == bytes(SIZE)


@pytest.mark.parametrize("nodes", [["raw"], ["blkdebug"], ["raw", "blkdebug"]])
def test_what_lies_below_other_nodes_fills_up_a_cluster(chain, nodes):
    """Below an overlay may be nodes that pass an overlay on: what they show is no zeroes."""
    with diskwright.open("base.qcow2", read_only=False) as node:
        node.write(0, b"base" * MIB)
    overlay("middle.qcow2", "base.qcow2")
    spec: dict[str, object] = {"driver": "qcow2", "file": {"filename": "middle.qcow2"}}
    for name in nodes:
        spec = {"driver": name, "image" if name == "blkdebug" else "file": spec}
    diskwright.create("top.qcow2", SIZE, format="qcow2")
    top = {"driver": "qcow2", "file": {"filename": "top.qcow2"}, "backing": spec}
    wanted = bytearray(b"base" * MIB)
    with diskwright.open(top, read_only=False) as node:
        node.write(100_000, b"new")
        node.write_zeroes(300_000, 1000)
        wanted[100_000:100_003] = b"new"
        wanted[300_000:301_000] = bytes(1000)
        assert node.read(0, SIZE) == wanted
