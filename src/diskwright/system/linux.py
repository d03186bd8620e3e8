"""Linux: descriptors, open-file-description locks, holes, zeroing, preallocation, cloning.

Functions take descriptors and raise OSError as the system calls do. Sources: fcntl(2), "Open
file description locks"; fallocate(2); lseek(2), SEEK_HOLE; ioctl_ficlonerange(2); proc(5).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

_FICLONERANGE = 0x4020940D
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F

#: errno values that mean "this file system does not do that"
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)


def open_file(
    path: str, *, read_only: bool, direct: bool = False, create: bool = False, exclusive: bool = False
) -> int:
    """Open a file or device; never truncates it."""
    flags = os.O_RDONLY if read_only else os.O_RDWR
    if direct:
        flags |= os.O_DIRECT
    if create:
        flags |= os.O_CREAT
    if exclusive:
        flags |= os.O_EXCL
    return os.open(path, flags | os.O_CLOEXEC, 0o644)


def file_size(descriptor: int) -> int:
    """Bytes in a file or block device."""
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return os.lseek(descriptor, 0, os.SEEK_END)
    return status.st_size


def is_block_device(descriptor: int) -> bool:
    """Whether the descriptor is one."""
    return stat.S_ISBLK(os.fstat(descriptor).st_mode)


def allocated_size(path: str) -> int:
    """Bytes the file occupies on its file system."""
    return os.stat(path).st_blocks * 512


# -------------------------------------------------------------------------------- locks


def lock_shared(descriptor: int, offset: int) -> None:
    """Take a read lock on one byte for this open file; BlockingIOError where one conflicts."""
    request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0)
    fcntl.fcntl(descriptor, _F_OFD_SETLK, request)


def unlock(descriptor: int, offset: int) -> None:
    """Give up this open file's lock on one byte."""
    request = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, 1, 0)
    fcntl.fcntl(descriptor, _F_OFD_SETLK, request)


def is_locked(descriptor: int, offset: int) -> bool:
    """Whether another open file holds any lock on the byte."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
    answer = fcntl.fcntl(descriptor, _F_OFD_GETLK, request)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def locks_supported(descriptor: int) -> bool:
    """Whether the file system has such locks."""
    try:
        is_locked(descriptor, 0)
    except OSError:
        return False
    return True


def lock_holders(descriptor: int, offsets: tuple[int, ...], limit: int = 8) -> list[tuple[int, str]]:
    """(process id, command) of others that lock one of the bytes, as far as /proc tells.

    The kernel names no owner of such a lock; it is found by device and inode in the `lock:`
    lines of /proc/PID/fdinfo. Processes of other users cannot be seen and are left out.
    """
    status = os.fstat(descriptor)
    mark = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    found: list[tuple[int, str]] = []
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return found
    for pid in pids:
        if _process_locks(pid, mark, offsets, descriptor):
            found.append((pid, _command(pid)))
            if len(found) >= limit:
                break
    return found


def _process_locks(pid: int, mark: str, offsets: tuple[int, ...], own: int) -> bool:
    folder = f"/proc/{pid}/fdinfo"
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    for name in names:
        if pid == os.getpid() and name == str(own):
            continue
        try:
            with open(f"{folder}/{name}", encoding="ascii", errors="replace") as file:
                lines = file.read().splitlines()
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if line.startswith("lock:") and mark in words:
                first, last = words[-2], words[-1]
                if last == "EOF" or any(int(first) <= at <= int(last) for at in offsets):
                    return True
    return False


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).split(b"\0")
    except OSError:
        return "?"
    return " ".join(word.decode(errors="replace") for word in words if word) or "?"


# ------------------------------------------------------------------------ holes and zeroes


def data_or_hole(descriptor: int, offset: int, size: int) -> tuple[bool, int]:
    """(whether there is data at `offset`, where that run ends); all data where unknown."""
    try:
        data = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        return (False, size) if error.errno == errno.ENXIO else (True, size)
    if data > offset:
        return False, min(data, size)
    try:
        hole = os.lseek(descriptor, offset, os.SEEK_HOLE)
    except OSError:
        return True, size
    return True, min(hole, size) if hole > offset else size


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    global _libc
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
        _libc.fallocate64.argtypes = (
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
            ctypes.c_int64,
        )
    while _libc.fallocate64(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


_libc: Any = None


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Give the range's space back; it reads as zero."""
    if is_block_device(descriptor):
        fcntl.ioctl(descriptor, _BLKDISCARD, struct.pack("QQ", offset, length))
        return
    _fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(descriptor: int, offset: int, length: int) -> None:
    """Make the range read as zero and keep its space."""
    if is_block_device(descriptor):
        fcntl.ioctl(descriptor, _BLKZEROOUT, struct.pack("QQ", offset, length))
        return
    _fallocate(descriptor, _ZERO_RANGE, offset, length)


def preallocate(descriptor: int, offset: int, length: int) -> None:
    """Reserve space for the range, which reads as zero where nothing was."""
    os.posix_fallocate(descriptor, offset, length)


# --------------------------------------------------------------------------- moving bytes


def read_into(descriptor: int, offset: int, view: memoryview) -> int:
    """Read until `view` is full or the file ends; returns the count."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def write_all(descriptor: int, offset: int, view: memoryview) -> None:
    """Write all of `view`."""
    done = os.pwrite(descriptor, view, offset)
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def sync_data(descriptor: int) -> None:
    """Make what was written durable."""
    os.fdatasync(descriptor)


def clone_range(source: int, offset: int, length: int, target: int, target_offset: int) -> None:
    """Share the blocks of one file with another; OSError where the file system cannot."""
    request = struct.pack("qQQQ", source, offset, length, target_offset)
    fcntl.ioctl(target, _FICLONERANGE, request)


def copy_range(source: int, offset: int, length: int, target: int, target_offset: int) -> int:
    """Copy inside of the kernel; returns how much was copied."""
    return os.copy_file_range(source, target, length, offset, target_offset)


def advise_sequential(descriptor: int) -> None:
    """Tell the kernel to read ahead."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def direct_alignment(descriptor: int) -> int:
    """The smallest offset and length that direct reads take: 512 or 4096."""
    import mmap

    if is_block_device(descriptor):
        answer = fcntl.ioctl(descriptor, _BLKSSZGET, struct.pack("i", 0))
        size: int = struct.unpack("i", answer)[0]
        return size
    with mmap.mmap(-1, 8192) as buffer, memoryview(buffer) as view:
        for alignment in (512, 1024, 2048):
            try:
                os.preadv(descriptor, [view[:alignment]], alignment)
            except OSError:
                continue
            return alignment
    return 4096
