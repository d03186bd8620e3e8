"""macOS: the names of linux.py. What POSIX has alike is linux.py's own.

Sources: fcntl(2) of macOS, F_PUNCHHOLE, F_PREALLOCATE, F_FULLFSYNC, F_NOCACHE; <sys/fcntl.h>
for the numbers of open-file-description locks; <sys/disk.h>.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from diskwright.system.linux import (
    UNSUPPORTED,
    aligned_buffer,
    allocated_size,
    data_or_hole,
    read_into,
    write_all,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class _Fcntl(Protocol):
        """The module `fcntl`, or a simulation of it."""

        def fcntl(self, fd: int, cmd: int, arg: bytes | int = 0, /) -> bytes | int: ...
        def ioctl(self, fd: int, request: int, arg: bytes, /) -> bytes | int: ...


_F_PREALLOCATE = 42
_F_NOCACHE = 48
_F_FULLFSYNC = 51
_F_OFD_SETLK = 90
_F_OFD_GETLK = 92
_F_PUNCHHOLE = 99
_FLOCK = struct.Struct("qqihh")  # struct flock: start, len, pid, type, whence
_RDLCK, _UNLCK, _WRLCK = 1, 2, 3
_FSTORE = struct.Struct("Iiqqq")  # fstore_t: flags, posmode, offset, length, bytesalloc
_FPUNCHHOLE = struct.Struct("IIqq")  # fpunchhole_t: flags, reserved, offset, length
_ALLOCATE_ALL = 4
_FROM_END = 3

_DKIOCGETBLOCKSIZE = 0x40046418
_DKIOCGETBLOCKCOUNT = 0x40086419

#: F_PUNCHHOLE takes whole blocks of the file system; APFS and HFS+ have these.
HOLE_UNIT = 4096


class Host:
    """What the module exports beside linux.py's, on the `fcntl` that it was given."""

    def __init__(self, fcntl: _Fcntl) -> None:
        self._fcntl = fcntl

    def open_file(
        self,
        path: str,
        *,
        read_only: bool,
        direct: bool = False,
        create: bool = False,
        exclusive: bool = False,
    ) -> int:
        """Open a file or device; never truncates it."""
        flags = os.O_RDONLY if read_only else os.O_RDWR
        flags |= os.O_CREAT if create else 0
        flags |= os.O_EXCL if exclusive else 0
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        if direct:
            self._fcntl.fcntl(descriptor, _F_NOCACHE, 1)
        return descriptor

    def duplicate(self, descriptor: int, *, direct: bool) -> int:
        """Another descriptor of the same open file, which has its locks; both are in that mode."""
        self._fcntl.fcntl(descriptor, _F_NOCACHE, int(direct))
        return os.dup(descriptor)

    def is_block_device(self, descriptor: int) -> bool:
        """Whether the descriptor is a disk, which is a character device too."""
        mode = os.fstat(descriptor).st_mode
        return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)

    def is_write_protected(self, descriptor: int) -> bool:
        """Never: the system does not open such a device for writing."""
        return False

    def file_size(self, descriptor: int) -> int:
        """Bytes in a file or disk."""
        if not self.is_block_device(descriptor):
            return os.fstat(descriptor).st_size
        count = self._fcntl.ioctl(descriptor, _DKIOCGETBLOCKCOUNT, bytes(8))
        assert isinstance(count, bytes)
        return int.from_bytes(count, "little") * self.logical_block_size(descriptor)

    def logical_block_size(self, descriptor: int) -> int:
        """The sector size of a disk."""
        size = self._fcntl.ioctl(descriptor, _DKIOCGETBLOCKSIZE, bytes(4))
        assert isinstance(size, bytes)
        return int.from_bytes(size, "little")

    def direct_alignment(self, descriptor: int) -> int:
        """F_NOCACHE only asks for no caching; disks take whole sectors."""
        return self.logical_block_size(descriptor) if self.is_block_device(descriptor) else 1

    # ------------------------------------------------------------------------------ locks

    def _flock(self, descriptor: int, command: int, kind: int, offset: int) -> int:
        request = _FLOCK.pack(offset, 1, 0, kind, os.SEEK_SET)
        answer = self._fcntl.fcntl(descriptor, command, request)
        assert isinstance(answer, bytes)
        found: int = _FLOCK.unpack(answer)[3]
        return found

    def lock_shared(self, descriptor: int, offset: int) -> None:
        """Take a read lock on one byte for this open file."""
        self._flock(descriptor, _F_OFD_SETLK, _RDLCK, offset)

    def unlock(self, descriptor: int, offset: int) -> None:
        """Give up this open file's lock on one byte."""
        self._flock(descriptor, _F_OFD_SETLK, _UNLCK, offset)

    def is_locked(self, descriptor: int, offset: int) -> bool:
        """Whether another open file holds any lock on the byte."""
        return self._flock(descriptor, _F_OFD_GETLK, _WRLCK, offset) != _UNLCK

    def locks_supported(self, descriptor: int) -> bool:
        """Whether the file system has such locks."""
        try:
            self.is_locked(descriptor, 0)
        except OSError:
            return False
        return True

    def lock_holders(
        self, descriptor: int, offsets: tuple[int, ...], limit: int = 8
    ) -> list[tuple[int, str]]:
        """There is no /proc to find them in."""
        return []

    # -------------------------------------------------------------------- holes and zeroes

    def punch_hole(self, descriptor: int, offset: int, length: int) -> None:
        """Give the whole blocks of the range back and write zeroes around them."""
        first = -(-offset // HOLE_UNIT) * HOLE_UNIT
        last = (offset + length) // HOLE_UNIT * HOLE_UNIT
        if last > first:
            request = _FPUNCHHOLE.pack(0, 0, first, last - first)
            self._fcntl.fcntl(descriptor, _F_PUNCHHOLE, request)
        else:
            first = last = offset
        for start, stop in ((offset, first), (last, offset + length)):
            if stop > start:
                write_all(descriptor, start, memoryview(bytes(stop - start)))

    def discard(self, descriptor: int, offset: int, length: int) -> None:
        """Give the whole blocks of the range back."""
        first = -(-offset // HOLE_UNIT) * HOLE_UNIT
        last = (offset + length) // HOLE_UNIT * HOLE_UNIT
        if last > first:
            self.punch_hole(descriptor, first, last - first)

    def zero_range(
        self, descriptor: int, offset: int, length: int, *, keep_size: bool = False
    ) -> None:
        """There is no such call; the caller falls back."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def preallocate(self, descriptor: int, offset: int, length: int) -> None:
        """Reserve space beyond the file's end, and move the end; holes stay holes."""
        stop, size = offset + length, self.file_size(descriptor)
        if stop <= size:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        request = _FSTORE.pack(_ALLOCATE_ALL, _FROM_END, 0, stop - size, 0)
        self._fcntl.fcntl(descriptor, _F_PREALLOCATE, request)
        os.ftruncate(descriptor, stop)

    def reserve(self, descriptor: int, offset: int, length: int) -> None:
        """There is no such call that lets the file's end be."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def turn_off_copy_on_write(self, descriptor: int) -> None:
        """There is no such thing here."""

    def hint_extent_size(self, descriptor: int, size: int) -> None:
        """There is no such thing here."""

    def nbd_attach(self, device: int, connection: int, size: int, flags: int) -> None:
        """There are no such devices here."""
        raise OSError(errno.ENOTSUP, "this system's kernel has no NBD devices")

    def nbd_run(self, device: int) -> None:
        """See `nbd_attach`."""

    def nbd_detach(self, device: int) -> None:
        """See `nbd_attach`."""

    def nbd_disconnect(self, device: int) -> None:
        """See `nbd_attach`."""
        raise OSError(errno.ENOTSUP, "this system's kernel has no NBD devices")

    # ------------------------------------------------------------------------ moving bytes

    def sync_data(self, descriptor: int) -> None:
        """Make what was written durable: fsync alone leaves it in the drive's cache."""
        try:
            self._fcntl.fcntl(descriptor, _F_FULLFSYNC)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            os.fsync(descriptor)  # a network file system

    def clone_range(
        self, source: int, offset: int, target: int, target_offset: int, *, length: int
    ) -> None:
        """Only whole files can be cloned."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def copy_range(
        self, source: int, offset: int, target: int, target_offset: int, *, length: int
    ) -> int:
        """There is no such call."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def advise_sequential(self, descriptor: int) -> None:
        """The kernel finds out by itself."""

    def advise_needed(self, descriptor: int, offset: int, length: int) -> None:
        """The kernel finds out by itself."""


def _system_fcntl() -> _Fcntl:
    import fcntl

    return fcntl  # type: ignore[return-value]  # overloads, of which two are used


_host = Host(_system_fcntl())
open_file = _host.open_file
duplicate = _host.duplicate
is_block_device = _host.is_block_device
is_write_protected = _host.is_write_protected
file_size = _host.file_size
logical_block_size = _host.logical_block_size
direct_alignment = _host.direct_alignment
lock_shared = _host.lock_shared
unlock = _host.unlock
is_locked = _host.is_locked
locks_supported = _host.locks_supported
lock_holders = _host.lock_holders
punch_hole = _host.punch_hole
discard = _host.discard
zero_range = _host.zero_range
preallocate = _host.preallocate
reserve = _host.reserve
turn_off_copy_on_write = _host.turn_off_copy_on_write
hint_extent_size = _host.hint_extent_size
nbd_attach = _host.nbd_attach
nbd_run = _host.nbd_run
nbd_detach = _host.nbd_detach
nbd_disconnect = _host.nbd_disconnect
sync_data = _host.sync_data
clone_range = _host.clone_range
copy_range = _host.copy_range
advise_sequential = _host.advise_sequential
advise_needed = _host.advise_needed

__all__ = [
    "UNSUPPORTED",
    "aligned_buffer",
    "allocated_size",
    "data_or_hole",
    "read_into",
    "write_all",
]
