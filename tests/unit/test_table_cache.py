"""The table cache, invariant by invariant (see table_cache.py), over a child in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from diskwright.block import table_cache
from diskwright.block.inflight import OwnedLock
from diskwright.block.table_cache import Journal, Slice, Table, TableCache, TableMiss
from diskwright.errors import IOFailure
from tests.contract.races import Task

SLICE = 64


class Memory:
    """What the cache needs of a child, with a log."""

    def __init__(self, size: int = 1 << 16) -> None:
        self.data = bytearray(size)
        self.log: list[tuple[str, int]] = []
        self.before: Callable[[str, int], None] = lambda kind, offset: None

    def _do(self, kind: str, offset: int = -1) -> None:
        self.before(kind, offset)
        self.log.append((kind, offset))

    def read(self, offset: int, length: int) -> bytes:
        self._do("read", offset)
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._do("write", offset)
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self._do("flush")

    def event(self, name: str) -> None:
        self._do(name)


class Bench:
    """A cache with two tables of different ranks."""

    def __init__(self, **how: object) -> None:
        self.child = Memory()
        self.lock = OwnedLock()
        self.cache = TableCache(self.child, self.lock, **how)  # type: ignore[arg-type]
        big = {"typecode": "Q", "byteorder": "big", "slice_bytes": SLICE}
        self.counts = self.cache.table("counts", rank=0, **big)  # type: ignore[arg-type]
        self.names = self.cache.table("names", rank=2, **big)  # type: ignore[arg-type]

    def change(self, table: Table, key: int, value: int) -> Slice:
        """Change the first item of a slice as a hook does."""
        table.get(key)
        with self.lock:
            found = table.get(key)
            found.items[0] = value
            found.dirty()
            return found

    @property
    def writes(self) -> list[tuple[str, int]]:
        return [entry for entry in self.child.log if entry[0] != "read"]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_items_are_in_native_order(bench: Bench):
    bench.child.data[128:136] = (0x0102030405060708).to_bytes(8, "big")
    assert bench.names.get(128).items[0] == 0x0102030405060708
    bench.change(bench.names, 128, 5)
    bench.cache.flush()
    assert bench.child.data[128:136] == (5).to_bytes(8, "big")


@pytest.mark.parametrize("typecode", "BHIQ")
@pytest.mark.parametrize("byteorder", ["big", "little"])
def test_bytes_and_items(bench: Bench, typecode: str, byteorder: str):
    table = bench.cache.table("t", typecode=typecode, byteorder=byteorder, slice_bytes=SLICE)  # type: ignore[arg-type]
    data = bytes(range(SLICE))
    items = table.decode(data)
    size = items.itemsize
    assert items[1] == int.from_bytes(data[size : 2 * size], byteorder)  # type: ignore[arg-type]
    assert table.encode(items) == data
    assert items == table.decode(data), "encoding changed the items"


def test_ranks_have_a_barrier_between(bench: Bench):
    """2: counts, barrier, names, barrier."""
    for key in (0, 64):
        bench.change(bench.names, 1024 + key, 1)
        bench.change(bench.counts, key, 1)
    bench.cache.flush()
    assert bench.writes == [
        ("write", 0),
        ("write", 64),
        ("flush", -1),
        ("write", 1024),
        ("write", 1088),
        ("flush", -1),
    ]
    bench.child.log.clear()
    bench.cache.flush()
    assert not bench.writes


def test_names_alone_wait_for_the_data(bench: Bench):
    bench.change(bench.names, 0, 1)
    bench.cache.flush()
    assert bench.writes == [("flush", -1), ("write", 0), ("flush", -1)]


def test_other_children_are_flushed_before():
    other = Memory()
    bench = Bench(data=[other])
    bench.change(bench.names, 0, 1)
    order: list[str] = []
    other.before = lambda kind, offset: order.append(f"other {kind}")
    bench.child.before = lambda kind, offset: order.append(kind)
    bench.cache.flush()
    assert order == ["other flush", "flush", "write", "flush"]


def test_copies_are_written_too(bench: Bench):
    big = {"typecode": "Q", "byteorder": "big", "slice_bytes": SLICE}
    table = bench.cache.table("twice", rank=1, copies=[4096], **big)  # type: ignore[arg-type]
    bench.change(table, 128, 77)
    bench.cache.flush()
    assert bench.child.data[128:192] == bench.child.data[128 + 4096 : 192 + 4096]
    assert any(bench.child.data[128:192])


def test_a_flush_copies_all_in_one_step(bench: Bench):
    """2: what changes while a flush writes is not half in it."""
    first = bench.change(bench.counts, 0, 1)
    bench.change(bench.names, 1024, 1)

    def meanwhile(kind: str, offset: int) -> None:
        if kind == "write" and offset == 0:
            bench.child.before = lambda kind, offset: None
            bench.change(bench.names, 1024, 2)
            bench.change(bench.counts, 0, 2)

    bench.child.before = meanwhile
    bench.cache.flush()
    assert bench.child.data[1024 + 7] == 1
    assert bench.child.data[7] == 1
    assert first.is_dirty, "what changed meanwhile has to be written again"
    bench.cache.flush()
    assert (bench.child.data[7], bench.child.data[1024 + 7]) == (2, 2)
    assert not first.is_dirty
    assert bench.cache.dirty_bytes == 0


def test_a_table_that_is_missing_is_not_loaded_under_the_lock(bench: Bench):
    """5: no input or output under the metadata lock."""
    with bench.lock, pytest.raises(TableMiss) as caught:
        bench.names.get(256)
    assert (caught.value.table, caught.value.keys) == (bench.names, (256,))
    assert not bench.child.log
    bench.cache.load(bench.names, 256)
    with bench.lock:
        bench.names.get(256)
    assert bench.child.log == [("read", 256)]


def test_one_thread_loads_and_others_wait(bench: Bench):
    import threading

    reached, go = threading.Event(), threading.Event()

    def slow(kind: str, offset: int) -> None:
        reached.set()
        go.wait(10)

    bench.child.before = slow
    tasks = [Task(lambda: bench.names.get(0)) for _ in range(4)]
    assert reached.wait(10)
    go.set()
    found = [task.result() for task in tasks]
    assert all(one is found[0] for one in found)
    assert bench.child.log == [("read", 0)]


def test_a_failed_load_is_tried_again(bench: Bench):
    def fail(kind: str, offset: int) -> None:
        raise IOFailure("no")

    bench.child.before = fail
    with pytest.raises(IOFailure):
        bench.names.get(0)
    bench.child.before = lambda kind, offset: None
    assert bench.names.get(0).items[0] == 0


def test_memory_is_bounded():
    bench = Bench(capacity_bytes=8 * SLICE)
    for key in range(0, 100 * SLICE, SLICE):
        bench.names.get(key)
        assert bench.cache.bytes <= 8 * SLICE
    assert bench.cache.bytes == sum(
        table.slice_bytes * len(table.slices) for table in bench.cache.tables
    )


def test_memory_is_bounded_by_flushing():
    """When all is dirty, loading one more writes them."""
    bench = Bench(capacity_bytes=8 * SLICE)
    for number in range(100):
        bench.change(bench.names, number * SLICE, number + 1)
        assert bench.cache.bytes <= 9 * SLICE
    bench.cache.flush()
    for number in range(100):
        assert bench.child.data[number * SLICE + 7] == number + 1


def test_what_is_pinned_or_dirty_stays():
    """4: eviction takes clean, unpinned slices only."""
    bench = Bench(capacity_bytes=4 * SLICE)
    pinned = bench.cache.load(bench.names, 0, pin=True)
    assert pinned.pins == 1
    for key in range(SLICE, 50 * SLICE, SLICE):
        bench.names.get(key)
    assert bench.names.slices[0] is pinned
    with bench.lock:
        pinned.pins -= 1
    for key in range(SLICE, 50 * SLICE, SLICE):
        bench.names.get(key)
    assert 0 not in bench.names.slices


def test_what_was_used_gets_a_second_chance():
    bench = Bench(capacity_bytes=16 * SLICE)
    for key in range(0, 16 * SLICE, SLICE):
        bench.names.get(key)
    for found in bench.names.slices.values():
        found.used = False
    bench.names.get(5 * SLICE)
    bench.names.get(100 * SLICE)
    assert 5 * SLICE in bench.names.slices


def test_evicted_items_never_change():
    """3: who still reads an evicted slice sees the older state."""
    bench = Bench(capacity_bytes=2 * SLICE)
    old = bench.names.get(0)
    for key in range(SLICE, 10 * SLICE, SLICE):
        bench.names.get(key)
    assert 0 not in bench.names.slices
    new = bench.change(bench.names, 0, 9)
    assert new is not old
    assert old.items[0] == 0


def test_a_journal_gets_all_in_one_commit():
    """6."""
    commits: list[list[tuple[int, bytes]]] = []
    bench = Bench(journal=Journal(1 << 20, lambda writes: commits.append(list(writes))))
    bench.change(bench.counts, 0, 1)
    bench.change(bench.names, 1024, 2)
    bench.cache.flush()
    assert [[at for at, _ in writes] for writes in commits] == [[0, 1024]]
    assert bench.writes == [("flush", -1)]
    assert not bench.cache.dirty_slices


def test_after_a_failed_write_nothing_is_clean_that_was_not():
    """7."""
    bench = Bench()
    failures: list[BaseException] = []
    bench.cache.on_failure = failures.append
    one = bench.change(bench.counts, 0, 1)
    two = bench.change(bench.names, 1024, 1)

    def fail(kind: str, offset: int) -> None:
        if (kind, offset) == ("write", 1024):
            raise IOFailure("no")

    bench.child.before = fail
    with pytest.raises(IOFailure):
        bench.cache.flush()
    assert len(failures) == 1
    assert one.is_dirty
    assert two.is_dirty
    assert not one.on_disk(one.generation)


def test_reading_goes_on_when_writing_failed():
    """A load that would have to write first takes more memory instead."""
    bench = Bench(capacity_bytes=4 * SLICE)
    for number in range(4):
        bench.change(bench.names, number * SLICE, 1)

    def fail(kind: str, offset: int) -> None:
        if kind == "write":
            raise IOFailure("no")

    bench.child.before = fail
    for key in range(10 * SLICE, 40 * SLICE, SLICE):
        bench.counts.get(key)
    for number in range(4):
        assert bench.names.get(number * SLICE).items[0] == 1


def test_generations_say_what_is_on_disk(bench: Bench):
    found = bench.change(bench.names, 0, 1)
    first = found.generation
    assert not found.on_disk(first)
    bench.cache.flush()
    assert found.on_disk(first)
    bench.change(bench.names, 0, 2)
    assert found.on_disk(first)
    assert not found.on_disk(found.generation)


def test_made_and_forgotten_slices(bench: Bench):
    with bench.lock:
        made = bench.names.create(512, fill=3)
    assert made.is_dirty
    assert list(made.items) == [3] * (SLICE // 8)
    assert bench.cache.bytes == SLICE
    with bench.lock:
        bench.names.forget(512)
    assert bench.cache.bytes == bench.cache.dirty_bytes == 0
    bench.cache.flush()
    assert not bench.writes


def test_deferred_tables_wait(bench: Bench):
    bench.counts.deferred = True
    bench.change(bench.counts, 0, 1)
    bench.change(bench.names, 1024, 1)
    bench.cache.flush()
    assert ("write", 0) not in bench.writes
    assert bench.cache.clean
    bench.cache.flush_all()
    assert ("write", 0) in bench.writes
    assert not bench.cache.dirty_slices


def test_a_promise_is_kept_as_it_was_given(bench: Bench):
    bench.counts.deferred = True
    bench.change(bench.counts, 0, 1)
    bench.counts.promise()
    promised = bench.counts.slices[0].items[:]
    bench.change(bench.counts, 0, 2)
    assert not bench.cache.clean
    bench.cache.flush()
    assert bench.counts.decode(bench.child.data[: bench.counts.slice_bytes]) == promised
    assert bench.cache.clean
    assert bench.cache.dirty_slices, "what came later is deferred still"
    bench.cache.flush_all()
    assert not bench.cache.dirty_slices


def test_dropping_forgets_everything(bench: Bench):
    bench.change(bench.names, 0, 1)
    bench.cache.drop()
    assert bench.cache.bytes == bench.cache.dirty_bytes == 0
    assert bench.names.get(0).items[0] == 0
    bench.cache.flush()
    assert not bench.writes


def test_events_come_before_the_load():
    bench = Bench()
    table = bench.cache.table(
        "l2", typecode="Q", byteorder="big", slice_bytes=SLICE, event="l2_load"
    )
    table.get(0)
    assert bench.child.log == [("l2_load", -1), ("read", 0)]


def test_random_changes_are_never_lost(rng):
    """Against a dict, with a cache of four slices and flushes at any time."""
    bench = Bench(capacity_bytes=4 * SLICE)
    expected: dict[int, int] = {}
    for step in itertools.count(1):
        if step > 1500:
            break
        key = rng.randrange(40) * SLICE
        if rng.random() < 0.5:
            bench.change(bench.names, key, step)
            expected[key] = step
        else:
            assert bench.names.get(key).items[0] == expected.get(key, 0)
        if rng.random() < 0.05:
            bench.cache.flush()
    bench.cache.flush()
    for key, value in expected.items():
        assert bench.child.data[key : key + 8] == value.to_bytes(8, "big")


def test_what_nobody_used_for_so_long_is_forgotten(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(table_cache, "monotonic", lambda: now[0])
    bench = Bench(clean_seconds=10)
    bench.names.get(0)
    kept = bench.change(bench.names, SLICE, 7)
    now[0] += 10  # the slices were used since the cache was made
    bench.names.get(2 * SLICE)
    assert set(bench.names.slices) == {0, SLICE, 2 * SLICE}
    now[0] += 9
    bench.names.get(3 * SLICE)
    assert 0 in bench.names.slices
    now[0] += 1
    bench.names.get(4 * SLICE)
    assert 0 not in bench.names.slices
    assert bench.names.slices[SLICE] is kept, "it is in the file not yet"
    assert bench.cache.bytes == len(bench.names.slices) * SLICE
