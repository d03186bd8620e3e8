"""Sockets that a service manager gives a server, and what cannot be said beside them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import diskwright
from tests.differential.nbd_servers import SECONDS, alone_at_ports
from tests.differential.programs import Program, ended, environment

pytestmark = pytest.mark.peer

MIB = 1 << 20
#: starts a program with the socket argv[1] as its descriptor 3, and so many of them said, argv[2]
GIVES = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


@pytest.fixture
def both(real, tmp_path) -> list[tuple[Program, Path]]:
    """(program, folder with an image "raw") of qemu-nbd and of ours."""
    pairs = []
    ours = Program("diskwright-nbd", [sys.executable, "-m", "diskwright.cli.nbd"])
    for name, program in (("real", real["qemu-nbd"]), ("ours", ours)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "raw").write_bytes(bytes(MIB))
        pairs.append((program, folder))
    return pairs


@contextmanager
def given(argv: list[str], folder: Path, count: str) -> Iterator[subprocess.Popen[str]]:
    """The program, started with a socket that listens at "s"."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "s"))
        sock.listen()
        process = subprocess.Popen(
            [sys.executable, "-c", GIVES, str(sock.fileno()), count, *argv],
            cwd=folder,
            env=environment(),
            pass_fds=(sock.fileno(),),
            stderr=subprocess.PIPE,
            text=True,
        )
        with ended(process):
            yield process


def test_a_given_socket_is_served(both):
    for program, folder in both:
        with given(program.argv("-t", "-f", "raw", "raw"), folder, "1"):
            address = {"driver": "nbd", "path": str(folder / "s")}
            with diskwright.open(address) as node:
                assert node.size == MIB


@pytest.mark.parametrize("count", ["1", "0", "x", ""])
@pytest.mark.parametrize(
    "line",
    [
        "-c /dev/no-nbd -f raw raw",
        "-d /dev/no-nbd",
        "-k other -f raw nosuch",
        "-b 127.0.0.1 -f raw nosuch",
        "-p 1 -f raw nosuch",
        "-b 127.0.0.1 -k other -f raw nosuch",
        "-f raw nosuch",
    ],
)
def test_what_cannot_be_said_beside_it(both, line, count):
    refused(both, line, count)


@pytest.mark.parametrize("line", ["-L", "-L -p 1", "--selinux-label=x -f raw nosuch"])
def test_what_else_cannot_be_said_beside_it(both, line):
    refused(both, line, "1")


def refused(both: list[tuple[Program, Path]], line: str, count: str) -> None:
    """Both say the same, and end."""
    said: list[tuple[int, str]] = []
    for program, folder in both:
        with alone_at_ports(), given(program.argv(*line.split()), folder, count) as process:
            _, errors = process.communicate(timeout=SECONDS)
            said.append((process.returncode, errors.splitlines()[0].partition(": ")[2]))
    assert said[0] == said[1]
    assert said[0][0] == 1
