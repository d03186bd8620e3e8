"""Where the programs begin: SIGINT ends them quietly from the first moment on, if it is heeded.

Loading the rest takes longer than many commands do, so this module imports nothing for itself.
`interrupt.heeded` takes over where there is something to be left in order.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

#: What shells make of a program that SIGINT ended.
INTERRUPTED = 130


def begin(program: str, argv: Sequence[str] | None) -> int:
    """Run a program.

    Args:
        program: its name, one of `tools.TOOLS`.
        argv: its words. None: those of the command line, of a process that does nothing else.

    Returns:
        Its exit code.
    """
    if argv is None:
        _heed(program)
    from diskwright.cli.run import main_of
    from diskwright.cli.tools import TOOLS

    return main_of(TOOLS[program], argv)


def end_on_interrupt() -> None:
    """Have SIGINT end the process at once, without a word, unless the caller ignores it."""
    _on_interrupt(None)


def _heed(program: str) -> None:
    from os import _exit, write

    def end(number: int, frame: FrameType | None) -> None:
        try:
            write(2, f"{program}: interrupted\n".encode())
        finally:
            _exit(INTERRUPTED)

    _on_interrupt(end)


def _on_interrupt(handler: Callable[[int, FrameType | None], None] | None) -> None:
    from _signal import (  # type: ignore[import-not-found]  # what `signal` wraps in enumerations
        SIG_DFL,
        SIG_IGN,
        SIGINT,
        getsignal,
        signal,
    )

    if getsignal(SIGINT) != SIG_IGN:
        signal(SIGINT, handler or SIG_DFL)
