"""`diskwright-nbd` and qemu-nbd: what they offer, what they refuse, and other people's clients."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import require
from tests.differential.nbd_servers import PLACE, SECONDS, alone_at_ports, ran, serving, tool
from tests.differential.programs import Program, Result, ended, environment

pytestmark = pytest.mark.peer

MIB = 1 << 20
#: The words of all servers here: their socket.
AT = ("-k", PLACE)
PATTERNS = (
    "write -P 7 1M 2M",
    "write -z 4M 1M",
    "write -P 9 15M 1M",
    "write -P 3 100k 3k",
    "discard 2M 64k",
)


@pytest.fixture
def both(real, nbd, tmp_path):
    """(program, folder with its own images) of qemu-nbd and of ours."""
    pairs = []
    for name, program in (("real", real["qemu-nbd"]), ("ours", nbd)):
        folder = tmp_path / name
        folder.mkdir()
        images(real, folder)
        pairs.append((program, folder))
    return pairs


def images(real, folder: Path) -> None:
    """qcow2 "q" over "base", with bitmaps "b" and "off" and the snapshot "s"; "raw"."""
    img, io = real["qemu-img"], real["qemu-io"]
    for line in (
        "create -q -f qcow2 base 16M",
        "create -q -f qcow2 -b base -F qcow2 q 16M",
        "create -q -f raw raw 16M",
    ):
        assert img.run(*line.split(), cwd=folder).code == 0
    fill(io, folder, "qcow2", "base", ("write -P 5 0 6M",))
    fill(io, folder, "qcow2", "q", ("write -P 1 12M 1M",))
    for line in ("snapshot -c s q", "bitmap --add q b", "bitmap --add --disable q off"):
        assert img.run(*line.split(), cwd=folder).code == 0
    fill(io, folder, "qcow2", "q", PATTERNS)
    fill(io, folder, "raw", "raw", [line.replace("-z", "-z -u") for line in PATTERNS])


def fill(io: Program, folder: Path, format: str, name: str, lines: Sequence[str]) -> None:
    words = [word for line in lines for word in ("-c", line)]
    assert io.run("-f", format, "-d", "unmap", *words, name, cwd=folder).code == 0


def uri(folder: Path, name: str = "") -> str:
    return f"nbd+unix:///{name}?socket={folder / 's'}"


def said(folder: Path, name: str = "") -> dict:
    """What nbdinfo finds out, without what names the place."""
    found = json.loads(ran(tool("nbdinfo"), "--json", uri(folder, name), cwd=folder))
    (export,) = found["exports"]
    export.pop("uri")
    return found


OFFERS = [
    "-f raw raw",
    "raw",
    "-f raw -r raw",
    "-f raw -e 2 raw",
    "-f raw --shared=0 raw",
    "-f qcow2 -x name -D description q",
    "-f qcow2 --export-name=name --description=äö -A -B b -B off q",
    "-f qcow2 --read-only --allocation-depth --bitmap=off q",
    "-f raw -o 1048576 raw",
    "-f raw --offset=1000448 raw",
    "-f qcow2 -l s q",
    "-f qcow2 --load-snapshot=snapshot.name=s q",
    "-f qcow2 -s q",
    "-f qcow2 --snapshot q",
    "-f qcow2 -s -o 12582912 q",
    '-o 12582912 json:{"driver":"qcow2","file.filename":"q"}',
    '-o 512 json:{"driver":"file","filename":"raw"}',
    '-s json:{"file":{"driver":"file","filename":"q"}}',
    "--cache=none -f raw raw",
    "-n -f raw raw",
    "--cache=writethrough --aio=threads --discard=ignore --detect-zeroes=on -f raw raw",
    "--discard=unmap --detect-zeroes=unmap -f raw raw",
    "--image-opts driver=qcow2,file.driver=file,file.filename=q",
    "--image-opts driver=raw,offset=1M,size=2M,file.driver=file,file.filename=raw",
    "--object secret,id=a,data=b -f raw raw",
    "-A --image-opts driver=raw,file.driver=null-co,file.size=1M,file.read-zeroes=on",
    "-A --image-opts driver=raw,file.driver=null-co,file.size=1M,file.read-zeroes=off",
    "-A --image-opts driver=null-aio,size=1M",
]


@pytest.mark.parametrize("line", OFFERS)
def test_what_is_offered(both, real, line):
    """nbdinfo, and qemu-img's map in every context, say the same of both servers."""
    name = "name" if "-x" in line or "name=name" in line else ""
    found = []
    for program, folder in both:
        with serving(program.argv("-t", "-e", "0", *AT, *line.split()), folder):
            export = said(folder, name)
            maps = []
            for context in export["exports"][0].get("contexts", ()):
                words = f"driver=nbd,path=s,export={name},x-dirty-bitmap={context}"
                maps.append(
                    real["qemu-img"].run("map", "--output=json", "--image-opts", words, cwd=folder)
                )
            img = real["qemu-img"]
            img.run("convert", "-f", "raw", "-O", "raw", uri(folder, name), "out", cwd=folder)
        says = "null-" not in line or "read-zeroes=on" in line  # else whatever memory had
        found.append((export, maps, (folder / "out").read_bytes() if says else b""))
    assert found[0] == found[1]


@pytest.mark.parametrize("line", ["-f raw -e 1 raw", "-f qcow2 -x name q"])
def test_one_client_at_a_time(both, line):
    """Without -e there is one: no second connection is offered."""
    name = "name" if "-x" in line else ""
    found = []
    for program, folder in both:
        with serving(program.argv("-t", *AT, *line.split()), folder):
            found.append(said(folder, name))
    assert found[0] == found[1]
    assert not found[1]["exports"][0]["can_multi_conn"]


WRONG = [
    "",
    "raw raw",
    "nosuch",
    "-f nosuch raw",
    "-f qcow2 raw",
    "--foo raw",
    "-e x raw",
    "-e -1 raw",
    "--shared= raw",
    "--handshake-limit=x raw",
    "-o x raw",
    "-o -1 raw",
    "-o 1k raw",
    "-f raw -o 99999999 raw",
    "-n --cache=none raw",
    "--cache=foo raw",
    "--aio=foo raw",
    "--discard=foo raw",
    "--detect-zeroes=foo raw",
    "--detect-zeroes=unmap raw",
    "--detect-zeroes=unmap --discard=ignore raw",
    "-f qcow2 -B nosuch q",
    "-f raw -B b raw",
    "-f qcow2 -l nosuch q",
    "-f raw -l s raw",
    "-f qcow2 -l snapshot.foo=1 q",
    "-L raw",
    "-L -x name",
    "-L -B b",
    "-L --fork",
    "-L -c /dev/nbd0",
    "-L -d",
    "-L -f raw",
    "-L -l s",
    "-L -A",
    "-L -n",
    "-L --cache=none",
    "-L --aio=threads",
    "-L --discard=unmap",
    "-L -o 5",
    "-L -b 127.0.0.1 -p 1 -e 2 -t -v -r -s -o 0 --image-opts --detect-zeroes=on",
    "-L --tls-creds nosuch",
    "--image-opts foo=bar",
    "--image-opts driver=foo",
    "-s -f qcow2 -l s q",
    "-s -f qcow2 -l nosuch q",
    "--discard=unmap --discard=ignore raw",
    "--aio=threads --aio=native raw",
    "-e 2147483648 raw",
    "--image-opts driver=qcow2,read-only=on,file.driver=file,file.filename=q",
    ".",
    "-r .",
    "--tls-hostname=a raw",
    "--tls-authz=a raw",
    "--tls-creds=nosuch raw",
    "--image-opts -f raw driver=raw",
    "--image-opts driver=nosuch",
    "--object nosuch,id=a raw",
    "-f raw --pid-file=/nosuch/pid raw",
    f"-x {'x' * 4097} nosuch",
    f"-D {'x' * 4097} nosuch",
    f"-x {'x' * 4097} -e 0x nosuch",
]


@pytest.mark.parametrize("line", WRONG)
def test_what_is_refused(both, line):
    _refused_by(both, f"-k s {line}")


SOCKETS = [
    "-k relative -f raw raw",
    "-k /nosuch/folder/s -f raw raw",
    f"-k /{'x' * 120} -f raw raw",
    "-p nosuch -f raw raw",
    "-b 256.0.0.1 -f raw raw",
    "--bind=203.0.113.9 -p 12345 -f raw raw",
    "-c /dev/nosuch -f raw raw",
    "-d",
    "--selinux-label=foo -f raw raw",
]


@pytest.mark.parametrize("line", SOCKETS)
def test_where_nobody_can_listen(both, line):
    found = _both_say(both, line)
    if "-c" in line:  # and what can be done about it
        assert found[1].err.startswith(found[0].err)
        assert "modprobe nbd" in found[1].err
        found[1] = found[1]._replace(err=found[0].err)
    assert found[0] == found[1]


def _refused_by(both, line: str) -> None:
    wanted, found = _both_say(both, line)
    assert found == wanted
    assert found.code == 1
    assert not (both[1][1] / "s").exists(), "a socket is left behind"


def _both_say(both, line: str) -> list[Result]:
    """What qemu-nbd and ours say to a line in which `-k s` is a socket in the folder."""
    found = []
    for program, folder in both:
        words = line.replace("-k s ", f"-k {folder / 's'} ").split()
        with alone_at_ports():
            found.append(_nameless(program.run(*words, cwd=folder, timeout=20), folder))
    return found


def _nameless(result: Result, folder: Path) -> Result:
    """Without the program's name and the folder's."""
    text = result.err.replace("diskwright-nbd", "qemu-nbd").replace(str(folder), "FOLDER")
    text = text.replace("/usr/bin/", "")
    return Result(result.code, result.out, text)


CHANGES = [
    ("-f raw raw", "raw"),
    ("-f raw --discard=unmap --detect-zeroes=unmap raw", "raw"),
    ("-f raw --discard=ignore raw", "raw"),
    ("-f qcow2 q", "q"),
    ("-f qcow2 --detect-zeroes=on q", "q"),
    ("-f qcow2 --cache=writethrough q", "q"),
    ("-f qcow2 --cache=none q", "q"),
    ("-f qcow2 -s q", "q"),
    ("-f raw -o 65536 raw", "raw"),
    ("-f qcow2 -o 65536 q", "q"),
]
WRITTEN = (
    "write -P 8 3M 512k",
    "write -P 0 1M 64k",
    "write -z 12M 128k",
    "write -z -u 13M 128k",
    "discard 15M 256k",
    "write -P 6 7000000 3333",
    "flush",
)


@pytest.mark.parametrize(("line", "name"), CHANGES)
def test_what_a_client_leaves(both, real, line, name):
    """qemu-io writes through both servers: the images have the same bytes and the same map."""
    found = []
    for program, folder in both:
        with serving(program.argv("-t", *AT, *line.split()), folder) as process:
            fill(real["qemu-io"], folder, "raw", uri(folder), WRITTEN)
            process.terminate()
            assert process.wait(SECONDS) == 0
        img = real["qemu-img"]
        format = "raw" if name == "raw" else "qcow2"
        shown = img.run("map", "--output=json", "-f", format, name, cwd=folder)
        assert img.run("convert", "-f", format, "-O", "raw", name, "out", cwd=folder).code == 0
        check = img.run("check", "-f", format, name, cwd=folder) if name == "q" else None
        assert check is None or check.code == 0, check
        found.append((json.loads(shown.out), (folder / "out").read_bytes()))
    for entries, _ in found:
        for entry in entries:  # where space was taken from is each one's own
            entry.pop("offset", None)
    if name == "raw":
        assert found[0] == found[1]
    assert found[0][1] == found[1][1]


# ---------------------------------------------------------------- other people's clients


SERVED = {"raw": "-f raw raw", "qcow2": "-f qcow2 q", "through": "-f qcow2 q"}


@pytest.fixture(params=list(SERVED))
def served(request, real, nbd, tmp_path, monkeypatch):
    """A folder with an image that is served to any number of clients."""
    if request.param == "through":
        monkeypatch.setenv("DISKWRIGHT_NO_BYPASS", "1")
    images(real, tmp_path)
    words = nbd.argv("-t", "-e", "0", *AT, *SERVED[request.param].split())
    with serving(words, tmp_path) as process:
        yield tmp_path
        process.terminate()
        assert process.wait(SECONDS) == 0
    if request.param != "raw":
        assert real["qemu-img"].run("check", "q", cwd=tmp_path).code == 0


def test_nbdcopy_both_ways(served, rng: random.Random):
    data = bytearray(rng.randbytes(16 * MIB))
    data[MIB : 5 * MIB] = bytes(4 * MIB)
    (served / "in").write_bytes(data)
    ran(tool("nbdcopy"), "in", uri(served), cwd=served)
    ran(tool("nbdcopy"), uri(served), "out", cwd=served)
    assert (served / "out").read_bytes() == data
    ran(tool("nbdcopy"), "--synchronous", uri(served), "again", cwd=served)
    assert (served / "again").read_bytes() == data


def test_fio_verifies(served):
    """Random writes and reads of all sizes, every block checked by its sum."""
    for size in ("4k", "512", "64k", "256k"):
        words = f"--name=v --ioengine=nbd --rw=randrw --bs={size} --size=16M --randseed=1"
        words += " --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1"
        ran(tool("fio"), *words.split(), f"--uri={uri(served)}", cwd=served)


def test_qemu_img_both_ways(served, real, rng: random.Random):
    data = bytearray(rng.randbytes(16 * MIB))
    data[2 * MIB : 9 * MIB] = bytes(7 * MIB)
    (served / "in").write_bytes(data)
    img = real["qemu-img"]
    for line in (
        f"convert -n -f raw -O raw in {uri(served)}",
        f"compare -f raw -F raw in {uri(served)}",
        f"convert -m 16 -W -f raw -O qcow2 {uri(served)} out",
        "compare -f raw -F qcow2 in out",
        f"bench -c 500 -d 16 -s 64k -f raw {uri(served)}",
        f"bench -w -c 500 -d 16 -s 4k -f raw --flush-interval=50 {uri(served)}",
    ):
        done = img.run(*line.split(), cwd=served)
        assert done.code == 0, f"{line}: {done}"


def test_ours_both_ways(served, ours, rng: random.Random):
    data = bytearray(rng.randbytes(16 * MIB))
    data[2 * MIB : 9 * MIB] = bytes(7 * MIB)
    (served / "in").write_bytes(data)
    for line in (
        f"convert -n -f raw -O raw in {uri(served)}",
        f"compare -f raw -F raw in {uri(served)}",
        f"convert -f raw -O qcow2 {uri(served)} out",
        "compare -f raw -F qcow2 in out",
    ):
        done = ours.run(*line.split(), cwd=served)
        assert done.code == 0, f"{line}: {done}"


def test_a_file_system_over_fuse(served):
    """nbdfuse: the export as a file, read and written by whoever likes."""
    if not os.path.exists("/dev/fuse"):
        require("/dev/fuse")
    place = served / "mounted"
    place.mkdir()
    process = subprocess.Popen([tool("nbdfuse"), str(place), uri(served)])
    with ended(process):
        file = place / "nbd"
        deadline = time.monotonic() + SECONDS
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with file.open("r+b") as stream:
            stream.seek(5 * MIB)
            stream.write(b"through fuse" * 1000)
            stream.flush()
            os.fsync(stream.fileno())
            stream.seek(5 * MIB)
            assert stream.read(12) == b"through fuse"
        ran(tool("fusermount3"), "-u", str(place), cwd=place.parent)
        assert process.wait(SECONDS) == 0


# ------------------------------------------------------------------------ beginnings and ends


def test_the_last_client_ends_it(both, real):
    for program, folder in both:
        with serving(program.argv("-e", "2", *AT, "-f", "raw", "raw"), folder) as process:
            first = real["qemu-io"].start("-f", "raw", uri(folder), cwd=folder)
            with ended(first):
                time.sleep(0.5)
                assert real["qemu-io"].run("-f", "raw", "-c", "read 0 1k", uri(folder), cwd=folder)
                time.sleep(0.3)
                assert process.poll() is None, "one is left"
                assert first.stdin is not None
                first.stdin.close()
                first.wait(SECONDS)
            assert process.wait(SECONDS) == 0
        assert not (folder / "s").exists()


def test_two_share_it(both):
    """--share=2, cut short as in QEMU's documentation: a third client waits."""
    for program, folder in both:
        with serving(program.argv("-t", "--share=2", *AT, "-f", "raw", "raw"), folder):
            time.sleep(0.3)  # until the look whether somebody listens is over
            clients = [_greeted(folder) for _ in range(2)]
            third = _greeted(folder, seconds=0.5)
            assert all(greeting == b"NBDMAGIC" for _, greeting in clients)
            assert third[1] == b""
            clients[0][0].close()
            third[0].settimeout(SECONDS)
            assert third[0].recv(8) == b"NBDMAGIC"
            for sock, _ in (*clients, third):
                sock.close()


def _greeted(folder: Path, seconds: float = SECONDS) -> tuple[socket.socket, bytes]:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(seconds)
    sock.connect(str(folder / "s"))
    try:
        return sock, sock.recv(8)
    except TimeoutError:
        return sock, b""


def test_in_the_background(both):
    for program, folder in both:
        words = ["--fork", "--pid-file=pid", "-t", "-k", str(folder / "s"), "-f", "raw", "raw"]
        done = program.run(*words, cwd=folder, timeout=SECONDS)
        assert (done.code, done.out, done.err) == (0, "", "")
        number = int((folder / "pid").read_text())
        try:
            assert said(folder)["exports"][0]["export-size"] == 16 * MIB
        finally:
            os.kill(number, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS
        while (folder / "s").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not (folder / "s").exists()
        failed = program.run("--fork", "-k", str(folder / "s"), "nosuch", cwd=folder)
        assert failed.code == 1
        assert "No such file or directory" in failed.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it(both, number):
    for program, folder in both if number == signal.SIGTERM else both[1:]:
        with serving(program.argv("-t", *AT, "-f", "raw", "raw"), folder) as process:
            if program is both[0][0]:  # until it answers it forgets signals
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(folder / "s"))
                    assert client.recv(8) == b"NBDMAGIC"
            process.send_signal(number)
            assert process.wait(SECONDS) == 0
        assert not (folder / "s").exists()


def test_over_inet(both, real):
    for program, folder in both:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        words = program.argv("-t", "-b", "127.0.0.1", "-p", port, "-f", "raw", "raw")
        process = subprocess.Popen(words, cwd=folder, env=environment())
        with ended(process):
            where = f"nbd://127.0.0.1:{port}"
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                done = real["qemu-io"].run("-r", "-f", "raw", "-c", "read 0 1M", where, cwd=folder)
                if done.code == 0:
                    break
                time.sleep(0.05)
            assert done.code == 0, done


def test_what_was_flushed_is_there_after_a_kill(real, nbd, tmp_path, rng: random.Random):
    """kill -9 in the middle of writes: every write that a flush covered is in a sound image."""
    img = real["qemu-img"]
    for turn in range(5):
        assert img.run("create", "-q", "-f", "qcow2", "k", "64M", cwd=tmp_path).code == 0
        with serving(nbd.argv("-t", *AT, "-f", "qcow2", "k"), tmp_path) as process:
            words = "import time, sys\nimport diskwright\n"
            words += f"node = diskwright.open({uri(tmp_path)!r}, format='raw', read_only=False)\n"
            words += "for n in range(100000):\n"
            words += "    at = n * 7919 % 1024 * 65536\n"
            words += "    node.write(at, (n % 255 + 1).to_bytes(1, 'big') * 65536)\n"
            words += "    if n % 8 == 7:\n        node.flush()\n"
            words += "        print(n, flush=True)\n"
            client = subprocess.Popen(
                [sys.executable, "-c", words],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment(),
            )
            with ended(client):
                assert client.stdout is not None
                last = -1
                stop = 5 + rng.randrange(40)
                for count, line in enumerate(client.stdout):
                    last = int(line)
                    if count == stop:
                        process.kill()
                        break
                rest = client.stdout.read().split()
                last = int(rest[-1]) if rest else last
        (tmp_path / "s").unlink(missing_ok=True)
        done = img.run("check", "-f", "qcow2", "k", cwd=tmp_path)
        assert done.code in (0, 3), f"turn {turn}: {done}"
        assert img.run("convert", "-f", "qcow2", "-O", "raw", "k", "out", cwd=tmp_path).code == 0
        data = (tmp_path / "out").read_bytes()
        newest: dict[int, list[int]] = {}
        for n in range(last + 1 + 16):
            at = n * 7919 % 1024 * 65536
            if n <= last:
                newest[at] = [n % 255 + 1]
            elif at in newest:
                newest[at].append(n % 255 + 1)
        for at, values in newest.items():
            assert data[at] in values
            assert data[at + 65535] in values


def test_listed(both, real, nbd, tmp_path):
    """`--list` of either server, and of an old one, by either program; where nobody listens."""
    for program, folder in both:
        words = program.argv("-t", "-e", "0", "-x", "name", "-D", "text", "-A", "-B", "b", *AT, "q")
        with serving(words, folder):
            asked = ("--list", "-k", str(folder / "s"))
            wanted, found = (each.run(*asked, cwd=folder) for each in (real["qemu-nbd"], nbd))
            assert found == wanted
            assert "qemu:dirty-bitmap:b" in found.out
    with serving([tool("nbdkit"), "-f", "--oldstyle", "-U", PLACE, "memory", "1M"], tmp_path):
        asked = ("--list", "-k", str(tmp_path / "s"))
        wanted, found = (each.run(*asked, cwd=tmp_path) for each in (real["qemu-nbd"], nbd))
        assert found == wanted
        assert "size:  1048576" in found.out
    nowhere = ("-L", "-k", str(tmp_path / "nosuch"))
    results = [_nameless(each.run(*nowhere, cwd=tmp_path), tmp_path) for each in
               (real["qemu-nbd"], nbd)]  # fmt: skip
    assert results[0] == results[1]
    refused = ("-L", "-b", "127.0.0.1", "-p", "1")
    with alone_at_ports():
        results = [_nameless(each.run(*refused, cwd=tmp_path), tmp_path) for each in
                   (real["qemu-nbd"], nbd)]  # fmt: skip
    assert results[0] == results[1]


TWICE_WRONG = [
    "-k /nosuch/folder/s -f raw nosuch",
    "-k s -f raw nosuch",
    "-k s -f nosuch raw",
    "-k s -f qcow2 -B nosuch q",
    "-k s -f raw --pid-file=/nosuch/pid raw",
    "-b 256.0.0.1 -f raw nosuch",
    "-b 203.0.113.9 -p 12345 -f qcow2 raw",
]


@pytest.mark.parametrize("line", TWICE_WRONG)
def test_where_to_listen_is_looked_at_first(both, line):
    _refused_by(both, line)
