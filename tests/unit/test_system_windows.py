"""Windows' logic on simulated Win32 calls: what is asked of the system, and in which order."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from diskwright.system import win32, windows
from diskwright.system.win32 import Win32, windows_error
from diskwright.system.windows import LOCK_BASE, Host

MIB = 1 << 20


class Simulated(Win32):
    """A little Windows: handles are descriptors, locks and sparse ranges are remembered."""

    def __init__(self) -> None:
        self.locks: dict[int, dict[int, bool]] = {}  # byte -> handle -> exclusive
        self.calls: list[tuple[object, ...]] = []
        self.ranges: list[tuple[int, int]] | None = None
        self.transfer = 1 << 30

    def create_file(
        self, path: str, access: int, *, share: int, disposition: int, flags: int
    ) -> int:
        self.calls.append(("create_file", access, share, disposition, flags))
        mode = os.O_RDWR if access & 0x40000000 else os.O_RDONLY
        if disposition in (1, 4):
            mode |= os.O_CREAT
        if disposition == 1:
            mode |= os.O_EXCL
        try:
            return os.open(path, mode, 0o644)
        except FileNotFoundError:
            raise windows_error(2, path) from None
        except FileExistsError:
            raise windows_error(80, path) from None

    def descriptor_of(self, handle: int, flags: int) -> int:
        return handle

    def handle_of(self, descriptor: int) -> int:
        return descriptor

    def read_file(self, handle: int, offset: int, view: memoryview) -> int:
        return os.preadv(handle, [view[: self.transfer]], offset)

    def write_file(self, handle: int, offset: int, view: memoryview) -> int:
        return os.pwrite(handle, view[: self.transfer], offset)

    def flush_file_buffers(self, handle: int) -> None:
        self.calls.append(("flush",))

    def device_io_control(self, handle: int, code: int, given: bytes, room: int) -> bytes:
        if code == 0x7405C:
            raise windows_error(1)
        self.calls.append((hex(code), *struct.unpack(f"<{len(given) // 8}q", given)))
        if code == 0x940CF:
            if self.ranges is None:
                raise windows_error(50)
            start, length = struct.unpack("<qq", given)
            for first, count in self.ranges:
                if first + count > start and first < start + length:
                    low = max(first, start)
                    return struct.pack("<qq", low, min(first + count, start + length) - low)
            return b""
        if code == 0x980C8:
            start, stop = struct.unpack("<qq", given)
            os.pwrite(handle, bytes(stop - start), start)
        return b""

    def lock_file(self, handle: int, offset: int, flags: int) -> None:
        holders = self.locks.setdefault(offset, {})
        if (flags & 2 and holders) or any(holders.values()):
            raise windows_error(33)
        holders[handle] = bool(flags & 2)

    def unlock_file(self, handle: int, offset: int) -> None:
        del self.locks[offset][handle]

    def file_information(self, handle: int, kind: int, room: int) -> bytes:
        if kind == 1:
            status = os.fstat(handle)
            return struct.pack("<qqIBBxx", status.st_blocks * 512, status.st_size, 1, 0, 0)
        return struct.pack("<I", 512) + bytes(room - 4)

    def compressed_size(self, path: str) -> int:
        return os.stat(path).st_blocks * 512


@pytest.fixture
def api() -> Simulated:
    return Simulated()


@pytest.fixture
def path(tmp_path: Path) -> str:
    made = tmp_path / "file"
    made.write_bytes(b"\x44" * MIB)
    return str(made)


def test_opening(api: Simulated, path: str, tmp_path: Path) -> None:
    host = Host(api)
    os.close(host.open_file(path, read_only=True))
    os.close(host.open_file(path, read_only=False, direct=True))
    assert api.calls == [
        ("create_file", 0x80000000, 7, 3, 0),
        ("create_file", 0xC0000000, 7, 3, 0xA0000000),
    ]
    with pytest.raises(FileNotFoundError):
        host.open_file(str(tmp_path / "none"), read_only=True)
    assert host.duplicate(0, direct=False) < 0
    os.close(host.open_file(str(tmp_path / "none"), read_only=False, create=True))
    with pytest.raises(FileExistsError):
        host.open_file(path, read_only=False, create=True, exclusive=True)


def test_sizes(api: Simulated, path: str) -> None:
    host = Host(api)
    descriptor = host.open_file(path, read_only=True)
    assert host.file_size(descriptor) == MIB
    assert not host.is_block_device(descriptor)
    assert host.allocated_size(descriptor) == host.allocated_size(path)
    assert host.direct_alignment(descriptor) == 512
    os.close(descriptor)


def test_transfers_go_on_after_short_ones(api: Simulated, path: str) -> None:
    host = Host(api)
    descriptor = host.open_file(path, read_only=False)
    api.transfer = 7
    assert host.write_all(descriptor, 100, memoryview(bytes(range(50)))) == 50
    out = bytearray(50)
    assert host.read_into(descriptor, 100, memoryview(out)) == 50
    assert out == bytes(range(50))
    assert host.read_into(descriptor, MIB - 3, memoryview(out)) == 3
    api.transfer = 0
    with pytest.raises(OSError, match="Input/output"):
        host.write_all(descriptor, 0, memoryview(b"x"))
    host.sync_data(descriptor)
    assert api.calls[-1] == ("flush",)
    os.close(descriptor)


def test_locks_lie_beyond_every_file_and_are_shared(api: Simulated, path: str) -> None:
    host = Host(api)
    first, second = (host.open_file(path, read_only=False) for _ in range(2))
    host.lock_shared(first, 100)
    host.lock_shared(first, 100)
    assert list(api.locks) == [LOCK_BASE + 100]
    assert not host.is_locked(first, 100)
    assert api.locks[LOCK_BASE + 100] == {first: False}  # its own was taken again
    assert host.is_locked(second, 100)
    host.lock_shared(second, 100)
    assert host.is_locked(first, 100)
    host.unlock(second, 100)
    host.unlock(second, 100)
    assert not host.is_locked(first, 100)
    assert host.locks_supported(first)
    assert host.lock_holders(first, (100,)) == []
    os.close(first)
    os.close(second)


def test_a_lock_that_is_only_being_looked_at_is_waited_for(
    api: Simulated, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(api)
    descriptor = host.open_file(path, read_only=False)
    api.locks[LOCK_BASE + 100] = {999: True}
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: api.locks[LOCK_BASE + 100].clear())
    host.lock_shared(descriptor, 100)
    api.locks[LOCK_BASE + 101] = {999: True}
    with pytest.raises(BlockingIOError):
        host.lock_shared(descriptor, 101)
    os.close(descriptor)


def test_holes(api: Simulated, path: str) -> None:
    host = Host(api)
    descriptor = host.open_file(path, read_only=False)
    assert host.data_or_hole(descriptor, 0, MIB) == (True, MIB)  # unknown: all data
    api.ranges = [(65536, 65536)]
    assert host.data_or_hole(descriptor, 0, MIB) == (False, 65536)
    assert host.data_or_hole(descriptor, 70000, MIB) == (True, 131072)
    assert host.data_or_hole(descriptor, 131072, MIB) == (False, MIB)
    api.calls.clear()
    host.punch_hole(descriptor, 4096, 4096)
    host.discard(descriptor, 8192, 4096)
    assert api.calls == [("0x900c4",), ("0x980c8", 4096, 8192), ("0x980c8", 8192, 12288)]
    host.zero_range(descriptor, MIB, 4096)
    assert host.file_size(descriptor) == MIB + 4096
    host.preallocate(descriptor, MIB, 8192)
    assert host.file_size(descriptor) == MIB + 8192
    host.clone_range(descriptor, 0, descriptor, 65536, length=65536)
    assert api.calls[-1] == ("0x98344", descriptor, 0, 65536, 65536)
    with pytest.raises(OSError):
        host.copy_range(descriptor, 0, descriptor, 1, length=1)
    os.close(descriptor)


def test_a_device_knows_its_length(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device(Simulated):
        def device_io_control(self, handle: int, code: int, given: bytes, room: int) -> bytes:
            if code == 0x7405C:
                return struct.pack("<q", 5 * MIB)
            return bytes(20) + struct.pack("<I", 2048)

    host = Host(Device())
    descriptor = host.open_file(path, read_only=True)
    assert host.is_block_device(descriptor)
    assert host.file_size(descriptor) == 5 * MIB
    assert host.direct_alignment(descriptor) == 2048
    os.close(descriptor)


def test_error_numbers() -> None:
    assert windows_error(112).errno == errno.ENOSPC
    assert windows_error(12345).errno == errno.EIO
    assert isinstance(windows_error(5, "x"), PermissionError)
    assert isinstance(windows_error(win32.ERROR_LOCK_VIOLATION), BlockingIOError)
    assert windows.Host is Host


def test_the_offset_is_where_windows_looks_for_it() -> None:
    raw = Win32._overlapped(0x1122334455667788).raw
    assert raw[16:24] == struct.pack("<II", 0x55667788, 0x11223344)
    assert len(raw) == 32
