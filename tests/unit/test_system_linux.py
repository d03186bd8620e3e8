"""Linux's calls on real files: locks and their holders, holes, alignment; names of all hosts."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diskwright.system import linux, macos, windows
from diskwright.system.image_locks import ImageLocks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(b"\x33" * MIB)
    return made


def _public(module: Any) -> set[str]:
    return {name for name in vars(module) if name.islower() and not name.startswith("_")}


def test_every_host_has_the_same_names() -> None:
    modules = {"errno", "fcntl", "os", "stat", "struct", "annotations"}
    wanted = _public(linux) - modules
    assert wanted <= _public(macos)
    assert wanted <= _public(windows)
    assert set(macos.UNSUPPORTED) >= {errno.ENOTSUP}
    assert set(windows.UNSUPPORTED) >= {errno.ENOTSUP}


def test_ofd_locks_belong_to_the_open_file(path: Path) -> None:
    first, second = (linux.open_file(str(path), read_only=False) for _ in range(2))
    try:
        linux.lock_shared(first, 100)
        assert not linux.is_locked(first, 100)  # its own
        assert linux.is_locked(second, 100)
        assert not linux.is_locked(second, 101)
        linux.lock_shared(second, 100)  # shared
        linux.unlock(first, 100)
        assert linux.is_locked(first, 100)
        assert not linux.is_locked(second, 100)
        assert linux.locks_supported(first)
    finally:
        os.close(first)
        os.close(second)


def test_a_write_lock_blocks_without_waiting(path: Path) -> None:
    first, second = (linux.open_file(str(path), read_only=False) for _ in range(2))
    try:
        request = linux._FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(first, linux._F_OFD_SETLK, request)
        with pytest.raises(BlockingIOError):
            linux.lock_shared(second, 100)
    finally:
        os.close(first)
        os.close(second)


HOLDER = """
import sys, time
from diskwright.system import host
descriptor = host.open_file(sys.argv[1], read_only=True)
for byte in (100, 203):
    host.lock_shared(descriptor, byte)
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_holder_is_named(path: Path) -> None:
    source = Path(linux.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    descriptor = linux.open_file(str(path), read_only=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for wanted in ((100,), (7, 203)):
            found = linux.lock_holders(descriptor, wanted)
            assert [pid for pid, _ in found] == [process.pid]
            assert sys.executable in found[0][1]
        assert linux.lock_holders(descriptor, (101,)) == []
    finally:
        process.communicate()
        os.close(descriptor)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("line", "covers"),
    [
        ("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:42 100 101\n", True),
        ("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:42 0 EOF\n", True),
        ("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:42 102 EOF\n", False),
        ("lock:\t1: OFDLCK ADVISORY  READ -1 fe:01:42 100 101\n", False),
        ("lock:\tnonsense\n", False),
        ("lock:\n", False),
    ],
)
def test_lock_lines(line: str, covers: bool) -> None:
    assert linux._covers(line, "fe:00:42", (101,)) is covers


def test_the_search_for_holders_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "MAX_FILES_A_PROCESS", 2)
    assert len(list(linux._locked_files(os.getpid(), -1))) <= 2
    asked: list[int] = []

    def nothing(pid: int, skip: int) -> list[list[str]]:
        asked.append(pid)
        return []

    monkeypatch.setattr(linux, "_locked_files", nothing)
    monkeypatch.setattr(linux, "MAX_SEARCH_SECONDS", -1.0)
    descriptor = linux.open_file(str(path), read_only=True)
    try:
        assert linux.lock_holders(descriptor, (100,)) == []
    finally:
        os.close(descriptor)
    assert len(asked) == 1


def test_image_locks_take_and_give_back(path: Path) -> None:
    descriptors = [linux.open_file(str(path), read_only=False) for _ in range(2)]
    try:
        locks = ImageLocks(descriptors[0], str(path))

        def seen() -> set[int]:
            return {byte for byte in range(90, 220) if linux.is_locked(descriptors[1], byte)}

        locks.change(1 | 2 | 8, 1 | 4)
        assert seen() == {100, 101, 103, 201, 203}
        locks.change(1, 1 | 4)
        assert seen() == {100, 201, 203}
        locks.change(0, 15)
        assert seen() == set()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_holes_and_zeroes(path: Path) -> None:
    descriptor = linux.open_file(str(path), read_only=False)
    try:
        linux.punch_hole(descriptor, 65536, 65536)
        assert linux.data_or_hole(descriptor, 0, MIB) == (True, 65536)
        assert linux.data_or_hole(descriptor, 70000, MIB) == (False, 131072)
        assert linux.allocated_size(descriptor) == MIB - 65536
        linux.preallocate(descriptor, 65536, 65536)
        assert linux.allocated_size(str(path)) == MIB
        linux.zero_range(descriptor, MIB, 4096, keep_size=True)
        assert linux.file_size(descriptor) == MIB
        linux.zero_range(descriptor, MIB, 4096)
        assert linux.file_size(descriptor) == MIB + 4096
        assert linux.data_or_hole(descriptor, 2 * MIB, 3 * MIB) == (False, 3 * MIB)
        linux.turn_off_copy_on_write(descriptor)
        linux.hint_extent_size(descriptor, MIB)
        linux.advise_sequential(descriptor)
        linux.advise_needed(descriptor, 0, 4096)
    finally:
        os.close(descriptor)


def test_copying_inside_of_the_kernel(path: Path, tmp_path: Path) -> None:
    source = linux.open_file(str(path), read_only=True)
    target = linux.open_file(str(tmp_path / "copy"), read_only=False, create=True)
    try:
        assert linux.copy_range(source, 0, target, 4096, length=8192) == 8192
        out = bytearray(8192)
        assert linux.read_into(target, 4096, memoryview(out)) == 8192
        assert out == b"\x33" * 8192
    finally:
        os.close(source)
        os.close(target)


def test_cloning_shares_blocks_or_says_why_not(path: Path, tmp_path: Path) -> None:
    source = linux.open_file(str(path), read_only=True)
    target = linux.open_file(str(tmp_path / "clone"), read_only=False, create=True)
    problem = 0
    try:
        linux.clone_range(source, 0, target, 0, length=65536)
    except OSError as error:
        problem = error.errno or -1
    finally:
        os.close(source)
        os.close(target)
    if problem:
        assert problem in (*linux.UNSUPPORTED, errno.EXDEV)
    else:
        assert (tmp_path / "clone").read_bytes() == b"\x33" * 65536


def test_create_exclusively(path: Path) -> None:
    with pytest.raises(FileExistsError):
        linux.open_file(str(path), read_only=False, create=True, exclusive=True)


def test_alignment_for_direct_io(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        descriptor = linux.open_file(str(path), read_only=False, direct=True)
    except OSError:
        pytest.skip("no direct I/O here")
    try:
        assert linux.direct_alignment(descriptor) in (1, 512, 1024, 2048, 4096)
        monkeypatch.setattr(linux, "_reported_alignment", lambda descriptor: 0)
        assert linux.direct_alignment(descriptor) in (512, 1024, 2048, 4096)
    finally:
        os.close(descriptor)
    view = linux.aligned_buffer(10)
    assert len(view) == 10
    assert not any(view)
