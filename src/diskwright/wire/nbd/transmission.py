"""The transmission phase: requests and replies as bytes, without an object for each.

Both sides unpack with the structures here; what is checked before it is believed is checked by
`Requests` for the server and by `chunk_length` for the client.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Transmission phase".
"""

from __future__ import annotations

import struct

from diskwright.wire.nbd.messages import ProtocolError, Reader
from diskwright.wire.nbd.numbers import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    MAX_STRING,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    Error,
    Flag,
    Transmission,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskwright.wire.nbd.messages import Export, Negotiated

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
_KIND_REQUEST = struct.Struct(">IIQQI")  # flags and command as one number
_KIND_EXTENDED_REQUEST = struct.Struct(">IIQQQ")
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY = struct.Struct(">IHHQI")  # magic, flags, kind, cookie, length
EXTENDED_REPLY = struct.Struct(">IHHQQQ")  # magic, flags, kind, cookie, offset, length

_STRUCTURED_DATA = struct.Struct(">IHHQIQ")  # a structured reply, and the offset of its data
_EXTENDED_DATA = struct.Struct(">IHHQQQQ")

OFFSET = struct.Struct(">Q")
HOLE = struct.Struct(">QI")
CONTEXT = struct.Struct(">I")
EXTENT = struct.Struct(">II")
EXTENDED_STATUS = struct.Struct(">II")  # context, number of extents
EXTENDED_EXTENT = struct.Struct(">QQ")
ERROR = struct.Struct(">IH")

#: The longest run of equal status that a narrow reply can tell of, in whole 64 KiB.
MAX_NARROW = (1 << 32) - 65536

#: Commands -> the flag of the export that allows them.
_ALLOWED_BY = {
    Command.FLUSH: Transmission.SEND_FLUSH,
    Command.TRIM: Transmission.SEND_TRIM,
    Command.CACHE: Transmission.SEND_CACHE,
    Command.WRITE_ZEROES: Transmission.SEND_WRITE_ZEROES,
}
#: Commands -> the flags of a request that may stand with them, FUA aside.
_FLAGS = {
    Command.READ: Flag.DF,
    Command.WRITE: Flag.PAYLOAD_LEN,
    Command.WRITE_ZEROES: Flag.NO_HOLE | Flag.FAST_ZERO,
    Command.BLOCK_STATUS: Flag.REQ_ONE | Flag.PAYLOAD_LEN,
}
_WRITES = {Command.WRITE, Command.TRIM, Command.WRITE_ZEROES}
#: Their offset and length mean nothing, and are not looked at, as in QEMU.
_WITHOUT_RANGE = {Command.DISC, Command.FLUSH}
#: What messages call them.
_NAMES = {
    Command.READ: "read",
    Command.WRITE: "write",
    Command.DISC: "disconnect",
    Command.FLUSH: "flush",
    Command.TRIM: "trim",
    Command.CACHE: "cache",
    Command.WRITE_ZEROES: "write zeroes",
    Command.BLOCK_STATUS: "block status",
}

#: What an errno of this system is on the wire; anything else is EINVAL, as the protocol says.
_ON_THE_WIRE = {
    "EPERM": Error.EPERM,
    "EACCES": Error.EPERM,
    "EROFS": Error.EPERM,
    "EIO": Error.EIO,
    "ENOMEM": Error.ENOMEM,
    "EINVAL": Error.EINVAL,
    "ENOSPC": Error.ENOSPC,
    "EFBIG": Error.ENOSPC,
    "EDQUOT": Error.ENOSPC,
    "EOVERFLOW": Error.EOVERFLOW,
    "ENOTSUP": Error.ENOTSUP,
    "EOPNOTSUPP": Error.ENOTSUP,
    "ESHUTDOWN": Error.ESHUTDOWN,
}


def to_wire(number: int) -> int:
    """The number on the wire for an errno of this system."""
    import errno

    return _ON_THE_WIRE.get(errno.errorcode.get(number, ""), Error.EINVAL)


def from_wire(number: int) -> int:
    """This system's errno for a number on the wire."""
    import errno

    for name, wire in _ON_THE_WIRE.items():
        if wire == number:
            return int(getattr(errno, name, errno.EINVAL))
    return errno.EINVAL


class Requests:
    """What a server expects of requests, and what it tells of those that cannot be.

    Attributes:
        form: the structure of a header.
        kind_form: the same with flags and command as one number, which for a plain read is 0.
        write_kinds: those numbers for plain writes.
        magic: what one begins with.
    """

    def __init__(self, agreed: Negotiated) -> None:
        self.form = EXTENDED_REQUEST if agreed.extended else REQUEST
        self.kind_form = _KIND_EXTENDED_REQUEST if agreed.extended else _KIND_REQUEST
        flagged = (Flag.PAYLOAD_LEN << 16 | Command.WRITE,) if agreed.extended else ()
        self.write_kinds = (Command.WRITE, *flagged)
        self.magic = EXTENDED_REQUEST_MAGIC if agreed.extended else REQUEST_MAGIC
        self._extended = agreed.extended
        self._structured = agreed.structured
        self._contexts = agreed.contexts
        export: Export = agreed.export
        self._size = export.size
        self._flags = export.flags
        self._minimum = export.blocks[0] if agreed.knows_blocks else 1

    def payload(self, command: int, flags: int, length: int) -> int:
        """How many bytes follow a header; those of which more than MAX_PAYLOAD do are refused."""
        # A write without the flag that says so has a payload too: QEMU 10.0.2 sends such.
        carries = command == Command.WRITE or (self._extended and flags & Flag.PAYLOAD_LEN)
        return length if carries else 0

    def refusal(self, command: int, flags: int, offset: int, length: int) -> tuple[int, str] | None:
        """(error, message) of a request that is not done, or None."""
        allowed = _FLAGS.get(command, 0) | (Flag.FUA if self._flags & Transmission.SEND_FUA else 0)
        if not self._extended:
            allowed &= ~Flag.PAYLOAD_LEN
        if flags & ~allowed or (flags & Flag.DF and not self._structured):
            name = _NAMES.get(command, "<unknown>")
            return Error.EINVAL, f"unsupported flags for command {name} (got {flags:#x})"
        needed = _ALLOWED_BY.get(command, 0)
        status = command == Command.BLOCK_STATUS
        if command > Command.BLOCK_STATUS or (needed and not self._flags & needed):
            return Error.EINVAL, f"invalid request type ({command})"
        if command in _WRITES and self._flags & Transmission.READ_ONLY:
            return Error.EPERM, "Export is read-only"
        if command in _WITHOUT_RANGE:
            return None
        if status and not self._contexts:
            return Error.EINVAL, "CMD_BLOCK_STATUS not negotiated"
        return self._range_refusal(command, flags, offset, length)

    def _range_refusal(
        self, command: int, flags: int, offset: int, length: int
    ) -> tuple[int, str] | None:
        is_told = command == Command.BLOCK_STATUS and flags & Flag.PAYLOAD_LEN
        if (is_told or command in (Command.READ, Command.WRITE)) and length > MAX_PAYLOAD:
            return Error.EINVAL, f"len ({length}) is larger than max len ({MAX_PAYLOAD})"
        if is_told:
            return None  # the length is that of the payload, which says what range is meant
        if command == Command.BLOCK_STATUS and not length:
            return Error.EINVAL, "need non-zero length"
        if offset + length > self._size:
            writes = command in (Command.WRITE, Command.WRITE_ZEROES)
            where = f"operation past EOF; From: {offset}, Len: {length}, Size: {self._size}"
            return (Error.ENOSPC if writes else Error.EINVAL), where
        if (offset | length) & (self._minimum - 1):
            return Error.EINVAL, f"unaligned request; minimum block size {self._minimum}"
        return None

    def status_range(self, offset: int, payload: bytes) -> tuple[int, list[int]]:
        """(length, ids of contexts) that a block status request with a payload means.

        Raises:
            ProtocolError: what the payload says cannot be; the connection may go on.
        """
        reader = Reader(payload, "A request for a block status")
        length = int(OFFSET.unpack(reader.take(OFFSET.size))[0])
        wanted = [reader.u32() for _ in range(reader.left // CONTEXT.size)]
        reader.end()
        if not wanted or len(set(wanted)) < len(wanted) or not self._contexts.keys() >= set(wanted):
            raise ProtocolError("A request for a block status in contexts that were not chosen")
        if not 0 < length <= self._size - offset:
            raise ProtocolError(f"A request for a block status of {length} bytes at {offset}")
        return length, wanted


# ----------------------------------------------------------------------------- replies


class Replies:
    """Packs the replies of one connection; payloads are the caller's to send behind them.

    Extended headers repeat the offset of the request, whatever part of it a chunk is about.
    """

    def __init__(self, agreed: Negotiated) -> None:
        self.structured = agreed.structured
        self.extended = agreed.extended

    def header(self, kind: int, cookie: int, offset: int, length: int, *, done: bool) -> bytes:
        """The header of a chunk whose payload has `length` bytes."""
        flags = Chunk.DONE if done else 0
        if self.extended:
            return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)
        return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)

    def done(self, cookie: int, offset: int) -> bytes:
        """All went well with the request at `offset`, and there is nothing to tell."""
        if not self.structured:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
        return self.header(Chunk.NONE, cookie, offset, 0, done=True)

    def data(
        self, cookie: int, offset: int, length: int, *, of: int | None = None, done: bool = True
    ) -> bytes:
        """What stands before `length` bytes that were read at `offset`.

        Args:
            cookie: of the request.
            offset, length: of the bytes.
            of: the request's offset, where that is another one.
            done: no chunk of the same reply follows.
        """
        flags = Chunk.DONE if done else 0
        if self.extended:
            begin = offset if of is None else of
            return _EXTENDED_DATA.pack(
                EXTENDED_REPLY_MAGIC, flags, Chunk.OFFSET_DATA, cookie, begin, length + 8, offset
            )
        if self.structured:
            return _STRUCTURED_DATA.pack(
                STRUCTURED_REPLY_MAGIC, flags, Chunk.OFFSET_DATA, cookie, length + 8, offset
            )
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def hole(self, cookie: int, offset: int, length: int, *, of: int, done: bool = True) -> bytes:
        """That `length` bytes from `offset` are zero (structured replies only); else as `data`."""
        head = self.header(Chunk.OFFSET_HOLE, cookie, of, HOLE.size, done=done)
        return head + HOLE.pack(offset, length)

    def error(self, cookie: int, number: int, message: str, offset: int) -> bytes:
        """That the request at `offset` failed, with an error of `numbers.Error`."""
        if not self.structured:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, number, cookie)
        text = message.encode("utf-8", "replace")[:MAX_STRING]
        payload = ERROR.pack(number, len(text)) + text
        return self.header(Chunk.ERROR, cookie, offset, len(payload), done=True) + payload

    def status(
        self,
        cookie: int,
        request: tuple[int, int],
        extents: Iterable[tuple[int, int]],
        *,
        done: bool = True,
    ) -> bytes:
        """The status of a range in one context.

        Args:
            cookie: of the request.
            request: (offset of the request, id of the context).
            extents: (length, bits) of what follows that offset.
            done: it is the last context.
        """
        offset, context = request
        if self.extended:
            pieces = [EXTENDED_EXTENT.pack(length, bits) for length, bits in extents]
            payload = EXTENDED_STATUS.pack(context, len(pieces)) + b"".join(pieces)
            kind = Chunk.BLOCK_STATUS_EXT
        else:
            narrow = _narrowed(extents)
            payload = CONTEXT.pack(context) + b"".join(EXTENT.pack(*one) for one in narrow)
            kind = Chunk.BLOCK_STATUS
        return self.header(kind, cookie, offset, len(payload), done=done) + payload


def _narrowed(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extents up to the first whose length needs more than 32 bits, which is cut."""
    found: list[tuple[int, int]] = []
    for length, bits in extents:
        found.append((min(length, MAX_NARROW), bits & 0xFFFFFFFF))
        if length > MAX_NARROW:
            break
    return found


# ---------------------------------------------------------------------------- the client's side


def request(agreed: Negotiated, command: int, flags: int, where: tuple[int, int, int]) -> bytes:
    """A request's header; a payload follows it.

    Args:
        agreed: on what.
        command, flags: of `numbers`.
        where: (cookie, offset, length).
    """
    if agreed.extended:
        if command == Command.WRITE:
            flags |= Flag.PAYLOAD_LEN
        return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, *where)
    return REQUEST.pack(REQUEST_MAGIC, flags, command, *where)


def chunk_length(kind: int, length: int, asked: int) -> int:
    """The length of a chunk's payload, if a request for `asked` bytes may have such a one.

    Raises:
        ProtocolError: it may not.
    """
    if kind == Chunk.NONE:
        good = length == 0
    elif kind == Chunk.OFFSET_DATA:
        good = 8 < length <= asked + 8
    elif kind == Chunk.OFFSET_HOLE:
        good = length == HOLE.size
    elif kind in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT):
        good = 12 <= length <= MAX_PAYLOAD
    elif kind & Chunk.IS_ERROR:
        good = ERROR.size <= length <= ERROR.size + MAX_STRING + 8
    else:
        raise ProtocolError(f"The NBD server sends a chunk of unknown kind {kind}")
    if not good:
        raise ProtocolError(f"The NBD server sends a chunk of kind {kind} of {length} bytes")
    return length


def take_error(data: bytes) -> tuple[int, str]:
    """(errno of this system, the server's message) of an error chunk's payload."""
    reader = Reader(data, "The NBD server's error")
    number = reader.u32()
    if not number:
        raise ProtocolError("The NBD server reports an error that is none")
    return from_wire(number), reader.text(reader.u16())


def take_status(data: bytes, *, extended: bool) -> tuple[int, list[tuple[int, int]]]:
    """(context, (length, bits) of each extent) of a block status chunk's payload."""
    form = EXTENDED_EXTENT if extended else EXTENT
    head = EXTENDED_STATUS if extended else CONTEXT
    context, *count = head.unpack_from(data)
    body = data[head.size :]
    if not body or len(body) % form.size or (count and count[0] * form.size != len(body)):
        raise ProtocolError("The NBD server sends a block status of an impossible length")
    extents = [(length, bits) for length, bits in form.iter_unpack(body)]
    if not all(length for length, _ in extents):
        raise ProtocolError("The NBD server sends a block status of no bytes")
    return context, extents
