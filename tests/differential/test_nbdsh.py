"""libnbd's own shell and copier as clients of `diskwright-nbd`, encrypted and not."""

from __future__ import annotations

import json
import random
import socket
import sys
from pathlib import Path

import pytest

from tests.differential import certificates
from tests.differential.nbd_servers import PLACE, ran, serving, tool
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

MIB = 1 << 20
SIZE = 8 * MIB
PROGRAM = Program("diskwright-nbd", [sys.executable, "-m", "diskwright.cli.nbd"])

#: For nbdsh, which has a handle `h`: requests of all kinds, many at once, against a model.
SCRIPT = """
import random
h.set_uri_allow_local_file(True)
h.add_meta_context("base:allocation")
h.connect_uri(URI)
rng = random.Random(SEED)
size = h.get_size()
assert size == SIZE, size
assert h.can_flush() and h.can_fua() and h.can_zero() and h.can_trim() and h.can_multi_conn()
assert h.get_structured_replies_negotiated()
assert h.can_meta_context("base:allocation")
assert h.get_tls_negotiated() == TLS
model = bytearray(h.pread(size, 0))

for _ in range(150):
    offset = rng.randrange(size)
    length = min(rng.choice((1, 511, 4096, 65536, 300000)), size - offset)
    kind = rng.randrange(5)
    if kind == 0:
        data = rng.randbytes(length)
        h.pwrite(data, offset, flags=rng.choice((0, nbd.CMD_FLAG_FUA)))
        model[offset : offset + length] = data
    elif kind == 1:
        h.zero(length, offset, flags=rng.choice((0, nbd.CMD_FLAG_NO_HOLE)))
        model[offset : offset + length] = bytes(length)
    elif kind == 2:
        h.trim(length, offset)
        now = h.pread(length, offset)
        assert all(new in (0, old) for new, old in zip(now, model[offset : offset + length]))
        model[offset : offset + length] = now
    elif kind == 3:
        chunks = bytearray(length)
        def chunk(data, at, status, error):
            assert not error.value
            start = at - offset
            if status != nbd.READ_HOLE:
                chunks[start : start + len(data)] = data
        h.pread_structured(length, offset, chunk)
        assert chunks == model[offset : offset + length]
    else:
        assert h.pread(length, offset) == model[offset : offset + length]

# Reads of everywhere, 64 on their way at a time; their answers in any order.
waiting = {}
for _ in range(1000):
    offset = rng.randrange(size // 512) * 512
    buffer = nbd.Buffer(min(4096, size - offset))
    waiting[h.aio_pread(buffer, offset)] = (offset, buffer)
    while len(waiting) >= 64:
        h.poll(-1)
        for cookie in list(waiting):
            if h.aio_command_completed(cookie):
                at, read = waiting.pop(cookie)
                got = read.to_bytearray()
                assert got == model[at : at + len(got)]
while waiting:
    h.poll(-1)
    for cookie in list(waiting):
        if h.aio_command_completed(cookie):
            waiting.pop(cookie)

# What is said to be zero is.
at = 0
def extents(context, offset, entries, error):
    global at
    assert context == "base:allocation" and offset == at
    for length, flags in zip(entries[::2], entries[1::2]):
        stop = min(at + length, size)
        if flags & 2:
            assert not any(model[at:stop])
        at = stop
while at < size:
    before = at
    h.block_status(size - at, at, extents)
    assert at > before
h.flush()

# What cannot be is refused, and the connection goes on.
h.set_strict_mode(0)
for ask in (
    lambda: h.pread(4096, size - 1024),
    lambda: h.pwrite(b"x" * 4096, size - 1024),
    lambda: h.zero(1 << 20, size),
    lambda: h.block_status(0, 0, extents),
):
    try:
        ask()
    except nbd.Error as error:
        assert error.errnum, error
    else:
        raise AssertionError("taken")
assert h.pread(size, 0) == model
h.shutdown()
print("all is well")
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    tool("openssl")
    made = tmp_path_factory.mktemp("keys")
    certificates.make(made)
    return made


@pytest.fixture(params=["unix", "unix-tls", "inet-tls"])
def served(request, real, keys, tmp_path):
    """(folder, URI, whether it is encrypted) of a server of a qcow2 image."""
    family, _, tls = request.param.partition("-")
    words = ["-t", "-e", "0", "-f", "qcow2", "-x", "disk"]
    place = None
    if family == "unix":
        words += ["-k", PLACE]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = probe.getsockname()
        words += ["-b", "127.0.0.1", "-p", str(place[1])]
    query = [f"socket={tmp_path / 's'}"] if place is None else []
    if tls:
        creds = f"tls-creds-x509,id=t,endpoint=server,dir={keys / 'server'},verify-peer=on"
        words += ["--object", creds, "--tls-creds", "t"]
        query.append(f"tls-certificates={keys / 'client'}")
    host = f"localhost:{place[1]}" if place is not None else ("localhost" if tls else "")
    scheme = f"nbd{'s' if tls else ''}{'+unix' if place is None else ''}"
    uri = f"{scheme}://{host}/disk?{'&'.join(query)}"
    done = real["qemu-img"].run("create", "-q", "-f", "qcow2", "i", str(SIZE), cwd=tmp_path)
    assert done.code == 0, done
    argv = PROGRAM.argv(*words, "i")
    with serving(argv, tmp_path, **({"place": place} if place else {})) as process:
        yield tmp_path, uri, bool(tls)
        process.terminate()
        assert process.wait(30) == 0
    assert real["qemu-img"].run("check", "i", cwd=tmp_path).code == 0


def test_nbdsh(served, seed: int):
    folder, uri, is_tls = served
    facts = f"SEED, SIZE, TLS, URI = {seed}, {SIZE}, {int(is_tls)}, {uri!r}\n"
    assert ran(tool("nbdsh"), "-c", facts + SCRIPT, cwd=folder) == "all is well\n"


def test_nbdcopy(served, rng: random.Random):
    folder, uri, _ = served
    data = bytearray(rng.randbytes(SIZE))
    data[MIB : 3 * MIB] = bytes(2 * MIB)
    (folder / "in").write_bytes(data)
    ran(tool("nbdcopy"), "in", uri, cwd=folder)
    ran(tool("nbdcopy"), uri, "out", cwd=folder)
    assert (folder / "out").read_bytes() == data


def test_a_request_to_cache_goes_on_to_the_server_behind(tmp_path, keys):
    """nbdsh asks ours, which serves what nbdkit has: its log shows what was asked of it."""
    (tmp_path / "i").write_bytes(bytes(range(256)) * (SIZE // 256))
    behind = tmp_path / "behind"
    behind.mkdir()
    log = behind / "log"
    words = [tool("nbdkit"), "-f", "-U", PLACE, "--filter=log", "file", str(tmp_path / "i"),
             f"logfile={log}"]  # fmt: skip
    with serving(words, behind):
        far = f"driver=raw,file.driver=nbd,file.path={behind / 's'}"
        ours = PROGRAM.argv("-t", "-e", "0", "-r", "-k", PLACE, "--image-opts", far)
        with serving(ours, tmp_path):
            script = "h.cache(1 << 20, 2 << 20); assert h.pread(4, 2 << 20) == b'\\0\\1\\2\\3'"
            ran(tool("nbdsh"), "-u", f"nbd+unix:///?socket={tmp_path / 's'}", "-c", script,
                cwd=tmp_path)  # fmt: skip
    asked = [line for line in log.read_text().splitlines() if " Cache " in line]
    assert asked
    assert "offset=0x200000 count=0x100000" in asked[0]


@pytest.mark.parametrize("offset", [0, 1000, MIB + 4096])
def test_a_request_to_cache_brings_data_up(real, tmp_path, offset):
    """From the backing file into the image, as with qemu-nbd."""
    img, maps = real["qemu-img"], []
    assert img.run("create", "-q", "-f", "raw", "base", "8M", cwd=tmp_path).code == 0
    (tmp_path / "base").write_bytes(bytes(range(1, 256)) * (SIZE // 255) + bytes(SIZE % 255))
    for name, program in (("real", real["qemu-nbd"]), ("ours", PROGRAM)):
        words = ("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", name)
        assert img.run(*words, cwd=tmp_path).code == 0
        with serving(program.argv("-t", "-k", PLACE, "-f", "qcow2", name), tmp_path):
            uri = f"nbd+unix:///?socket={tmp_path / 's'}"
            script = f"h.cache(5 << 20, {offset}); h.flush()"
            ran(tool("nbdsh"), "-u", uri, "-c", script, cwd=tmp_path)
        done = img.run("map", "--output=json", name, cwd=tmp_path)
        maps.append([(run["start"], run["length"], run["depth"]) for run in json.loads(done.out)])
    assert maps[0] == maps[1]
    assert 0 in [depth for _, _, depth in maps[1]]
