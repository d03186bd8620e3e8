"""`exports/nbd`: what a server does for clients that behave, and for those that do not."""

from __future__ import annotations

import os
import random
import struct
import threading
import time

import pytest

import diskwright
from diskwright.block import around
from diskwright.block.extent import DATA
from diskwright.errors import IOFailure, NotFoundError, OptionError
from diskwright.exports.nbd.cold import Cold
from diskwright.exports.nbd.export import NodeExport
from diskwright.exports.nbd.listening import given_sockets, inet_sockets, unix_socket
from diskwright.exports.nbd.requests import Executor
from diskwright.exports.nbd.server import NbdServer
from diskwright.system import host
from diskwright.wire.nbd.numbers import Command, Error, Flag, Transmission
from tests.unit.nbd_peers import KINDS, MODES, SIZE, Client, made, running


@pytest.fixture(params=["around", "cold", "through"])
def bypass(request, monkeypatch):
    """Going around the node's operations, for files that are in memory or not; and through them."""
    monkeypatch.setattr(around, "is_open", request.param != "through")
    if request.param == "cold":
        always = property(lambda self: True, lambda self, value: None)
        monkeypatch.setattr(Cold, "is_on", always, raising=False)
    return request.param


def forget(path: str) -> None:
    """Have the system drop a file's pages, those that are written."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.fixture
def rng(request):
    return random.Random(request.node.name)


# ------------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_everything_in_any_order(tmp_path, kind, mode, bypass, rng):
    """300 requests drawn at random, and a model of what the disk has after each."""
    model = bytearray(SIZE)
    with made(tmp_path, kind) as node, running(node, tmp_path) as here:
        client = here.client(mode)
        for _ in range(300):
            offset = rng.randrange(SIZE)
            length = min(rng.choice((1, 512, 4096, 70000, 300_000, 1 << 20)), SIZE - offset)
            if bypass == "cold" and rng.random() < 0.1:
                forget(node.filename)
            command = rng.choice(
                (Command.READ, Command.READ, Command.WRITE, Command.WRITE_ZEROES, Command.FLUSH)
            )
            if command == Command.READ:
                flags = Flag.DF if mode != "simple" and rng.random() < 0.3 else 0
                assert client.read(offset, length, flags) == model[offset : offset + length]
            elif command == Command.WRITE:
                data = rng.randbytes(length)
                client.write(offset, data, rng.choice((0, 0, Flag.FUA)))
                model[offset : offset + length] = data
            elif command == Command.WRITE_ZEROES:
                assert not client.do(command, offset, length, rng.choice((0, Flag.NO_HOLE)))
                model[offset : offset + length] = bytes(length)
            else:
                assert not client.do(command)
        assert client.read(0, SIZE) == model
        client.leave()
    with diskwright.open(node.filename, format=node.driver) as again:
        assert again.read(0, SIZE) == model


@pytest.mark.parametrize("mode", MODES)
def test_requests_that_wait_for_each_other(tmp_path, mode, bypass, rng):
    """Hundreds in one piece of input: each reply has the bytes of its request."""
    with made(tmp_path, "qcow2") as node, running(node, tmp_path) as here:
        stamp = b"".join(struct.pack(">Q", at) * 64 for at in range(0, SIZE, 512))
        node.write(0, stamp)
        forget(node.filename)
        client = here.client(mode)
        asked = {}
        sent = bytearray()
        client.send = sent.extend
        for _ in range(600):
            offset = rng.randrange(0, SIZE - 8192, 512)
            asked[client.ask(Command.READ, offset, 4096)] = offset
        thread = threading.Thread(target=client.sock.sendall, args=(bytes(sent),))
        thread.start()
        for _ in range(600):
            cookie, error, data, _ = client.reply(4096)
            offset = asked.pop(cookie)
            assert not error
            assert data == stamp[offset : offset + 4096]
        thread.join()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("ways_around")
def test_reads_of_many_clusters_go_around_the_node(tmp_path, mode, monkeypatch, rng):
    """Wherever in the file they lie; and a hole among them is left to the node."""
    path = str(tmp_path / "i.qcow2")
    cluster = 65536
    diskwright.create(path, SIZE, format="qcow2", options={"cluster_size": cluster})
    stamp = rng.randbytes(SIZE)
    hole = rng.randrange(SIZE // cluster - 1)
    asked: list[tuple[int, int]] = []
    read_into = Executor.read_into
    execute = Executor.execute

    def noted_read(self, offset, view):
        asked.append((offset, len(view)))
        read_into(self, offset, view)

    def noted(self, command, about, payload, scratch):
        if command == Command.READ:
            asked.append((about[2], about[3]))
        return execute(self, command, about, payload, scratch)

    monkeypatch.setattr(Executor, "read_into", noted_read)
    monkeypatch.setattr(Executor, "execute", noted)
    with diskwright.open(path, format="qcow2", read_only=False) as node:
        order = list(range(SIZE // cluster))
        rng.shuffle(order)  # neighbours lie far from each other
        for at in order:
            if at != hole:
                node.write(at * cluster, stamp[at * cluster : (at + 1) * cluster])
        node.flush()
        with running(node, tmp_path) as here:
            client = here.client(mode)
            for _ in range(50):
                length = rng.choice((100, 70_000, 200_000, 1 << 20))
                offset = rng.randrange(SIZE - length)
                asked.clear()
                data = client.read(offset, length)
                start, stop = hole * cluster, (hole + 1) * cluster
                wanted = bytearray(stamp)
                wanted[start:stop] = bytes(cluster)
                assert data == wanted[offset : offset + length]
                if offset + length <= start or offset >= stop:
                    assert asked == []
            client.leave()


@pytest.mark.parametrize("mode", MODES)
def test_a_byte_at_a_time(tmp_path, mode):
    with made(tmp_path) as node, running(node, tmp_path) as here:
        sock = here.connect()

        def slowly(data: bytes) -> None:
            for byte in data:
                sock.send(bytes([byte]))

        client = Client(sock, mode, send=slowly)
        client.write(1000, b"x" * 600)
        assert client.read(999, 602) == b"\0" + b"x" * 600 + b"\0"


def test_block_status(tmp_path):
    node = made(tmp_path, "qcow2")
    with node:
        node.write(8192, b"x" * 4096)
        node.write_zeroes(16384, 4096)
        with running(node, tmp_path, depth=True) as here:
            for mode in ("structured", "extended"):
                client = here.client(mode, contexts=("base:allocation", "qemu:allocation-depth"))
                first, second = client.status(0, 65536)
                assert first == (0, [(8192, 3), (4096, 0), (65536 - 12288, 3)])
                assert [bits for _, bits in second[1]] == [0, 1, 0, 1, 0]
                (one, _) = client.status(0, 65536, one=True)
                assert one == (0, [(8192, 3)])
                client.leave()


def test_a_dirty_bitmap(tmp_path):
    node = made(tmp_path, "qcow2")
    with node:
        node.bitmap_add("b", granularity=4096)
        node.write(8192, b"x" * 4096)
        with running(node, tmp_path, bitmaps=("b",)) as here:
            client = here.client(contexts=("qemu:dirty-bitmap:b",))
            assert client.status(0, 65536) == [(0, [(8192, 0), (4096, 1), (53248, 0)])]
            client.write(20480, b"y")
            assert client.status(16384, 8192) == [(0, [(4096, 0), (4096, 1)])]
        with pytest.raises(NotFoundError):
            NodeExport(node, bitmaps=("c",))


def test_status_of_chosen_contexts(tmp_path):
    """A block status with a payload names contexts and may be longer than 32 bits."""
    with made(tmp_path) as node, running(node, tmp_path, depth=True) as here:
        client = here.client("extended", contexts=("base:allocation", "qemu:allocation-depth"))
        for body, error in (
            (struct.pack(">QI", 4096, 1), 0),
            (struct.pack(">QI", 4096, 7), Error.EINVAL),
            (struct.pack(">QII", 4096, 1, 1), Error.EINVAL),
            (struct.pack(">Q", 4096), Error.EINVAL),
            (struct.pack(">QI", SIZE + 1, 1), Error.EINVAL),
            (struct.pack(">QIB", 4096, 1, 0), Error.EINVAL),
        ):
            client.ask(Command.BLOCK_STATUS, 0, len(body), Flag.PAYLOAD_LEN, body)
            _, found, _, statuses = client.reply()
            assert found == error
            assert [number for number, _ in statuses] == ([] if error else [1])


def test_a_size_that_is_no_whole_sector(tmp_path):
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    with diskwright.open(path, format="raw", read_only=False) as node:
        with running(node, tmp_path) as here:
            client = here.client()
            assert client.agreed.export.size == 1024
            assert client.read(900, 124) == b"x" * 100 + bytes(24)
            assert client.status(0, 1024) == [(0, [(1000, 0), (24, 3)])]
            client.write(990, b"y" * 34)
            assert client.read(980, 44) == b"x" * 10 + b"y" * 34
    assert path.read_bytes() == b"x" * 990 + b"y" * 34


def test_a_node_grows_as_far_as_it_is_written(tmp_path):
    """Not to its sector's end: what opens the file by another name sees its bytes alone."""
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    with diskwright.open(path, format="raw", read_only=False) as node:
        with running(node, tmp_path) as here:
            client = here.client()
            client.write(999, b"yz")
            assert client.do(Command.WRITE_ZEROES, 1003, 2) == 0
            client.write(1002, b"q")
    assert path.read_bytes() == b"x" * 999 + b"yz" + bytes(1) + b"q" + bytes(2)


def test_who_may_not_write(tmp_path):
    with made(tmp_path) as node, running(node, tmp_path, read_only=True) as here:
        client = here.client()
        assert client.agreed.export.flags & Transmission.READ_ONLY
        client.ask(Command.WRITE, 0, 5, 0, b"hello")
        assert client.reply()[1] == Error.EPERM
        assert client.do(Command.WRITE_ZEROES, 0, 512) == Error.EINVAL
        assert client.do(Command.FLUSH) == 0
        assert client.read(0, 5) == bytes(5)


@pytest.mark.parametrize("clients", [0, 1, 2])
def test_several_connections_are_offered_where_there_may_be_several(tmp_path, clients):
    with made(tmp_path) as node:
        flags = NodeExport(node, clients=clients).told.flags
        assert bool(flags & Transmission.CAN_MULTI_CONN) == (clients != 1)


# ----------------------------------------------------------------------------- refusals


REFUSED = [
    (Command.READ, 0, SIZE, 1, Error.EINVAL),
    (Command.READ, 0, SIZE - 1, 2, Error.EINVAL),
    (Command.READ, 0, (1 << 64) - 512, 512, Error.EINVAL),
    (Command.READ, 0, 0, (32 << 20) + 1, Error.EINVAL),
    (Command.READ, 1 << 9, 0, 512, Error.EINVAL),
    (Command.TRIM, 0, SIZE, 1, Error.EINVAL),
    (Command.WRITE_ZEROES, 0, SIZE, 1, Error.ENOSPC),
    (Command.BLOCK_STATUS, 0, 0, 0, Error.EINVAL),
    (Command.FLUSH, 1, 0, 512, 0),
    (Command.RESIZE, 0, 0, 512, Error.EINVAL),
    (77, 0, 0, 0, Error.EINVAL),
    (0xFFFF, 0, 0, 0, Error.EINVAL),
]


@pytest.mark.parametrize("mode", MODES)
def test_refused_requests_harm_nobody(tmp_path, mode):
    with made(tmp_path) as node, running(node, tmp_path) as here:
        client, other = here.client(mode), here.client("structured")
        for command, flags, offset, length, error in REFUSED:
            assert client.do(command, offset, length, flags) == error
            client.write(512, b"still here")
        client.ask(Command.WRITE, SIZE - 1, 2000, 0, b"z" * 2000)
        assert client.reply()[1] == Error.ENOSPC
        client.ask(Command.WRITE, 0, 400_000, 1 << 8, b"z" * 400_000)
        assert client.reply()[1] == Error.EINVAL
        assert other.read(512, 10) == client.read(512, 10) == b"still here"


def test_errors_of_the_node_have_their_number(tmp_path):
    path = tmp_path / "disk"
    diskwright.create(str(path), SIZE, format="raw")
    rules = [
        {"event": "read_aio", "errno": 5, "sector": 8},
        {"event": "write_aio", "errno": 28, "sector": 8},
    ]
    name = {
        "driver": "raw",
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": str(path)},
            "inject-error": [{**rule, "iotype": rule["event"][:-4]} for rule in rules],
        },
    }
    with diskwright.open(name, read_only=False) as node, running(node, tmp_path) as here:
        for mode in MODES:
            client = here.client(mode)
            assert client.do(Command.READ, 4096, 512) == Error.EIO
            client.ask(Command.WRITE, 4096, 512, 0, bytes(512))
            assert client.reply()[1] == Error.ENOSPC
            client.ask(Command.WRITE, 0, 1 << 20, 0, bytes(1 << 20))
            assert client.reply()[1] == Error.ENOSPC
            assert client.read(8192, 512) == bytes(512)


@pytest.mark.parametrize("mode", ["structured", "extended"])
def test_the_middle_of_a_long_request_fails(tmp_path, mode):
    """Chunks end with an error; without chunks the connection ends: nothing else can be said."""
    bad = 1 << 20
    path = tmp_path / "disk"
    diskwright.create(str(path), SIZE, format="raw")
    with path.open("r+b") as file:
        file.write(b"d" * (bad - 65536))
        file.seek(bad)  # before it lies a hole
        file.write(b"d" * (SIZE - bad))
    name = {
        "driver": "raw",
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": str(path)},
            "inject-error": [
                {"event": f"{kind}_aio", "iotype": kind, "errno": 5, "sector": bad // 512}
                for kind in ("read", "write")
            ],
        },
    }
    with diskwright.open(name, read_only=False) as node, running(node, tmp_path) as here:
        client = here.client(mode)
        assert client.do(Command.READ, 512, 4 << 20) == Error.EIO
        assert client.do(Command.READ, bad - 65536, 1 << 17) == Error.EIO
        client.ask(Command.WRITE, bad - (1 << 19), 1 << 20, 0, b"n" * (1 << 20))
        assert client.reply()[1] == Error.EIO
        assert client.read(0, bad - (1 << 19)) == b"d" * (bad - (1 << 19))
        simple = here.client("simple")
        with pytest.raises(EOFError):
            simple.read(0, 4 << 20)
        assert here.client("simple").read(0, 512) == b"d" * 512


def test_a_file_that_became_shorter(tmp_path):
    """Its pages are gone: the node's own way to read is used, and nothing ends the process."""
    node = made(tmp_path)
    with node, running(node, tmp_path) as here:
        client = here.client()
        client.write(0, b"x" * 65536)
        assert client.read(0, 4096) == b"x" * 4096
        os.truncate(node.filename, 8192)
        assert client.read(4096, 8192) == b"x" * 4096 + bytes(4096)
        assert client.read(0, 512) == b"x" * 512


# ------------------------------------------------------------------------------ several clients


def test_no_more_clients_than_allowed(tmp_path):
    with made(tmp_path) as node, running(node, tmp_path, clients=2) as here:
        first, _second = here.client(), here.client()
        third = here.connect()
        third.settimeout(0.3)
        with pytest.raises(TimeoutError):
            third.recv(1)
        first.leave()
        third.settimeout(10)
        assert third.recv(8) == b"NBDMAGIC"


def test_two_clients_that_write_the_same_places(tmp_path, rng):
    """Each block read is one that somebody wrote, whole."""
    node = made(tmp_path, "qcow2", size=1 << 20)
    wrong: list[bytes] = []
    with node, running(node, tmp_path, clients=2) as here:

        def work(number: int) -> None:
            mine = random.Random(number)
            client = here.client(MODES[number + 1])
            for turn in range(400):
                at = mine.randrange(256) * 4096
                if mine.random() < 0.5:
                    stamp = struct.pack(">QHH", at, number, turn)
                    client.write(at, (stamp * 342)[:4096])
                else:
                    data = client.read(at, 4096)
                    blank = data == bytes(4096)
                    if not blank and (
                        data[:8] != struct.pack(">Q", at) or data != (data[:12] * 342)[:4096]
                    ):
                        wrong.append(data)
            client.leave()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
    assert not diskwright.check(node.filename).corruptions


def test_pages_that_another_client_changes(tmp_path):
    """Replies that wait for a stalled client have bytes of the time when they were asked for.

    Each sector carries its own number: no reader may ever see another one's.
    """
    node = made(tmp_path, "qcow2")
    with node, running(node, tmp_path) as here:
        stamp = b"".join(struct.pack(">Q", at) * 64 for at in range(0, SIZE, 512))
        node.write(0, stamp)
        stalled = here.client("structured")
        for at in range(0, SIZE, 1 << 18):
            stalled.ask(Command.READ, at, 1 << 18)
        time.sleep(0.2)
        for at in range(0, SIZE, 1 << 20):  # give the space up, and use it for something else
            node.discard(at, 1 << 20)
            node.flush()
        node.write(0, b"".join(struct.pack(">Q", at) * 64 for at in range(0, SIZE, 512)))
        for _ in range(SIZE >> 18):
            cookie, error, data, _ = stalled.reply(1 << 18)
            begin = (cookie - 1) << 18
            assert not error
            for sector in range(0, 1 << 18, 512):
                piece = data[sector : sector + 512]
                assert piece in (bytes(512), struct.pack(">Q", begin + sector) * 64)


def test_a_node_that_is_busy_otherwise(tmp_path):
    """Whoever has the graph alone is waited for, and requests go on afterwards."""
    with made(tmp_path, "qcow2") as node, running(node, tmp_path) as here:
        client = here.client()
        with node.graph.exclusive():
            client.ask(Command.READ, 0, 512)
            client.sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.reply(512)
        client.sock.settimeout(10)
        assert client.reply(512)[1] == 0


def test_slow_requests_do_not_hold_up_others_of_the_same_client(tmp_path):
    """On a node whose requests take long, several of one client are under way at once."""
    node = made(tmp_path)
    slow = node.children["file"].node
    plain = type(slow)._read_into
    lock, inside, most = threading.Lock(), [0], [0]

    class Slow(type(slow)):
        def _read_into(self, offset, view):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            plain(self, offset, view)
            with lock:
                inside[0] -= 1

        def _lend(self):
            return None

    slow.__class__ = Slow
    with node.graph.exclusive():
        node._attach_lent()
    with node, running(node, tmp_path) as here:
        client = here.client()
        for at in range(8):  # one after the other, until the server knows
            client.read(at * 4096, 512)
        assert most == [1]
        for at in range(32):
            client.ask(Command.READ, at * 4096, 512)
        assert {client.reply(512)[0] for _ in range(32)} == set(range(9, 41))
        assert most[0] >= 4


# ----------------------------------------------------------------------------- ends and names


def test_what_was_asked_before_the_end_is_answered(tmp_path):
    with made(tmp_path) as node:
        with running(node, tmp_path) as here:
            client = here.client()
            for at in range(50):
                client.ask(Command.WRITE, at * 512, 512, 0, bytes([at]) * 512)
            time.sleep(0.1)
            here.server.stop()
            for _ in range(50):
                assert not client.reply()[1]
            assert client.sock.recv(1) == b""
        assert node.read(512 * 49, 1) == bytes([49])


def test_names_of_exports(tmp_path):
    with made(tmp_path) as node:
        with pytest.raises(OptionError, match="too long"):
            NodeExport(node, "n" * 4097)
        twice = [NodeExport(node, "a"), NodeExport(node, "a")]
        with pytest.raises(OptionError, match="two exports"):
            NbdServer(twice)


def test_sockets(tmp_path):
    with pytest.raises(OptionError, match="too long"):
        unix_socket("/" + "x" * 200)
    plain = tmp_path / "file"
    plain.write_bytes(b"data")
    with pytest.raises(IOFailure, match="Address already in use"):
        unix_socket(str(plain))
    assert plain.read_bytes() == b"data"
    old = unix_socket(str(tmp_path / "s"))
    unix_socket(str(tmp_path / "s")).close()
    old.close()
    (taken,) = inet_sockets("127.0.0.1", "0")
    taken.listen()
    port = str(taken.getsockname()[1])
    with pytest.raises(IOFailure, match="Failed to find an available port"):
        inet_sockets("127.0.0.1", port)
    taken.close()
    with pytest.raises(IOFailure, match="address resolution failed"):
        inet_sockets("127.0.0.1", "no-such-service")


def test_a_socket_that_was_given(monkeypatch):
    assert given_sockets() == []
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "2")
    with pytest.raises(OptionError, match="LISTEN_FDS"):
        given_sockets()
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert given_sockets() == []


def test_a_service(tmp_path):
    """The library's way: nodes under names, in threads, until the block ends."""
    with made(tmp_path, "qcow2") as node:
        with diskwright.serve({"": node, "b": node}, path=str(tmp_path / "x")) as service:
            assert set(service.uris) == {"", "b"}
            with diskwright.open(service.uris["b"], format="raw", read_only=False) as far:
                far.write(100, b"far")
            assert node.read(100, 3) == b"far"
        assert not (tmp_path / "x").exists()
        service.stop()
        with pytest.raises(OptionError):
            diskwright.serve({})


def test_what_is_to_be_cached_is_brought_from_where_it_lies(tmp_path, monkeypatch):
    """CACHE asks for the clusters that the image has, where they lie in its file, and no others."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(host, "advise_needed", lambda _, *where: asked.append(where))
    with made(tmp_path, "qcow2") as node, running(node, tmp_path) as here:
        node.write(8192, bytes([1]) * 8192)
        client = here.client()
        assert client.do(Command.CACHE, 0, 1 << 20) == 0
        assert client.do(Command.CACHE, 1 << 20, 1 << 20) == 0
        (place,) = (one for one in node.resolve(0, SIZE) if one.kind == DATA)
        assert asked == [(place.host_offset, 8192)]
