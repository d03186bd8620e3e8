"""Signals as a flag: an operation looks at it where it can stop, and leaves valid images.

SIGINT (Ctrl-C) and SIGTERM mean the same; a second one ends the process where it is, and two at
the same moment count as one. What the caller had ignored (a shell does that with SIGINT for `&`)
stays ignored.
"""

from __future__ import annotations

from _signal import (  # what `signal` wraps in enumerations
    SIG_DFL,
    SIG_IGN,
    SIGINT,
    SIGTERM,
    getsignal,
    raise_signal,
    signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType


class Flag:
    """Whether the user asked for the end; like a `threading.Event`, without its import.

    Attributes:
        number: of the signal that asked, or 0.
    """

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0

    def is_set(self) -> bool:
        """Whether it was asked for."""
        return bool(self.number)

    @property
    def exit_code(self) -> int:
        """What shells make of a program that the signal ended."""
        return ENDED_BY + (self.number or SIGINT)


#: What shells add to a signal's number.
ENDED_BY = 128

#: What commands hand to operations as `cancel`.
CANCEL = Flag()


_SIGNALS = (SIGINT, SIGTERM)


class heeded:
    """`with heeded():` a first signal sets `CANCEL`; a second one ends the process at once."""

    __slots__ = ("_before",)

    #: The process ends with the command: a signal that comes late must not end it with a trace.
    for_good = False

    def __enter__(self) -> None:
        self._before = []
        try:
            for number in _SIGNALS:
                if getsignal(number) != SIG_IGN:
                    self._before.append((number, signal(number, _interrupted)))
        except ValueError:  # not the main thread: somebody else's program
            pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.for_good:
            for number, before in self._before:
                signal(number, before)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if CANCEL.number:
        return
    CANCEL.number = number
    # Python complains of a signal that came before its handler was taken away and would be handled
    # after that. So those that wait are handled first, which is what happens when one is raised.
    raise_signal(number)
    for each in _SIGNALS:
        if getsignal(each) is _interrupted:
            signal(each, SIG_DFL)
