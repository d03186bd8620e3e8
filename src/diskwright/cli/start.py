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
    """Have SIGINT end the process at once, without a word, unless the caller ignores it.

    SIGUSR1 does nothing from here on; see `_heed_signals`.
    """
    _heed_signals(None)


def _heed(program: str) -> None:
    from os import _exit, write

    def end(number: int, frame: FrameType | None) -> None:
        try:
            write(2, f"{program}: interrupted\n".encode())
        finally:
            _exit(INTERRUPTED)

    _heed_signals(end)


def _heed_signals(on_interrupt: Callable[[int, FrameType | None], None] | None) -> None:
    """SIGUSR1 asks for a look at what takes long; who has nothing to show must not end of it."""
    import _signal  # what `signal` wraps in enumerations

    if _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
        _signal.signal(_signal.SIGINT, on_interrupt or _signal.SIG_DFL)
    if hasattr(_signal, "SIGUSR1"):
        _signal.signal(_signal.SIGUSR1, _signal.SIG_IGN)
