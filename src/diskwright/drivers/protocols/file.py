"""A file or block device of this machine.

Locks: byte 100 + n of the file is read-locked for permission n held, 200 + n for permission n
not shared, by open-file-description locks: the same bytes QEMU uses, so that either respects
the other. New locks are taken before old ones are given up.
"""

from __future__ import annotations

import errno
import os
import stat

from diskwright.block import requests
from diskwright.block.extent import DATA, ZERO, Extent
from diskwright.block.limits import Limits
from diskwright.block.node import Node
from diskwright.block.options import Option, Options
from diskwright.block.permission import ALL, NAMES
from diskwright.errors import (
    DiskwrightError,
    LockError,
    OptionError,
    UnsupportedError,
    from_oserror,
)
from diskwright.system import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskwright.block.opener import Opener

_HELD = 100
_NOT_SHARED = 200

_PREALLOCATIONS = ("off", "falloc", "full")


class File(Node):
    """A regular file or block device, by path."""

    driver = "file"
    is_protocol = True
    options = Options(
        Option("filename", help="File name of the image"),
        Option("locking", "enum", "auto", "file locking mode", choices=("on", "off", "auto")),
        Option(
            "aio",
            "enum",
            "threads",
            "accepted for QEMU's sake; all input and output is by threads",
            choices=("threads", "native", "io_uring"),
        ),
    )
    create_options = Options(
        Option("size", "size", None, "Virtual disk size"),
        Option(
            "preallocation",
            "enum",
            None,
            "Preallocation mode (allowed values: off, falloc, full)",
            choices=_PREALLOCATIONS,
        ),
        Option("nocow", "bool", None, "Turn off copy-on-write (valid only on btrfs)"),
        Option("extent_size_hint", "size", None, "Extent size hint for the image file, 0 to disable"),
    )

    _descriptor = -1
    _used = 0
    _shared = ALL
    _locking = False
    _no_flush = False
    _punches = True
    _zeroes = True

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        path = options["filename"]
        if not path:
            raise OptionError("A file name is needed", qemu="The 'file' block driver requires a file name")
        self.filename = str(path)
        path = self.filename.removeprefix("file:") if self.filename.startswith("file:") else self.filename
        direct = opener.direct
        try:
            mode = os.stat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                text = f"'file' driver requires '{path}' to be a regular file"
                raise DiskwrightError(text, kind="io", path=path)
            self._descriptor = host.open_file(path, read_only=self.read_only, direct=direct)
        except OSError as error:
            raise from_oserror(error, f"Could not open '{path}'", path=path) from error
        self.size = host.file_size(self._descriptor)
        self._no_flush = opener.no_flush
        self._force_share = opener.force_share and self.read_only
        wanted = options["locking"]
        self._locking = wanted != "off" and host.locks_supported(self._descriptor)
        if wanted == "on" and not self._locking:
            raise UnsupportedError(f"Locking is not supported for '{path}'", path=path)
        alignment = host.direct_alignment(self._descriptor) if direct else 1
        self.limits = Limits(
            request_alignment=alignment,
            memory_alignment=4096 if direct else 1,
            zero_alignment=alignment,
        )

    # ------------------------------------------------------------------ reading and writing

    def locate(self, offset: int, length: int, *, write: bool = False) -> int:
        """Every byte lies where it is."""
        return offset

    def _lend(self) -> tuple[int, int] | None:
        return None if self.limits.request_alignment > 1 else (self._descriptor, 0)

    def _read_into(self, offset: int, view: memoryview) -> None:
        try:
            count = host.read_into(self._descriptor, offset, view)
        except OSError as error:
            if error.errno != errno.EINVAL or self.limits.memory_alignment == 1:
                raise self.failure(error, "Could not read") from error
            bounce = self.aligned_buffer(len(view))
            count = host.read_into(self._descriptor, offset, bounce)
            view[:] = bounce
        if count < len(view):
            requests.fill_zero(view[count:])

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        try:
            host.write_all(self._descriptor, offset, view)
        except OSError as error:
            if error.errno != errno.EINVAL or self.limits.memory_alignment == 1:
                raise self.failure(error, "Could not write to") from error
            bounce = self.aligned_buffer(len(view))
            bounce[:] = view
            host.write_all(self._descriptor, offset, bounce)

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        if flags & requests.UNMAP and self._punches:
            try:
                self._extend(offset + length)
                host.punch_hole(self._descriptor, offset, length)
                return
            except OSError as error:
                if error.errno not in host.UNSUPPORTED:
                    raise self.failure(error, "Could not punch a hole into") from error
                self._punches = False
        if self._zeroes:
            try:
                host.zero_range(self._descriptor, offset, length)
                return
            except OSError as error:
                if error.errno not in host.UNSUPPORTED:
                    raise self.failure(error, "Could not zero a range of") from error
                self._zeroes = False
        raise UnsupportedError(f"{self.describe()}: the file system has no fast zeroing")

    def _extend(self, size: int) -> None:
        if size > self.size and not host.is_block_device(self._descriptor):
            os.ftruncate(self._descriptor, size)

    def _discard(self, offset: int, length: int) -> None:
        if not self._punches:
            return
        try:
            host.punch_hole(self._descriptor, offset, length)
        except OSError as error:
            if error.errno not in host.UNSUPPORTED:
                raise self.failure(error, "Could not punch a hole into") from error
            self._punches = False

    def _flush(self) -> None:
        if self._no_flush or self.read_only:
            return
        try:
            host.sync_data(self._descriptor)
        except OSError as error:
            raise self.failure(error, "Could not flush") from error

    def _extents(self, offset: int, length: int) -> Iterable[Extent]:
        position, stop = offset, offset + length
        size = self.size
        while position < stop:
            data, end = host.data_or_hole(self._descriptor, position, size)
            end = min(end, stop)
            kind = DATA if data else ZERO
            yield Extent(position, end - position, kind, host_offset=position)
            position = end

    # --------------------------------------------------------------------------------- size

    def refresh_size(self) -> None:
        """The file may have been made longer through the lent descriptor."""
        self.size = max(self.size, host.file_size(self._descriptor)) if self._descriptor >= 0 else 0

    @property
    def has_zero_init(self) -> bool:
        """A new regular file reads as zero."""
        return not host.is_block_device(self._descriptor)

    def _truncate(self, size: int, exact: bool, preallocation: str) -> None:
        if host.is_block_device(self._descriptor):
            if size > self.size or (exact and size != self.size):
                raise UnsupportedError(
                    f"{self.describe()} is a device of {self.size} bytes",
                    qemu="Cannot resize device files",
                )
            return
        if preallocation not in _PREALLOCATIONS:
            raise UnsupportedError(f"Unsupported preallocation mode '{preallocation}'")
        old = host.file_size(self._descriptor)
        if preallocation != "off" and size < old:
            raise UnsupportedError("Preallocation can't be used for shrinking files")
        try:
            _set_size(self._descriptor, old, size, preallocation)
        except OSError as error:
            os.ftruncate(self._descriptor, old)
            raise self.failure(error, "Could not resize") from error
        self.size = size

    # -------------------------------------------------------------------------------- locks

    def _permissions_changed(self, used: int, shared: int) -> None:
        if not self._locking or self._descriptor < 0:
            return
        if self._force_share:
            shared = ALL
        try:
            _take(self._descriptor, used | self._used, ALL & ~(shared & self._shared))
            self._probe_locks(used, shared)
        except BaseException:
            _give_back(self._descriptor, self._used, ALL & ~self._shared)
            raise
        self._used, self._shared = used, shared
        _give_back(self._descriptor, used, ALL & ~shared)

    def _probe_locks(self, used: int, shared: int) -> None:
        for bit, name in enumerate(NAMES):
            if used >> bit & 1 and host.is_locked(self._descriptor, _NOT_SHARED + bit):
                raise self._lock_error(f'Failed to get "{name}" lock', _NOT_SHARED + bit)
            if not shared >> bit & 1 and host.is_locked(self._descriptor, _HELD + bit):
                raise self._lock_error(f'Failed to get shared "{name}" lock', _HELD + bit)

    def _lock_error(self, sentence: str, byte: int) -> LockError:
        return lock_error(self._descriptor, self.filename, sentence, byte)

    # ------------------------------------------------------------------------- end and begin

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        """Make the file, or empty the one that is there, under the locks of a writer."""
        path = str(options["filename"]).removeprefix("file:")
        try:
            descriptor = host.open_file(path, read_only=False, create=True)
        except OSError as error:
            raise from_oserror(error, f"Could not create '{path}'", path=path) from error
        try:
            _lock_for_create(descriptor, path)
            if host.is_block_device(descriptor):
                return
            os.ftruncate(descriptor, 0)
            _set_size(descriptor, 0, size, str(options.get("preallocation") or "off"))
        except OSError as error:
            raise from_oserror(error, f"Could not resize '{path}'", path=path) from error
        finally:
            os.close(descriptor)


def lock_error(descriptor: int, path: str, sentence: str, byte: int) -> LockError:
    """The error for a byte that somebody else locks, with who it is where that can be seen."""
    qemu = f"{sentence}\nIs another process using the image [{path}]?"
    holders = host.lock_holders(descriptor, (byte,))
    text = qemu
    if holders:
        named = "; ".join(f"process {pid}, {command}" for pid, command in holders)
        text = f"{qemu}\nIt is in use by {named}"
    return LockError(text, holders=holders, path=path, hint="wait until it ends, or stop it")


def _take(descriptor: int, used: int, not_shared: int) -> None:
    for bit in range(len(NAMES)):
        if used >> bit & 1:
            host.lock_shared(descriptor, _HELD + bit)
        if not_shared >> bit & 1:
            host.lock_shared(descriptor, _NOT_SHARED + bit)


def _give_back(descriptor: int, used: int, not_shared: int) -> None:
    """Unlock what is neither used nor unshared."""
    for bit in range(len(NAMES)):
        if not used >> bit & 1:
            host.unlock(descriptor, _HELD + bit)
        if not not_shared >> bit & 1:
            host.unlock(descriptor, _NOT_SHARED + bit)


def _lock_for_create(descriptor: int, path: str) -> None:
    """A writer's locks for as long as the descriptor is open; RESIZE is not shared."""
    if not host.locks_supported(descriptor):
        return
    _take(descriptor, 2 | 8, 8)
    for bit in (1, 3):
        if host.is_locked(descriptor, _NOT_SHARED + bit):
            raise lock_error(descriptor, path, f'Failed to get "{NAMES[bit]}" lock', _NOT_SHARED + bit)
    if host.is_locked(descriptor, _HELD + 3):
        raise lock_error(descriptor, path, 'Failed to get shared "resize" lock', _HELD + 3)


def _set_size(descriptor: int, old: int, size: int, preallocation: str) -> None:
    """Change a regular file's size; what is added is reserved or written as asked."""
    if preallocation == "falloc" and size > old:
        host.preallocate(descriptor, old, size - old)
        return
    os.ftruncate(descriptor, size)
    if preallocation == "full":
        zeroes = memoryview(bytes(requests.PIECE))
        for start in range(old, size, requests.PIECE):
            host.write_all(descriptor, start, zeroes[: min(requests.PIECE, size - start)])
        host.sync_data(descriptor)
