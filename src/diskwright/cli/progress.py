"""The line of `-p`: "    (12.34/100%)", written over again and again, as QEMU's tools do.

Without `-p` a line of its own goes to standard error after each SIGUSR1, or SIGINFO where there is
such, with the next step that is done: for a look at what takes so long.
"""

from __future__ import annotations

from diskwright.cli import output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType


class Progress:
    """Shows how far an operation is; call it with (bytes done, bytes in all).

    Args:
        shown: whether -p was given.
        step: by how many percent the number must have grown to be written again.

    Attributes:
        idle: nobody looks: no call matters until a signal asks for one.
    """

    def __init__(self, shown: bool, step: float = 1.0) -> None:
        self._shown = shown
        self.idle = not shown
        self._step = step
        self._percent = 0.0
        self._last = -step
        self._begun = False
        if not shown:
            self._listen()

    def _listen(self) -> None:
        import _signal as signal  # without its enumerations, which cost 8 ms

        for name in ("SIGUSR1", "SIGINFO"):  # the second one where Ctrl-T sends it
            number = getattr(signal, name, None)
            try:
                if number is not None:
                    signal.signal(number, self._asked)
            except ValueError:  # not the main thread
                pass

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.idle = False

    def __call__(self, done: int, total: int) -> None:
        """Note it; write it where it has changed enough."""
        self._percent = percent = done * 100 / total if total else 100.0
        grown = percent >= self._last + self._step or percent == 100.0 != self._last
        if self._shown and grown:
            self._write()
        elif not self._shown and not self.idle:
            self.idle = True
            output.complain(self._line())

    def wants(self, total: int) -> int:
        """How many bytes of `total` must be done for a call to write something, or one less."""
        if not self._shown:
            return total
        return min(int((self._last + self._step) * total / 100) - 1, total)

    def _write(self) -> None:
        self._last = self._percent
        output.say(f"{self._line()}\r")
        output.flush()

    def _line(self) -> str:
        return f"    ({self._percent:3.2f}/100%)"

    def begin(self) -> None:
        """Write the first line."""
        self._begun = True
        self(0, 1)

    def begin_later(self) -> None:
        """The line is ended even if nothing will have been written, as QEMU's `compare` does."""
        self._begun = True

    @property
    def was_written(self) -> bool:
        """Whether the line shows a number yet."""
        return self._shown and self._last >= 0

    def all_done(self) -> None:
        """Write once more that all is done."""
        if self._shown:
            self._percent = 100.0
            self._write()

    def end(self) -> None:
        """Leave the line, however the command ends."""
        if self._shown and self._begun:
            output.say("\n")
