"""What follows the qcow2 header: its extensions and the backing file's name.

Source: QEMU, docs/interop/qcow2.txt, "Header", "Header extensions".
"""

from __future__ import annotations

import errno
import struct

from diskwright.block.record import Record, constants
from diskwright.drivers.formats.qcow2.header import (
    COMPRESSION_NAMES,
    MAX_BACKING_NAME,
    Incompatible,
    bad_field,
)
from diskwright.errors import FormatError, NoSpaceError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.drivers.formats.qcow2.header import Header

END = 0
BACKING_FORMAT = 0xE2792ACA
FEATURE_TABLE = 0x6803F857
BITMAPS = 0x23852875
DATA_FILE = 0x44415441

_HEAD = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")

#: An entry of the feature table: type, bit, name.
_FEATURE_BYTES = 48
_FEATURE_NAME_BYTES = 46

#: (type, bit, name) as every writer stores them, so that others can name what they refuse.
FEATURE_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)


class Bitmaps(Record):
    """The bitmaps extension: how many there are, and where their directory lies (bytes)."""

    __slots__ = ("count", "directory_offset", "directory_size", "reserved")

    def __init__(
        self, count: int, directory_offset: int, directory_size: int, reserved: int = 0
    ) -> None:
        self.count = count
        self.directory_offset = directory_offset
        self.directory_size = directory_size
        self.reserved = reserved

    def pack(self) -> bytes:
        """As it is stored."""
        return _BITMAPS.pack(self.count, self.reserved, self.directory_size, self.directory_offset)


class Extensions(Record):
    """The backing file's format and name, and what is only kept.

    `unknown` are (type, data) pairs that are written back as they were; the bitmaps
    extension is one of them.
    """

    __slots__ = (
        "backing_file",
        "backing_format",
        "data_file",
        "features",
        "names_features",
        "unknown",
    )

    def __init__(self) -> None:
        self.data_file: str | None = None  # the name of the file with the guest's data
        self.backing_format: str | None = None
        self.backing_file: str | None = None
        self.features: dict[tuple[int, int], str] = {}
        self.names_features = False  # the table of feature names is written
        self.unknown: list[tuple[int, bytes]] = []

    @classmethod
    def parse(cls, header: Header, data: bytes) -> Extensions:
        """The extensions in the first cluster, `data`.

        Raises:
            FormatError: one reaches out of the cluster, or the backing name does, or that of
                the bitmaps cannot be one by its length.
        """
        made = cls()
        made._read(header, data)
        made._take_backing(header, data)
        return made

    @classmethod
    def glimpse(cls, header: Header, data: bytes) -> Extensions:
        """What of them can be read, for who only tells of it.

        Args:
            header: with any values.
            data: the first cluster, or as much of it as is looked at.
        """
        made = cls()
        for step in (made._read, made._take_backing):
            try:
                step(header, data)
            except FormatError:
                pass  # what came before it was read
        return made

    def _read(self, header: Header, data: bytes) -> None:
        position = header.header_length
        stop = min(header.backing_file_offset or len(data), len(data))
        while position < stop and position + _HEAD.size <= len(data):
            kind, length = _HEAD.unpack_from(data, position)
            position += _HEAD.size
            if position > stop or length > stop - position:
                text = "Header extension too large"
                raise bad_field(
                    "extension length", length, position - 4, text, expected=stop - position
                )
            if kind == END:
                break
            self._take(kind, data[position : position + length])
            position += (length + 7) & ~7

    def _take(self, kind: int, value: bytes) -> None:
        if kind == BACKING_FORMAT:
            self.backing_format = name_of(value) or None
        elif kind == DATA_FILE:
            self.data_file = name_of(value)
        elif kind == FEATURE_TABLE:
            self.names_features = True
            for start in range(0, len(value) - 1, _FEATURE_BYTES):  # the last may be cut short
                name = value[start + 2 : start + _FEATURE_BYTES].split(b"\0")[0]
                self.features[value[start], value[start + 1]] = name.decode("utf-8", "replace")
        else:
            if kind == BITMAPS and len(value) != _BITMAPS.size:
                text = "bitmaps_ext: Invalid extension length"
                raise bad_field("bitmaps extension", len(value), 0, text, expected=_BITMAPS.size)
            self.unknown.append((kind, value))

    def _take_backing(self, header: Header, data: bytes) -> None:
        length, offset = header.backing_file_size, header.backing_file_offset
        if not offset or not length:
            self.backing_format = None  # of nothing
            return
        if length > min(MAX_BACKING_NAME, len(data) - offset):
            text = "Backing file name too long"
            raise bad_field("backing_file_size", length, 16, text, expected=MAX_BACKING_NAME)
        self.backing_file = name_of(data[offset : offset + length]) or None
        if self.backing_file is None:
            self.backing_format = None

    def bitmaps(self) -> Bitmaps | None:
        """The bitmaps extension, where there is one."""
        for kind, value in self.unknown:
            if kind == BITMAPS:
                count, reserved, length, offset = _BITMAPS.unpack(value)
                return Bitmaps(count, offset, length, reserved)
        return None

    def with_bitmaps(self, place: Bitmaps | None) -> Extensions:
        """A copy that says where the bitmaps are, or that there are none."""
        made = Extensions()
        for field in Extensions.fields():
            setattr(made, field, getattr(self, field))
        made.unknown = [pair for pair in self.unknown if pair[0] != BITMAPS]
        if place is not None:
            made.unknown.append((BITMAPS, place.pack()))
        return made

    def _pack_all(self, *, features: bool) -> bytes:
        """The extensions, and their end. That of the bitmaps is first: in the first sector."""
        body = b"".join(_extension(*pair) for pair in self.unknown if pair[0] == BITMAPS)
        if self.backing_format is not None and self.backing_file:
            body += _extension(BACKING_FORMAT, _bytes(self.backing_format))
        if self.data_file is not None:
            body += _extension(DATA_FILE, _bytes(self.data_file))
        if features:
            body += _extension(FEATURE_TABLE, _feature_table())
        body += b"".join(_extension(*pair) for pair in self.unknown if pair[0] != BITMAPS)
        return body + _HEAD.pack(END, 0)

    def end(self, header: Header) -> int:
        """Where the extensions end in the file; the backing file's name may begin there."""
        features = self.names_features and header.version >= 3
        return header.header_length + len(self._pack_all(features=features))

    def pack(self, header: Header, *, behind: int = 0) -> bytes:
        """The first cluster's content: header, extensions, backing name; sets its place.

        Args:
            header: of the image.
            behind: where the name may begin at the earliest, in bytes.

        Raises:
            FormatError: the name is too long.
            NoSpaceError: it does not fit into a cluster.
        """
        body = self._pack_all(features=self.names_features and header.version >= 3)
        name = _bytes(self.backing_file or "")
        if len(name) > MAX_BACKING_NAME:
            raise FormatError(
                f"A backing file's name of {len(name)} bytes is too long",
                qemu="Invalid argument",
                field="backing_file",
                value=len(name),
                expected=MAX_BACKING_NAME,
            )
        length = max(header.header_length + len(body), behind if name else 0)
        if length + len(name) > header.cluster_size:
            raise NoSpaceError(
                f"The backing file's name of {len(name)} bytes does not fit into the header",
                errno=errno.ENOSPC,
                qemu="No space left on device",
            )
        header.backing_file_size = len(name)
        header.backing_file_offset = length if name else 0
        return (header.pack() + body).ljust(length, b"\0") + name


def without_features(header: Header, head: bytes, limit: int) -> bytes | None:
    """The first `limit` bytes of a header's cluster, without the names of features.

    All that counts ends there then, but for the backing file's name, which stays where it is.
    None: there is too much.
    """
    packed = head[: header.header_length]
    packed += Extensions.parse(header, head)._pack_all(features=False)
    if len(packed) > min(limit, header.backing_file_offset or limit):
        return None
    return packed + head[len(packed) : limit]


def name_of(raw: bytes) -> str:
    """A name as it is stored; for QEMU, and so for all who look at an image, it ends at a zero."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _feature_table() -> bytes:
    return b"".join(
        bytes([kind, bit]) + name.encode().ljust(_FEATURE_NAME_BYTES, b"\0")
        for kind, bit, name in FEATURE_NAMES
    )


def _extension(kind: int, value: bytes) -> bytes:
    return _HEAD.pack(kind, len(value)) + value + bytes(-len(value) % 8)


def refuse_unknown(header: Header, extensions: Extensions) -> None:
    """Refuse incompatible features that are unknown or not built, by their names.

    Raises:
        UnsupportedError: there is one.
        FormatError: the compression type is unknown, or its feature bit does not fit.
    """
    strange = header.incompatible_features & ~sum(constants(Incompatible).values())
    if strange:
        names = []
        for bit in range(64):
            if strange >> bit & 1 and (0, bit) in extensions.features:
                names.append(extensions.features[0, bit])
                strange &= ~(1 << bit)
        if strange:
            names.append(f"Unknown incompatible feature: {strange:x}")
        text = f"Unsupported qcow2 feature(s): {', '.join(names)}"
        raise UnsupportedError(text, field="incompatible_features", hint="a newer program made it")
    if header.crypt_method:
        raise UnsupportedError("Encrypted qcow2 images are not supported yet", field="encryption")
    _check_compression(header)


def _check_compression(header: Header) -> None:
    kind = header.compression_type
    if kind >= len(COMPRESSION_NAMES):
        text = f"qcow2: unknown compression type: {kind}"
        raise bad_field("compression_type", kind, 104, text, expected="0 or 1")
    has_bit = bool(header.incompatible_features & Incompatible.COMPRESSION)
    if bool(kind) != has_bit:
        word = "must be set" if kind else "must not be set"
        text = f"qcow2: Compression type incompatible feature bit {word}"
        raise bad_field("compression_type", kind, 104, text)
