"""Making a new VHD: laid out as QEMU lays it out.

A differencing image has its parent's names between the header and the table, where no
program that adds blocks looks for room.
"""

from __future__ import annotations

import os
import time

from diskwright.block.record import Record
from diskwright.drivers.formats.vpc.header import (
    CREATOR_FORCED,
    DEFAULT_BLOCK_SIZE,
    DYNAMIC_BYTES,
    EPOCH,
    FOOTER_BYTES,
    LARGEST_GEOMETRY,
    MAX_GEOMETRY_SECTORS,
    MAX_SECTORS,
    MAX_TABLE_BYTES,
    MIN_BLOCK_WITH_BITMAP,
    NO_OFFSET,
    SECTOR,
    DiskType,
    DynamicHeader,
    Footer,
    Locator,
    rounded_geometry,
)
from diskwright.drivers.formats.vpc.tables import WINDOW
from diskwright.errors import FormatError, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node
    from diskwright.block.opener import Opener

#: UTF-16 units of the parent's name in the header, the zero that ends it included.
_NAME_UNITS = 256


def create(opener: Opener, size: int, options: dict[str, object]) -> None:
    """Write the footer, and for a dynamic or differencing image the header and the table.

    Raises:
        FormatError: the size is more than the format can hold.
        OptionError: the block size is no power of two, or a parent does not fit.
    """
    fixed = options.get("subformat") == "fixed"
    block_size = _block_size(options, fixed=fixed)
    parent = _Parent.look(opener, options) if options.get("backing") else None
    if parent is not None:
        if fixed:
            raise OptionError("A differencing image cannot be fixed", field="subformat")
        if size not in (0, parent.size):
            raise OptionError(
                f"A differencing image has the size of its parent, {parent.size}, not {size}",
                field="size",
            )
        footer = _footer(parent.size, forced=False)
        if footer.size() != parent.size:
            footer = _footer(parent.size, forced=True)
        footer.disk_type = DiskType.DIFFERENCING
    else:
        footer = _footer(size, forced=bool(options.get("force_size")))
    dynamic = DynamicHeader.fresh(footer.size(), block_size)
    if dynamic.table_bytes > MAX_TABLE_BYTES:
        raise OptionError(
            f"A disk of {footer.size()} bytes has too many blocks of {block_size}",
            field="block_size",
        )
    preallocation = str(options.get("preallocation") or "off")
    with opener.create_file(options) as file:
        if fixed:
            _write_fixed(file, footer, preallocation)
        else:
            _write_dynamic(file, footer, dynamic, parent)


def _block_size(options: dict[str, object], *, fixed: bool) -> int:
    given = options.get("block_size")
    if not given:
        return DEFAULT_BLOCK_SIZE
    assert isinstance(given, int)
    if fixed:
        raise OptionError("A fixed image has no blocks", field="block_size")
    if given & (given - 1) or not MIN_BLOCK_WITH_BITMAP <= given < 1 << 32:
        raise OptionError(
            f"A block of {given} bytes is not a power of two from {MIN_BLOCK_WITH_BITMAP} bytes",
            field="block_size",
        )
    return given


def _footer(size: int, *, forced: bool) -> Footer:
    """The footer of a new dynamic disk of at least `size` bytes.

    Unless `forced`, the size is rounded up to one that a geometry can say; where none can,
    the largest geometry says that the size counts, as it does where it is forced.
    """
    sectors = -(-size // SECTOR)
    if sectors > MAX_SECTORS:
        raise FormatError(
            f"A VHD has at most {MAX_SECTORS * SECTOR} bytes",
            field="size",
            value=size,
            expected=MAX_SECTORS * SECTOR,
            qemu="The image size is too large for file format 'vpc'",
        )
    geometry = LARGEST_GEOMETRY
    if not forced and sectors <= MAX_GEOMETRY_SECTORS:
        geometry = rounded_geometry(sectors)
        cylinders, heads, track = geometry
        if geometry != LARGEST_GEOMETRY:
            sectors = cylinders * heads * track
    footer = Footer.fresh(sectors * SECTOR, geometry)
    if forced:
        footer.creator = CREATOR_FORCED
    footer.timestamp = max(int(time.time()) - EPOCH, 0) & 0xFFFFFFFF
    footer.unique_id = os.urandom(16)
    return footer


def _write_fixed(file: Node, footer: Footer, preallocation: str) -> None:
    size = footer.size()
    footer.disk_type = DiskType.FIXED
    footer.data_offset = NO_OFFSET
    file.truncate(size + FOOTER_BYTES, preallocation=preallocation)
    file.write(size, footer.sealed())


def _write_dynamic(
    file: Node, footer: Footer, dynamic: DynamicHeader, parent: _Parent | None
) -> None:
    """Everything but the first sector first, so that a torn creation is no image."""
    pieces = parent.name_in(dynamic) if parent is not None else []
    table = dynamic.table_offset
    stop = table + -(-dynamic.table_bytes // SECTOR) * SECTOR
    file.truncate(stop + FOOTER_BYTES)
    for offset, piece in pieces:
        file.write(offset, piece)
    for start in range(table, stop, WINDOW):
        file.write(start, b"\xff" * min(WINDOW, stop - start))
    sealed = footer.sealed()
    file.write(stop, sealed)
    file.write(FOOTER_BYTES, dynamic.sealed())
    file.write(0, sealed)


class _Parent(Record):
    """Who the parent of a new image is, and what it is called from there."""

    __slots__ = ("absolute", "identifier", "relative", "size", "timestamp")

    def __init__(self, size: int, identifier: bytes, timestamp: int) -> None:
        self.size = size
        self.identifier = identifier
        self.timestamp = timestamp
        self.absolute = ""
        self.relative = ""

    @classmethod
    def look(cls, opener: Opener, options: dict[str, object]) -> _Parent:
        """Open the parent, whose name is relative to the new image."""
        from diskwright.block import filename
        from diskwright.block.graph import Graph
        from diskwright.block.opener import open_image
        from diskwright.drivers.formats.vpc.driver import Vpc

        image, backing = str(options["filename"]), str(options["backing"])
        name = filename.join(image, backing)
        if filename.has_protocol(name) or filename.has_protocol(image):
            raise OptionError(f"A VHD can name a file as its parent, not '{name}'", field="backing")
        looking = opener.derive(read_only=True, graph=Graph(), follow_backing=False)
        with open_image(looking, name, format="vpc") as node:
            assert isinstance(node, Vpc)
            modified = max(int(os.stat(name).st_mtime) - EPOCH, 0) & 0xFFFFFFFF
            made = cls(node.size, node.footer.unique_id, modified)
        made.absolute = os.path.abspath(name)
        made.relative = os.path.relpath(made.absolute, os.path.dirname(os.path.abspath(image)))
        return made

    def name_in(self, dynamic: DynamicHeader) -> list[tuple[int, bytes]]:
        """Put the parent's names into a header; returns what is to be written, and where."""
        dynamic.parent_id = self.identifier
        dynamic.parent_timestamp = self.timestamp
        # the one path style that Windows, libvhdi and we read
        relative = self.relative.replace(os.sep, "\\")
        if not relative.startswith("..\\"):
            relative = f".\\{relative}"
        own = os.path.basename(self.absolute).encode("utf-16-be", "surrogatepass")
        if len(own) >= _NAME_UNITS * 2:
            raise OptionError("The parent's name is too long for a VHD", field="backing")
        dynamic.parent_name = own.ljust(_NAME_UNITS * 2, b"\0")
        pieces: list[tuple[int, bytes]] = []
        offset = FOOTER_BYTES + DYNAMIC_BYTES
        named = ((b"W2ru", relative), (b"W2ku", self.absolute))
        for at, (code, text) in enumerate(named):
            raw = text.encode("utf-16-le", "surrogatepass")
            space = -(-len(raw) // SECTOR) * SECTOR
            dynamic.locators[at] = Locator(code, space, len(raw), 0, offset)
            pieces.append((offset, raw))
            offset += space
        dynamic.table_offset = offset
        return pieces
