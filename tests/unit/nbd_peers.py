"""Both ends for the tests of the server: one that serves in a thread, a client by hand."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import diskwright
from diskwright.block.node import Node
from diskwright.exports.nbd.export import NodeExport
from diskwright.exports.nbd.listening import unix_socket
from diskwright.exports.nbd.server import NbdServer
from diskwright.wire.nbd import transmission
from diskwright.wire.nbd.client import ClientHandshake
from diskwright.wire.nbd.numbers import BASE_ALLOCATION, Chunk, Command, Flag

MODES = ("simple", "structured", "extended")
SECONDS = 20.0


SIZE = 8 << 20
KINDS = {
    "raw": ("raw", {}),
    "qcow2": ("qcow2", {"cluster_size": "4k"}),
    "vdi": ("vdi", {}),
}


def made(folder, kind: str = "raw", size: int = SIZE, **more):
    format, options = KINDS[kind]
    path = folder / f"disk.{kind}"
    diskwright.create(str(path), size, format=format, options=options)
    return diskwright.open(str(path), format=format, read_only=False, **more)


class Running:
    """A server in a thread."""

    def __init__(self, server: NbdServer, path: Path) -> None:
        self.server = server
        self.path = path
        self.told: list[str] = []
        self.sockets: list[socket.socket] = []
        self.thread = threading.Thread(target=server.serve, daemon=True)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        self.sockets.append(sock)
        sock.settimeout(SECONDS)
        sock.connect(str(self.path))
        return sock

    def client(self, mode: str = "structured", name: str = "", **more) -> Client:
        return Client(self.connect(), mode, name, **more)


@contextmanager
def running(
    node: Node, folder: Path, *, clients: int = 0, seconds: float = 10.0, **export
) -> Iterator[Running]:
    """`node` served at the socket "s" in `folder`."""
    lines: list[str] = []
    made = NodeExport(node, clients=clients, **export)
    server = NbdServer([made], clients=clients, told=lines.append, handshake_seconds=seconds)
    path = folder / "s"
    server.listen(unix_socket(str(path)))
    here = Running(server, path)
    here.told = lines
    here.thread.start()
    try:
        yield here
    finally:
        server.stop()
        for sock in here.sockets:
            sock.close()
        here.thread.join(SECONDS)
        assert not here.thread.is_alive(), "the server does not end"


class Client:
    """A client whose every byte is the test's."""

    def __init__(
        self,
        sock: socket.socket,
        mode: str = "structured",
        name: str = "",
        *,
        contexts: Sequence[str] = (BASE_ALLOCATION,),
        send: Callable[[bytes], None] | None = None,
        secure: Callable[[socket.socket], socket.socket] | None = None,
    ) -> None:
        self.sock = sock
        self.send = send or sock.sendall
        shake = ClientHandshake(structured=mode != "simple", extended=mode == "extended")
        self.converse(shake.greet())
        if secure is not None:
            self.converse(shake.start_tls(), stops=True)
            self.sock = secure(sock)
            self.send = self.sock.sendall
        self.converse(shake.agree())
        chosen = self.converse(shake.contexts(name, contexts, choose=True))
        self.agreed = self.converse(shake.go(name, chosen))
        self.cookie = 0
        self.asked: dict[int, int] = {}  # cookie -> offset

    def converse(self, steps, *, stops: bool = False):
        try:
            wanted = next(steps)
            while True:
                if isinstance(wanted, int):
                    wanted = steps.send(self.take(wanted))
                elif wanted is None and stops:
                    return None
                else:
                    self.send(wanted)
                    wanted = next(steps)
        except StopIteration as stop:
            return stop.value

    def take(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self.sock.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def ask(self, command: int, offset: int, length: int, flags: int = 0, data: bytes = b"") -> int:
        """Send a request; its cookie."""
        self.cookie += 1
        where = (self.cookie, offset, length)
        self.asked[self.cookie] = offset
        self.send(transmission.request(self.agreed, command, flags, where) + data)
        return self.cookie

    def reply(self, length: int = 0) -> tuple[int, int, bytes, list[tuple[int, list]]]:
        """(cookie, error, data, statuses) of the next whole reply.

        Chunks of other requests that come between are not expected: ask one at a time, or read.
        `length` is that of the request, where it is a read.
        """
        if not self.agreed.structured:
            _, error, cookie = transmission.SIMPLE_REPLY.unpack(self.take(16))
            return cookie, error, b"" if error else self.take(length), []
        return self._chunks(length)

    def _chunks(self, length: int):
        form = (
            transmission.EXTENDED_REPLY if self.agreed.extended else transmission.STRUCTURED_REPLY
        )
        data, statuses, error, base = bytearray(b"?" * length), [], 0, None
        while True:
            fields = form.unpack(self.take(form.size))
            flags, kind, cookie, size = fields[1], fields[2], fields[3], fields[-1]
            body = self.take(size)
            if self.agreed.extended:
                assert fields[4] == self.asked[cookie], "the request had another offset"
            if kind & Chunk.IS_ERROR:
                error = int.from_bytes(body[:4], "big")
            elif kind == Chunk.OFFSET_DATA:
                at = int.from_bytes(body[:8], "big")
                base = at if base is None else base
                data[at - base : at - base + size - 8] = body[8:]
            elif kind == Chunk.OFFSET_HOLE:
                at, count = transmission.HOLE.unpack(body)
                base = at if base is None else base
                data[at - base : at - base + count] = bytes(count)
            elif kind in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT):
                statuses.append(
                    transmission.take_status(body, extended=kind == Chunk.BLOCK_STATUS_EXT)
                )
            if flags & Chunk.DONE:
                return cookie, error, bytes(data), statuses

    # ------------------------------------------------------------------- one after the other

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        self.ask(Command.READ, offset, length, flags)
        _, error, data, _ = self.reply(length)
        assert not error, error
        return data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.ask(Command.WRITE, offset, len(data), flags, data)
        assert not self.reply()[1]

    def do(self, command: int, offset: int = 0, length: int = 0, flags: int = 0) -> int:
        """The error of a request without a payload."""
        self.ask(command, offset, length, flags)
        return self.reply(length if command == Command.READ else 0)[1]

    def status(self, offset: int, length: int, *, one: bool = False) -> list[tuple[int, list]]:
        self.ask(Command.BLOCK_STATUS, offset, length, Flag.REQ_ONE if one else 0)
        _, error, _, statuses = self.reply()
        assert not error, error
        return statuses

    def leave(self) -> None:
        self.ask(Command.DISC, 0, 0)
        assert self.sock.recv(1) == b""
        self.sock.close()
