"""`diskwright-nbd --tls-creds`: every kind of client, encrypted or not, over either socket."""

from __future__ import annotations

import random
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

import diskwright
from diskwright.crypto.tls import X509Credentials
from diskwright.errors import DiskwrightError
from diskwright.wire.nbd.client import OptionRefused
from diskwright.wire.nbd.numbers import Answer, Command
from tests.differential import certificates
from tests.differential.nbd_servers import PLACE, serving, tool
from tests.differential.programs import Program
from tests.unit.nbd_peers import MODES, SECONDS, Client

pytestmark = pytest.mark.peer

MIB = 1 << 20
SIZE = 4 * MIB
PROGRAM = Program("diskwright-nbd", [sys.executable, "-m", "diskwright.cli.nbd"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tls")
    certificates.make(made)
    (made / "i").write_bytes(bytes(SIZE))
    return made


@pytest.fixture(scope="module")
def places(folder):
    """(family, secret or not) -> address of a server of ours."""
    found: dict[tuple[str, bool], object] = {}
    with_servers = []
    for family in ("unix", "inet"):
        for secret in (False, True):
            inner = folder / f"{family}{secret}"
            inner.mkdir()
            (inner / "i").write_bytes(bytes(SIZE))
            words = ["-t", "-e", "0", "-f", "raw", "-x", "disk"]
            if secret:
                creds = f"tls-creds-x509,id=t,endpoint=server,dir={folder / 'server'}"
                words += ["--object", creds, "--tls-creds", "t"]
            place = None
            if family == "unix":
                words += ["-k", PLACE]
                found[family, secret] = inner / "s"
            else:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    place = probe.getsockname()
                words += ["-b", "127.0.0.1", "-p", str(place[1])]
                found[family, secret] = place
            with_servers.append((PROGRAM.argv(*words, "i"), inner, place))
    from contextlib import ExitStack

    with ExitStack() as stack:
        for argv, inner, place in with_servers:
            stack.enter_context(serving(argv, inner, **({"place": place} if place else {})))
        yield found


def connected(place) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(place, Path) else socket.AF_INET)
    sock.settimeout(SECONDS)
    sock.connect(str(place) if isinstance(place, Path) else place)
    return sock


def trusting(folder: Path, who: str = "client"):
    """What wraps a client's socket."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / who / "ca-cert.pem")
    if (folder / who / "client-cert.pem").exists():
        context.load_cert_chain(folder / who / "client-cert.pem", folder / who / "client-key.pem")
    return lambda sock: context.wrap_socket(sock, server_hostname="localhost")


@pytest.mark.parametrize("secret", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("family", ["unix", "inet"])
@pytest.mark.parametrize("mode", MODES)
def test_every_combination(places, folder, mode, family, secret, seed):
    rng = random.Random(seed)
    sock = connected(places[family, secret])
    client = Client(sock, mode, "disk", secure=trusting(folder) if secret else None)
    model = bytearray(client.read(0, SIZE))
    for _ in range(60):
        offset = rng.randrange(SIZE)
        length = min(rng.choice((1, 512, 4096, 70_000, 600_000)), SIZE - offset)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            client.write(offset, data)
            model[offset : offset + length] = data
        assert client.read(offset, length) == model[offset : offset + length]
    asked = {}
    for _ in range(100):
        offset = rng.randrange(0, SIZE - 4096)
        asked[client.ask(Command.READ, offset, 4096)] = offset
    for _ in range(100):
        cookie, error, data, _ = client.reply(4096)
        offset = asked.pop(cookie)
        assert not error
        assert data == model[offset : offset + 4096]
    client.sock.close()


def test_who_does_not_begin_tls_gets_nothing(places):
    with connected(places["unix", True]) as sock, pytest.raises(OptionRefused) as refused:
        Client(sock, "simple", "disk")
    assert refused.value.answer == Answer.TLS_REQUIRED


@pytest.mark.parametrize("who", ["stranger", "nobody"])
def test_who_is_not_trusted_gets_nothing(places, folder, who):
    wrap = trusting(folder, who)
    made: list[socket.socket] = []

    def secure(sock: socket.socket) -> socket.socket:
        made.append(wrap(sock))
        return made[-1]

    with connected(places["inet", True]) as sock:
        with pytest.raises((ssl.SSLError, EOFError, OSError)):
            Client(sock, "simple", "disk", secure=secure)
        for each in made:
            each.close()


def test_words_before_tls_are_not_believed(places, folder):
    """What anybody could have put in before the encryption ends the connection."""
    with connected(places["unix", True]) as sock:
        sock.recv(18, socket.MSG_WAITALL)
        starttls = b"IHAVEOPT" + (5).to_bytes(4, "big") + bytes(4)
        sock.sendall(b"\0\0\0\3" + starttls + b"IHAVEOPT" + (3).to_bytes(4, "big") + bytes(4))
        heard = b""
        while piece := sock.recv(4096):
            heard += piece
        assert len(heard) <= 20


@pytest.mark.parametrize("family", ["unix", "inet"])
def test_other_peoples_clients(places, folder, real, ours, family):
    place = places[family, True]
    where = f"path={place}" if family == "unix" else f"host=127.0.0.1,port={place[1]}"
    words = f"driver=nbd,{where},export=disk,tls-creds=c,tls-hostname=localhost"
    for program in (real["qemu-img"], ours):
        creds = f"tls-creds-x509,id=c,endpoint=client,dir={folder / 'client'}"
        options = ("--object", creds, "--image-opts")
        (folder / "in").write_bytes(random.Random(family).randbytes(SIZE))
        done = program.run(
            "convert", *options, "-n", "--target-image-opts",
            "driver=raw,file.filename=in", f"driver=raw,file.{words.replace(',', ',file.')}",
            cwd=folder,
        )  # fmt: skip
        assert done.code == 0, done
        far = f"driver=raw,file.{words.replace(',', ',file.')}"
        done = program.run("compare", *options, "driver=raw,file.filename=in", far, cwd=folder)
        assert done.code == 0, done


def test_the_library(places, folder):
    trust = X509Credentials(str(folder / "client"))
    name = f"nbds+unix:///disk?socket={places['unix', True]}"
    options = {"file": {"tls-creds": trust, "tls-hostname": "localhost"}}
    with diskwright.open(name, format="raw", read_only=False, options=options) as node:
        node.write(1000, b"secret" * 100_000)
        node.flush()
        assert node.read(1000, 600_000) == b"secret" * 100_000
    with pytest.raises(DiskwrightError):
        diskwright.open(name.replace("nbds", "nbd"), format="raw")


AUTHORITIES = [
    ("authz-simple,id=z,identity={name}", True),
    ("authz-simple,id=z,identity=CN=nobody", False),
    ("authz-list,id=z,policy=allow,rules.0.match={name},rules.0.policy=deny", False),
    ("authz-list,id=z,rules.0.match=*CN=*,rules.0.policy=allow,rules.0.format=glob", True),
    ("authz-list,id=other", False),
]


@pytest.mark.parametrize(("words", "welcome"), AUTHORITIES)
def test_who_may_in(folder, real, tmp_path, words, welcome):
    """--tls-authz, by both servers: the client's certificate names it as both write names."""
    done = subprocess.run(
        ["openssl", "x509", "-in", "client-cert.pem", "-noout", "-subject", "-nameopt", "RFC2253"],
        cwd=folder / "client", capture_output=True, text=True, check=True,
    )  # fmt: skip
    name = done.stdout.strip().removeprefix("subject=").replace(",", ",,")
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={folder / 'server'}"
    client = f"tls-creds-x509,id=c,endpoint=client,dir={folder / 'client'}"
    (tmp_path / "i").write_bytes(bytes(MIB))
    for program in (real["qemu-nbd"], PROGRAM):
        argv = program.argv(
            "-t", "-e", "0", "-f", "raw", "-k", PLACE, "--object", creds, "--tls-creds", "t",
            "--object", words.format(name=name), "--tls-authz", "z", "i",
        )  # fmt: skip
        with serving(argv, tmp_path):
            opts = f"driver=nbd,path={tmp_path / 's'},tls-creds=c,tls-hostname=localhost"
            done = real["qemu-img"].run("info", "--object", client, "--image-opts", opts,
                                        cwd=tmp_path)  # fmt: skip
            assert (done.code == 0) is welcome, done


def test_names_of_certificates_are_written_alike(folder, real, tmp_path):
    """The name that rules are about: parts in the certificate's order, and what each is called."""
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={folder / 'server'}"
    client = f"tls-creds-x509,id=c,endpoint=client,dir={folder / 'titled'}"
    opts = f"driver=nbd,path={tmp_path / 's'},tls-creds=c,tls-hostname=localhost"
    (tmp_path / "i").write_bytes(bytes(MIB))
    said = []
    for program in (real["qemu-nbd"], PROGRAM):
        argv = program.argv(
            "-v", "-t", "-f", "raw", "-k", PLACE, "--object", creds, "--tls-creds", "t",
            "--object", "authz-simple,id=z,identity=none", "--tls-authz", "z", "i",
        )  # fmt: skip
        with serving(argv, tmp_path):
            real["qemu-img"].run("info", "--object", client, "--image-opts", opts, cwd=tmp_path)
        log = (tmp_path / "server.log").read_text()
        said.append(re.search("authz check for (.*) is denied", log).group(1))
    assert said[0] == said[1]
    assert said[0].startswith("C=DE,ST=b,")


def test_many_names_are_served_through_tls_too(folder, tmp_path):
    """`diskwright serve --tls-creds`; who may not in, and what contradicts itself."""
    contents = {name: random.Random(name).randbytes(MIB) for name in ("a", "b")}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    serve = Program("diskwright", [sys.executable, "-m", "diskwright.cli.main", "serve"])
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={folder / 'server'}"
    words = ("--object", creds, "--tls-creds", "t", "-f", "raw", "-r", "a=a", "b=b")
    with serving(serve.argv("-k", PLACE, *words), tmp_path):
        for name, data in contents.items():
            query = f"socket={tmp_path / 's'}&tls-certificates={folder / 'client'}"
            uri = f"nbds+unix://localhost/{name}?{query}"
            done = subprocess.run(
                [tool("nbdcopy"), uri, "out"], cwd=tmp_path, capture_output=True, check=True
            )
            assert (tmp_path / "out").read_bytes() == data, done
        plain = f"nbd+unix:///a?socket={tmp_path / 's'}"
        refused = subprocess.run(
            [tool("nbdcopy"), plain, "no"], cwd=tmp_path, capture_output=True, check=False
        )
        assert refused.returncode
        assert f"nbds+unix:///b?socket={tmp_path / 's'}" in (tmp_path / "server.log").read_text()
    for wrong, said in (
        (("--tls-authz", "z", "a=a"), "--tls-authz is not permitted without --tls-creds"),
        (("a=a", "a=b"), "two exports with the name 'a'"),
    ):
        result = serve.run("-f", "raw", "-r", "-k", str(tmp_path / "t"), *wrong, cwd=tmp_path)
        assert (result.code, result.out) == (1, "")
        assert said in result.err
