"""Threads that share a queue: order, ends, errors, progress, rate."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

import diskwright
from diskwright.errors import CancelledError
from diskwright.operations import workers
from diskwright.operations.workers import (
    JOBS_ALONE,
    PROGRESS_STEP,
    THREADS,
    THREADS_WAITING,
    Steering,
    Workers,
)
from tests.unit.nbd_peers import made, running


def test_each_job_is_done_once_and_in_order_of_handing_out():
    given, done = [], []

    def jobs():
        for number in range(200):
            given.append(number)
            yield number

    Workers(Steering(threads=4), 200).run(jobs(), lambda: done.append)
    assert given == list(range(200))
    assert sorted(done) == given


def test_few_jobs_are_done_in_the_calling_thread():
    seen = set()
    run = Workers(Steering(threads=4), 1)
    run.run(iter(range(JOBS_ALONE)), lambda: lambda job: seen.add(threading.get_ident()))
    assert seen == {threading.get_ident()}


def test_more_jobs_get_more_threads():
    seen = set()
    both = threading.Event()

    def act(job):
        seen.add(threading.get_ident())
        if len(seen) == 2:
            both.set()
        if job >= JOBS_ALONE:
            assert both.wait(20), "nobody else came"

    Workers(Steering(threads=2), 1).run(iter(range(JOBS_ALONE + 6)), lambda: act)
    assert len(seen) == 2


def test_more_threads_wait_for_another_program_than_move_bytes(tmp_path):
    def threads(node) -> int:
        seen, all_came = set(), threading.Barrier(THREADS_WAITING)

        def act(job):
            seen.add(threading.get_ident())
            if job >= JOBS_ALONE:
                with contextlib.suppress(threading.BrokenBarrierError):
                    all_came.wait(0.5)

        Workers(Steering(), 1, nodes=(node,)).run(iter(range(JOBS_ALONE + 8)), lambda: act)
        return len(seen)

    with made(tmp_path) as node, running(node, tmp_path):
        assert threads(node) == THREADS
        with diskwright.open({"driver": "nbd", "path": str(tmp_path / "s")}) as remote:
            assert threads(remote) == THREADS_WAITING


def test_operations_say_what_they_move_from_and_to(tmp_path, monkeypatch):
    asked: list[list[str]] = []

    def noted(nodes, computes):
        asked.append([node.driver for node in nodes])
        return 1

    monkeypatch.setattr(workers, "_threads_for", noted)
    base, top, copy = (str(tmp_path / name) for name in ("base", "top", "copy"))
    diskwright.create(base, 1 << 20, format="raw")
    options = {"backing_file": base, "backing_fmt": "raw"}
    diskwright.create(top, 1 << 20, format="qcow2", options=options)
    diskwright.convert(top, copy, target_format="vdi")
    diskwright.compare(top, copy)
    diskwright.rebase(top, None)
    assert asked == [["qcow2", "vdi"], ["qcow2", "vdi"], ["qcow2"]]


def test_the_first_error_ends_everything():
    done = []

    def act(job):
        if job == 20:
            raise ValueError("job 20")
        done.append(job)

    with pytest.raises(ValueError, match="job 20"):
        Workers(Steering(threads=3), 1000).run(iter(range(1000)), lambda: act)
    assert len(done) < 100
    before = len(done)
    time.sleep(0.02)
    assert len(done) == before, "a thread went on after the end"


def test_an_error_of_the_queue_is_raised():
    def jobs():
        yield 1
        raise ValueError("queue")

    with pytest.raises(ValueError, match="queue"):
        Workers(Steering(), 1).run(jobs(), lambda: lambda job: None)


def test_cancelling_ends_at_the_next_job():
    flag = threading.Event()
    done = []

    def act(job):
        done.append(job)
        if job == 5:
            flag.set()

    with pytest.raises(CancelledError):
        Workers(Steering(cancel=flag, threads=2), 1).run(iter(range(1000)), lambda: act)
    assert len(done) <= 8


def test_progress_rises_to_the_total():
    seen = []
    run = Workers(Steering(progress=lambda done, total: seen.append((done, total)), threads=4), 640)
    run.run(iter(range(60)), lambda: lambda job: run.advance(10, 10))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (640, 640)


class Percents(list):
    """Keeps every tenth of the total at the first step that reaches it, and counts its calls."""

    calls = 0

    def __call__(self, done, total):
        self.calls += 1
        if done * 10 // total > len(self):
            self.append(done)

    def wants(self, total):
        return total * (len(self) + 1) // 10


def test_much_that_is_done_at_once_is_told_where_it_matters():
    total = 7 << 40
    told = []
    plain = Workers(Steering(progress=lambda done, _: told.append(done)), total)
    plain.part_ends(total // 2)
    plain.run(iter([total - 1, 1]), lambda: plain.advance)
    assert told == [total // 2, total - PROGRESS_STEP, total]

    seen = Percents()
    run = Workers(Steering(progress=seen), total)
    run.run(iter([total]), lambda: run.advance)
    steps = total // PROGRESS_STEP
    assert seen == [-(-steps * tenth // 10) * PROGRESS_STEP for tenth in range(1, 11)]
    assert seen.calls == 10


class Sleeper(list):
    """Keeps what it is told; looks, for one call, when it was woken."""

    idle = True

    def __call__(self, done, total):
        assert not self.idle
        self.idle = True
        self.append((done, total))


def test_who_does_not_look_costs_no_total_and_is_not_told():
    def total():
        asked.append(True)
        return 40 * PROGRESS_STEP

    asked, sleeper = [], Sleeper()
    run = Workers(Steering(progress=sleeper, threads=1), total)

    def act(job):
        run.part_ends(PROGRESS_STEP)
        if job in wakes:
            sleeper.idle = False
        run.advance(PROGRESS_STEP)

    wakes = ()
    run.run(iter(range(10)), lambda: act)
    assert not asked
    assert not sleeper

    wakes = (15, 16, 30)
    run.run(iter(range(10, 38)), lambda: act)
    assert len(asked) == 1
    assert sleeper == [(done * PROGRESS_STEP, 40 * PROGRESS_STEP) for done in (16, 17, 31)]


def test_the_end_of_a_part_that_nobody_saw_is_not_told_later():
    sleeper = Sleeper()
    run = Workers(Steering(progress=sleeper), 40 * PROGRESS_STEP)
    run.part_ends(5 * PROGRESS_STEP)
    for done in range(1, 11):
        if done in (1, 10):
            sleeper.idle = False
        run.advance(PROGRESS_STEP)
    assert sleeper == [
        (PROGRESS_STEP, 40 * PROGRESS_STEP),
        (10 * PROGRESS_STEP, 40 * PROGRESS_STEP),
    ]


def test_the_rate_is_kept():
    run = Workers(Steering(rate=1_000_000, threads=2), 0)
    started = time.monotonic()
    run.run(iter(range(20)), lambda: lambda job: run.advance(10_000, 10_000))
    assert 0.19 <= time.monotonic() - started < 5


def test_a_slow_copy_can_be_cancelled():
    flag = threading.Event()
    run = Workers(Steering(rate=1000, cancel=flag, threads=2), 0)
    threading.Timer(0.1, flag.set).start()
    started = time.monotonic()
    with pytest.raises(CancelledError):
        run.run(iter(range(20)), lambda: lambda job: run.advance(10_000, 10_000))
    assert time.monotonic() - started < 5
