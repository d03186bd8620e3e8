"""How long the file of a new qcow2 image becomes, without making it.

The sentences are those of `qemu-img measure`, which differ from those of `create`, as does what
is looked at: an option that only `create` refuses is let pass.
"""

from __future__ import annotations

from diskwright.block.info import Measured
from diskwright.drivers.formats.qcow2.create_options import refcount_width
from diskwright.drivers.formats.qcow2.header import MAX_L1_BYTES
from diskwright.errors import OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from diskwright.block.info import Content

#: word of `compat` -> header version
_VERSIONS = {"0.10": 2, "1.1": 3}
_PREALLOCATIONS = ("off", "metadata", "falloc", "full")
#: Bytes of an entry of an L1, refcount or bitmap table.
_ENTRY = 8
#: Bytes of an entry of a bitmap directory, before the name.
_DIRECTORY_ENTRY = 24


def measure(content: Content, options: Mapping[str, object]) -> Measured:
    """Bytes of the file: tables for all of the disk, and clusters for what is stored.

    What is copied into an image over a backing file is taken to be all of it.

    Raises:
        OptionError: an option's value is impossible, or the size with it.
        UnsupportedError: the image would be encrypted with LUKS.
    """
    geometry = _Geometry(options)
    cluster = geometry.cluster
    size = -(-content.size // cluster) * cluster
    tables = geometry.tables(size)
    copies_all = content.runs is not None and options.get("backing_file") is not None
    if copies_all or geometry.stores_all:
        stored = size
    else:
        stored = cluster * _clusters_of(content.runs or (), cluster)
    bitmaps = None
    if content.bitmaps is not None and geometry.version >= 3:
        bitmaps = _bitmap_bytes(content.bitmaps, content.size, cluster)
    return Measured(tables + stored, tables + size, bitmaps=bitmaps)


class _Geometry:
    """The options that decide on how much there is of everything, looked at in QEMU's order."""

    def __init__(self, options: Mapping[str, object]) -> None:
        given = options.get("cluster_size")
        cluster = self.cluster = 65536 if given is None else _number(given)
        if cluster & (cluster - 1) or not 512 <= cluster <= 2 << 20:
            raise OptionError(
                "Cluster size must be a power of two between 512 and 2048k", field="cluster_size"
            )
        self.l2_entry = 16 if options.get("extended_l2") else 8
        if self.l2_entry == 16 and cluster < 1 << 14:
            raise OptionError(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
                field="extended_l2",
            )
        compat = str(_or(options.get("compat"), "1.1"))
        if compat not in _VERSIONS:
            raise OptionError(f"Invalid compatibility level: '{compat}'", field="compat")
        self.version = _VERSIONS[compat]
        bits = _number(_or(options.get("refcount_bits"), 16))
        self.refcount_bits = refcount_width(bits, version=self.version, newer="compat=1.1")
        preallocation = str(_or(options.get("preallocation"), "off"))
        if preallocation not in _PREALLOCATIONS:
            raise OptionError(f"invalid parameter value: {preallocation}", field="preallocation")
        self.stores_all = preallocation in ("falloc", "full")
        if options.get("encrypt.format") == "luks":
            raise UnsupportedError(
                "The qcow2 option 'encrypt.format' is not supported yet", field="encrypt.format"
            )

    def tables(self, size: int) -> int:
        """Bytes of header, L1 and L2 tables, refcount table and blocks for a full disk.

        Raises:
            OptionError: no L1 table is long enough.
        """
        cluster = self.cluster
        l2_tables = -(-size * self.l2_entry // cluster // cluster)
        if l2_tables * _ENTRY > MAX_L1_BYTES:
            raise OptionError(
                "The image size is too large (try using a larger cluster size)", field="size"
            )
        l1 = -(-l2_tables * _ENTRY // cluster)
        counted = 1 + l1 + l2_tables + size // cluster
        # Refcounts count the clusters of their own tables too.
        per_block = cluster * 8 // self.refcount_bits
        blocks = table = 0
        while True:
            blocks_now = -(-(counted + blocks + table) // per_block)
            table_now = -(-blocks_now * _ENTRY // cluster)
            if (blocks_now, table_now) == (blocks, table):
                return (1 + l1 + l2_tables + blocks + table) * cluster
            blocks, table = blocks_now, table_now


def _clusters_of(runs: Iterable[tuple[int, int]], cluster: int) -> int:
    """How many clusters have anything in them that has to be stored."""
    count = reached = 0
    for offset, length in runs:
        first = max(offset // cluster, reached)
        stop = max(-(-(offset + length) // cluster), first)
        count += stop - first
        reached = stop
    return count


def _bitmap_bytes(bitmaps: list[tuple[str, int]], size: int, cluster: int) -> int:
    """Bytes of the directory, the tables and the data of dirty bitmaps."""
    clusters = directory = 0
    for name, granularity in bitmaps:
        bits = -(-size // granularity)
        data = -(-bits // 8 // cluster)
        clusters += data + -(-data * _ENTRY // cluster)
        length = _DIRECTORY_ENTRY + len(name.encode("utf-8", "surrogateescape"))
        directory += -(-length // 8) * 8
    return (clusters + -(-directory // cluster)) * cluster


def _number(value: object) -> int:
    """A number among options that were validated."""
    assert isinstance(value, int)
    return value


def _or(value: object, default: object) -> object:
    return default if value is None else value
