"""Reading and writing: every alignment, every kind of buffer, everything that is refused."""

from __future__ import annotations

import array
import ctypes
import io
import mmap
import os
from pathlib import Path

import pytest

from diskwright.block import node as node_module
from diskwright.block.node import Node
from diskwright.errors import DiskwrightError, IOFailure, RangeError, ReadOnlyError
from diskwright.system import host
from tests.contract import durable
from tests.contract.disk import Disk, boundaries, check_clean, noise
from tests.contract.rows import Row, opened, rows


@rows()
def test_a_new_image_reads_as_zero(row: Row, tmp_path: Path):
    with opened(row, tmp_path) as node:
        assert node.size == row.size or not row.exact_size
        assert node.read(0, node.size) == bytes(node.size)


@rows()
def test_writes_of_every_alignment(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        places = boundaries(node)
        cluster = max(node.limits.cluster_size, 512)
        lengths = sorted({1, 2, 511, 512, 513, 4096, 4097, min(cluster + 1, 1 << 18)})
        for length in lengths:
            for offset in rng.sample(places, min(len(places), 12)):
                part = min(length, node.size - offset)
                disk.write(offset, noise(rng, part))
                disk.verify(offset - 600, offset + part + 600)
        disk.verify()
        check_clean(node)
        path = node.filename
    with row.open(path, read_only=True) as node:
        Disk(node, disk.model).verify()
        check_clean(node)


@rows()
def test_reads_of_every_alignment(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        for _ in range(12):
            offset = rng.randrange(node.size)
            disk.write(offset, noise(rng, rng.randrange(1, min(90_000, node.size - offset) + 1)))
        places = boundaries(node)
        for start in places:
            for stop in rng.sample(places, 8):
                if start <= stop:
                    disk.verify(start, stop)


@rows()
def test_all_at_once(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        disk.write(0, noise(rng, node.size))
        disk.verify()
        disk.write(1, noise(rng, node.size - 2))
        disk.verify()
        check_clean(node)


def _buffers(data: bytes) -> dict[str, object]:
    mapped = mmap.mmap(-1, len(data))
    mapped[:] = data
    words = array.array("I")
    words.frombytes(data)
    return {
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "slice": memoryview(b"x" + data + b"y")[1:-1],
        "array": words,
        "mmap": mapped,
        "ctypes": (ctypes.c_ubyte * len(data)).from_buffer_copy(data),
        "two dimensions": memoryview(data).cast("B", shape=[4, len(data) // 4]),
        "signed": memoryview(data).cast("b"),
    }


@rows()
def test_buffers_of_all_kinds(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        for offset in (0, 512 * 3, 77):
            for name, buffer in _buffers(noise(rng, 4096)).items():
                expected = bytes(memoryview(buffer).cast("B") if name != "signed" else buffer)
                node.write(offset, buffer)
                assert node.read(offset, 4096) == expected, name
            for name, buffer in _buffers(bytes(4096)).items():
                if memoryview(buffer).readonly:
                    with pytest.raises((TypeError, BufferError)):
                        node.read_into(offset, buffer)
                    continue
                node.read_into(offset, buffer)
                assert bytes(memoryview(buffer).cast("B")) == expected, name


@rows()
def test_a_caller_keeps_its_buffer(row: Row, tmp_path: Path, rng):
    """Nothing holds on to it, and nothing changes it (an encrypted format must copy)."""
    with opened(row, tmp_path) as node:
        data = bytearray(noise(rng, 70_000))
        before = bytes(data)
        node.write(1000, data)
        assert data == before
        data.extend(b"possible only while nobody exports the buffer")
        node.write(1000, memoryview(before))
        read = bytearray(70_000)
        node.read_into(1000, read)
        read.extend(b"x")


@rows()
def test_a_buffer_with_gaps_is_refused(row: Row, tmp_path: Path):
    with opened(row, tmp_path) as node:
        with pytest.raises((TypeError, BufferError, ValueError)):
            node.write(0, memoryview(b"abcdefgh" * 512)[::2])
        assert node.read(0, 4096) == bytes(4096)


@rows()
def test_beyond_the_end_is_refused(row: Row, tmp_path: Path):
    with opened(row, tmp_path) as node:
        size = node.size
        node.write(size - 4, b"last")
        for offset, length in [(size, 1), (size - 1, 2), (-1, 1), (0, size + 1), (1 << 70, 1)]:
            with pytest.raises(RangeError):
                node.read(offset, length)
            with pytest.raises(RangeError):
                node.read_into(offset, bytearray(length))
            with pytest.raises(RangeError):
                node.write_zeroes(offset, length)
            with pytest.raises(RangeError):
                node.discard(offset, length)
            with pytest.raises(RangeError):
                list(node.extents(offset, length))
            with pytest.raises(RangeError):
                node.write(offset, bytes(length))
        with pytest.raises(RangeError):
            node.read(5, -1)
        assert node.size == size
        assert node.read(size - 4, 4) == b"last"


@rows()
def test_nothing_is_a_request_too(row: Row, tmp_path: Path):
    with opened(row, tmp_path) as node:
        for offset in (0, 1, 4096, node.size - 1, node.size):
            assert node.read(offset, 0) == b""
            node.read_into(offset, bytearray())
            node.write(offset, b"")
            node.write_zeroes(offset, 0)
            node.discard(offset, 0)
            assert list(node.extents(offset, 0)) == []
        for action in (node.read, node.write_zeroes, node.discard):
            with pytest.raises(RangeError):
                action(node.size + 1, 0)
        assert node.read(0, node.size) == bytes(node.size)


@rows()
def test_a_read_only_node_changes_nothing(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        node.write(3000, noise(rng, 5000))
        path = node.filename
    before = [Path(name).read_bytes() for name in row.files(path)]
    with row.open(path, read_only=True) as node:
        for action in (
            lambda: node.write(0, b"x"),
            lambda: node.write(0, b""),
            lambda: node.write_zeroes(0, 512),
            lambda: node.discard(0, node.size),
            lambda: node.truncate(node.size * 2),
        ):
            with pytest.raises(ReadOnlyError):
                action()
        node.flush()
        assert not node.can_discard
        assert not node.can_zero
    assert [Path(name).read_bytes() for name in row.files(path)] == before


@rows(lambda row: row.cache == "writeback")
@pytest.mark.parametrize("how", durable.HOWS)
def test_what_is_durable_outlives_a_crash(row: Row, how: str):
    durable.outlives_a_crash(row, how)


@rows(lambda row: row.cache == "writeback" and row.encodes)
def test_an_encoded_unit_is_durable_under_writethrough(row: Row):
    durable.outlives_a_crash(row, "encoded")


@rows()
def test_as_a_file(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node, node.as_file() as file:
        data = noise(rng, 10_000)
        assert file.seek(5000) == 5000
        assert file.write(data) == len(data)
        file.flush()
        assert file.seek(-len(data), os.SEEK_CUR) == 5000
        buffered = io.BufferedReader(file)
        assert buffered.read(10_000) == data
        assert buffered.detach() is file  # or it would be closed with the buffer
        file.seek(0, os.SEEK_END)
        assert file.read(10) == b""
        with pytest.raises(OSError, match="no more room"):
            file.write(b"more")
    assert node.closed


class Failing:
    """Makes the system calls of the short way, and of the long one, fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def start(self, number: int) -> None:
        def raises(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        self.patch.setattr(node_module, "_pread", raises)
        self.patch.setattr(node_module, "_pwrite", raises)
        self.patch.setattr(os, "preadv", raises)
        self.patch.setattr(host, "read_into", raises)
        self.patch.setattr(host, "write_all", raises)

    def stop(self) -> None:
        self.patch.undo()


@pytest.fixture
def failing(monkeypatch):
    return Failing(monkeypatch)


@rows(lambda row: row.cache == "writeback")
def test_an_error_of_the_system_is_one_of_ours(row: Row, tmp_path: Path, failing: Failing):
    with opened(row, tmp_path) as node:
        node.write(0, b"x" * 8192)
        node.write(0, b"y" * 8192)
        node.flush()
        failing.start(5)
        for action in (
            lambda: node.read(512, 4096),
            lambda: node.read_into(512, bytearray(4096)),
            lambda: node.write(512, b"z" * 4096),
        ):
            with pytest.raises(DiskwrightError) as caught:
                action()
            assert isinstance(caught.value, IOFailure)
            assert caught.value.errno == 5
        failing.stop()
        assert node.read(0, 8192) == b"y" * 8192


@rows()
def test_a_closed_node_says_so(row: Row, tmp_path: Path):
    with opened(row, tmp_path) as node:
        node.write(0, b"x" * 4096)
        node.write(0, b"x" * 4096)
    for action in _everything(node):
        with pytest.raises(DiskwrightError) as caught:
            action()
        assert caught.value.kind == "closed"


def _everything(node: Node):
    return [
        lambda: node.read(0, 512),
        lambda: node.read_into(0, bytearray(512)),
        lambda: node.write(0, b"x"),
        lambda: node.write_zeroes(0, 512),
        lambda: node.discard(0, 512),
        lambda: node.flush(),
        lambda: list(node.extents(0, 512)),
        lambda: node.populate(0, 512),
        lambda: node.info(),
        lambda: node.truncate(512),
    ]
