"""The client's side of the handshake, as a generator (see messages.py for what it yields).

Source: NetworkBlockDevice/nbd, doc/proto.md, "Newstyle negotiation", "Oldstyle negotiation".
"""

from __future__ import annotations

import struct

from diskwright.errors import DiskwrightError
from diskwright.wire.nbd.messages import (
    OPTION,
    REPLY,
    Export,
    Negotiated,
    ProtocolError,
    Reader,
    pack_contexts,
    pack_info,
    take_info,
)
from diskwright.wire.nbd.numbers import (
    HELLO,
    MAX_ITEMS,
    MAX_OPTION,
    MAX_STRING,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    PADDING,
    REPLY_MAGIC,
    Answer,
    Handshake,
    Info,
    Option,
    Transmission,
    names_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskwright.wire.nbd.messages import Steps

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_LEGACY = struct.Struct(">QH")
_OLDSTYLE = struct.Struct(">QI")
_REFUSALS = names_of(Answer)


#: QEMU's sentences for refusals; {} stands for the option.
_QEMU = {
    Answer.UNSUPPORTED: "Unsupported option type {}",
    Answer.POLICY: "Denied by server for option {}",
    Answer.INVALID: "Invalid parameters for option {}",
    Answer.PLATFORM: "Server lacks support for option {}",
    Answer.TLS_REQUIRED: "TLS negotiation required before option {}\n"
    "Did you forget a valid tls-creds?",
    Answer.UNKNOWN: "Requested export not available",
    Answer.SHUTDOWN: "Server shutting down before option {}",
    Answer.BLOCK_SIZE_REQUIRED: "Server requires INFO_BLOCK_SIZE for option {}",
}


_HINTS = {
    Answer.TLS_REQUIRED: "nbds in the place of nbd, or tls-creds, encrypt the connection",
    Answer.UNKNOWN: "`diskwright nbdinfo --list` shows what the server has",
}


class OptionRefused(DiskwrightError):
    """The server answers an option with an error.

    Attributes:
        answer: the kind of the reply, of `numbers.Answer`.
        said: the server's own words, or nothing.
    """

    kind = "refused"

    def __init__(self, option: int, answer: int, said: str) -> None:
        name = names_of(Option).get(option, str(option))
        why = said or _REFUSALS.get(answer, f"error {answer:#x}").lower().replace("_", " ")
        about = f"{option} ({name.lower().replace('_', ' ')})"
        sentence = _QEMU.get(answer)
        super().__init__(
            f"The NBD server refuses {name}: {why}",
            qemu=sentence and sentence.format(about),
            hint=_HINTS.get(answer),
        )
        if self.qemu and said:
            self.qemu += f"\nserver reported: {said}"
        self.answer = answer
        self.said = said


class ClientHandshake:
    """A connection's handshake: `greet`, then any of the others, `go` or `leave` last.

    Args:
        structured, extended: whether to ask for such replies and headers.
    """

    def __init__(self, *, structured: bool = True, extended: bool = True) -> None:
        self._wants_structured = structured or extended
        self._wants_extended = extended
        self._fixed = self._no_zeroes = False
        self._old: Export | None = None
        self.structured = self.extended = self.tls = False

    def greet(self) -> Steps[None]:
        """Hear the server's greeting and answer it.

        Raises:
            ProtocolError: it is no NBD server.
        """
        magic, kind = struct.unpack(">QQ", (yield 16))
        if magic != HELLO:
            raise ProtocolError("Bad initial magic received: the peer is no NBD server")
        if kind == OLDSTYLE_MAGIC:
            size, flags = _OLDSTYLE.unpack((yield _OLDSTYLE.size))
            yield PADDING
            self._old = Export("", size, flags & 0xFFFF)
            return
        if kind != OPTION_MAGIC:
            raise ProtocolError("Bad server magic received: the NBD server speaks another way")
        (flags,) = _U16.unpack((yield 2))
        self._fixed = bool(flags & Handshake.FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & Handshake.NO_ZEROES)
        known = flags & (Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES)
        yield _U32.pack(known)

    @property
    def protocol(self) -> str:
        """What kind of handshake the server has: known once it has greeted."""
        if self._old is not None:
            return "oldstyle"
        return "newstyle-fixed" if self._fixed else "newstyle"

    def start_tls(self) -> Steps[None]:
        """Begin TLS.

        Raises:
            OptionRefused: the server has none.
        """
        if not self._fixed:
            raise ProtocolError(
                "The NBD server has no options, so no TLS either",
                qemu="Server does not support STARTTLS",
            )
        yield from self._ask(Option.STARTTLS)
        yield None
        self.tls = True

    def agree(self) -> Steps[None]:
        """Ask for the replies and headers that are wanted; a refusal is no error."""
        if not self._fixed:
            return
        if self._wants_extended and (yield from self._try(Option.EXTENDED_HEADERS)):
            self.structured = self.extended = True
        elif self._wants_structured:
            self.structured = yield from self._try(Option.STRUCTURED_REPLY)

    def contexts(self, name: str, queries: Sequence[str], *, choose: bool) -> Steps[dict[int, str]]:
        """id -> name of the server's contexts for an export; with `choose` they are set."""
        if not self.structured:
            return {}
        option = Option.SET_META_CONTEXT if choose else Option.LIST_META_CONTEXT
        replies = yield from self._ask(option, pack_contexts(name, queries))
        found: dict[int, str] = {}
        for kind, data in replies:
            if kind != Answer.META_CONTEXT:
                raise ProtocolError(f"The NBD server answers with {kind} instead of a context")
            reader = Reader(data, "The NBD server's context")
            number = reader.u32()
            found[number if choose else len(found)] = reader.text(reader.left)
        return found

    def exports(self) -> Steps[list[Export]]:
        """The exports that the server tells of, by name and description.

        Raises:
            OptionRefused: it does not tell.
        """
        if self._old is not None:
            return [self._old]
        if not self._fixed:
            raise ProtocolError("The NBD server has no options, so no list either")
        found = []
        for kind, data in (yield from self._ask(Option.LIST)):
            if kind != Answer.SERVER:
                raise ProtocolError(f"The NBD server answers with {kind} instead of an export")
            reader = Reader(data, "The NBD server's export")
            export = Export(reader.text(), 0, 0)
            export.description = reader.text(reader.left)
            found.append(export)
        return found

    def info(self, name: str) -> Steps[Export]:
        """What the server says of an export, without choosing it."""
        return (yield from self._told(Option.INFO, name))

    def go(self, name: str, contexts: dict[int, str]) -> Steps[Negotiated]:
        """Choose an export; the transmission begins.

        Raises:
            OptionRefused: the server does not serve it.
        """
        if self._old is not None:
            if name:
                raise ProtocolError(
                    f"The NBD server knows no names of exports, so none of '{name}'"
                )
            return Negotiated(self._old)
        export = yield from self._chosen(name)
        agreed = Negotiated(export)
        agreed.structured, agreed.extended, agreed.tls = self.structured, self.extended, self.tls
        agreed.contexts = contexts
        return agreed

    def leave(self) -> Steps[None]:
        """Take leave without choosing; the server's answer is not waited for."""
        if self._old is None and self._fixed:
            yield OPTION.pack(OPTION_MAGIC, Option.ABORT, 0)

    # ---------------------------------------------------------------------------------- inside

    def _chosen(self, name: str) -> Steps[Export]:
        if self._fixed:
            try:
                return (yield from self._told(Option.GO, name))
            except OptionRefused as error:
                if error.answer != Answer.UNSUPPORTED:
                    raise
        raw = name.encode("utf-8", "surrogateescape")
        yield OPTION.pack(OPTION_MAGIC, Option.EXPORT_NAME, len(raw)) + raw
        size, flags = _LEGACY.unpack((yield _LEGACY.size))
        if not self._no_zeroes:
            yield PADDING
        return Export(name, size, flags)

    def _told(self, option: int, name: str) -> Steps[Export]:
        wanted = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
        replies = yield from self._ask(option, pack_info(name, wanted))
        export = Export(name, 0, 0)
        kinds = set()
        for kind, data in replies:
            if kind != Answer.INFO:
                raise ProtocolError(f"The NBD server answers with {kind} instead of information")
            kinds.add(take_info(export, data))
        if Info.EXPORT not in kinds or not export.flags & Transmission.HAS_FLAGS:
            raise ProtocolError("The NBD server does not say how large the export is")
        return export

    def _try(self, option: int) -> Steps[bool]:
        try:
            yield from self._ask(option)
        except OptionRefused:
            return False
        return True

    def _ask(self, option: int, data: bytes = b"") -> Steps[list[tuple[int, bytes]]]:
        """Send an option; its replies before the last one, which says that it is done."""
        yield OPTION.pack(OPTION_MAGIC, option, len(data)) + data
        found: list[tuple[int, bytes]] = []
        while True:
            magic, about, kind, length = REPLY.unpack((yield REPLY.size))
            if magic != REPLY_MAGIC:
                raise ProtocolError("The NBD server's reply does not begin as one")
            if about != option:
                raise ProtocolError(f"The NBD server answers option {about}, asked for {option}")
            if length > MAX_OPTION:
                raise ProtocolError(f"The NBD server announces a reply of {length} bytes")
            answer = (yield length) if length else b""
            if kind & Answer.ERROR:
                said = answer[:MAX_STRING].decode("utf-8", "replace")
                raise OptionRefused(option, kind, said)
            if kind == Answer.ACK:
                if length:
                    raise ProtocolError("The NBD server's last reply carries something")
                return found
            found.append((kind, answer))
            if len(found) > MAX_ITEMS:
                raise ProtocolError(f"The NBD server answers {about} without an end")
