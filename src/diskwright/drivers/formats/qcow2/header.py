"""The qcow2 header: bytes <-> a record.

Source: QEMU, docs/interop/qcow2.txt, "Header".
"""

from __future__ import annotations

import struct

from diskwright.block.record import Record
from diskwright.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MAGIC = b"QFI\xfb"

#: The fields of each version, and how they are stored, version 2 behind the magic number.
_V2_FIELDS = (
    "version",
    "backing_file_offset",
    "backing_file_size",
    "cluster_bits",
    "size",
    "crypt_method",
    "l1_size",
    "l1_table_offset",
    "refcount_table_offset",
    "refcount_table_clusters",
    "nb_snapshots",
    "snapshots_offset",
)
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3_FIELDS = (
    "incompatible_features",
    "compatible_features",
    "autoclear_features",
    "refcount_order",
    "header_length",
)
_V3 = struct.Struct(">QQQII")
V2_LENGTH = 72
V3_LENGTH = 104

#: The header with the compression type, padded to a multiple of eight.
FULL_LENGTH = 112

#: QEMU's bound on the active L1 table; 2 EiB with the smallest clusters would need more.
MAX_L1_BYTES = 32 << 20
#: QEMU's bound on the refcount table.
MAX_REFTABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_BACKING_NAME = 1023

#: Where the incompatible features are.
FEATURES_OFFSET = 72


class Incompatible:
    """Who does not know one of these must not open the image."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Compatible:
    """Who does not know these may go on."""

    LAZY_REFCOUNTS = 1


class Autoclear:
    """Who does not know one of these must clear it before writing."""

    BITMAPS = 1
    RAW_DATA_FILE = 2


COMPRESSION_NAMES = ("zlib", "zstd")


class Header(Record):
    """All fields of the header, host order; sizes and offsets in bytes unless named else."""

    __slots__ = (
        "autoclear_features",
        "backing_file_offset",
        "backing_file_size",
        "cluster_bits",
        "compatible_features",
        "compression_type",
        "crypt_method",
        "header_length",
        "incompatible_features",
        "l1_size",
        "l1_table_offset",
        "nb_snapshots",
        "refcount_order",
        "refcount_table_clusters",
        "refcount_table_offset",
        "size",
        "snapshots_offset",
        "version",
    )

    def __init__(self, *, version: int = 3, cluster_bits: int = 16, size: int = 0) -> None:
        self.version = version
        self.cluster_bits = cluster_bits
        self.size = size
        self.backing_file_offset = 0
        self.backing_file_size = 0
        self.crypt_method = 0
        self.l1_size = 0
        self.l1_table_offset = 0
        self.refcount_table_offset = 0
        self.refcount_table_clusters = 0
        self.nb_snapshots = 0
        self.snapshots_offset = 0
        self.incompatible_features = 0
        self.compatible_features = 0
        self.autoclear_features = 0
        self.refcount_order = 4
        self.header_length = V2_LENGTH if version == 2 else FULL_LENGTH
        self.compression_type = 0

    @classmethod
    def parse(cls, data: bytes, *, checks: bool = False) -> Header:
        """The header at the start of `data`, every field checked on its own.

        Args:
            data: the file's beginning.
            checks: for a check, which tells more of tables that are not where they can be.

        Raises:
            FormatError: a field breaks the specification or is beyond what can be handled.
        """
        made = cls()
        made._unpack_v2(data)
        made._check_version()
        if made.version == 3:
            made._unpack_v3(data)
            made._check_length()
        made._check(checks)
        return made

    @classmethod
    def glimpse(cls, data: bytes) -> Header:
        """The fields as they are, for who only tells of them: nothing but the magic is checked.

        Later versions are taken to have the fields of version 3 in their places.

        Raises:
            FormatError: there is no header.
        """
        made = cls()
        made._unpack_v2(data)
        if made.version >= 3 and len(data) >= V3_LENGTH:
            made._unpack_v3(data)
        return made

    def _unpack_v2(self, data: bytes) -> None:
        if len(data) < V2_LENGTH:
            raise bad_field("header", len(data), 0, "qcow2 header too short")
        magic, *fields = _V2.unpack_from(data)
        self._take(_V2_FIELDS, fields)
        if magic != MAGIC:
            raise bad_field("magic", magic, 0, "Image is not in qcow2 format", expected=MAGIC)
        self.header_length = V2_LENGTH

    def _take(self, names: Sequence[str], values: Sequence[int]) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value)

    def _check_version(self) -> None:
        if self.version not in (2, 3):
            raise bad_field(
                "version",
                self.version,
                4,
                f"Unsupported qcow2 version {self.version}",
                expected="2 or 3",
            )

    def _unpack_v3(self, data: bytes) -> None:
        if len(data) < V3_LENGTH:
            raise bad_field("header", len(data), 0, "qcow2 header too short")
        self._take(_V3_FIELDS, _V3.unpack_from(data, V2_LENGTH))
        if self.header_length > V3_LENGTH and len(data) > V3_LENGTH:
            self.compression_type = data[V3_LENGTH]

    def _check_length(self) -> None:
        if self.header_length < V3_LENGTH:
            raise bad_field(
                "header_length",
                self.header_length,
                100,
                "qcow2 header too short",
                expected=V3_LENGTH,
            )

    def _check(self, checks: bool) -> None:
        if not 9 <= self.cluster_bits <= 21:
            text = f"Unsupported cluster size: 2^{self.cluster_bits}"
            raise bad_field("cluster_bits", self.cluster_bits, 20, text, expected="9 to 21")
        cluster = 1 << self.cluster_bits
        if self.header_length > cluster:
            text = "qcow2 header exceeds cluster size"
            raise bad_field("header_length", self.header_length, 100, text, expected=cluster)
        if self.refcount_order > 6:
            text = "Reference count entry width too large; may not exceed 64 bits"
            raise bad_field("refcount_order", self.refcount_order, 96, text, expected="0 to 6")
        if self.backing_file_offset > cluster:
            text = "Invalid backing file offset"
            raise bad_field(
                "backing_file_offset", self.backing_file_offset, 8, text, expected=cluster
            )
        if self.crypt_method > 2:
            signed = self.crypt_method - (self.crypt_method >> 31 << 32)
            text = f"Unsupported encryption method {signed}"
            raise bad_field("crypt_method", self.crypt_method, 32, text, expected="0, 1 or 2")
        if self.incompatible_features & Incompatible.EXTENDED_L2 and self.cluster_bits < 14:
            text = f"Unsupported subcluster size: {cluster // 32}"
            raise bad_field("cluster_bits", self.cluster_bits, 20, text, expected="14 to 21")
        self._check_tables(cluster, checks)

    def require_snapshots(self, *, of_any_length: bool = False) -> None:
        """Refuse a snapshot table that cannot be one by its place, or else its length.

        Raises:
            FormatError: it cannot.
        """
        count = self.nb_snapshots
        if count > MAX_SNAPSHOTS and not of_any_length:
            text = "Snapshot table too large"
            raise bad_field("nb_snapshots", count, 60, text, expected=MAX_SNAPSHOTS)
        if self.snapshots_offset:  # QEMU takes 0, and finds nonsense there
            _check_place("snapshots_offset", self.snapshots_offset, self.cluster_size, count)

    @property
    def size_wraps(self) -> bool:
        """Whether the disk's size is none because rounding it up to whole L2 tables overflows.

        QEMU notices such a size only when all the rest of an image has been looked at.
        """
        return self.size + (1 << self.l1_shift) > 1 << 64

    def require_size(self) -> None:
        """Refuse a size that wraps.

        Raises:
            FormatError: it does.
        """
        if self.size_wraps:
            text = "Could not refresh total sector count: File too large"
            raise bad_field("size", self.size, 24, text)

    def require_refcounts(self) -> None:
        """Refuse an image without a refcount table, which only a repair can give it.

        Raises:
            FormatError: it has none.
        """
        if not self.refcount_table_clusters:
            text = "Image does not contain a reference count table"
            raise bad_field("refcount_table_clusters", 0, 56, text)

    def _check_tables(self, cluster: int, checks: bool) -> None:
        clusters = self.refcount_table_clusters
        if clusters * cluster > MAX_REFTABLE_BYTES:
            raise bad_field(
                "refcount_table_clusters", clusters, 56, "Reference count table too large"
            )
        if self.refcount_table_offset or not checks:  # a rebuild mends it
            place = self.refcount_table_offset
            _check_place("refcount_table_offset", place, cluster, clusters * cluster)
        if not checks:
            self.require_snapshots()
        if self.l1_size * 8 > MAX_L1_BYTES:
            raise bad_field(
                "l1_size", self.l1_size, 36, "Active L1 table too large", expected=MAX_L1_BYTES // 8
            )
        needed = 0 if self.size_wraps else -(-self.size >> self.l1_shift)
        if needed * 8 > 0x7FFFFFFF or (self.size >= 1 << 63 and not self.size_wraps):
            raise bad_field("size", self.size, 24, "Image is too big")
        if self.l1_size < needed:
            raise bad_field("l1_size", self.l1_size, 36, "L1 table is too small", expected=needed)
        if self.l1_size:
            _check_place("l1_table_offset", self.l1_table_offset, cluster, self.l1_size * 8)

    def pack(self) -> bytes:
        """The header as it is stored; the inverse of `parse`."""
        data = _V2.pack(MAGIC, *(getattr(self, name) for name in _V2_FIELDS))
        if self.version == 2:
            return data
        data += _V3.pack(*(getattr(self, name) for name in _V3_FIELDS))
        if self.header_length > V3_LENGTH:
            data += bytes([self.compression_type]) + bytes(7)
        return data[: self.header_length]  # a longer header keeps what the file has

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entry_bytes(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.incompatible_features & Incompatible.EXTENDED_L2 else 8

    @property
    def l1_shift(self) -> int:
        """An L2 table maps 2 to the power of this bytes."""
        return self.cluster_bits * 2 - self.l2_entry_bytes.bit_length() + 1

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount."""
        return 1 << self.refcount_order


#: field -> its place in the header, QEMU's sentence where its value cannot be
_TABLES = {
    "l1_table_offset": (40, "Active L1 table offset invalid"),
    "refcount_table_offset": (48, "Reference count table offset invalid"),
    "snapshots_offset": (64, "Snapshot table offset invalid"),
}


def _check_place(field: str, value: int, cluster: int, length: int) -> None:
    """Refuse a table that cannot lie in a file: of at least `length` bytes, at `value`."""
    if value & (cluster - 1) or not 0 < value < (1 << 63) - length:
        place, sentence = _TABLES[field]
        raise bad_field(field, value, place, sentence, expected=f"a multiple of {cluster}")


def bad_field(
    field: str, value: object, offset: int, text: str, *, expected: object = None
) -> FormatError:
    """The error for a field that has an impossible value; `text` is QEMU's sentence."""
    found = f"{text} (field {field} at byte {offset} is {value!r}"
    found += f", expected {expected})" if expected is not None else ")"
    return FormatError(found, field=field, value=value, offset=offset, expected=expected, qemu=text)
