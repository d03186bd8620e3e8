"""vdi: VirtualBox's disk images, version 1.1.

Read and written: dynamic, static and differencing images, blocks of any power of two from
512 bytes, extra bytes before blocks. QEMU reads neither differencing images nor blocks
of other sizes than 1 MiB; there is no program here that could judge those.
Not done: resizing (QEMU has none), giving space back (a hole in the data area would make
`qemu-img check` call the image corrupt).

Source: VirtualBox, "VDICore.h" names of version 1.1, and images made by VirtualBox and QEMU.
"""

from __future__ import annotations

import os

from diskwright.block import filename
from diskwright.block.info import CheckResult, NodeInfo
from diskwright.block.limits import Limits
from diskwright.block.options import Option, Options
from diskwright.block.permission import Role
from diskwright.block.table_cache import TableCache
from diskwright.drivers.formats.vdi.header import (
    HEADER_BYTES,
    NO_UUID,
    SECTOR,
    SIGNATURE,
    SIGNATURE_OFFSET,
    Header,
    ImageType,
    uuid_text,
)
from diskwright.drivers.formats.vdi.tables import WINDOW, VdiTables
from diskwright.errors import (
    DiskwrightError,
    FormatError,
    NotFoundError,
    OptionError,
    UnsupportedError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.opener import Opener


class Vdi(VdiTables):
    """A VDI image."""

    driver = "vdi"
    parent_option = "backing"
    takes_backing = True
    create_options = Options(
        Option("backing", "str", None, "VDI image to be the parent of a differencing image"),
        Option("block_size", "size", None, "Size of a block, 1M unless given"),
        Option("size", "size", None, "Virtual disk size"),
        Option("static", "bool", False, "VDI static (pre-allocated) image"),
    )

    _parent_name: str | None = None
    _no_parent: DiskwrightError | None = None  # why it was not found

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        self.file = opener.open_child(self, "file", options["file"], Role.STORAGE)
        self.filename = filename.of_node(self)
        self.header = header = Header.parse(self.file.read(0, HEADER_BYTES))
        self.cache = TableCache(self.file, self.metadata_lock)
        self.head_table = self.cache.table(
            "header", typecode="I", byteorder="little", slice_bytes=HEADER_BYTES, rank=0
        )
        self.map_table = self.cache.table(
            "block map", typecode="I", byteorder="little", slice_bytes=SECTOR, rank=1
        )
        self.size = header.size
        self.cluster_size = self.fill_size = header.block_size
        self.limits = Limits(zero_alignment=header.block_size, cluster_size=header.block_size)
        self.data_child = self.file
        self._holes = []
        self._open_parent(opener, options.get("backing", ""))

    def _open_parent(self, opener: Opener, given: object) -> None:
        if not self.header.is_differencing:
            if given:
                inner = f".{next(iter(given))}" if isinstance(given, dict) else ""
                raise OptionError(
                    f"{self.describe()} is not a differencing image: it has no backing file",
                    qemu=f"Block format 'vdi' does not support the option 'backing{inner}'",
                    field="backing",
                )
            return
        if given is None:
            return
        from diskwright.drivers.formats.vdi.parents import find_parent, require_parent

        if isinstance(given, (dict, str)) and given:
            if opener.follow_backing:
                below = opener.derive(read_only=True)
                child = below.open_child(self, "backing", given, Role.BACKING, format=self.driver)
                require_parent(self.filename, self.header, child.node)
            return
        if not opener.follow_backing:
            try:
                self._parent_name = find_parent(self.filename, self.header, opener.policy)
            except (FormatError, NotFoundError) as error:
                self._no_parent = error  # whoever only looks at the image gets its identifier
            return
        self._parent_name = find_parent(self.filename, self.header, opener.policy)
        child = opener.open_reference(
            self, "backing", self._parent_name, format="vdi", role=Role.BACKING
        )
        parent = child.node
        wanted = self.header.uuid_parent_modified
        if isinstance(parent, Vdi) and wanted not in (bytes(16), parent.header.uuid_modified):
            raise FormatError(
                f"The parent '{parent.filename}' was written to after '{self.filename}' was made",
                field="uuid_parent_modified",
                value=uuid_text(parent.header.uuid_modified),
                offset=0x1B8,
                expected=uuid_text(wanted),
                path=self.filename,
                hint="if it is right nevertheless, write that down: rebase -u -b; or name it: "
                "backing.file.filename=… in --image-opts, options={'backing': …} in Python",
            ).beyond_qemu()

    # ------------------------------------------------------------------------------- first write

    def first_write(self) -> None:
        """Learn what is in use, mend the count, and become another image for children."""
        header = self.header
        if header.map_offset < HEADER_BYTES or header.data_offset < header.map_end:
            raise FormatError(
                f"The tables of {self.describe()} overlap, so it is not written to",
                field="data_offset",
                value=header.data_offset,
                expected=f"at least {max(header.map_end, HEADER_BYTES)}",
                qemu="unsupported VDI image (overlapping tables)",
            )
        self.scan()
        if not self.keeps_content:
            # A commit changes nothing that an overlay shows; any other write does.
            header.uuid_modified = os.urandom(16)
        header.blocks_allocated = self._next
        self.file.write(0, header.pack())
        self.file.flush()

    # -------------------------------------------------------------------------------- management

    @property
    def has_zero_init(self) -> bool:
        """A new image reads as zero; a static one if its file does."""
        if self.header.is_differencing:
            return False
        return self.file.node.has_zero_init if self.header.is_static else True

    @property
    def shows_holes(self) -> bool:
        """Whether all blocks are there, so that holes are those of the file."""
        return self.header.is_static

    def _info(self) -> NodeInfo:
        header = self.header
        name = self._parent_name
        references: list[tuple[str, str, str | None]] = []
        parent = None
        if header.is_differencing:
            parent = name or f"the VDI image {uuid_text(header.uuid_link)}"
            references = [("backing file", parent, self.driver)]
        return NodeInfo(
            self.driver,
            self.size,
            cluster_size=header.block_size,
            backing_filename=parent,
            full_backing_filename=filename.place_of(self, name),
            backing_format=self.driver if parent else None,
            backing_error=self._no_parent,
            references=references,
            features=["differencing"] if references else ["static"] if header.is_static else [],
        )

    @property
    def can_have_backing(self) -> bool:
        """Whether there is a parent to exchange: a differencing image stays one, or ends as one."""
        return self.header.is_differencing

    def _change_backing(self, name: str | None, format: str | None) -> None:
        from diskwright.drivers.formats.vdi.parents import new_parent

        header = self.header
        if not header.is_differencing:
            raise self.require("backing file")
        if name is None:
            header.image_type = ImageType.DYNAMIC
            header.uuid_link = header.uuid_parent_modified = NO_UUID
        else:
            parent = new_parent(self, name, format)
            header.uuid_link, header.uuid_parent_modified = parent.uuid_image, parent.uuid_modified
        self.file.write(0, header.pack())
        self.file.flush()
        self._parent_name = name

    def before_repair(self) -> None:
        """There is no repair, so there is nothing to get ready."""
        raise UnsupportedError(
            f"{self.describe()}: VDI images are not repaired",
            kind="no-check",
            qemu="This image format does not support checks",
        )

    def _check(self, repair: int, report: Callable[[str], None]) -> CheckResult:
        from diskwright.drivers.formats.vdi.check import check

        self.settle()
        return check(self, report)

    def _make_empty(self) -> None:
        """Let the parent show through everywhere. The map is first: it names the blocks."""
        if not self.header.is_differencing:
            raise self.require("backing file")
        assert self.cache is not None
        self.cache.drop()
        header = self.header
        for start in range(header.map_offset, header.map_end, WINDOW):
            self.file.write(start, b"\xff" * min(WINDOW, header.map_end - start))
        self.file.flush()
        header.blocks_allocated = 0
        self.file.write(0, header.pack())
        self.file.truncate(header.data_offset)
        self.scan()

    @classmethod
    def probe(cls, head: bytes, size: int, filename: str) -> int:
        """By the signature alone, as QEMU does."""
        found = head[SIGNATURE_OFFSET : SIGNATURE_OFFSET + 4]
        return 100 if found == SIGNATURE.to_bytes(4, "little") else 0

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        """See create.py."""
        from diskwright.drivers.formats.vdi.create import create

        create(opener, size, options)
