"""Copying blocks of an image into a new one, as `dd` counts them: all is read, all is written."""

from __future__ import annotations

from diskwright.block.cancel import cancellable, check_cancelled
from diskwright.block.record import Record
from diskwright.block.registry import DEFAULT_FORMAT, is_known
from diskwright.errors import DiskwrightError, OptionError, strerror_of
from diskwright.operations.opening import Image, disk_size, open_image, read_into

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.opener import Made

#: Bytes that are moved at once at most, however long or short a block is.
_PIECE = 2 << 20


class Blocks(Record):
    """Which bytes of the input are copied.

    Attributes:
        length: of a block, in bytes.
        count: of blocks from the input's beginning, those that are skipped included; None: all.
        skip: blocks at the beginning that are left out.
    """

    __slots__ = ("count", "length", "skip")

    def __init__(self, length: int = 512, *, count: int | None = None, skip: int = 0) -> None:
        if length < 1 or skip < 0 or (count is not None and count < 0):
            raise OptionError("Blocks have a length, and are counted from 0 on", field="blocks")
        self.length = length
        self.count = count
        self.skip = skip

    def of(self, size: int) -> tuple[int, int] | None:
        """(start, stop) in an input of `size` bytes; None where nothing is left."""
        stop = size if self.count is None else min(size, self.count * self.length)
        start = self.skip * self.length
        return None if start > stop else (start, stop)


def copy_blocks(
    source: Image,
    target: str,
    *,
    format: str = DEFAULT_FORMAT,
    blocks: Blocks | None = None,
    cancel: Flag | None = None,
) -> int | None:
    """Make an image at `target` of blocks of `source`.

    Zeroes are written like everything else: every cluster of the target is allocated.

    Args:
        source: the input.
        target: a path, or `protocol:rest`; a file of that name is overwritten.
        format: the driver of the new image.
        blocks: which part; all, by default.
        cancel: ends it; nothing of a new image is left.

    Returns:
        How many bytes were copied; None where all that is there was to be skipped: the new image
        is empty then.

    Raises:
        OptionError: input and output are one file, or there is no such format.
        DiskwrightError: as opening, making, reading and writing do.
    """
    with cancellable(cancel), open_image(source) as node:
        part = (blocks or Blocks()).of(disk_size(node))
        start, stop = part or (0, 0)
        _refuse_same_file(node, target)
        files = _make(target, format, stop - start)
        from diskwright.operations.create import close_files, remove_files

        try:
            with open_image(Image(target, format=format), read_only=False, made=files) as made:
                _copy(node, made, start, stop)
                made.flush()
        except BaseException:
            remove_files(files)
            raise
        close_files(files)
    return None if part is None else stop - start


def _refuse_same_file(node: Node, target: str) -> None:
    """Making the output would empty the input before it was read."""
    from os import path

    name = target.removeprefix("file:")
    lowest: Node = node
    while "file" in lowest.children:
        lowest = lowest.children["file"].node
    if path.exists(name) and path.exists(lowest.filename) and path.samefile(name, lowest.filename):
        raise OptionError(f"'{target}' is the input and the output", field="of").beyond_qemu()


def _make(target: str, format: str, size: int) -> list[Made]:
    """Write an empty image; returns the files that it is in."""
    from diskwright.operations import create

    if not is_known(format):
        raise OptionError(f"Unknown file format '{format}'", qemu="Unknown file format")
    create.protocol_class(target)
    cls = create.creatable(format)
    declared = create.create_options(format, target)
    wanted = create.NewImage(target, format=format, size=size)
    try:
        return create.make(cls, declared, {"size": size}, wanted)
    except DiskwrightError as error:
        error.within(f"{target}: error while creating output image")
        raise


def _copy(source: Node, target: Node, start: int, stop: int) -> None:
    """Copy [start, stop) of `source` to the beginning of `target`."""
    buffer = memoryview(bytearray(min(_PIECE, stop - start)))
    for offset in range(start, stop, _PIECE):
        check_cancelled()
        view = buffer[: stop - offset]
        try:
            read_into(source, offset, view)
        except DiskwrightError as error:
            error.qemu = f"error while reading from input image file: {strerror_of(error)}"
            raise
        try:
            target.write(offset - start, view)
        except DiskwrightError as error:
            error.qemu = f"error while writing to output image file: {strerror_of(error)}"
            raise
