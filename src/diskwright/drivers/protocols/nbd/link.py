"""The way to an export: connections that are made, chosen, lost, and made again.

Invariants (tests/unit/test_nbd_client.py):

1. What was under way when a connection broke is sent once more, whole, if one comes in time;
   what is asked for meanwhile waits for as long.
2. A flush after a loss fails if a write was acknowledged since the last one: the server may have
   forgotten it.
3. An export that is another one after a loss (its size, what it can do) is not gone on with.
4. Whoever did not want to wait any longer finds nobody there afterwards: what cleans up must not
   wait for the same server.
5. Connections beyond the first are given back when nothing is asked of them: a server may have
   few places, for which others wait.
"""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread
from contextlib import contextmanager
from time import monotonic, sleep

from diskwright.block.cancel import check_cancelled
from diskwright.drivers.protocols.nbd.connection import Connection, Request, Retired
from diskwright.drivers.protocols.nbd.stream import Stream
from diskwright.errors import AccessError, CancelledError, DiskwrightError, IOFailure
from diskwright.wire.nbd.client import ClientHandshake, OptionRefused
from diskwright.wire.nbd.messages import ProtocolError
from diskwright.wire.nbd.numbers import BASE_ALLOCATION, Command, Transmission

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from diskwright.drivers.protocols.nbd.address import Address
    from diskwright.drivers.protocols.nbd.security import Security
    from diskwright.wire.nbd.messages import Export, Negotiated, Steps

    Result = TypeVar("Result")

#: Connections to a server that promises that a flush on one covers all, unless told otherwise.
CONNECTIONS = 4
#: For how many seconds another connection may take: a server that is full lets it wait.
_MORE_SECONDS = 1.0
#: For how many seconds a further connection may have nothing to do.
_IDLE_SECONDS = 1.0
#: The longest range of a request without a payload, where headers are not extended.
LONGEST = (1 << 32) - (1 << 25)
#: Seconds before the second attempt to connect; each later one waits twice as long.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0

_WRITES = {Command.WRITE, Command.WRITE_ZEROES, Command.TRIM}


class Link:
    """All connections to one export.

    Args:
        address: where it is.
        context: what block status is asked about.
        security: how connections are encrypted, if they are.
        open_seconds: how long to go on trying to connect at first.
        reconnect_seconds: how long requests wait for a connection after one was lost.
        connections: how many to make at most, of a server that offers several.
    """

    def __init__(
        self,
        address: Address,
        *,
        context: str = BASE_ALLOCATION,
        security: Security | None = None,
        open_seconds: float = 0,
        reconnect_seconds: float = 0,
        connections: int = CONNECTIONS,
    ) -> None:
        self._address = address
        self._context = context
        self._security = security
        self._reconnect_seconds = reconnect_seconds
        self._lock = allocate_lock()  # guards the list, and connecting
        self._connections: list[Connection] = []
        self._closed = False
        self._is_left = False  # a wait was given up
        self._wanted_until = 0.0  # when requests stop to wait for what was lost
        self._open = allocate_lock()  # held until the end, for which threads wait
        self._open.acquire()
        self._limit = connections
        self._most = 1  # connections that the server takes
        self._grows = False  # another one is being made
        self._writes = self._flushed = 0  # acknowledged, in all and before the last flush
        self._lost = False  # a connection broke while the two were not the same
        first = self._retry(open_seconds)
        self._connections.append(first)
        self.agreed = first.agreed
        self.context_id = next(iter(first.agreed.contexts), None)

    @property
    def export(self) -> Export:
        """What is served."""
        return self.agreed.export

    def call(self, request: Request) -> None:
        """Have a request done.

        Raises:
            IOFailure: it was not; its errno is what the server said.
        """
        if request.command == Command.FLUSH:
            self._flush(request)
            return
        self._call(request)
        if request.command in _WRITES:
            self._writes += 1

    @property
    def longest(self) -> int:
        """The longest range of a request without a payload."""
        return (1 << 62) if self.agreed.extended else LONGEST

    def runs(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(offset, length, number) of the runs of a range, by the context, which there must be.

        Raises:
            IOFailure: the server does not say.
            ProtocolError: its answers have no end.
        """
        context = self.context_id
        assert context is not None

        def ask(start: int, count: int) -> list[tuple[int, int]]:
            request = Request(Command.BLOCK_STATUS, (start, min(count, self.longest)))
            self.call(request)
            return request.extents.get(context, [])

        return runs_of(ask, offset, length)

    def close(self) -> None:
        """End all connections."""
        if self._closed:
            return
        self._closed = True  # before the lock, which is held by who tries to connect again
        with self._lock:
            ended, self._connections = self._connections, []
        self._open.release()
        for connection in ended:
            connection.close()

    # -------------------------------------------------------------------------------- requests

    def _flush(self, request: Request) -> None:
        upto = self._writes
        self._call(request)  # which may notice only now that the server was lost
        lost, self._lost, self._flushed = self._lost, False, upto
        if lost:
            raise IOFailure(
                f"The NBD server {self._address.place} was lost after it had acknowledged writes, "
                "which it may have forgotten",
                errno=5,
            )

    def _call(self, request: Request) -> None:
        deadline = 0.0
        while True:
            check_cancelled()
            connection = self._choose(deadline)
            try:
                connection.call(request)
                break
            except Retired:
                continue
            except CancelledError:
                self._is_left = True
                self._drop(connection)
                raise
            except (IOFailure, ProtocolError) as error:
                self._drop(connection)
                deadline = deadline or monotonic() + self._reconnect_seconds
                check_cancelled()  # which another thread may have heeded
                if self._closed or self._is_left or monotonic() >= deadline:
                    raise self._broken(error) from error
                request.reset()
                sleep(_FIRST_PAUSE)  # it may be the request itself that the server dies of
        if request.error is not None:
            self._fail(*request.error)

    def _fail(self, number: int, said: str) -> None:
        from diskwright.errors import from_oserror

        sentence = f"The NBD server {self._address.place} refuses"
        error = from_oserror(OSError(number, ""), f"{sentence}: {said}" if said else sentence)
        raise error

    def _broken(self, error: DiskwrightError) -> IOFailure:
        return IOFailure(f"The NBD server {self._address.place} is lost: {error}", errno=5)

    def _choose(self, deadline: float) -> Connection:
        """A connection with as little to do as there is; one more where all are busy."""
        with self._lock:
            there = self._connections
            lone = len(there) == 1  # asking for the least would take longer than the request's rest
            best = there[0] if lone else min(there, key=lambda one: one.load, default=None)
            if best is None and self._is_left:
                raise IOFailure(
                    f"The NBD server {self._address.place} did not answer in time", errno=5
                )
            if best is None:  # perhaps another request saw it break, and this one is new
                seconds = (deadline or self._wanted_until) - monotonic()
                made = self._retry(max(seconds, 0), again=True)
                self._connections.append(made)
                return made
            if best.load and len(self._connections) < self._most and not self._grows:
                self._grows = True
                start_new_thread(self._grow, ())
            return best

    def _grow(self) -> None:
        """Make one more connection, beside the requests: those that there are go on.

        A server that is full leaves it waiting, and everybody who comes after it.
        """
        try:
            made = self._connect(_MORE_SECONDS)
        except DiskwrightError:
            made = None
        with self._lock:
            self._grows = False
            if made is None:
                self._most = len(self._connections)
                return
            if self._connections and not self._closed:
                self._connections.append(made)
        self._tend(made)

    def _tend(self, further: Connection) -> None:
        """Give a connection back once it had nothing to do for a while."""
        before = -1
        while True:
            with self._lock:
                if further not in self._connections:
                    break
                idle = further.sent == before and len(self._connections) > 1
                if idle and further.retire():
                    self._connections.remove(further)
                    break
            before = further.sent
            if self._open.acquire(timeout=_IDLE_SECONDS):
                self._open.release()
        further.close()

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            if connection in self._connections:
                self._connections.remove(connection)
                self._lost |= self._writes != self._flushed
                self._wanted_until = monotonic() + self._reconnect_seconds
        connection.close()

    # ------------------------------------------------------------------------------ connecting

    def _retry(self, seconds: float, *, again: bool = False) -> Connection:
        """Connect, and try again until so many seconds have passed."""
        deadline, pause = monotonic() + seconds, _FIRST_PAUSE
        while True:
            try:
                return self._connect()
            except (IOFailure, ProtocolError) as error:
                left = deadline - monotonic()
                if self._closed or left <= 0:
                    raise (self._broken(error) if again else error) from error
            check_cancelled()
            sleep(min(pause, left))  # the last attempt is made when the time is up
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _connect(self, seconds: float | None = None) -> Connection:
        with connected(self._address, self._security, seconds) as stream:
            steps = opened(self._security, self._shake_hands)
            agreed = stream.converse(steps, self._security)
            self._compare(agreed)
            stream.be_patient()
        if agreed.export.flags & Transmission.CAN_MULTI_CONN:
            self._most = self._limit
        return Connection(stream, agreed)

    def _shake_hands(self, handshake: ClientHandshake) -> Steps[Negotiated]:
        name = self._address.export
        contexts = yield from self._contexts(handshake, name)
        return (yield from handshake.go(name, contexts))

    def _contexts(self, handshake: ClientHandshake, name: str) -> Steps[dict[int, str]]:
        try:
            return (yield from handshake.contexts(name, [self._context], choose=True))
        except OptionRefused:  # `go` will say why, if the export is not there either
            return {}

    def _compare(self, agreed: Negotiated) -> None:
        known = getattr(self, "agreed", None)
        if known is None:
            return
        same = known.export.flags == agreed.export.flags
        if not same or known.contexts != agreed.contexts:
            raise ProtocolError(f"The NBD server {self._address.place} serves another disk now")
        if not self._connections:  # it may have grown while it was away
            self.agreed = agreed
        elif known.export.size != agreed.export.size:
            raise ProtocolError(f"The NBD server {self._address.place} serves two disks at once")


@contextmanager
def connected(
    where: Address, security: Security | None, seconds: float | None = None
) -> Iterator[Stream]:
    """A new connection, for a handshake; where that fails it is closed.

    Raises:
        IOFailure: there is no server, or it hangs up.
    """
    stream = Stream.connect(where, seconds)
    try:
        yield stream
    except OSError as error:
        stream.close()
        way = "send option request header: Unable to write to"
        if not isinstance(error, BrokenPipeError):
            way = "read option reply: Unable to read from"
        raise IOFailure(
            f"The NBD server hung up ({error.strerror})",
            errno=5,
            qemu=f"Failed to {way} socket: {error.strerror}",
            hint=None
            if security is None
            else "it may want another certificate of its clients than was shown",
        ) from error
    except IOFailure as error:
        stream.close()
        if error.qemu is not None and error.qemu.startswith("Cannot read"):
            error.qemu = f"Failed to read option reply: {error.qemu}"
        raise
    except BaseException:
        stream.close()
        raise


def opened(
    security: Security | None, rest: Callable[[ClientHandshake], Steps[Result]]
) -> Steps[Result]:
    """A whole handshake: what each begins with, and then the `rest`."""
    handshake = ClientHandshake()
    yield from handshake.greet()
    try:
        if security is not None:
            yield from handshake.start_tls()
        yield from handshake.agree()
        return (yield from rest(handshake))
    except OptionRefused:
        yield from handshake.leave()  # so that the server takes it for no accident
        raise


def conversation(
    where: Address, security: Security | None, rest: Callable[[ClientHandshake], Steps[Result]]
) -> Result:
    """Do a handshake that is all that is wanted of the server; returns its result."""
    with connected(where, security) as stream:
        found = stream.converse(opened(security, rest), security)
    stream.close()
    return found


def refuse_writing(export: Export, address: Address) -> None:
    """Refuse to write to what is served for reading only.

    Raises:
        AccessError: it is.
    """
    if export.flags & Transmission.READ_ONLY:
        raise AccessError(
            f"The NBD server serves '{address}' for reading only",
            qemu="Could not open image: Permission denied",
            errno=13,
        )


def runs_of(
    ask: Callable[[int, int], list[tuple[int, int]]], offset: int, length: int
) -> list[tuple[int, int, int]]:
    """(offset, length, bits) of the runs of a range, which `ask` may tell in parts.

    Raises:
        ProtocolError: the server's answers have no end.
    """
    found: list[tuple[int, int, int]] = []
    position, stop = offset, offset + length
    while position < stop:
        before = position
        for count, bits in ask(position, stop - position):
            count = min(count, stop - position)
            if count <= 0:
                break
            if found and found[-1][2] == bits:
                first, sofar, _ = found.pop()
                found.append((first, sofar + count, bits))
            else:
                found.append((position, count, bits))
            position += count
        if position == before:
            raise ProtocolError("The NBD server does not say what is where")
    return found
