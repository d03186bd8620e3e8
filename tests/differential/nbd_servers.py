"""NBD servers of others, one in each folder of a pair, on the unix socket "s" there."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.conftest import require
from tests.differential.programs import Program, ended

SOCKET = "s"
#: stands for the whole path of the socket in a server's words
PLACE = "{socket}"
SECONDS = 20.0


@contextmanager
def serving(
    argv: Sequence[str], folder: Path, place: Path | tuple[str, int] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that makes its socket in `folder`, or listens at `place`; ended with the block."""
    if place is None:
        place = folder / SOCKET
        place.unlink(missing_ok=True)
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [str(place) if word == PLACE else word for word in argv],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        with ended(process):
            deadline = time.monotonic() + SECONDS
            while not _listens(place):
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline, "the server makes no socket"
                time.sleep(0.01)
            yield process


def _listens(place: Path | tuple[str, int]) -> bool:
    """Whether somebody takes connections there: the socket is made before it is listened to."""
    is_path = isinstance(place, Path)
    with socket.socket(socket.AF_UNIX if is_path else socket.AF_INET) as probe:
        try:
            probe.connect(str(place) if is_path else place)
        except OSError:
            return False
    return True


@contextmanager
def alone_at_ports() -> Iterator[None]:
    """No other test binds, or asks for, a port that is not its own meanwhile.

    QEMU's server binds the one of NBD before it refuses other words.
    """
    with (Path(tempfile.gettempdir()) / "diskwright-tests.ports").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def both_serving(argv: Sequence[str], folders: Sequence[Path]) -> Iterator[None]:
    """The same server in each folder."""
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(serving(argv, folder))
        yield


def tool(name: str) -> str:
    """The path of a program that other people make; without it the test cannot run."""
    path = shutil.which(name)
    if path is None:
        require(name)
    assert path is not None
    return path


def ran(*words: str, cwd: Path, seconds: float = 100) -> str:
    """What such a program prints; it has to succeed."""
    # The system's Python has the module `nbd`, and its folder may not be the first one.
    env = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        words, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


def qemu_nbd(real: dict[str, Program], *words: str) -> list[str]:
    """qemu-nbd's words: for eight clients, until it is ended, the export "disk"."""
    return real["qemu-nbd"].argv("-t", "-e", "8", "-k", PLACE, "-x", "disk", *words)


def nbdkit(*words: str) -> list[str] | None:
    """nbdkit's words, or None where there is no nbdkit."""
    path = shutil.which("nbdkit") or shutil.which("nbdkit", path="/usr/sbin")
    return None if path is None else [path, "-f", "-U", PLACE, "-e", "disk", *words]
