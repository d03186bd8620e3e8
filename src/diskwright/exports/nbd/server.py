"""An NBD server: sockets that listen, clients that wait in one place, threads for the active ones.

Clients that say nothing wait in an epoll and cost a few KiB each. One that speaks gets one of a few
threads for as long as it goes on and nobody else needs it (see session.py).

Invariants (tests/unit/test_nbd_hostile.py):

1. A session is resumed by one thread at a time: it is in the epoll (once), in the queue, or in a
   thread's hands.
2. A socket is closed by whoever ends the last thing that uses it, so that its number cannot come to
   mean another client's while a reply is on its way.
3. While as many clients as are allowed are there, nobody is accepted: others wait in the kernel.
4. A client that does not come through its handshake in time is left.
"""

from __future__ import annotations

import errno
import select
import socket
import threading
from collections import OrderedDict
from queue import Empty, SimpleQueue
from time import monotonic, sleep

from diskwright.errors import DiskwrightError, OptionError
from diskwright.exports.nbd.channel import Channel
from diskwright.exports.nbd.session import Session
from diskwright.exports.nbd.work import READ, WRITE, Surroundings, Workspace
from diskwright.wire.nbd.messages import Negotiated, ProtocolError
from diskwright.wire.nbd.server import OFF, ServerHandshake

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskwright.exports.nbd.channel import AnyChannel
    from diskwright.exports.nbd.export import NodeExport
    from diskwright.exports.nbd.work import Job, Steps
    from diskwright.wire.nbd.messages import Export

#: Threads at most, and for how many seconds one without work stays.
_THREADS = 16
_IDLE_SECONDS = 5.0
#: Seconds that a handshake may take.
HANDSHAKE_SECONDS = 10.0
#: How lines begin that tell of handshakes.
NEGOTIATION = "option negotiation failed"
#: Clients that have not come through their handshake at one time, where nothing else bounds them.
_MAX_GREETED = 4096
#: Errors of `accept` that stay for a while, and for how many seconds nobody is accepted then.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE = 0.05
#: Seconds that clients have at the end for taking their last replies.
_FAREWELL = 2.0


class _End:
    """In the place of work: the thread that takes it ends."""


_END = _End()


class Exports:
    """Exports by name, as the handshake wants them."""

    def __init__(self, exports: Sequence[NodeExport]) -> None:
        self._exports: dict[str, NodeExport] = {}
        for export in exports:
            name = export.told.name
            if name in self._exports:
                raise OptionError(f"There are two exports with the name '{name}'", field="name")
            self._exports[name] = export

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of all of them."""
        return [(each.told.name, each.told.description) for each in self._exports.values()]

    def get(self, name: str) -> NodeExport | None:
        """The export of that name."""
        return self._exports.get(name)

    def find(self, name: str) -> Export | None:
        """What is told of it."""
        found = self.get(name)
        return None if found is None else found.told


class _Client:
    """A session and where it is."""

    __slots__ = ("deadline", "ended", "lock", "number", "parked", "session", "steps")

    def __init__(self, session: Session, deadline: float) -> None:
        self.number = session.number
        self.session = session
        self.steps: Steps = session.run()
        self.deadline = deadline
        self.lock = threading.Lock()
        self.parked = False
        self.ended = False


class NbdServer:
    """Serves exports on sockets that listen.

    Args:
        exports: what is served; the nodes stay the caller's.
        clients: how many there may be at once; 0: any number.
        tls: "off", "allow" or "require" (see `wire/nbd/server.py`).
        secure: turns a client's channel into an encrypted one.
        handshake_seconds: how long a client may take for it; 0: as long as it likes.
        told: is given a line about each client that is left for a reason.
        left: is called when a client has gone: with how many are left, and whether this one had
            come through its handshake.

    Example:
        >>> server = NbdServer([NodeExport(node)])
        >>> server.listen(socket)
        >>> server.serve()      # until another thread calls server.stop()
    """

    def __init__(
        self,
        exports: Sequence[NodeExport],
        *,
        clients: int = 1,
        tls: str = OFF,
        secure: Callable[[AnyChannel], AnyChannel] | None = None,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        told: Callable[[str], None] = lambda line: None,
        left: Callable[[int, bool], None] = lambda count, agreed: None,
    ) -> None:
        self._exports = Exports(exports)
        self._limit = clients or _MAX_GREETED
        self._handshake_seconds = handshake_seconds
        self._told = told
        self._left = left
        self._listening: list[socket.socket] = []
        self._accepts = False
        self._clients: dict[int, _Client] = {}  # by descriptor
        self._greeted: OrderedDict[_Client, None] = OrderedDict()  # as their deadlines are
        self._lock = threading.Lock()
        self._ready: SimpleQueue[_Client | Job | _End] = SimpleQueue()
        self._threads = self._idle = 0
        self._stopping = False
        self._epoll = select.epoll()
        self._waker, self._wake_end = socket.socketpair()
        self._waker.setblocking(False)
        self._epoll.register(self._waker.fileno(), select.EPOLLIN)
        self._around = Surroundings(
            others_wait=lambda: not self._ready.empty(),
            lone=lambda: self._threads - self._idle <= 1,
            hand_over=self._hand_over,
            find=self._exports.get,
            handshake=lambda: ServerHandshake(self._exports, tls=tls),
            secure=secure,
        )

    # ------------------------------------------------------------------------ listening

    def listen(self, sock: socket.socket) -> None:
        """Serve clients of a socket that listens; it belongs to the server from now on.

        To be called before `serve`.
        """
        sock.setblocking(False)
        self._listening.append(sock)

    def serve(self) -> None:
        """Serve until `stop`; then all that was asked for is answered or left, and closed."""
        try:
            self._update_listening()
            while not self._stopping:
                for descriptor, _ in self._epoll.poll(self._patience()):
                    self._look_at(descriptor)
                self._leave_the_late()
        finally:
            self._end()

    def stop(self) -> None:
        """Have `serve` come to its end; from any thread, or from a signal's handler."""
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        try:
            self._wake_end.send(b"\0")
        except (BlockingIOError, OSError):
            pass  # it is awake, or over

    def _look_at(self, descriptor: int) -> None:
        client = self._clients.get(descriptor)
        if client is not None:
            with client.lock:
                if not client.parked:
                    return
                client.parked = False
            self._put(client)
        elif descriptor == self._waker.fileno():
            try:
                while self._waker.recv(4096):
                    pass
            except BlockingIOError:
                pass
            self._update_listening()
        else:
            self._accept(descriptor)

    def _accept(self, descriptor: int) -> None:
        for sock in self._listening:
            if sock.fileno() == descriptor and len(self._clients) < self._limit:
                try:
                    connection, _ = sock.accept()
                except OSError as error:  # else: it has gone again
                    if error.errno in _SHORTAGES:
                        sleep(_PAUSE)
                    continue
                self._welcome(connection)
        self._update_listening()

    def adopt(self, connection: socket.socket, export: NodeExport) -> None:
        """Serve a client that knows what it gets, without a handshake; before `serve`."""
        self._welcome(connection, Negotiated(export.told))

    def _welcome(self, connection: socket.socket, agreed: Negotiated | None = None) -> None:
        try:
            channel = Channel(connection)
        except OSError:
            connection.close()
            return
        seconds = self._handshake_seconds
        session = Session(channel, self._around, agreed)
        client = _Client(session, monotonic() + seconds)
        next(client.steps)
        with self._lock:
            self._clients[client.number] = client
            if seconds and agreed is None:
                self._greeted[client] = None
        self._epoll.register(client.number, select.EPOLLONESHOT)
        self._put(client)

    def _update_listening(self) -> None:
        """Accept clients if there may be more, and not if there may not."""
        wanted = len(self._clients) < self._limit and not self._stopping
        if wanted == self._accepts:
            return
        self._accepts = wanted
        for sock in self._listening:
            if wanted:
                self._epoll.register(sock.fileno(), select.EPOLLIN)
            else:
                self._epoll.unregister(sock.fileno())

    # ----------------------------------------------------------------- handshakes in time

    def _patience(self) -> float:
        """For how long to wait; -1 for ever."""
        client = self._first_greeted()
        return -1 if client is None else max(client.deadline - monotonic(), 0.0) + 0.001

    def _first_greeted(self) -> _Client | None:
        """The client whose time for a handshake ends first."""
        with self._lock:
            while self._greeted:
                client = next(iter(self._greeted))
                if client.session.agreed is None:
                    return client
                del self._greeted[client]
        return None

    def _leave_the_late(self) -> None:
        while (client := self._first_greeted()) is not None and client.deadline <= monotonic():
            self._told(f"{NEGOTIATION}: the client took too long")
            with self._lock:
                self._greeted.pop(client, None)
            self._interrupt(client)

    def _interrupt(self, client: _Client) -> None:
        """End a client's connection, whatever it does at the moment."""
        client.session.channel.interrupt()
        self._rouse(client)

    def _rouse(self, client: _Client) -> None:
        """Have a client that waits looked at."""
        with client.lock:
            if not client.parked:
                return  # its thread comes to the end of the input
            client.parked = False
        self._put(client)

    # -------------------------------------------------------------------------- threads

    def _put(self, work: _Client | Job) -> None:
        self._ready.put(work)
        with self._lock:
            more = self._ready.qsize() > self._idle and self._threads < _THREADS
            self._threads += more
        if more:
            threading.Thread(target=self._work, name="nbd", daemon=True).start()

    def _hand_over(self, session: Session, job: Job) -> bool:
        """Have a job of a session done in another thread, if there is one to spare."""
        with self._lock:
            if not self._idle and self._threads >= _THREADS:
                return False
        session.count_beside(1)

        def whole(work: Workspace) -> None:
            try:
                job(work)
            except (DiskwrightError, OSError):
                session.channel.interrupt()
            self._finished(session)

        self._put(whole)
        return True

    def _finished(self, session: Session) -> None:
        """A job of a session is done: its client may have to be waited for, or be left."""
        client = self._clients.get(session.number)
        left = session.count_beside(-1)
        if client is None or client.session is not session:
            return
        with client.lock:
            if client.ended:
                last = not left
            else:
                last = False
                if client.parked and session.output.waits:
                    self._arm(client, WRITE)
        if last:
            self._remove(client)

    def _work(self) -> None:
        """What a thread does."""
        work = Workspace()
        while True:
            with self._lock:
                self._idle += 1
            try:
                item = self._ready.get(timeout=_IDLE_SECONDS)
            except Empty:
                item = None
            with self._lock:
                self._idle -= 1
                if isinstance(item, _End) or (item is None and self._ready.empty()):
                    self._threads -= 1
                    return
            if isinstance(item, _Client):
                self._lead(item, work)
            elif item is not None:
                item(work)

    def _lead(self, client: _Client, work: Workspace) -> None:
        """Resume a session until it waits for something."""
        try:
            why = client.steps.send(work)
        except (StopIteration, EOFError, ConnectionError):
            self._part(client)
        except (ProtocolError, DiskwrightError, OSError) as error:
            begun = client.session.agreed is not None
            self._told(str(error) if begun else f"{NEGOTIATION}: {error}")
            self._part(client)
        else:
            if why in (READ, WRITE):
                with client.lock:
                    client.parked = True
                    self._arm(client, WRITE if client.session.output.waits else READ)
            else:
                self._put(client)

    def _arm(self, client: _Client, why: int) -> None:
        event = select.EPOLLOUT if why == WRITE else select.EPOLLIN
        self._epoll.modify(client.number, event | select.EPOLLONESHOT)

    # ------------------------------------------------------------------------------- ends

    def _part(self, client: _Client) -> None:
        """The session is over."""
        client.session.channel.interrupt()
        with client.lock:
            client.ended = True
            busy = bool(client.session.beside)
        if not busy:
            self._remove(client)

    def _remove(self, client: _Client) -> None:
        """Nobody uses the client's socket any more."""
        with self._lock:
            if self._clients.get(client.number) is not client:
                return
            self._epoll.unregister(client.number)
            client.session.channel.close()
            del self._clients[client.number]
            self._greeted.pop(client, None)
            left = len(self._clients)
        self._left(left, client.session.agreed is not None)
        self._wake()

    def _end(self) -> None:
        """Stop listening, and see the clients off."""
        self._update_listening()
        for sock in self._listening:
            sock.close()
        for last in (False, True):
            for client in list(self._clients.values()):
                channel = client.session.channel
                channel.interrupt() if last else channel.end_input()
                self._rouse(client)
            deadline = monotonic() + _FAREWELL
            while self._clients and monotonic() < deadline:
                for descriptor, _ in self._epoll.poll(_PAUSE):
                    self._look_at(descriptor)
        with self._lock:
            threads = self._threads
        for _ in range(threads):
            self._ready.put(_END)
        while self._threads and monotonic() < deadline + _FAREWELL:
            sleep(_PAUSE / 10)
        self._epoll.close()
        self._waker.close()
        self._wake_end.close()
