"""Making a new qcow2 image: header, refcount table, refcount block, L1 table, in that order."""

from __future__ import annotations

from array import array

from diskwright.block.graph import Graph
from diskwright.block.opener import open_image
from diskwright.block.options import parse_size
from diskwright.drivers.formats.qcow2.extensions import Extensions
from diskwright.drivers.formats.qcow2.header import (
    COMPRESSION_NAMES,
    MAX_L1_BYTES,
    MAX_REFTABLE_BYTES,
    Compatible,
    Header,
    Incompatible,
)
from diskwright.errors import OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.opener import Opener


def create(opener: Opener, size: int, options: dict[str, object]) -> None:
    """Write an image of `size` bytes to options["filename"].

    Raises:
        OptionError: an option's value is impossible, or impossible together with another.
        UnsupportedError: the option is for a feature that is not built.
    """
    header, extensions = _plan(size, options)
    layout = _Layout(header)
    preallocation = str(options.get("preallocation") or "off")
    with opener.create_file({"filename": options["filename"]}) as file:
        layout.write(file, extensions)
        file.flush()
    if preallocation != "off" and size:
        _preallocate(opener, options, preallocation)


def _preallocate(opener: Opener, options: dict[str, object], mode: str) -> None:
    from diskwright.drivers.formats.qcow2.resize import preallocate

    inner = opener.derive(read_only=False, graph=Graph(), follow_backing=False)
    with open_image(inner, str(options["filename"]), format="qcow2") as node:
        node.before_write()
        preallocate(node, 0, node.size, mode)  # type: ignore[arg-type]


def _version(options: dict[str, object]) -> int:
    compat = options.get("compat")
    if compat in (None, "1.1", "v3"):
        return 3
    if compat in ("0.10", "v2"):
        return 2
    raise OptionError(
        f"Parameter 'version' does not accept value '{compat}'",
        field="compat",
        hint="0.10 (v2) or 1.1 (v3)",
    )


def _plan(size: int, options: dict[str, object]) -> tuple[Header, Extensions]:
    """The header and extensions for these options, before the places are known."""
    for name in ("data_file", "data_file_raw", "extended_l2"):
        if options.get(name):
            raise UnsupportedError(f"The qcow2 option '{name}' is not supported yet", field=name)
    cluster = parse_size(options.get("cluster_size") or 65536)  # type: ignore[arg-type]
    version = _version(options)
    if cluster & (cluster - 1) or not 512 <= cluster <= 2 << 20:
        raise OptionError(
            "Cluster size must be a power of two between 512 and 2048k", field="cluster_size"
        )
    if size & 511:
        raise OptionError("Image size must be a multiple of 512 bytes", field="size")
    header = Header(version=version, cluster_bits=cluster.bit_length() - 1, size=size)
    _plan_features(header, options)
    extensions = Extensions()
    backing = options.get("backing_file")
    if backing:
        if options.get("preallocation") not in (None, "off"):
            raise OptionError(
                "Backing file and preallocation can only be used at the same time if "
                "extended_l2 is enabled",
                field="preallocation",
            )
        extensions.backing_file = str(backing)
        form = options.get("backing_fmt")
        extensions.backing_format = str(form) if form else None
    elif options.get("backing_fmt"):
        raise OptionError("Backing format cannot be used without backing file", field="backing_fmt")
    return header, extensions


def _plan_features(header: Header, options: dict[str, object]) -> None:
    given = options.get("refcount_bits")
    bits = 16 if given is None else int(given)  # type: ignore[call-overload]
    if bits & (bits - 1) or not 1 <= bits <= 64:
        raise OptionError(
            "Refcount width must be a power of two and may not exceed 64 bits",
            field="refcount_bits",
        )
    header.refcount_order = bits.bit_length() - 1
    if header.version < 3:
        if bits != 16:
            raise OptionError(
                "Different refcount widths than 16 bits require compatibility level 1.1 or "
                "above (use version=v3 or greater)",
                field="refcount_bits",
            )
        if options.get("lazy_refcounts"):
            raise OptionError(
                "Lazy refcounts only supported with compatibility level 1.1 and above "
                "(use version=v3 or greater)",
                field="lazy_refcounts",
            )
    if options.get("lazy_refcounts"):
        header.compatible_features |= Compatible.LAZY_REFCOUNTS
    kind = str(options.get("compression_type") or "zlib")
    header.compression_type = COMPRESSION_NAMES.index(kind)
    if header.compression_type:
        if header.version < 3:
            raise OptionError(
                "Non-zlib compression type is only supported with compatibility level 1.1 and "
                "above (use version=v3 or greater)",
                field="compression_type",
            )
        header.incompatible_features |= Incompatible.COMPRESSION


class _Layout:
    """Where the first tables lie: header, refcount table, refcount blocks, L1 table."""

    def __init__(self, header: Header) -> None:
        self.header = header
        cluster = header.cluster_size
        l1_entries = -(-header.size // (1 << (header.cluster_bits * 2 - 3)))
        if l1_entries * 8 > MAX_L1_BYTES:
            raise OptionError(
                "Could not resize image: Failed to grow the L1 table: File too large",
                field="size",
            )
        l1_clusters = -(-l1_entries * 8 // cluster)
        per_block = cluster * 8 // header.refcount_bits
        table_clusters = blocks = 1
        while True:
            total = 1 + table_clusters + blocks + l1_clusters
            if blocks * per_block < total:
                blocks += 1
            elif table_clusters * cluster // 8 < blocks:
                table_clusters += 1
            else:
                break
        if table_clusters * cluster > MAX_REFTABLE_BYTES:
            raise OptionError("The refcount table would be too large", field="size")
        self.total = total
        self.blocks = blocks
        self.table_offset = cluster
        self.blocks_offset = (1 + table_clusters) * cluster
        header.refcount_table_offset = cluster
        header.refcount_table_clusters = table_clusters
        header.l1_size = l1_entries
        header.l1_table_offset = (1 + table_clusters + blocks) * cluster
        self.table_bytes = table_clusters * cluster
        self.l1_bytes = l1_entries * 8

    def write(self, file: object, extensions: Extensions) -> None:
        """Write all of it to an empty file; the header last."""
        from diskwright.block.node import Node

        assert isinstance(file, Node)
        header, cluster = self.header, self.header.cluster_size
        table = array("Q", bytes(self.table_bytes))
        for number in range(self.blocks):
            table[number] = self.blocks_offset + number * cluster
        table.byteswap()
        end = header.l1_table_offset + self.l1_bytes
        first = extensions.pack(header)
        file.truncate(max(end, cluster))
        file.write(self.table_offset, table)  # type: ignore[arg-type]
        file.write(self.blocks_offset, self._counts())
        file.write(0, first)

    def _counts(self) -> bytes:
        """The refcount blocks with ones for all clusters in use."""
        bits = self.header.refcount_bits
        length = self.blocks * self.header.cluster_size
        if bits >= 8:
            one = (1).to_bytes(bits // 8, "big")
            return (one * self.total).ljust(length, b"\0")
        per_byte = 8 // bits
        full = sum(1 << (bits * at) for at in range(per_byte))
        rest = self.total % per_byte
        last = sum(1 << (bits * at) for at in range(rest))
        return (bytes([full]) * (self.total // per_byte) + bytes([last])).ljust(length, b"\0")
