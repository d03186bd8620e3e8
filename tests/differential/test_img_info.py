"""`info`: what both programs say of the same images, for people and as JSON."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair, copy_tree, timeless
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

#: name -> how qemu-img makes it; what it builds on comes before it
IMAGES = {
    "a.raw": "create -q -f raw a.raw 1M",
    "odd.raw": "create -q -f raw odd.raw 1000",
    "a.qcow2": "create -q -f qcow2 a.qcow2 1M",
    "v2.qcow2": "create -q -f qcow2 -o compat=0.10 v2.qcow2 1G",
    "lazy.qcow2": "create -q -f qcow2 -o lazy_refcounts=on,cluster_size=512 lazy.qcow2 3M",
    "wide.qcow2": "create -q -f qcow2 -o refcount_bits=64,cluster_size=2M wide.qcow2 999M",
    "thin.qcow2": "create -q -f qcow2 -o refcount_bits=1 thin.qcow2 1T",
    "full.qcow2": "create -q -f qcow2 -o preallocation=full full.qcow2 1M",
    "zstd.qcow2": "create -q -f qcow2 -o compression_type=zstd zstd.qcow2 64M",
    "over.qcow2": "create -q -f qcow2 -b a.qcow2 -F qcow2 over.qcow2",
    "top.qcow2": "create -q -f qcow2 -b over.qcow2 -F qcow2 top.qcow2 2M",
    "rawbase.qcow2": "create -q -f qcow2 -b odd.raw -F raw rawbase.qcow2",
    "nobase.qcow2": "create -q -f qcow2 -u -b nowhere -F raw nobase.qcow2 1M",
    "noformat.qcow2": "rebase -u -b a.qcow2 -F qcow2 v2.qcow2",
    "json.qcow2": (
        "create -q -f qcow2 -u -F raw json.qcow2 1M -b "
        'json:{"driver":"raw","file":{"driver":"file","filename":"a.raw"}}'
    ),
    "marked.qcow2": "create -q -f qcow2 marked.qcow2 1M",
    "a.vdi": "create -q -f vdi a.vdi 1M",
    "static.vdi": "create -q -f vdi -o static=on static.vdi 5M",
    "a.vpc": "create -q -f vpc a.vpc 1M",
    "fixed.vpc": "create -q -f vpc -o subformat=fixed,force_size=on fixed.vpc 2M",
    "snapshots.qcow2": "create -q -f qcow2 -b a.qcow2 -F qcow2 snapshots.qcow2",
}
SNAPSHOTS = ("one", "sixteen_letters_", "a name that is longer than its column", "ünïcödé", "")

LINES = [
    *(f"info {name}" for name in IMAGES),
    *(f"info --output=json {name}" for name in IMAGES),
    "info -f raw a.qcow2",
    "info -f file a.raw",
    "info --output=json -f file a.raw",
    "info -b top.qcow2",
    "info --backing-chain --output=json top.qcow2",
    "info -b a.raw",
    "info -b --output json a.raw",
    "info -b json.qcow2",
    "info --output json json.qcow2",
    "info -U --output=human a.qcow2",
    "info ./a.qcow2",
    "info sub/../a.qcow2",
    "info file:a.raw",
    "info sub/over.qcow2",
    "info --output=json sub/over.qcow2",
    "info -b sub/over.qcow2",
    "info --image-opts driver=qcow2,file.driver=file,file.filename=a.qcow2",
    "info --image-opts file.filename=a.vdi",
    "info --image-opts driver=raw,offset=512,size=1024,file.filename=a.raw",
    "info --output=json --image-opts driver=raw,offset=512,file.filename=a.raw",
    "info --image-opts driver=raw,file.driver=blkdebug,file.image.filename=a.raw",
    "info --output=json --image-opts driver=raw,file.driver=blkdebug,file.image.filename=a.raw",
    "info blkdebug::a.qcow2",
    *(
        f"info {words}--image-opts "
        "driver=blkdebug,image.driver=qcow2,image.file.filename=over.qcow2"
        for words in ("", "--output=json ", "--backing-chain ", "--backing-chain --output=json ")
    ),
    "info --image-opts driver=raw,file.driver=qcow2,file.file.filename=over.qcow2",
    "info --object throttle-group,id=g,x-iops-total=1000 --image-opts "
    "driver=raw,file.driver=throttle,file.throttle-group=g,file.file.filename=a.raw",
    'info json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}',
    "info json:{'driver':'raw','offset':512,'file':{'driver':'file','filename':'a.raw'}}",
    'info json:{"file.filename":"a.raw","driver":"raw","size":512}',
    "info null-co://",
    "info --output=json null-co://",
    'info json:{"driver":"null-co","size":1023488}',
    'info json:{"driver":"null-co","size":"1P"}',
    "info --output=json snapshots.qcow2",
    "info a,comma.raw",
]


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many kinds."""
    folder = tmp_path_factory.mktemp("pristine")
    img = real["qemu-img"]
    for line in IMAGES.values():
        assert img.run(*line.split(), cwd=folder).code == 0, line
    for name in SNAPSHOTS:
        assert img.run("snapshot", "-c", name, "snapshots.qcow2", cwd=folder).code == 0
    for words in (("first",), ("second", "-g", "4096", "--disable")):
        assert img.run("bitmap", "--add", "marked.qcow2", *words, cwd=folder).code == 0
    (folder / "sub").mkdir()
    shutil.copy(folder / "over.qcow2", folder / "sub" / "over.qcow2")
    shutil.copy(folder / "a.qcow2", folder / "sub" / "a.qcow2")
    shutil.copy(folder / "a.raw", folder / "a,comma.raw")
    return folder


@pytest.fixture(scope="module")
def pair(real, ours, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Both programs in folders with all images; `info` changes none of them."""
    return Pair(real["qemu-img"], ours, tmp_path_factory.mktemp("pair"), pristine)


@pytest.mark.parametrize("line", LINES)
def test_info(line: str, pair: Pair) -> None:
    pair.same(line.split(" ", 2) if "json:" in line and " -" not in line else line.split(" "))


@pytest.mark.parametrize("name", ["over.qcow2", "sub/over.qcow2"])
@pytest.mark.parametrize("options", [[], ["--output=json"], ["--backing-chain"]])
def test_a_backing_file_beside_a_file_below_a_filter(name, options, pair: Pair) -> None:
    """The image has no plain name, and its folder is known all the same."""
    rules = [{"event": "read_aio", "new_state": 42}]
    file = {"driver": "file", "filename": name}
    below = {"driver": "blkdebug", "image": file, "set-state": rules}
    title = "json:" + json.dumps({"driver": "qcow2", "file": below})
    done = pair.same(["info", *options, title], expect=0)
    assert "a.qcow2" in done.out


SIZES = (512, 1023488, 1024000, 1047552, 1572864, 104806400, 1072693248, 1234567680, 1 << 40)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_in_words(size: int, pair: Pair) -> None:
    pair.same(["info", f'json:{{"driver":"null-co","size":{size}}}'], expect=0)


NAMES = [b'quote"back\\slash', b"tab\tnewline\n\x01\x7f", "é€😀".encode(), b"not\xff\xc3utf8"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_are_hard_to_print(name: bytes, real, ours, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    for folder in pair.folders:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(bytes(512))
    for options in (["--output=json"], []):
        pair.same(["info", *options, "-f", "raw", os.fsdecode(name)], expect=0)


def test_disk_size_is_the_file_systems(pair: Pair) -> None:
    """What other tests leave out: the size on the disk, of files that have holes or none."""
    for name in ("a.raw", "static.vdi", "full.qcow2", "a.qcow2"):
        wanted, got = pair.run("info", "--output=json", name)
        assert got.out == wanted.out


def test_timestamps_of_snapshots(real, ours, pristine: Path, tmp_path: Path) -> None:
    """One image read by both: the table with its dates, byte for byte."""
    folder = tmp_path / "one"
    copy_tree(pristine, folder)
    for line in ("snapshot -l snapshots.qcow2", "info --output=json snapshots.qcow2"):
        wanted, got = (
            program.run(*line.split(), cwd=folder) for program in (real["qemu-img"], ours)
        )
        assert got == wanted


#: what is wrong with a name -> (the backing file's, its format's, a snapshot's), as stored
CUT_SHORT = {
    "nothing": (b"a.raw", b"raw", b"snapped"),
    "in the name": (b"a.raw\0more", b"raw", b"snapped"),
    "before the name": (b"\0.raw", b"raw", b"snapped"),
    "in a name of nothing": (b"no\0.raw", b"raw", b"snapped"),
    "in the format": (b"a.raw", b"ra\0", b"snapped"),
    "before the format": (b"a.raw", b"\0aw", b"snapped"),
    "behind the format": (b"a.raw", b"raw\0\0zz", b"snapped"),
    "in the snapshot": (b"a.raw", b"raw", b"sna\0ped"),
    "before the snapshot": (b"a.raw", b"raw", b"\0napped"),
}


@pytest.mark.parametrize("case", CUT_SHORT)
def test_names_end_at_a_zero_byte(case: str, real, ours, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f raw a.raw 1M")
    pair.prepare("create -q -f qcow2 -b a.raw -F raw image", "snapshot -c snapped image")
    shutil.copy(pair.folders[0] / "image", pair.folders[1] / "image")
    for folder in pair.folders:
        _rename(folder / "image", *CUT_SHORT[case])
    for line in (
        "info image",
        "info --output=json image",
        "info --backing-chain image",
        "snapshot -l image",
        "map image",
        "map --output=json image",
        "check image",
        "convert -O qcow2 image copy",
        "rebase -u -b a.raw -F raw image",
        "info image",
        "snapshot -d sna image",
        "snapshot -l image",
        "resize image 2M",
    ):
        pair.same(line, form=timeless)


def _rename(path: Path, backing: bytes, format: bytes, snapshot: bytes) -> None:
    """Other names in place of "a.raw", "raw" and "snapped"."""
    image = bytearray(path.read_bytes())
    place, table = (int.from_bytes(image[at : at + 8], "big") for at in (8, 64))
    image[16:20] = len(backing).to_bytes(4, "big")
    image[place : place + len(backing)] = backing
    at = image.index(bytes.fromhex("e2792aca"))
    image[at + 4 : at + 8] = len(format).to_bytes(4, "big")
    image[at + 8 : at + 16] = format.ljust(8, b"\0")
    at = image.index(b"snapped", table)
    image[at : at + 7] = snapshot
    path.write_bytes(image)
