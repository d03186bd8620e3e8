"""The end of a node: clean, twice, with an error on the way, in a forked child, and again."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from pathlib import Path

import pytest

import diskwright
from diskwright.block.graph import Graph
from diskwright.block.node import Node
from diskwright.errors import BrokenNodeError, DiskwrightError, IOFailure, ReadOnlyError
from tests.contract import races
from tests.contract.disk import Disk, check_clean, noise
from tests.contract.rows import Row, opened, rows

IN_MEMORY = rows(lambda row: row.cache == "writeback")


@rows()
def test_nothing_but_closing_is_needed(row: Row, tmp_path: Path, rng):
    path = str(tmp_path / "image")
    row.create(path)
    node = row.open(path)
    disk = Disk(node)
    disk.write(3000, noise(rng, 100_000))
    node.close()
    node.close()
    assert node.closed
    with row.open(path, read_only=True) as again:
        Disk(again, disk.model).verify()
        check_clean(again)


@rows()
def test_an_exception_closes_too(row: Row, tmp_path: Path, rng):
    data = noise(rng, 5000)
    path = str(tmp_path / "image")
    row.create(path)

    def fail() -> None:
        with row.open(path) as node:
            node.write(0, data)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with row.open(path) as again:
        assert again.read(0, 5000) == data
        check_clean(again)


def test_a_node_that_nobody_closes_is_told_of(tmp_path: Path):
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))

    def forget() -> None:
        with diskwright.open(str(path)):
            pass
        diskwright.open(str(path), format="raw")
        gc.collect()

    with pytest.warns(ResourceWarning, match="image' was not closed") as caught:
        forget()
    assert len(caught) == 1, "the file below it belongs to it"


@rows()
@pytest.mark.filterwarnings("ignore:.* was not closed:ResourceWarning")
def test_what_nobody_closes_is_given_back(row: Row, tmp_path: Path):
    path = str(tmp_path / "image")
    row.create(path)
    before = sorted(os.listdir("/proc/self/fd"))

    def forget() -> None:
        row.open(path).read(0, 512)

    for _ in range(2):  # the second finds no lock of the first
        forget()
        gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


@rows()
def test_who_gets_hold_of_what_nobody_closed_cannot_use_it(row: Row, tmp_path: Path):
    """The warning names the node, and with that it lives on; its descriptor is another's soon."""
    path = str(tmp_path / "image")
    row.create(path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        row.open(path).read(0, 512)
        gc.collect()
    node = next(one.source for one in told if isinstance(one.source, Node))
    assert node.closed
    with pytest.raises(DiskwrightError):
        node.read(0, 512)
    node.close()


class Leaking(Node):
    """A node whose end fails."""

    driver = "leaking"

    def _close(self) -> None:
        raise BrokenNodeError("cannot close")


def test_an_error_at_the_end_does_not_hide_the_one_before():
    with pytest.raises(ZeroDivisionError) as caught, Leaking(Graph(), "leaking"):
        raise ZeroDivisionError
    assert caught.value.__notes__ == ["closing it failed too: cannot close"]
    with pytest.raises(BrokenNodeError), Leaking(Graph(), "leaking"):
        pass


@rows()
def test_nothing_is_left_open(row: Row, tmp_path: Path):
    path = str(tmp_path / "image")
    row.create(path)
    before = sorted(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    for read_only in (False, True):
        with row.open(path, read_only=read_only) as node:
            node.read(0, 512)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads


@rows()
def test_opening_and_closing_changes_nothing(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        node.write(0, noise(rng, 5000))
        path = node.filename
    before = [Path(name).read_bytes() for name in row.files(path)]
    with row.open(path) as node:
        node.read(0, node.size)
        node.flush()
    assert [Path(name).read_bytes() for name in row.files(path)] == before


def _refusing(image: races.Image, kind: str):
    def fail(what: str) -> None:
        if what == kind:
            raise IOFailure(f"no {kind}")

    for store in image.stores:
        store.fail = fail


@IN_MEMORY
def test_a_failed_flush_is_final(row: Row):
    """Nobody knows what the disk has; a second fdatasync that succeeds proves nothing."""
    at = races.Image(row)
    node = at.node
    at.put(1, 0, 16)
    node.flush()
    at.put(2, 0, 16)
    _refusing(at, "flush")
    with pytest.raises(IOFailure):
        node.flush()
    _refusing(at, "nothing")
    with pytest.raises(BrokenNodeError) as caught:
        node.flush()
    assert caught.value.hint
    for action in (
        lambda: at.put(3, 0, 16),
        lambda: node.write_zeroes(0, 512),
        lambda: node.discard(0, 512),
    ):
        with pytest.raises(BrokenNodeError):
            action()
    assert at.found(0, 16) == [2] * 16
    node.close()
    assert node.closed
    with row.open(at.name) as again:
        again.write(0, b"as new")


@rows(lambda row: row.cache == "writeback" and row.driver != "raw")
def test_tables_that_cannot_be_written_break_the_node(row: Row):
    at = races.Image(row)
    node = at.node
    at.put(1, 0, 16)
    node.flush()
    at.put(2, 2 * at.sectors, 16)
    _refusing(at, "write")
    broke = node.cache is not None and bool(node.cache.dirty_slices)
    if broke:
        with pytest.raises(IOFailure):
            node.flush()
        _refusing(at, "nothing")
        with pytest.raises(BrokenNodeError):
            at.put(3, 0, 16)
        with pytest.raises(BrokenNodeError):
            node.flush()
    _refusing(at, "nothing")
    assert at.found(0, 16) == [1] * 16
    assert at.found(2 * at.sectors, 16) == [2] * 16
    node.close()
    with row.open(at.name) as again:
        assert races.numbers_of(again.read(0, 8192), 0) == [1] * 16
        check = again.check() if again.can_check else None
        assert check is None or not check.corruptions


@IN_MEMORY
def test_an_error_while_closing_closes_all(row: Row):
    at = races.Image(row)
    at.put(1, 0, 16)
    _refusing(at, "flush")
    with pytest.raises(DiskwrightError):
        at.node.close()
    assert at.node.closed
    assert not at.node.graph.nodes
    at.node.close()


@rows(lambda row: row.name in ("raw", "qcow2", "vdi", "vpc", "odd"))
def test_a_forked_child_is_dead(row: Row, tmp_path: Path, rng):
    """Even as other threads are inside: the child says why, closes, and harms nothing."""
    with opened(row, tmp_path) as node:
        data = noise(rng, 100_000)
        node.write(0, data)
        node.flush()
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                node.read(0, 512)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            statuses = [_forked(node) for _ in range(5)]
        finally:
            stop.set()
            for reader in readers:
                reader.join()
        assert statuses == [0] * 5
        node.write(5, b"the parent goes on")
        assert node.read(0, 5) == data[:5]
        check_clean(node)


def _forked(node) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: that is the point
        child = os.fork()
    if child:
        return _status(child)
    code = 3
    try:
        for action in (
            lambda: node.write(0, b"x"),
            lambda: node.read(0, 512),
            node.flush,
            lambda: node.truncate(0),
        ):
            with pytest.raises(DiskwrightError, match="forked"):
                action()
        node.close()
        code = 0
    finally:
        os._exit(code)


def _status(child: int) -> int:
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        threading.Event().wait(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


@rows(lambda row: row.name in ("raw", "qcow2", "odd"))
def test_a_forked_child_may_read_what_is_read_only(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        data = noise(rng, 100_000)
        node.write(0, data)
        path = node.filename
    with row.open(path, read_only=True) as node:
        node.read(0, 512)
        child = os.fork()
        if not child:
            code = 1
            try:
                code = int(node.read(0, 100_000) != data)
                node.close()
            finally:
                os._exit(code)
        assert _status(child) == 0
        assert node.read(0, 100_000) == data


@rows()
def test_reopening(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(1000, noise(rng, 50_000))
        node.reopen(read_only=True)
        assert node.read_only
        disk.verify()
        with pytest.raises(ReadOnlyError):
            node.write(0, b"x")
        with row.open(node.filename, read_only=True) as other:
            Disk(other, disk.model).verify()
        node.reopen(read_only=False)
        disk.write(2000, noise(rng, 100_000))
        node.reopen(cache="writethrough")
        disk.write(5, noise(rng, 5))
        disk.verify()
        check_clean(node)
        path = node.filename
    with row.open(path) as node:
        Disk(node, disk.model).verify()
