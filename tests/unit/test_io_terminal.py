"""`diskwright-io` at a terminal: lines are edited, come back from the history, and results show."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

import diskwright
from tests.rooms import ROOT

UP = b"\x1b[A"
WAIT_S = 20


class Terminal:
    """The program at a pseudo-terminal."""

    def __init__(self, *words: str, cwd, program=(sys.executable, "-m", "diskwright.cli.io")):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*program, *words],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.seen = b""

    def type(self, words: bytes) -> None:
        os.write(self.master, words)

    def wait_for(self, words: bytes, times: int = 1) -> None:
        """Until `words` were shown so often."""
        deadline = time.monotonic() + WAIT_S
        while self.seen.count(words) < times:
            ready, _, _ = select.select([self.master], [], [], deadline - time.monotonic())
            assert ready, self.seen
            self.seen += os.read(self.master, 4096)

    def close(self) -> int:
        try:
            return self.process.wait(WAIT_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            os.close(self.master)


@pytest.fixture
def terminal(tmp_path):
    pytest.importorskip("readline")
    diskwright.create(tmp_path / "a.qcow2", 1 << 20, format="qcow2")
    started = Terminal("-f", "qcow2", "blkdebug::a.qcow2", cwd=tmp_path)
    started.wait_for(b"qemu-io> ")
    yield started
    if started.process.poll() is None:
        started.process.kill()
    started.process.wait()


def test_a_line_comes_back(terminal):
    terminal.type(b"length\n")
    terminal.wait_for(b"1 MiB\r\nqemu-io> ")
    terminal.type(UP + b"\n")
    terminal.wait_for(b"1 MiB\r\nqemu-io> ", 2)
    terminal.type(b"nonsense\n")
    terminal.wait_for(b'command "nonsense" not found')
    terminal.type(b"quit\n")
    assert terminal.close() == 1


def test_tab_completes_a_command(terminal):
    terminal.type(b"le\t\n")
    terminal.wait_for(b"length \r\n1 MiB\r\nqemu-io> ")
    terminal.type(b"nosuch\t\n")
    terminal.wait_for(b'command "nosuch" not found')
    terminal.type(b"q\t\n")
    assert terminal.close() == 1


def test_a_result_shows_while_the_program_waits_for_a_line(terminal):
    terminal.type(b"break write_aio A\naio_write 0 64k\nwait_break A\n")
    terminal.wait_for(b"Suspended request 'A'")
    terminal.type(b"resume A\n")
    terminal.wait_for(b"wrote 65536/65536 bytes at offset 0")
    terminal.type(b"quit\n")  # not the end of input, which counts only where a line is awaited
    assert terminal.close() == 0


def test_the_end_of_input_ends_it(terminal):
    terminal.type(b"\x04")
    assert terminal.close() == 0


def test_an_interrupt_ends_it(terminal):
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.close() == -signal.SIGINT
