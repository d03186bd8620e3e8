"""One client, from its first byte to its last: a generator that says what it waits for.

The server resumes it in whichever of its threads has time, with that thread's `Workspace`; so
between two yields nothing may stay in a workspace. It yields
- READ: there is no input; resume when there is some,
- WRITE: output waits for the client; resume when the socket takes some,
- YIELD: resume whenever there is time: others wait too.

Invariants (tests/unit/test_nbd_server.py):

1. No request is looked at while replies wait for the client: who does not read is not served.
2. Of a request that is refused or failed, what follows its header is skipped, and the next one is
   listened to; only what leaves it open where the next one begins ends the connection.
3. What is held for a client, input and output and requests in flight, is bounded.
"""

from __future__ import annotations

from _thread import allocate_lock

from diskwright.exports.nbd.channel import NOW
from diskwright.exports.nbd.output import Output
from diskwright.exports.nbd.transmission import Transmission
from diskwright.exports.nbd.work import READ, WRITE, YIELD
from diskwright.wire.nbd.messages import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from diskwright.exports.nbd.channel import AnyChannel
    from diskwright.exports.nbd.work import Steps, Surroundings, Workspace
    from diskwright.wire.nbd.messages import Negotiated

#: How much is received at once in the handshake, where each option is taken from the beginning.
_AT_ONCE = 1 << 14


class Session:
    """The conversation with one client.

    Attributes:
        channel: its connection.
        number: the descriptor of that.
        output: what goes there.
        beside: requests that are done in other threads at this moment.
        agreed: what the handshake led to, or None before it ended.

    Args:
        channel: as above.
        around: what the server gives.
        agreed: where there is no handshake.
    """

    def __init__(
        self, channel: AnyChannel, around: Surroundings, agreed: Negotiated | None = None
    ) -> None:
        self.channel = channel
        self.number = channel.fileno()
        self.output = Output(channel)
        self.beside = 0
        self.agreed = agreed
        self.around = around
        self._rest = b""  # what was received and not looked at, between two yields
        self._lock = allocate_lock()

    def run(self) -> Steps:
        """The conversation.

        Raises:
            ProtocolError, OSError, DiskwrightError: it ends here.
        """
        work = yield YIELD
        if self.agreed is None:
            work, self.agreed = yield from self._handshake(work)
        agreed = self.agreed
        if agreed is None:
            return
        export = self.around.find(agreed.export.name)
        if export is None:
            raise ProtocolError(f"Export {agreed.export.name!r} has gone")
        yield from Transmission(self, export, agreed).run(work)

    # -------------------------------------------------------------------------------- input

    def pause(
        self, why: int, held: memoryview | bytes = b""
    ) -> Generator[int, Workspace, Workspace]:
        """Give the thread back; what was received and not looked at is kept meanwhile."""
        self._rest = bytes(held)
        return (yield why)

    def restore(self, work: Workspace) -> int:
        """Bring what was kept to the input buffer; its length."""
        rest, self._rest = self._rest, b""
        work.input[: len(rest)] = rest
        return len(rest)

    def count_beside(self, change: int) -> int:
        """How many requests are done in other threads, after one began (1) or ended (-1)."""
        with self._lock:
            self.beside += change
            return self.beside

    # ---------------------------------------------------------------------------- handshake

    def _handshake(
        self, work: Workspace
    ) -> Generator[int, Workspace, tuple[Workspace, Negotiated | None]]:
        """Drive the handshake. Nobody is waited for: a client may send it a byte at a time."""
        steps = self.around.handshake().run()
        wanted = next(steps)
        while True:
            try:
                if isinstance(wanted, int):
                    work = yield from self._gather(work, wanted)
                    data, self._rest = self._rest[:wanted], self._rest[wanted:]
                    wanted = steps.send(data)
                elif wanted is None:
                    self._begin_tls()
                    wanted = next(steps)
                else:
                    self.output.send([wanted])
                    work = yield from self.drained(work)
                    wanted = next(steps)
            except StopIteration as stop:
                return work, stop.value

    def _gather(self, work: Workspace, wanted: int) -> Generator[int, Workspace, Workspace]:
        while len(self._rest) < wanted:
            try:
                count = self.channel.receive_into(work.input[:_AT_ONCE], NOW)
            except BlockingIOError:
                work = yield READ
                continue
            if not count:
                raise EOFError
            self._rest += bytes(work.input[:count])
        return work

    def _begin_tls(self) -> None:
        """What came before its handshake could be anybody's."""
        if self._rest:
            raise ProtocolError("The client goes on without waiting for TLS")
        assert self.around.secure is not None
        self.channel = self.around.secure(self.channel)
        self.output = Output(self.channel)

    def drained(self, work: Workspace) -> Generator[int, Workspace, Workspace]:
        """Wait until the client has taken what was sent; nothing may be in the input buffer."""
        while self.output.waits and not self.output.flush(wait=False):
            work = yield WRITE
        return work
