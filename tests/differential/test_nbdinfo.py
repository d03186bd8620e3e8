"""`diskwright nbdinfo`, and the list of `--list`: as libnbd's nbdinfo and qemu-nbd have them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from diskwright.cli import main, nbd_text
from diskwright.drivers.protocols.nbd import address, security
from diskwright.drivers.protocols.nbd.survey import list_exports
from diskwright.errors import DiskwrightError
from tests.conftest import require
from tests.differential.nbd_servers import nbdkit, qemu_nbd, serving, tool
from tests.differential.programs import Program, Result

pytestmark = pytest.mark.peer

KINDS = 'echo "0 64k hole,zero"; echo "64k 64k"; echo "128k 64k zero"; echo "192k 832k hole"'
SERVERS = {
    "qemu": ("q", "-D", "a disk", "-f", "qcow2", "-B", "noted", "-A", "-r", "i.qcow2"),
    "qemu raw": ("q", "-f", "raw", "i"),
    "kit": ("memory", "16M"),
    "simple": ("--no-sr", "-r", "pattern", "1000000"),
    "no extents": ("--filter=noextents", "--filter=nozero", "memory", "1536"),
    "empty": ("memory", "0"),
    "blocks": ("--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=512",
               "blocksize-preferred=4k", "blocksize-maximum=64k"),
    "names": ("--filter=exportname", "memory", "1M", "exportname=a b/c", "exportname=ä",
              "exportname-list=explicit", "default-export=ä", "exportdesc=fixed:it's"),
    "not fixed": ("--mask-handshake=0", "memory", "1M"),
    "kinds": ("eval", "get_size=echo 1M", "can_extents=exit 0", f"extents={KINDS}",
              "pread=head -c $3 /dev/zero", "open=echo", "is_rotational=exit 0"),
}  # fmt: skip


def words_of(real, name: str) -> list[str]:
    first, *rest = SERVERS[name]
    if first == "q":
        return qemu_nbd(real, *rest)
    argv = nbdkit(first, *rest)
    if argv is None:
        require("nbdkit")
    return [word for word in argv if word not in ("-e", "disk")]


@pytest.fixture(scope="module")
def images(real, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "i").write_bytes(b"x" * 1_000_000)
    for line in ("create -q -f qcow2 i.qcow2 5M", "bitmap --add i.qcow2 noted"):
        assert real["qemu-img"].run(*line.split(), cwd=folder).code == 0
    io = real["qemu-io"].run("-c", "write 1M 1M", "-c", "write -z 3M 64k", "i.qcow2", cwd=folder)
    assert io.code == 0
    return folder


@pytest.fixture(params=SERVERS)
def served(request, real, images):
    with serving(words_of(real, request.param), images):
        yield request.param, images


@pytest.fixture(scope="module")
def both() -> tuple[Program, Program]:
    ours = [sys.executable, "-m", main.__name__, "nbdinfo"]
    return Program("nbdinfo", [tool("nbdinfo")]), Program("diskwright", ours)


def name_in(server: str) -> str:
    return "disk" if server.startswith("qemu") else ""


def run(both, folder: Path, *words: str) -> tuple[Result, Result]:
    wanted, got = (program.run(*words, cwd=folder) for program in both)
    assert got.code == wanted.code, f"{words}\n{wanted}\n{got}"
    return wanted, got


def test_in_words(served, both):
    server, folder = served
    for words in (("--no-content",), ("--list",)):
        ours = tuple(word for word in words if word != "--no-content")
        wanted = both[0].run(*words, uri(server), cwd=folder)
        got = both[1].run(*ours, uri(server), cwd=folder)
        assert got.code == wanted.code, f"{wanted}\n{got}"
        # its release 1.14 knows no extended headers
        assert got.out.replace("using extended", "using structured") == wanted.out


def uri(server: str) -> str:
    return f"nbd+unix:///{name_in(server)}?socket=s"


def test_in_json(served, both):
    server, folder = served
    for words in (("--no-content",), ("--list",)):
        wanted = both[0].run("--json", *words, uri(server), cwd=folder)
        got = both[1].run("--json", *(words if words == ("--list",) else ()), uri(server),
                          cwd=folder)  # fmt: skip
        assert got.code == wanted.code, f"{wanted}\n{got}"
        if wanted.code:
            continue
        expected, found = json.loads(wanted.out), json.loads(got.out)
        assert isinstance(found.pop("extended"), bool)
        expected.pop("extended", None)
        assert found == expected
        assert list(found["exports"][0]) == list(expected["exports"][0])


@pytest.mark.parametrize("words", ["--map", "--map --totals", "--map=qemu:allocation-depth",
                                   "--map=qemu:dirty-bitmap:noted", "--map=nosuch"])  # fmt: skip
def test_the_map(served, both, words):
    server, folder = served
    wanted, got = run(both, folder, *words.split(), uri(server))
    assert got.out == wanted.out
    wanted, got = run(both, folder, "--json", *words.split(), uri(server))
    if wanted.code == 0:
        assert json.loads(got.out) == json.loads(wanted.out)


FEATURES = ("cache connect df fast-zero flush fua multi-conn read read-only readonly rotational "
            "structured-reply tls trim write zero ZERO fast_zero nosuch").split()  # fmt: skip


@pytest.mark.parametrize("served", ["qemu", "simple", "kinds"], indirect=True)
def test_features(served, both):
    server, folder = served
    for feature in FEATURES:
        for word in ("--can", "--is"):
            run(both, folder, word, feature, uri(server))
    wanted, got = run(both, folder, "--size", uri(server))
    assert got.out == wanted.out


def test_wrong(both, real, images):
    with serving(words_of(real, "kit"), images):
        for words in (
            ("nbd+unix:///?socket=nosuch",),
            ("nosuch",),
            (),
            ("--size", "--map", "nbd+unix:///?socket=s"),
            ("--totals", "nbd+unix:///?socket=s"),
            ("nbd+unix:///?socket=s", "more"),
        ):
            _, got = run(both, images, *words)
            assert got.err
    with serving(words_of(real, "qemu"), images):
        _, got = run(both, images, "nbd+unix:///nosuch?socket=s")
        assert "not present" in got.err
        assert "--list" in got.err


# ----------------------------------------------------------------------- qemu-nbd --list


def same_list(real, folder: Path, flags: str, **place: str) -> None:
    """qemu-nbd and ours list the same, or fail with the same words."""
    wanted = real["qemu-nbd"].run("--list", *flags.split(), cwd=folder)
    words: dict[str, object] = dict(place)
    if "path" in place:
        words["path"] = str(folder / place["path"])
    where = address.from_options(words)
    try:
        found = list_exports(where, security.from_options(words, where))
        got = "".join(f"{line}\n" for line in nbd_text.list_lines(found)), ""
    except DiskwrightError as error:
        got = "", f"qemu-nbd: {error.qemu_message}\n"
    assert got[0] == wanted.out
    assert got[1] == wanted.err


def test_the_list(real, served):
    _, folder = served
    same_list(real, folder, f"-k {folder / 's'}", path="s")


def test_no_list(real, images):
    same_list(real, images, f"-k {images / 'nosuch'}", path="nosuch")


def test_many_exports(real, images):
    """A server of two exports, in its own order, on an address."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [tool("qemu-storage-daemon"),
            "--blockdev", "driver=file,filename=i,node-name=f,read-only=on",
            "--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}",
            "--export", "nbd,id=a,node-name=f,name=one,description=first",
            "--export", "nbd,id=b,node-name=f,name=two"]  # fmt: skip
    with serving(argv, images, place=("127.0.0.1", port)):
        same_list(real, images, f"-b 127.0.0.1 -p {port}", host="127.0.0.1", port=str(port))
        same_list(real, images, f"-p {port}", host="localhost", port=str(port))


def test_encrypted(real, images, both, tmp_path):
    from tests.differential import certificates

    certificates.make(tmp_path)
    argv = nbdkit("--tls=require", f"--tls-certificates={tmp_path / 'server'}", "memory", "1M")
    if argv is None:
        require("nbdkit")
    with serving(argv, images):
        same_list(real, images, f"-k {images / 's'}", path="s")
        query = f"?socket=s&tls-certificates={tmp_path / 'nobody'}"
        found = both[1].run(f"nbds+unix:///disk{query}&tls-hostname=localhost", cwd=images)
        assert found.code == 0, found
        assert "with TLS" in found.out
        objects = f"tls-creds-x509,id=c,endpoint=client,dir={tmp_path / 'client'}"
        words = ("--object", objects, "--tls-creds", "c", "--tls-hostname", "localhost")
        listed = both[1].run(*words, "--is", "tls", "nbd+unix:///disk?socket=s", cwd=images)
        assert listed.code == 0, listed
        wanted = real["qemu-nbd"].run("--list", "-k", str(images / "s"), *words, cwd=images)
        where = address.from_options({"path": str(images / "s")})
        from diskwright.crypto.tls import X509Credentials

        trust = security.Security(X509Credentials(str(tmp_path / "client")), "localhost")
        got = "".join(f"{line}\n" for line in nbd_text.list_lines(list_exports(where, trust)))
        assert got == wanted.out


def test_names_cannot_forge_lines(real, images, both):
    argv = qemu_nbd(real, "-f", "raw", "-D", "one\ncan_trim: true", "i")
    with serving(argv, images):
        got = both[1].run("nbd+unix:///disk?socket=s", cwd=images)
        assert "\tdescription: one\\x0acan_trim: true\n" in got.out
