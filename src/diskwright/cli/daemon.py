"""Programs that go on in the background: fork, readiness, a file with the process number."""

from __future__ import annotations

import os
import sys

from diskwright.errors import from_oserror

#: What a child writes when it is ready.
_READY = b"\0"


class Background:
    """The child's side of a fork whose parent waits until the child is ready or has failed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def ready(self) -> None:
        """Let the parent end; from now on there is no terminal."""
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.close(null)
        os.write(self._descriptor, _READY)
        os.close(self._descriptor)


def fork() -> Background | int:
    """Fork. In the child, what tells the parent; in the parent, the exit code, when that is known.

    There must be no other thread and no open image yet: neither goes over to the child.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(reading)
        os.setsid()
        return Background(writing)
    os.close(writing)
    ready = os.read(reading, 1) == _READY
    os.close(reading)
    if ready:
        return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) or 1


def write_pid(path: str) -> None:
    """Write this process's number to a file, for whoever wants to end it.

    Raises:
        IOFailure: it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    except OSError as error:
        raise from_oserror(error, f"Could not create '{path}'", path=path) from error
