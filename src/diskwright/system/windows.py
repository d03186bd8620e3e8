"""Windows: the names of linux.py on Win32 handles.

Byte-range locks of Windows are mandatory: a lock on byte 100 would keep everybody from writing
that byte. They lie far beyond any file's end instead (`LOCK_BASE`), where they bind only those
who look: Diskwright. QEMU takes no locks on Windows, so there is nothing to be compatible with.

Source: Microsoft's Win32 API reference; winioctl.h for the control codes.
"""

from __future__ import annotations

import errno
import os
import struct

from diskwright.system.win32 import Win32

_GENERIC_READ, _GENERIC_WRITE = 0x80000000, 0x40000000
_SHARE_ALL = 7  # read, write, delete
_CREATE_NEW, _OPEN_EXISTING, _OPEN_ALWAYS = 1, 3, 4
_FLAG_NO_BUFFERING = 0x20000000
_FLAG_WRITE_THROUGH = 0x80000000

_FSCTL_SET_SPARSE = 0x900C4
_FSCTL_SET_ZERO_DATA = 0x980C8
_FSCTL_QUERY_ALLOCATED_RANGES = 0x940CF
_FSCTL_DUPLICATE_EXTENTS = 0x98344
_IOCTL_DISK_GET_LENGTH = 0x7405C
_IOCTL_DISK_GET_GEOMETRY = 0x70000

_FILE_STANDARD_INFO = 1  # allocation size, end of file, …
_FILE_STORAGE_INFO = 16  # logical bytes a sector, …

_LOCK_AT_ONCE, _LOCK_EXCLUSIVE = 1, 2
LOCK_BASE = 1 << 62

_MOST = 1 << 30  # ReadFile and WriteFile count in 32 bits

#: errno values that mean "this file system does not do that"
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Host:
    """What the module exports, on the Win32 calls that it was given."""

    def __init__(self, api: Win32) -> None:
        self._api = api
        self._held: dict[int, set[int]] = {}  # handle -> bytes that it has locked
        self._sparse: set[int] = set()

    # ------------------------------------------------------------------------ descriptors

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
        access = _GENERIC_READ if read_only else _GENERIC_READ | _GENERIC_WRITE
        disposition = _OPEN_ALWAYS if create else _OPEN_EXISTING
        if create and exclusive:
            disposition = _CREATE_NEW
        flags = _FLAG_NO_BUFFERING | _FLAG_WRITE_THROUGH if direct else 0
        handle = self._api.create_file(
            path, access, share=_SHARE_ALL, disposition=disposition, flags=flags
        )
        self._held.pop(handle, None)  # a new file may get an old one's number
        self._sparse.discard(handle)
        mode = os.O_RDONLY if read_only else os.O_RDWR
        return self._api.descriptor_of(handle, mode | getattr(os, "O_BINARY", 0))

    def duplicate(self, descriptor: int, *, direct: bool) -> int:
        """−1: an open file's cache mode stays as it was opened here."""
        return -1

    def is_block_device(self, descriptor: int) -> bool:
        """Whether the descriptor is a disk or volume."""
        return self._device_size(self._api.handle_of(descriptor)) is not None

    def is_write_protected(self, descriptor: int) -> bool:
        """Never: the system does not open such a device for writing."""
        return False

    def file_size(self, descriptor: int) -> int:
        """Bytes in a file or device."""
        handle = self._api.handle_of(descriptor)
        size = self._device_size(handle)
        if size is not None:
            return size
        found: int = struct.unpack_from("<qq", self._standard(handle))[1]
        return found

    def _standard(self, handle: int) -> bytes:
        return self._api.file_information(handle, _FILE_STANDARD_INFO, 24)

    def _device_size(self, handle: int) -> int | None:
        try:
            answer = self._api.device_io_control(handle, _IOCTL_DISK_GET_LENGTH, b"", 8)
        except OSError:
            return None
        return int.from_bytes(answer, "little") if len(answer) == 8 else None

    def allocated_size(self, path: str | int) -> int:
        """Bytes the file (a path or a descriptor) occupies on its file system."""
        if isinstance(path, int):
            answer = self._standard(self._api.handle_of(path))
            return int.from_bytes(answer[:8], "little")
        return self._api.compressed_size(path)

    # ------------------------------------------------------------------------------ locks

    def lock_shared(self, descriptor: int, offset: int) -> None:
        """Take a shared lock for this handle; BlockingIOError where an exclusive one stands."""
        handle = self._api.handle_of(descriptor)
        held = self._held.setdefault(handle, set())
        if offset in held:
            return
        self._lock(handle, offset)
        held.add(offset)

    def _lock(self, handle: int, offset: int) -> None:
        # Somebody who only looks holds the byte exclusively for a moment.
        for attempt in range(50):
            try:
                self._api.lock_file(handle, LOCK_BASE + offset, _LOCK_AT_ONCE)
                return
            except BlockingIOError:
                if attempt == 49:
                    raise
            import time

            time.sleep(0.002)

    def unlock(self, descriptor: int, offset: int) -> None:
        """Give up this handle's lock on one byte."""
        handle = self._api.handle_of(descriptor)
        held = self._held.get(handle, set())
        if offset in held:
            self._api.unlock_file(handle, LOCK_BASE + offset)
            held.discard(offset)

    def is_locked(self, descriptor: int, offset: int) -> bool:
        """Whether another handle holds any lock on the byte.

        There is no way to ask: an exclusive lock is tried. A shared one of our own would be in
        its way and is given up meanwhile.
        """
        handle = self._api.handle_of(descriptor)
        own = offset in self._held.get(handle, ())
        if own:
            self._api.unlock_file(handle, LOCK_BASE + offset)
        try:
            self._api.lock_file(handle, LOCK_BASE + offset, _LOCK_AT_ONCE | _LOCK_EXCLUSIVE)
        except BlockingIOError:
            return True
        else:
            self._api.unlock_file(handle, LOCK_BASE + offset)
            return False
        finally:
            if own:
                self._lock(handle, offset)

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
        """Windows does not say who holds a lock."""
        return []

    # -------------------------------------------------------------------- holes and zeroes

    def data_or_hole(self, descriptor: int, offset: int, size: int) -> tuple[bool, int]:
        """(whether there is data at `offset`, where that run ends); all data where unknown."""
        handle = self._api.handle_of(descriptor)
        asked = struct.pack("<qq", offset, size - offset)
        try:
            answer = self._api.device_io_control(handle, _FSCTL_QUERY_ALLOCATED_RANGES, asked, 16)
        except OSError:
            return True, size
        if len(answer) < 16:
            return False, size
        start, length = struct.unpack_from("<qq", answer)
        if start > offset:
            return False, min(start, size)
        return True, min(max(start + length, offset + 1), size)

    def punch_hole(self, descriptor: int, offset: int, length: int) -> None:
        """Give the range's space back; it reads as zero."""
        handle = self._api.handle_of(descriptor)
        if handle not in self._sparse:
            self._api.device_io_control(handle, _FSCTL_SET_SPARSE, b"", 0)
            self._sparse.add(handle)
        self._zero(handle, offset, length)

    def _zero(self, handle: int, offset: int, length: int) -> None:
        asked = struct.pack("<qq", offset, offset + length)
        self._api.device_io_control(handle, _FSCTL_SET_ZERO_DATA, asked, 0)

    def discard(self, descriptor: int, offset: int, length: int) -> None:
        """Say that the range's content is not needed."""
        self.punch_hole(descriptor, offset, length)

    def zero_range(
        self, descriptor: int, offset: int, length: int, *, keep_size: bool = False
    ) -> None:
        """Make the range read as zero; a file that is not sparse keeps its space."""
        if not keep_size and self.file_size(descriptor) < offset + length:
            os.ftruncate(descriptor, offset + length)
        self._zero(self._api.handle_of(descriptor), offset, length)

    def preallocate(self, descriptor: int, offset: int, length: int) -> None:
        """Reserve space for the range: a file that is not sparse gets it with its size."""
        if self.file_size(descriptor) < offset + length:
            os.ftruncate(descriptor, offset + length)

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

    def read_into(self, descriptor: int, offset: int, view: memoryview) -> int:
        """Read until `view` is full or the file ends; returns the count."""
        handle = self._api.handle_of(descriptor)
        done = 0
        while done < len(view):
            count = self._api.read_file(handle, offset + done, view[done : done + _MOST])
            if not count:
                break
            done += count
        return done

    def write_all(self, descriptor: int, offset: int, view: memoryview) -> int:
        """Write all of `view`; returns the count."""
        handle = self._api.handle_of(descriptor)
        done = 0
        while done < len(view):
            count = self._api.write_file(handle, offset + done, view[done : done + _MOST])
            if not count:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += count
        return done

    def sync_data(self, descriptor: int) -> None:
        """Make what was written durable."""
        self._api.flush_file_buffers(self._api.handle_of(descriptor))

    def clone_range(
        self, source: int, offset: int, target: int, target_offset: int, *, length: int
    ) -> None:
        """Share the blocks of one file with another (ReFS)."""
        asked = struct.pack("<qqqq", self._api.handle_of(source), offset, target_offset, length)
        self._api.device_io_control(self._api.handle_of(target), _FSCTL_DUPLICATE_EXTENTS, asked, 0)

    def copy_range(
        self, source: int, offset: int, target: int, target_offset: int, *, length: int
    ) -> int:
        """The kernel copies whole files only."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def advise_sequential(self, descriptor: int) -> None:
        """Decided when a file is opened; nothing to do."""

    def advise_needed(self, descriptor: int, offset: int, length: int) -> None:
        """There is no such thing here."""

    # -------------------------------------------------------------------------- direct I/O

    def aligned_buffer(self, length: int) -> memoryview:
        """A writable zeroed buffer of whole pages."""
        import mmap

        return memoryview(mmap.mmap(-1, max(length, 1)))[:length]

    def logical_block_size(self, descriptor: int) -> int:
        """The sector size of a device."""
        handle = self._api.handle_of(descriptor)
        answer = self._api.device_io_control(handle, _IOCTL_DISK_GET_GEOMETRY, b"", 24)
        return int.from_bytes(answer[20:24], "little") or 512

    def direct_alignment(self, descriptor: int) -> int:
        """What offsets and lengths of unbuffered requests must be multiples of."""
        if self.is_block_device(descriptor):
            return self.logical_block_size(descriptor)
        handle = self._api.handle_of(descriptor)
        try:
            answer = self._api.file_information(handle, _FILE_STORAGE_INFO, 28)
        except OSError:
            return 4096
        return int.from_bytes(answer[:4], "little") or 4096


_host = Host(Win32())
open_file = _host.open_file
duplicate = _host.duplicate
is_block_device = _host.is_block_device
is_write_protected = _host.is_write_protected
file_size = _host.file_size
allocated_size = _host.allocated_size
lock_shared = _host.lock_shared
unlock = _host.unlock
is_locked = _host.is_locked
locks_supported = _host.locks_supported
lock_holders = _host.lock_holders
data_or_hole = _host.data_or_hole
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
read_into = _host.read_into
write_all = _host.write_all
sync_data = _host.sync_data
clone_range = _host.clone_range
copy_range = _host.copy_range
advise_sequential = _host.advise_sequential
advise_needed = _host.advise_needed
aligned_buffer = _host.aligned_buffer
logical_block_size = _host.logical_block_size
direct_alignment = _host.direct_alignment
