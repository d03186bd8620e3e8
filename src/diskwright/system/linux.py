"""Linux: descriptors, open-file-description locks, holes, zeroing, preallocation, cloning.

Functions take descriptors and raise OSError as the system calls do; an errno in `UNSUPPORTED`
means that this file system or device does not do it, and that the caller falls back.

Sources: fcntl(2), "Open file description locks"; fallocate(2); lseek(2), SEEK_HOLE; statx(2),
STATX_DIOALIGN; ioctl_ficlonerange(2); proc(5), fdinfo; <linux/fs.h>.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

_FICLONERANGE = 0x4020940D
_BLKROGET = 0x125E
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_FS_XFLAG_EXTSIZE = 0x800

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_STATX_DIO_OFFSET = 0x98  # of stx_dio_mem_align; stx_dio_offset_align follows

#: Bounds on the search for the holder of a lock: a host can have millions of open files.
MAX_FILES_A_PROCESS = 512
MAX_SEARCH_SECONDS = 0.5

#: errno values that mean "this file system does not do that"
UNSUPPORTED = (
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENODEV,
)


def open_file(
    path: str,
    *,
    read_only: bool,
    direct: bool = False,
    create: bool = False,
    exclusive: bool = False,
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


def duplicate(descriptor: int, *, direct: bool) -> int:
    """Another descriptor of the same open file, which has its locks; both are in that mode."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
    if wanted != flags:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)
    return os.dup(descriptor)


def file_size(descriptor: int) -> int:
    """Bytes in a file or block device."""
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return os.lseek(descriptor, 0, os.SEEK_END)
    return status.st_size


def is_block_device(descriptor: int) -> bool:
    """Whether the descriptor is one."""
    return stat.S_ISBLK(os.fstat(descriptor).st_mode)


def is_write_protected(descriptor: int) -> bool:
    """Whether a block device takes no writes, though it could be opened for them."""
    if not is_block_device(descriptor):
        return False
    answer = fcntl.ioctl(descriptor, _BLKROGET, struct.pack("i", 0))
    return bool(struct.unpack("i", answer)[0])


def allocated_size(path: str | int) -> int:
    """Bytes the file (a path or a descriptor) occupies on its file system."""
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


def lock_holders(
    descriptor: int, offsets: tuple[int, ...], limit: int = 8
) -> list[tuple[int, str]]:
    """(process id, command) of others that lock one of the bytes, as far as /proc tells.

    The kernel names no owner of such a lock; it is found by device and inode in the `lock:`
    lines of /proc/PID/fdinfo. Processes of other users and containers cannot be seen, and a
    file system that reports another device there hides them too: they are left out.
    """
    status = os.fstat(descriptor)
    mark = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    found: list[tuple[int, str]] = []
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return found
    import time

    deadline = time.monotonic() + MAX_SEARCH_SECONDS
    for pid in sorted(pids, key=_open_files):
        skip = descriptor if pid == os.getpid() else -1
        for lines in _locked_files(pid, skip):
            if any(_covers(line, mark, offsets) for line in lines):
                found.append((pid, _command(pid)))
                break
            if time.monotonic() > deadline:
                return found
        if len(found) >= limit or time.monotonic() > deadline:
            break
    return found


def _open_files(pid: int) -> int:
    """How many files a process has open, as newer kernels tell; those with few come first."""
    try:
        return os.stat(f"/proc/{pid}/fd").st_size
    except OSError:
        return 0


def _locked_files(pid: int, skip: int) -> Iterator[list[str]]:
    """The `lock:` lines of each file that a process has open, but for descriptor `skip`."""
    folder = f"/proc/{pid}/fdinfo"
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names[:MAX_FILES_A_PROCESS]:
        if name == str(skip):
            continue
        try:
            with open(f"{folder}/{name}", encoding="ascii", errors="replace") as file:
                yield [line for line in file if line.startswith("lock:")]
        except OSError:
            continue


def _covers(line: str, mark: str, offsets: tuple[int, ...]) -> bool:
    """Whether a `lock:` line is about the file `mark` and one of the bytes."""
    words = line.split()
    if mark not in words or not words[-2].isdecimal():
        return False
    first, last = int(words[-2]), words[-1]
    return any(first <= at and (last == "EOF" or at <= int(last)) for at in offsets)


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


def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    global _fallocate_function
    function = _fallocate_function
    if function is None:
        libc = _libc()
        # Where off_t has 64 bits anyway (musl), there may be no second name.
        function = getattr(libc, "fallocate64", None) or libc.fallocate
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        _fallocate_function = function
    while function(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


_fallocate_function: Any = None


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Give the range's space back; it reads as zero, on block devices too."""
    _fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def discard(descriptor: int, offset: int, length: int) -> None:
    """Say that the range's content is not needed; a device may return anything there."""
    if is_block_device(descriptor):
        fcntl.ioctl(descriptor, _BLKDISCARD, struct.pack("QQ", offset, length))
        return
    _fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(descriptor: int, offset: int, length: int, *, keep_size: bool = False) -> None:
    """Make the range read as zero and keep its space; a file grows to hold it."""
    if is_block_device(descriptor):
        keep_size = True
    _fallocate(descriptor, _ZERO_RANGE | (_KEEP_SIZE if keep_size else 0), offset, length)


def preallocate(descriptor: int, offset: int, length: int) -> None:
    """Reserve space for the range, which reads as zero where nothing was; a file may grow."""
    os.posix_fallocate(descriptor, offset, length)


def reserve(descriptor: int, offset: int, length: int) -> None:
    """Reserve space for the range, perhaps behind the file's end, which stays where it is."""
    _fallocate(descriptor, _KEEP_SIZE, offset, length)


def turn_off_copy_on_write(descriptor: int) -> None:
    """Let an empty file's blocks be overwritten in place (btrfs); elsewhere nothing happens."""
    try:
        answer = fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, bytes(8))
        flags = int.from_bytes(answer, "little") | _FS_NOCOW_FL
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, struct.pack("q", flags))
    except OSError:
        return


def hint_extent_size(descriptor: int, size: int) -> None:
    """Ask for extents of `size` bytes in an empty file (XFS); elsewhere nothing happens."""
    try:
        answer = bytearray(fcntl.ioctl(descriptor, _FS_IOC_FSGETXATTR, bytes(28)))
        flags = struct.unpack_from("I", answer)[0] | _FS_XFLAG_EXTSIZE
        struct.pack_into("II", answer, 0, flags, size)
        fcntl.ioctl(descriptor, _FS_IOC_FSSETXATTR, bytes(answer))
    except OSError:
        return


# --------------------------------------------------------------------------- moving bytes


def read_into(descriptor: int, offset: int, view: memoryview) -> int:
    """Read until `view` is full or the file ends; returns the count.

    With direct I/O a count that is not a multiple of the alignment means the file's end, and
    another attempt there would be refused for its alignment.
    """
    done = os.preadv(descriptor, [view], offset)
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL and done and offset + done >= file_size(descriptor):
                break
            raise
        if not count:
            break
        done += count
    return done


def write_all(descriptor: int, offset: int, view: memoryview) -> int:
    """Write all of `view`; returns the count."""
    done = os.pwrite(descriptor, view, offset)
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done


def sync_data(descriptor: int) -> None:
    """Make what was written durable."""
    os.fdatasync(descriptor)


def clone_range(source: int, offset: int, target: int, target_offset: int, *, length: int) -> None:
    """Share the blocks of one file with another; OSError where the file system cannot."""
    request = struct.pack("qQQQ", source, offset, length, target_offset)
    fcntl.ioctl(target, _FICLONERANGE, request)


def copy_range(source: int, offset: int, target: int, target_offset: int, *, length: int) -> int:
    """Copy inside of the kernel; returns how much was copied."""
    return os.copy_file_range(source, target, length, offset, target_offset)


def advise_sequential(descriptor: int) -> None:
    """Tell the kernel to read ahead."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def advise_needed(descriptor: int, offset: int, length: int) -> None:
    """Tell the kernel that the range will be read soon."""
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


# ---------------------------------------------------------------------------- direct I/O


def aligned_buffer(length: int) -> memoryview:
    """A writable zeroed buffer of whole pages, as direct I/O takes it."""
    import mmap

    return memoryview(mmap.mmap(-1, max(length, 1)))[:length]


def logical_block_size(descriptor: int) -> int:
    """The sector size of a block device."""
    answer = fcntl.ioctl(descriptor, _BLKSSZGET, struct.pack("i", 0))
    size: int = struct.unpack("i", answer)[0]
    return size


def direct_alignment(descriptor: int) -> int:
    """What offsets and lengths of direct reads and writes must be multiples of."""
    if is_block_device(descriptor):
        return logical_block_size(descriptor)
    return _reported_alignment(descriptor) or _tried_alignment(descriptor)


def _reported_alignment(descriptor: int) -> int:
    """What the kernel says (6.1 and later), or 0."""
    import ctypes

    answer = ctypes.create_string_buffer(_STATX_BYTES)
    try:
        failed = _libc().statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer)
    except (AttributeError, OSError):
        return 0
    mask, alignment = struct.unpack_from("I", answer)[0], 0
    if not failed and mask & _STATX_DIOALIGN:
        alignment = struct.unpack_from("II", answer, _STATX_DIO_OFFSET)[1]
    return int(alignment)


def _tried_alignment(descriptor: int) -> int:
    """The smallest length that a direct read takes; a file without bytes tells nothing."""
    if file_size(descriptor) < 8192:
        return 4096
    view = aligned_buffer(8192)
    for alignment in (512, 1024, 2048):
        try:
            os.preadv(descriptor, [view[:alignment]], alignment)
        except OSError:
            continue
        return alignment
    return 4096


# ----------------------------------------------------------------------------- NBD devices

#: Requests of <linux/nbd.h>: _IO(0xab, n).
_NBD_SET_SOCK, _NBD_SET_BLKSIZE, _NBD_DO_IT, _NBD_CLEAR_SOCK = 0xAB00, 0xAB01, 0xAB03, 0xAB04
_NBD_CLEAR_QUE, _NBD_SET_SIZE_BLOCKS, _NBD_DISCONNECT = 0xAB05, 0xAB07, 0xAB08
_NBD_SET_FLAGS = 0xAB0A
_NBD_BLOCK = 512


def nbd_attach(device: int, connection: int, size: int, flags: int) -> None:
    """Give an NBD device of the kernel a socket behind whose other end a server is.

    Args:
        device, connection: descriptors of the device and of the socket.
        size: of the disk, in bytes: whole sectors.
        flags: of the export, as in the protocol.
    """
    fcntl.ioctl(device, _NBD_SET_SOCK, connection)
    try:
        fcntl.ioctl(device, _NBD_SET_BLKSIZE, _NBD_BLOCK)
        fcntl.ioctl(device, _NBD_SET_SIZE_BLOCKS, size // _NBD_BLOCK)
        fcntl.ioctl(device, _NBD_SET_FLAGS, flags)
    except OSError:
        fcntl.ioctl(device, _NBD_CLEAR_SOCK)
        raise


def nbd_run(device: int) -> None:
    """Have the kernel serve the device; returns when it is taken back."""
    fcntl.ioctl(device, _NBD_DO_IT)


def nbd_detach(device: int) -> None:
    """Give up what `nbd_attach` set."""
    fcntl.ioctl(device, _NBD_CLEAR_QUE)
    fcntl.ioctl(device, _NBD_CLEAR_SOCK)


def nbd_disconnect(device: int) -> None:
    """Take an NBD device from whoever serves it."""
    fcntl.ioctl(device, _NBD_CLEAR_QUE)
    fcntl.ioctl(device, _NBD_DISCONNECT)
    fcntl.ioctl(device, _NBD_CLEAR_SOCK)
