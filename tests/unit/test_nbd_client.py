"""`drivers/protocols/nbd`: addresses, and connections to servers that lie, stall or hang up."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time

import pytest

import diskwright
from diskwright.drivers.protocols.nbd import address, link, stream
from diskwright.drivers.protocols.nbd.connection import Connection, Request
from diskwright.drivers.protocols.nbd.link import Link, runs_of
from diskwright.drivers.protocols.nbd.stream import Stream
from diskwright.errors import CancelledError, DiskwrightError, IOFailure, OptionError
from diskwright.wire.nbd import numbers, transmission
from diskwright.wire.nbd.messages import Export, Negotiated, ProtocolError
from diskwright.wire.nbd.numbers import Chunk, Command
from diskwright.wire.nbd.server import ServerHandshake


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("nbd://host", "nbd://host:10809"),
        ("nbd://host/", "nbd://host:10809"),
        ("nbd://Host:99/a/b", "nbd://Host:99/a/b"),
        ("nbd://[::1]:99/x", "nbd://[::1]:99/x"),
        ("nbd+tcp://host/x%20y", "nbd://host:10809/x y"),
        ("nbd+unix://?socket=/s", "nbd+unix://?socket=/s"),
        ("nbd+unix:///x?socket=/a%20b", "nbd+unix:///x?socket=/a b"),
        ("nbd:host:99", "nbd://host:99"),
        ("nbd:[::1]:99:exportname=x:y", "nbd://[::1]:99/x:y"),
        ("nbd:unix:/s", "nbd+unix://?socket=/s"),
        ("nbds://host/x", "nbds://host:10809/x"),
        ("nbds+tcp://host:1?tls-verify-peer=off", "nbds://host:1?tls-verify-peer=off"),
        ("nbds://h?tls-certificates=/a%26b", "nbds://h:10809?tls-certificates=/a%26b"),
        ("nbds+unix:///x?tls-hostname=h&socket=/s", "nbds+unix:///x?socket=/s&tls-hostname=h"),
    ],
)
def test_names(name, shown):
    assert str(address.from_options(address.parse(name))) == shown


@pytest.mark.parametrize(
    "name",
    ["nbd:", "nbd:x", "nbd:unix:/s:exportname=", "nbd://", "nbd://h:x/", "nbd+unix://", "nbd+unix://h/?socket=/s",
     "nbd+unix:///?socket=/s&x=/t", "nbd://h/x?y=1", "http://h/", "nbd://h/x?tls-hostname=y"],
)  # fmt: skip
def test_what_is_no_name(name):
    with pytest.raises(OptionError):
        address.parse(name)


def test_options():
    assert address.from_options({"host": "h"}).port == "10809"
    assert address.from_options({"path": "/s", "export": "x"}).place == "/s"
    for wrong in (
        {},
        {"path": "/s", "host": "h"},
        {"server": {"path": "/s"}},
        {"server": {"type": "fd"}},
        {"server": {"type": "inet", "host": "h"}},
        {"server": {"type": "unix", "path": "/s", "host": "h"}},
    ):
        with pytest.raises(OptionError):
            address.from_options(wrong)


def agreed(kind: str) -> Negotiated:
    made = Negotiated(Export("", 1 << 20, 0))
    made.structured, made.extended = kind != "simple", kind == "extended"
    made.contexts = {3: numbers.BASE_ALLOCATION}
    return made


class Far:
    """The server's end of a connection."""

    def __init__(self, kind: str) -> None:
        near, self.sock = socket.socketpair()
        self.agreed = agreed(kind)
        self.connection = Connection(Stream(near), self.agreed)
        self.form = transmission.EXTENDED_REQUEST if kind == "extended" else transmission.REQUEST
        self.replies = transmission.Replies(self.agreed)

    def heard(self) -> tuple[int, ...]:
        """The next request's header."""
        return self.form.unpack(self.take(self.form.size))

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            data += self.sock.recv(length - len(data))
        return data

    def close(self) -> None:
        self.sock.close()
        self.connection.close()


@pytest.fixture(params=["simple", "structured", "extended"])
def far(request):
    made = Far(request.param)
    yield made
    made.close()


def asked(far: Far, request: Request) -> threading.Thread:
    """Do a request in a thread; what it raises is in its failure."""

    def work() -> None:
        try:
            far.connection.call(request)
        except DiskwrightError as error:
            request.failure = error

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def read(offset: int, length: int) -> Request:
    return Request(Command.READ, (offset, length), into=memoryview(bytearray(length)))


def test_replies_in_another_order(far):
    """Ten requests at once; the last one is answered first, and byte by byte."""
    requests = [read(at * 100, 100) for at in range(10)]
    threads, heard = [], {}
    for request in requests:
        threads.append(asked(far, request))
        _, _, _, cookie, offset, length = far.heard()
        heard[offset] = cookie
        assert length == 100
    for offset in sorted(heard, reverse=True):
        data = bytes([offset // 100 + 1]) * 100
        for byte in far.replies.data(heard[offset], offset, 100) + data:
            far.sock.send(bytes([byte]))
    for at, (request, thread) in enumerate(zip(requests, threads, strict=True)):
        thread.join(10)
        assert bytes(request.into) == bytes([at + 1]) * 100 and request.failure is None
    assert far.connection.load == 0


def test_an_answer_in_pieces_and_with_holes():
    far = Far("structured")
    request = read(1000, 300)
    request.into[:] = b"x" * 300
    thread = asked(far, request)
    cookie = far.heard()[3]
    far.sock.send(far.replies.data(cookie, 1200, 100, done=False) + b"c" * 100)
    far.sock.send(far.replies.hole(cookie, 1100, 100, of=1000, done=False))
    far.sock.send(far.replies.data(cookie, 1000, 100, done=False) + b"a" * 100)
    far.sock.send(far.replies.done(cookie, 0))
    thread.join(10)
    assert bytes(request.into) == b"a" * 100 + bytes(100) + b"c" * 100
    far.close()


def test_an_error_leaves_the_connection(far):
    request = read(0, 10)
    thread = asked(far, request)
    far.sock.send(far.replies.error(far.heard()[3], 28, "full", 0))
    thread.join(10)
    assert request.error[0] == 28 and request.failure is None
    again = read(0, 10)
    thread = asked(far, again)
    far.sock.send(far.replies.data(far.heard()[3], 0, 10) + b"0123456789")
    thread.join(10)
    assert bytes(again.into) == b"0123456789"


@pytest.mark.parametrize("kind", ["simple", "structured", "extended"])
def test_cut_at_every_byte(kind):
    """However much of a reply comes before the end, all who wait are told."""
    sample = Far(kind)
    whole = sample.replies.data(1, 0, 10) + b"0123456789"
    sample.close()
    for cut in range(len(whole)):
        far = Far(kind)
        first, second = read(0, 10), read(10, 10)
        threads = [asked(far, first)]
        far.heard()
        threads.append(asked(far, second))
        far.heard()
        far.sock.send(whole[:cut])
        far.sock.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert first.failure is not None and second.failure is not None
        with pytest.raises(DiskwrightError):
            far.connection.call(read(0, 1))
        far.connection.close()


def lies() -> list[tuple[str, bytes]]:
    """(what is agreed on, an answer to a read of 10 bytes at 0 with the cookie 1)."""
    structured = transmission.Replies(agreed("structured"))
    extended = transmission.Replies(agreed("extended"))
    status = struct.pack(">III", 3, 10, 0)
    return [
        ("simple", b"\0" * 16),
        ("simple", transmission.SIMPLE_REPLY.pack(numbers.SIMPLE_REPLY_MAGIC, 0, 7)),
        ("simple", structured.done(1, 0)),
        ("structured", transmission.SIMPLE_REPLY.pack(numbers.SIMPLE_REPLY_MAGIC, 0, 1)),
        ("structured", structured.done(1, 0)),
        ("structured", structured.data(1, 0, 11)),
        ("structured", structured.data(1, 5, 10)),
        ("structured", structured.data(1, 0, 0)),
        ("structured", structured.hole(1, 1 << 40, 10, of=0)),
        ("structured", structured.hole(1, 0, 11, of=0)),
        ("structured", structured.header(Chunk.BLOCK_STATUS, 1, 0, 12, done=True) + status),
        ("structured", structured.header(99, 1, 0, 0, done=True)),
        ("structured", structured.header(Chunk.ERROR, 1, 0, 6, done=True) + bytes(6)),
        ("structured", structured.header(Chunk.NONE, 1, 0, 1 << 31, done=True)),
        ("structured", structured.data(1, 0, 5) + b"01234"),
        ("extended", structured.done(1, 0) + bytes(12)),
        ("extended", extended.data(2, 0, 10)),
    ]


@pytest.mark.parametrize("number", range(len(lies())))
def test_a_server_that_lies(number):
    kind, answer = lies()[number]
    far = Far(kind)
    request = read(0, 10)
    thread = asked(far, request)
    far.heard()
    far.sock.send(answer)
    thread.join(10)
    assert isinstance(request.failure, ProtocolError)
    far.close()


def test_block_status_is_taken_by_its_context():
    far = Far("structured")
    request = Request(Command.BLOCK_STATUS, (0, 1 << 20))
    thread = asked(far, request)
    cookie = far.heard()[3]
    far.sock.send(far.replies.status(cookie, (0, 3), [(4096, 0), (8192, 3)], done=False))
    far.sock.send(far.replies.done(cookie, 0))
    thread.join(10)
    assert request.extents == {3: [(4096, 0), (8192, 3)]}
    far.close()


def test_runs_are_asked_for_until_all_is_told():
    answers = {0: [(10, 1), (20, 0)], 30: [(5, 0)], 35: [(1000, 3)]}
    asked_for = []

    def ask(start: int, length: int):
        asked_for.append((start, length))
        return answers[start]

    assert runs_of(ask, 0, 100) == [(0, 10, 1), (10, 25, 0), (35, 65, 3)]
    assert asked_for == [(0, 100), (30, 70), (35, 65)]
    with pytest.raises(ProtocolError):
        runs_of(lambda start, length: [], 0, 10)


def test_a_thread_that_is_interrupted_within_a_reply_breaks_the_connection(monkeypatch):
    """What it has read of the reply is lost: nobody may take the rest for a new one."""
    far = Far("simple")
    request = read(0, 10)

    def interrupted(view):
        raise KeyboardInterrupt

    monkeypatch.setattr(far.connection._stream, "receive_into", interrupted)
    answer = far.replies.data(1, 0, 10) + b"0123456789"
    far.sock.send(answer)
    with pytest.raises(KeyboardInterrupt):
        far.connection.call(request)
    with pytest.raises(DiskwrightError, match="within a message"):
        far.connection.call(read(0, 10))
    far.close()


class OneExport:
    """What a server of one small disk offers."""

    def names(self):
        return [("", "")]

    def find(self, name):
        return Export(name, 1 << 20, 0)


def test_a_request_alone_may_look_for_its_reply():
    """As soon as there is another one, its thread is made room for."""
    near, far = socket.socketpair()
    with near, far:
        stream = Stream(near)
        connection = Connection(stream, Negotiated(Export("", 1 << 20, 0)))
        threads = []
        for number in (1, 2):

            def call(number: int = number) -> None:
                with pytest.raises(IOFailure):
                    connection.call(read(4096 * number, 512))

            threads.append(threading.Thread(target=call))
            threads[-1].start()
            assert len(far.recv(28, socket.MSG_WAITALL)) == 28
            assert connection.load == number
            assert stream.is_lone == (number == 1)
            assert not connection.retire()
        far.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def hang_up_after_each_handshake(listener: socket.socket, count: list[int]) -> None:
    """A server that everybody can connect to, and that dies of every request."""
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        with sock:
            count[0] += 1
            stream = Stream(sock.dup())
            stream.converse(ServerHandshake(OneExport()).run())
            sock.recv(1)
            stream.close()


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_server_that_dies_of_each_request_is_given_up(tmp_path, seconds):
    count = [0]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        server = threading.Thread(target=hang_up_after_each_handshake, args=(listener, count))
        server.start()
        link = Link(address.Address(path=str(tmp_path / "s")), reconnect_seconds=seconds)
        began = time.monotonic()
        with pytest.raises(IOFailure, match="lost"):
            link.call(read(0, 512))
        assert time.monotonic() - began < 10
        assert count[0] == 1 if not seconds else 2 <= count[0] <= 12
        link.close()
        listener.shutdown(socket.SHUT_RDWR)
        server.join(10)
        assert not server.is_alive()


def test_connections_come_and_go_beside_requests(tmp_path, monkeypatch):
    """What meets a connection that is being given back goes over another; nobody sees it."""
    monkeypatch.setattr(link, "_IDLE_SECONDS", 0.0005)
    retired = []
    retire = Connection.retire
    monkeypatch.setattr(Connection, "retire", lambda self: retire(self) and not retired.append(1))
    choose = Link._choose

    def choose_and_wait(self: Link, deadline: float) -> Connection:
        chosen = choose(self, deadline)
        time.sleep(0.001)  # so that it may be given back meanwhile
        return chosen

    monkeypatch.setattr(Link, "_choose", choose_and_wait)
    data = random.Random(5).randbytes(1 << 20)
    (tmp_path / "i").write_bytes(data)
    failed = []
    with diskwright.open(str(tmp_path / "i"), format="raw") as disk:
        with diskwright.serve({"": disk}, path=str(tmp_path / "s")) as service:
            with diskwright.open(service.uris[""], format="raw") as node:

                def read(seed: int) -> None:
                    rng = random.Random(seed)
                    for _ in range(200):
                        at, length = rng.randrange(1 << 19), rng.randrange(1, 4096)
                        try:
                            assert node.read(at, length) == data[at : at + length]
                        except (AssertionError, DiskwrightError) as error:
                            failed.append(error)
                        time.sleep(rng.choice((0, 0, 0, 0.001)))

                threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    assert not failed
    assert len(retired) > 10


def test_the_last_connection_is_kept(tmp_path, monkeypatch):
    """Though it is a further one, and idle: a server may end with its last client."""
    monkeypatch.setattr(link, "_IDLE_SECONDS", 0.01)
    (tmp_path / "i").write_bytes(bytes(4096))
    with diskwright.open(str(tmp_path / "i"), format="raw") as disk:
        with diskwright.serve({"": disk}, path=str(tmp_path / "s")):
            made = Link(address.from_options({"path": str(tmp_path / "s")}))
            (first,) = made._connections
            threading.Thread(target=made._grow).start()
            while len(made._connections) < 2:
                time.sleep(0.001)
            made._drop(first)
            (further,) = made._connections
            time.sleep(0.1)
            assert made._connections == [further]
            assert further.failure is None
            made.close()


def test_how_many_connections():
    for number in (0, 17, -1):
        spec = {"driver": "nbd", "path": "/nosuch", "multi-conn": number}
        with pytest.raises(OptionError, match="from 1 to 16"):
            diskwright.open(spec)


def test_a_farewell_that_cannot_be_sent_is_no_failure():
    near, far = socket.socketpair()

    class Broken(Stream):
        def send(self, *buffers):
            raise IOFailure("The TLS connection broke", errno=5)

    with far:
        Connection(Broken(near), agreed("simple")).close()
        assert far.recv(1) == b""


def test_who_is_cancelled_while_it_says_farewell_leaves_nothing_open():
    near, far = socket.socketpair()

    class Cancelled(Stream):
        def send(self, *buffers):
            raise CancelledError("The operation was cancelled")

    with far:
        connection = Connection(Cancelled(near), agreed("simple"))
        with pytest.raises(CancelledError):
            connection.close()
        assert near.fileno() == -1
        connection.close()  # has nothing to do any more


def test_who_closes_at_the_same_time_says_farewell_once():
    """A connection that is given back may be closed with all others meanwhile."""
    near, far = socket.socketpair()
    ready, sent, left = threading.Barrier(2), [], []

    class Slow(Stream):
        def send(self, *buffers):
            sent.append(buffers)
            time.sleep(0.1)  # so that both would be here
            super().send(*buffers)

    connection = Connection(Slow(near), agreed("simple"))
    assert connection.retire()

    def close():
        ready.wait(10)
        connection.close()
        left.append(near.fileno())

    with far:
        threads = [threading.Thread(target=close) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        heard = b""
        while data := far.recv(1000):
            heard += data
    assert transmission.REQUEST.unpack(heard)[2] == Command.DISC
    assert len(sent) == 1
    assert left == [-1, -1]  # who came second waited for the end


def test_addresses_of_the_other_kind_have_a_number_of_this_one(tmp_path, monkeypatch):
    """With ipv4=off an address of IPv4 is reached through that of IPv6 which stands for it."""
    connect, used = stream._connect, []

    def connected(sock: socket.socket, *place: object) -> None:
        used.append((sock.family, sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)))
        connect(sock, *place)

    monkeypatch.setattr(stream, "_connect", connected)
    (tmp_path / "disk").write_bytes(b"d" * 512)
    with diskwright.open(str(tmp_path / "disk"), format="raw") as disk:
        with diskwright.serve({"": disk}, host="127.0.0.1") as service:
            port = service.uris[""].rpartition(":")[2].strip("/")
            tcp = socket.IPPROTO_TCP
            switches = [
                ({"ipv4": False}, (socket.AF_INET6, tcp)),
                ({"mptcp": False}, (socket.AF_INET, tcp)),
            ]
            if os.path.exists("/proc/sys/net/mptcp"):
                switches.append(({"mptcp": True}, (socket.AF_INET, 262)))
            for switch, wanted in switches:
                server = {"type": "inet", "host": "127.0.0.1", "port": port, **switch}
                spec = {"driver": "raw", "file": {"driver": "nbd", "server": server}}
                with diskwright.open(spec) as node:
                    assert node.read(0, 512) == b"d" * 512
                assert used.pop() == wanted


def test_the_default_export_is_named_where_it_was(tmp_path):
    asked = {"path": str(tmp_path / "s")}
    assert str(address.from_options(asked)) == f"nbd+unix://?socket={tmp_path / 's'}"
    asked["export"] = ""
    assert str(address.from_options(asked)) == f"nbd+unix:///?socket={tmp_path / 's'}"
