"""What the commands of `diskwright-io` work on: one open image, and requests under way.

Requests of `aio_*` run in threads of their own. Their results wait until the main thread is
about to wait for something itself, which is when QEMU's tool looks at them too; only while a
person is being waited for, a result is printed as it comes.
"""

from __future__ import annotations

from _thread import get_ident, start_new_thread
from time import monotonic

from diskwright.block.inflight import Condition
from diskwright.block.notice import listening
from diskwright.cli import output
from diskwright.cli.io_commands.declaration import Refused
from diskwright.errors import DiskwrightError, RangeError, strerror_of
from diskwright.operations import opening

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.node import Node

#: How long a new request may take before the next command runs beside it. QEMU's tool lets each
#: run until it first has to wait; what is done within this time ends in the order of its begin.
GRACE_SECONDS = 0.05
#: What a buffer's address is off by where -m asks for that.
MISALIGNMENT = 16


class Request:
    """One request under way; `work` returns what is printed when it is done."""

    __slots__ = ("stopped", "thread", "work", "words")

    def __init__(self, work: Callable[[], str]) -> None:
        self.work = work
        self.words = ""
        self.stopped = ""  # at a breakpoint: the name in quotes
        self.thread = 0


class Outstanding:
    """The requests that were begun and not yet reported."""

    def __init__(self) -> None:
        self._changed = Condition()  # guards all that follows
        self._running: list[Request] = []
        self._finished: list[Request] = []
        self._halted: list[Request] = []  # stopped ones, in the order of their stopping
        self._resumed = 0
        self._at_once = False

    def begin(self, work: Callable[[], str], hear: Callable[[str, str], None]) -> None:
        """Start a request, and give it a moment to end, or to stop at a breakpoint."""
        request = Request(work)
        with self._changed:
            self._running.append(request)
        start_new_thread(self._run, (request, hear))
        self._rest(lambda: bool(request.stopped) or request not in self._running)

    def _run(self, request: Request, hear: Callable[[str, str], None]) -> None:
        request.thread = get_ident()
        with listening(hear):
            request.words = request.work()
        with self._changed:
            self._running.remove(request)
            if self._at_once:
                output.say(request.words)
                output.flush()
            else:
                self._finished.append(request)
            self._changed.notify_all()

    def _rest(self, reached: Callable[[], bool]) -> None:
        deadline = monotonic() + GRACE_SECONDS
        with self._changed:
            while not reached() and (left := deadline - monotonic()) > 0:
                self._changed.wait(left)

    def report(self) -> None:
        """Print the results that there are."""
        with self._changed:
            for request in self._finished:
                output.say(request.words)
            self._finished.clear()

    def wait(self) -> None:
        """Wait until no request is under way, and print the results."""
        with self._changed:
            while self._running:
                self._changed.wait()
        self.report()

    @property
    def are_there(self) -> bool:
        """Whether a request is under way that is not stopped."""
        with self._changed:
            return any(not request.stopped for request in self._running)

    def meet(self, line: str) -> None:
        """Print what a node with breakpoints reports, and note what it means."""
        output.say(f"{line}\n")
        with self._changed:
            if "Suspended" in line:
                self._halt(get_ident(), line.split()[-1])
            else:
                self._resumed += 1
                self._let_go(line.split()[-1])
            self._changed.notify_all()

    def _halt(self, thread: int, tag: str) -> None:
        for request in self._running:
            if request.thread == thread:
                request.stopped = tag
                self._halted.append(request)

    def _let_go(self, tag: str) -> None:
        """The latest of a breakpoint goes on first, as blkdebug does it."""
        for request in reversed(self._halted):
            if request.stopped == tag:
                request.stopped = ""
                self._halted.remove(request)
                return

    def resuming(self, resume: Callable[[], None]) -> None:
        """Call `resume`, and give the request a moment to go on, and to end."""
        before = self._resumed
        resume()
        self._rest(lambda: self._resumed > before)
        running = [request for request in self._running if not request.stopped]
        self._rest(lambda: all(bool(one.stopped) or one not in self._running for one in running))

    def print_at_once(self, wanted: bool) -> None:
        """While True, results are printed as they come."""
        with self._changed:
            self._at_once = wanted
        self.report()


class Session:
    """The state of one run of the program.

    Attributes:
        program: its name, which error lines begin with.
        misaligned: buffers are not aligned as direct I/O wants them.
        outstanding: the requests under way.
        ended: `quit` was said.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        self.misaligned = False
        self.outstanding = Outstanding()
        self.ended = False
        self._node: Node | None = None

    @property
    def is_open(self) -> bool:
        """Whether an image is open."""
        return self._node is not None

    @property
    def node(self) -> Node:
        """The open image."""
        assert self._node is not None
        return self._node

    def take(self, node: Node, *, misaligned: bool | None = None) -> None:
        """Work on this image from now on."""
        self._node = node
        if misaligned is not None:
            self.misaligned = misaligned
        node.watch_breakpoints(self.outstanding.meet)

    def close(self) -> None:
        """End the requests under way and close the image, if there is one."""
        self.outstanding.wait()
        node, self._node = self._node, None
        if node is None:
            return
        try:
            node.close()
        except DiskwrightError as error:
            self.complain(error)

    def complain(self, error: DiskwrightError) -> None:
        """Print an error's line, with who is in the way where that is known."""
        from diskwright.cli.grammar import Arguments
        from diskwright.cli.run import report

        report(error, Arguments(self.program))

    def hear(self, words: str, kind: str) -> None:
        """Print a notice of a node."""
        output.complain(output.noticed(self.program, words, kind))

    # ------------------------------------------------------------------------- requests

    def buffer(self, length: int) -> memoryview:
        """Memory to read into, or to write from, as the image and -m want it."""
        extra = MISALIGNMENT if self.misaligned else 0
        return self.node.aligned_buffer(length + extra)[extra:]

    def filled(self, length: int, pattern: int) -> memoryview:
        """A buffer full of one byte."""
        view = self.buffer(length)
        piece = bytes([pattern]) * min(length, 1 << 20)
        for start in range(0, length, 1 << 20):
            part = min(1 << 20, length - start)
            view[start : start + part] = piece[:part]
        return view

    def check_range(self, offset: int, length: int) -> None:
        """Refuse what reaches behind the last sector of the image."""
        if offset + length > opening.disk_size(self.node):
            raise RangeError(f"{length} bytes at {offset} reach behind the image's end")

    def read(self, offset: int, length: int) -> memoryview:
        """Read a range of the image."""
        self.check_range(offset, length)
        view = self.buffer(length)
        opening.read_into(self.node, offset, view)
        return view

    def reach(self, offset: int, length: int) -> None:
        """Make the last sector longer where a write ends in it behind the image's last byte."""
        self.check_range(offset, length)
        if offset + length > self.node.size:
            self.resize(offset + length)

    def resize(self, size: int, preallocation: str = "off") -> None:
        """Change the image's size; a device that is longer may stay so."""
        try:
            self.node.truncate(size, preallocation=preallocation)
        except DiskwrightError as error:
            if error.kind != "fixed-size":
                raise
            self.node.truncate(size, exact=False, preallocation=preallocation)

    def timed(self, name: str, work: Callable[[], object]) -> float:
        """Do `work`, then report what else is done; returns the seconds it took.

        Raises:
            Refused: it failed; with a line that begins with `name`.
        """
        begun = monotonic()
        try:
            work()
        except (DiskwrightError, OSError) as error:
            self.outstanding.report()
            raise Refused(f"{name} failed: {strerror_of(error)}") from error
        taken = monotonic() - begun
        self.outstanding.report()
        return taken
