"""The file driver on real files: words, holes, zeroes, sizes, direct I/O; locks beside QEMU's."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from diskwright.block.extent import DATA, ZERO
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from diskwright.block.permission import ALL, CONSISTENT_READ, RESIZE, WRITE
from diskwright.drivers.protocols.file.driver import File, HostDevice
from diskwright.errors import (
    AccessError,
    DiskwrightError,
    IOFailure,
    LockError,
    NotFoundError,
    OptionError,
    UnsupportedError,
)
from diskwright.operations.create import NewImage, create_image
from diskwright.system import host

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
qemu = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")


def opened(
    path: Path | str,
    *,
    cache: str = "writeback",
    read_only: bool = False,
    driver: str = "file",
    **options: Any,
) -> Node:
    opener = Opener(read_only=read_only, cache=cache)
    return open_image(opener, {"driver": driver, "filename": str(path), **options})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\x5a" * MIB)
    return path


# ----------------------------------------------------------------------------- opening


def test_read_write_and_close(image: Path) -> None:
    with opened(image) as node:
        assert node.size == MIB
        node.write(1000, b"hello")
        node.flush()
        assert node.read(998, 9) == b"\x5a\x5ahello\x5a\x5a"
    assert image.read_bytes()[1000:1005] == b"hello"


def test_missing_file_in_qemus_words(tmp_path: Path) -> None:
    path = tmp_path / "none"
    with pytest.raises(NotFoundError) as caught:
        opened(path)
    assert caught.value.qemu_message == f"Could not open '{path}': No such file or directory"


def test_directory_in_qemus_words(tmp_path: Path) -> None:
    with pytest.raises(IOFailure) as caught:
        opened(tmp_path, read_only=True)
    assert str(caught.value) == f"'file' driver requires '{tmp_path}' to be a regular file"
    with pytest.raises(IOFailure) as caught:
        opened(tmp_path)
    assert str(caught.value) == f"Could not open '{tmp_path}': Is a directory"


@linux
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IOFailure, match="regular file"):
        opened(tmp_path / "pipe")


def test_permission_denied(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, **words: Any) -> int:
        raise PermissionError(errno.EACCES, "no", path)

    monkeypatch.setattr(host, "open_file", refuse)
    with pytest.raises(AccessError) as caught:
        opened(image)
    assert caught.value.qemu_message == f"Could not open '{image}': Permission denied"


def test_options_are_checked(image: Path) -> None:
    with pytest.raises(OptionError, match="file name is needed"):
        opened("")
    with pytest.raises(OptionError, match=r"requires cache\.direct=on"):
        opened(image, aio="native")
    with pytest.raises(OptionError):
        opened(image, locking="perhaps")


# ------------------------------------------------------------------- holes and zeroes


@linux
def test_extents_are_the_file_systems(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
        file.seek(MIB)
        file.write(b"x" * 65536)
    with opened(path, read_only=True) as node:
        found = [(e.offset, e.length, e.kind, e.host_offset) for e in node.extents(0, 4 * MIB)]
    assert found == [
        (0, MIB, ZERO, 0),
        (MIB, 65536, DATA, MIB),
        (MIB + 65536, 3 * MIB - 65536, ZERO, MIB + 65536),
    ]


@linux
@pytest.mark.parametrize("unmap", [False, True])
def test_zeroing_reads_as_zero_and_may_free(image: Path, unmap: bool) -> None:
    with opened(image) as node:
        node.write_zeroes(4096, 65536, unmap=unmap, fast=True)
        assert node.read(4095, 65538) == b"\x5a" + bytes(65536) + b"\x5a"
    freed = MIB - host.allocated_size(str(image))
    assert (freed >= 65536) is unmap


@linux
def test_zeroing_falls_back_to_hole_and_reservation(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(host, "zero_range", refuse)
    with opened(image) as node:
        node.write_zeroes(0, 65536)
        assert node.read(0, 65537) == bytes(65536) + b"\x5a"
        assert host.allocated_size(str(image)) >= MIB
        monkeypatch.setattr(host, "punch_hole", refuse)
        node.write_zeroes(65536, 65536)  # learns that there are no holes, and writes
        assert node.read(65536, 65537) == bytes(65536) + b"\x5a"
        with pytest.raises(UnsupportedError):
            node.write_zeroes(0, 65536, fast=True)


@linux
def test_discard_gives_space_back(image: Path) -> None:
    with opened(image) as node:
        node.discard(0, MIB)
    assert host.allocated_size(str(image)) == 0


@linux
def test_an_error_of_the_disk_is_not_taken_for_unsupported(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(host, "zero_range", fail)
    with opened(image) as node, pytest.raises(IOFailure) as caught:
        node.write_zeroes(0, 4096)
    assert caught.value.errno == errno.EIO


# ---------------------------------------------------------------------------- writing


def test_short_transfers_are_continued(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, real_read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real_read(fd, [views[0][:5]], at))
    descriptor = os.open(image, os.O_RDWR)
    try:
        text = bytes(range(100))
        assert host.write_all(descriptor, 3, memoryview(text)) == 100
        out = bytearray(100)
        assert host.read_into(descriptor, 3, memoryview(out)) == 100
        assert out == text
        assert host.read_into(descriptor, MIB - 9, memoryview(out)) == 9
    finally:
        os.close(descriptor)


def test_growing_never_cuts_off_what_another_thread_appends(tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"")
    step = 4096
    with opened(path) as node:
        child = node.parents[0]

        def append(first: int) -> None:
            for n in range(first, 200, 4):
                if first % 2:
                    child.write(n * step, bytes([n]) * step)
                else:
                    child.write_zeroes(n * step, step, unmap=True)
                    child.grow((n + 1) * step)

        threads = [threading.Thread(target=append, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    content = path.read_bytes()
    assert len(content) == 200 * step
    for n in range(200):
        wanted = bytes([n]) if n % 2 else b"\0"
        assert content[n * step : (n + 1) * step] == wanted * step


@pytest.mark.parametrize(("cache", "flushes"), [("writeback", 1), ("unsafe", 0)])
def test_cache_modes_flush(
    image: Path, monkeypatch: pytest.MonkeyPatch, cache: str, flushes: int
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(host, "sync_data", seen.append)
    with opened(image, cache=cache) as node:
        node.write(0, b"x")
        node.flush()
        assert len(seen) == flushes


def test_writethrough_flushes_each_write(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(host, "sync_data", seen.append)
    with opened(image, cache="writethrough") as node:
        node.write(0, b"x")
        node.write(1, b"y")
        assert len(seen) == 2


# -------------------------------------------------------------------------- direct I/O


def _direct(path: Path) -> Node:
    try:
        return opened(path, cache="none")
    except IOFailure as error:
        pytest.skip(f"no direct I/O here: {error}")


@linux
def test_direct_io_pads_and_bounces(image: Path) -> None:
    with _direct(image) as node:
        assert node.limits.request_alignment in (512, 1024, 2048, 4096)
        assert node._lend() is None
        node.write(1000, b"hello")
        assert node.read(999, 7) == b"\x5ahello\x5a"
        memory = bytearray(8192 + 3)
        node.read_into(4096, memoryview(memory)[3:])  # aligned request, unaligned memory
        assert memory[3:] == b"\x5a" * 8192
        node.write(8192, memoryview(b"..." + b"q" * 8192)[3:])
        assert node.read(8191, 8194) == b"\x5a" + b"q" * 8192 + b"\x5a"


@linux
def test_direct_io_on_a_file_of_odd_size(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"a" * 1000)
    with _direct(path) as node:
        assert node.size == 1000
        assert node.read(0, 1000) == b"a" * 1000
        node.write(990, b"b" * 10)
        assert node.read(980, 20) == b"a" * 10 + b"b" * 10
    assert path.read_bytes() == b"a" * 990 + b"b" * 10


# -------------------------------------------------------------------------------- size


@linux
@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_truncate_preallocates(image: Path, preallocation: str) -> None:
    with opened(image) as node:
        node.truncate(2 * MIB, preallocation=preallocation)
        assert node.size == 2 * MIB
        assert node.read(MIB, MIB) == bytes(MIB)
    assert image.stat().st_size == 2 * MIB
    assert (host.allocated_size(str(image)) >= 2 * MIB) is (preallocation != "off")


def test_truncate_refusals(image: Path) -> None:
    with opened(image) as node:
        with pytest.raises(UnsupportedError, match="Unsupported preallocation mode: metadata"):
            node.truncate(2 * MIB, preallocation="metadata")
        with pytest.raises(UnsupportedError, match="shrinking"):
            node.truncate(4096, preallocation="falloc")
        with pytest.raises(IOFailure) as caught:
            node.truncate(20 << 50)
        assert caught.value.qemu_message == "Could not resize file: File too large"
        assert node.size == MIB
    assert image.stat().st_size == MIB


def test_failed_preallocation_leaves_the_old_size(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(host, "preallocate", full)
    with opened(image) as node, pytest.raises(IOFailure) as caught:
        node.truncate(2 * MIB, preallocation="falloc")
    assert str(caught.value) == "Could not preallocate new data: No space left on device"
    assert image.stat().st_size == MIB


def test_a_size_that_is_too_long_takes_no_space(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length is set first: with that refused, nothing is reserved for it."""
    reserved: list[object] = []
    set_length = os.ftruncate

    def short(descriptor: int, size: int) -> None:
        if size > 1 << 40:
            raise OSError(errno.EFBIG, "too long")
        set_length(descriptor, size)

    monkeypatch.setattr(os, "ftruncate", short)
    monkeypatch.setattr(host, "preallocate", lambda *given: reserved.append(given))
    with opened(image) as node, pytest.raises(IOFailure) as caught:
        node.truncate(2 << 40, preallocation="falloc")
    assert str(caught.value) == "Could not preallocate new data: File too large"
    assert reserved == []
    assert image.stat().st_size == MIB


def test_a_size_that_the_system_cannot_count(tmp_path: Path) -> None:
    with pytest.raises(IOFailure) as caught:
        File.create(Opener(), 1 << 63, {"filename": str(tmp_path / "new")})
    assert caught.value.errno == errno.EINVAL


@linux
def test_create_words_and_effects(tmp_path: Path) -> None:
    path = tmp_path / "new"
    File.create(Opener(), MIB, {"filename": str(path), "preallocation": "falloc", "nocow": True})
    assert path.stat().st_size == MIB
    assert host.allocated_size(str(path)) >= MIB
    File.create(Opener(), 4096, {"filename": str(path), "extent_size_hint": MIB})
    assert path.read_bytes() == bytes(4096)
    missing = tmp_path / "no" / "x"
    with pytest.raises(NotFoundError) as caught:
        File.create(Opener(), MIB, {"filename": str(missing)})
    assert str(caught.value) == f"Could not create '{missing}': No such file or directory"
    with pytest.raises(IOFailure, match=f"Could not create '{tmp_path}': Is a directory"):
        File.create(Opener(), MIB, {"filename": str(tmp_path)})


# ------------------------------------------------------------------------------- locks


def _edge(path: Path, used: int, shared: int, *, read_only: bool = False) -> Node:
    opener = Opener(read_only=read_only)
    return open_image(opener, {"driver": "file", "filename": str(path)}, used=used, shared=shared)


@linux
def test_two_writers_in_one_process_conflict(image: Path) -> None:
    with (
        _edge(image, CONSISTENT_READ | WRITE, ALL & ~WRITE),
        pytest.raises(LockError) as caught,
    ):
        _edge(image, CONSISTENT_READ | WRITE, ALL)
    assert caught.value.qemu_message == (
        f'Failed to get "write" lock\nIs another process using the image [{image}]?'
    )
    assert os.getpid() in [pid for pid, _ in caught.value.holders]
    assert "this process itself uses" in caught.value.message
    assert "open it once" in str(caught.value.hint)


@linux
def test_a_refused_change_keeps_the_old_locks(image: Path) -> None:
    with (
        _edge(image, CONSISTENT_READ, ALL, read_only=True) as first,
        _edge(image, CONSISTENT_READ | WRITE, ALL) as second,
    ):
        with pytest.raises(LockError, match='shared "write"'):
            first.acquire("strict", CONSISTENT_READ, ALL & ~WRITE)
        # The attempt left nothing behind that another writer would meet.
        _edge(image, CONSISTENT_READ | WRITE, ALL).close()
        assert second.read(0, 1) == b"\x5a"


@linux
def test_locking_off_sees_nothing(image: Path) -> None:
    with _edge(image, CONSISTENT_READ | WRITE, 0):
        opened(image, locking="off").close()


@linux
def test_create_takes_a_writers_locks_before_it_empties(image: Path) -> None:
    with (
        _edge(image, CONSISTENT_READ, CONSISTENT_READ, read_only=True),
        pytest.raises(LockError) as caught,
    ):
        File.create(Opener(), 4096, {"filename": str(image)})
    assert caught.value.qemu_message.startswith('Failed to get "write" lock\n')
    assert image.read_bytes() == b"\x5a" * MIB


class _Sleeper:
    """qemu-io that has an image open."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            ["qemu-io", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"length\n")
        self.process.stdin.flush()
        self.process.stdout.readline()  # it answers once the image is open

    def __enter__(self) -> int:
        return self.process.pid

    def __exit__(self, *_: object) -> None:
        self.process.communicate(b"quit\n", timeout=20)


@linux
@qemu
def test_qemu_keeps_us_out_in_the_same_words(image: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    with _Sleeper("-f", "qcow2", str(image)) as pid:
        for used, shared, word in (
            (CONSISTENT_READ | WRITE | RESIZE, CONSISTENT_READ, '"write"'),
            (CONSISTENT_READ, ALL & ~(WRITE | RESIZE), 'shared "write"'),
        ):
            with pytest.raises(LockError) as caught:
                _edge(image, used, shared, read_only=not used & WRITE)
            assert caught.value.qemu_message.splitlines() == [
                f"Failed to get {word} lock",
                f"Is another process using the image [{image}]?",
            ]
            assert pid in [holder for holder, _ in caught.value.holders]
            assert any("qemu-io" in command for _, command in caught.value.holders)
            assert f"process {pid}" in str(caught.value)
        theirs = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True)
        assert theirs.stderr.endswith(caught.value.qemu_message + "\n")
        forced = Opener(read_only=True, force_share=True)
        spec: dict[str, object] = {"driver": "file", "filename": str(image)}
        open_image(forced, spec, shared=CONSISTENT_READ).close()


@linux
@qemu
def test_we_keep_qemu_out(image: Path) -> None:
    with _edge(image, CONSISTENT_READ | WRITE | RESIZE, ALL & ~(WRITE | RESIZE)):
        result = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 512", image], capture_output=True, text=True
        )
        assert 'Failed to get "write" lock' in result.stderr
    result = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", image], capture_output=True, text=True
    )
    assert result.returncode == 0


@linux
def test_a_lock_byte_that_is_write_locked(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, offset: int) -> None:
        raise BlockingIOError(errno.EAGAIN, "held")

    monkeypatch.setattr(host, "lock_shared", refuse)
    with pytest.raises(LockError, match="Failed to lock byte 100"):
        opened(image)


def test_no_locks_on_this_file_system(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "locks_supported", lambda descriptor: False)
    opened(image).close()
    with pytest.raises(UnsupportedError):
        opened(image, locking="on")


# --------------------------------------------------------------------------- block device


@linux
def test_a_block_device_keeps_its_size(image: Path) -> None:
    result = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip("no loop devices here")
    device = result.stdout.strip()
    try:
        with opened(device, driver="host_device") as node:
            assert node.size == MIB
            node.write(1000, b"hello")
            assert node.read(999, 7) == b"\x5ahello\x5a"
            node.write_zeroes(100, 8192, unmap=True)
            assert node.read(99, 8194) == b"\x5a" + bytes(8192) + b"\x5a"
            node.discard(0, 65536)
            with pytest.raises(UnsupportedError) as caught:
                node.truncate(2 * MIB)
            assert caught.value.qemu_message == "Cannot resize device files"
        with opened(device, driver="host_device", cache="none") as node:
            node.write(MIB - 3, b"end")
            assert node.read(MIB - 4, 4) == b"\x5aend"
        with pytest.raises(UnsupportedError) as caught:
            HostDevice.create(Opener(), 2 * MIB, {"filename": device})
        assert caught.value.qemu_message == "Cannot grow device files"
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_every_descriptor_is_closed(image: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("no /proc")
    before = len(list(folder.iterdir()))
    opened(image).close()
    with pytest.raises(LockError), _edge(image, CONSISTENT_READ | WRITE, 0):
        _edge(image, CONSISTENT_READ | WRITE, ALL)
    with pytest.raises(UnsupportedError), opened(image) as node:
        node.truncate(1, preallocation="falloc")
    assert len(list(folder.iterdir())) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
def test_what_is_too_long_takes_no_space_before_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    wanted: dict[str, object] = {"filename": str(tmp_path / "disk"), "preallocation": "falloc"}
    reserved: list[int] = []
    monkeypatch.setattr(host, "preallocate", lambda *where: reserved.append(where[2]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 30, hard))
    try:
        with pytest.raises(DiskwrightError):
            File.create(Opener(), 4 << 30, wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not reserved


@pytest.mark.parametrize("cache", ["writeback", "unsafe"])
def test_closing_fails_where_something_may_be_lost(image, monkeypatch, cache: str) -> None:
    """After a flush an error of `close` says nothing."""
    node = opened(image, cache=cache)
    node.write(0, b"x")
    close = os.close

    def fail(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "close", fail)
    if cache == "writeback":
        node.close()
    else:
        with pytest.raises(IOFailure, match="Could not close"):
            node.close()


def test_a_size_that_no_file_has_leaves_the_file(image: Path) -> None:
    """It is known before the file that is there would be emptied."""
    before = image.read_bytes()
    with pytest.raises(IOFailure) as caught:
        create_image(NewImage(str(image), format="raw", options={"size": "8E"}))
    assert caught.value.qemu_message == f"{image}: Could not resize file: Invalid argument"
    assert image.read_bytes() == before
