"""The line of `-p`: "    (12.34/100%)", written over again and again, as QEMU's tools do.

Without `-p` it is written once whenever the process gets SIGUSR1, for a look at what takes so
long.
"""

from __future__ import annotations

from diskwright.cli import output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

#: A new line is written when the number has grown by so many percent.
STEP_PERCENT = 1.0


class Progress:
    """Shows how far an operation is; call it with (bytes done, bytes in all).

    Args:
        shown: whether -p was given.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._percent = 0.0
        self._last = -STEP_PERCENT
        if not shown:
            self._listen()

    def _listen(self) -> None:
        import signal

        try:
            signal.signal(signal.SIGUSR1, self._asked)
        except (ValueError, AttributeError):  # not the main thread, or not a POSIX system
            pass

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._write()

    def __call__(self, done: int, total: int) -> None:
        """Note it; write it where it has changed enough."""
        self._percent = percent = done * 100 / total if total else 100.0
        grown = percent >= self._last + STEP_PERCENT or percent == 100.0 != self._last
        if self._shown and grown:
            self._write()

    def _write(self) -> None:
        self._last = self._percent
        output.say(f"    ({self._percent:3.2f}/100%)\r")
        output.flush()

    def begin(self) -> None:
        """Write the first line."""
        self(0, 1)

    def end(self, *, done: bool = False) -> None:
        """Leave the line; with `done`, write once more that all is done."""
        if self._shown:
            if done:
                self._percent = 100.0
                self._write()
            output.say("\n")
