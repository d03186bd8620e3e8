"""`amend`: what can be changed, and the images that come out, as with qemu-img."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair, timeless

pytestmark = pytest.mark.peer

_BAR = re.compile(r" *\([0-9.]+/100%\)\r?")
_LENGTH = re.compile(r"file length: .*|\"virtual-size\": .*|[iI]mage[- ]end[- ]offset.*")


def form(text: str) -> str:
    """Without the steps of the bar, the length of the file and times."""
    return _LENGTH.sub("", _BAR.sub("", timeless(text)))


MAKE = """
create -f qcow2 a 4M
create -f qcow2 b 4M
create -f raw base 4M
create -f qcow2 -o compat=0.10 old 4M
create -f qcow2 -b base -F raw over 4M
create -f qcow2 -o extended_l2=on x 4M
create -f qcow2 -o data_file=d e 4M
create -f qcow2 -o data_file=f,data_file_raw=on f.qcow2 4M
create -f qcow2 -o cluster_size=512 small 16M
create -f qcow2 -o cluster_size=2M,lazy_refcounts=on large 64M
create -f qcow2 resized 4M
snapshot -c s resized
resize resized 8M
create -f qcow2 -o compression_type=zstd z 4M
create -f qcow2 -o compression_type=zstd packed 4M
create -f qcow2 -o compression_type=zstd,extended_l2=on zx 4M
create -f vdi v 1M
""".strip().splitlines()
WRITES = ["write -P 1 0 1M", "write -P 2 1100k 300k", "write -z 2M 128k", "write -z 1200k 64k"]


@pytest.fixture(scope="module")
def pristine(real, tmp_path_factory) -> Path:
    """The images to begin with, made once by QEMU's programs."""
    folder: Path = tmp_path_factory.mktemp("amend")

    def run(program: str, *words: str) -> None:
        done = real[program].run(*words, cwd=folder)
        assert done.code == 0, done

    for line in MAKE:
        run("qemu-img", *line.split())
    for image in ("a", "over", "small", "old", "large"):
        run("qemu-io", *(word for command in WRITES for word in ("-c", command)), image)
    for image in ("over", "small"):
        run("qemu-img", "snapshot", "-c", "one", image)
    run("qemu-io", "-c", "write -c -P 3 3M 64k", "packed")
    run("qemu-io", "-c", "write -z 3500k 200k", "-c", "write -c -P 3 3M 64k", "over")
    return folder


@pytest.fixture
def pair(real, ours, tmp_path, pristine) -> Pair:
    return Pair(real["qemu-img"], ours, tmp_path, pristine)


#: Calls one after the other, each a list of -o's value and the image.
RUNS = [
    ["compat=0.10 a", "compat=1.1 a", "compat=v2 a", "compat=v3 a"],
    ["compat=1.1 old", "compat=0.10 old", "compat=1.1,lazy_refcounts=on,refcount_bits=8 old"],
    ["refcount_bits=1 a", "refcount_bits=64 a", "compat=0.10 a", "refcount_bits=16,compat=0.10 a"],
    [f"refcount_bits={bits} small" for bits in (2, 64, 8, 32, 4, 16)],
    ["refcount_bits=1 over", "refcount_bits=2 over", "compat=0.10 over", "refcount_bits=16 over"],
    ["compat=0.10 over", "compat=1.1 over"],
    ["compat=0.10 small", "lazy_refcounts=on small", "lazy_refcounts=on,compat=1.1 small"],
    ["size=8M a", "size=2M a", "size=2M,compat=0.10 a", "size=3M,lazy_refcounts=on,compat=1.1 a"],
    ["data_file=q e", "data_file=d e"],
    ["data_file= e"],
    ["compat=0.10 e", "data_file_raw=on e", "data_file_raw=off e"],
    ["compat=0.10 resized", "compat=v3,refcount_bits=8,size=3M resized", "compat=v2 resized"],
    ["compat=0.10 z", "compat=1.1 z"],
    ["compat=0.10 packed", "compat=0.10 zx"],
    ["compat=0.10 x", "refcount_bits=32 x", "lazy_refcounts=on x"],
    ["lazy_refcounts=off large", "compat=0.10 large"],
    ["lazy_refcounts=on,compat=0.10 a", "lazy_refcounts=on,compat=0.10 large"],
    [f"data_file_raw={word} f.qcow2" for word in ("on", "off", "on")],
    ["backing_file=base,backing_fmt=raw over", "backing_file=base over", "backing_fmt=raw over"],
]


@pytest.mark.parametrize("calls", RUNS, ids=lambda calls: calls[0].replace("=", " "))
def test_amended(pair, calls):
    for call in calls:
        options, name = call.split()
        pair.same(["amend", "-o", options, name], form=form)
        for line in ("info", "info --output=json", "check"):
            pair.same(f"{line} {name}", form=form)
        pair.same(f"map --output=json {name}", form=_places)
        if name not in ("e", "f.qcow2"):
            pair.same_disks(name)


def test_bitmaps_are_not_lost_to_version_2(pair):
    """QEMU forgets them, and what they take is leaked."""
    pair.prepare("bitmap --add a kept")
    wanted, got = pair.run("amend", "-o", "compat=0.10", "a")
    assert (wanted.code, got.code, got.out) == (0, 1, "")
    assert got.err == (
        "diskwright-img: Cannot downgrade an image with bitmaps, which version 2 would lose: "
        "remove them before (bitmap --remove)\n"
    )
    wanted, got = pair.run("check", "a")
    assert (wanted.code, got.code) == (3, 0)
    wanted, got = pair.run("info", "a")
    assert ("kept" in wanted.out, "kept" in got.out) == (False, True)


@pytest.mark.parametrize("name", ["a", "over", "small", "large"])
def test_progress_goes_by_the_tables(pair, name):
    wanted, got = pair.run("amend", "-p", "-o", "compat=0.10", name)
    assert got.out == wanted.out


def _places(text: str) -> str:
    """What is where in the disk; where in the file does not matter."""
    return re.sub(r", \"offset\": \d+", "", text)


@pytest.mark.parametrize(
    "line",
    [
        "amend a",
        "amend",
        "amend -o compat=1.1",
        "amend -o compat=1.1 a b",
        "amend -o compat=1.1 nofile",
        "amend -f foo -o compat=1.1 a",
        "amend -t foo -o compat=1.1 a",
        "amend -U -o compat=1.1 a",
        "amend --force -o compat=1.1 b",
        "amend -p -o lazy_refcounts=on b",
        "amend -p -o compat=7 b",
        "amend -p -o cluster_size=512 b",
        "amend -p -o nosuch=1 b",
        "amend -p -o compat=1.1 nosuch",
        "amend -p -q -o compat=1.1 b",
        "amend -o '' a",
        "amend -o compat a",
        "amend -o compat=7 a",
        "amend -o size=8E a",
        "amend -o size=18446744073709551615 a",
        "amend -o size=9223372036854775807 a",
        "amend -o size=9223372035781033984 a",
        "amend -o foo=1 a",
        "amend -o backing_file=b,backing_fmt=qcow2 a",
        "amend -o backing_file= a",
        "amend -o backing_fmt=raw a",
        "amend -o backing_file=b,foo=1 a",
        "amend -o cluster_size=4k a",
        "amend -o preallocation=off a",
        "amend -o compression_type=zlib a",
        "amend -o extended_l2=on a",
        "amend -o encryption=on a",
        "amend -o encrypt.state=active a",
        "amend -o encrypt.foo=active a",
        "amend -o data_file=x a",
        "amend -o data_file_raw=on a",
        "amend -o refcount_bits=3 a",
        "amend -o refcount_bits=128 a",
        "amend -o refcount_bits=x a",
        "amend -o refcount_bits=8,compat=0.10 a",
        "amend -o lazy_refcounts=on old",
        "amend -o lazy_refcounts=maybe a",
        "amend -o size=1 a",
        "amend -o size=-1 a",
        "amend -o size=99999999T a",
        "amend -f raw -o size=1M a",
        "amend -o static=on v",
        "amend -o help",
        "amend -o help -f raw",
        "amend -o help -f vdi",
        "amend -o help -f foo",
        "amend -f vdi -o size=1 a",
        "amend --image-opts -o compat=1.1 driver=qcow2,file.filename=a",
        "amend --image-opts -f qcow2 -o compat=1.1 driver=qcow2,file.filename=a",
        "amend --object secret,id=s,data=x -o compat=1.1 a",
    ],
)
def test_said_as_qemu_says_it(pair, line):
    pair.same(line, form=form)


def test_the_list_of_options(pair):
    """The same names and types; the sentences are ours."""
    for line in ("amend -o help -f qcow2", "amend -o help a"):
        words = line.split()
        listed = [
            [each.split(" - ")[0].rstrip() for each in done.out.splitlines()]
            for done in pair.run(*words)
        ]
        assert listed[0] == listed[1]
