"""`exports/nbd` and clients that lie, stall, hang up, or come in numbers: nobody else is harmed."""

from __future__ import annotations

import gc
import resource
import struct
import threading
import time

import pytest

from diskwright.wire.nbd.numbers import Command, Error
from tests.unit.nbd_peers import MODES, SIZE, Client, made, running


def test_cut_at_every_byte(tmp_path):
    """A session that ends at any of its bytes leaves the server as it was."""
    with made(tmp_path) as node, running(node, tmp_path) as here:
        sent = bytearray()
        client = here.client("extended")
        whole = here.connect()

        def both(data: bytes) -> None:
            sent.extend(data)
            whole.sendall(data)

        client = Client(whole, "extended", send=both)
        client.write(0, b"w" * 300)
        client.read(0, 300)
        client.leave()
        for stop in range(len(sent)):
            sock = here.connect()
            sock.sendall(sent[:stop])
            sock.close()
        survivor = here.client()
        assert survivor.read(0, 300)[:1] == b"w"
        deadline = time.monotonic() + 10
        while len(here.server._clients) > 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(here.server._clients) == 2, "who has gone is still there"


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 100,
        b"\0\0\0\1" + b"\0" * 40,
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 7, 0xFFFFFFFF),
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 1, 5000) + b"n" * 5000,
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 1, 3) + b"abc",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_garbage_is_left(tmp_path, garbage):
    with made(tmp_path) as node, running(node, tmp_path) as here:
        sock = here.connect()
        sock.sendall(garbage)
        while sock.recv(4096):
            pass
        assert here.client().read(0, 10) == bytes(10)
        assert here.told


def test_a_request_that_begins_wrongly_ends_the_connection(tmp_path):
    with made(tmp_path) as node, running(node, tmp_path) as here:
        client = here.client("simple")
        client.sock.sendall(b"\0" * 28)
        with pytest.raises(EOFError):
            client.take(1)
        assert here.client().read(0, 10) == bytes(10)


@pytest.mark.parametrize("mode", MODES)
def test_a_payload_without_bounds_is_refused_and_not_listened_to(tmp_path, mode):
    with made(tmp_path) as node, running(node, tmp_path) as here:
        client = here.client(mode)
        client.ask(Command.WRITE, 0, (32 << 20) + 1)
        assert client.reply()[1] == Error.EINVAL
        with pytest.raises(EOFError):
            client.take(1)
        assert here.client().read(0, 10) == bytes(10)


def test_who_does_not_read_is_not_served(tmp_path):
    """Requests for 2 GiB, of which nothing is taken: the server holds little, others go on."""
    with made(tmp_path) as node, running(node, tmp_path) as here:
        node.write(0, b"x" * SIZE)
        greedy = [here.client(mode) for mode in MODES for _ in range(8)]
        before = _resident()
        for client in greedy:
            client.sock.settimeout(0.2)
            try:
                for _ in range(80):
                    client.ask(Command.READ, 0, 1 << 20)
            except TimeoutError:
                pass
        quick = here.client()
        for _ in range(100):
            assert quick.read(4096, 4096) == b"x" * 4096
        assert _resident() - before < 64 << 20
        for client in greedy:
            client.sock.close()


def test_half_open_connections(tmp_path):
    """Five hundred that say nothing: they are left in time, and others are served meanwhile."""
    with made(tmp_path) as node, running(node, tmp_path, seconds=1.0) as here:
        silent = [here.connect() for _ in range(500)]
        threads = threading.active_count()
        begin = time.monotonic()
        assert here.client().read(0, 10) == bytes(10)
        assert threading.active_count() <= threads + 16
        for sock in silent:
            while sock.recv(4096):
                pass
        assert time.monotonic() - begin < 15
        assert here.client().read(0, 10) == bytes(10)


def test_idle_clients_cost_little(tmp_path):
    """A thousand that came through their handshake: 20 MiB at most, and no thread each."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit[0], min(limit[1], 4096)), limit[1]))
    with made(tmp_path) as node, running(node, tmp_path) as here:
        first = here.client()
        threads = threading.active_count()
        gc.collect()
        before = _resident()
        idle = []
        for _ in range(1000):
            client = here.client("simple", contexts=())
            idle.append(client.sock)
        gc.collect()
        assert _resident() - before < 20 << 20
        assert threading.active_count() <= threads + 16
        assert first.read(0, 10) == bytes(10)
        for sock in idle:
            sock.close()


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
