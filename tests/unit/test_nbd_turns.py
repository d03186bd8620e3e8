"""Whose turn it is: what a session of the server does where there is nothing to be read."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from diskwright.exports.nbd.channel import NOW, Channel
from diskwright.exports.nbd.cold import Cold
from diskwright.exports.nbd.export import NodeExport
from diskwright.exports.nbd.server import NbdServer
from diskwright.exports.nbd.session import Session
from diskwright.exports.nbd.work import READ, YIELD, Surroundings, Workspace
from diskwright.wire.nbd import transmission
from diskwright.wire.nbd.messages import Negotiated
from diskwright.wire.nbd.numbers import Command
from tests.unit.nbd_peers import made

pytestmark = pytest.mark.skipif(not NOW, reason="no MSG_DONTWAIT here")

READS = 512


class Noted(Channel):
    """Notes for each call whether it was ready to wait."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.waits: list[bool] = []

    def receive_into(self, view: memoryview, flags: int = 0) -> int:
        self.waits.append(not flags & NOW)
        return super().receive_into(view, flags)


class Turn:
    """A session, past its handshake, that the test resumes; and its client."""

    def __init__(self, node) -> None:
        self.others_wait = False
        export = NodeExport(node)
        self.agreed = Negotiated(export.told)
        self.client, near = socket.socketpair()
        self.client.settimeout(20)
        self.channel = Noted(near)
        around = Surroundings(
            others_wait=lambda: self.others_wait,
            lone=lambda: False,
            hand_over=lambda session, job: False,
            find=lambda name: export,
            handshake=lambda: pytest.fail("it is over"),
        )
        self.steps = Session(self.channel, around, self.agreed).run()
        next(self.steps)
        self.work = Workspace()

    def ask(self, cookie: int) -> None:
        request = transmission.request(self.agreed, Command.READ, 0, (cookie, 0, READS))
        self.client.sendall(request)

    def resume(self) -> int:
        """What it yields; whatever the workspace had is gone meanwhile."""
        self.work.input[:] = bytes(len(self.work.input))
        self.channel.waits.clear()
        return self.steps.send(self.work)

    def answered(self) -> int:
        """How many replies have come."""
        self.client.setblocking(False)
        try:
            got = len(self.client.recv(1 << 20))
        except BlockingIOError:
            return 0
        count, rest = divmod(got, 16 + READS)
        assert not rest
        return count


@pytest.fixture
def turn(tmp_path) -> Iterator[Turn]:
    with made(tmp_path) as node:
        turn = Turn(node)
        yield turn
        turn.client.close()
        turn.channel.close()


def test_a_thread_alone_may_look_for_its_client(tmp_path):
    with made(tmp_path) as node:
        server = NbdServer([NodeExport(node)])
        found = []
        for threads, idle in ((1, 0), (2, 1), (2, 0), (3, 1)):
            server._threads, server._idle = threads, idle
            found.append(server._around.lone())
        assert found == [True, True, False, False]
        server._threads = server._idle = 0
        server.stop()
        server.serve()


def test_a_client_alone_is_waited_for(turn):
    turn.ask(1)
    assert turn.resume() == READ
    assert turn.answered() == 1
    assert turn.channel.waits[-1]  # until the socket gave up


def test_where_others_wait_it_is_their_turn_first(turn):
    """What a client sends one after the other is answered a turn after the other."""
    turn.others_wait = True
    turn.ask(1)
    assert turn.resume() == YIELD
    assert turn.answered() == 0
    for cookie in (2, 3, 4):
        assert turn.resume() == YIELD
        assert turn.answered() == 1
        turn.ask(cookie)
    assert turn.resume() == YIELD
    assert turn.resume() == READ
    assert turn.channel.waits == [False]


def test_nobody_is_waited_for_while_the_disk_is(turn, monkeypatch, ways_around):
    """Reads that the disk has to bring are answered as soon as nothing more is asked for."""
    monkeypatch.setattr(
        Cold, "is_on", property(lambda self: True, lambda self, value: None), raising=False
    )
    now = Cold._now
    monkeypatch.setattr(Cold, "_now", lambda self, data, host: False)
    for cookie in range(3):
        turn.ask(cookie)
    waiting: list[tuple[int, bool]] = []
    finish = Cold.finish

    def finished(self, out):
        waiting.append((len(self.waiting), any(turn.channel.waits[1:])))
        monkeypatch.setattr(Cold, "_now", now)
        return finish(self, out)

    monkeypatch.setattr(Cold, "finish", finished)
    assert turn.resume() == READ
    assert waiting == [(3, False)]
    assert turn.answered() == 3
