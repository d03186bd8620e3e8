"""Where commands write: standard output and standard error, as bytes.

Names of files need not be UTF-8: what could not be decoded comes out as it was. A reader that
went away (`| head`) is no error, as for QEMU's tools: what is left to say is dropped.

Standard output is held back here and not in the interpreter's buffer, which an environment
variable turns off: where both streams go into one pipe, complaints come first, as they do with
QEMU's tools, and scripts compare the two together.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: Bytes that are held back at most.
MAX_HELD = 1 << 16

_held = bytearray()


def say(text: str) -> None:
    """Write to standard output, as it is."""
    _held.extend(_encoded(text))
    if len(_held) >= MAX_HELD or sys.stdout.isatty():
        flush()


def say_lines(lines: Iterable[str]) -> None:
    """Write lines to standard output."""
    for line in lines:
        say(f"{line}\n")


def flush() -> None:
    """Bring what was said to its reader.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    words = bytes(_held)
    _held.clear()
    try:
        sys.stdout.buffer.write(words)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        _drop_output()
    except OSError:
        _drop_output()
        raise


def complain(line: str) -> None:
    """Write a line, or several, to standard error."""
    try:
        sys.stderr.buffer.write(_encoded(f"{line}\n"))
        sys.stderr.buffer.flush()
    except BrokenPipeError:
        pass


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _drop_output() -> None:
    """Nobody reads any more: the interpreter's last flush must not fail either."""
    import os

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
