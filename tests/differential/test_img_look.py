"""`map`, `check` and `compare`: commands that only look, at images that QEMU made and filled."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

CLUSTER = 65536

IMAGES = """
create -q a.raw 1M
create -q empty.raw 1M
create -q long.raw 2M
create -q -f qcow2 a.qcow2 1M
create -q -f qcow2 v2.qcow2 -o compat=0.10 1M
create -q -f qcow2 small.qcow2 -o cluster_size=512 70000
create -q -f qcow2 fat.qcow2 -o preallocation=full 1M
create -q -f qcow2 meta.qcow2 -o preallocation=metadata 1M
create -q -f qcow2 zero.qcow2 1M
create -q -f qcow2 kept.qcow2 -o preallocation=metadata 1M
create -q -f vdi a.vdi 4M
create -q -f vdi static.vdi -o static=on 2M
create -q -f vpc a.vpc 4M
create -q -f vpc fixed.vpc -o subformat=fixed 2M
create -q -f qcow2 -b a.qcow2 -F qcow2 over.qcow2 2M
create -q -f qcow2 -b over.qcow2 -F qcow2 top.qcow2
create -q -f qcow2 -b long.raw -F raw overraw.qcow2 1M
""".strip().splitlines()
#: What qemu-io writes, by image.
WRITES = {
    "a.raw": ("write -P 1 64k 8k", "write -P 2 1000k 24k"),
    "long.raw": ("write -P 1 64k 8k", "write -P 2 1000k 24k", "write -P 3 1536k 4k"),
    "a.qcow2": ("write -P 1 64k 8k", "write -z 192k 64k", "write -P 2 960k 64k"),
    "v2.qcow2": ("write -P 1 64k 8k",),
    "small.qcow2": ("write -P 1 0 512", "write -P 1 1024 3k", "write -z 8k 4k"),
    "fat.qcow2": ("write -z 128k 64k", "discard 256k 128k"),
    "zero.qcow2": ("write -z 0 1M",),
    "kept.qcow2": ("write -z 0 1M",),
    "meta.qcow2": ("write -P 7 128k 64k",),
    "a.vdi": ("write -P 1 1M 8k", "write -P 2 3M 64k"),
    "static.vdi": ("write -P 1 1M 8k",),
    "a.vpc": ("write -P 1 2M 8k",),
    "fixed.vpc": ("write -P 1 1M 8k",),
    "over.qcow2": ("write -P 5 128k 64k", "write -P 6 1536k 64k"),
    "top.qcow2": ("write -z 64k 64k", "write -P 8 512k 64k"),
    "overraw.qcow2": ("write -P 9 0 64k",),
}
FORMAT_BY_SUFFIX = {".raw": "raw", ".qcow2": "qcow2", ".vdi": "vdi", ".vpc": "vpc"}
NAMES = sorted({*WRITES, "empty.raw", "packed.qcow2", "zpacked.qcow2", "odd.raw", "tail.raw"})


@pytest.fixture(scope="module")
def pair(real, ours, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Both programs in folders with all images."""
    folder = tmp_path_factory.mktemp("pristine")
    img, io = real["qemu-img"], real["qemu-io"]
    for line in IMAGES:
        good(img, folder, line)
    for name, commands in WRITES.items():
        words = [word for command in commands for word in ("-c", command)]
        format = FORMAT_BY_SUFFIX[Path(name).suffix]
        done = io.run("-f", format, *words, name, cwd=folder)
        assert done.code == 0, done
    (folder / "odd.raw").write_bytes(b"odd" * 1000)
    with open(folder / "tail.raw", "wb") as file:
        file.truncate(65537)  # ends in a hole
    good(img, folder, "convert -c -O qcow2 long.raw packed.qcow2")
    good(img, folder, "convert -c -O qcow2 -o compression_type=zstd long.raw zpacked.qcow2")
    damage(folder)
    return Pair(img, ours, tmp_path_factory.mktemp("pair"), folder)


def good(img: Program, folder: Path, line: str) -> None:
    done = img.run(*line.split(), cwd=folder)
    assert done.code == 0, done


def damage(folder: Path) -> None:
    """Images with leaks, wrong refcounts and wrong entries, made of a.qcow2."""
    data = bytearray((folder / "a.qcow2").read_bytes()) + bytes(CLUSTER * 8)
    table, l1 = struct.unpack_from(">Q", data, 48)[0], struct.unpack_from(">Q", data, 40)[0]
    block = struct.unpack_from(">Q", data, table)[0]
    l2 = struct.unpack_from(">Q", data, l1)[0] & 0x00FFFFFFFFFFFE00
    for cluster in (10, 11):
        struct.pack_into(">H", data, block + 2 * cluster, 1)
    (folder / "leaks.qcow2").write_bytes(data)
    corrupt = bytearray(data)
    struct.pack_into(">H", corrupt, block + 2 * 5, 0)
    struct.pack_into(">H", corrupt, block + 2 * 6, 3)
    (folder / "refcounts.qcow2").write_bytes(corrupt)
    struct.pack_into(">Q", corrupt, l2 + 8 * 3, 0x8000000000000000 | 5 * CLUSTER | 0x200)
    (folder / "entries.qcow2").write_bytes(corrupt)


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("name", NAMES)
def test_map(name: str, output: str, pair: Pair) -> None:
    pair.same(f"map --output={output} {name}")


def through(name: str, *nodes: str, **first: object) -> str:
    """An image with nodes above it that pass it on."""
    spec: dict[str, object] = {
        "driver": FORMAT_BY_SUFFIX[Path(name).suffix],
        "file": {"driver": "file", "filename": name},
    }
    for node in reversed(nodes):
        child = "image" if node == "blkdebug" else "file"
        spec = {"driver": node, child: spec}
    return "json:" + json.dumps({**spec, **first}, separators=(",", ":"))


THROUGH = [
    ("over.qcow2", "raw"),
    ("top.qcow2", "raw"),
    ("top.qcow2", "raw", "raw"),
    ("overraw.qcow2", "raw"),
    ("a.qcow2", "raw"),
    ("fat.qcow2", "raw"),
    ("packed.qcow2", "raw"),
    ("a.vdi", "raw"),
    ("static.vdi", "raw"),
    ("a.vpc", "raw"),
    ("fixed.vpc", "raw"),
    ("over.qcow2", "blkdebug"),
    ("top.qcow2", "blkdebug"),
    ("a.qcow2", "blkdebug", "raw"),
]


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("words", THROUGH, ids="-".join)
def test_map_through_nodes_that_pass_on(words: tuple[str, ...], output: str, pair: Pair) -> None:
    pair.same(["map", f"--output={output}", through(*words)])


def test_map_of_a_window_onto_an_overlay(pair: Pair) -> None:
    pair.same(["map", "--output=json", through("over.qcow2", "raw", offset=65536)])


@pytest.mark.parametrize("nodes", [["raw"], ["raw", "raw"], ["blkdebug"], ["raw", "blkdebug"]])
@pytest.mark.parametrize("name", ["over.qcow2", "top.qcow2", "overraw.qcow2", "static.vdi"])
def test_what_lies_below_an_overlay_is_seen_through_nodes_above_it(
    name: str, nodes: list[str], pair: Pair, real, ours, tmp_path: Path
) -> None:
    spec = through(str(pair.folders[1] / name), *nodes)
    copied = ours.run("convert", "-O", "raw", spec, "copy", cwd=tmp_path)
    assert copied.code == 0, copied
    for program in (real["qemu-img"], ours):
        source = str(pair.folders[1] / name)
        compared = program.run("compare", "-F", "raw", source, "copy", cwd=tmp_path)
        assert (compared.code, compared.out) == (0, "Images are identical.\n"), compared
    compared = ours.run("compare", str(pair.folders[1] / name), spec, cwd=tmp_path)
    assert compared.code == 0, compared


@pytest.mark.parametrize("output", ["human", "json"])
def test_map_of_what_cannot_be_read(output: str, pair: Pair) -> None:
    spec = {
        "driver": "qcow2",
        "file": {
            "driver": "blkdebug",
            "inject-error": [{"event": "l2_load"}],
            "image": {"driver": "file", "filename": "a.qcow2"},
        },
    }
    pair.same(["map", f"--output={output}", f"json:{json.dumps(spec)}"], expect=1)


def test_map_of_a_vdi_image_that_points_nowhere_is_refused(pair: Pair, real, ours, tmp_path):
    """Where we differ: qemu-img prints an offset that no file has."""
    data = bytearray((pair.folders[0] / "a.vdi").read_bytes())
    (block_map,) = struct.unpack_from("<I", data, 0x154)
    struct.pack_into("<I", data, block_map + 4, 0x7FFFFF00)
    (tmp_path / "far.vdi").write_bytes(data)
    printed = real["qemu-img"].run("map", "far.vdi", cwd=tmp_path)
    assert printed.code == 0
    assert f"{0x7FFFFF00:x}00400" in printed.out
    refused = ours.run("map", "far.vdi", cwd=tmp_path)
    assert refused.code == 1
    assert len(refused.err.splitlines()) == 1
    assert "Could not read file metadata" in refused.err


MAPS = """
map -f raw a.qcow2
map -U top.qcow2
map --output=json -f raw a.qcow2
map --start-offset=64k top.qcow2
map --start-offset=65000 --max-length=100000 --output=json top.qcow2
map --start-offset=1000 --max-length=512 a.raw
map -s 1 -l 3 --output json a.raw
map --max-length=0 --output=json a.raw
map --max-length=0 a.raw
map --start-offset=1M --output=json a.raw
map --start-offset=9M a.raw
map --start-offset=2M --output=json top.qcow2
map --start-offset=1999k --max-length=1E --output=json top.qcow2
map --output=json --image-opts driver=raw,offset=64k,size=8k,file.filename=a.raw
map --image-opts driver=raw,offset=64k,file.filename=a.raw
map --output=json --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2
map --output=json json:{'driver':'null-co','read-zeroes':true}
map json:{'driver':'null-co','read-zeroes':true}
map --output=json -f file a.raw
map --image-opts driver=file,filename=a.raw
map --output=json --image-opts driver=null-co
map --image-opts driver=null-co
map --output=json --image-opts driver=null-aio,size=4096
map --output=json --image-opts driver=raw,file.driver=null-co,size=64k,offset=64k
map --image-opts driver=blkdebug,image.filename=a.raw
map --output=json --image-opts driver=blkdebug,image.filename=a.raw
map --output=json --image-opts driver=blkdebug,image.driver=qcow2,image.file.filename=top.qcow2
map blkdebug::a.raw
""".strip().splitlines()


@pytest.mark.parametrize("line", MAPS)
def test_map_of_a_part(line: str, pair: Pair) -> None:
    pair.same(line.split(" "))


CHECKS = [
    *(f"check {name}" for name in NAMES),
    *(f"check --output=json {name}" for name in NAMES),
    *(
        f"check {options}{name}.qcow2"
        for name in ("leaks", "refcounts", "entries")
        for options in ("", "--output=json ", "-q ", "-U ", "-q --output=json ")
    ),
    "check -f qcow2 -T none a.qcow2",
    "check -T writethrough a.vdi",
    "check --image-opts driver=qcow2,file.filename=a.qcow2",
    "check -q packed.qcow2",
]


@pytest.mark.parametrize("line", CHECKS)
def test_check(line: str, pair: Pair) -> None:
    pair.same(line)


@pytest.mark.parametrize("repair", ["leaks", "all"])
@pytest.mark.parametrize("name", ["a", "leaks", "refcounts", "packed"])
def test_repair(name: str, repair: str, pair: Pair, real, ours, tmp_path: Path) -> None:
    """The same is found, repaired and left; for people and as JSON."""
    for number, options in enumerate(([], ["--output=json"], ["-q"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        again = Pair(real["qemu-img"], ours, folder)
        for each in again.folders:
            (each / "x.qcow2").write_bytes((pair.folders[0] / f"{name}.qcow2").read_bytes())
        again.same(["check", *options, "-r", repair, "x.qcow2"])
        again.same(["check", "--output=json", "x.qcow2"])
        compared = real["qemu-img"].run(
            "compare", *(str(each / "x.qcow2") for each in again.folders), cwd=folder
        )
        assert compared.code == 0, compared


COMPARES = """
compare a.raw a.raw
compare -s a.raw a.raw
compare a.raw long.raw
compare long.raw a.raw
compare -s a.raw long.raw
compare a.raw empty.raw
compare -q a.raw empty.raw
compare a.qcow2 a.raw
compare -s a.qcow2 a.raw
compare a.qcow2 over.qcow2
compare over.qcow2 top.qcow2
compare -s over.qcow2 top.qcow2
compare packed.qcow2 long.raw
compare packed.qcow2 zpacked.qcow2
compare -s packed.qcow2 zpacked.qcow2
compare -s zero.qcow2 kept.qcow2
compare zero.qcow2 kept.qcow2
compare a.vdi a.vpc
compare -U -T none -f vdi -F vpc a.vdi a.vpc
compare --a-format raw --b-format raw a.qcow2 a.qcow2
compare --left-format raw --right-format qcow2 a.raw a.qcow2
compare -p a.raw a.raw
compare -p a.raw long.raw
compare -p -q a.raw long.raw
compare odd.raw odd.raw
compare odd.raw a.raw
compare empty.raw null-co://
compare fixed.vpc static.vdi
compare overraw.qcow2 long.raw
compare --image-opts driver=raw,file.filename=a.raw driver=qcow2,file.filename=a.qcow2
""".strip().splitlines()


@pytest.mark.parametrize("line", COMPARES)
def test_compare(line: str, pair: Pair) -> None:
    pair.same(line)


@pytest.mark.parametrize("line", ["compare a b", "compare b a"])
def test_compare_tells_of_a_table_that_cannot_be_read(line, real, ours, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 a 1M", "create -q -f raw b 1M")
    for folder in pair.folders:
        image = bytearray((folder / "a").read_bytes())
        table = struct.unpack_from(">Q", image, 40)[0]
        struct.pack_into(">Q", image, table, 1 << 63 | 0x40200)
        (folder / "a").write_bytes(image)
    pair.same(line, expect=3)


@pytest.mark.parametrize("sizes", ["same", "other"])
def test_compare_tells_a_read_that_fails(sizes: str, real, ours, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    for folder in pair.folders:
        (folder / "rules").write_text('[inject-error]\nevent = "read_aio"\nerrno = "5"\n')
        (folder / "one").write_bytes(b"1" * CLUSTER)
        (folder / "other").write_bytes(b"1" * CLUSTER if sizes == "same" else b"")
    pair.same("compare -f raw -F raw blkdebug:rules:one other", expect=4)


@pytest.mark.parametrize(
    "line",
    [
        "compare vast other",
        "compare vast unlike",
        "compare vast longer",
        "map vast",
        "map --output=json vast",
        "map --output=json longer",
        "measure -O qcow2 vast",
    ],
)
def test_a_sparse_disk_of_many_tebibytes(line: str, real, ours, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    for folder in pair.folders:
        good(real["qemu-img"], folder, "create -q -f qcow2 vast 16T")
        words = ("-f", "qcow2", "-c", "write -P 1 3T 64k", "-c", "write -z 9T 64k", "vast")
        assert real["qemu-io"].run(*words, cwd=folder).code == 0
        good(real["qemu-img"], folder, "create -q -f qcow2 -b vast -F qcow2 longer 17T")
        for name, command in (("other", "write -P 1 3T 64k"), ("unlike", "write -P 1 16000G 512")):
            good(real["qemu-img"], folder, f"create -q -f qcow2 {name} 16T")
            words = ("-f", "qcow2", "-c", command, name)
            assert real["qemu-io"].run(*words, cwd=folder).code == 0
    pair.same(line)


def test_an_image_over_its_own_bytes(real, ours, tmp_path: Path) -> None:
    """As raw they name nothing further: that is no circle."""
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare(
        "create -q -f raw a 1M",
        "create -q -f qcow2 -b a -F raw b",
        "create -q -f qcow2 -u -b b -F qcow2 a 1M",
    )
    for line in ("info a", "compare b b", "compare a a", "check a"):
        pair.same(line, expect=0)
    pair.same("info --backing-chain a", expect=1)


@pytest.mark.usefixtures("beyond_qemu")
def test_strict_comparison_of_other_tables(real, ours, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 -o cluster_size=512 small 2M", "create -q -f qcow2 large 2M")
    wanted, got = pair.run("compare", "-s", "small", "large")
    assert wanted.code == 1
    assert got.code == 0
