"""Waiting for the other side of a socket: looking again for some microseconds, then sleeping.

To be put to sleep and woken costs two threads more than a small request does, so who waits for one
thing after another does better by looking again at once: that halves the time that a request takes,
and often the processor time as well. It is done by a thread that has no other to make room for,
where the machine has another processor for the other side, and only while pauses are short: whoever
thinks for a millisecond is not watched while thinking. Where looking is in vain, as when others
want the processors too, it is done ever less.
"""

from __future__ import annotations

import os
import socket
from time import perf_counter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    #: (where to, flags) -> how many bytes came
    Receive = Callable[[memoryview, int], int]

#: For how many seconds to look again.
WATCH = 60e-6
#: A pause of so many seconds is short: the next one may be shorter than `WATCH`.
SHORT = 200e-6
#: After looking in vain, so many times sleep comes at once; after each further one in a row twice
#: as many times, up to the second number.
FEWEST_SLEEPS, MOST_SLEEPS = 4, 1024
_NOW = getattr(socket, "MSG_DONTWAIT", 0)


def has_processors() -> bool:
    """Whether this process and another one can run at once."""
    try:
        return len(os.sched_getaffinity(0)) > 1
    except AttributeError:  # macOS, Windows
        return (os.cpu_count() or 1) > 1


class Patience:
    """How to wait at one socket.

    Args:
        lone: whether nobody else of this process wants to go on meanwhile.
    """

    __slots__ = ("_is_quick", "_lone", "_may_look", "_penalty", "_sleeps")

    def __init__(self, lone: Callable[[], bool]) -> None:
        self._lone = lone
        self._may_look = bool(_NOW) and has_processors()
        self._is_quick = False
        self._penalty = self._sleeps = 0

    def receive(self, receive: Receive, view: memoryview) -> int:
        """Receive what comes; 0 is the end.

        Args:
            receive: waits as long as its socket does, and with MSG_DONTWAIT not at all.
            view: is filled from its beginning.

        Raises:
            BlockingIOError: nothing came for as long as the socket waits.
        """
        begin = perf_counter()
        if self._sleeps:
            self._sleeps -= 1
        elif self._is_quick:
            while self._lone():
                try:
                    count = receive(view, _NOW)
                except BlockingIOError:
                    if perf_counter() - begin > WATCH:
                        self._penalty = min(max(2 * self._penalty, FEWEST_SLEEPS), MOST_SLEEPS)
                        self._sleeps = self._penalty
                        break
                else:
                    self._penalty = 0
                    return count
        self._is_quick = False
        count = receive(view, 0)
        self._is_quick = self._may_look and perf_counter() - begin < SHORT
        return count
