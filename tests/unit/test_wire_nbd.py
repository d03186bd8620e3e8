"""`wire/nbd`: both sides of the handshake against each other and against hostile bytes."""

from __future__ import annotations

import errno
import random
import struct

import pytest

from diskwright.wire.nbd import messages, numbers, server, transmission
from diskwright.wire.nbd.client import ClientHandshake, OptionRefused
from diskwright.wire.nbd.messages import Export, Negotiated, ProtocolError
from diskwright.wire.nbd.numbers import Answer, Chunk, Command, Error, Flag, Option, Transmission
from diskwright.wire.nbd.server import ServerHandshake

OPTION_HEAD = struct.Struct(">QII")


class Shelf:
    """Exports "" and "disk", the second one with contexts and sizes of blocks."""

    def __init__(self) -> None:
        self.plain = Export("", 1 << 20, Transmission.SEND_FLUSH)
        self.disk = Export("disk", 5 << 40, Transmission.SEND_FLUSH | Transmission.SEND_FUA)
        self.disk.description = "a large one"
        self.disk.blocks = (512, 65536, 1 << 20)
        self.disk.contexts = server.contexts_of(["monday", "tuesday"], depth=True)

    def names(self):
        return [("", ""), ("disk", "a large one")]

    def find(self, name):
        return {"": self.plain, "disk": self.disk}.get(name)


class Talk:
    """A handshake and the bytes that it has not taken yet."""

    def __init__(self, steps):
        self.steps = steps
        self.inbox = b""
        self.outbox = b""
        self.tls = 0
        self.over = False
        self.result = None
        self.wants = 0
        self._go(None)

    def feed(self, data):
        self.inbox += data
        while not self.over and len(self.inbox) >= self.wants:
            taken, self.inbox = self.inbox[: self.wants], self.inbox[self.wants :]
            self._go(taken)

    def _go(self, data):
        try:
            wanted = self.steps.send(data)
            while not isinstance(wanted, int):
                if wanted is None:
                    self.tls += 1
                else:
                    self.outbox += wanted
                wanted = next(self.steps)
            self.wants = wanted
        except StopIteration as stop:
            self.over, self.result = True, stop.value

    def said(self):
        said, self.outbox = self.outbox, b""
        return said


def talk(one: Talk, other: Talk, piece: int = 1 << 20) -> None:
    """Let both speak until both are done, or neither has anything to say."""
    while True:
        mine, theirs = one.said(), other.said()
        if not mine and not theirs:
            return
        for data, hearer in ((mine, other), (theirs, one)):
            for at in range(0, len(data), piece):
                hearer.feed(data[at : at + piece])


def whole(handshake: ClientHandshake, name: str, queries=(), *, tls: bool = False):
    """All that a client does."""
    yield from handshake.greet()
    if tls:
        yield from handshake.start_tls()
    yield from handshake.agree()
    contexts = {}
    if queries:
        contexts = yield from handshake.contexts(name, queries, choose=True)
    return (yield from handshake.go(name, contexts))


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("replies", ["simple", "structured", "extended"])
def test_both_sides_agree(replies, tls, piece):
    shelf = Shelf()
    asks = ClientHandshake(structured=replies != "simple", extended=replies == "extended")
    queries = [numbers.BASE_ALLOCATION, "qemu:dirty-bitmap:tuesday", "other:thing"]
    mine = Talk(whole(asks, "disk", queries, tls=tls))
    theirs = Talk(ServerHandshake(shelf, tls=server.ALLOW).run())
    talk(mine, theirs, piece)
    ours, agreed = mine.result, theirs.result
    assert mine.tls == theirs.tls == tls
    for side in (ours, agreed):
        assert (side.structured, side.extended) == (replies != "simple", replies == "extended")
        assert side.tls == tls
        assert side.export.name == "disk" and side.export.size == 5 << 40
    chosen = {0: numbers.BASE_ALLOCATION, 1: "qemu:dirty-bitmap:tuesday"}
    assert ours.contexts == agreed.contexts == ({} if replies == "simple" else chosen)
    assert ours.export.blocks == shelf.disk.blocks
    assert ours.export.description == "a large one"
    flags = shelf.disk.flags | Transmission.HAS_FLAGS
    flags |= 0 if replies == "simple" else Transmission.SEND_DF
    flags |= Transmission.BLOCK_STATUS_PAYLOAD if replies == "extended" else 0
    assert ours.export.flags == flags


def test_a_server_without_extended_headers_gets_structured_replies():
    mine = Talk(whole(ClientHandshake(), "disk"))
    theirs = Talk(ServerHandshake(Shelf(), extended=False).run())
    talk(mine, theirs)
    assert mine.result.structured and not mine.result.extended


def test_a_list_then_leaving():
    def ask(handshake):
        yield from handshake.greet()
        yield from handshake.agree()
        exports = yield from handshake.exports()
        told = []
        for export in exports:
            told.append((yield from handshake.info(export.name)))
        contexts = yield from handshake.contexts("disk", [], choose=False)
        some = yield from handshake.contexts("disk", ["qemu:dirty-bitmap:"], choose=False)
        yield from handshake.leave()
        return told, contexts, some

    mine, theirs = Talk(ask(ClientHandshake())), Talk(ServerHandshake(Shelf()).run())
    talk(mine, theirs)
    told, contexts, some = mine.result
    assert [(export.name, export.size) for export in told] == [("", 1 << 20), ("disk", 5 << 40)]
    assert list(contexts.values()) == Shelf().disk.contexts
    assert list(some.values()) == ["qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"]
    assert theirs.over and theirs.result is None


def test_contexts_are_those_of_the_export_that_is_chosen():
    def ask(handshake):
        yield from handshake.greet()
        yield from handshake.agree()
        yield from handshake.contexts("disk", [numbers.BASE_ALLOCATION], choose=True)
        return (yield from handshake.go("", {}))

    mine, theirs = Talk(ask(ClientHandshake())), Talk(ServerHandshake(Shelf()).run())
    talk(mine, theirs)
    assert theirs.result.contexts == {}


def test_an_unknown_export_is_refused_by_name():
    mine = Talk(whole(ClientHandshake(), "nosuch"))
    theirs = Talk(ServerHandshake(Shelf()).run())
    with pytest.raises(OptionRefused, match="export 'nosuch' not present") as caught:
        talk(mine, theirs)
    assert caught.value.answer == Answer.UNKNOWN


def test_tls_that_is_not_there_and_tls_that_must_be():
    theirs = Talk(ServerHandshake(Shelf()).run())
    with pytest.raises(OptionRefused, match="TLS not configured"):
        talk(Talk(whole(ClientHandshake(), "", tls=True)), theirs)
    theirs = Talk(ServerHandshake(Shelf(), tls=server.REQUIRE).run())
    with pytest.raises(OptionRefused, match="not permitted before TLS") as caught:
        talk(Talk(whole(ClientHandshake(), "disk")), theirs)
    assert caught.value.answer == Answer.TLS_REQUIRED


def test_what_was_said_before_tls_counts_for_nothing():
    def ask(handshake):
        yield from handshake.greet()
        yield from handshake.agree()
        yield from handshake.contexts("disk", [numbers.BASE_ALLOCATION], choose=True)
        yield from handshake.start_tls()
        return (yield from handshake.go("disk", {}))

    mine = Talk(ask(ClientHandshake()))
    theirs = Talk(ServerHandshake(Shelf(), tls=server.ALLOW).run())
    talk(mine, theirs)
    assert theirs.result.tls and not theirs.result.structured and not theirs.result.contexts


# ---------------------------------------------------------------------- an option at a time


def option(kind: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    length = len(data) if length is None else length
    return OPTION_HEAD.pack(numbers.OPTION_MAGIC, kind, length) + data


def begun(flags: int = 3, **how) -> Talk:
    """A server that has heard a client's flags; what it said is dropped."""
    theirs = Talk(ServerHandshake(Shelf(), **how).run())
    theirs.feed(struct.pack(">I", flags))
    theirs.said()
    return theirs


def answers(data: bytes) -> list[tuple[int, int]]:
    """(option, kind) of each reply in `data`."""
    found = []
    while data:
        magic, kind_of, kind, length = messages.REPLY.unpack_from(data)
        assert magic == numbers.REPLY_MAGIC
        found.append((kind_of, kind))
        data = data[messages.REPLY.size + length :]
    return found


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (option(99, b"what"), Answer.UNSUPPORTED),
        (option(4), Answer.UNSUPPORTED),
        (option(Option.LIST, b"x"), Answer.INVALID),
        (option(Option.STRUCTURED_REPLY, b"x"), Answer.INVALID),
        (option(Option.STARTTLS), Answer.POLICY),
        (option(Option.GO, b""), Answer.INVALID),
        (option(Option.GO, struct.pack(">I", 5000)), Answer.INVALID),
        (option(Option.GO, struct.pack(">IH", 0, 2)), Answer.INVALID),
        (option(Option.GO, struct.pack(">IH", 0, 0) + b"more"), Answer.INVALID),
        (option(Option.GO, struct.pack(">I", 2) + b"\xff\xfe\0\0"), Answer.INVALID),
        (option(Option.INFO, messages.pack_info("nosuch", ())), Answer.UNKNOWN),
        (option(Option.GO, bytes(70000)), Answer.TOO_BIG),
        (option(Option.INFO, messages.pack_info("a\0b", ())), Answer.INVALID),
        (option(Option.SET_META_CONTEXT, messages.pack_contexts("disk", ())), Answer.INVALID),
    ],
)
def test_an_option_that_is_refused_is_followed_by_the_next(sent, kind):
    theirs = begun()
    theirs.feed(sent)
    ((_, got),) = answers(theirs.said())
    assert got == kind
    theirs.feed(option(Option.LIST))
    assert [got for _, got in answers(theirs.said())] == [Answer.SERVER, Answer.SERVER, Answer.ACK]


def test_things_are_agreed_on_once():
    theirs = begun()
    for kind in (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
        theirs.feed(option(kind) * 2)
        assert [got for _, got in answers(theirs.said())] == [Answer.ACK, Answer.INVALID]
    theirs.feed(option(Option.STRUCTURED_REPLY))
    assert [got for _, got in answers(theirs.said())] == [Answer.EXTENDED_REQUIRED]
    secure = begun(tls=server.ALLOW)
    secure.feed(option(Option.STARTTLS))
    secure.feed(option(Option.STARTTLS))
    assert [got for _, got in answers(secure.said())] == [Answer.ACK, Answer.INVALID]


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">I", 4),
        struct.pack(">I", 3) + b"no option at all",
        struct.pack(">I", 0) + option(Option.LIST),
        struct.pack(">I", 3) + option(99, length=(32 << 20) + 1),
        struct.pack(">I", 3) + option(Option.EXPORT_NAME, length=5000),
        struct.pack(">I", 3) + option(Option.EXPORT_NAME, b"nosuch"),
        struct.pack(">I", 3) + b"".join(map(option, (Option.EXTENDED_HEADERS, 1))),
    ],
)
def test_what_cannot_be_answered_ends_the_connection(sent):
    theirs = Talk(ServerHandshake(Shelf()).run())
    with pytest.raises(ProtocolError):
        theirs.feed(sent)


@pytest.mark.parametrize(("flags", "padding"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_the_old_way_to_choose(flags, padding):
    theirs = begun(flags)
    theirs.feed(option(Option.EXPORT_NAME, b"disk"))
    said = theirs.said()
    assert struct.unpack_from(">QH", said) == (5 << 40, 1 | Shelf().disk.flags)
    assert said[10:] == bytes(padding)
    assert theirs.result.export.name == "disk"


def test_a_long_name_is_not_repeated_whole():
    theirs = begun()
    theirs.feed(option(Option.INFO, messages.pack_info("n" * 4000, ())))
    assert theirs.said().endswith(b"'" + b"n" * 80 + b"...' not present")


def test_leaving_is_acknowledged():
    theirs = begun()
    theirs.feed(option(Option.ABORT))
    assert answers(theirs.said()) == [(Option.ABORT, Answer.ACK)]
    assert theirs.over and theirs.result is None


def test_a_long_option_is_skipped_in_pieces():
    theirs = begun()
    theirs.feed(option(99, length=1 << 20))
    asked = []
    while not theirs.outbox:
        asked.append(theirs.wants)
        theirs.feed(bytes(theirs.wants))
    assert max(asked) <= 65536 and sum(asked) >= 1 << 20


def test_random_bytes_end_in_an_answer_or_an_error(rng):
    for _ in range(300):
        theirs = begun()
        kind = rng.choice([*range(13), 99])
        data = rng.randbytes(rng.randrange(40))
        try:
            theirs.feed(option(kind, data) + option(Option.LIST))
        except ProtocolError:
            continue
        assert theirs.said()


# ------------------------------------------------------------------- servers of other ages


def test_an_oldstyle_server_has_one_export_without_a_name():
    hello = struct.pack(">QQQI", numbers.HELLO, numbers.OLDSTYLE_MAGIC, 1 << 20, 0x10005)
    mine = Talk(whole(ClientHandshake(), ""))
    mine.feed(hello + bytes(124))
    assert mine.result.export.size == 1 << 20 and mine.result.export.flags == 5
    assert not mine.said()
    named = Talk(whole(ClientHandshake(), "disk"))
    with pytest.raises(ProtocolError, match="no names"):
        named.feed(hello + bytes(124))


def test_a_newstyle_server_without_options():
    mine = Talk(whole(ClientHandshake(), "disk"))
    mine.feed(struct.pack(">QQH", numbers.HELLO, numbers.OPTION_MAGIC, 0))
    assert mine.said() == struct.pack(">I", 0) + option(Option.EXPORT_NAME, b"disk")
    mine.feed(struct.pack(">QH", 4096, 1) + bytes(124))
    assert mine.result.export.size == 4096 and not mine.result.structured


def test_a_server_that_knows_no_go():
    mine = Talk(whole(ClientHandshake(structured=False, extended=False), "disk"))
    mine.feed(struct.pack(">QQH", numbers.HELLO, numbers.OPTION_MAGIC, 3))
    mine.said()
    mine.feed(messages.REPLY.pack(numbers.REPLY_MAGIC, Option.GO, Answer.UNSUPPORTED, 0))
    assert mine.said() == option(Option.EXPORT_NAME, b"disk")
    mine.feed(struct.pack(">QH", 4096, 1))
    assert mine.result.export.size == 4096


def _reply(kind: int, data: bytes = b"", about: int = Option.GO, length: int | None = None):
    length = len(data) if length is None else length
    return messages.REPLY.pack(numbers.REPLY_MAGIC, about, kind, length) + data


_EXPORT = messages.EXPORT.pack(numbers.Info.EXPORT, 4096, 1)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        struct.pack(">QQ", numbers.HELLO, 7),
        struct.pack(">QQH", numbers.HELLO, numbers.OPTION_MAGIC, 3) + bytes(20),
        *(
            struct.pack(">QQH", numbers.HELLO, numbers.OPTION_MAGIC, 3) + reply
            for reply in (
                _reply(Answer.ACK, about=Option.LIST),
                _reply(Answer.ACK),
                _reply(Answer.ACK, b"x"),
                _reply(Answer.INFO, length=1 << 30),
                _reply(Answer.INFO, b"\0"),
                _reply(Answer.INFO, _EXPORT[:-1]),
                _reply(Answer.SERVER, bytes(4)),
                _reply(Answer.INFO, _EXPORT[:-1] + b"\0") + _reply(Answer.ACK),
                _reply(Answer.INFO, messages.BLOCKS.pack(3, 3, 4096, 4096)),
                _reply(Answer.INFO, messages.BLOCKS.pack(3, 4096, 512, 1 << 20)),
                _reply(Answer.INFO, messages.BLOCKS.pack(3, 512, 4096, 1000)),
                _reply(Answer.INFO, messages.BLOCKS.pack(3, 1 << 17, 1 << 17, 1 << 20)),
                _reply(Answer.INFO, _EXPORT) * 1100,
            )
        ),
    ],
)
def test_a_server_that_lies_is_told_so(said):
    mine = Talk(whole(ClientHandshake(structured=False, extended=False), ""))
    with pytest.raises(ProtocolError):
        mine.feed(said + _reply(Answer.ACK))


def test_a_refusal_says_what_the_server_said():
    mine = Talk(whole(ClientHandshake(structured=False, extended=False), ""))
    mine.feed(struct.pack(">QQH", numbers.HELLO, numbers.OPTION_MAGIC, 3))
    with pytest.raises(OptionRefused, match="refuses GO: not today") as caught:
        mine.feed(_reply(Answer.POLICY, b"not today"))
    assert caught.value.answer == Answer.POLICY
    quiet = OptionRefused(Option.GO, Answer.SHUTDOWN, "")
    assert str(quiet) == "The NBD server refuses GO: shutdown"
    assert str(OptionRefused(77, Answer.POLICY, "")) == "The NBD server refuses 77: policy"


# --------------------------------------------------------------------------- transmission


def agreed(*, structured: bool = True, extended: bool = False, flags: int | None = None):
    everything = sum(
        bit for name, bit in vars(Transmission).items() if name.startswith("SEND") or name[0] == "H"
    )
    export = Export("", 1 << 20, everything if flags is None else flags)
    made = Negotiated(export)
    made.structured, made.extended = structured or extended, extended
    made.contexts = {0: numbers.BASE_ALLOCATION}
    return made


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "error"),
    [
        (Command.READ, 0, 0, 4096, None),
        (Command.READ, Flag.DF, 0, 4096, None),
        (Command.READ, Flag.FUA, 0, 4096, None),
        (Command.READ, Flag.NO_HOLE, 0, 4096, Error.EINVAL),
        (Command.READ, 0, 1 << 20, 1, Error.EINVAL),
        (Command.READ, 0, (1 << 64) - 1, 1, Error.EINVAL),
        (Command.READ, 0, 0, 33 << 20, Error.EINVAL),
        (Command.WRITE, Flag.FUA, 0, 4096, None),
        (Command.WRITE, 0, (1 << 20) - 1, 2, Error.ENOSPC),
        (Command.WRITE, Flag.PAYLOAD_LEN, 0, 1, Error.EINVAL),
        (Command.FLUSH, 0, 0, 0, None),
        (Command.FLUSH, 0, 1, 512, None),
        (Command.TRIM, 0, 0, 1 << 20, None),
        (Command.CACHE, 0, 0, 1 << 20, None),
        (Command.WRITE_ZEROES, Flag.NO_HOLE | Flag.FAST_ZERO | Flag.FUA, 0, 1 << 20, None),
        (Command.WRITE_ZEROES, Flag.DF, 0, 1, Error.EINVAL),
        (Command.WRITE_ZEROES, 0, 0, (1 << 20) + 1, Error.ENOSPC),
        (Command.BLOCK_STATUS, Flag.REQ_ONE, 0, 1 << 20, None),
        (Command.BLOCK_STATUS, 0, 0, 0, Error.EINVAL),
        (Command.RESIZE, 0, 0, 0, Error.EINVAL),
        (77, 0, 0, 0, Error.EINVAL),
    ],
)
def test_which_requests_are_done(command, flags, offset, length, error):
    refusal = transmission.Requests(agreed()).refusal(command, flags, offset, length)
    assert (None if refusal is None else refusal[0]) == error


def test_what_an_export_does_not_allow():
    bare = transmission.Requests(agreed(structured=False, flags=Transmission.READ_ONLY))
    for command in (Command.WRITE, Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES):
        assert bare.refusal(command, 0, 0, 0 if command == Command.FLUSH else 512) is not None
    assert bare.refusal(Command.READ, Flag.DF, 0, 1) is not None
    assert bare.refusal(Command.READ, Flag.FUA, 0, 1) is not None
    assert bare.refusal(Command.READ, 0, 0, 1) is None
    blocks = agreed()
    blocks.export.blocks = (512, 4096, 1 << 20)
    assert transmission.Requests(blocks).refusal(Command.READ, 0, 100, 512) is None
    blocks.knows_blocks = True
    asked = transmission.Requests(blocks)
    assert asked.refusal(Command.READ, 0, 100, 512) is not None
    assert asked.refusal(Command.READ, 0, 512, 512) is None
    silent = agreed()
    silent.contexts = {}
    assert transmission.Requests(silent).refusal(Command.BLOCK_STATUS, 0, 0, 1) is not None


def test_payloads_are_bounded():
    narrow = transmission.Requests(agreed())
    assert narrow.payload(Command.WRITE, 0, 4096) == 4096
    assert narrow.payload(Command.READ, Flag.PAYLOAD_LEN, 4096) == 0
    assert narrow.refusal(Command.WRITE, 0, 0, (32 << 20) + 1)[0] == Error.EINVAL
    wide = transmission.Requests(agreed(extended=True))
    assert wide.payload(Command.WRITE, 0, 4096) == 4096
    assert wide.payload(Command.BLOCK_STATUS, Flag.PAYLOAD_LEN, 24) == 24
    assert wide.refusal(Command.WRITE, 0, 0, 4096) is None
    assert wide.refusal(Command.READ, Flag.PAYLOAD_LEN, 0, 1 << 40)[0] == Error.EINVAL
    told = (Command.BLOCK_STATUS, Flag.PAYLOAD_LEN, 0)
    assert wide.refusal(*told, 1 << 40)[0] == Error.EINVAL
    assert wide.refusal(*told, 1 << 20) is None


def test_requests_of_both_widths():
    for extended in (False, True):
        both = agreed(extended=extended)
        form = transmission.Requests(both)
        packed = transmission.request(both, Command.WRITE, Flag.FUA, (7, 4096, 512))
        magic, flags, command, *where = form.form.unpack(packed)
        assert (magic, command, where) == (form.magic, Command.WRITE, [7, 4096, 512])
        assert flags == Flag.FUA | (Flag.PAYLOAD_LEN if extended else 0)
        assert form.payload(command, flags, 512) == 512
        assert form.refusal(command, flags, 4096, 512) is None


@pytest.mark.parametrize("extended", [False, True])
def test_replies_come_apart_as_they_were_packed(extended):
    replies = transmission.Replies(agreed(extended=extended))
    form = transmission.EXTENDED_REPLY if extended else transmission.STRUCTURED_REPLY

    def apart(raw):
        _, flags, kind, cookie, *_, length = form.unpack_from(raw)
        assert cookie == 9
        return flags, kind, raw[form.size :], length

    assert apart(replies.done(9, 4096))[:2] == (Chunk.DONE, Chunk.NONE)
    flags, kind, rest, length = apart(replies.data(9, 4096, 100, done=False))
    assert (flags, kind, rest, length) == (0, Chunk.OFFSET_DATA, struct.pack(">Q", 4096), 108)
    assert apart(replies.hole(9, 4096, 100, of=0))[2] == struct.pack(">QI", 4096, 100)
    _, kind, rest, _ = apart(replies.error(9, Error.ENOSPC, "full", 0))
    assert kind & Chunk.IS_ERROR and transmission.take_error(rest) == (errno.ENOSPC, "full")
    extents = [(1 << 20, 0), (5 << 40, 3)]
    _, kind, rest, length = apart(replies.status(9, (0, 4), extents))
    assert len(rest) == length
    wanted = extents if extended else [(1 << 20, 0), (transmission.MAX_NARROW, 3)]
    assert transmission.take_status(rest, extended=extended) == (4, wanted)


def test_simple_replies():
    replies = transmission.Replies(agreed(structured=False))
    for raw, error in (
        (replies.done(9, 0), 0),
        (replies.data(9, 0, 5), 0),
        (replies.error(9, 5, "", 0), 5),
    ):
        assert transmission.SIMPLE_REPLY.unpack(raw) == (numbers.SIMPLE_REPLY_MAGIC, error, 9)


@pytest.mark.parametrize(
    ("kind", "length", "asked"),
    [
        (Chunk.NONE, 1, 512),
        (Chunk.OFFSET_DATA, 8, 512),
        (Chunk.OFFSET_DATA, 521, 512),
        (Chunk.OFFSET_HOLE, 13, 512),
        (Chunk.BLOCK_STATUS, 4, 512),
        (Chunk.BLOCK_STATUS_EXT, 1 << 30, 512),
        (Chunk.ERROR, 5, 512),
        (Chunk.ERROR, 1 << 20, 512),
        (17, 0, 512),
    ],
)
def test_chunks_that_cannot_be(kind, length, asked):
    with pytest.raises(ProtocolError):
        transmission.chunk_length(kind, length, asked)


@pytest.mark.parametrize(
    "data",
    [bytes(4), bytes(11), bytes(12), struct.pack(">III", 0, 0, 1), struct.pack(">I", 0) + b"x" * 9],
)
def test_a_block_status_that_cannot_be(data):
    with pytest.raises(ProtocolError):
        transmission.take_status(data, extended=False)
    with pytest.raises((ProtocolError, struct.error)):
        transmission.take_status(data.ljust(8, b"\1"), extended=True)


def test_errors_cross_the_wire():
    for number in (errno.EPERM, errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.ENOTSUP):
        assert transmission.from_wire(transmission.to_wire(number)) == number
    assert transmission.to_wire(errno.EROFS) == Error.EPERM
    assert transmission.to_wire(errno.EFBIG) == Error.ENOSPC
    assert transmission.to_wire(errno.EXDEV) == Error.EINVAL
    assert transmission.from_wire(4711) == errno.EINVAL
    with pytest.raises(ProtocolError):
        transmission.take_error(struct.pack(">IH", 0, 0))


def test_hostile_clients_and_servers_end_in_our_errors(rng: random.Random):
    """Whole sessions with a byte changed: an answer, more to come, or a ProtocolError."""
    good_client = struct.pack(">I", 3) + option(Option.STRUCTURED_REPLY) + option(
        Option.SET_META_CONTEXT, messages.pack_contexts("disk", [numbers.BASE_ALLOCATION])
    ) + option(Option.GO, messages.pack_info("disk", (0, 1, 2, 3)))  # fmt: skip
    theirs = Talk(ServerHandshake(Shelf()).run())
    hello = theirs.said()
    theirs.feed(good_client)
    good_server = hello + theirs.said()
    for _ in range(400):
        for good, make in (
            (good_client, lambda: ServerHandshake(Shelf()).run()),
            (
                good_server,
                lambda: whole(ClientHandshake(extended=False), "disk", ["base:allocation"]),
            ),
        ):
            lied = bytearray(good)
            lied[rng.randrange(len(lied))] ^= 1 << rng.randrange(8)
            try:
                Talk(make()).feed(bytes(lied))
            except (ProtocolError, OptionRefused):
                pass
