"""Requests in flight: the gate, range locks, and actions that concurrent callers share.

Invariants (each held by a test in tests/unit/test_inflight.py or tests/contract):

1. Whoever is between entering and leaving a gate is in `Gate.inside`; nobody is there while
   another thread holds it exclusively.
2. Closing sets `closed` and then looks at `inside`; entering adds to `inside` and then looks
   at `closed`. So of two that race at least one sees the other.
3. A thread that is inside already enters again at no cost, and leaves once.
4. Host space that was freed in epoch e is free for use when every epoch in `inside` is
   greater than e: those requests mapped after the space had lost its name.
5. Of two overlapping range locks the one that asked first goes first.
6. A joined action that a caller waits for began after the caller asked.

`threading` is not imported here: a small command that never waits should not pay for it.
"""

from __future__ import annotations

from _thread import allocate_lock, get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Literal, overload


class Condition:
    """A lock to hold while looking at shared state, and a way to wait for it to change."""

    __slots__ = ("_lock", "_waiters")

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._waiters: list[object] = []

    def __enter__(self) -> Condition:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, seconds: float = -1) -> None:
        """Give up the lock until somebody notifies, then take it again.

        Args:
            seconds: how long to wait at most, where that is positive.
        """
        waiter = allocate_lock()
        waiter.acquire()
        self._waiters.append(waiter)
        self._lock.release()
        try:
            waiter.acquire(True, seconds)
        finally:
            self._lock.acquire()
            if waiter in self._waiters:  # in vain
                self._waiters.remove(waiter)

    def notify_all(self) -> None:
        """Wake all who wait; the lock must be held."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.release()  # type: ignore[attr-defined]


class OwnedLock:
    """A lock that knows the thread that holds it; not reentrant."""

    __slots__ = ("_lock", "owner")

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self.owner = 0

    def __enter__(self) -> OwnedLock:
        self._lock.acquire()
        self.owner = get_ident()
        return self

    def __exit__(self, *_: object) -> None:
        self.owner = 0
        self._lock.release()

    def held(self) -> bool:
        """Whether the calling thread holds it."""
        return self.owner == get_ident()

    def reset(self) -> None:
        """Be free: whoever held it is not in this process."""
        self._lock = allocate_lock()
        self.owner = 0


class _Request:
    """What `with gate.request():` enters and leaves."""

    __slots__ = ("_entered", "_gate")

    def __init__(self, gate: Gate, entered: bool) -> None:
        self._gate = gate
        self._entered = entered

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._entered:
            self._gate.leave()


class Gate:
    """Lets requests in together, or one owner alone.

    The hot paths of Node spell `request` out: keep them alike.
    """

    __slots__ = (
        "_changed",
        "_depth",
        "_epoch_lock",
        "closed",
        "epoch",
        "inside",
        "merged",
        "owner",
    )

    def __init__(self) -> None:
        self.inside: dict[int, int] = {}  # thread -> epoch in which it entered
        self.closed = False
        self.epoch = 0
        self.owner = 0  # the thread that has the gate to itself
        self.merged: Gate | None = None  # the gate that took over this one's requests
        self._depth = 0
        self._changed = Condition()
        self._epoch_lock = allocate_lock()

    if TYPE_CHECKING:

        @overload
        def request(self, wait: Literal[True] = True) -> _Request: ...
        @overload
        def request(self, wait: bool) -> _Request | None: ...

    def request(self, wait: bool = True) -> _Request | None:
        """Enter; returns a context manager that leaves.

        Args:
            wait: where False, answers None instead of waiting for an exclusive owner.
        """
        me = get_ident()
        if me in self.inside:
            return _Request(self, False)
        self.inside[me] = self.epoch
        if self.closed:
            if not wait:
                self.leave()
                return None
            return _Request(self.wait_in(me), True)
        return _Request(self, True)

    def leave(self) -> None:
        """Leave; wakes an owner that waits for the last one."""
        del self.inside[get_ident()]
        if self.closed:
            self.left()

    def left(self) -> None:
        """Tell an owner that waits that somebody went."""
        with self._changed:
            self._changed.notify_all()

    def wait_in(self, me: int) -> Gate:
        """Step back from a closed gate, wait, and enter; returns the gate entered."""
        gate = self
        while True:
            del gate.inside[me]
            with gate._changed:
                gate._changed.notify_all()
                while gate.closed and gate.merged is None:
                    gate._changed.wait()
            while gate.merged is not None:
                gate = gate.merged
            gate.inside[me] = gate.epoch
            if not gate.closed:
                return gate

    def close(self) -> bool:
        """Keep everybody else out and wait until the gate is empty.

        Returns False where another gate has taken over meanwhile: nothing is held then.
        """
        me = get_ident()
        if self.owner == me:
            self._depth += 1
            return True
        if me in self.inside:
            raise RuntimeError("exclusive() inside a request would wait for itself")
        with self._changed:
            while self.closed:
                if self.merged is not None:
                    return False
                self._changed.wait()
            self.closed = True
            while self.inside:
                self._changed.wait()
            self.owner = me
            self._depth = 1
            self.inside[me] = self.epoch
        return True

    def open(self) -> None:
        """End what `close` began."""
        self._depth -= 1
        if self._depth:
            return
        with self._changed:
            self.inside.pop(self.owner, None)
            self.owner = 0
            self.closed = False
            self._changed.notify_all()

    def after_fork(self) -> None:
        """Be empty and open: the threads that were inside are not in this process."""
        self.inside.clear()
        self.closed = self.merged is not None
        self.owner = self._depth = 0
        self._changed = Condition()
        self._epoch_lock = allocate_lock()

    def next_epoch(self) -> int:
        """The epoch that ends now: what is freed belongs to it."""
        with self._epoch_lock:
            ended = self.epoch
            self.epoch = ended + 1
        return ended

    def oldest(self) -> int:
        """The oldest epoch somebody inside entered in; everything below is over."""
        if self.owner == get_ident():
            return self.epoch + 1
        return min(list(self.inside.values()), default=self.epoch + 1)

    def take_over(self, other: Gate) -> None:
        """Send those who wait at `other` here; both must be owned by the caller."""
        with other._changed:
            other.merged = self
            self.epoch = max(self.epoch, other.epoch)
            other.inside.pop(other.owner, None)
            other.owner = 0
            other._changed.notify_all()


class Span:
    """A range that somebody holds: `with locks.span(a, b) as span:`."""

    __slots__ = ("_locks", "start", "stop", "waiting")

    def __init__(self, locks: RangeLocks, start: int, stop: int) -> None:
        self._locks = locks
        self.waiting = False
        self.start = start
        self.stop = stop

    def __enter__(self) -> Span:
        self._locks.acquire(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._locks.release(self)


class RangeLocks:
    """Exclusive locks on byte ranges of one node.

    Args:
        overtaking: who waits holds nobody up that could go on; else all go in order of arrival.
    """

    __slots__ = ("_changed", "_overtaking", "_spans")

    def __init__(self, *, overtaking: bool = False) -> None:
        self._changed = Condition()
        self._overtaking = overtaking
        self._spans: list[Span] = []  # in order of arrival, waiting ones included

    def span(self, start: int, stop: int) -> Span:
        """The range [start, stop), to be entered."""
        return Span(self, start, stop)

    def _must_wait(self, span: Span) -> bool:
        for other in self._spans:
            if other is span:
                if not self._overtaking:
                    return False  # those behind it came later
                continue
            overlaps = other.start < span.stop and span.start < other.stop
            if overlaps and not (self._overtaking and other.waiting):
                return True
        return False

    def acquire(self, span: Span) -> None:
        """Wait until no earlier span overlaps, or, with `overtaking`, none that is held."""
        with self._changed:
            self._spans.append(span)
            try:
                while self._must_wait(span):
                    span.waiting = True
                    self._changed.wait()
                span.waiting = False
            except BaseException:
                self._spans.remove(span)
                self._changed.notify_all()
                raise

    def release(self, span: Span) -> None:
        """Let those who wait for it go on."""
        with self._changed:
            self._spans.remove(span)
            self._changed.notify_all()


class Joined:
    """An action that concurrent callers share, each joining one that starts after it came."""

    __slots__ = ("_action", "_changed", "_errors", "_finished", "_started", "running")

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._changed = Condition()
        self._started = 0
        self._finished = 0
        self._errors: dict[int, tuple[BaseException, int]] = {}
        self.running = False

    def __call__(self) -> None:
        """Run the action, or wait for a run that begins after this call."""
        with self._changed:
            ticket = self._started + 1
            while self._finished < ticket and self.running:
                self._changed.wait()
            if self._finished >= ticket:
                failed = self._errors.get(self._finished)
                if failed is not None:
                    raise failed[0]
                return
            self.running = True
            self._started += 1
            number = self._started
        error: BaseException | None = None
        try:
            self._action()
        except BaseException as raised:
            error = raised
            raise
        finally:
            with self._changed:
                self.running = False
                self._finished = number
                self._errors.clear()
                if error is not None:
                    self._errors[number] = (error, number)
                self._changed.notify_all()
