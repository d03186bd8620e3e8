"""`block/bitmap.py`: bits of a disk against a plain list of granules."""

from __future__ import annotations

import threading
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from diskwright.block.bitmap import DirtyBitmap
from diskwright.errors import OptionError

GRAIN = 512
TIB = 1 << 40


def model_runs(model: bytearray, grain: int, size: int) -> list[tuple[int, int]]:
    """Runs of ones in a list of granules, as bytes of the disk."""
    found: list[tuple[int, int]] = []
    start = None
    for number, value in enumerate([*model, 0]):
        if value and start is None:
            start = number
        elif not value and start is not None:
            found.append((start * grain, min(number * grain, size) - start * grain))
            start = None
    return found


class Machine(RuleBasedStateMachine):
    """A disk of some 150,000 granules: three pages of bits, the last one in part."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 150_000 * GRAIN + 100
        self.bitmap = DirtyBitmap("b", GRAIN, self.size)
        self.model = bytearray(self.granules)

    @property
    def granules(self) -> int:
        return -(-self.size // GRAIN)

    @rule(
        offset=st.integers(0, 160_000 * GRAIN),
        length=st.one_of(st.integers(0, 5000), st.integers(0, 140_000 * GRAIN)),
    )
    def write(self, offset: int, length: int) -> None:
        self.bitmap.set(offset, length)
        stop = min(offset + length, self.size)
        if stop > offset:
            first, last = offset // GRAIN, (stop - 1) // GRAIN
            self.model[first : last + 1] = b"\1" * (last + 1 - first)

    @rule()
    def clear(self) -> None:
        self.bitmap.clear()
        self.model = bytearray(self.granules)

    @rule(size=st.integers(1, 200_000 * GRAIN))
    def resize(self, size: int) -> None:
        self.size = size
        self.bitmap.resize(size)
        self.model = self.model[: self.granules].ljust(self.granules, b"\0")

    @rule(shift=st.integers(-0, 6), offset=st.integers(0, 10**8), length=st.integers(1, 10**7))
    def merge(self, shift: int, offset: int, length: int) -> None:
        other = DirtyBitmap("o", GRAIN << shift, self.size)
        other.set(offset, length)
        self.bitmap.merge(other)
        for first, count in other.runs():
            last = (first + count - 1) // GRAIN
            self.model[first // GRAIN : last + 1] = b"\1" * (last + 1 - first // GRAIN)

    @rule(length=st.sampled_from([512, 4096, 8192, 65536]))
    def store(self, length: int) -> None:
        again = DirtyBitmap("b", GRAIN, self.size)
        for number, data in self.bitmap.pieces(length):
            if data == b"\xff" * length:
                again.load_ones(number * length, length)
            else:
                again.load(number * length, data)
        self.bitmap = again

    @rule()
    def copy(self) -> None:
        copied = self.bitmap.copy("b")
        self.bitmap.set(0, self.size)
        self.bitmap = copied

    @invariant()
    def same(self) -> None:
        assert list(self.bitmap.runs()) == model_runs(self.model, GRAIN, self.size)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


def test_an_empty_window_shows_nothing():
    bitmap = DirtyBitmap("b", GRAIN, 8 * GRAIN)
    bitmap.set(0, GRAIN)
    assert not list(bitmap.runs(1, 0)) and not list(bitmap.runs(8 * GRAIN))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_window_shows_its_part(data):
    bitmap = DirtyBitmap("b", GRAIN, 70_000 * GRAIN)
    ranges = st.lists(st.tuples(st.integers(0, 70_000), st.integers(1, 9000)), max_size=6)
    noted = bytearray(bitmap.size // GRAIN)
    for first, count in data.draw(ranges):
        bitmap.set(first * GRAIN, count * GRAIN)
        noted[first : min(first + count, len(noted))] = b"\1" * max(
            min(first + count, len(noted)) - first, 0
        )
    offset = data.draw(st.integers(0, bitmap.size))
    length = data.draw(st.integers(0, bitmap.size - offset))
    covered = bytearray(bitmap.size // 64)
    for start, run in bitmap.runs(offset, length):
        assert offset <= start < start + run <= offset + length
        covered[start // 64 : -(-(start + run) // 64)] = b"\1" * (
            -(-(start + run) // 64) - start // 64
        )
    for number in range(-(-offset // GRAIN), (offset + length) // GRAIN):
        assert covered[number * 8] == noted[number]


def test_sizes_must_be_the_same():
    bitmap = DirtyBitmap("b", 512, 1 << 20)
    with pytest.raises(OptionError, match="different sizes"):
        bitmap.merge(DirtyBitmap("o", 512, 2 << 20))


def test_a_disk_of_16_tib_costs_what_was_written():
    tracemalloc.start()
    began = time.process_time()
    bitmap = DirtyBitmap("b", 65536, 16 * TIB)
    bitmap.set(0, 16 * TIB)  # a zeroed disk
    assert list(bitmap.runs()) == [(0, 16 * TIB)]
    bitmap.clear()
    for offset in range(0, 16 * TIB, TIB // 16):
        bitmap.set(offset, 1)
    assert sum(1 for _ in bitmap.runs()) == 256
    assert bitmap.dirty_bytes() == 256 * 65536
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert time.process_time() - began < 5


def test_every_other_granule_is_told_without_a_list():
    bitmap = DirtyBitmap("b", 512, 1 << 28)
    bitmap.load(0, b"\x55" * (bitmap.bits // 8))
    tracemalloc.start()
    assert sum(length for _, length in bitmap.runs()) == 1 << 27
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()


def test_threads_note_together():
    bitmap = DirtyBitmap("b", 512, 1 << 24)

    def note(number: int) -> None:
        for at in range(number * 512, 1 << 24, 8 * 512):
            bitmap.set(at, 512)

    threads = [threading.Thread(target=note, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(bitmap.runs()) == [(0, 1 << 24)]
