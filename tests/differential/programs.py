"""The programs that the black-box suites run: QEMU's own, and the command under test.

`DISKWRIGHT_TEST_TOOL` chooses the command under test:

- unset: `python -m diskwright.cli.img`, each command in a process forked from one that has the
  interpreter and the package loaded already (see zygote.py), which spares the start;
- `spawn`: the same command, each time as a process of its own;
- `real`: QEMU's own in its place. The suites then compare QEMU with itself and must pass: this is
  how a suite is shown to ask nothing that QEMU does not do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.differential.zygote import Zygote

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src"
REAL_NAMES = ("qemu-img", "qemu-io", "qemu-nbd", "qemu-system-x86_64")
TIMEOUT_S = 120.0


class Result(NamedTuple):
    """What a command left: its status (negative: the signal that ended it) and its words."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit {self.code}\nstdout: {self.out}\nstderr: {self.err}"


class Program:
    """A program that is started anew each time."""

    def __init__(self, name: str, prefix: list[str]) -> None:
        self.name = name
        self.prefix = prefix

    def argv(self, *arguments: str) -> list[str]:
        """The whole command line."""
        return [*self.prefix, *arguments]

    def run(
        self, *arguments: str, cwd: Path, timeout: float = TIMEOUT_S, stdin: str = ""
    ) -> Result:
        """Run it to its end; a run over `timeout` is killed and fails the test."""
        done = subprocess.run(
            self.argv(*arguments),
            cwd=cwd,
            env=environment(),
            input=stdin.encode(),
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return Result(done.returncode, _text(done.stdout), _text(done.stderr))

    def start(self, *arguments: str, cwd: Path, **popen: object) -> subprocess.Popen[bytes]:
        """Start it; whoever starts it ends it (see `ended`)."""
        settings = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            self.argv(*arguments), cwd=cwd, env=environment(), **{**settings, **popen}
        )


class ForkedProgram(Program):
    """A Python command that runs in forks of one process; `start` still makes a real process."""

    def __init__(self, name: str, prefix: list[str], zygote: Zygote) -> None:
        super().__init__(name, prefix)
        self.zygote = zygote

    def run(
        self, *arguments: str, cwd: Path, timeout: float = TIMEOUT_S, stdin: str = ""
    ) -> Result:
        """Run it to its end in a fork."""
        target = [word for word in self.prefix[1:] if word != "-m"]
        code, out, err = self.zygote.run([*target, *arguments], cwd, timeout, stdin.encode())
        return Result(code, _text(out), _text(err))


def _text(output: bytes) -> str:
    return output.decode("utf-8", "backslashreplace")


def environment() -> dict[str, str]:
    """What programs are started with: this tree's package, plain words, warnings as errors."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QEMU_")}
    paths = [str(SOURCE), str(REPOSITORY), kept.get("PYTHONPATH", "")]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONWARNINGS": "error",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "OPENBLAS_NUM_THREADS": "1",
    }


def find_real() -> tuple[dict[str, Program], list[str]]:
    """QEMU's programs found on PATH, and the names of those that are not there."""
    found = {name: shutil.which(name) for name in REAL_NAMES}
    programs = {name: Program(name, [path]) for name, path in found.items() if path}
    return programs, [name for name, path in found.items() if not path]


def under_test(real: dict[str, Program], zygote: Zygote | None, kind: str = "img") -> Program:
    """The command under test, "img" or "io", as DISKWRIGHT_TEST_TOOL says."""
    choice = os.environ.get("DISKWRIGHT_TEST_TOOL", "")
    if choice == "real":
        return real[f"qemu-{kind}"]
    prefix = [sys.executable, "-m", f"diskwright.cli.{kind}"]
    if zygote is None or choice == "spawn":
        return Program(f"diskwright-{kind}", prefix)
    return ForkedProgram(f"diskwright-{kind}", prefix, zygote)


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]):
    """End the process by its id when the block is left, however it stands then."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(30)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def without_program_name(text: str) -> str:
    """`text` with the program's own name at line starts replaced by a word."""
    for name in ("diskwright-img", "qemu-img"):
        text = text.replace(f"{name}: ", "PROGRAM: ").replace(f"Try '{name} ", "Try 'PROGRAM ")
    return text
