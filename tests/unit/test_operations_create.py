"""Making images, resizing them, snapshots: the words and results are qemu-img's."""

from __future__ import annotations

import json
import os

import pytest

import diskwright
from diskwright.block.node import Node
from diskwright.block.permission import ALL, CONSISTENT_READ, RESIZE, WRITE
from diskwright.errors import DiskwrightError, LockError, NotFoundError, OptionError
from diskwright.operations.create import NewImage, create_image
from diskwright.operations.opening import Image
from diskwright.operations.resize import SizeChange
from diskwright.system.image_locks import ImageLocks
from diskwright.system.new_file import NewFile, open_new

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def info(real, folder, name: str) -> dict[str, object]:
    done = real["qemu-img"].run("info", "--output=json", name, cwd=folder)
    assert done.code == 0, done
    found = json.loads(done.out)
    for key in ("actual-size", "filename", "children"):
        found.pop(key, None)
    return found


CREATED = [
    ("raw", "1M", {}),
    ("raw", "1000", {}),
    ("raw", "0", {}),
    ("raw", "3M", {"preallocation": "full"}),
    ("qcow2", "10G", {}),
    ("qcow2", "1000", {}),
    ("qcow2", "5M", {"cluster_size": "4k", "lazy_refcounts": "on", "refcount_bits": "8"}),
    ("qcow2", "5M", {"compat": "0.10"}),
    ("qcow2", "5M", {"preallocation": "metadata", "compression_type": "zstd"}),
    ("qcow2", "5M", {"nocow": "on"}),
    ("vdi", "5M", {"static": "on"}),
    ("vpc", "5M", {"subformat": "fixed"}),
]


@pytest.mark.parametrize(("format", "size", "options"), CREATED)
def test_created_as_qemu_creates(folder, real, format, size, options):
    words = [f"{name}={value}" for name, value in options.items()]
    extra = ("-o", ",".join(words)) if words else ()
    theirs = real["qemu-img"].run("create", "-f", format, *extra, "disk", size, cwd=folder)
    wanted = info(real, folder, "disk")
    os.unlink("disk")
    ours = diskwright.create("disk", size, format=format, options=options)
    assert ours.announcement == theirs.out.strip()
    assert info(real, folder, "disk") == wanted
    if format != "vpc":
        assert ours.size == wanted["virtual-size"]


REFUSED = [
    (("-f", "nope", "x", "1M"), NewImage("x", format="nope", size=MIB)),
    (("-f", "null-co", "x", "1M"), NewImage("x", format="null-co", size=MIB)),
    (("x",), NewImage("x")),
    (("fob:x", "1M"), NewImage("fob:x", size=MIB)),
    (("gone/x", "1M"), NewImage("gone/x", size=MIB)),
    (("-o", "nope=1", "x", "1M"), NewImage("x", size=MIB, options={"nope": "1"})),
    (("-o", "size=2M", "x", "1M"), NewImage("x", size=MIB, options={"size": "2M"})),
    (("-o", "size=", "x"), NewImage("x", options={"size": ""})),
    (("-b", "base", "x"), NewImage("x", backing="base")),
    (("-f", "qcow2", "-b", "", "x"), NewImage("x", format="qcow2", backing="")),
    (("-f", "qcow2", "-b", "x", "-F", "raw", "x"),
     NewImage("x", format="qcow2", backing="x", backing_format="raw")),
    (("-f", "qcow2", "-b", "base", "x"), NewImage("x", format="qcow2", backing="base")),
    (("-f", "qcow2", "-b", "gone", "-F", "raw", "x"),
     NewImage("x", format="qcow2", backing="gone", backing_format="raw")),
    (("-f", "qcow2", "-b", "base", "-F", "nope", "x"),
     NewImage("x", format="qcow2", backing="base", backing_format="nope")),
    (("-u", "-f", "qcow2", "-b", "gone", "-F", "raw", "x"),
     NewImage("x", format="qcow2", backing="gone", backing_format="raw", check_backing=False)),
    (("-u", "-f", "qcow2", "-b", "gone", "x", "1M"),
     NewImage("x", format="qcow2", size=MIB, backing="gone", check_backing=False)),
    (("-f", "qcow2", "-F", "raw", "x", "1M"),
     NewImage("x", format="qcow2", size=MIB, backing_format="raw")),
    (("-f", "qcow2", "-o", "cluster_size=3k", "x", "1M"),
     NewImage("x", format="qcow2", size=MIB, options={"cluster_size": "3k"})),
    (("-f", "qcow2", "-o", "preallocation=x", "x", "1M"),
     NewImage("x", format="qcow2", size=MIB, options={"preallocation": "x"})),
]  # fmt: skip


@pytest.mark.parametrize(("words", "wanted"), REFUSED)
def test_refused_in_qemus_words(folder, real, words, wanted):
    diskwright.create("base", "1M")
    theirs = real["qemu-img"].run("create", *words, cwd=folder)
    assert theirs.code == 1
    left = os.path.exists("x")
    if left:
        os.unlink("x")
    said = []
    with pytest.raises(DiskwrightError) as caught:
        create_image(wanted, announce=said.append)
    assert f"qemu-img: {caught.value.qemu_message}" == theirs.err.strip()
    assert said == theirs.out.splitlines()
    assert not os.path.exists("x")


def test_size_and_format_of_a_backing_file(folder, real):
    diskwright.create("base.qcow2", "3M", format="qcow2")
    made = diskwright.create(
        "over.qcow2", format="qcow2", backing="base.qcow2", backing_format="qcow2"
    )
    assert made.size == 3 * MIB
    found = info(real, folder, "over.qcow2")
    assert found["backing-filename"] == "base.qcow2"
    assert found["backing-filename-format"] == "qcow2"
    os.mkdir("sub")
    made = diskwright.create(
        "sub/more.qcow2", format="qcow2", backing="../over.qcow2", backing_format="qcow2"
    )
    assert made.size == 3 * MIB, "the name is relative to the image"


def test_a_file_that_was_there_stays_when_its_name_is_refused(folder):
    with open("mine", "wb") as file:
        file.write(b"precious")
    with pytest.raises(OptionError):
        diskwright.create("mine", "1M", format="qcow2", options={"nope": "1"})
    with open("mine", "rb") as file:
        assert file.read() == b"precious"


# ------------------------------------------------------------------------------------------ resize


@pytest.mark.parametrize(
    ("format", "words", "how"),
    [
        ("qcow2", ("2M",), {"size": "2M"}),
        ("qcow2", ("+1M",), {"size": "+1M"}),
        ("qcow2", ("--shrink", "512k"), {"size": "512k", "shrink": True}),
        ("qcow2", ("--preallocation=full", "+1M"), {"size": "+1M", "preallocation": "full"}),
        ("raw", ("2M",), {"size": "2M"}),
        ("raw", ("--shrink", "-512k"), {"size": "-512k", "shrink": True}),
        ("qcow2", ("512k",), {"size": "512k"}),
        ("qcow2", ("-9M",), {"size": "-9M"}),
        ("qcow2", ("x",), {"size": "x"}),
        ("qcow2", ("+-1",), {"size": "+-1"}),
        ("qcow2", ("9E",), {"size": "9E"}),
        ("qcow2", ("--shrink", "--preallocation=full", "512k"),
         {"size": "512k", "shrink": True, "preallocation": "full"}),
        ("qcow2", ("--preallocation=x", "2M"), {"size": "2M", "preallocation": "x"}),
        ("raw", ("--preallocation=metadata", "2M"), {"size": "2M", "preallocation": "metadata"}),
        ("vdi", ("2M",), {"size": "2M"}),
    ],
)  # fmt: skip
def test_resized_as_qemu_resizes(folder, real, format, words, how):
    for name in ("theirs", "ours"):
        diskwright.create(name, "1M", format=format)
    flags = [word for word in words if word.startswith("--")]
    size = words[-1]
    argv = ("resize", *flags, "-f", format, "theirs", *(("--",) if size[0] == "-" else ()), size)
    if size[0] == "-":
        argv = ("resize", *flags, "-f", format, "theirs", size)
    theirs = real["qemu-img"].run(*argv, cwd=folder)
    if theirs.code:
        with pytest.raises(DiskwrightError) as caught:
            diskwright.resize("ours", format=format, **how)
        last = [line for line in theirs.err.splitlines() if "warning:" not in line]
        assert f"qemu-img: {caught.value.qemu_message}".splitlines() == last
    else:
        made = diskwright.resize("ours", format=format, **how)
        assert made.old_size == MIB
        assert made.new_size == info(real, folder, "theirs")["virtual-size"]
    assert info(real, folder, "ours") == info(real, folder, "theirs")


def test_size_changes():
    assert SizeChange.parse("+1k") == SizeChange(1024, 1)
    assert SizeChange.parse(5) == SizeChange(5)
    assert SizeChange.parse("-2").applied_to(10) == 8
    with pytest.raises(OptionError):
        SizeChange.parse("-2").applied_to(2)


# --------------------------------------------------------------------------------------- snapshots


def test_snapshots_come_and_go(folder, real):
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    with diskwright.open("disk.qcow2", read_only=False) as node:
        node.write(0, b"one")
    assert [kept.name for kept in diskwright.snapshot("disk.qcow2", create="first")] == ["first"]
    with diskwright.open("disk.qcow2", read_only=False) as node:
        node.write(0, b"two")
    kept = diskwright.snapshot("disk.qcow2", create="second")
    assert [(one.id, one.name) for one in kept] == [("1", "first"), ("2", "second")]
    shown = info(real, folder, "disk.qcow2")["snapshots"]
    assert [(one["id"], one["name"]) for one in shown] == [("1", "first"), ("2", "second")]
    diskwright.snapshot("disk.qcow2", apply="first")
    with diskwright.open("disk.qcow2") as node:
        assert node.read(0, 3) == b"one"
    diskwright.snapshot("disk.qcow2", apply="2")  # an id
    with diskwright.open("disk.qcow2") as node:
        assert node.read(0, 3) == b"two"
    with pytest.raises(NotFoundError):
        diskwright.snapshot("disk.qcow2", delete="1")  # not by an id
    assert [one.name for one in diskwright.snapshot("disk.qcow2", delete="first")] == ["second"]
    assert real["qemu-img"].run("check", "disk.qcow2", cwd=folder).code == 0
    with pytest.raises(OptionError):
        diskwright.snapshot("disk.qcow2", create="a", delete="b")


@pytest.mark.parametrize("format", ["qcow2", "raw", "vdi"])
@pytest.mark.parametrize(
    ("flag", "action"), [("-c", "create"), ("-a", "apply"), ("-d", "delete"), ("-l", None)]
)
def test_snapshots_that_cannot_be(folder, real, format, flag, action):
    diskwright.create("disk", "1M", format=format)
    words = (flag,) if action is None else (flag, "nope")
    # qemu-img has no way to say the format here
    spec = f"driver={format},file.filename=disk"
    theirs = real["qemu-img"].run("snapshot", "--image-opts", *words, spec, cwd=folder)
    how = {} if action is None else {action: "nope"}
    if theirs.code == 0:
        diskwright.snapshot("disk", format=format, **how)
        return
    with pytest.raises(DiskwrightError) as caught:
        diskwright.snapshot("disk", format=format, **how)
    assert f"qemu-img: {caught.value.qemu_message}" == theirs.err.strip()


def test_a_missing_file_is_not_found(folder):
    for call in (diskwright.open, diskwright.info, diskwright.check, diskwright.map):
        with pytest.raises(NotFoundError):
            call("gone")
    assert Image("gone").title == "gone"


def test_names_with_a_zero_byte_are_refused(folder):
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    for call in (
        lambda: diskwright.create("a\0b", "1M"),
        lambda: diskwright.create("a\0b", "1M", format="qcow2"),
        lambda: diskwright.create("x", "1M", backing="a\0b", backing_format="raw"),
        lambda: diskwright.open("a\0b"),
        lambda: diskwright.open({"driver": "file", "filename": "a\0b"}),
        lambda: diskwright.convert("disk.qcow2", "a\0b"),
        lambda: diskwright.rebase("disk.qcow2", "a\0b", backing_format="raw", unsafe=True),
        lambda: diskwright.rebase("disk.qcow2", "a", backing_format="r\0w", unsafe=True),
        lambda: diskwright.snapshot("disk.qcow2", create="a\0b"),
    ):
        with pytest.raises(OptionError, match="zero byte|Invalid format name"):
            call()
    assert diskwright.info("disk.qcow2").details.backing_filename is None


def test_a_file_that_another_writes_to_is_not_made_anew(folder):
    diskwright.create("disk", "1M", format="qcow2")
    with diskwright.open("disk", read_only=False) as node:
        node.write(0, b"precious")
        node.flush()
        with pytest.raises(LockError):
            diskwright.create("disk", "1M", format="qcow2")
        assert node.read(0, 8) == b"precious"
    with diskwright.open("disk") as node:
        assert node.read(0, 8) == b"precious"


def test_who_loses_a_race_leaves_the_winners_file(folder, monkeypatch):
    """The other process makes the file just before ours would, and goes on writing to it."""
    from diskwright.drivers.protocols.file.driver import File

    check, winner = File.check_place, []

    def overtaken(options: dict[str, object]) -> None:
        check(options)
        if not winner:
            winner.append(None)
            diskwright.create("disk", "1M", format="qcow2")
            winner[0] = diskwright.open("disk", read_only=False)

    monkeypatch.setattr(File, "check_place", overtaken)
    with pytest.raises(LockError):
        diskwright.create("disk", "1M", format="qcow2")
    winner[0].close()
    assert diskwright.info("disk").format == "qcow2"


@pytest.mark.parametrize("cache", ["unsafe", "none"])
def test_a_file_is_locked_from_its_making_to_its_end(folder, monkeypatch, cache):
    """Nobody can make it anew between two openings of the image that is made in it."""
    from diskwright.drivers.protocols.file.driver import File

    with open("source", "wb") as file:
        file.write(b"content" * 100_000)
    open_existing, refused = File._open_existing, []

    def is_locked() -> None:
        with pytest.raises(LockError):
            open_new("disk", WRITE | RESIZE, ALL & ~RESIZE)

    def overtaken(node: File, path: str, *, direct: bool, made: list[NewFile]) -> int:
        if path == "disk" and made:
            is_locked()
            refused.append(direct)
        return open_existing(node, path, direct=direct, made=made)

    monkeypatch.setattr(File, "_open_existing", overtaken)
    for format in ("qcow2", "vdi", "vpc", "raw"):
        refused.clear()
        diskwright.convert(
            "source",
            "disk",
            source_format="raw",
            target_format=format,
            cache=cache,
            progress=lambda *_: is_locked(),
        )
        assert len(refused) >= (1 if format == "raw" else 2)
        assert set(refused) == {cache == "none"}
        assert diskwright.compare(
            "source", "disk", first_format="raw", second_format=format
        ).identical
        open_new("disk", WRITE | RESIZE, ALL & ~RESIZE).close()


def test_an_image_is_made_where_no_open_file_can_be_lent(folder, monkeypatch):
    """On Windows its cache mode is that of its opening, so the image opens it anew."""
    from diskwright.system import host

    monkeypatch.setattr(host, "duplicate", lambda descriptor, *, direct: -1)
    diskwright.create("disk", "1M", format="qcow2")
    converted = diskwright.convert("disk", "other", target_format="vdi", cache="none")
    assert (converted.format, diskwright.check("other").clean) == ("vdi", True)


def test_locks_of_a_maker_stay_whatever_is_locked_beside_them(folder):
    made = open_new("disk", WRITE | RESIZE, ALL & ~RESIZE)
    with open("disk") as other:
        locks = ImageLocks(other.fileno(), "disk")
        with pytest.raises(LockError):
            locks.change(RESIZE, ALL)
        made.share()
        locks.change(RESIZE, ALL)
    lent = made.lend("disk", direct=False)
    locks = ImageLocks(lent, "disk", made.used)
    with open("disk") as other:
        ImageLocks(other.fileno(), "disk").change(CONSISTENT_READ, ALL)
        with pytest.raises(LockError):
            locks.change(0, ALL & ~CONSISTENT_READ)
        with pytest.raises(LockError):
            ImageLocks(other.fileno(), "disk").change(0, ALL & ~RESIZE)
    locks.change(CONSISTENT_READ, ALL & ~WRITE)
    assert (locks.used, locks.shared) == (CONSISTENT_READ | WRITE | RESIZE, ALL & ~WRITE)
    locks.change(0, ALL)
    assert (locks.used, locks.shared) == (WRITE | RESIZE, ALL)
    os.close(lent)
    made.close()


def test_a_file_that_was_made_is_removed_if_it_is_still_that_one(folder):
    held: list[Node] = []
    for overtaken in (
        lambda: None,
        lambda: os.rename("other", "disk"),
        lambda: held.append(diskwright.open("disk", format="raw", read_only=False)),
    ):
        with open("other", "w"):
            pass
        made = open_new("disk", WRITE | RESIZE, ALL & ~RESIZE)
        made.close()
        overtaken()
        made.remove()
        assert os.path.exists("disk") == (bool(held) or not os.path.exists("other"))
        for node in held:
            node.close()


def test_a_file_that_is_removed_while_it_is_opened_is_made_anew(folder, monkeypatch):
    """Its maker gave up between our opening it and our locks."""
    change, gone = ImageLocks.change, []

    def removed(locks: ImageLocks, used: int, shared: int) -> None:
        change(locks, used, shared)
        if not gone:
            gone.append(os.unlink("disk"))

    monkeypatch.setattr(ImageLocks, "change", removed)
    made = open_new("disk", WRITE | RESIZE, ALL & ~RESIZE)
    assert os.path.samestat(os.fstat(made.descriptor), os.stat("disk"))
    made.close()
