"""`crypto/tls` and its channel: one thread sends while another receives, and cuts are told."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading

import pytest

from diskwright.block import objects
from diskwright.crypto.tls import Credentials, PskCredentials, SystemCredentials, X509Credentials
from diskwright.crypto.tls_channel import Channel
from diskwright.drivers.protocols.nbd import security
from diskwright.drivers.protocols.nbd.address import Address
from diskwright.drivers.protocols.nbd.stream import Stream
from diskwright.errors import AccessError, DiskwrightError, IOFailure, OptionError
from diskwright.wire.nbd.messages import ProtocolError
from tests.conftest import require
from tests.differential import certificates

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if shutil.which("openssl") is None:
        require("openssl")
    made = tmp_path_factory.mktemp("certificates")
    certificates.make(made)
    return made


class Pipe:
    """Bytes between two sockets, passed on in pieces, up to a cut."""

    def __init__(self, *, piece: int = 65536, cut: int | None = None) -> None:
        self.near, self._left = socket.socketpair()
        self.far, self._right = socket.socketpair()
        self._piece, self._left_over = piece, cut
        self.threads = [
            threading.Thread(target=self._pass, args=(self._left, self._right, False)),
            threading.Thread(target=self._pass, args=(self._right, self._left, True)),
        ]
        for thread in self.threads:
            thread.start()

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(self._piece):
                if counted and self._left_over is not None:
                    data = data[: self._left_over]
                    self._left_over -= len(data)
                    target.sendall(data)
                    if not self._left_over:
                        break
                else:
                    target.sendall(data)
        except OSError:
            pass
        for sock in (source, target):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def end(self) -> None:
        for sock in (self.near, self.far, self._left, self._right):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        for sock in (self.near, self.far, self._left, self._right):
            sock.close()


class Server(threading.Thread):
    """The other side: sends back what it hears."""

    def __init__(self, sock: socket.socket, trust: Credentials) -> None:
        super().__init__()
        self._sock = sock
        self._trust = trust
        self.error: DiskwrightError | None = None
        self.start()

    def run(self) -> None:
        try:
            channel = Channel(self._sock, self._trust)
            view = memoryview(bytearray(100_000))
            while count := channel.recv_into(view):
                channel.send(view[:count])
        except DiskwrightError as error:
            self.error = error
        except OSError:
            pass  # the client has gone


def named(folder) -> Credentials:
    return X509Credentials(str(folder / "server"), endpoint="server", verify_peer=False)


@pytest.mark.parametrize("piece", [1, 7, 65536])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_both_directions_at_once(folder, rng, piece, version):
    pipe = Pipe(piece=piece)
    server = Server(pipe.far, named(folder))
    trust = X509Credentials(str(folder / "client"), priority=f"NORMAL:-VERS-ALL:+VERS-TLS{version}")
    channel = Channel(pipe.near, trust, "localhost")
    data = rng.randbytes(3000 if piece == 1 else 100_000 if piece == 7 else 8 * MIB)
    back = bytearray(len(data))
    reader = threading.Thread(
        target=lambda: channel.recv_into(memoryview(back), 0, socket.MSG_WAITALL)
    )
    reader.start()
    half = len(data) // 2
    assert channel.sendmsg([data[:100], memoryview(data)[100:half]]) == half
    channel.send(data[half:])
    reader.join(60)
    assert bytes(back) == data
    channel.shutdown(socket.SHUT_RDWR)
    channel.close()
    server.join(20)
    assert not server.is_alive()
    assert server.error is None
    pipe.end()


def test_a_receiver_is_woken(folder):
    pipe = Pipe()
    server = Server(pipe.far, named(folder))
    channel = Channel(pipe.near, X509Credentials(str(folder / "client")), "localhost")
    heard: list[object] = []

    def wait() -> None:
        try:
            heard.append(channel.recv_into(memoryview(bytearray(10))))
        except (IOFailure, OSError) as error:
            heard.append(error)

    reader = threading.Thread(target=wait)
    reader.start()
    channel.shutdown(socket.SHUT_RDWR)
    reader.join(20)
    assert len(heard) == 1
    server.join(20)
    pipe.end()


def test_cut_anywhere(folder):
    """Wherever the server's bytes end, whoever waits hears of it: never of data."""
    for cut in (*range(0, 1200, 97), 1300, 1400, 1500):
        pipe = Pipe(cut=cut)
        server = Server(pipe.far, named(folder))
        try:
            channel = Channel(pipe.near, X509Credentials(str(folder / "client")), "localhost")
            channel.send(b"x" * 100_000)
            view = memoryview(bytearray(100_000))
            count = channel.recv_into(view, 0, socket.MSG_WAITALL)
            assert count < 100_000
        except (DiskwrightError, OSError):
            pass
        pipe.end()
        server.join(20)
        assert not server.is_alive()


def test_who_it_is_not(folder):
    for kind, name, sentence in (
        ("client", "elsewhere", "does not match the hostname elsewhere"),
        ("client", "", "does not match the hostname "),
        ("client", None, "No hostname"),
        ("client", ".x", "does not match"),
        ("client", "a" * 70, "does not match"),
        ("stranger", "localhost", "known issuer"),
        ("recalled", "localhost", "revoked"),
    ):
        pipe = Pipe()
        server = Server(pipe.far, named(folder))
        with pytest.raises((AccessError, OptionError), match=sentence):
            Channel(pipe.near, X509Credentials(str(folder / kind)), name)
        pipe.end()
        server.join(20)


def test_no_tls_at_all(folder):
    near, far = socket.socketpair()
    far.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(IOFailure):
        Channel(near, X509Credentials(str(folder / "client")), "localhost")
    near.close()
    far.close()


def test_plain_text_where_tls_begins(folder):
    """What comes in one piece with the answer that begins TLS was put there by somebody else."""
    near, far = socket.socketpair()
    far.sendall(b"answer" + b"and more")
    stream = Stream(near)

    def steps():
        yield 6
        yield None

    with pytest.raises(ProtocolError, match="plain text"):
        stream.converse(
            steps(),
            security.Security(X509Credentials(str(folder / "client")), "localhost"),
        )
    near.close()
    far.close()


@pytest.mark.parametrize("priority", ["", "NORMAL", "@SYSTEM,NORMAL", "NORMAL:-VERS-TLS1.2"])
def test_priorities(folder, priority):
    context = X509Credentials(str(folder / "client"), priority=priority).context()
    assert (context.minimum_version.name == "TLSv1_3") is ("TLS1.2" in priority)


@pytest.mark.parametrize(
    "priority", ["FOO", "NORMAL:-VERS-ALL", "NORMAL:+AES-128-GCM", "NORMAL:+VERS-TLS1.0"]
)
def test_priorities_that_cannot_be_kept(folder, priority):
    with pytest.raises(OptionError, match="cannot be kept|can be kept"):
        X509Credentials(str(folder / "client"), priority=priority).context()


def test_keys(tmp_path):
    place = tmp_path / "keys.psk"
    place.write_text("other:zz\nme:00\n")
    with pytest.raises(OptionError, match="Username qemu"):
        PskCredentials(str(tmp_path))
    with pytest.raises(OptionError, match="hexadecimal"):
        PskCredentials(str(tmp_path), username="other")
    with pytest.raises(OptionError, match="hexadecimal"):
        PskCredentials(str(tmp_path), endpoint="server")


@pytest.mark.skipif(
    not hasattr(ssl.SSLContext, "set_psk_client_callback"), reason="Python 3.13's ssl has them"
)
@pytest.mark.parametrize(
    ("line", "name", "good"),
    [("qemu:00ff", "qemu", True), ("me:00ff", "me", True), ("me:00fe", "me", False)],
)
def test_keys_on_both_sides(tmp_path, line, name, good):
    for folder, written in (("client", line), ("server", "qemu:00ff\nme:00ff\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "keys.psk").write_text(written)
    pipe = Pipe()
    server = Server(pipe.far, PskCredentials(str(tmp_path / "server"), endpoint="server"))
    trust = PskCredentials(str(tmp_path / "client"), username=name)
    try:
        channel = Channel(pipe.near, trust)
        channel.send(b"heard")
        view = memoryview(bytearray(5))
        assert channel.recv_into(view, 0, socket.MSG_WAITALL) == 5
        assert bytes(view) == b"heard"
        channel.shutdown(socket.SHUT_WR)
        server.join(20)
    except IOFailure:
        assert not good
    else:
        assert good
    pipe.end()
    server.join(20)
    assert (server.error is None) is good


def test_objects_by_name(folder):
    with pytest.raises(OptionError, match="No TLS credentials"):
        security.named("mine")
    objects.add("mine", b"secret")
    try:
        with pytest.raises(OptionError, match="duplicate"):
            objects.add("mine", b"another")
        with pytest.raises(OptionError, match="is not TLS credentials"):
            security.named("mine")
    finally:
        objects.remove("mine")
    server = X509Credentials(str(folder / "server"), endpoint="server")
    with pytest.raises(OptionError, match="client endpoint"):
        security.named(server)


def test_options():
    where = Address(host="somewhere")
    assert security.from_options({}, where) is None
    found = security.from_options({"tls": True}, where)
    assert found.hostname == "somewhere"
    assert isinstance(found.credentials, SystemCredentials)
    assert found.credentials.names_peer
    assert security.from_options({"tls": True}, Address(path="/s")).hostname is None
    found = security.from_options({"tls": True, "tls-verify-peer": False}, where)
    assert not found.credentials.names_peer
