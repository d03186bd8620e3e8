"""A file or a device of this machine.

Read and written: regular files (`file`), and block and character devices, whose size is the
device's (`host_device`). Locks are QEMU's (`system/image_locks.py`). Holes are the file system's:
SEEK_DATA finds them, and zeroing and discarding make them where it can.

With direct I/O (cache modes none and directsync) the engine pads requests to what the device
takes; a file whose size is no multiple of that is cut back to it at the end.

Only one thing may make the file longer at a time, or the `ftruncate` of one would cut off what
another appended: whoever reaches past `size` holds `size_lock`.
"""

from __future__ import annotations

import errno
import os
import stat

from diskwright.block import requests
from diskwright.block.extent import DATA, ZERO, Extent
from diskwright.block.filename import has_protocol
from diskwright.block.info import NodeInfo
from diskwright.block.limits import Limits
from diskwright.block.node import Node
from diskwright.block.options import Option, Options, whole
from diskwright.block.permission import ALL, RESIZE, WRITE
from diskwright.errors import AccessError, IOFailure, OptionError, UnsupportedError, from_oserror
from diskwright.system import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from diskwright.block.opener import Opener
    from diskwright.block.reopen import Reopening
    from diskwright.system.image_locks import ImageLocks
    from diskwright.system.new_file import NewFile

_REFUSAL = "invalid parameter value: {value}"
_PAGE = 4096
_STEP = 32 << 20  # by which a file grows for writers around its node


class File(Node):
    """A regular file, by path."""

    driver = "file"
    is_protocol = True
    options = Options(
        Option("filename", help="path of the file"),
        Option(
            "locking",
            "enum",
            "auto",
            "lock the file",
            choices=("on", "off", "auto"),
            refusal=_REFUSAL,
        ),
        Option(
            "aio",
            "enum",
            None,
            "accepted as QEMU does, threads by default; here the callers' threads read and write",
            choices=("threads", "native", "io_uring"),
            refusal=_REFUSAL,
        ),
    )
    create_options = Options(
        Option("size", "size", None, "Virtual disk size"),
        Option(
            "preallocation",
            "enum",
            None,
            "Preallocation mode (allowed values: off, falloc, full)",
            choices=("off", "falloc", "full", "metadata"),  # this one formats have, and we refuse
            refusal=_REFUSAL,
        ),
        Option("nocow", "bool", None, "Turn off copy-on-write (valid only on btrfs)"),
        Option(
            "extent_size_hint", "size", None, "Extent size hint for the image file, 0 to disable"
        ),
    )

    _descriptor = -1
    _locks: ImageLocks | None = None
    _force_share = False
    _no_flush = False
    #: what error lines call what the driver takes
    _wanted = "a regular file"
    _is_device = False
    _can_discard = True
    _can_punch = True
    _can_zero_range = True
    _can_reserve = True
    _overhangs = False  # the file may be longer than `size`: by a padded write, or by `reach`
    _reached = 0  # the file is at least that long

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        path = self.filename = str(options["filename"] or "")
        if not path:
            raise OptionError(
                "A file name is needed",
                qemu=f"The '{self.driver}' block driver requires a file name",
            )
        if "\0" in path:
            raise OptionError("A file name cannot have a zero byte in it", field="filename")
        made = () if self.read_only else opener.made
        self._descriptor = self._open_existing(path, direct=opener.direct, made=made)
        if (options["aio"] or opener.aio) == "native" and not opener.direct:
            raise OptionError(
                "aio=native was specified, but it requires cache.direct=on, "
                "which was not specified.",
                field="aio",
            )
        self.size = host.file_size(self._descriptor)
        self._no_flush = opener.no_flush
        self._force_share = opener.force_share and self.read_only
        kept = next((one.used for one in made if one.is_meant(path)), 0)
        self._prepare_locks(str(options["locking"]), kept)
        self.limits = self._find_limits(opener.direct)

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, object]:
        """What follows `file:` is a path, though it may look like another protocol."""
        path = name.removeprefix("file:")
        return {"filename": f"./{path}" if has_protocol(path) else path}

    def _prepare_locks(self, wanted: str, kept: int) -> None:
        if wanted == "off":
            return
        if host.locks_supported(self._descriptor):
            from diskwright.system.image_locks import ImageLocks

            self._locks = ImageLocks(self._descriptor, self.filename, kept)
        elif wanted == "on":
            raise UnsupportedError(
                f"The file system has no locks for {self.describe()}",
                path=self.filename,
                hint="locking=auto goes on without them",
            )

    @staticmethod
    def _takes(mode: int) -> bool:
        """Whether the driver is for files of that kind; opening others can block, or do harm."""
        return stat.S_ISREG(mode)

    def _open_existing(
        self,
        path: str,
        *,
        direct: bool,
        read_only: bool | None = None,
        made: Iterable[NewFile] = (),
    ) -> int:
        """A descriptor of what is there, of the right kind; of the maker's open file, if it can."""
        if read_only is None:
            read_only = self.read_only
        wrong_kind = errno.EINVAL
        try:
            for one in made:
                if (lent := one.lend(path, direct=direct)) >= 0:
                    return lent
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                wrong_kind = errno.EISDIR
            if self._takes(mode) or (stat.S_ISDIR(mode) and not read_only):
                return self._open_kind(path, read_only=read_only, direct=direct)
        except OSError as error:
            raised = from_oserror(error, f"Could not open '{path}'", path=path)
            if direct and error.errno == errno.EINVAL:
                raised.hint = "the file system may have no direct I/O: try another cache mode"
            raise raised from error
        raise IOFailure(
            f"'{self.driver}' driver requires '{path}' to be {self._wanted}",
            errno=wrong_kind,
            path=path,
        )

    def _open_kind(self, path: str, *, read_only: bool, direct: bool) -> int:
        """A descriptor of a file of the right kind."""
        return host.open_file(path, read_only=read_only, direct=direct)

    def _find_limits(self, direct: bool) -> Limits:
        alignment = host.direct_alignment(self._descriptor) if direct else 1
        is_block = host.is_block_device(self._descriptor)
        block = host.logical_block_size(self._descriptor) if is_block else 1
        return Limits(
            request_alignment=alignment,
            memory_alignment=_PAGE if direct else 1,
            zero_alignment=max(alignment, block),
            discard_alignment=max(alignment, block),
        )

    # ------------------------------------------------------------------ reading and writing

    def locate(self, offset: int, length: int, *, write: bool = False) -> int:
        """Every byte lies where it is."""
        return offset

    def _lend(self) -> tuple[int, int] | None:
        return None if self.limits.request_alignment > 1 else (self._descriptor, 0)

    def _read_into(self, offset: int, view: memoryview) -> None:
        try:
            count = self._transfer(host.read_into, offset, view, False)
        except OSError as error:
            raise self.failure(error, "Could not read") from error
        if count < len(view):
            requests.fill_zero(view[count:])

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        try:
            if offset + len(view) > self.size:
                with self.size_lock:
                    self._overhangs |= self.limits.request_alignment > 1
                    self._transfer(host.write_all, offset, view, True)
            else:
                self._transfer(host.write_all, offset, view, True)
        except OSError as error:
            raise self.failure(error, "Could not write to") from error

    def _transfer(
        self,
        move: Callable[[int, int, memoryview], int],
        offset: int,
        view: memoryview,
        write: bool,
    ) -> int:
        """Read or write, through an aligned buffer where the caller's is refused."""
        try:
            return move(self._descriptor, offset, view)
        except OSError as error:
            if error.errno != errno.EINVAL or self.limits.memory_alignment == 1:
                raise
        bounce = host.aligned_buffer(len(view))
        if write:
            bounce[:] = view
        count = move(self._descriptor, offset, bounce)
        if not write:
            view[:count] = bounce[:count]
        return count

    def _flush(self) -> None:
        if self._no_flush or self.read_only:
            return
        try:
            host.sync_data(self._descriptor)
        except OSError as error:
            if self._is_device and error.errno == errno.EINVAL:
                return  # a character device, which holds nothing back
            raise self.failure(error, "Could not flush") from error

    # ------------------------------------------------------------------- zeroes and holes

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        aligned = not (offset | length) & (self.limits.zero_alignment - 1)
        if self._is_device and offset + length > self.size:
            raise self.failure(OSError(errno.ENOSPC, ""), "Could not write to")
        if self._is_device and not aligned:
            raise UnsupportedError(f"{self.describe()} zeroes whole sectors only")
        # A device that cannot zero a range writes zeroes out, which `fast` must not do.
        slow = self._is_device and flags & requests.FAST
        if (flags & requests.UNMAP or slow) and self._punch(offset, length):
            return
        if not slow and self._zero_range(offset, length):
            return
        if not self._is_device and self._punch(offset, length) and self._reserve(offset, length):
            return
        raise UnsupportedError(f"{self.describe()}: the file system has no fast zeroing")

    def _punch(self, offset: int, length: int) -> bool:
        if not self._can_punch:
            return False
        self._extend(offset + length)
        self._can_punch = self._attempt(host.punch_hole, offset, length)
        return self._can_punch

    def _zero_range(self, offset: int, length: int) -> bool:
        if self._can_zero_range:
            self._can_zero_range = self._attempt(host.zero_range, offset, length)
        return self._can_zero_range

    def _reserve(self, offset: int, length: int) -> bool:
        return self._attempt(host.preallocate, offset, length)

    def reserve_space(self, offset: int, length: int) -> None:
        """In the file system; a device has its space, and cache=unsafe promises nothing."""
        if self._can_reserve and not (self._is_device or self._no_flush):
            self._can_reserve = self._attempt(host.reserve, offset, length)

    def _attempt(self, change: Callable[[int, int, int], None], offset: int, length: int) -> bool:
        """Whether the system does that; errors of other kinds are raised."""
        try:
            change(self._descriptor, offset, length)
        except OSError as error:
            if error.errno not in host.UNSUPPORTED:
                raise self.failure(error, "Could not zero a range of") from error
            return False
        return True

    def _extend(self, size: int) -> None:
        """A hole ends where the file does, so the file must reach that far first."""
        if size <= self.size or self._is_device:
            return
        with self.size_lock:
            if host.file_size(self._descriptor) < size:
                os.ftruncate(self._descriptor, size)

    def _read_ahead(self, offset: int, length: int) -> None:
        host.advise_needed(self._descriptor, offset, length)

    def _discard(self, offset: int, length: int) -> None:
        if self._can_discard:
            self._can_discard = self._attempt(host.discard, offset, length)

    def _extents(self, offset: int, length: int) -> Iterator[Extent]:
        position, stop = offset, offset + length
        while position < stop:
            is_data, end = host.data_or_hole(self._descriptor, position, self.size)
            end = min(end, stop) if end > position else stop
            kind = DATA if is_data else ZERO
            yield Extent(position, end - position, kind, host_offset=position)
            position = end

    @property
    def has_zero_init(self) -> bool:
        """A new regular file reads as zero."""
        return not self._is_device

    @property
    def allocated_size(self) -> int:
        """Bytes that the file occupies on its file system."""
        return host.allocated_size(self._descriptor)

    def _info(self) -> NodeInfo:
        return NodeInfo(self.driver, self.size, format_specific={})

    # --------------------------------------------------------------------------------- size

    def refresh_size(self) -> None:
        """The file may have been made longer through the lent descriptor."""
        if self._descriptor >= 0 and not self._overhangs:
            self.size = max(self.size, host.file_size(self._descriptor))

    def reach(self, stop: int) -> None:
        """See `Node.reach`: the file grows in long steps, and at the end is cut to what is used.

        Each step waits for the file's other writers, so there should be few of them.
        """
        with self.size_lock:
            if self._is_device:
                return  # who writes past the end is told that by the system
            if stop > self._reached:
                length = host.file_size(self._descriptor)
                if stop > length:
                    length = self._grow_ahead(stop)
                self._reached = length
            self.size = max(self.size, stop)

    def _grow_ahead(self, stop: int) -> int:
        """Make the file longer than `stop`; returns its length."""
        try:
            os.ftruncate(self._descriptor, stop + _STEP)
        except OSError:  # more than the file system or a limit allows
            try:
                os.ftruncate(self._descriptor, stop)
            except OSError as error:
                raise self.failure(error, "Could not write to") from error
            return stop
        self._overhangs = True
        return stop + _STEP

    def _truncate(self, size: int, exact: bool, preallocation: str) -> None:
        if self._is_device:
            if preallocation != "off":
                raise UnsupportedError(
                    f"Preallocation mode '{preallocation}' unsupported for this non-regular file"
                )
            if size > self.size or (exact and size != self.size):
                raise UnsupportedError(
                    f"{self.describe()} is a device of {self.size} bytes",
                    qemu="Cannot grow device files" if not exact else "Cannot resize device files",
                    kind="fixed-size",
                )
            return
        from diskwright.drivers.protocols.file import sizes

        old = self.size if self._overhangs else host.file_size(self._descriptor)
        if size >= old or preallocation == "off":
            sizes.require_preallocation(preallocation)
        if size > old or exact:
            sizes.set_size(self._descriptor, old, size, preallocation)
            self._overhangs = False
            self._reached = 0
        self.size = max(size, old) if not exact else size

    # -------------------------------------------------------------------- locks, end, begin

    def _prepare_reopen(self, wanted: Reopening) -> Callable[[bool], None]:
        """Open the file once more, as wanted, beside the descriptor that is in use."""
        direct = self.limits.request_alignment > 1 if wanted.direct is None else wanted.direct
        read_only = self.read_only if wanted.read_only is None else wanted.read_only
        if self._force_share and not read_only:
            raise OptionError(
                "force-share=on can only be used with read-only images", field="force-share"
            )
        fresh = self._open_existing(self.filename, read_only=read_only, direct=direct)

        def finish(done: bool) -> None:
            if not done:
                os.close(fresh)
                return
            if self._locks is not None:
                self._locks.move_to(fresh)
            os.close(self._descriptor)
            self._descriptor = fresh
            self.limits = self._find_limits(direct)
            if wanted.no_flush is not None:
                self._no_flush = wanted.no_flush

        if not os.path.sameopenfile(fresh, self._descriptor):
            finish(False)
            raise IOFailure(
                f"{self.describe()} is another file now than the one that is open",
                path=self.filename,
            )
        return finish

    def _permissions_changed(self, used: int, shared: int) -> None:
        if self._locks is not None and self._descriptor >= 0:
            self._locks.change(used, ALL if self._force_share else shared)

    def _finish(self) -> None:
        if self._overhangs and host.file_size(self._descriptor) > self.size:
            os.ftruncate(self._descriptor, self.size)
        self._reached = 0

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            os.close(descriptor)
        except OSError as error:
            safe = not self.unflushed and not self._no_flush
            if not safe and self.broken is None:  # else that was told already
                raise self.failure(error, "Could not close") from error

    def _dropped(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    @classmethod
    def check_place(cls, options: dict[str, object]) -> None:
        """The folder must be there."""
        path = str(options["filename"])
        try:
            os.stat(os.path.join(os.path.dirname(path.rstrip("/")), "."))
        except OSError as error:
            raise from_oserror(error, f"Could not create '{path}'", path=path) from error

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        """Make the file, or empty the one that is there, under the locks of a writer."""
        from diskwright.drivers.protocols.file import sizes
        from diskwright.system.new_file import open_new

        path = str(options["filename"])
        preallocation = str(options.get("preallocation") or "off")
        if size >= 1 << 63:  # before anything is emptied
            sizes.refuse_size(preallocation)
        try:
            made = open_new(path, WRITE | RESIZE, ALL & ~RESIZE)
        except OSError as error:
            raise from_oserror(error, f"Could not create '{path}'", path=path) from error
        opener.made.append(made)
        descriptor = made.descriptor
        sizes.require_preallocation(preallocation)
        if host.file_size(descriptor):
            sizes.set_size(descriptor, 0, 0, "off")
            made.was_emptied()
        if options.get("nocow"):
            host.turn_off_copy_on_write(descriptor)
        if hint := options.get("extent_size_hint"):
            host.hint_extent_size(descriptor, whole(hint))
        if size:
            sizes.set_size(descriptor, 0, size, preallocation)
        made.share()


class HostDevice(File):
    """A block or character device, by path."""

    driver = "host_device"
    create_options = Options(Option("size", "size", None, "Virtual disk size"))
    _wanted = "either a character or block device"
    _is_device = True
    can_grow = False

    @staticmethod
    def _takes(mode: int) -> bool:
        return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)

    def _open_kind(self, path: str, *, read_only: bool, direct: bool) -> int:
        """As that of a file; Linux opens for writing what is write-protected, too."""
        opened = super()._open_kind(path, read_only=read_only, direct=direct)
        if read_only or not host.is_write_protected(opened):
            return opened
        os.close(opened)
        raise AccessError(
            f"'{path}' is write-protected",
            qemu=f"The device is not writable: {os.strerror(errno.EACCES)}",
            errno=errno.EACCES,
            path=path,
        )

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, object]:
        """A path follows the colon."""
        return {"filename": name.removeprefix("host_device:")}

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        """Clear the beginning of the device, under the locks of a writer: nothing is made.

        Raises:
            UnsupportedError: it is shorter than `size`.
        """
        from diskwright.block.existing import take_existing

        spec = {"driver": cls.driver, "filename": options["filename"]}
        take_existing(opener, spec, size, str(options.get("preallocation") or "off"))
