"""The server's side of the handshake, as a generator (see messages.py for what it yields).

Invariants (tests/unit/test_wire_nbd.py):

1. Data of an option are bounded before they are asked for; what is longer is skipped in pieces.
2. What was said before TLS began counts for nothing after it.
3. An error of an option is a reply, and the next option is listened to; only what leaves it
   open where the next message begins ends the connection.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Fixed newstyle negotiation".
"""

from __future__ import annotations

import struct

from diskwright.wire.nbd.messages import (
    OPTION,
    REPLY,
    Export,
    Negotiated,
    ProtocolError,
    pack_export,
    pack_text,
    unpack_contexts,
    unpack_info,
)
from diskwright.wire.nbd.numbers import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY_BITMAP,
    HELLO,
    MAX_OPTION,
    MAX_SKIPPED,
    MAX_STRING,
    OPTION_MAGIC,
    PADDING,
    REPLY_MAGIC,
    Answer,
    Handshake,
    Info,
    Option,
    Transmission,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from diskwright.wire.nbd.messages import Steps

    class Exports(Protocol):
        """What a server has to offer."""

        def names(self) -> Sequence[tuple[str, str]]:
            """(name, description) of all that may be told."""
            ...

        def find(self, name: str) -> Export | None:
            """The export of a name; the empty name is the default one."""
            ...


_GREETING = struct.Struct(">QQH")
_U32 = struct.Struct(">I")
_LEGACY = struct.Struct(">QH")

#: Options whose requests carry nothing.
_BARE = {Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS}

#: How much of a name that is none is repeated.
_SHOWN = 80

OFF, ALLOW, REQUIRE = "off", "allow", "require"


class Refused(Exception):
    """An option is answered with an error."""

    def __init__(self, kind: int, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ServerHandshake:
    """One client's handshake.

    Args:
        exports: what there is.
        tls: whether a client can, or must, begin TLS: "off", "allow" or "require".
        extended: whether extended headers are offered.
    """

    def __init__(self, exports: Exports, *, tls: str = OFF, extended: bool = True) -> None:
        self._exports = exports
        self._tls = tls
        self._offers_extended = extended
        self._secure = False
        self._fixed = self._no_zeroes = False
        self._forget()

    def _forget(self) -> None:
        self._structured = self._extended = False
        self._contexts: dict[int, str] = {}
        self._contexts_of = ""
        self._chosen: Export | None = None
        self._knows_blocks = False

    def run(self) -> Steps[Negotiated | None]:
        """The handshake; what was agreed on, or None if the client went away as it may.

        Raises:
            ProtocolError: the connection is to be closed.
        """
        flags = Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES
        yield _GREETING.pack(HELLO, OPTION_MAGIC, flags)
        (theirs,) = _U32.unpack((yield 4))
        if theirs & ~flags:
            raise ProtocolError(f"The client sets flags that nobody knows: {theirs:#x}")
        self._fixed = bool(theirs & Handshake.FIXED_NEWSTYLE)
        self._no_zeroes = bool(theirs & Handshake.NO_ZEROES)
        while True:
            magic, option, length = OPTION.unpack((yield OPTION.size))
            if magic != OPTION_MAGIC:
                raise ProtocolError("The client's option does not begin with IHAVEOPT")
            if option == Option.EXPORT_NAME:
                return (yield from self._export_name(length))
            if not self._fixed:
                raise ProtocolError("The client has options and did not ask for a fixed newstyle")
            if option == Option.ABORT:
                yield from self._skip(length)
                yield _reply(option, Answer.ACK)
                return None
            if (yield from self._answer(option, length)):
                return self._agreed()

    # ------------------------------------------------------------------------------- options

    def _answer(self, option: int, length: int) -> Steps[bool]:
        """Listen to one option and answer it; whether the transmission begins."""
        try:
            data = yield from self._data(option, length)
            act = self._ACTS.get(option)
            if act is None:
                raise Refused(Answer.UNSUPPORTED, f"Option {option} is not known")
            replies = act(self, option, data)
        except Refused as error:
            yield _reply(option, error.kind, str(error).encode())
            return False
        yield b"".join([*replies, _reply(option, Answer.ACK)])
        if option == Option.STARTTLS:
            yield None
            self._secure = True
            self._forget()
        return option == Option.GO

    def _data(self, option: int, length: int) -> Steps[bytes]:
        """The data of an option that may be asked for now."""
        if self._tls == REQUIRE and not self._secure and option != Option.STARTTLS:
            yield from self._skip(length)
            raise Refused(Answer.TLS_REQUIRED, f"Option {option:#x} not permitted before TLS")
        if option not in self._ACTS:
            yield from self._skip(length)
            raise Refused(Answer.UNSUPPORTED, f"Option {option} is not known")
        if length > MAX_OPTION:
            yield from self._skip(length)
            raise Refused(Answer.TOO_BIG, f"An option has at most {MAX_OPTION} bytes")
        if option in _BARE and length:
            yield from self._skip(length)
            raise Refused(Answer.INVALID, "That option carries nothing")
        return (yield length) if length else b""

    def _skip(self, length: int) -> Steps[None]:
        if length > MAX_SKIPPED:
            raise ProtocolError(f"The client announces an option of {length} bytes")
        while length:
            length -= len((yield min(length, 65536)))

    def _export_name(self, length: int) -> Steps[Negotiated]:
        """The old way to choose: there is no reply that could refuse."""
        if length > MAX_STRING:
            raise ProtocolError(f"The client asks for a name of {length} bytes")
        if self._extended:
            raise ProtocolError("The client agreed on extended headers and chooses the old way")
        name = (yield length).decode("utf-8", "replace") if length else ""
        if self._tls == REQUIRE and not self._secure:
            raise ProtocolError("The client did not begin TLS")
        found = self._chosen = self._exports.find(name)
        if found is None:
            raise ProtocolError(f"The client asks for an export that is not there: {name!r}")
        agreed = self._agreed()
        flags = self._flags(found)
        yield _LEGACY.pack(found.size, flags) + bytes(0 if self._no_zeroes else PADDING)
        return agreed

    def _list(self, option: int, data: bytes) -> list[bytes]:
        return [
            _reply(option, Answer.SERVER, pack_text(name) + description.encode())
            for name, description in self._exports.names()
        ]

    def _starttls(self, option: int, data: bytes) -> list[bytes]:
        if self._tls == OFF:
            raise Refused(Answer.POLICY, "TLS not configured")
        if self._secure:
            raise Refused(Answer.INVALID, "TLS has begun already")
        return []

    def _info(self, option: int, data: bytes) -> list[bytes]:
        try:
            name, wanted = unpack_info(data)
        except ProtocolError as error:
            raise Refused(Answer.INVALID, str(error)) from error
        found = self._found(name)
        told = Export(found.name, found.size, self._flags(found))
        told.description, told.blocks = found.description, found.blocks
        if option == Option.GO:
            self._chosen, self._knows_blocks = found, Info.BLOCK_SIZE in wanted
        return [_reply(option, Answer.INFO, piece) for piece in pack_export(told, wanted)]

    def _structure(self, option: int, data: bytes) -> list[bytes]:
        if self._extended:
            raise Refused(Answer.EXTENDED_REQUIRED, "Extended headers are agreed on already")
        if self._structured:
            raise Refused(Answer.INVALID, "Structured replies are agreed on already")
        self._structured = True
        return []

    def _extend(self, option: int, data: bytes) -> list[bytes]:
        if not self._offers_extended:
            raise Refused(Answer.UNSUPPORTED, "This server has no extended headers")
        if self._extended:
            raise Refused(Answer.INVALID, "Extended headers are agreed on already")
        self._structured = self._extended = True
        return []

    def _contexts_for(self, option: int, data: bytes) -> list[bytes]:
        """LIST_META_CONTEXT and SET_META_CONTEXT."""
        chooses = option == Option.SET_META_CONTEXT
        if chooses:
            self._contexts, self._contexts_of = {}, ""
        if not self._structured:
            raise Refused(Answer.INVALID, "Contexts need structured replies")
        try:
            name, queries = unpack_contexts(data)
        except ProtocolError as error:
            raise Refused(Answer.INVALID, str(error)) from error
        found = self._found(name)
        names = _matching(found.contexts, queries, lists=not chooses)
        if chooses:
            self._contexts, self._contexts_of = dict(enumerate(names)), found.name
        return [
            _reply(option, Answer.META_CONTEXT, _U32.pack(number) + text.encode())
            for number, text in (enumerate(names) if chooses else ((0, text) for text in names))
        ]

    _ACTS: dict[int, Callable[[ServerHandshake, int, bytes], list[bytes]]] = {
        Option.LIST: _list,
        Option.STARTTLS: _starttls,
        Option.INFO: _info,
        Option.GO: _info,
        Option.STRUCTURED_REPLY: _structure,
        Option.EXTENDED_HEADERS: _extend,
        Option.LIST_META_CONTEXT: _contexts_for,
        Option.SET_META_CONTEXT: _contexts_for,
    }

    def _found(self, name: str) -> Export:
        if "\0" in name:
            raise Refused(Answer.INVALID, "The name of an export has a zero byte in it")
        found = self._exports.find(name)
        if found is None:
            shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
            raise Refused(Answer.UNKNOWN, f"export '{shown}' not present")
        return found

    # ------------------------------------------------------------------------------ agreement

    def _flags(self, export: Export) -> int:
        flags = export.flags | Transmission.HAS_FLAGS
        if self._structured:
            flags |= Transmission.SEND_DF
        if self._extended:
            flags |= Transmission.BLOCK_STATUS_PAYLOAD
        return flags

    def _agreed(self) -> Negotiated:
        assert self._chosen is not None
        agreed = Negotiated(self._chosen)
        agreed.knows_blocks = self._knows_blocks
        agreed.structured, agreed.extended = self._structured, self._extended
        agreed.tls = self._secure
        if self._contexts_of == self._chosen.name:
            agreed.contexts = self._contexts
        return agreed


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return REPLY.pack(REPLY_MAGIC, option, kind, len(data)) + data


def _matching(contexts: Sequence[str], queries: Sequence[str], *, lists: bool) -> list[str]:
    """The contexts that queries mean: whole names, or with `lists` beginnings of them too."""
    if lists and not queries:
        return list(contexts)
    wide = ("base:", "qemu:", DIRTY_BITMAP) if lists else ()
    found: list[str] = []
    for query in queries:
        for name in contexts:
            if name not in found and (name == query or (query in wide and name.startswith(query))):
                found.append(name)
    return found


def contexts_of(bitmaps: Sequence[str], *, depth: bool) -> list[str]:
    """The contexts of an export: allocation, how deep it is, and these dirty bitmaps."""
    found = [BASE_ALLOCATION]
    if depth:
        found.append(ALLOCATION_DEPTH)
    return found + [f"{DIRTY_BITMAP}{name}" for name in bitmaps]
