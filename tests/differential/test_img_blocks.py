"""`dd` and `bench`: command lines that work, by qemu-img and by ours; what they leave is alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair
from tests.differential.nbd_servers import tool
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

DD = """
dd if=a of=t
dd of=t if=a
dd -- if=a of=t
dd if=a of=t bs=1000
dd if=a of=t bs=1000 skip=3
dd if=a of=t bs=1000 skip=3 count=5
dd if=a of=t bs=1000 skip=5 count=5
dd if=a of=t bs=1000 skip=6 count=5
dd if=a of=t bs=1000 skip=300
dd if=a of=t bs=100352 skip=1
dd if=a of=t count=0
dd if=a of=t count=9223372036854775807 bs=2M
dd if=a of=t skip=9223372036854775807 bs=2147483647
dd if=a of=t count=0x10 bs=1.5k
dd if=a of=t count=+3 bs=1k
dd if=nofile of=nodir/t if=a of=t bs=1 bs=2M
dd if=a of=t bs=7 count=11000 skip=2
dd -f raw if=a.q of=t
dd -f qcow2 if=a.q of=t
dd if=a.q of=t bs=1M skip=1
dd if=o.q of=t bs=64k count=20
dd -U if=a.q of=t
dd if=a of=b
dd -O raw if=a of=t
dd --image-opts if=driver=qcow2,file.filename=a.q of=t
dd if=json:{\\"driver\\":\\"raw\\",\\"file.filename\\":\\"a\\"} of=t
dd --object secret,id=x,data=y if=a of=t
dd if=file:a of=file:t
dd -O qcow2 if=a of=t
dd -O qcow2 if=a.q of=t bs=1M count=2
dd -O qcow2 if=empty of=t
dd -O qcow2 if=a of=t count=0
dd -O qcow2 if=a of=t skip=100000
dd -O vdi if=a of=t skip=1
dd -O vdi if=o.q of=t
dd -O vpc if=a of=t count=3
dd -O vpc if=o.q of=t
""".strip().splitlines()

BENCH = """
bench m
bench -f raw -c 1 m
bench -f raw -c 10 -d 3 m
bench -c 10 -q -f raw m
bench -U -c 10 -f raw m
bench -c 10 -f raw -s 1k m
bench -c 10 -f raw -s 1000 -S 1 m
bench -c 10 -f raw -s 1M m
bench -c 300 -f raw -s 64k m
bench -c 10 -f raw -o 1020k m
bench -c 10 -f raw -o 1.5k -S 0 m
bench -c 10 -f raw --pattern 3 --no-drain m
bench -c 0x10 -d 010 --count=5 -f raw m
bench -c 10 -t none -n -f raw m
bench -c 10 -t directsync -i native -f raw m
bench -c 10 -i threads -f raw m
bench -c 10 -i io_uring -f raw m
bench -c 20 -f qcow2 o.q
bench -c 10 --image-opts driver=raw,file.filename=m
bench -c 10 -i native 'json:{"driver":"null-co","size":"1M"}'
bench -c 3 -s 512 -f raw odd
bench -w -c 10 m
bench -w -f raw -c 10 m
bench -w -f raw -c 10 --pattern 0x55 m
bench -w -f raw -c 10 --pattern 255 -s 1000 -S 3000 -o 77 m
bench -w -f raw -c 20 --flush-interval 3 -d 3 m
bench -w -f raw -c 20 --flush-interval 5 -d 2 --no-drain m
bench -w -f raw -c 20 --flush-interval 0 m
bench -w -f raw -c 3 -s 512 odd
bench -w -f qcow2 -c 100 -S 128k --pattern 9 a.q
bench -w -f qcow2 -c 50 -s 3000 -S 70000 --pattern 1 --flush-interval 64 o.q
bench -w -f qcow2 -c 40 -s 64k -d 8 --flush-interval 8 -t writethrough --pattern 7 o.q
bench -w -f vdi -c 40 -s 64k -d 8 --pattern 7 a.vdi
bench -w -f vpc -c 40 -s 64k -d 8 --pattern 7 a.vpc
""".strip().splitlines()


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to begin with."""
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "a").write_bytes(bytes(range(250)) * 400)
    (folder / "b").write_bytes(b"b" * 300_000)
    (folder / "m").write_bytes(bytes(range(256)) * 4096)
    (folder / "odd").write_bytes(b"o" * 1000)
    (folder / "empty").write_bytes(b"")
    img, io = real["qemu-img"], real["qemu-io"]
    for line in (
        "create -q -f qcow2 a.q 10M",
        "create -q -f qcow2 -b a.q -F qcow2 o.q 12M",
        "create -q -f vdi a.vdi 3M",
        "create -q -f vpc a.vpc 3M",
    ):
        assert img.run(*line.split(), cwd=folder).code == 0
    for name, command in (("a.q", "write -P 1 1M 1M"), ("o.q", "write -P 2 1500k 1M")):
        assert io.run("-f", "qcow2", "-c", command, name, cwd=folder).code == 0
    return folder


@pytest.mark.parametrize("line", DD)
def test_dd(line: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    pair.same(line, expect=0)
    pair.same_tree()
    made = "b" if line.endswith("of=b") else "t"
    if "-O q" in line or "-O v" in line:
        pair.same_disks(made)
        pair.same(f"map --output=json {made}", form=without_offsets)
        pair.same(f"info {made}")
    else:
        pair.same_files(made)


def without_offsets(text: str) -> str:
    import re

    return re.sub(r', "offset": \d+', "", text)


@pytest.mark.parametrize("line", BENCH)
def test_bench(line: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    pair.same(line, expect=0)
    pair.same_tree()
    pair.same_disks(*(path.name for path in pristine.iterdir()))


def test_bench_flushes_as_often(real, ours, pristine: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    counts = []
    for program, folder in zip(pair.programs, pair.folders, strict=True):
        trace = folder / "trace"
        argv = program.argv(*"bench -w -f raw -c 100 -d 1 --flush-interval 10 m".split())
        traced = Program(
            "strace", [tool("strace"), "-f", "-e", "trace=fdatasync", "-o", str(trace)]
        )
        done = traced.run(*argv, cwd=folder)
        assert done.code == 0, done
        counts.append(trace.read_text().count("fdatasync("))
    assert counts[0] == counts[1] == 10
