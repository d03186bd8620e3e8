"""SIGINT as a flag: an operation looks at it where it can stop, and leaves valid images."""

from __future__ import annotations

from _signal import (  # type: ignore[import-not-found]  # what `signal` wraps in enumerations
    SIG_DFL,
    SIGINT,
    signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType


class Flag:
    """Whether the user asked for the end; like a `threading.Event`, without its import."""

    __slots__ = ("_set",)

    def __init__(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        """Whether it was asked for."""
        return self._set

    def set(self) -> None:
        """Ask for it."""
        self._set = True


#: What commands hand to operations as `cancel`.
CANCEL = Flag()


class heeded:
    """`with heeded():` a first SIGINT sets `CANCEL`; a second one ends the process at once."""

    __slots__ = ("_before",)

    #: The process ends with the command: a SIGINT that comes late must not end it with a trace.
    for_good = False

    def __enter__(self) -> None:
        try:
            self._before = signal(SIGINT, _interrupted)
        except ValueError:  # not the main thread: somebody else's program
            self._before = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None and not self.for_good:
            signal(SIGINT, self._before)


def _interrupted(number: int, frame: FrameType | None) -> None:
    CANCEL.set()
    signal(number, SIG_DFL)
