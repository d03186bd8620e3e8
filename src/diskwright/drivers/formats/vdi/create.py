"""Making a new VDI image: laid out as QEMU lays it out."""

from __future__ import annotations

import os
from array import array

from diskwright.drivers.formats.vdi.header import (
    DEFAULT_BLOCK_SIZE,
    MAX_BLOCK_SIZE,
    MAX_BLOCKS,
    MAX_SIZE,
    MIN_BLOCK_SIZE,
    SECTOR,
    Header,
    ImageType,
    size_error,
)
from diskwright.drivers.formats.vdi.tables import WINDOW
from diskwright.errors import OptionError, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node
    from diskwright.block.opener import Opener


def create(opener: Opener, size: int, options: dict[str, object]) -> None:
    """Write the header and a block map without blocks, or with all of them (`static`).

    Raises:
        FormatError: the size is more than the format can hold.
        OptionError: the block size is no power of two, or a parent does not fit.
    """
    block_size = options.get("block_size") or DEFAULT_BLOCK_SIZE
    assert isinstance(block_size, int)
    if block_size & (block_size - 1) or not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
        raise OptionError(
            f"A block of {block_size} bytes is not a power of two from {MIN_BLOCK_SIZE} bytes",
            field="block_size",
        )
    parent = None
    if options.get("backing"):
        parent = _parent_header(opener, options)
        if size not in (0, parent.size):
            raise OptionError(
                f"A differencing image has the size of its parent, {parent.size}, not {size}",
                field="size",
            )
        size = parent.size
    size = -(-size // SECTOR) * SECTOR
    if size > MAX_SIZE or -(-size // block_size) > MAX_BLOCKS:
        raise size_error(size)
    header = Header.fresh(size, block_size)
    header.uuid_image, header.uuid_modified = os.urandom(16), os.urandom(16)
    if parent is not None:
        header.image_type = ImageType.DIFFERENCING
        header.uuid_link = parent.uuid_image
        header.uuid_parent_modified = parent.uuid_modified
    if options.get("static"):
        if parent is not None:
            raise OptionError("A differencing image cannot be static", field="static")
        header.image_type = ImageType.STATIC
        header.blocks_allocated = header.blocks
    with opener.create_file(options) as file:
        _write(file, header, str(options.get("preallocation") or "off"))


def _parent_header(opener: Opener, options: dict[str, object]) -> Header:
    """The header of the parent, whose name is relative to the new image."""
    from diskwright.block import filename
    from diskwright.block.graph import Graph
    from diskwright.block.opener import open_image
    from diskwright.drivers.formats.vdi.driver import Vdi

    name = filename.join(str(options["filename"]), str(options["backing"]))
    looking = opener.derive(read_only=True, graph=Graph(), follow_backing=False)
    with open_image(looking, name, format="vdi") as node:
        assert isinstance(node, Vdi)
        return node.header


def _write(file: Node, header: Header, preallocation: str) -> None:
    """Everything but the header first, so that a torn creation is no image."""
    if header.image_type == ImageType.STATIC:
        stop = header.data_offset + header.blocks * header.block_size
        file.truncate(stop, exact=False, preallocation=preallocation)
    else:
        file.truncate(header.data_offset, exact=False)
    with Step("Error writing header", reason=False):
        file.write(0, bytes(len(header.pack())))
    with Step("Error writing bmap", reason=False):
        for start in range(0, header.blocks * 4, WINDOW):
            part = min(WINDOW, header.blocks * 4 - start)
            if header.image_type == ImageType.STATIC:
                words = array("I", range(start // 4, (start + part) // 4))
                file.write(header.map_offset + start, _little(words))
            else:
                file.write(header.map_offset + start, b"\xff" * part)
    file.write(0, header.pack())


def _little(words: array[int]) -> bytes:
    import sys

    if sys.byteorder != "little":
        words.byteswap()
    return words.tobytes()
