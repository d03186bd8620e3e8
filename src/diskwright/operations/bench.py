"""Many requests at a time against one image, and how long they take together.

Invariants (each held by tests/unit/test_operations_bench.py):

1. Requests begin in order of their offsets, at most `depth` of them are under way.
2. A flush is due whenever the number of requests that have not begun is a multiple of the
   interval. With `drain` none is under way while it runs, and none begins until it is over.
3. After an error no further request begins; the first error is raised when all have ended.
"""

from __future__ import annotations

from diskwright.block.cancel import cancellable
from diskwright.block.record import Record
from diskwright.errors import (
    CancelledError,
    DiskwrightError,
    IOFailure,
    OptionError,
    strerror_of,
)
from diskwright.operations.opening import Image, disk_size, open_image, read_into

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Thread

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name


class Load(Record):
    """The requests of one run.

    Attributes:
        count: how many.
        depth: how many are under way at a time, each in a thread of its own.
        length: of each, in bytes.
        offset: where the first one begins.
        step: bytes from one to the next; they begin anew at the image's end.
        pattern: the byte that is written; None reads.
        flush_interval: requests between two flushes; 0 never flushes.
        drain: a flush waits for the requests under way, and others wait for it.
    """

    __slots__ = (
        "count",
        "depth",
        "drain",
        "flush_interval",
        "length",
        "offset",
        "pattern",
        "step",
    )

    def __init__(
        self,
        count: int = 75000,
        *,
        depth: int = 64,
        length: int = 4096,
        offset: int = 0,
        step: int = 0,
        pattern: int | None = None,
        flush_interval: int = 0,
        drain: bool = True,
    ) -> None:
        if flush_interval and pattern is None:
            raise OptionError(
                "--flush-interval is only available in write tests", field="flush_interval"
            )
        if flush_interval and flush_interval < depth:
            raise OptionError("Flush interval can't be smaller than depth", field="flush_interval")
        if count < 1 or depth < 1 or length < 1:
            raise OptionError("There is at least one request, of one byte", field="count")
        self.count = count
        self.depth = depth
        self.length = length
        self.offset = offset
        self.step = step or length
        self.pattern = pattern
        self.flush_interval = flush_interval
        self.drain = drain


class Benched(Record):
    """How long a run took, in seconds, and how many requests and bytes that were."""

    __slots__ = ("bytes", "requests", "seconds")

    def __init__(self, requests: int, length: int, seconds: float) -> None:
        self.requests = requests
        self.bytes = requests * length
        self.seconds = seconds


def bench_image(
    image: Image,
    load: Load,
    *,
    cancel: Flag | None = None,
    opened: Callable[[Node], None] | None = None,
) -> Benched:
    """Open an image and put `load` on it.

    Args:
        image: for which `load` must be right: a write changes it.
        load: the requests.
        cancel: ends it at the next request.
        opened: gets the node before the clock starts.

    Raises:
        CancelledError: the flag was set.
        DiskwrightError: as opening does, or a request failed.
    """
    with cancellable(cancel), open_image(image, read_only=load.pattern is None) as node:
        if opened is not None:
            opened(node)
        return _Run(node, load, cancel).run()


class _Run:
    """One run on a node that is open."""

    def __init__(self, node: Node, load: Load, cancel: Flag | None) -> None:
        from threading import Condition

        self._node = node
        self._load = load
        self._cancel = cancel
        self._size = disk_size(node)
        # All that follows is changed under it.
        self._changed = Condition()
        self._left = load.count
        self._offset = load.offset
        self._under_way = 0
        self._flush_due = False
        self._flushing = False
        self._error: BaseException | None = None

    def run(self) -> Benched:
        """Do all of it."""
        from time import perf_counter

        load = self._load
        began = perf_counter()
        threads = self._start(min(load.depth, load.count) - 1)
        self._work()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return Benched(load.count, load.length, perf_counter() - began)

    def _start(self, count: int) -> list[Thread]:
        """So many helpers of this thread, or as many as the system gives."""
        from threading import Thread

        started: list[Thread] = []
        for _ in range(count):
            if not self._left or self._error is not None:
                break
            thread = Thread(target=self._help, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                break
            started.append(thread)
        return started

    def _help(self) -> None:
        with cancellable(self._cancel):
            self._work()

    def _work(self) -> None:
        """What each thread does: one request after the other."""
        try:
            buffer = self._buffer()
            while True:
                offset = self._begin()
                if offset is None:
                    return
                self._request(offset, buffer)
                if self._end():
                    self._flush()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _buffer(self) -> memoryview:
        pattern = self._load.pattern or 0
        length = self._load.length
        return memoryview(bytearray([pattern]) * length if pattern else bytearray(length))

    def _begin(self) -> int | None:
        """The offset of the next request; None when no more begins."""
        with self._changed:
            while self._error is None and self._drained():
                self._changed.wait()
            if not self._left or self._error is not None:
                return None
            if self._cancel is not None and self._cancel.is_set():
                raise CancelledError("The operation was cancelled")
            offset = self._offset
            self._offset = (offset + self._load.step) % self._size if self._size else 0
            self._left -= 1
            self._under_way += 1
            if self._load.flush_interval and self._left % self._load.flush_interval == 0:
                self._flush_due = True
            return offset

    def _drained(self) -> bool:
        """Whether requests have to wait for a flush."""
        return self._load.drain and (self._flush_due or self._flushing)

    def _request(self, offset: int, buffer: memoryview) -> None:
        try:
            if offset + len(buffer) > self._size:
                raise IOFailure(f"Request at {offset} reaches over the end at {self._size}")
            if self._load.pattern is None:
                read_into(self._node, offset, buffer)
            else:  # nobody can see what lies behind the end of its last sector
                self._node.write(offset, buffer[: self._node.size - offset])
        except DiskwrightError as error:
            error.qemu = f"Failed request: {strerror_of(error)}"
            raise

    def _end(self) -> bool:
        """Whether the thread of the request that has ended has to flush."""
        with self._changed:
            self._under_way -= 1
            if not self._flush_due or (self._load.drain and self._under_way):
                return False
            self._flush_due = False
            self._flushing = self._load.drain
            return True

    def _flush(self) -> None:
        self._node.flush()
        with self._changed:
            self._flushing = False
            self._changed.notify_all()


def bench(
    name: Name,
    *,
    format: str | None = None,
    load: Load | None = None,
    force_share: bool = False,
    cache: str | None = None,
    policy: Policy | None = None,
    cancel: Flag | None = None,
) -> Benched:
    """Put many requests at a time on an image, and tell how long they took.

    Args:
        name: a path, URI, "json:{…}", or a dict of options.
        format: the driver; None probes. Say it where the load writes.
        load: the requests (`diskwright.operations.bench.Load`): 75000 reads of 4 KiB, 64 at a
            time, by default.
        force_share: look although another process may write to it.
        cache: a cache mode.
        policy: which files that the image names may be opened.
        cancel: a `threading.Event` or the like that ends it.

    Raises:
        DiskwrightError: it could not be opened, or a request failed.
        CancelledError: the flag was set.

    Example:
        >>> import diskwright
        >>> from diskwright.operations.bench import Load
        >>> made = diskwright.create("fast.qcow2", "1M", format="qcow2")
        >>> done = diskwright.bench("fast.qcow2", load=Load(100, depth=4))
        >>> done.requests, done.bytes
        (100, 409600)
    """
    image = Image(name, format=format, force_share=force_share, cache=cache, policy=policy)
    return bench_image(image, load or Load(), cancel=cancel)
