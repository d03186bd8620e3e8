"""Waiting at a socket: who is quick is looked for again, who is slow is slept for."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
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
    """A socket whose calls are counted, and the one that it talks to."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.near.settimeout(None)
        self.looks = self.sleeps = 0

    def receive(self, view: memoryview, flags: int) -> int:
        if flags & socket.MSG_DONTWAIT:
            self.looks += 1
        else:
            self.sleeps += 1
        return self.near.recv_into(view, 0, flags)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.near.close()
    made.far.close()


def settled(pair: Pair, waiting: Patience) -> None:
    """Have the other side taken for a quick one: something is there at once."""
    pair.far.send(b"!")
    assert waiting.receive(pair.receive, memoryview(bytearray(8))) == 1
    pair.looks = pair.sleeps = 0


def test_nobody_is_looked_for_before_he_was_quick(pair):
    waiting = Patience(lambda: True)
    settled(pair, waiting)
    pair.far.send(b"abc")
    view = memoryview(bytearray(8))
    assert waiting.receive(pair.receive, view) == 3
    assert bytes(view[:3]) == b"abc"
    assert (pair.looks, pair.sleeps) == (1, 0)


def test_who_comes_while_he_is_looked_for_is_found_without_sleep(pair, monkeypatch):
    monkeypatch.setattr(patience, "WATCH", 60.0)
    waiting = Patience(lambda: True)
    settled(pair, waiting)

    def receive(view: memoryview, flags: int) -> int:
        if pair.looks == 1:
            pair.far.send(b"now")
        return pair.receive(view, flags)

    assert waiting.receive(receive, memoryview(bytearray(8))) == 3
    assert (pair.looks, pair.sleeps) == (2, 0)


def test_who_thinks_is_slept_for_and_not_looked_for_next_time(pair):
    waiting = Patience(lambda: True)
    settled(pair, waiting)
    later = threading.Timer(100 * SHORT, pair.far.send, [b"late"])
    later.start()
    begin, spent = time.perf_counter(), time.thread_time()
    assert waiting.receive(pair.receive, memoryview(bytearray(8))) == 4
    took, spent = time.perf_counter() - begin, time.thread_time() - spent
    later.join()
    assert pair.sleeps == 1 and pair.looks >= 1
    assert spent < took / 2 and took > WATCH
    pair.looks = 0
    pair.far.send(b"again")
    assert waiting.receive(pair.receive, memoryview(bytearray(8))) == 5
    assert pair.looks == 0


def test_looking_in_vain_is_done_ever_less(pair, monkeypatch):
    """As where others want the processors: nobody comes while he is looked for, but soon after."""
    monkeypatch.setattr(patience, "WATCH", 0.0)
    monkeypatch.setattr(patience, "SHORT", 60.0)
    waiting = Patience(lambda: True)
    settled(pair, waiting)

    def late(view: memoryview, flags: int) -> int:
        if not flags:
            pair.far.send(b"x")
        return pair.receive(view, flags)

    for _ in range(patience.FEWEST_SLEEPS * 2**6):
        waiting.receive(late, memoryview(bytearray(8)))
    assert 5 <= pair.looks <= 7
    monkeypatch.setattr(patience, "WATCH", 60.0)
    pair.looks = 0
    for _ in range(2 * patience.MOST_SLEEPS):  # it is tried again in the end
        pair.far.send(b"y")
        waiting.receive(pair.receive, memoryview(bytearray(8)))
    assert pair.looks > patience.MOST_SLEEPS


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
