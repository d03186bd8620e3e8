"""Breakpoints: a node that injects faults stops requests at events; the public face of that.

The node itself need not be it: the one that stops requests is looked for below it, on the way
to the storage, as QEMU does.
"""

from __future__ import annotations

from diskwright.errors import UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from diskwright.block.child import Child

    class Debugger(Protocol):
        """What a driver gives that can stop requests."""

        report: Callable[[str], None] | None

        def add_breakpoint(self, event: str, tag: str) -> None:
            """See `Debugging.breakpoint`."""

        def remove_breakpoint(self, tag: str) -> None:
            """See `Debugging.remove_breakpoint`."""

        def resume_one(self, tag: str) -> None:
            """See `Debugging.resume`."""

        def wait_stopped(self, tag: str) -> None:
            """See `Debugging.wait_breakpoint`."""

        def is_stopped(self, tag: str) -> bool:
            """See `Debugging.is_suspended`."""
            ...


class Debugging:
    """Mixed into Node, which has the attributes declared here."""

    #: set by a driver that stops requests
    debugger: Debugger | None = None
    children: dict[str, Child]

    @property
    def can_stop_requests(self) -> bool:
        """Whether here or on the way to the storage there is a node with breakpoints."""
        return self._find_debugger() is not None

    def breakpoint(self, event: str, tag: str) -> None:
        """Stop the next request that comes to `event`, until `resume(tag)`.

        Raises:
            NotFoundError: there is no such event.
            UnsupportedError: no node on the way to the storage can stop requests.
        """
        self._require("Could not set breakpoint").add_breakpoint(event, tag)

    def remove_breakpoint(self, tag: str) -> None:
        """Forget the breakpoint, and let every request go that it stopped."""
        self._require(f"Could not remove breakpoint {tag}").remove_breakpoint(tag)

    def resume(self, tag: str) -> None:
        """Let one request go that stopped at the breakpoint."""
        self._require("Could not resume request").resume_one(tag)

    def wait_breakpoint(self, tag: str) -> None:
        """Wait until a request has stopped there."""
        self._require("Could not wait for a stop").wait_stopped(tag)

    def is_suspended(self, tag: str) -> bool:
        """Whether a request is stopped there."""
        found = self._find_debugger()
        return found is not None and found.is_stopped(tag)

    def watch_breakpoints(self, report: Callable[[str], None] | None) -> None:
        """Have `report` called, in the request's thread, as one is stopped and goes on.

        It gets QEMU's line: "blkdebug: Suspended request 'A'", "blkdebug: Resuming request 'A'".
        """
        found = self._find_debugger()
        if found is not None:
            found.report = report

    def tell(self, *events: str) -> None:
        """Tell a fault-injecting node right below what this one is about to do."""
        child = self.children.get("file") or self.children.get("image")
        if child is not None and child.node.event_hook is not None:
            for event in events:
                child.event(event)

    def _require(self, sentence: str) -> Debugger:
        found = self._find_debugger()
        if found is None:
            raise UnsupportedError(
                f"{sentence}: no node below can stop requests",
                qemu=f"{sentence}: Operation not supported",
                hint="open the image through the filter blkdebug",
            )
        return found

    def _find_debugger(self) -> Debugger | None:
        place: Debugging | None = self
        while place is not None:
            if place.debugger is not None:
                return place.debugger
            child = place.children.get("file") or place.children.get("image")
            place = None if child is None else child.node
        return None
