"""vpc: Microsoft's virtual hard disks (VHD), version 1.0.

Read and written: fixed, dynamic and differencing images, blocks of any power of two from 512
bytes (4 KiB for new images). QEMU reads a differencing image as if it had no parent; here its
parent is found through its locators (parents.py), and without it the image is refused.
Not done: resizing (QEMU has none), giving space back (a hole between blocks would stay one).

Source: Microsoft, Virtual Hard Disk Image Format Specification 1.0.
"""

from __future__ import annotations

from diskwright.block import filename, requests
from diskwright.block.info import CheckResult, NodeInfo
from diskwright.block.limits import Limits
from diskwright.block.options import Option, Options
from diskwright.block.permission import Role
from diskwright.block.table_cache import TableCache
from diskwright.drivers.formats.vpc.header import (
    DYNAMIC_BYTES,
    FOOTER_BYTES,
    FOOTER_COOKIE,
    MIN_BLOCK_WITH_BITMAP,
    SECTOR,
    DiskType,
    DynamicHeader,
    Footer,
    uuid_text,
)
from diskwright.drivers.formats.vpc.tables import WINDOW, VpcTables
from diskwright.errors import FormatError, IOFailure, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.opener import Opener

#: No offset at or above this one can be read; QEMU's bound for a byte of a file.
_MAX_OFFSET = (1 << 63) - (1 << 32)


class Vpc(VpcTables):
    """A VHD image."""

    driver = "vpc"
    parent_option = "backing"
    takes_backing = True
    check_beyond_qemu = True
    options = Options(
        Option(
            "force_size_calc",
            "enum",
            None,
            "Which size counts, the geometry's or the one written; else the creator decides",
            choices=("chs", "current_size"),
            strong=True,
            refusal="Invalid size calculation mode: '{value}'",
        ),
    )
    create_options = Options(
        Option("backing", "str", None, "VHD image to be the parent of a differencing image"),
        Option("block_size", "size", None, "Size of a block, 2M unless given"),
        Option("size", "size", None, "Virtual disk size"),
        Option(
            "subformat",
            "enum",
            None,
            "Blocks come as they are written (dynamic, the default) or are all there (fixed)",
            choices=("dynamic", "fixed"),
        ),
        Option(
            "force_size",
            "bool",
            None,
            "Give the disk exactly the size asked for, not the next one that a geometry can say",
        ),
    )

    _names: tuple[str, ...] = ()  # the parent's, as references from the image's folder
    _parent_name: str | None = None  # the one of them that was taken
    _head_is_fixed = False

    # ------------------------------------------------------------------------------------- open

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        self.file = opener.open_child(self, "file", options["file"], Role.STORAGE)
        self.filename = filename.of_node(self)
        self.data_child = self.file
        rule = str(options["force_size_calc"] or "")
        head = self.file.read(0, FOOTER_BYTES)
        if head[: len(FOOTER_COOKIE)] == FOOTER_COOKIE and self.file.size:
            self.footer = Footer.parse(head, 0)
            self._set_size(rule)
            self._open_dynamic(opener, options)
            return
        self.footer = self._footer_at_end()
        self._set_size(rule)
        self.limits = Limits()
        self._refuse_backing(options)

    def _footer_at_end(self) -> Footer:
        """A fixed image has its only footer in its last sector."""
        at = -(-self.file.size // SECTOR) * SECTOR - FOOTER_BYTES
        if at < 0:
            raise FormatError("File too small for a VHD header", field="footer", offset=0)
        return Footer.parse(self.file.read(at, FOOTER_BYTES), at, only_fixed=True)

    def _set_size(self, rule: str) -> None:
        try:
            self.size = self.footer.size(rule)
        except IOFailure as error:
            error.path = self.filename
            error.qemu = f"Could not open '{self.file.node.filename}': File too large"
            raise

    def _open_dynamic(self, opener: Opener, options: dict[str, object]) -> None:
        footer = self.footer
        at = footer.data_offset
        if at > _MAX_OFFSET:
            raise FormatError(
                "Error reading dynamic VHD header", field="data_offset", value=at, offset=16
            )
        dynamic = DynamicHeader.parse(self.file.read(at, DYNAMIC_BYTES), self.size)
        self.differencing = footer.disk_type == DiskType.DIFFERENCING
        if self.differencing and dynamic.block_size < MIN_BLOCK_WITH_BITMAP:
            raise FormatError(
                "Blocks are too small to have a bitmap, which a differencing VHD needs",
                field="block_size",
                value=dynamic.block_size,
                offset=at + 32,
                expected=MIN_BLOCK_WITH_BITMAP,
            )
        self.cache = TableCache(self.file, self.metadata_lock)
        self.bitmaps = self.cache.table(
            "sector bitmap", typecode="B", byteorder="big", slice_bytes=SECTOR, rank=1
        )
        self.table = self.cache.table(
            "block allocation table", typecode="I", byteorder="big", slice_bytes=SECTOR, rank=2
        )
        self.set_up_tables(dynamic)
        self.find_free()
        if footer.disk_type == DiskType.FIXED:
            # QEMU wants all of the above of such an image, and then takes it for a fixed one
            self.dynamic, self._head_is_fixed = None, True
            self.limits = Limits()
        else:
            block = dynamic.block_size
            self.limits = Limits(zero_alignment=self.fill_size, cluster_size=block)
        if self.differencing:
            self._open_parent(opener, options.get("backing", ""))
        else:
            self._refuse_backing(options)

    def _refuse_backing(self, options: dict[str, object]) -> None:
        given = options.get("backing")
        if given:
            inner = f".{next(iter(given))}" if isinstance(given, dict) else ""
            raise OptionError(
                f"{self.describe()} is not a differencing image: it has no backing file",
                qemu=f"Block format 'vpc' does not support the option 'backing{inner}'",
                field="backing",
            )

    def _open_parent(self, opener: Opener, given: object) -> None:
        from diskwright.drivers.formats.vpc import parents

        assert self.dynamic is not None
        self._names = parents.references(self.file, self.dynamic)
        if not opener.follow_backing or given is None:
            return
        if isinstance(given, (dict, str)) and given:
            below = opener.derive(read_only=True)
            child = below.open_child(self, "backing", given, Role.BACKING, format=self.driver)
            parents.require_parent(self, child.node, self.dynamic.parent_id)
            return
        self._parent_name = parents.find_parent(self, self._names, opener.policy)
        child = opener.open_reference(
            self, "backing", self._parent_name, format="vpc", role=Role.BACKING
        )
        parents.require_parent(self, child.node, self.dynamic.parent_id)

    # ------------------------------------------------------------------------------- first write

    def first_write(self) -> None:
        """Refuse what writing would damage, and see to it that the file ends with a footer."""
        self.file.node.refresh_size()
        if self.dynamic is None:
            room = self.file.size - FOOTER_BYTES
            if self._head_is_fixed or self.size > room:
                raise FormatError(
                    f"Writing to {self.describe()} would overwrite its footer",
                    field="current_size",
                    value=self.size,
                    expected=f"at most {room}",
                    hint="copy its content to a new image",
                )
            return
        self._check_layout(self.dynamic)
        self.prepare_writes()

    def _check_layout(self, dynamic: DynamicHeader) -> None:
        """The tables must lie apart, on sector boundaries, or writing one damages another."""
        header, table = self.footer.data_offset, dynamic.table_offset
        stop = table + dynamic.table_bytes
        apart = header >= FOOTER_BYTES and (
            table >= header + DYNAMIC_BYTES or FOOTER_BYTES <= table <= stop <= header
        )
        if not apart or table % SECTOR:
            raise FormatError(
                f"The tables of {self.describe()} overlap or are not aligned, so it is not "
                "written to",
                field="table_offset",
                value=table,
                expected=f"a multiple of {SECTOR} from {header + DYNAMIC_BYTES} on",
            )

    def before_repair(self) -> None:
        """A repair finds for itself what `first_write` would have mended before it looked."""
        if self.dynamic is not None:
            self._check_layout(self.dynamic)

    # ------------------------------------------------------- a fixed image is the file's content

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        if self.dynamic is not None:
            super()._write_zeroes(offset, length, flags)
            return
        unmap, fast = bool(flags & requests.UNMAP), bool(flags & requests.FAST)
        self.file.write_zeroes(offset, length, unmap=unmap, fast=fast)

    def _discard(self, offset: int, length: int) -> None:
        if self.dynamic is None:
            self.file.discard(offset, length)

    # -------------------------------------------------------------------------------- management

    @property
    def has_zero_init(self) -> bool:
        """A new dynamic image reads as zero; a fixed one if its file does."""
        if self.differencing:
            return False
        return self.dynamic is not None or self.file.node.has_zero_init

    @property
    def shows_holes(self) -> bool:
        """A fixed image's holes are those of its file."""
        return self.dynamic is None

    def _info(self) -> NodeInfo:
        dynamic = self.dynamic
        name = self._parent_name or (self._names[0] if self._names else None)
        names = self._names
        if self.differencing and not names:
            assert dynamic is not None
            names = (f"the VHD image {uuid_text(dynamic.parent_id)}",)
        kind = "differencing" if self.differencing else "dynamic" if dynamic else "fixed"
        return NodeInfo(
            self.driver,
            self.size,
            cluster_size=dynamic.block_size if dynamic is not None else None,
            backing_filename=name,
            full_backing_filename=filename.place_of(self, name),
            backing_format="vpc" if name else None,
            references=[("backing file", one, self.driver) for one in names],
            features=[kind],
        )

    def _check(self, repair: int, report: Callable[[str], None]) -> CheckResult:
        from diskwright.drivers.formats.vpc.check import check

        self.settle()
        return check(self, repair, report)

    def _make_empty(self) -> None:
        """Let the parent show through everywhere. The table is first: it names the blocks."""
        if not self.differencing:
            raise self.require("backing file")
        assert self.cache is not None
        assert self.dynamic is not None
        self.cache.drop()
        table, stop = (
            self.dynamic.table_offset,
            self.dynamic.table_offset + self.dynamic.table_bytes,
        )
        for start in range(table, stop, WINDOW):
            self.file.write(start, b"\xff" * min(WINDOW, stop - start))
        self.file.flush()
        self.prepare_writes()
        self.cut_file()

    @property
    def can_have_backing(self) -> bool:
        """Whether there is a parent to exchange."""
        return self.differencing

    def _change_backing(self, name: str | None, format: str | None) -> None:
        from diskwright.drivers.formats.vpc import parents

        dynamic = self.dynamic
        if not self.differencing or dynamic is None:
            raise self.require("backing file")
        if name is None:
            self._leave_parent(dynamic)
            return
        naming = parents.new_parent(self, name, format)
        at, stop = self.footer.data_offset + DYNAMIC_BYTES, dynamic.table_offset
        taken = any(one.length and one.offset < stop and one.end > at for one in dynamic.locators)
        if taken or at + naming.space > stop:  # behind the blocks, as Windows has it
            at = self._free
            self._grow_file(at + naming.space + SECTOR, blocks_ahead=0)
            self._free = at + naming.space
        # The old names stay until the header names the new ones. A tear in the header leaves
        # an image whose parent has another identifier, which is refused.
        for offset, piece in naming.name_in(dynamic, at):
            self.file.write(offset, piece)
        self.file.flush()
        self.file.write(self.footer.data_offset, dynamic.sealed())
        self.file.flush()
        self._names = parents.references(self.file, dynamic)
        self._parent_name = name

    def _leave_parent(self, dynamic: DynamicHeader) -> None:
        """Become a dynamic image: what was the parent's is zero from now on.

        In a dynamic image nobody looks at the bits, so bytes behind clear ones come first.
        """
        assert self.cache is not None
        for offset, length in self.hidden_bytes():
            self.file.write_zeroes(offset, length)
        self.file.flush()
        self.footer.disk_type = DiskType.DYNAMIC
        self.file.write(0, self.footer.sealed())
        self.differencing, self._names, self._parent_name = False, (), None
        self.set_up_tables(dynamic)
        self._grown = True  # the footer at the end is another one now
        self.cut_file()  # and a barrier after both

    def finish(self) -> None:
        """Give back what the file grew by and no block took."""
        if self.dynamic is not None:
            self.cut_file()

    @classmethod
    def probe(cls, head: bytes, size: int, filename: str) -> int:
        """By the footer's copy alone, as QEMU does: a fixed image is taken for raw."""
        return 100 if head[: len(FOOTER_COOKIE)] == FOOTER_COOKIE else 0

    @classmethod
    def probe_end(cls, end: bytes, size: int) -> bool:
        """A fixed image's footer with the right checksum."""
        try:
            Footer.parse(end, size - len(end), only_fixed=True)
        except FormatError:
            return False
        return True

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        """See create.py."""
        from diskwright.drivers.formats.vpc.create import create

        create(opener, size, options)
