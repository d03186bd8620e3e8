"""The package's face: what `import diskwright` offers, and how it opens images."""

from __future__ import annotations

import doctest
import importlib
import io
import os
import subprocess
import sys

import pytest

import diskwright
from diskwright.errors import (
    LockError,
    NotFoundError,
    OptionError,
    PolicyError,
    RangeError,
    UsageError,
)

OPERATIONS = [name for name in diskwright.__all__ if name[0].islower()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_name_is_there():
    for name in diskwright.__all__:
        assert getattr(diskwright, name) is not None
    assert set(diskwright.__all__) <= set(dir(diskwright))
    with pytest.raises(AttributeError):
        getattr(diskwright, "nothing_of_that_name")  # noqa: B009 - mypy knows it is not there


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert diskwright.__version__ == version("diskwright")


@pytest.mark.parametrize("name", OPERATIONS)
def test_examples_in_the_docstrings(folder, name):
    module = importlib.import_module(getattr(diskwright, name).__module__)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert not result.failed
    assert ">>>" in (getattr(diskwright, name).__doc__ or ""), "it has no example"


def test_names_of_every_kind_open_the_same_image(folder):
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    for name in (
        "disk.qcow2",
        folder / "disk.qcow2",
        "file:disk.qcow2",
        'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "disk.qcow2"}}',
        {"driver": "qcow2", "file": {"driver": "file", "filename": "disk.qcow2"}},
    ):
        with diskwright.open(name) as node:
            assert (node.driver, node.size, node.read_only) == ("qcow2", 1 << 20, True)


def test_options_and_cache_modes(folder):
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    how = {"read_only": False, "cache": "writethrough", "options": {"lazy-refcounts": "on"}}
    with diskwright.open("disk.qcow2", **how) as node:
        node.write(0, b"x")
    with pytest.raises(OptionError):
        diskwright.open("disk.qcow2", cache="nope")
    with pytest.raises(OptionError):
        diskwright.open("disk.qcow2", options={"nope": "1"})
    with pytest.raises(OptionError):
        diskwright.open("disk.qcow2", read_only=False, force_share=True)


WRONG = {
    "options that are a list": lambda: diskwright.open("disk", options=[1]),
    "an option without a name": lambda: diskwright.open("disk", options={1: 2}),
    "a policy": lambda: diskwright.open("disk", policy=5),
    "a format": lambda: diskwright.open("disk", format=5),
    "the format of what is described": lambda: diskwright.info("disk", format=0),
    "a number of threads": lambda: diskwright.convert("disk", "new", threads="2"),
    "read_only": lambda: diskwright.open("disk", read_only="no"),
    "what cancels": lambda: diskwright.convert("disk", "new", cancel=5),
    "a snapshot": lambda: diskwright.convert("disk", "new", snapshot=5),
    "what salvages": lambda: diskwright.convert("disk", "new", salvage=5),
    "what shows progress": lambda: diskwright.convert("disk", "new", progress=5),
    "a start": lambda: diskwright.map("disk", start="x"),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_arguments_of_a_wrong_kind_are_refused_by_name(folder, call):
    diskwright.create("disk", "1M", format="qcow2")
    with pytest.raises(OptionError, match="not an object of type"):
        call()
    assert not os.path.exists("new")


def test_ranges_that_are_none(folder):
    diskwright.create("disk", "1M", format="qcow2")
    for part in ({"start": -1}, {"length": -1}):
        with pytest.raises(RangeError):
            diskwright.map("disk", **part)
    with diskwright.open("disk", read_only=False) as node:
        for call in (node.discard, node.write_zeroes, node.read):
            with pytest.raises(TypeError):
                call(1.5, 1)


def test_a_writable_node_shares_reading_only(folder):
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    code = (
        "import sys, diskwright\n"
        "try:\n"
        "    diskwright.open('disk.qcow2', read_only=sys.argv[1] != 'rw').close()\n"
        "    print('opened')\n"
        "except diskwright.DiskwrightError as error:\n"
        "    print(error.kind)\n"
    )

    def another(mode: str) -> str:
        root = os.path.dirname(os.path.dirname(diskwright.__file__))
        return subprocess.run(
            [sys.executable, "-c", code, mode],
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    with diskwright.open("disk.qcow2", read_only=False):
        assert another("rw") == "locked"
        with pytest.raises(LockError):
            diskwright.open("disk.qcow2", read_only=False)
        with diskwright.open("disk.qcow2", force_share=True):
            pass
    assert another("rw") == "opened"


def test_references_out_of_the_folder_are_refused(folder):
    os.mkdir("in")
    diskwright.create("secret.qcow2", "1M", format="qcow2")
    diskwright.create(
        "in/stranger.qcow2", format="qcow2", backing="../secret.qcow2", backing_format="qcow2"
    )
    for call in (diskwright.open, diskwright.map):
        with pytest.raises(PolicyError):
            call("in/stranger.qcow2")
    with pytest.raises(PolicyError):
        diskwright.convert("in/stranger.qcow2", "out.raw")
    assert not os.path.exists("out.raw")
    asked = []
    policy = diskwright.Ask(lambda *about: asked.append(about) or True)
    diskwright.open("in/stranger.qcow2", policy=policy).close()
    assert asked == [("backing file", "in/../secret.qcow2", "in/stranger.qcow2")]
    diskwright.open("in/stranger.qcow2", policy=diskwright.FollowAll()).close()
    with pytest.raises(PolicyError):
        diskwright.open("in/stranger.qcow2", policy=diskwright.FollowNothing())


def test_what_the_caller_names_is_opened_and_what_that_names_is_not(folder):
    os.mkdir("in")
    diskwright.create("secret.qcow2", "1M", format="qcow2")
    diskwright.create(
        "in/stranger.qcow2", format="qcow2", backing="../secret.qcow2", backing_format="qcow2"
    )
    diskwright.create("disk.raw", "1M")
    diskwright.create("sound.qcow2", "1M", format="qcow2")
    os.mkdir("out")
    how = {"backing": "../in/stranger.qcow2", "backing_format": "qcow2"}
    sound = {"backing": "../sound.qcow2", "backing_format": "qcow2"}
    diskwright.create("out/one.qcow2", format="qcow2", **sound)
    diskwright.convert("disk.raw", "out/two.qcow2", target_format="qcow2", **sound)
    trusting = diskwright.FollowAll()
    diskwright.rebase("out/two.qcow2", policy=trusting, **sound)
    for call in (
        lambda policy=None: diskwright.create("out/x", format="qcow2", policy=policy, **how),
        lambda policy=None: diskwright.convert(
            "disk.raw", "out/x", target_format="qcow2", policy=policy, **how
        ),
    ):
        with pytest.raises(PolicyError):
            call()
        assert not os.path.exists("out/x")
        call(trusting)
        os.unlink("out/x")


def test_as_a_file(folder):
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    with diskwright.open("disk.qcow2", read_only=False) as node:
        with io.BufferedRandom(node.as_file()) as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"tail!")
        assert node.read((1 << 20) - 5, 5) == b"tail!"


def test_errors_of_a_file_are_those_of_files(folder):
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    with diskwright.open("disk.qcow2") as node:
        file = node.as_file()
        for refused in (lambda: file.write(b"x"), lambda: file.truncate(512)):
            with pytest.raises(io.UnsupportedOperation):
                refused()
        for wrong in (lambda: file.seek(0, 7), lambda: file.seek(-1), lambda: file.truncate(-1)):
            with pytest.raises(ValueError):
                wrong()
        file.close()
        for late in (lambda: file.read(1), file.tell, lambda: file.seek(0)):
            with pytest.raises(ValueError):
                late()
        open_still = node.as_file()
    with pytest.raises(ValueError):
        open_still.read(1)
    rules = {"event": "read_aio", "errno": 5}
    broken = {
        "driver": "raw",
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": "disk.qcow2"},
            "inject-error": [rules],
        },
    }
    with diskwright.open(broken) as node:
        with pytest.raises(OSError) as caught:
            node.as_file().read(1)
        assert caught.value.errno == 5
        assert isinstance(caught.value.__cause__, diskwright.DiskwrightError)
    with diskwright.open("disk.qcow2", read_only=False) as node:
        with pytest.raises(io.UnsupportedOperation) as caught:
            node.as_file().truncate(1000)  # no whole sectors
        assert isinstance(caught.value.__cause__, diskwright.DiskwrightError)


def test_names_are_paths_of_every_kind(folder):
    from pathlib import Path

    for name in (b"disk-\xff.qcow2", Path("p.qcow2"), "t.qcow2"):
        diskwright.create(name, "1M", format="qcow2")
        with diskwright.open(name) as node:
            assert node.size == 1 << 20
        assert diskwright.info({"driver": "file", "filename": name}).format == "file"
        diskwright.convert(name, b"copy", target_format="raw")
    assert os.path.exists(b"disk-\xff.qcow2")
    for name in (5, None, ["a"], object()):
        for call in (diskwright.open, diskwright.info, diskwright.check, diskwright.inspect):
            with pytest.raises(diskwright.DiskwrightError, match="named by a path"):
                call(name)
        with pytest.raises(diskwright.DiskwrightError, match="named by a path"):
            diskwright.create(name, "1M")


# ----------------------------------------------------------------------------------------- inspect


def rules(name: str) -> dict[str, bool | None]:
    return {rule.name: rule.passed for rule in diskwright.inspect(name).rules}


def test_inspect_opens_nothing_but_the_image(folder, monkeypatch):
    os.mkdir("in")
    diskwright.create("secret.qcow2", "1M", format="qcow2")
    diskwright.create(
        "in/stranger.qcow2", format="qcow2", backing="../secret.qcow2", backing_format="qcow2"
    )
    opened = []
    plain = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or plain(path, *rest))
    report = diskwright.inspect("in/stranger.qcow2")
    assert set(opened) == {"in/stranger.qcow2"}
    assert not report.safe
    (reference,) = report.references
    assert (reference.role, reference.name) == ("backing file", "../secret.qcow2")
    assert reference.format == "qcow2"
    failed = [rule for rule in report.rules if not rule.passed]
    assert [rule.name for rule in failed] == ["names nothing outside of its folder"]
    assert "outside of the image's folder" in failed[0].why


def test_inspect_of_an_image_that_is_not_one(folder):
    with open("broken.qcow2", "wb") as file:
        file.write(b"QFI\xfb\0\0\0\3" + b"\xff" * 504)
    report = diskwright.inspect("broken.qcow2")
    assert report.error
    assert not report.safe
    assert rules("broken.qcow2")["opens"] is False
    with open("plain", "wb") as file:
        file.truncate(1 << 20)
    assert not rules("plain")["has a format of its own"]
    assert diskwright.inspect("plain", format="raw").safe


def test_inspect_wants_formats_said_and_images_closed(folder, real):
    done = real["qemu-img"].run("create", "-f", "qcow2", "base", "1M", cwd=folder)
    assert done.code == 0
    diskwright.create("over", "1M", format="qcow2", backing="base", backing_format="qcow2")
    assert diskwright.inspect("over").safe
    with open("over", "r+b") as file:
        head = bytearray(file.read(4096))
        head[72 + 7] |= 1  # the dirty bit of the incompatible features
        file.seek(0)
        file.write(head)
    assert not rules("over")["was closed"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: diskwright.open({"driver": "qcow2", "file": 5}),
        lambda: diskwright.info(5),
        lambda: diskwright.rebase("disk.qcow2", 5),
        lambda: diskwright.snapshot("disk.qcow2", create=5),
        lambda: diskwright.snapshot("disk.qcow2", create="\ud800"),
        lambda: diskwright.snapshot("disk.qcow2", create="n" * 256),
        lambda: diskwright.create("new", "1M", options=7),
        lambda: diskwright.create("new", 1.5),
        lambda: diskwright.create("\ud800", "1M"),
        lambda: diskwright.convert("disk.qcow2", 5),
        lambda: diskwright.convert("disk.qcow2", "new", threads=0),
        lambda: diskwright.resize("disk.qcow2", 1.5),
    ],
)
def test_wrong_arguments_are_errors_of_the_call(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    with pytest.raises(UsageError):
        call()
    assert [path.name for path in tmp_path.iterdir()] == ["disk.qcow2"]


def test_no_name_in_an_error_makes_a_second_line(tmp_path):
    base, path = str(tmp_path / "a\n\udcff"), str(tmp_path / "overlay")
    diskwright.create(base, 4096, format="raw")
    diskwright.create(path, 4096, format="qcow2", backing=base, backing_format="raw")
    os.unlink(base)
    with pytest.raises(NotFoundError) as caught:
        diskwright.open(path)
    said = caught.value.within("a\tb")
    assert "a\\n" not in str(said) and "/a\\x0a\\xff" in str(said) and str(said).isprintable()
    assert said.qemu_message.startswith("a\tb: ") and base in said.qemu_message
