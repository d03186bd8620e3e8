"""Encrypted connections to NBD servers: who is let in, who is refused, and with what words."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import diskwright
from diskwright.block.extent import ZERO
from diskwright.crypto.tls import PskCredentials, X509Credentials
from diskwright.errors import AccessError, DiskwrightError, OptionError, UnsupportedError
from tests.conftest import require
from tests.differential import certificates
from tests.differential.img_pairs import Pair, timeless
from tests.differential.nbd_servers import PLACE, SECONDS, nbdkit, serving

pytestmark = pytest.mark.peer

MIB = 1 << 20
CREDS = "--object tls-creds-x509,id=c,endpoint=client,dir"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Certificates, and an image "i"."""
    made = tmp_path_factory.mktemp("tls")
    certificates.make(made)
    (made / "i").write_bytes(bytes(range(256)) * 4096)
    return made


def words_of(real, verify: str, *words: str) -> list[str]:
    """An encrypting qemu-nbd's words."""
    creds = f"tls-creds-x509,id=t,endpoint=server,dir=server,verify-peer={verify}"
    return real["qemu-nbd"].argv(
        "-t", "-e", "9", "-x", "disk", "--object", creds, "--tls-creds", "t", *words
    )


@pytest.fixture(scope="module")
def port(real, folder) -> Iterator[int]:
    """An encrypting server on 127.0.0.1 that asks its clients for nothing."""
    number = free_port()
    words = ("-b", "127.0.0.1", "-p", str(number), "-f", "raw", "-r", "i")
    with serving(words_of(real, "off", *words), folder, place=("127.0.0.1", number)):
        yield number


@pytest.fixture(scope="module")
def secret_socket(real, folder) -> Iterator[Path]:
    """The socket of an encrypting server that wants certificates."""
    (folder / "u").mkdir()
    for name in ("server", "i"):
        (folder / "u" / name).symlink_to(folder / name)
    words = ("-k", PLACE, "-f", "raw", "-r", "i")
    with serving(words_of(real, "on", *words), folder / "u"):
        yield folder / "u" / "s"


@pytest.fixture
def pair(real, ours, tmp_path, folder) -> Pair:
    made = Pair(real["qemu-img"], ours, tmp_path)
    for each in made.folders:
        for name in folder.iterdir():
            if name.is_dir():
                (each / name.name).symlink_to(name)
        shutil.copy(folder / "i", each)
    return made


OBJECTS = [
    "tls-creds-x509,id=c",
    "tls-creds-x509,id=c,endpoint=client",
    "tls-creds-x509,id=c,dir=client",
    "tls-creds-x509,id=c,dir=client,verify-peer=no,sanity-check=yes,endpoint=client",
    "tls-creds-x509,id=c,dir=client,endpoint=other",
    "tls-creds-x509,id=c,dir=client,endpoint=server",
    "tls-creds-x509,id=c,dir=server,endpoint=server",
    "tls-creds-x509,id=c,dir=client,other=1",
    "tls-creds-x509,id=c,dir=client,verify-peer=maybe",
    "tls-creds-x509,id=c,dir=client,passwordid=nosuch",
    "tls-creds-x509,id=c,dir=/nosuch",
    "tls-creds-x509,id=c,dir=nobody",
    "tls-creds-x509,id=c,dir=half",
    "tls-creds-x509,id=c,dir=wrong-key",
    "tls-creds-x509,id=c,dir=no-authority",
    "tls-creds-x509,id=c,dir=mixed",
    "tls-creds-x509,id=c,dir=mixed,sanity-check=off",
    "tls-creds-x509,id=c,dir=broken",
    "tls-creds-x509,id=c,dir=old",
    "tls-creds-x509,id=c,dir=old,endpoint=server",
    "tls-creds-x509,id=c,dir=old,sanity-check=off",
    "tls-creds-x509,id=c,dir=old-ca",
    "tls-creds-x509,id=c,dir=locked",
    "tls-creds-x509,help",
    "tls-creds-psk,help",
    "tls-creds-psk,id=c,dir=nobody",
    "tls-creds-psk,id=c,dir=/nosuch,endpoint=server",
    "tls-creds-anon,id=c,endpoint=other",
]


@pytest.mark.parametrize("words", OBJECTS)
def test_objects(pair, words):
    pair.same(f"info --object {words} i", form=timeless)


@pytest.mark.parametrize("password", [certificates.PASSWORD, "another"])
def test_a_key_with_a_password(pair, password):
    words = f"--object secret,id=p,data={password}"
    words += " --object tls-creds-x509,id=c,dir=locked,passwordid=p"
    pair.same(f"info {words} i", form=timeless)


INET = [
    (f"{CREDS}=nobody", "export=disk,tls-creds=c", "127.0.0.1"),
    (f"{CREDS}=nobody", "export=disk,tls-creds=c", "localhost"),
    (f"{CREDS}=client", "export=disk,tls-creds=c", "localhost"),
    (f"{CREDS}=nobody,priority=NORMAL:-VERS-TLS1.3", "export=disk,tls-creds=c", "localhost"),
    (f"{CREDS}=nobody,priority=NONSENSE", "export=disk,tls-creds=c", "localhost"),
    (f"{CREDS}=nobody", "export=nosuch,tls-creds=c", "localhost"),
    (f"{CREDS}=nobody", "export=disk,tls-creds=other", "localhost"),
    (f"{CREDS}=nobody", "export=disk,tls-creds=c,tls-hostname=elsewhere", "localhost"),
    (f"{CREDS}=nobody", "export=disk,tls-creds=c,tls-hostname=", "localhost"),
    (f"{CREDS}=nobody,verify-peer=off", "export=disk,tls-creds=c,tls-hostname=x", "localhost"),
    (f"{CREDS}=stranger", "export=disk,tls-creds=c", "localhost"),
    (f"{CREDS}=stranger,verify-peer=off", "export=disk,tls-creds=c", "localhost"),
    ("", "export=disk", "localhost"),
    ("", "export=nosuch", "localhost"),
    ("--object tls-creds-x509,id=c,dir=server,endpoint=server", "export=disk,tls-creds=c",
     "localhost"),
    ("--object secret,id=c,data=x", "export=disk,tls-creds=c", "localhost"),
]  # fmt: skip


@pytest.mark.parametrize(("objects", "words", "host"), INET)
def test_by_name(pair, port, objects, words, host):
    opts = f"driver=nbd,host={host},port={port},{words}"
    pair.same(f"info {objects} --image-opts {opts}")


@pytest.mark.parametrize("place", ["file.host={host},file.port={port}",
                                   "file.server.type=inet,file.server.host={host},"
                                   "file.server.port={port},file.server.ipv4=on"])  # fmt: skip
def test_the_name_of_a_window(pair, port, place):
    """A name in JSON has all that is needed to open it again."""
    opts = f"driver=raw,offset=512,size=64k,file.driver=nbd,{place},file.export=disk,"
    opts = opts.format(host="localhost", port=port) + "file.tls-creds=c,file.tls-hostname=localhost"
    pair.same(f"info {CREDS}=nobody --image-opts {opts}", expect=0)


UNIX = [
    (f"{CREDS}=client", "tls-creds=c,tls-hostname=localhost"),
    (f"{CREDS}=client", "tls-creds=c,tls-hostname=elsewhere"),
    (f"{CREDS}=client", "tls-creds=c,tls-hostname="),
    (f"{CREDS}=client", "tls-creds=c"),
    (f"{CREDS}=client,verify-peer=off", "tls-creds=c"),
    (f"{CREDS}=stranger", "tls-creds=c,tls-hostname=localhost"),
    ("", "tls-hostname=localhost"),
]


@pytest.mark.parametrize(("objects", "words"), UNIX)
def test_by_socket(pair, secret_socket, objects, words):
    opts = f"driver=nbd,path={secret_socket},export=disk,{words}"
    pair.same(f"info {objects} --image-opts {opts}")
    if words == "tls-creds=c,tls-hostname=localhost" and "=stranger" not in objects:
        pair.same(f"convert {objects} -O raw --image-opts {opts} out", expect=0)
        pair.same_files("out", "i")


def test_a_server_that_is_out_of_date(pair, real, folder):
    creds = "tls-creds-x509,id=t,endpoint=server,dir=old,verify-peer=off,sanity-check=off"
    words = real["qemu-nbd"].argv("-t", "-e", "9", "-x", "disk", "--object", creds, "--tls-creds",
                                  "t", "-k", PLACE, "-f", "raw", "-r", "i")  # fmt: skip
    with serving(words, folder):
        opts = f"driver=nbd,path={folder / 's'},export=disk,tls-creds=c,tls-hostname=localhost"
        pair.same(f"info {CREDS}=nobody --image-opts {opts}", expect=1)
        trust = X509Credentials(str(folder / "nobody"))
        with pytest.raises(AccessError, match="has expired"):
            diskwright.open({"driver": "nbd", "path": str(folder / "s"), "export": "disk",
                             "tls-creds": trust, "tls-hostname": "localhost"})  # fmt: skip


def test_clients_that_the_server_does_not_know(pair, secret_socket):
    """When the server hangs up, its client hears it sooner or later: no words to compare."""
    opts = f"driver=nbd,path={secret_socket},export=disk,tls-creds=c,tls-hostname=localhost"
    for objects in (f"{CREDS}=nobody", f"{CREDS}=stranger,verify-peer=off"):
        for result in pair.run("info", *objects.split(), "--image-opts", opts):
            assert result.code == 1
            assert "Failed to " in result.err, result


def test_a_certificate_that_is_revoked(pair, port):
    """QEMU's client looks at no ca-crl.pem, its server does; ours both do."""
    opts = f"driver=nbd,host=localhost,port={port},export=disk,tls-creds=c"
    wanted, got = pair.run("info", *f"{CREDS}=recalled".split(), "--image-opts", opts)
    assert wanted.code == 0
    assert got.code == 1
    assert "The certificate has been revoked" in got.err


def test_a_server_without_tls(pair, real, folder):
    words = real["qemu-nbd"].argv("-t", "-e", "9", "-x", "disk", "-k", PLACE, "-f", "raw", "-r",
                                  "i")  # fmt: skip
    with serving(words, folder):
        opts = f"driver=nbd,path={folder / 's'},export=disk,tls-creds=c,tls-hostname=localhost"
        pair.same(f"info {CREDS}=client --image-opts {opts}", expect=1)


@pytest.mark.parametrize(
    "words",
    [("--tls=require", "--tls-verify-peer"), ("--tls=on",), ("--tls=off",),
     ("--tls=on", "--mask-handshake=0"), ("--tls=require", "--no-sr")],
    ids=lambda words: " ".join(words),
)  # fmt: skip
def test_nbdkit(pair, folder, words):
    argv = nbdkit(f"--tls-certificates={folder / 'server'}", *words, "pattern", "1M")
    if argv is None:
        require("nbdkit")
    with serving(argv, folder):
        plain = f"driver=nbd,path={folder / 's'},export=disk"
        pair.same(f"info --image-opts {plain}")
        pair.same(f"info {CREDS}=client --image-opts {plain},tls-creds=c,tls-hostname=localhost")


# ----------------------------------------------------------------------------- the library


@contextmanager
def memory(folder: Path, *words: str) -> Iterator[str]:
    """An encrypting nbdkit that wants certificates; yields the query part of its URI."""
    argv = nbdkit("--tls=require", "--tls-verify-peer",
                  f"--tls-certificates={folder / 'server'}", "--filter=multi-conn", "memory", "16M",
                  *words)  # fmt: skip
    if argv is None:
        require("nbdkit")
    with serving(argv, folder):
        yield f"?socket={folder / 's'}&tls-hostname=localhost"


def test_many_threads(folder, rng):
    """Eight threads read and write at once, large and small; each finds its own again."""
    trust = X509Credentials(str(folder / "client"))
    with (
        memory(folder, "multi-conn-mode=auto") as query,
        diskwright.open(f"nbds+unix:///disk{query}", format="raw", read_only=False,
                        options={"file": {"tls-creds": trust}}) as node,
    ):  # fmt: skip
        failed: list[BaseException] = []

        def work(first: int, data: bytes) -> None:
            try:
                for turn in range(10):
                    length = len(data) if turn % 3 == 0 else 5000
                    node.write(first * 2 * MIB + turn, data[:length])
                    assert node.read(first * 2 * MIB + turn, length) == data[:length]
            except BaseException as error:
                failed.append(error)

        threads = [
            threading.Thread(target=work, args=(first, rng.randbytes(MIB + 999)))
            for first in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        node.flush()
        assert node.size == 16 * MIB


@pytest.mark.parametrize("inet", [False, True], ids=["unix", "inet"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("kind", ["simple", "structured", "extended"])
def test_every_kind_of_reply(real, folder, rng, kind, tls, inet):
    """What was written is read, and its extents are told, however the replies look."""
    port = free_port()
    where = ("-p", str(port), "-b", "127.0.0.1") if inet else ("-k", PLACE)
    if kind == "extended":
        where = (*where, "-f", "raw", "scratch")
        plain = real["qemu-nbd"].argv("-t", "-e", "9", "-x", "disk", *where)
        words = words_of(real, "on", *where) if tls else plain
        with (folder / "scratch").open("wb") as file:
            file.truncate(MIB)
    else:
        where = ("-p", str(port), "-i", "127.0.0.1") if inet else ("-U", PLACE)
        words = nbdkit("--tls=require" if tls else "--tls=off", "--tls-verify-peer",
                       f"--tls-certificates={folder / 'server'}",
                       *(("--no-sr",) if kind == "simple" else ()), "memory", "1M")  # fmt: skip
        if words is None:
            require("nbdkit")
        at = words.index("-U")
        words[at : at + 2] = where
    server = {"host": "127.0.0.1", "port": str(port)} if inet else {"path": str(folder / "s")}
    trust = X509Credentials(str(folder / "client")) if tls else None
    spec = {"driver": "nbd", **server, "export": "disk", "tls-creds": trust,
            "tls-hostname": "localhost"}  # fmt: skip
    with serving(words, folder, place=("127.0.0.1", port) if inet else None):
        with diskwright.open({"driver": "raw", "file": spec}, read_only=False) as node:
            data = rng.randbytes(300_000)
            node.write(100_000, data)
            node.write_zeroes(150_000, 1000)
            node.flush()
            expected = bytes(100_000) + data[:50_000] + bytes(1000) + data[51_000:]
            assert node.read(0, 400_000) == expected
            agreed = node.file.node._link.agreed
            assert (agreed.structured, agreed.extended, agreed.tls) == (
                kind != "simple", kind == "extended", tls)  # fmt: skip
            zero = [one for one in node.extents(0, node.size) if one.kind == ZERO]
            assert bool(zero) is (kind != "simple")
            for extent in zero:
                assert not any(node.read(extent.offset, extent.length))


def free_port() -> int:
    """A port on 127.0.0.1 that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_whom_the_system_trusts(folder, port, monkeypatch):
    uri = f"nbds://localhost:{port}/disk"
    with pytest.raises(AccessError, match="known issuer"):
        diskwright.open(uri, format="raw")
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "server" / "ca-cert.pem"))
    with diskwright.open(uri, format="raw") as node:
        assert node.read(0, 256) == bytes(range(256))
        assert node.file.node.filename == uri
    with pytest.raises(AccessError, match="hostname"):
        diskwright.open(f"{uri}?tls-hostname=elsewhere", format="raw")


def test_certificates_in_a_uri(folder, port):
    uri = f"nbds://127.0.0.1:{port}/disk?tls-certificates={folder / 'nobody'}"
    with diskwright.open(uri, format="raw") as node:
        assert node.file.node.filename == uri
        again = node.file.node.filename
    with diskwright.open(again, format="raw") as node:
        assert node.read(256, 1) == b"\0"
    with diskwright.open(f"nbds://localhost:{port}/disk?tls-verify-peer=off", format="raw"):
        pass
    with pytest.raises(OptionError, match="same time"):
        diskwright.open(
            {"driver": "nbd", "host": "localhost", "port": str(port), "export": "disk",
             "tls-creds": X509Credentials(str(folder / "nobody")), "tls-certificates": "x"}
        )  # fmt: skip


def test_no_folder_of_certificates():
    with pytest.raises(OptionError, match=r"ca-cert\.pem"):
        X509Credentials("/nosuch")
    with pytest.raises(OptionError, match="endpoint"):
        X509Credentials("/nosuch", endpoint="both")


def test_a_server_that_comes_back(folder):
    spec = {"driver": "nbd", "path": str(folder / "s"), "export": "disk", "reconnect-delay": 20,
            "tls-creds": X509Credentials(str(folder / "client")), "tls-hostname": "localhost"
            }  # fmt: skip
    with memory(folder):
        node = diskwright.open(spec)
        assert node.read(0, 4) == bytes(4)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(node.read(0, 4)))
    reader.start()
    with memory(folder):
        reader.join(SECONDS)
        assert found == [bytes(4)]
    node.close()


def test_keys_known_beforehand(folder, tmp_path):
    (tmp_path / "keys.psk").write_text("other:00\nqemu:0123456789abcdef0123456789abcdef\n")
    if not hasattr(ssl.SSLContext, "set_psk_client_callback"):
        with pytest.raises(UnsupportedError, match=r"Python 3\.13"):
            PskCredentials(str(tmp_path))
        return
    trust = PskCredentials(str(tmp_path))
    argv = nbdkit("--tls=require", f"--tls-psk={tmp_path / 'keys.psk'}", "memory", "1M")
    if argv is None:
        require("nbdkit")
    with serving(argv, folder):
        spec = {"driver": "nbd", "path": str(folder / "s"), "export": "disk", "tls-creds": trust}
        with diskwright.open(spec) as node:
            assert node.size == MIB
        wrong = tmp_path / "wrong"
        wrong.mkdir()
        (wrong / "keys.psk").write_text("qemu:ffff\n")
        with pytest.raises(DiskwrightError, match="TLS"):
            diskwright.open({**spec, "tls-creds": PskCredentials(str(wrong))})
