"""NBD servers that fall silent: whoever wants the end of the operation does not wait for them."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import diskwright
from diskwright.block.cancel import cancellable
from diskwright.crypto.tls import X509Credentials
from diskwright.drivers.protocols.nbd import stream
from diskwright.errors import CancelledError, IOFailure
from tests.differential import certificates

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its sockets have other limits")

SIZE = 64 << 20


class Relay:
    """What stands between clients and a server, and passes nothing on once it is frozen."""

    def __init__(self, folder: Path, behind: str) -> None:
        self.path = str(folder / "relay")
        self.frozen = threading.Event()
        self.delay = 0.0  # before whatever is passed on
        self.room: int | None = None  # for so many bytes more, then it is frozen
        self._behind = behind
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._kept: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._behind)
            self._kept += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        while not self.frozen.is_set():
            with contextlib.suppress(OSError, ValueError):
                if select.select([source], [], [], 0.01)[0] and not self.frozen.is_set():
                    time.sleep(self.delay)
                    data = source.recv(1 << 18)
                    if not data:
                        target.shutdown(socket.SHUT_WR)
                        return
                    if self.room is not None:
                        data = data[: self.room]
                        self.room -= len(data)
                        if not self.room:
                            self.frozen.set()
                    target.sendall(data)
                continue
            return

    def close(self) -> None:
        self.frozen.set()
        for sock in (self._listener, *self._kept):
            sock.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tls")
    certificates.make(made)
    return made


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def relayed(request, tmp_path, folder):
    """(relay, options of a client that goes through it)."""
    (tmp_path / "i").write_bytes(b"data" * (2 << 20))
    os.truncate(tmp_path / "i", SIZE)
    words: dict[str, object] = {"driver": "nbd", "path": str(tmp_path / "relay")}
    server = None
    if request.param:
        server = X509Credentials(str(folder / "server"), endpoint="server")
        trust = X509Credentials(str(folder / "client"))
        words |= {"tls-creds": trust, "tls-hostname": "localhost"}
    with diskwright.open(str(tmp_path / "i"), format="raw", read_only=False) as disk:
        path = str(tmp_path / "s")
        with diskwright.serve({"": disk}, path=path, credentials=server):
            relay = Relay(tmp_path, path)
            yield relay, {"driver": "raw", "file": words}
            relay.close()


def ended(work, flag: threading.Event) -> BaseException:
    """What `work` ends with when its end is asked for while it waits; it has to end soon."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with cancellable(flag):
                work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive(), "it did not wait"
    flag.set()
    thread.join(10)
    assert not thread.is_alive(), "it waits still"
    return raised[0]


def left(node) -> None:
    """Nothing waits for that server afterwards."""
    with pytest.raises(IOFailure, match="did not answer in time"):
        node.read(0, 512)
    with contextlib.suppress(IOFailure):
        node.close()


@pytest.mark.parametrize("work", ["read", "write", "flush"])
def test_requests(relayed, work):
    relay, spec = relayed
    node = diskwright.open(spec, read_only=False)
    node.write(0, b"1234")
    relay.frozen.set()
    works = {
        "read": lambda: node.read(0, 4096),
        "write": lambda: node.write(0, bytes(32 << 20)),  # more than the sockets' buffers hold
        "flush": node.flush,
    }
    assert isinstance(ended(works[work], threading.Event()), CancelledError)
    left(node)


def test_in_the_middle_of_an_answer(relayed):
    relay, spec = relayed
    node = diskwright.open(spec)
    node.read(0, 4)
    relay.room = 100_000
    found = ended(lambda: node.read(0, 8 << 20), threading.Event())
    assert isinstance(found, CancelledError)
    left(node)


def test_many_requests(relayed):
    """One of their threads reads for all of them."""
    relay, spec = relayed
    node = diskwright.open(spec)
    node.read(0, 4)
    relay.frozen.set()
    flag, found = threading.Event(), []

    def one() -> None:
        try:
            with cancellable(flag):
                node.read(0, 4096)
        except BaseException as error:
            found.append(type(error))

    threads = [threading.Thread(target=one, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    flag.set()
    for thread in threads:
        thread.join(10)
    assert found == [CancelledError] * 4
    left(node)


def test_the_handshake(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        spec = {"driver": "nbd", "path": str(tmp_path / "s")}
        found = ended(lambda: diskwright.open(spec), threading.Event())
    assert isinstance(found, CancelledError)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody waits for a full server")
def test_connecting(tmp_path):
    """A server that accepts nobody, and has no room for more who wait."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(str(tmp_path / "s"))
        spec = {"driver": "nbd", "path": str(tmp_path / "s")}
        found = ended(lambda: diskwright.open(spec), threading.Event())
    assert isinstance(found, CancelledError)


def test_a_slow_server_is_waited_for(relayed, monkeypatch):
    """Silence alone ends nothing, in whatever pieces calls wait."""

    def wait_in_slices(sock: socket.socket) -> None:
        for limit in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, limit, struct.pack("@ll", 0, 10_000))

    monkeypatch.setattr(stream, "_wait_in_slices", wait_in_slices)
    relay, spec = relayed
    relay.delay = 0.05
    data = random.Random(8).randbytes(1 << 20)
    with diskwright.open(spec, read_only=False) as node:
        node.write(5, data)
        node.flush()
        assert node.read(5, len(data)) == data


COMMANDS = [
    ("img", signal.SIGTERM, 143, ("info", "-f", "raw")),
    ("img", signal.SIGINT, 130, ("convert", "-f", "raw", "-O", "raw")),
    ("nbd", signal.SIGINT, -signal.SIGINT, ("-L",)),
    ("nbd", signal.SIGTERM, 0, ("-r", "-f", "raw")),
]


@pytest.mark.parametrize(("program", "number", "code", "words"), COMMANDS)
def test_programs(tmp_path, program, number, code, words):
    """One signal is enough, and says so on one line at most."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(20)
        path = str(tmp_path / "s")
        where = ("-k", path) if "-L" in words else (f"nbd+unix:///?socket={path}",)
        more = ("out",) if "convert" in words else ()
        process = subprocess.Popen(
            [sys.executable, "-m", f"diskwright.cli.{program}", *words, *where, *more],
            cwd=tmp_path, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            with listener.accept()[0]:
                time.sleep(0.2)
                process.send_signal(number)
                _, said = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == code
    assert said.count("\n") <= 1
    assert not (tmp_path / "out").exists()
