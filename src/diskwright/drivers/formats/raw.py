"""raw: the bytes of the file are the bytes of the disk.

`offset` and `size` cut a window out of the file. A raw image whose format was guessed must not
become another format by what a guest writes: its first sector refuses bytes that a driver
would recognise.
"""

from __future__ import annotations

import errno

from diskwright.block.extent import DATA, Extent
from diskwright.block.node import Node
from diskwright.block.options import Option, Options, whole
from diskwright.block.permission import Role
from diskwright.block.requests import shown_extents
from diskwright.errors import IOFailure, NoSpaceError, OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diskwright.block.child import Child
    from diskwright.block.info import Content, Measured
    from diskwright.block.opener import Opener
    from diskwright.block.reopen import Finish

_SECTOR = 512


class Raw(Node):
    """A file as it is, or a part of it."""

    driver = "raw"
    options = Options(
        Option("offset", "size", 0, "offset in the disk where the image starts", strong=True),
        Option("size", "size", None, "virtual disk size", strong=True),
    )
    create_options = Options(Option("size", "size", None, "Virtual disk size"))

    file: Child
    _offset = 0
    _has_size = False

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        self.file = opener.open_child(self, "file", options["file"], Role.FILTERED, protocol=True)
        self.limits = self.file.node.limits
        self._use(*self._window_of(options))
        self.data_child = self.file

    def _window_of(self, options: Mapping[str, object]) -> tuple[int, int | None]:
        """(offset, size) as they are wanted; a size of None reaches to the file's end.

        Raises:
            OptionError: the file has no such window.
        """
        offset, below = whole(options["offset"]), self.file.size
        if below < offset:
            raise OptionError(
                f"Offset ({offset}) cannot be greater than size of the containing file ({below})"
            )
        size = None
        if options["size"] is not None:
            size = whole(options["size"])
            if offset + size > below:
                raise OptionError(
                    f"The sum of offset ({offset}) and size ({size}) has to be smaller "
                    f"or equal to the  actual size of the containing file ({below})"
                )
            if size % _SECTOR:
                raise OptionError("Specified size is not multiple of 512", field="size")
        if offset % self.limits.request_alignment:
            raise OptionError(f"Offset ({offset}) must be a multiple of the request alignment")
        return offset, size

    def _use(self, offset: int, size: int | None) -> None:
        self._offset, self._has_size = offset, size is not None
        self.size = self.file.size - offset if size is None else size

    def _prepare_options(self, options: dict[str, object]) -> Finish:
        known = Raw.options
        rest = {name: value for name, value in options.items() if name not in known}
        if any(edge.parent is not None for edge in self.parents):
            rest = options  # what is above would find other bytes where it left its own
        dropped = super()._prepare_options(rest)
        if len(rest) == len(options):
            return dropped
        said: dict[str, object] = {"offset": self._offset}
        said["size"] = self.size if self._has_size else None
        said |= {name: value for name, value in options.items() if name in known}
        window = self._window_of(known.validate(said))

        def finish(done: bool) -> None:
            dropped(done)
            if done:
                self._use(*window)

        return finish

    def locate(self, offset: int, length: int, *, write: bool = False) -> int:
        """Every byte lies in the file, but the first sector's writes may need a look."""
        if write and self.probed and offset < _SECTOR:
            return -1
        return offset + self._offset

    def _lend(self) -> tuple[int, int] | None:
        below = self.file.node.lend()
        return None if below is None else (below[0], below[1] + self._offset)

    def _read_into(self, offset: int, view: memoryview) -> None:
        self.file.event("read_aio")
        self.file.read_into(offset + self._offset, view)

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        if self.probed and offset < _SECTOR:
            self._refuse_magic(offset, view)
        self.file.event("write_aio")
        self.file.write(offset + self._offset, view)

    def _refuse_magic(self, offset: int, view: memoryview) -> None:
        """See the module's text."""
        from diskwright.block.probe import probe_bytes

        head = bytearray(self.file.read(self._offset, _SECTOR))
        part = bytes(view[: _SECTOR - offset])
        head[offset : offset + len(part)] = part
        if probe_bytes(bytes(head), self.size, "") != "raw":
            raise IOFailure(
                f"{self.describe()} was taken for raw; writing the header of another format "
                "to it is refused",
                errno=1,
                hint="say that it is raw: -f raw, or format='raw'",
            )

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        self.file.node._write_zeroes(offset + self._offset, length, flags)
        self.file.node.written(offset + self._offset + length)

    def _discard(self, offset: int, length: int) -> None:
        self.file.discard(offset + self._offset, length)

    def _extents(self, offset: int, length: int) -> Iterator[Extent]:
        stored = self.file.node.unfiltered.is_protocol
        for run in shown_extents(self.file, offset + self._offset, length):
            child, place = run.child, run.host_offset
            if stored or (child is None and run.kind == DATA and run.allocated and not run.encoded):
                child, place = self.file, run.offset
            yield Extent(
                run.offset - self._offset,
                run.length,
                run.kind,
                allocated=run.allocated,
                encoded=run.encoded,
                child=child,
                host_offset=place,
                stored=run.stored,
            )

    def refresh_size(self) -> None:
        """Follow the file, unless a size was given."""
        if not self._has_size:
            self.file.node.refresh_size()
            self.size = self.file.size - self._offset

    def _reopened(self) -> None:
        self.limits = self.file.node.limits

    @property
    def has_zero_init(self) -> bool:
        """As the file."""
        return self.file.node.has_zero_init

    @property
    def shows_holes(self) -> bool:
        """As the image in the file, if there is one."""
        return self.file.node.unfiltered.shows_holes

    @property
    def can_resize(self) -> bool:
        """As the file."""
        return self.file.node.can_resize

    @property
    def can_grow(self) -> bool:
        """As the file, unless a size was given."""
        return not self._has_size and self.file.node.can_grow

    def _truncate(self, size: int, exact: bool, preallocation: str) -> None:
        if self._has_size and not exact:  # somebody who needs room, and not another size
            raise NoSpaceError(f"{self.describe()} has a fixed size", errno=errno.ENOSPC)
        if self._has_size:
            raise UnsupportedError("Cannot resize fixed-size raw disks")
        self.file.truncate(size + self._offset, exact=exact, preallocation=preallocation)
        self.size = size if exact else self.file.size - self._offset

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        """A file of that size."""
        opener.make_file(options, size)

    @classmethod
    def measure(cls, content: Content, options: dict[str, object]) -> Measured:
        """As long as the disk, whatever of it lies in holes."""
        from diskwright.block.info import Measured

        return Measured(content.size, content.size)
