"""Where commands write: standard output and standard error, as bytes.

Names of files need not be UTF-8: what could not be decoded comes out as it was. A reader that
went away (`| head`) is no error, as for QEMU's tools: what is left to say is dropped.

A stream that was closed from the start (`>&-`) is none, for Python: what goes there is dropped.

Standard output is held back here and not in the interpreter's buffer, which an environment
variable turns off: where both streams go into one pipe, complaints come first, as they do with
QEMU's tools, and scripts compare the two together.
"""

from __future__ import annotations

import sys

from diskwright.errors import without_controls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: Bytes that are held back at most.
MAX_HELD = 1 << 16

_held = bytearray()
_failure: OSError | None = None


def say(text: str) -> None:
    """Write to standard output, as it is."""
    if sys.stdout is None:
        return
    _held.extend(_encoded(text))
    if len(_held) >= MAX_HELD or sys.stdout.isatty():
        flush()


def say_lines(lines: Iterable[str], *, escaped: bool = False) -> None:
    """Write lines to standard output.

    Args:
        lines: without their ends.
        escaped: show control characters as escapes, so that no name in a line can forge another
            one; the programs that are compatible with QEMU's print names as they are.
    """
    for line in lines:
        say(f"{without_controls(line) if escaped else line}\n")


def flush() -> None:
    """Bring what was said to its reader; where that fails, `end` says so."""
    global _failure
    if sys.stdout is None:
        return
    words = bytes(_held)
    _held.clear()
    try:
        sys.stdout.buffer.write(words)
        sys.stdout.buffer.flush()
    except OSError as error:
        _drop_output()
        if not isinstance(error, BrokenPipeError):
            _failure = error


def end() -> None:
    """Flush for the last time.

    Raises:
        OSError: something that was said could not be written, as on a full disk. That stops no
            command, which may have more to do than to speak.
    """
    global _failure
    flush()
    failure, _failure = _failure, None
    if failure is not None:
        raise failure


def complain(line: str) -> None:
    """Write a line, or several, to standard error."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.buffer.write(_encoded(f"{line}\n"))
        sys.stderr.buffer.flush()
    except BrokenPipeError:
        pass


def noticed(program: str, words: str, kind: str) -> str:
    """A notice (see `block/notice.py`) as the program prints it."""
    from diskwright.block.notice import ERROR, WARNING

    return {ERROR: f"{program}: ", WARNING: f"{program}: warning: "}.get(kind, "") + words


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _drop_output() -> None:
    """Nobody reads any more: the interpreter's last flush must not fail either."""
    import os

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
