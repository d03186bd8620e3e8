"""`bench`: how many requests are under way, when a flush runs, what an error does."""

from __future__ import annotations

import threading
import time

import pytest

import diskwright
from diskwright.block.node import Node
from diskwright.block.registry import register
from diskwright.errors import CancelledError, IOFailure, OptionError
from diskwright.operations.bench import Load

SIZE = 1 << 20


class Watched(Node):
    """A disk that notes what is done to it, and takes its time."""

    driver = "watched"
    is_protocol = True

    log: list[tuple[str, int]]
    most = 0

    def _open(self, opener, options):
        self.size = SIZE
        self.filename = "watched"
        type(self).log = []
        type(self).most = 0
        self._under_way = 0
        self._lock = threading.Lock()

    def _enter(self, what, offset):
        with self._lock:
            self._under_way += 1
            type(self).most = max(self.most, self._under_way)
            self.log.append((what, offset))
        time.sleep(0.002)

    def _leave(self, what, offset):
        with self._lock:
            self._under_way -= 1
            self.log.append((what, offset))

    def _read_into(self, offset, view):
        self._enter("begin", offset)
        view[:] = bytes(len(view))
        self._leave("end", offset)

    def _write(self, offset, view, fua):
        self._enter("begin", offset)
        self._leave("end", offset)
        if view[0] == 13:
            raise IOFailure("unlucky")

    def _flush(self):
        with self._lock:
            self.log.append(("flush", self._under_way))


register("watched", Watched)
DISK = {"driver": "watched"}


def flushes() -> list[tuple[int, int]]:
    """(requests that had begun, requests under way) at each flush."""
    begun, found = 0, []
    for what, number in Watched.log:
        begun += what == "begin"
        if what == "flush":
            found.append((begun, number))
    return found


def test_so_many_requests_are_under_way():
    done = diskwright.bench(DISK, load=Load(40, depth=8))
    assert (done.requests, done.bytes) == (40, 40 * 4096)
    assert 2 <= Watched.most <= 8
    assert done.seconds >= 40 * 0.002 / 8
    diskwright.bench(DISK, load=Load(5, depth=1))
    assert Watched.most == 1


def test_requests_begin_in_order_and_anew_at_the_end():
    diskwright.bench(DISK, load=Load(6, depth=1, length=512, offset=SIZE - 1024, step=512))
    begun = [offset for what, offset in Watched.log if what == "begin"]
    assert begun == [SIZE - 1024, SIZE - 512, 0, 512, 1024, 1536]


def test_a_flush_waits_for_requests_and_they_for_it():
    diskwright.bench(DISK, load=Load(20, depth=4, pattern=1, flush_interval=8))
    # One more as the node is closed.
    assert flushes()[:3] == [(4, 0), (12, 0), (20, 0)]


def test_without_drain_requests_go_on():
    load = Load(64, depth=8, pattern=1, flush_interval=8, drain=False)
    diskwright.bench(DISK, load=load)
    assert len(flushes()) >= 8
    assert any(under_way for _, under_way in flushes())


def test_after_an_error_nothing_begins():
    with pytest.raises(IOFailure, match="unlucky") as caught:
        diskwright.bench(DISK, load=Load(1000, depth=4, pattern=13))
    assert caught.value.qemu == "Failed request: Input/output error"
    assert len([what for what, _ in Watched.log if what == "begin"]) <= 4


def test_it_can_be_cancelled():
    flag = threading.Event()
    flag.set()
    with pytest.raises(CancelledError):
        diskwright.bench(DISK, load=Load(1000), cancel=flag)


@pytest.mark.parametrize(
    "words",
    [
        {"flush_interval": 8},
        {"flush_interval": 3, "depth": 4, "pattern": 0},
        {"depth": 0},
        {"length": 0},
        {"count": 0},
    ],
)
def test_loads_that_make_no_sense(words):
    with pytest.raises(OptionError):
        Load(**{"count": 1, **words})
