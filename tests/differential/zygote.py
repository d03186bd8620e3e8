"""A process that has Python and the package loaded, and runs commands in forks of itself.

A suite of some thousand commands would otherwise spend most of its time in starting
interpreters. Each command has its own process, working directory and descriptors, runs as
`python -m MODULE` (or `python FILE`) would, and ends through the interpreter's normal end.
`DISKWRIGHT_TEST_TOOL=spawn` runs the same suites without this.

Protocol, one connection a command: the client sends a JSON object and three descriptors; it
gets the process's id, and later its status as os.waitpid gives it.
"""

from __future__ import annotations

import array
import gc
import importlib.util
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

_NUMBER = struct.Struct("=i")
_START_S = 60


class Zygote:
    """The client's side: starts the process, runs commands in it, ends it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.address = str(folder / "zygote")
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.address],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        ready, _, _ = select.select([self.process.stdout], [], [], _START_S)
        if not ready or self.process.stdout.readline() != b"ready\n":
            self.errors.seek(0)
            words = self.errors.read().decode("utf-8", "replace")
            self.close()
            raise RuntimeError(f"the command under test does not load:\n{words}")

    def run(
        self, argv: list[str], cwd: Path, timeout: float, stdin: bytes
    ) -> tuple[int, bytes, bytes]:
        """Run one command; (exit code or negative signal, stdout, stderr)."""
        with (
            tempfile.TemporaryFile() as source,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
        ):
            source.write(stdin)
            source.seek(0)
            connection.connect(self.address)
            descriptors = array.array("i", [source.fileno(), out.fileno(), err.fileno()])
            request = json.dumps({"argv": argv, "cwd": str(cwd)}).encode()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            connection.sendmsg([request], rights)
            (pid,) = _NUMBER.unpack(connection.recv(_NUMBER.size))
            connection.settimeout(timeout)
            try:
                answer = connection.recv(_NUMBER.size)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(argv, timeout) from None
            code = os.waitstatus_to_exitcode(_NUMBER.unpack(answer)[0])
            out.seek(0)
            err.seek(0)
            return code, out.read(), err.read()

    def close(self) -> None:
        """End the process: it goes when its standard input does."""
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
        self.errors.close()


def _preload() -> None:
    """Import what commands import, except modules that are run."""
    import diskwright

    for module in pkgutil.walk_packages(diskwright.__path__, "diskwright."):
        spec = importlib.util.find_spec(module.name)
        if "__main__" in spec.loader.get_source(module.name):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError:  # another system's module, or an extra that is not installed
            continue
    gc.collect()
    gc.freeze()  # forks look at what they made, not at what came with them


def _serve(address: str) -> None:
    #: descriptor of a command's process -> its id, and who waits for it
    running: dict[int, tuple[int, socket.socket]] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(64)
        os.write(1, b"ready\n")
        while True:
            ready, _, _ = select.select([listener, 0, *running], [], [])
            for ended in running.keys() & set(ready):
                pid, connection = running.pop(ended)
                _tell(connection, os.waitpid(pid, 0)[1])
                connection.close()
                os.close(ended)
            if 0 in ready:
                return
            if listener in ready:
                connection, _ = listener.accept()
                message, ancillary, _, _ = connection.recvmsg(1 << 20, 4096)
                if not message:  # a test that was over before it asked
                    connection.close()
                    continue
                descriptors = array.array("i")
                descriptors.frombytes(ancillary[0][2])
                pid = os.fork()
                if pid == 0:
                    for number, (_, other) in running.items():
                        os.close(number)
                        other.close()
                    connection.close()
                    listener.close()
                    _become(json.loads(message), list(descriptors))
                for descriptor in descriptors:
                    os.close(descriptor)
                running[os.pidfd_open(pid)] = pid, connection
                _tell(connection, pid)


def _tell(connection: socket.socket, number: int) -> None:
    try:
        connection.send(_NUMBER.pack(number))
    except OSError:  # a test that was over before its command
        pass


class _Start(BaseException):
    """Leaves the server's frames, so that the command runs on a stack of its own."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv


def _become(request: dict[str, object], descriptors: list[int]) -> None:
    os.chdir(request["cwd"])
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    raise _Start(request["argv"])


def _main() -> None:
    if os.environ.get("PYTHONPATH"):
        sys.path[0] = ""
    _preload()
    try:
        _serve(sys.argv[1])
        return
    except _Start as start:
        argv = start.argv
    sys.argv = argv
    if argv[0].endswith(".py"):
        runpy.run_path(argv[0], run_name="__main__")
    else:
        sys.argv = [argv[0], *argv[1:]]
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
