"""The phase of requests and replies of one session; see session.py for its invariants."""

from __future__ import annotations

from time import perf_counter

from diskwright.block.patience import Patience
from diskwright.errors import DiskwrightError
from diskwright.exports.nbd.channel import NOW
from diskwright.exports.nbd.cold import MOST_WAITING
from diskwright.exports.nbd.plain import Plain
from diskwright.exports.nbd.requests import PIECE, Executor
from diskwright.exports.nbd.work import INPUT, READ, WRITE, YIELD
from diskwright.wire.nbd.messages import ProtocolError
from diskwright.wire.nbd.numbers import MAX_PAYLOAD, Command, Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from diskwright.exports.nbd.export import NodeExport
    from diskwright.exports.nbd.requests import Asked
    from diskwright.exports.nbd.session import Session
    from diskwright.exports.nbd.work import Steps, Workspace
    from diskwright.wire.nbd.messages import Negotiated

    Resumed = Generator[int, Workspace, Workspace]

#: Requests of one client that run beside each other.
_BESIDE = 16
#: From how many seconds on a request is worth another thread.
_SLOW = 150e-6
#: How much of that figure the latest request decides.
_LATEST = 0.2
#: A payload that is longer is written as it comes.
_WHOLE = 1 << 16
#: What comes in pieces is written in pieces that begin and end at multiples of this.
_BLOCK = 4096


class Transmission:
    """Listens to requests and answers them.

    Args:
        session: whose phase it is.
        export: what is served.
        agreed: with the client.
    """

    def __init__(self, session: Session, export: NodeExport, agreed: Negotiated) -> None:
        self._session = session
        self._output = session.output
        self._executor = Executor(export, agreed)
        self._requests = self._executor.requests
        self._replies = self._executor.replies
        self._plain = Plain(export, agreed, session.output, reads=session.channel.takes_pages)
        self._header = self._requests.form.size
        self._patience = Patience(session.around.lone)
        self._slowness = 0.0  # seconds that a request took lately
        self._at = self._stop = 0  # of the input that was not looked at yet

    def run(self, work: Workspace) -> Steps:
        """Until the client goes."""
        self._resume(work)
        batch, output = self._plain.batch, self._output
        header, cold = self._header, self._plain.cold
        others_wait = self._session.around.others_wait
        while True:
            if output.waits and not output.flush(wait=True):
                work = yield from self._pause(work, WRITE)
                continue
            if len(cold.waiting) >= MOST_WAITING:
                work = yield from self._finish_cold(work)
            if self._stop - self._at >= header:
                done = batch(work.input, self._at, self._stop)
                if done > self._at:
                    self._at = done
                    continue
                whole, command, asked = self._next_header(work)
                if command == Command.DISC:
                    while cold.waiting:
                        work = yield from self._finish_cold(work)
                    return
                if whole:
                    self._at += header
                    work = yield from self._serve(work, command, asked)
                    continue
            if others_wait():
                work = yield from self._pause(work, YIELD)
            if not self._hear(work):
                work = yield from self._wait(work)

    # -------------------------------------------------------------------------------- input

    def _resume(self, work: Workspace) -> None:
        self._at, self._stop = 0, self._session.restore(work)

    def _pause(self, work: Workspace, why: int) -> Resumed:
        work = yield from self._session.pause(why, work.input[self._at : self._stop])
        self._resume(work)
        return work

    def _hear(self, work: Workspace) -> bool:
        """Whether there is more input than before; waits where nothing else is to be done.

        Raises:
            EOFError: the client has gone.
        """
        session, output = self._session, self._output
        if output.waits and not output.flush(wait=True):
            return False
        self._make_room(work)
        room, channel = work.input[self._stop :], session.channel
        try:
            if self._plain.cold.waiting or session.around.others_wait():
                count = channel.receive_into(room, NOW)
            else:
                count = self._patience.receive(channel.receive_into, room)
        except BlockingIOError:
            return False
        if not count:
            raise EOFError
        self._stop += count
        return True

    def _wait(self, work: Workspace) -> Resumed:
        """After `_hear` was in vain: have something happen that lets it be tried again."""
        if self._output.waits:
            return (yield from self._pause(work, WRITE))
        if self._plain.cold.waiting:
            return (yield from self._finish_cold(work))
        return (yield from self._pause(work, READ))

    def _receive(self, work: Workspace) -> Resumed:
        """Have more input than before, whatever has to be waited for.

        Raises:
            EOFError: the client has gone.
        """
        while not self._hear(work):
            work = yield from self._wait(work)
        return work

    def _make_room(self, work: Workspace) -> None:
        """Have the input that was not looked at yet at the buffer's beginning."""
        if self._at:
            rest = self._stop - self._at
            if rest:
                work.input[:rest] = bytes(work.input[self._at : self._stop])
            self._at, self._stop = 0, rest

    def _finish_cold(self, work: Workspace) -> Resumed:
        """Answer reads that have waited for the disk."""
        out: list[bytes | bytearray | memoryview] = []
        left = self._plain.cold.finish(out)
        self._output.send(out)
        if left is not None:
            asked = (0, *left)
            self._output.send(
                self._executor.execute(Command.READ, asked, b"", memoryview(bytearray(left[2])))
            )
        while self._output.waits and not self._output.flush(wait=True):
            work = yield from self._pause(work, WRITE)
        return work

    def _next_header(self, work: Workspace) -> tuple[bool, int, Asked]:
        """(whether the request can be served now, its command, its other fields)."""
        fields = self._requests.form.unpack_from(work.input, self._at)
        magic, flags, command, cookie, offset, length = fields
        if magic != self._requests.magic:
            raise ProtocolError(f"A request begins with {magic:#x}")
        payload = self._requests.payload(command, flags, length)
        there = self._stop - self._at - self._header
        whole = payload <= there or payload > _WHOLE
        return whole, command, (flags, cookie, offset, length)

    # ------------------------------------------------------------------------------- requests

    def _serve(self, work: Workspace, command: int, asked: Asked) -> Resumed:
        """Serve a request whose header was taken."""
        flags, cookie, offset, length = asked
        payload = self._requests.payload(command, flags, length)
        refusal = self._requests.refusal(command, flags, offset, length)
        if refusal is not None:
            reply = self._replies.error(cookie, *refusal, offset)
            if payload > MAX_PAYLOAD:  # so much is not listened to
                self._output.send([reply])
                raise ProtocolError(f"A request carries {payload} bytes; {MAX_PAYLOAD} go")
            return (yield from self._take_payload(work, payload, asked, reply))
        if payload > self._stop - self._at or payload > PIECE:
            return (yield from self._take_payload(work, payload, asked))
        if command == Command.READ and length > PIECE:
            return (yield from self._read_in_pieces(work, asked))
        view = work.input[self._at : self._at + payload]
        self._at += payload
        if not self._hand_over(command, asked, view):
            begin = perf_counter()
            self._output.send(self._executor.execute(command, asked, view, work.scratch))
            self._note_time(perf_counter() - begin)
        return work

    def _note_time(self, seconds: float) -> None:
        self._slowness += (seconds - self._slowness) * _LATEST

    def _hand_over(self, command: int, asked: Asked, view: memoryview) -> bool:
        """Whether another thread does it, so that this one can listen on."""
        session = self._session
        if self._slowness < _SLOW or session.beside >= _BESIDE:
            return False
        if self._at == self._stop and not session.beside:
            return False  # nothing else is asked for
        payload = bytes(view)

        def job(work: Workspace) -> None:
            begin = perf_counter()
            try:
                self._output.send(self._executor.execute(command, asked, payload, work.scratch))
            finally:
                self._note_time(perf_counter() - begin)

        return session.around.hand_over(session, job)

    def _take_payload(
        self, work: Workspace, left: int, asked: Asked, reply: bytes | None = None
    ) -> Resumed:
        """Write what comes, in pieces; where there is a reply already, skip it."""
        _, cookie, offset, _ = asked
        begin = offset
        while left:
            there = min(self._stop - self._at, left)
            use = there
            if there < left and reply is None:
                use = max((offset + there) // _BLOCK * _BLOCK - offset, 0)
            if not use or (use < left and use < _WHOLE and self._stop < INPUT):
                work = yield from self._receive(work)
                continue
            if reply is None:
                view = work.input[self._at : self._at + use]
                reply = self._write(view, offset, asked)
            self._at += use
            offset += use
            left -= use
        self._output.send([reply or self._replies.done(cookie, begin)])
        return work

    def _write(self, view: memoryview, at: int, asked: Asked) -> bytes | None:
        """Write a piece; an error's reply, or None."""
        flags, cookie, offset, _ = asked
        fua = bool(flags & Flag.FUA)
        if not fua and self._plain.write_piece(at, view):
            return None
        try:
            self._executor.write(at, view, fua=fua)
        except (DiskwrightError, OSError) as error:
            return self._executor.failure(error, cookie, offset)
        return None

    def _read_in_pieces(self, work: Workspace, asked: Asked) -> Resumed:
        """A long read. Where replies have chunks, an error ends them; else the connection ends."""
        flags, cookie, offset, length = asked
        held = bytes(work.input[self._at : self._stop])
        chunks = self._replies.structured and not flags & Flag.DF
        try:
            runs = self._executor.runs(offset, length) if chunks else [(offset, length, True)]
        except (DiskwrightError, OSError) as error:
            self._output.send([self._executor.failure(error, cookie, offset)])
            return work
        for at, piece, is_data in _pieces(runs):
            if not is_data:
                done = at + piece == offset + length
                self._output.send([self._replies.hole(cookie, at, piece, of=offset, done=done)])
            elif not self._send_piece(work, asked, at, piece):
                break
            work = yield from self._drained(work)
        work.input[: len(held)] = held
        self._at, self._stop = 0, len(held)
        return work

    def _send_piece(self, work: Workspace, asked: Asked, at: int, piece: int) -> bool:
        """Send a piece of a long read; False where an error ended the reply.

        Raises:
            DiskwrightError, OSError: it cannot be said that there was an error.
        """
        flags, cookie, offset, _ = asked
        chunks = self._replies.structured and not flags & Flag.DF
        head = self._head(asked, at, piece, chunks=chunks)
        if self._plain.send_piece(head, at, piece):
            return True
        view = work.scratch[:piece]
        try:
            self._executor.read_into(at, view)
        except (DiskwrightError, OSError) as error:
            if not chunks and at > offset:
                raise
            self._output.send([self._executor.failure(error, cookie, offset)])
            return False
        self._output.send([head, view])
        return True

    def _head(self, asked: Asked, at: int, piece: int, *, chunks: bool) -> bytes:
        """What stands before a piece."""
        _, cookie, offset, length = asked
        if chunks:
            done = at + piece == offset + length
            return self._replies.data(cookie, at, piece, of=offset, done=done)
        return self._replies.data(cookie, offset, length) if at == offset else b""

    def _drained(self, work: Workspace) -> Resumed:
        """Wait until the client has taken what was sent; the input is held elsewhere."""
        while self._output.waits and not self._output.flush(wait=True):
            work = yield from self._session.pause(WRITE)
        return work


def _pieces(runs: Sequence[tuple[int, int, bool]]) -> Iterator[tuple[int, int, bool]]:
    """Runs of data cut into pieces, and holes as they are."""
    for start, length, is_data in runs:
        if not is_data:
            yield start, length, False
            continue
        for at in range(start, start + length, PIECE):
            yield at, min(PIECE, start + length - at), True
