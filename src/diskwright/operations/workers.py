"""Doing much work in pieces: threads that share a queue, and how a caller steers them.

Invariants (each held by a test in tests/unit/test_operations_workers.py):

1. Jobs are handed out in order, each to one worker, under one lock.
2. After an error, or when the cancel flag is set, no further job is handed out; `run` returns
   when every worker has stopped, and raises the first error.
3. Progress never goes back, and ends at the total if nothing failed.
4. Few jobs are done in the calling thread alone: threads begin only when there is work for them.
"""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread

from diskwright.block.cancel import cancellable
from diskwright.block.record import Record
from diskwright.errors import CancelledError, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeVar

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node

    Job = TypeVar("Job")

#: Jobs that the calling thread does before it starts others.
JOBS_ALONE = 1

#: Bytes between two calls of the caller's `progress`, or a multiple.
PROGRESS_STEP = 2 << 20

#: How many threads work where the caller does not say: the system moves no more bytes for a
#: third one, but encoding takes all it gets.
THREADS = 2
MAX_THREADS = 8
#: And where a request waits for another program: that one works while these do.
THREADS_WAITING = 4


class Steering(Record):
    """How a caller watches and slows down an operation.

    Attributes:
        progress: called with (done, total) in bytes, not twice at a time, `done` rising. If it has
            a method `wants`, that tells for a total how much must be done for the next call to
            matter. While an attribute `idle` of it is true, none matters, and none is made.
        cancel: a `threading.Event` or the like; when it is set the operation ends with
            CancelledError at the next piece.
        rate: bytes a second at most; 0 is without bound.
        threads: how many may work; None: as many as the work is good for.
    """

    __slots__ = ("cancel", "progress", "rate", "threads")

    def __init__(
        self,
        *,
        progress: Callable[[int, int], None] | None = None,
        cancel: Flag | None = None,
        rate: int = 0,
        threads: int | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise OptionError("At least one thread has to work", field="threads")
        self.progress = progress
        self.cancel = cancel
        self.rate = rate
        self.threads = threads


def _processors() -> int:
    """How many threads compute side by side, at least THREADS."""
    from os import cpu_count

    return min(max(cpu_count() or 1, THREADS), MAX_THREADS)


def _threads_for(nodes: Iterable[Node], computes: bool) -> int:
    threads = _processors() if computes else THREADS
    if any(one.is_remote for node in nodes for one in node.graph.nodes):
        return max(threads, THREADS_WAITING)
    return threads


class Workers:
    """One run of many jobs.

    Args:
        steering: the caller's wishes.
        total: bytes that all jobs stand for, or what tells them where they are asked for.
        computes: the work is more than moving bytes: every processor helps.
        nodes: what is moved from and to.
    """

    def __init__(
        self,
        steering: Steering,
        total: int | Callable[[], int],
        *,
        computes: bool = False,
        nodes: Iterable[Node] = (),
    ) -> None:
        self._steering = steering
        self._total_of = total
        self.ends_early = False  # what is left need not be done, and is not told of as done
        self._threads = steering.threads or _threads_for(nodes, computes)
        self._done = 0
        self._told = 0  # of _done, in the last call of the caller's callback
        self._ends: list[int] = []  # of parts, in bytes of _done; those that were handed out
        self._announced = 0
        self._moved = 0
        self._began = 0.0
        self._lock = allocate_lock()  # the queue and _error
        self._progress_lock = allocate_lock()  # _done, _moved, and the caller's callback
        self._error: BaseException | None = None

    def advance(self, length: int, moved: int = 0) -> None:
        """Note that `length` bytes are done, of which `moved` count for the rate."""
        steering = self._steering
        if steering.progress is None and not steering.rate:
            return
        with self._progress_lock:
            self._done += length
            self._moved += moved
            if steering.progress is not None:
                if self._is_watched():
                    self._tell(steering.progress)
                else:
                    self._ends.clear()
        if steering.rate and moved:
            self._wait_for_rate()

    def part_ends(self, length: int) -> None:
        """The jobs to come begin with a part of so many bytes: its end is told of, too."""
        if self._steering.progress is not None:
            self._announced += length
            self._ends.append(self._announced)

    def _is_watched(self) -> bool:
        """Whether calls of the caller's callback matter now."""
        progress = self._steering.progress
        return progress is not None and not getattr(progress, "idle", False)

    @property
    def _total(self) -> int:
        if not isinstance(self._total_of, int):
            self._total_of = self._total_of()
        return self._total_of

    def _tell(self, progress: Callable[[int, int], None]) -> None:
        """Tell the caller of the last step that is done, and of the ends of parts.

        Of steps before it only where its `wants` says that it has a use for them.
        """
        done, total = min(self._done, self._total), self._total
        wants = getattr(progress, "wants", None)
        while self._told < done:
            end = self._ends[0] if self._ends else total
            told = self._told
            reached = end if done >= end else done - (done - told) % PROGRESS_STEP
            if reached == told:
                return
            step = reached
            if wants is not None and wants(total) < reached:
                ahead = max(-(-(wants(total) - told) // PROGRESS_STEP), 1)
                step = min(told + ahead * PROGRESS_STEP, reached)
            self._told = step
            progress(step, total)
            if self._ends and step == end:
                del self._ends[0]

    def _wait_for_rate(self) -> None:
        from time import monotonic, sleep

        with self._progress_lock:
            if not self._began:
                self._began = monotonic()
            due = self._began + self._moved / self._steering.rate
        while self._error is None:
            self.check()
            left = due - monotonic()
            if left <= 0:
                return
            sleep(min(left, 0.1))

    def check(self) -> None:
        """Raise CancelledError where the caller wants an end."""
        cancel = self._steering.cancel
        if cancel is not None and cancel.is_set():
            raise CancelledError("The operation was cancelled")

    def run(self, jobs: Iterator[Job], worker: Callable[[], Callable[[Job], None]]) -> None:
        """Do all jobs.

        Args:
            jobs: looked at under a lock, so it may do a little input of its own.
            worker: makes what does a job, once for each thread (so that it has a buffer).

        Raises:
            CancelledError: the flag was set.
            Exception: the first that a job raised.
        """
        running = self._start(jobs, worker)
        for ended in running:
            ended.acquire()  # type: ignore[attr-defined]
        if self._error is not None:
            raise self._error
        if self._is_watched() and not self.ends_early and self._done < self._total:
            self.advance(self._total - self._done)

    def _start(
        self, jobs: Iterator[Job], worker: Callable[[], Callable[[Job], None]]
    ) -> list[object]:
        """Work in this thread; returns locks that other threads release at their end."""
        running: list[object] = []
        wanted = self._threads

        def begin() -> None:
            ended = allocate_lock()
            ended.acquire()

            def body() -> None:
                try:
                    with cancellable(self._steering.cancel):
                        self._work(jobs, worker, 0)
                finally:
                    ended.release()

            try:
                start_new_thread(body, ())
            except RuntimeError:  # the system has no more; those that run do the work
                return
            running.append(ended)

        with cancellable(self._steering.cancel):
            self._work(jobs, worker, JOBS_ALONE if wanted > 1 else 0, then=begin)
        return running

    def _work(
        self,
        jobs: Iterator[Job],
        worker: Callable[[], Callable[[Job], None]],
        alone: int,
        *,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Do jobs until there are none; after `alone` of them call `then` for helpers."""
        done = 0
        try:
            act = worker()
            while True:
                with self._lock:
                    if self._error is not None:
                        return
                    self.check()
                    job = next(jobs, None)
                if job is None:
                    return
                if then is not None and alone and done == alone:
                    for _ in range(self._threads - 1):
                        then()
                done += 1
                act(job)
        except BaseException as error:
            with self._lock:
                if self._error is None:
                    self._error = error
