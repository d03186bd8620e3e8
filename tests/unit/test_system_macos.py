"""macOS' logic on a simulated fcntl: numbers, structures, falling back."""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path

import pytest

from diskwright.system.macos import Host

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
MIB = 1 << 20


class Simulated:
    """Remembers calls; locks are kept by start of range."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.locks: dict[int, set[int]] = {}
        self.refuse: set[int] = set()

    def fcntl(self, fd: int, cmd: int, arg: bytes | int = 0, /) -> bytes | int:
        if cmd in self.refuse:
            raise OSError(errno.ENOTSUP, "no")
        if cmd in (90, 92):
            assert isinstance(arg, bytes)
            return self._lock(fd, cmd, arg)
        self.calls.append((cmd, arg))
        return 0

    def _lock(self, fd: int, cmd: int, arg: bytes) -> bytes:
        start, length, pid, kind, whence = struct.unpack("qqihh", arg)
        assert (length, pid, whence) == (1, 0, 0)
        holders = self.locks.setdefault(start, set())
        if cmd == 92:
            others = holders - {fd}
            return struct.pack("qqihh", start, length, pid, 1 if others else 2, whence)
        if kind == 2:
            holders.discard(fd)
        else:
            holders.add(fd)
        return arg

    def ioctl(self, fd: int, request: int, arg: bytes, /) -> bytes | int:
        return (2048 if request == 0x40046418 else 5).to_bytes(len(arg), "little")


@pytest.fixture
def system() -> Simulated:
    return Simulated()


@pytest.fixture
def path(tmp_path: Path) -> str:
    made = tmp_path / "file"
    made.write_bytes(b"\x55" * MIB)
    return str(made)


def test_opening_without_the_cache(system: Simulated, path: str) -> None:
    host = Host(system)
    descriptor = host.open_file(path, read_only=False, direct=True)
    assert system.calls == [(48, 1)]
    assert host.file_size(descriptor) == MIB
    assert host.direct_alignment(descriptor) == 1
    lent = host.duplicate(descriptor, direct=False)
    assert system.calls == [(48, 1), (48, 0)]
    assert os.path.sameopenfile(lent, descriptor)
    os.close(lent)
    os.close(descriptor)
    with pytest.raises(FileExistsError):
        host.open_file(path, read_only=False, create=True, exclusive=True)


def test_locks(system: Simulated, path: str) -> None:
    host = Host(system)
    first, second = (host.open_file(path, read_only=False) for _ in range(2))
    host.lock_shared(first, 100)
    assert host.is_locked(second, 100)
    assert not host.is_locked(first, 100)
    host.unlock(first, 100)
    assert not host.is_locked(second, 100)
    assert host.locks_supported(first)
    system.refuse.add(92)
    assert not host.locks_supported(first)
    assert host.lock_holders(first, (100,)) == []
    os.close(first)
    os.close(second)


def test_holes_are_whole_blocks_and_the_rest_is_written(system: Simulated, path: str) -> None:
    host = Host(system)
    descriptor = host.open_file(path, read_only=False)
    host.punch_hole(descriptor, 4000, 8388)
    assert system.calls == [(99, struct.pack("IIqq", 0, 0, 4096, 8192))]
    content = Path(path).read_bytes()
    assert content[4000:4096] == bytes(96)
    assert content[12288:12388] == bytes(100)
    assert content[3999] == content[12388] == 0x55
    system.calls.clear()
    host.punch_hole(descriptor, 100, 50)  # no whole block: all is written
    host.discard(descriptor, 100, 50)
    assert system.calls == []
    assert Path(path).read_bytes()[99:151] == b"\x55" + bytes(50) + b"\x55"
    host.discard(descriptor, 100, 9000)
    assert system.calls == [(99, struct.pack("IIqq", 0, 0, 4096, 4096))]
    with pytest.raises(OSError) as caught:
        host.zero_range(descriptor, 0, 4096)
    assert caught.value.errno == errno.ENOTSUP
    os.close(descriptor)


def test_preallocation_moves_the_end(system: Simulated, path: str) -> None:
    host = Host(system)
    descriptor = host.open_file(path, read_only=False)
    host.preallocate(descriptor, MIB, MIB)
    assert system.calls == [(42, struct.pack("Iiqqq", 4, 3, 0, MIB, 0))]
    assert host.file_size(descriptor) == 2 * MIB
    with pytest.raises(OSError):
        host.preallocate(descriptor, 0, 4096)
    os.close(descriptor)


def test_flush_reaches_the_disk(
    system: Simulated, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(system)
    descriptor = host.open_file(path, read_only=False)
    host.sync_data(descriptor)
    assert system.calls == [(51, 0)]
    fallen: list[int] = []
    monkeypatch.setattr(os, "fsync", fallen.append)
    system.refuse.add(51)
    host.sync_data(descriptor)
    assert fallen == [descriptor]
    os.close(descriptor)


def test_a_disk_is_a_character_device(system: Simulated) -> None:
    host = Host(system)
    descriptor = host.open_file("/dev/null", read_only=True)
    assert host.is_block_device(descriptor)
    assert host.file_size(descriptor) == 5 * 2048
    assert host.direct_alignment(descriptor) == 2048
    os.close(descriptor)


def test_what_there_is_not(system: Simulated, path: str) -> None:
    host = Host(system)
    for call in (host.clone_range, host.copy_range):
        with pytest.raises(OSError):
            call(0, 0, 0, 0, length=1)
