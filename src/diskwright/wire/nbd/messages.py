"""Messages of the handshake: packed and taken apart, each bounded before it is believed.

A handshake is a generator, so that whoever owns the socket decides how to wait. It yields
- an int: give me so many bytes (`send` them in),
- bytes: send these,
- None: the next byte in either direction is part of a TLS handshake; come back afterwards.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Option types" and "Option reply types".
"""

from __future__ import annotations

import struct

from diskwright.errors import FormatError
from diskwright.wire.nbd.numbers import MAX_ITEMS, MAX_STRING, Info

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from typing import TypeAlias, TypeVar

    Result = TypeVar("Result")
    #: a handshake, or a part of one
    Steps: TypeAlias = Generator[int | bytes | None, bytes, Result]

OPTION = struct.Struct(">QII")  # magic, option, length
REPLY = struct.Struct(">QIII")  # magic, option, kind, length
EXPORT = struct.Struct(">HQH")  # INFO_EXPORT, size, flags
BLOCKS = struct.Struct(">HIII")  # INFO_BLOCK_SIZE, minimum, preferred, maximum
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")

#: The sizes of blocks of a server that says nothing about them.
DEFAULT_BLOCKS = (1, 4096, 32 << 20)


class ProtocolError(FormatError):
    """The peer says what the protocol does not allow; the connection is of no use any more."""

    kind = "protocol"


class Export:
    """What a client learns of an export.

    Attributes:
        name, description: texts; the description may be empty.
        size: in bytes.
        flags: of `numbers.Transmission`.
        blocks: (minimum, preferred, maximum) length of requests, in bytes.
        tells_blocks: the server says that; else they are what the protocol has for such servers.
        contexts: names that block status can be asked about.
    """

    __slots__ = ("blocks", "contexts", "description", "flags", "name", "size", "tells_blocks")

    def __init__(self, name: str, size: int, flags: int) -> None:
        self.name = name
        self.size = size
        self.flags = flags
        self.description = ""
        self.blocks = DEFAULT_BLOCKS
        self.tells_blocks = False
        self.contexts: Sequence[str] = ()


class Negotiated:
    """What both sides have agreed on.

    Attributes:
        export: what is served.
        structured, extended: which replies and headers there are; extended are structured too.
        contexts: id -> name of the contexts that were chosen.
        tls: the connection is encrypted.
        knows_blocks: the client has been told of the sizes of blocks, and so keeps to them.
    """

    __slots__ = ("contexts", "export", "extended", "knows_blocks", "structured", "tls")

    def __init__(self, export: Export) -> None:
        self.export = export
        self.structured = False
        self.extended = False
        self.contexts: dict[int, str] = {}
        self.tls = False
        self.knows_blocks = False


class Reader:
    """Takes the data of an option or of its reply apart; what is missing is an error."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._at = 0
        self._what = what

    def take(self, length: int) -> bytes:
        """The next bytes."""
        end = self._at + length
        if end > len(self._data):
            raise ProtocolError(f"{self._what} ends too early")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def u16(self) -> int:
        """A number of two bytes."""
        return int(_U16.unpack(self.take(2))[0])

    def u32(self) -> int:
        """A number of four bytes."""
        return int(_U32.unpack(self.take(4))[0])

    def text(self, length: int | None = None) -> str:
        """A string of that length, or with its length before it."""
        length = self.u32() if length is None else length
        if length > MAX_STRING:
            raise ProtocolError(f"{self._what} has a string of {length} bytes; {MAX_STRING} go")
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"{self._what} has a string that is no UTF-8") from error

    def count(self, number: int) -> int:
        """A number of items that is believed."""
        if number > MAX_ITEMS:
            raise ProtocolError(f"{self._what} has {number} items; {MAX_ITEMS} go")
        return number

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._at

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise ProtocolError(f"{self._what} is too long by {self.left} bytes")


def pack_text(text: str) -> bytes:
    """A string with its length before it."""
    raw = text.encode("utf-8", "surrogateescape")
    return _U32.pack(len(raw)) + raw


def pack_info(name: str, wanted: Sequence[int]) -> bytes:
    """The data of INFO and GO."""
    return pack_text(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def unpack_info(data: bytes) -> tuple[str, list[int]]:
    """(name, kinds of information) that INFO or GO asks for."""
    reader = Reader(data, "A request for an export")
    name = reader.text()
    wanted = [reader.u16() for _ in range(reader.count(reader.u16()))]
    reader.end()
    return name, wanted


def pack_contexts(name: str, queries: Sequence[str]) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return pack_text(name) + _U32.pack(len(queries)) + b"".join(map(pack_text, queries))


def unpack_contexts(data: bytes) -> tuple[str, list[str]]:
    """(name, queries) of LIST_META_CONTEXT or SET_META_CONTEXT."""
    reader = Reader(data, "A request for contexts")
    name = reader.text()
    queries = [reader.text() for _ in range(reader.count(reader.u32()))]
    reader.end()
    return name, queries


def pack_export(export: Export, wanted: Sequence[int]) -> list[bytes]:
    """The pieces of information that INFO and GO are answered with."""
    found = [EXPORT.pack(Info.EXPORT, export.size, export.flags)]
    if Info.NAME in wanted:
        found.append(_U16.pack(Info.NAME) + export.name.encode())
    if Info.DESCRIPTION in wanted and export.description:
        found.append(_U16.pack(Info.DESCRIPTION) + export.description.encode())
    if Info.BLOCK_SIZE in wanted:
        found.append(BLOCKS.pack(Info.BLOCK_SIZE, *export.blocks))
    return found


def take_info(export: Export, data: bytes) -> int:
    """Note a piece of information in `export`; returns its kind. Unknown kinds pass."""
    reader = Reader(data, "Information about an export")
    kind = reader.u16()
    if kind == Info.EXPORT:
        _, export.size, export.flags = _whole(EXPORT, data)
    elif kind == Info.NAME:
        export.name = reader.text(reader.left)
    elif kind == Info.DESCRIPTION:
        export.description = reader.text(reader.left)
    elif kind == Info.BLOCK_SIZE:
        _, *blocks = _whole(BLOCKS, data)
        export.tells_blocks = True
        export.blocks = _checked_blocks(blocks[0], blocks[1], blocks[2])
    return kind


def _whole(form: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != form.size:
        raise ProtocolError(f"Information about an export has {len(data)} bytes, not {form.size}")
    return form.unpack(data)


def _checked_blocks(minimum: int, preferred: int, maximum: int) -> tuple[int, int, int]:
    """Sizes of blocks that can be kept.

    Raises:
        ProtocolError: they contradict each other, or the protocol.
    """
    if minimum & (minimum - 1) or not 1 <= minimum <= 65536:
        raise ProtocolError(f"The server's minimum block size {minimum} is no power of two to 64k")
    if preferred & (preferred - 1) or preferred < minimum:
        raise ProtocolError(f"The server's preferred block size {preferred} cannot be")
    if maximum != 0xFFFFFFFF and (maximum % minimum or maximum < preferred):
        raise ProtocolError(f"The server's maximum block size {maximum} cannot be")
    return minimum, preferred, maximum
