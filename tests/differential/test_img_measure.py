"""`measure`: the same numbers as qemu-img, for every create option, size and kind of source."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.differential import option_matrix
from tests.differential.img_pairs import Pair
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

#: Rows of options; those of a row are tried with each size and source.
OPTIONS = sorted(
    {
        *(combo.words for combo in option_matrix.pairs("qcow2") if combo.words),
        *(f"extended_l2=on,cluster_size={size}" for size in ("16k", "64k", "2M")),
        "backing_file=nofile",
        "backing_file=nofile,preallocation=metadata",
        "preallocation=full,backing_file=",
        "data_file=x,data_file_raw=on",
        "lazy_refcounts,compression_type=x",
        "size=7M,encryption=on,nocow=on",
    }
)
SIZES = ("0", "1", "65537", "10000000", "3G", "100T")

SOURCES = """
create -q hole.raw 9M
create -q -f qcow2 plain.q 3M
create -q -f qcow2 -o cluster_size=512 small.q 300k
create -q -f qcow2 -o preallocation=falloc full.q 2M
create -q -f qcow2 -o preallocation=metadata meta.q 2M
create -q -f qcow2 -b plain.q -F qcow2 over.q 5M
create -q -f vdi a.vdi 5M
create -q -f vpc a.vpc 5M
create -q -f qcow2 marked.q 10M
bitmap --add marked.q b0
bitmap --add -g 512 marked.q a-name-that-is-longer-than-others
create -q -f qcow2 lost.q 10M
bitmap --add lost.q b0
create -q -f qcow2 -o compat=0.10 old.q 1M
create -q -f qcow2 kept.q 4M
""".strip().splitlines()
WRITES = {
    "hole.raw": ("write -P 1 100k 3k", "write -P 0 3M 1M", "write -P 2 8191k 2k"),
    "plain.q": ("write -P 1 64k 100k", "write -z 1M 64k", "write -P 0 2M 64k"),
    "small.q": ("write -P 1 0 512", "write -P 2 1k 2k", "write -z 100k 1k"),
    "full.q": ("write -P 1 64k 64k",),
    "meta.q": ("write -P 1 64k 4k",),
    "over.q": ("write -P 3 3000k 200k", "write -z 64k 64k"),
    "a.vdi": ("write -P 1 1M 8k",),
    "a.vpc": ("write -P 1 2M 8k",),
    "kept.q": ("write -P 1 1M 1M",),
}
NAMES = (*sorted(WRITES), "packed.q", "marked.q", "lost.q", "old.q", "odd.raw")
FORMATS = {".raw": "raw", ".q": "qcow2", ".vdi": "vdi", ".vpc": "vpc"}
#: offset of a bitmap's flags in its directory entry, and the flag that says it was not stored
FLAGS_AT, IN_USE = 12, 1


@pytest.fixture(scope="module")
def pair(real: dict[str, Program], ours: Program, tmp_path_factory) -> Pair:
    """Both programs in folders with all sources."""
    folder = tmp_path_factory.mktemp("pristine")
    img, io = real["qemu-img"], real["qemu-io"]

    def good(program: Program, words: list[str]) -> None:
        done = program.run(*words, cwd=folder)
        assert done.code == 0, done

    for line in SOURCES:
        good(img, line.split())
    for name, commands in WRITES.items():
        words = [word for command in commands for word in ("-c", command)]
        good(io, ["-f", FORMATS[Path(name).suffix], *words, name])
    good(img, shlex.split("snapshot -c one kept.q"))
    good(io, ["-f", "qcow2", "-c", "write -P 2 2M 2M", "kept.q"])
    good(img, shlex.split("convert -c -O qcow2 plain.q packed.q"))
    (folder / "odd.raw").write_bytes(b"odd" * 1000)
    break_bitmap(folder / "lost.q")
    return Pair(img, ours, tmp_path_factory.mktemp("pair"), folder)


def break_bitmap(path: Path) -> None:
    """Say of the only bitmap of an image that it was in use when its writer died."""
    image = bytearray(path.read_bytes())
    at = 104
    while int.from_bytes(image[at : at + 4], "big") != 0x23852875:
        at += 8 + -(-int.from_bytes(image[at + 4 : at + 8], "big") // 8) * 8
    directory = int.from_bytes(image[at + 24 : at + 32], "big")
    image[directory + FLAGS_AT + 3] |= IN_USE
    path.write_bytes(image)


@pytest.mark.parametrize("options", OPTIONS)
def test_measured_for_a_size(options: str, pair: Pair) -> None:
    for size in SIZES:
        pair.same(["measure", "-O", "qcow2", "-o", options, "--size", size])


@pytest.mark.parametrize("options", OPTIONS)
def test_measured_for_an_image(options: str, pair: Pair) -> None:
    for name in ("hole.raw", "over.q", "marked.q"):
        pair.same(["measure", "-O", "qcow2", "-o", options, name])


@pytest.mark.parametrize("name", NAMES)
def test_measured_for_a_source(name: str, pair: Pair) -> None:
    for words in (
        "",
        "-O qcow2",
        "-O qcow2 --output=json",
        "-O raw --output=json",
        "-O qcow2 -o cluster_size=4k -U",
        "-O qcow2 -o cluster_size=512,compat=0.10",
        "-O qcow2 -o cluster_size=2M",
    ):
        pair.same(f"measure {words} {name}", expect=0)


@pytest.mark.parametrize(
    "line",
    [
        "measure -l one kept.q",
        "measure -l 1 kept.q",
        "measure -l snapshot.name=one kept.q",
        "measure -O qcow2 -l snapshot.id=1,snapshot.name=one kept.q",
        "measure --image-opts driver=qcow2,file.filename=plain.q -O qcow2",
        "measure -f raw plain.q",
        "measure --size 1k --size 2k",
        "measure -O qcow2 -o cluster_size=4k -o cluster_size=8k --size=1.5G",
        "measure -U --size 3",
        "measure -O raw -o preallocation=nonsense --size 9223372036854775807",
        "measure -O qcow2 --size 2P",
        "measure -O qcow2 -o cluster_size=512 --size 128G",
        "measure --object secret,id=s,data=x -O raw --size 512",
    ],
)
def test_other_ways_to_say_it(line: str, pair: Pair) -> None:
    pair.same(line, expect=0)


@pytest.mark.parametrize("name", ["hole.raw", "plain.q", "kept.q", "small.q"])
def test_what_is_measured_is_what_convert_makes(name: str, ours: Program, pair: Pair) -> None:
    """The file of a conversion is not longer than was promised."""
    folder = pair.folders[1]
    for options in ("cluster_size=64k", "cluster_size=4k", "preallocation=full"):
        words = ["-O", "qcow2", "-o", options, name]
        said = ours.run("measure", *words, cwd=folder).out
        assert ours.run("convert", *words, "made.tmp", cwd=folder).code == 0
        length = (folder / "made.tmp").stat().st_size
        assert length <= int(said.split()[2]), (options, said)
