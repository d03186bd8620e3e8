"""Waiting at a socket: who is quick is looked for again, who is slow is slept for."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from diskwright.block import patience
from diskwright.block.patience import SHORT, WATCH, Patience

real_has_processors = patience.has_processors
pytestmark = pytest.mark.skipif(not hasattr(socket, "MSG_DONTWAIT"), reason="no MSG_DONTWAIT here")


@pytest.fixture(autouse=True)
def two_processors(monkeypatch) -> None:
    monkeypatch.setattr(patience, "has_processors", lambda: True)


class Pair:
    """A socket whose calls are counted, the one that it talks to, and the time, which calls take.

    Attributes:
        look: how many seconds a look in vain takes.
        sleep: how many seconds a sleep takes.
    """

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.near.settimeout(None)
        self.looks = self.sleeps = 0
        self.now, self.look, self.sleep = 0.0, WATCH / 10, SHORT / 2

    def receive(self, view: memoryview, flags: int) -> int:
        if flags & socket.MSG_DONTWAIT:
            self.looks += 1
            self.now += self.look
        else:
            self.sleeps += 1
            self.now += self.sleep
        return self.near.recv_into(view, 0, flags)


@pytest.fixture
def pair(monkeypatch) -> Iterator[Pair]:
    made = Pair()
    monkeypatch.setattr(patience, "perf_counter", lambda: made.now)
    yield made
    made.near.close()
    made.far.close()


def settled(pair: Pair, waiting: Patience) -> None:
    """Have the other side taken for a quick one: something is there soon."""
    pair.far.send(b"!")
    assert waiting.receive(pair.receive, memoryview(bytearray(8))) == 1
    pair.looks = pair.sleeps = 0


def sent_at_sleep(pair: Pair, waiting: Patience) -> None:
    """Receive what comes only once it is slept for."""

    def late(view: memoryview, flags: int) -> int:
        if not flags:
            pair.far.send(b"late")
        return pair.receive(view, flags)

    assert waiting.receive(late, memoryview(bytearray(8))) == 4


def test_nobody_is_looked_for_before_he_was_quick(pair):
    waiting = Patience(lambda: True)
    pair.far.send(b"!")
    assert waiting.receive(pair.receive, memoryview(bytearray(8))) == 1
    assert (pair.looks, pair.sleeps) == (0, 1)
    pair.far.send(b"abc")
    view = memoryview(bytearray(8))
    assert waiting.receive(pair.receive, view) == 3
    assert bytes(view[:3]) == b"abc"
    assert (pair.looks, pair.sleeps) == (1, 1)


def test_who_comes_while_he_is_looked_for_is_found_without_sleep(pair):
    waiting = Patience(lambda: True)
    settled(pair, waiting)

    def receive(view: memoryview, flags: int) -> int:
        if pair.looks == 9:
            pair.far.send(b"now")
        return pair.receive(view, flags)

    assert waiting.receive(receive, memoryview(bytearray(8))) == 3
    assert (pair.looks, pair.sleeps) == (10, 0)


def test_who_thinks_is_slept_for_and_not_looked_for_next_time(pair):
    waiting = Patience(lambda: True)
    settled(pair, waiting)
    pair.sleep = 2 * SHORT
    sent_at_sleep(pair, waiting)
    assert pair.sleeps == 1
    assert 10 <= pair.looks <= 12  # for as long as WATCH is
    for _ in range(2 * patience.FEWEST_SLEEPS):
        pair.looks = 0
        sent_at_sleep(pair, waiting)
        assert pair.looks == 0


def test_looking_in_vain_is_done_ever_less(pair):
    """As where others want the processors: nobody comes while he is looked for, but soon after."""
    waiting = Patience(lambda: True)
    pair.look = 2 * WATCH
    pair.sleep = SHORT / 4
    settled(pair, waiting)
    for _ in range(patience.FEWEST_SLEEPS * 2**6):
        sent_at_sleep(pair, waiting)
    assert 5 <= pair.looks <= 7
    pair.looks = 0
    for _ in range(2 * patience.MOST_SLEEPS):  # it is tried again in the end
        pair.far.send(b"y")
        waiting.receive(pair.receive, memoryview(bytearray(8)))
    assert pair.looks > patience.MOST_SLEEPS
    pair.looks = 0
    for _ in range(2 * (patience.FEWEST_SLEEPS + 1) - 1):  # and then as from the beginning
        sent_at_sleep(pair, waiting)
    assert pair.looks == 2


def test_after_a_look_in_vain_so_many_sleeps_come_at_once(pair):
    waiting = Patience(lambda: True)
    pair.look = 2 * WATCH
    pair.sleep = SHORT / 4
    settled(pair, waiting)
    looks = []
    for _ in range(2 + 3 * patience.FEWEST_SLEEPS):
        sent_at_sleep(pair, waiting)
        looks.append(pair.looks)
    few = patience.FEWEST_SLEEPS
    assert looks == [1] * (few + 1) + [2] * (2 * few + 1)


def test_others_are_made_room_for(pair):
    lone = True
    waiting = Patience(lambda: lone)
    settled(pair, waiting)
    lone = False
    pair.far.send(b"x")
    assert waiting.receive(pair.receive, memoryview(bytearray(8))) == 1
    assert (pair.looks, pair.sleeps) == (0, 1)


def test_one_processor_is_the_other_sides(pair, monkeypatch):
    monkeypatch.setattr(patience, "has_processors", lambda: False)
    waiting = Patience(lambda: True)
    for _ in range(3):
        settled(pair, waiting)
        pair.far.send(b"x")
        assert waiting.receive(pair.receive, memoryview(bytearray(8))) == 1
        assert (pair.looks, pair.sleeps) == (0, 1)


def test_the_end_and_a_wait_in_vain_are_told(pair):
    waiting = Patience(lambda: True)
    settled(pair, waiting)
    pair.near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 2000))
    with pytest.raises(BlockingIOError):
        waiting.receive(pair.receive, memoryview(bytearray(8)))
    pair.far.close()
    assert waiting.receive(pair.receive, memoryview(bytearray(8))) == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="nobody chooses processors here")
def test_the_processors_that_are_ours_count():
    assert real_has_processors() == (len(os.sched_getaffinity(0)) > 1)
