"""One connection in its transmission phase: many requests at once, from any thread.

There is no thread of its own: of those who wait for a reply, one reads, for all of them; when
its own reply has come it hands that on. So a lone request costs no switch of threads.

Invariants (tests/unit/test_nbd_client.py):

1. A reply is believed only if its cookie is of a request under way and its length may be.
2. After a failure of the stream every request under way, and every later one, fails with it.
"""

from __future__ import annotations

from _thread import allocate_lock
from contextlib import suppress

from diskwright.errors import DiskwrightError, IOFailure
from diskwright.wire.nbd import transmission
from diskwright.wire.nbd.messages import Negotiated, ProtocolError
from diskwright.wire.nbd.numbers import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from diskwright.drivers.protocols.nbd.stream import Stream


class Request:
    """A request and what is known of its reply.

    Attributes:
        command, flags, offset, length: as on the wire.
        payload: what is written.
        into: where what is read belongs.
        extents: of a block status, context -> (length, bits) of each run.
        error: (errno, the server's message), if it failed.
    """

    __slots__ = (
        "awake", "command", "done", "error", "extents", "failure", "flags", "gate", "got",
        "into", "length", "offset", "payload",
    )  # fmt: skip

    def __init__(
        self,
        command: int,
        where: tuple[int, int],
        *,
        flags: int = 0,
        payload: memoryview | None = None,
        into: memoryview | None = None,
    ) -> None:
        self.command = command
        self.offset, self.length = where
        self.flags = flags
        self.payload = payload
        self.into = into
        self.reset()

    def reset(self) -> None:
        """Forget what came, so that it can be sent once more."""
        self.got = 0
        self.done = self.awake = False
        self.error: tuple[int, str] | None = None
        self.failure: DiskwrightError | None = None
        self.extents: dict[int, list[tuple[int, int]]] = {}
        self.gate = allocate_lock()
        self.gate.acquire()


class Retired(DiskwrightError):
    """The connection is given back; the request is to go over another one."""


class _Breaking:
    """What ends here within a message leaves the stream of no use to anybody.

    Those who wait are told; only what is no failure of the stream is raised.
    """

    __slots__ = ("_die",)

    def __init__(self, die: Callable[[DiskwrightError], None]) -> None:
        self._die = die

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None:
            return False
        if isinstance(error, OSError):
            self._die(IOFailure(f"The NBD connection broke ({error.strerror})", errno=5))
            return True
        if isinstance(error, (IOFailure, ProtocolError)):
            self._die(error)
            return True
        self._die(IOFailure("The NBD connection was left within a message", errno=5))
        return False


class Connection:
    """Requests over one stream; see the module's text."""

    def __init__(self, stream: Stream, agreed: Negotiated) -> None:
        self.agreed = agreed
        self.failure: DiskwrightError | None = None
        self._stream = stream
        self._extended = agreed.extended
        self._lock = allocate_lock()  # guards what follows, but for sending
        self._pending: dict[int, Request] = {}
        self._waiting: dict[int, Request] = {}
        self._cookie = 0
        self._reading = False
        self._sending = allocate_lock()
        self._ending = allocate_lock()
        self._ended = False
        self._breaking = _Breaking(self._die)

    @property
    def load(self) -> int:
        """How many requests are under way."""
        return len(self._pending)

    @property
    def sent(self) -> int:
        """How many requests there have been."""
        return self._cookie

    def call(self, request: Request) -> None:
        """Send a request and wait for its reply.

        Raises:
            Retired: nothing was sent.
            IOFailure, ProtocolError: the connection is of no use any more. What the server
                answers, an error too, is in the request.
        """
        with self._lock:
            if self.failure is not None:
                raise self.failure
            self._cookie += 1
            cookie = self._cookie
            self._pending[cookie] = request
            self._stream.is_lone = len(self._pending) == 1
        with self._breaking:
            self._send(cookie, request)
        self._await(cookie, request)
        if request.failure is not None:
            raise request.failure

    def _send(self, cookie: int, request: Request) -> None:
        where = (cookie, request.offset, request.length)
        header = transmission.request(self.agreed, request.command, request.flags, where)
        with self._sending:
            if request.payload is None:
                self._stream.send(header)
            else:
                self._stream.send(header, request.payload)

    def retire(self) -> bool:
        """Take no more requests; False where some are under way."""
        with self._lock:
            if self._pending:
                return False
            self.failure = self.failure or Retired("The NBD connection is given back")
            return True

    def close(self) -> None:
        """Say farewell and end the connection, once: who gives it back may be closed meanwhile."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
            try:
                self._say_farewell()
            finally:
                self._die(IOFailure("The NBD connection was closed", errno=5))

    def _say_farewell(self) -> None:
        """Tell the server, unless it would be within a message, or it has gone itself."""
        if self.failure is None or isinstance(self.failure, Retired):
            farewell = transmission.request(self.agreed, Command.DISC, 0, (0, 0, 0))
            with suppress(OSError, IOFailure), self._sending:
                self._stream.send(farewell)

    # ------------------------------------------------------------------------------- waiting

    def _await(self, cookie: int, request: Request) -> None:
        while True:
            with self._lock:
                request.awake = False
                if request.done:
                    return
                leads = not self._reading
                if leads:
                    self._reading = True
                else:
                    self._waiting[cookie] = request
            if not leads:
                request.gate.acquire()
                continue
            try:
                with self._breaking:
                    while not request.done:
                        self._read_reply()
            finally:
                self._hand_on()

    def _hand_on(self) -> None:
        """Let another one read."""
        with self._lock:
            self._reading = False
            for cookie, other in self._waiting.items():
                del self._waiting[cookie]
                _wake(other)
                return

    def _finish(self, cookie: int, request: Request) -> None:
        with self._lock:
            self._pending.pop(cookie, None)
            self._waiting.pop(cookie, None)
            request.done = True
            _wake(request)

    def _die(self, error: DiskwrightError) -> None:
        with self._lock:
            self.failure = self.failure or error
            failed = list(self._pending.values())
            self._pending.clear()
            self._waiting.clear()
            for request in failed:
                request.failure = self.failure
                request.done = True
                _wake(request)
        self._stream.close()

    # ------------------------------------------------------------------------------- replies

    def _read_reply(self) -> None:
        """Read a reply, or a chunk of one, for whoever it is."""
        stream = self._stream
        if self._extended:
            fields = transmission.EXTENDED_REPLY.unpack(stream.take(32))
            magic, flags, kind, cookie, _, length = fields
            if magic != EXTENDED_REPLY_MAGIC:
                raise ProtocolError(f"The NBD server's reply begins with {magic:#x}")
            self._chunk((flags, kind), cookie, length)
            return
        head = bytes(stream.take(16))
        magic, error, cookie = transmission.SIMPLE_REPLY.unpack(head)
        if magic == SIMPLE_REPLY_MAGIC:
            self._simple(cookie, error)
            return
        if magic != STRUCTURED_REPLY_MAGIC or not self.agreed.structured:
            raise ProtocolError(f"The NBD server's reply begins with {magic:#x}")
        head += bytes(stream.take(4))
        _, flags, kind, cookie, length = transmission.STRUCTURED_REPLY.unpack(head)
        self._chunk((flags, kind), cookie, length)

    def _of(self, cookie: int) -> Request:
        request = self._pending.get(cookie)
        if request is None:
            raise ProtocolError("The NBD server answers what nobody asked")
        return request

    def _simple(self, cookie: int, error: int) -> None:
        request = self._of(cookie)
        if error:
            request.error = (transmission.from_wire(error), "")
        elif request.into is not None:
            if self.agreed.structured:
                raise ProtocolError("The NBD server answers a read without structure")
            self._stream.receive_into(request.into)
        self._finish(cookie, request)

    def _chunk(self, about: tuple[int, int], cookie: int, length: int) -> None:
        flags, kind = about
        request = self._of(cookie)
        transmission.chunk_length(kind, length, request.length)
        if kind == Chunk.OFFSET_DATA:
            (offset,) = transmission.OFFSET.unpack(self._stream.take(8))
            self._stream.receive_into(self._target(request, offset, length - 8))
        elif kind == Chunk.OFFSET_HOLE:
            offset, count = transmission.HOLE.unpack(self._stream.take(transmission.HOLE.size))
            view = self._target(request, offset, count)
            view[:] = bytes(len(view))
        elif kind & Chunk.IS_ERROR:
            request.error = transmission.take_error(self._stream.receive(length))
        elif kind != Chunk.NONE:
            self._status(request, kind, self._stream.receive(length))
        if flags & Chunk.DONE:
            if request.into is not None and not request.error and request.got < request.length:
                raise ProtocolError("The NBD server's answer to a read is not whole")
            self._finish(cookie, request)

    def _target(self, request: Request, offset: int, length: int) -> memoryview:
        """Where a chunk of a read belongs."""
        start = offset - request.offset
        if request.into is None or start < 0 or start + length > request.length or not length:
            raise ProtocolError("The NBD server sends data that nobody asked for")
        request.got += length
        return request.into[start : start + length]

    def _status(self, request: Request, kind: int, payload: bytes) -> None:
        if request.command != Command.BLOCK_STATUS:
            raise ProtocolError("The NBD server sends a block status that nobody asked for")
        extended = kind == Chunk.BLOCK_STATUS_EXT
        context, extents = transmission.take_status(payload, extended=extended)
        request.extents[context] = extents


def _wake(request: Request) -> None:
    """Let its thread go on, if it waits; under the lock."""
    if not request.awake:
        request.awake = True
        request.gate.release()
