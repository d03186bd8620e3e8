"""Making a new VHD: laid out as QEMU lays it out.

A differencing image has its parent's names between the header and the table, where no
program that adds blocks looks for room.
"""

from __future__ import annotations

import os
import time

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
    rounded_geometry,
)
from diskwright.drivers.formats.vpc.naming import Naming, not_a_file
from diskwright.drivers.formats.vpc.tables import WINDOW
from diskwright.errors import OptionError, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node
    from diskwright.block.opener import Opener


def create(opener: Opener, size: int, options: dict[str, object]) -> None:
    """Write the footer, and for a dynamic or differencing image the header and the table.

    Raises:
        OptionError: the size is more than the format can hold (kind "too-large"),
            the block size is no power of two, or a parent does not fit.
    """
    fixed = options.get("subformat") == "fixed"
    block_size = _block_size(options, fixed=fixed)
    parent = _look_at_parent(opener, options) if options.get("backing") else None
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
            return
        with Step("Unable to create or write VHD header", reason=False):
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
        raise OptionError(
            f"A VHD has at most {MAX_SECTORS * SECTOR} bytes",
            field="size",
            kind="too-large",
            qemu=f"Disk size is too large, max size is {MAX_SECTORS * SECTOR >> 30} GiB",
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
    file.truncate(size + FOOTER_BYTES, exact=False, preallocation=preallocation)
    with Step("Unable to write VHD header"):
        file.write(size, footer.sealed())


def _write_dynamic(
    file: Node, footer: Footer, dynamic: DynamicHeader, parent: Naming | None
) -> None:
    """Everything but the first sector first, so that a torn creation is no image."""
    pieces: list[tuple[int, bytes]] = []
    if parent is not None:
        dynamic.table_offset = FOOTER_BYTES + DYNAMIC_BYTES + parent.space
        pieces = parent.name_in(dynamic, FOOTER_BYTES + DYNAMIC_BYTES)
    table = dynamic.table_offset
    stop = table + -(-dynamic.table_bytes // SECTOR) * SECTOR
    file.truncate(stop + FOOTER_BYTES, exact=False)
    for offset, piece in pieces:
        file.write(offset, piece)
    for start in range(table, stop, WINDOW):
        file.write(start, b"\xff" * min(WINDOW, stop - start))
    sealed = footer.sealed()
    file.write(stop, sealed)
    file.write(FOOTER_BYTES, dynamic.sealed())
    file.write(0, sealed)


def _look_at_parent(opener: Opener, options: dict[str, object]) -> Naming:
    """Open the parent, whose name is relative to the new image."""
    from diskwright.block import filename
    from diskwright.block.graph import Graph
    from diskwright.block.opener import open_image
    from diskwright.drivers.formats.vpc.driver import Vpc

    image = str(options["filename"])
    name = filename.join(image, str(options["backing"]))
    if filename.has_protocol(name) or filename.has_protocol(image):
        raise not_a_file(name)
    looking = opener.derive(read_only=True, graph=Graph(), follow_backing=False)
    with open_image(looking, name, format="vpc") as node:
        assert isinstance(node, Vpc)
        return Naming(image, name, node.footer.unique_id, node.size)
