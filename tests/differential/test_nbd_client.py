"""Commands on NBD exports: ours and QEMU's say and do the same, whoever serves."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

import diskwright
from diskwright.block.extent import ZERO
from diskwright.errors import IOFailure
from tests.conftest import require
from tests.differential.img_pairs import Pair, timeless
from tests.differential.io_pairs import commands
from tests.differential.io_pairs import timeless as io_timeless
from tests.differential.nbd_servers import PLACE, both_serving, nbdkit, qemu_nbd, serving, tool

pytestmark = pytest.mark.peer

URI = "nbd+unix:///disk?socket=s"
MIB = 1 << 20


@pytest.fixture
def pair(real, ours, tmp_path) -> Pair:
    made = Pair(real["qemu-img"], ours, tmp_path)
    made.prepare("create -q -f qcow2 i 16M", "create -q -f qcow2 target 16M")
    for folder in made.folders:
        for image in ("i", "target"):
            words = commands(("write -P 7 1M 2M", "write -z 4M 1M", "write -P 9 15M 1M"))
            assert real["qemu-io"].run(*words, image, cwd=folder).code == 0
    return made


LOOKS = [
    f"info {URI}",
    f"info --output=json {URI}",
    "info nbd+unix:///nosuch?socket=s",
    "info nbd:unix:s:exportname=disk",
    "info nbd+unix:///disk?socket=nosuch",
    "info --image-opts driver=nbd,path=s,export=disk",
    "info --image-opts driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=s,"
    "file.export=disk",
    "info --image-opts driver=nbd,path=s,export=disk,x-dirty-bitmap=nosuch",
    "info --image-opts driver=raw,size=64k,file.driver=nbd,file.path=s,file.export=disk",
    "info --image-opts driver=raw,size=64k,file.driver=nbd,file.server.type=unix,"
    "file.server.path=s,file.server.abstract=off,file.server.tight=on,file.export=disk",
    f"map {URI}",
    f"map --output=json {URI}",
    f"map --output=json --start-offset=1500k --max-length=1M {URI}",
    f"convert -O raw {URI} out",
    f"convert -O qcow2 {URI} out",
    f"compare -f raw -F qcow2 {URI} target",
    f"dd if={URI} of=out bs=64k count=20 skip=15",
    f"measure -O qcow2 {URI}",
    f"check {URI}",
    f"snapshot -l {URI}",
    f"resize -f raw {URI} 32M",
    f"resize -f raw --shrink {URI} 8M",
]


@pytest.mark.parametrize("line", LOOKS)
def test_looked_at(pair, real, line):
    with both_serving(qemu_nbd(real, "i"), pair.folders):
        pair.same(line, form=timeless)
    if " out" in line or "of=out" in line:
        pair.same_disks("out") if "qcow2" in line else pair.same_files("out")


WRONG = [
    "nbd:",
    "nbd:x",
    "nbd:unix:",
    "nbd:localhost:x",
    "nbd://",
    "nbd://h:99999/",
    "nbd+unix://?socket=",
    "'nbd+unix:///a?socket=/n&x=1'",
    "'nbd://localhost:1/x?y=1'",
    "nbd://localhost:1/x",
    "nbd:localhost:1:exportname=a",
    "nbd:[::1]:1",
    "--image-opts driver=nbd",
    "--image-opts driver=nbd,port=3",
    "--image-opts driver=nbd,host=a,path=b",
    "--image-opts driver=nbd,server.type=inet",
    "--image-opts driver=nbd,server.type=unix",
    "--image-opts driver=nbd,server.type=foo",
    "--image-opts driver=nbd,path=nosuch,nosuch=1",
    "nbd:unix:s:exportname=",
    "nbd:::1:1",
    "nbd://[::1]/x",
    "nbd://[::1/x",
    "nbd:[::1]:1:exportname=x",
    "nbd+vsock://1/x",
    "nbd+unix:///x?socket=@nosuch",
    "nbd:unix:@nosuch",
    "--image-opts driver=nbd,server.type=unix,server.path=nosuch,server.abstract=on",
    "--image-opts driver=nbd,server.type=unix,server.path=nosuch,server.abstract=x",
    "--image-opts driver=nbd,server.type=unix,server.path=nosuch,server.more=on",
    "--image-opts driver=nbd,server.type=inet,server.host=localhost,server.port=1,server.ipv4=on",
    "--image-opts driver=nbd,server.type=inet,server.host=localhost,server.port=1,server.ipv6=off",
    "--image-opts driver=nbd,server.type=inet,server.host=localhost,server.port=1,"
    "server.ipv4=off,server.ipv6=off",
    "--image-opts driver=nbd,server.type=inet,server.host=localhost,server.port=1,"
    "server.keep-alive=on,server.numeric=off",
    "--image-opts driver=nbd,server.type=inet,server.host=::1,server.port=1,server.numeric=on",
    "--image-opts driver=nbd,server.type=inet,server.host=127.0.0.1,server.port=1,server.ipv4=off",
    "--image-opts driver=nbd,server.type=inet,server.host=localhost,server.port=1,server.mptcp=off",
    "--image-opts driver=nbd,server.type=inet,server.host=localhost,server.port=1,server.mptcp=x",
    "--image-opts driver=nbd,path=nosuch,reconnect-delay=x",
    "--image-opts driver=nbd,path=nosuch,server.type=unix,server.path=nosuch",
    "--image-opts driver=nbd,port=1,server.type=unix",
    "nbd://localhost:1/foo%zz",
    "nbd://localhost:1/foo%",
    "nbd+unix:///foo%00bar?socket=nosuch",
    "nbd+unix:///foo?socket=nosuch&socket=neither",
    "nbd+unix:///foo?socket=nosuch&other=x",
    f"nbd+unix:///foo?socket=/{'x' * 120}",
    f"nbd:unix:/{'x' * 120}",
    *(
        f'json:{{"driver":"nbd",{words}}}'
        for words in (
            '"path":1',
            '"path":["a"]',
            '"path":"a","host":["b"]',
            '"host":1.5,"port":"1"',
            '"host":null,"port":"1"',
            '"host":"localhost","port":true',
            '"host":"localhost","port":-1',
            '"host":"localhost","port":"1","export":5',
            '"server":{"type":"inet","host":false,"port":1}',
            '"server":{"type":"unix","path":1}',
        )
    ),
]


@pytest.mark.parametrize("name", WRONG)
def test_names_of_nothing(pair, name):
    pair.same(f"info {name}", expect=1)


CHANGES = [
    f"create -f raw {URI} 8M",
    f"create -f raw {URI} 32M",
    f"create -f qcow2 {URI} 8M",
    f"convert -n -O raw target {URI}",
    f"convert -O qcow2 target {URI}",
    f"convert -c -O qcow2 target {URI}",
    f"convert -O vdi target {URI}",
    f"dd if=target -f qcow2 -O qcow2 of={URI} bs=1M count=4",
    f"bench -f raw -w -c 50 -s 64k {URI}",
]


@pytest.mark.parametrize("line", CHANGES)
def test_written_to(pair, real, line):
    with both_serving(qemu_nbd(real, "i"), pair.folders):
        pair.same(line, form=timeless)
        pair.same(f"info {URI}", form=timeless)
        pair.same(f"check {URI}", form=timeless)
        pair.same(f"convert -O raw {URI} out")
    pair.same_files("out")


def _placeless(text: str) -> str:
    """`text` without where an image ends: new tables go elsewhere than QEMU's."""
    return re.sub(r"(?m)^Image end offset: .*\n", "", timeless(text))


def test_an_image_inside_of_an_export(pair, real):
    with both_serving(qemu_nbd(real, "i"), pair.folders):
        for line in (
            f"create -f qcow2 {URI} 8M",
            f"snapshot -c first {URI}",
            f"snapshot -l {URI}",
            f"bitmap --add {URI} noted",
            f"resize {URI} 10M",
            f"amend -o lazy_refcounts=on {URI}",
            f"snapshot -d first {URI}",
            f"info {URI}",
            f"check {URI}",
        ):
            pair.same(line, form=_placeless)
        pair.same(f"create -f qcow2 -b {URI} -F qcow2 over", expect=0)
        pair.same("map --output=json over", expect=0)
        pair.same("rebase -u -b '' over", expect=0)


def test_a_relative_name_inside_of_an_export(pair, real):
    """An export lies in no folder that the name of a backing file could be relative to."""
    opts = "driver=qcow2,file.driver=nbd,file.path=s,file.export=disk"
    with both_serving(qemu_nbd(real, "i"), pair.folders):
        pair.same(f"create -u -f qcow2 -b rel -F raw {URI} 8M", expect=0)
        for name in (URI, f"--image-opts {opts}"):
            pair.same(f"info {name}", form=timeless, expect=0)
            pair.same(f"info --output=json {name}", form=timeless, expect=0)
            pair.same(f"info --backing-chain {name}", form=timeless, expect=1)
            pair.same(f"map {name}", expect=1)
        pair.same(f"rebase -b '' {URI}", expect=1)
        pair.same(f"commit {URI}", expect=1)


SCRIPT = (
    "write -P 3 8M 128k",
    "read -P 3 8M 128k",
    "write -z 8M 64k",
    "write -z -u 12M 64k",
    "write -z -n 12M 64k",
    "write -f -P 5 9M 1000",
    "writev -P 6 10M 512 4k 100",
    "aio_write -P 8 11M 64k",
    "aio_flush",
    "aio_read -P 7 1M 64k",
    "aio_flush",
    "discard 9M 1M",
    "flush",
    "map",
    "length",
    "write 16M 1k",
    "read 16M 1k",
    "truncate 128M",
    "info",
    "reopen -r",
    "write 0 512",
    "reopen -w",
    "write -P 1 0 512",
)


@pytest.mark.parametrize("served", [(), ("-r",), ("--discard=unmap",), ("-f", "qcow2", "-A")])
def test_io(real, io, tmp_path, served):
    pair = Pair(real["qemu-io"], io, tmp_path)
    for folder in pair.folders:
        assert real["qemu-img"].run("create", "-q", "-f", "qcow2", "i", "16M", cwd=folder).code == 0
        words = commands(("write -P 7 1M 2M",))
        assert real["qemu-io"].run(*words, "i", cwd=folder).code == 0
    with both_serving(qemu_nbd(real, *served, "i"), pair.folders):
        for flags in ("", "-r"):
            words = [*flags.split(), "-f", "raw", *commands(SCRIPT), URI]
            pair.same(words, form=io_timeless)
    contents = []
    for folder in pair.folders:
        assert real["qemu-img"].run("convert", "-O", "raw", "i", "out", cwd=folder).code == 0
        contents.append((folder / "out").read_bytes())
    assert contents[0] == contents[1]


@pytest.fixture
def kit(tmp_path):
    """nbdkit with given words, in an empty folder."""
    folder = tmp_path / "kit"
    folder.mkdir()

    def start(*words: str):
        argv = nbdkit(*words)
        if argv is None:
            require("nbdkit")
        return serving(argv, folder)

    return folder, start


@pytest.mark.parametrize(
    "words",
    [
        ("memory", "16M"),
        ("--no-sr", "memory", "16M"),
        ("--filter=noextents", "memory", "16M"),
        ("--filter=nofilter", "memory", "16M"),
        ("--filter=blocksize-policy", "memory", "16M", "blocksize-minimum=512",
         "blocksize-preferred=4k", "blocksize-maximum=64k", "blocksize-error-policy=error"),
        ("--filter=fua", "memory", "16M", "fuamode=emulate"),
        ("--filter=nozero", "memory", "16M"),
        ("--filter=multi-conn", "memory", "16M", "multi-conn-mode=auto"),
        ("--filter=delay", "memory", "16M", "rdelay=1ms", "wdelay=1ms"),
        ("--mask-handshake=0", "memory", "16M"),
        ("--mask-handshake=1", "memory", "16M"),
        ("--filter=cow", "memory", "16M"),
    ],
    ids=lambda words: "-".join(word for word in words if not word.startswith("16M"))[:60],
)  # fmt: skip
def test_every_kind_of_server(kit, words, rng):
    """What is written through eight threads is what is there."""
    folder, start = kit
    name = "" if "--mask-handshake=0" in words else "disk"
    with (
        start(*words),
        diskwright.open(
            f"nbd+unix:///{name}?socket={folder / 's'}", format="raw", read_only=False
        ) as node,
    ):
        model = bytearray(node.size)
        pieces = [(at, rng.randbytes(50_000)) for at in range(100, node.size - 50_000, 300_000)]
        failed = []

        def work(first: int) -> None:
            try:
                for at, data in pieces[first::8]:
                    node.write(at, data)
                    assert node.read(at, len(data)) == data
                    node.write_zeroes(at + 1000, 3000, unmap=bool(first % 2))
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        for at, data in pieces:
            model[at : at + len(data)] = data
            model[at + 1000 : at + 4000] = bytes(3000)
        node.discard(0, 4096)
        model[:4096] = node.read(0, 4096)
        node.flush()
        assert node.read(0, node.size) == bytes(model)
        zero = 0
        for extent in node.extents(0, node.size):
            if extent.kind == ZERO:
                zero += extent.length
                assert not any(model[extent.offset : extent.end])
        if words == ("memory", "16M"):
            assert zero > 8 * MIB


def test_errors_of_the_server(kit):
    folder, start = kit
    with start("--filter=error", "memory", "1M", "error-pread=ENOSPC",
               "error-pread-rate=100%"):  # fmt: skip
        with diskwright.open(f"nbd+unix:///disk?socket={folder / 's'}", format="raw") as node:
            with pytest.raises(IOFailure):
                node.read(0, 512)
            assert node.size == MIB


@pytest.mark.parametrize("clients", ["1", "2", "3", "4"])
def test_a_server_that_is_full_is_worked_with(real, tmp_path, clients):
    """It lets further connections wait; what there is goes on, and who comes later is let in."""
    (tmp_path / "i").write_bytes(bytes(range(256)) * (MIB // 8))
    argv = real["qemu-nbd"].argv("-t", "-e", clients, "-k", PLACE, "-f", "raw", "i")
    with serving(argv, tmp_path):
        address = {"driver": "nbd", "path": str(tmp_path / "s")}
        spec = {"driver": "raw", "file": address}
        with diskwright.open(spec, read_only=False) as node:
            reads = []

            def read() -> None:
                reads.append(b"".join(node.read(at, 1 << 18) for at in range(0, 32 * MIB, 1 << 18)))

            threads = [threading.Thread(target=read, daemon=True) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive(), "it waits"
            assert reads == [(tmp_path / "i").read_bytes()] * 6
        diskwright.convert(f"nbd+unix:///?socket={tmp_path / 's'}", str(tmp_path / "o"),
                           source_format="raw", target_format="raw")  # fmt: skip
        assert (tmp_path / "o").read_bytes() == (tmp_path / "i").read_bytes()


@pytest.mark.parametrize(("words", "busy"), [({}, False), ({"multi-conn": 1}, True)])
def test_places_are_left_to_others(real, tmp_path, words, busy):
    """An idle client gives further connections back; one told to keep to one never takes more."""
    (tmp_path / "i").write_bytes(bytes(MIB))
    argv = real["qemu-nbd"].argv("-t", "-e", "2", "-k", PLACE, "-f", "raw", "i")
    other = ("map", "-f", "raw", f"nbd+unix:///?socket={tmp_path / 's'}")
    with serving(argv, tmp_path):
        spec = {"driver": "raw", "file": {"driver": "nbd", "path": str(tmp_path / "s"), **words}}
        with diskwright.open(spec) as node:
            ended = threading.Event()

            def read() -> None:
                while not ended.is_set():
                    node.read(0, 1 << 18)

            threads = [threading.Thread(target=read, daemon=True) for _ in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            if not busy:
                ended.set()
            try:
                assert real["qemu-img"].run(*other, cwd=tmp_path, timeout=20).code == 0
            finally:
                ended.set()
                for thread in threads:
                    thread.join(30)
            assert node.read(0, 4) == bytes(4)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has sockets that are in no folder")
@pytest.mark.parametrize("tight", [True, False])
def test_a_socket_in_no_folder(real, tmp_path, tight):
    assert real["qemu-img"].run("create", "-q", "-f", "raw", "i", "1M", cwd=tmp_path).code == 0
    name = f"diskwright-test-{os.getpid()}"
    place = (
        f"addr.type=unix,addr.path={name},addr.abstract=on,addr.tight={'on' if tight else 'off'}"
    )
    argv = [tool("qemu-storage-daemon"),
            "--blockdev", "driver=file,filename=i,node-name=f", "--nbd-server", place,
            "--export", "nbd,id=a,node-name=f,name=disk"]  # fmt: skip
    listens = Path(f"\0{name}" if tight else f"\0{name}".ljust(108, "\0"))
    server = {"type": "unix", "path": name, "abstract": True, "tight": tight}
    with serving(argv, tmp_path, place=listens):
        with diskwright.open({"driver": "nbd", "server": server, "export": "disk"}) as node:
            assert node.size == MIB
        server["tight"] = not tight
        with pytest.raises(IOFailure):
            diskwright.open({"driver": "nbd", "server": server, "export": "disk"})


def test_a_dirty_bitmap_in_place_of_block_status(real, ours, tmp_path):
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 i 16M", "bitmap --add -g 64k i noted")
    for folder in pair.folders:
        words = commands(("write -P 7 1M 2M", "write -P 1 9M 64k"))
        assert real["qemu-io"].run(*words, "i", cwd=folder).code == 0
    with both_serving(qemu_nbd(real, "-r", "-B", "noted", "i"), pair.folders):
        opts = "driver=nbd,path=s,export=disk,x-dirty-bitmap=qemu:dirty-bitmap:noted"
        pair.same(f"map --output=json --image-opts {opts}", expect=0)


#: one MiB each of: data, a hole, zeroes that are stored, a hole of zeroes
FOUR_KINDS = """echo "0 1M"; echo "1M 1M hole"; echo "2M 1M zero"; echo "3M 1M hole,zero" """


@pytest.mark.parametrize("asked", ["i", "over"])
def test_all_that_block_status_can_say(real, ours, tmp_path, asked):
    """What of a run a server has, and what it reads as, are two things."""
    pair = Pair(real["qemu-img"], ours, tmp_path)
    argv = nbdkit("eval", "get_size=echo 4M", "can_extents=exit 0", f"extents={FOUR_KINDS}",
                  "pread=head -c $3 /dev/zero", "open=echo")  # fmt: skip
    if argv is None:
        require("nbdkit")
    names = {
        "i": (URI, f"-f raw {URI}", "--image-opts driver=nbd,path=s,export=disk",
              "--image-opts driver=raw,offset=512k,file.driver=nbd,file.path=s,file.export=disk",
              "--image-opts driver=blkdebug,image.driver=nbd,image.path=s,image.export=disk"),
        "over": ("over",),
    }[asked]  # fmt: skip
    with both_serving(argv, pair.folders):
        if asked == "over":
            pair.prepare(f"create -q -f qcow2 -b {URI} -F raw over 5M")
        for name in names:
            pair.same(f"map --output=json {name}", expect=0)
            pair.same(f"map {name}", expect=0)
            pair.same(f"measure -O qcow2 {name}", expect=0)
        pair.same(f"convert -O qcow2 {names[0]} out", expect=0)
    pair.same_disks("out")


def test_allocation_depth_in_place_of_block_status(real, ours, tmp_path):
    """0: nowhere; 1: here; 2: in a backing file; all of them are shown as block status is."""
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare(
        "create -q -f qcow2 lowest 16M",
        "create -q -f qcow2 -b lowest -F qcow2 base",
        "create -q -f qcow2 -b base -F qcow2 i",
    )
    for folder in pair.folders:
        for image, line in (
            ("lowest", "write 0 1M"),
            ("base", "write 4M 1M"),
            ("i", "write 8M 1M"),
            ("i", "write -z 10M 1M"),
        ):
            assert real["qemu-io"].run(*commands((line,)), image, cwd=folder).code == 0
    opts = "driver=nbd,path=s,export=disk,x-dirty-bitmap=qemu:allocation-depth"
    with both_serving(qemu_nbd(real, "-r", "-A", "i"), pair.folders):
        pair.same(f"map --output=json --image-opts {opts}", expect=0)
        pair.same(f"map --image-opts {opts}", expect=0)


@pytest.mark.parametrize("name", ["disk", "nosuch"])
def test_a_server_hears_of_no_accident(real, ours, tmp_path, name):
    """Whoever is refused takes leave, and so does whoever has had enough."""
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f raw i 1M")
    with both_serving(qemu_nbd(real, "-f", "raw", "i"), pair.folders):
        said = [(folder / "server.log").read_bytes() for folder in pair.folders]
        pair.same(f"info -f raw nbd+unix:///{name}?socket=s", form=timeless)
        time.sleep(0.2)
    for folder, before in zip(pair.folders, said, strict=True):
        assert (folder / "server.log").read_bytes()[len(before) :] == b""
