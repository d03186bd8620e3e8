"""Reopening: the invariants of block/reopen.py, with locks as other programs see them."""

from __future__ import annotations

import os

import pytest

from diskwright.block import registry
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from diskwright.block.permission import CONSISTENT_READ
from diskwright.errors import (
    AccessError,
    LockError,
    OptionError,
    ReadOnlyError,
    UnsupportedError,
)

FORMATS = ("raw", "qcow2", "vdi", "vpc")
SIZE = 4 << 20


def make(path: str, driver: str) -> None:
    cls = registry.driver_class(driver)
    options = cls.create_options.validate({})
    cls.create(Opener(read_only=False), SIZE, {**options, "filename": path})


def opened(path: str, driver: str, *, read_only: bool) -> Node:
    shared = None if read_only else CONSISTENT_READ
    return open_image(Opener(read_only=read_only), path, format=driver, shared=shared)


@pytest.fixture(params=FORMATS)
def driver(request) -> str:
    return request.param


@pytest.fixture
def path(driver, tmp_path) -> str:
    name = str(tmp_path / f"image.{driver}")
    make(name, driver)
    return name


def test_a_node_becomes_writable_and_back(path, driver):
    with opened(path, driver, read_only=True) as node:
        with pytest.raises(ReadOnlyError):
            node.write(0, b"too early")
        node.reopen(read_only=False)
        node.write(1000, b"between")
        node.reopen(read_only=True)
        assert node.read(1000, 7) == b"between"
        with pytest.raises(ReadOnlyError):
            node.write(0, b"too late")
        with opened(path, driver, read_only=True) as other:
            assert other.read(1000, 7) == b"between"
        node.reopen(read_only=False)
        node.write(2 << 20, b"again")
    with opened(path, driver, read_only=True) as node:
        assert node.read(1000, 7) == b"between"
        assert node.read(2 << 20, 5) == b"again"


def watcher(path: str, driver: str) -> Node:
    """A reader who lets nobody write."""
    return open_image(Opener(read_only=True), path, format=driver, shared=CONSISTENT_READ)


def test_the_locks_follow(path, driver):
    with opened(path, driver, read_only=True) as node:
        watcher(path, driver).close()  # nobody minds
        node.reopen(read_only=False)
        with pytest.raises(LockError):
            watcher(path, driver)
        with pytest.raises(LockError):
            opened(path, driver, read_only=False)
        node.reopen(read_only=True)
        watcher(path, driver).close()
    opened(path, driver, read_only=False).close()


def test_a_refusal_changes_nothing(path, driver):
    with opened(path, driver, read_only=True) as node:
        with watcher(path, driver) as other:
            with pytest.raises(LockError):
                node.reopen(read_only=False)
            assert node.read_only
            assert other.read(0, 4) == node.read(0, 4) == bytes(4)
            with pytest.raises(ReadOnlyError):
                node.write(0, b"x")
        node.reopen(read_only=False)
        node.write(512, b"mine now")


def test_a_file_that_went_away_is_noticed(path, driver):
    with opened(path, driver, read_only=False) as node:
        node.write(0, b"kept")
        os.rename(path, path + ".away")
        make(path, driver)
        with pytest.raises(Exception, match="another file"):
            node.reopen(read_only=True)
        assert not node.read_only
        node.write(4, b" on")
        assert node.read(0, 7) == b"kept on"


def test_a_file_that_may_not_be_written(path, driver, monkeypatch):
    from diskwright.system import host

    real = host.open_file

    def refuse(name: str, *, read_only: bool, **how: object) -> int:
        if not read_only:
            raise PermissionError(13, "Permission denied")
        return real(name, read_only=read_only, **how)

    with opened(path, driver, read_only=True) as node:
        monkeypatch.setattr(host, "open_file", refuse)
        with pytest.raises(AccessError):
            node.reopen(read_only=False)
        assert node.read_only
        assert node.read(0, 4) == bytes(4)


def test_the_cache_mode_changes(path, driver):
    with opened(path, driver, read_only=False) as node:
        node.write(0, b"a" * 1000)
        node.reopen(cache="none")
        node.write(700, b"b" * 700)
        assert node.read(0, 1500) == b"a" * 700 + b"b" * 700 + bytes(100)
        node.reopen(cache="writethrough")
        assert node.write_through
        node.write(0, b"c")
        node.reopen(cache="writeback")
        assert not node.write_through
        assert node.read(0, 2) == b"ca"


def test_what_cannot_be_changed_is_refused_by_name(path, driver):
    with opened(path, driver, read_only=False) as node:
        with pytest.raises(UnsupportedError, match="no-such"):
            node.reopen(no_such="x")
        with pytest.raises(OptionError, match="fastest"):
            node.reopen(cache="fastest")
        child = next(iter(node.children.values())).node
        with pytest.raises(UnsupportedError, match="used by another node"):
            child.reopen(read_only=True)
        node.write(0, b"unharmed")


def test_a_filter_follows_what_is_below(tmp_path):
    make(str(tmp_path / "image.raw"), "raw")
    spec = {
        "driver": "raw",
        "file": {
            "driver": "blkdebug",
            "align": 1024,
            "image": {"driver": "file", "filename": str(tmp_path / "image.raw")},
        },
    }
    with open_image(Opener(read_only=True), spec) as node:
        node.reopen(read_only=False, cache="none")
        assert node.limits.request_alignment >= 1024
        node.write(100, b"through")
        assert node.read(98, 10) == b"\0\0through\0"


def test_lazy_refcounts_come_and_go(tmp_path):
    path = str(tmp_path / "image.qcow2")
    make(path, "qcow2")

    def is_dirty() -> bool:
        with open_image(Opener(force_share=True), path, format="qcow2") as other:
            return bool(other.info().dirty)

    with opened(path, "qcow2", read_only=False) as node:
        node.write(0, b"counted at once")
        assert not is_dirty()
        node.reopen(lazy_refcounts="on")
        node.write(1 << 20, b"counted later")
        node.flush()
        assert is_dirty()
        node.reopen(lazy_refcounts="off")
        assert not is_dirty()
        node.write(2 << 20, b"at once again")
        node.flush()
        assert not is_dirty()
    with opened(path, "qcow2", read_only=False) as node:
        assert node.check().clean


def test_what_every_node_takes_goes_to_a_child_too(tmp_path):
    """The file finds zeroes in what the image writes, also in place; other options stand by."""
    path = str(tmp_path / "image.qcow2")
    make(path, "qcow2")
    zeroes = bytes(1 << 16)

    def room() -> int:
        return os.stat(path).st_blocks * 512

    with opened(path, "qcow2", read_only=False) as node:
        file = node.children["file"].node
        node.write(0, b"x" * len(zeroes))
        node.flush()
        full = room()
        node.reopen(**{"file.detect-zeroes": "unmap", "file.discard": "unmap"})
        assert (file.detect_zeroes, node.detect_zeroes) == ("unmap", "")
        node.write(0, zeroes)
        node.flush()
        assert room() <= full - len(zeroes)
        assert node.read(0, len(zeroes)) == zeroes
        with pytest.raises(OptionError):
            node.reopen(**{"file.detect-zeroes": "perhaps"})
        node.reopen(**{"file.cache.no-flush": "on"})
        assert file.detect_zeroes == "unmap"
    spec = {
        "driver": "qcow2",
        "file": {
            "driver": "file",
            "filename": path,
            "detect-zeroes": "unmap",
            "discard": "unmap",
        },
    }
    with open_image(Opener(read_only=False), spec) as node:
        node.write(0, b"y" * len(zeroes))
        node.write(0, zeroes)
        node.flush()
        assert room() <= full - len(zeroes)


def test_a_snapshot_stays_read_only(tmp_path):
    from diskwright.block.info import SnapshotInfo

    path = str(tmp_path / "image.qcow2")
    make(path, "qcow2")
    with opened(path, "qcow2", read_only=False) as node:
        node.snapshot_create(SnapshotInfo("", "kept"))
    spec = {"driver": "qcow2", "snapshot": "kept", "file": {"driver": "file", "filename": path}}
    with open_image(Opener(), spec) as node:
        with pytest.raises(UnsupportedError, match="read-only only"):
            node.reopen(read_only=False)
        assert node.read_only


def test_nobody_who_shares_by_force_becomes_a_writer(path, driver):
    with (
        open_image(Opener(force_share=True), path, format=driver) as node,
        pytest.raises(OptionError, match="force-share"),
    ):
        node.reopen(read_only=False)
