"""`snapshot`, `resize`, `rebase`, `commit`: the same words, and disks that are the same after.

A scenario is a list of lines that both programs run, one after the other, in folders that begin
alike; `io` lines are run by qemu-io in both, to fill images between.
"""

from __future__ import annotations

import json
import re
import shlex
import struct
from pathlib import Path

import pytest

import diskwright
from tests.differential.img_pairs import Pair
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

SNAPSHOTS = {
    "make and list": """
        snapshot -c one a.qcow2
        io a.qcow2 write -P 7 0 128k
        snapshot -c two a.qcow2
        snapshot -l a.qcow2
        snapshot a.qcow2
        info a.qcow2
    """,
    "go back": """
        snapshot -c one a.qcow2
        io a.qcow2 write -P 7 0 128k
        snapshot -c two a.qcow2
        io a.qcow2 write -P 8 512k 128k
        snapshot -a one a.qcow2
        check a.qcow2
        snapshot -a 2 a.qcow2
        snapshot -l a.qcow2
    """,
    "delete": """
        snapshot -c one a.qcow2
        io a.qcow2 write -P 7 0 128k
        snapshot -c two a.qcow2
        snapshot -d one a.qcow2
        snapshot -l a.qcow2
        snapshot -d two a.qcow2
        snapshot -l a.qcow2
    """,
    "a long name": f"""
        snapshot -c {"y" * 300} a.qcow2
        snapshot -l a.qcow2
        snapshot -c {"z" * 70000} a.qcow2
        snapshot -l a.qcow2
        snapshot -d {"z" * 255} a.qcow2
    """,
    "names that are numbers": """
        snapshot -c 2 a.qcow2
        io a.qcow2 write -P 7 0 64k
        snapshot -c 1 a.qcow2
        io a.qcow2 write -P 8 0 64k
        snapshot -a 1 a.qcow2
        snapshot -l a.qcow2
    """,
    "names that are other ones' numbers": """
        io a.qcow2 write -P 1 0 64k
        snapshot -c one a.qcow2
        io a.qcow2 write -P 2 0 64k
        snapshot -c 1 a.qcow2
        io a.qcow2 write -P 3 0 64k
        snapshot -c 4 a.qcow2
        io a.qcow2 write -P 4 0 64k
        snapshot -c '' a.qcow2
        convert -l 1 -O raw a.qcow2 first
        convert -l 4 -O raw a.qcow2 fourth
        convert -l '' -O raw a.qcow2 unnamed
        convert -l snapshot.name=1 -O raw a.qcow2 named
        convert -l snapshot.id=1,snapshot.name=one -O raw a.qcow2 both
        convert -l snapshot.id=1,snapshot.id=2 -O raw a.qcow2 last
        compare fourth a.qcow2
        compare last named
        snapshot -d 1 a.qcow2
        snapshot -l a.qcow2
        snapshot -a 1 a.qcow2
        compare first a.qcow2
        compare both a.qcow2
        snapshot -d 4 a.qcow2
        snapshot -l a.qcow2
        snapshot -a '' a.qcow2
        compare unnamed a.qcow2
        snapshot -d '' a.qcow2
        snapshot -l a.qcow2
    """,
    "the same name twice": """
        snapshot -c one a.qcow2
        snapshot -c one a.qcow2
        snapshot -d one a.qcow2
        snapshot -l a.qcow2
        snapshot -q -c ünïcödé a.qcow2
        snapshot -U -l a.qcow2
    """,
    "of an overlay": """
        snapshot -c one over.qcow2
        io over.qcow2 write -P 7 0 128k
        snapshot -a one over.qcow2
        snapshot -l over.qcow2
    """,
    "of another size": """
        snapshot -c small a.qcow2
        resize a.qcow2 2M
        io a.qcow2 write -P 7 1536k 64k
        snapshot -c large a.qcow2
        snapshot -a small a.qcow2
        info a.qcow2
        snapshot -a large a.qcow2
        info a.qcow2
        snapshot -l a.qcow2
    """,
    "version 2": """
        snapshot -c one v2.qcow2
        io v2.qcow2 write -P 7 0 128k
        snapshot -a one v2.qcow2
        snapshot -l v2.qcow2
    """,
    "by options": """
        snapshot -c one --image-opts driver=qcow2,file.filename=a.qcow2
        snapshot -l --image-opts file.filename=a.qcow2
        snapshot -f qcow2 -d one a.qcow2
    """,
}

RESIZES = {
    "raw": """
        resize -f raw a.raw 2M
        resize a.raw +512k
        resize -f raw --shrink a.raw -1M
        resize -f raw -q a.raw +1
        resize -f raw a.raw ++1k
        info a.raw
    """,
    "raw, preallocated": """
        resize -f raw --preallocation=off a.raw 2M
        resize -f raw --preallocation=falloc a.raw 3M
        resize -f raw --preallocation=full a.raw 4M
        map --output=json a.raw
    """,
    "qcow2": """
        resize a.qcow2 3M
        io a.qcow2 write -P 9 2M 64k
        resize --shrink a.qcow2 1M
        resize a.qcow2 +512
        resize a.qcow2 1.5M
        map --output=json a.qcow2
    """,
    "qcow2, preallocated": """
        resize --preallocation=metadata a.qcow2 2M
        resize --preallocation=falloc a.qcow2 3M
        resize --preallocation=full a.qcow2 4M
        check a.qcow2
    """,
    "qcow2, very large": """
        resize a.qcow2 64G
        resize a.qcow2 1T
        check a.qcow2
        resize --shrink a.qcow2 1M
        check a.qcow2
    """,
    "qcow2 with small clusters": """
        resize small.qcow2 40M
        check small.qcow2
        resize --shrink small.qcow2 64k
        check small.qcow2
    """,
    "over a longer backing file": """
        resize --shrink over.qcow2 512k
        resize over.qcow2 1M
        map --output=json over.qcow2
    """,
    "the same size": """
        resize a.qcow2 1M
        resize -f raw a.raw 1M
        resize a.qcow2 +0
    """,
    "by options": """
        resize --image-opts driver=raw,file.filename=a.raw 2M
        resize --shrink --image-opts driver=qcow2,file.filename=a.qcow2 512k
    """,
}

COMMITS = {
    "plain": """
        commit over.qcow2
        map --output=json over.qcow2
        commit -q over.qcow2
    """,
    "keeping the overlay": """
        commit -d over.qcow2
        map --output=json over.qcow2
    """,
    "with a bar": """
        commit -p over.qcow2
    """,
    "into a raw file": """
        commit -f qcow2 overraw.qcow2
        map --output=json overraw.qcow2
    """,
    "two layers, one down": """
        commit top.qcow2
        map --output=json top.qcow2
    """,
    "two layers, to the bottom": """
        commit -b a.qcow2 top.qcow2
        map --output=json top.qcow2
    """,
    "a longer overlay": """
        resize over.qcow2 3M
        io over.qcow2 write -P 9 2500k 64k
        commit over.qcow2
        info a.qcow2
    """,
    "with a cache mode and a rate": """
        commit -t none -r 100M over.qcow2
        commit -t writethrough top.qcow2
    """,
    "by options": """
        commit --image-opts driver=qcow2,file.filename=over.qcow2
    """,
}

REBASES = {
    "to a copy": """
        rebase -b other.qcow2 -F qcow2 over.qcow2
        map --output=json over.qcow2
        info over.qcow2
    """,
    "to nothing": """
        rebase -b '' over.qcow2
        map --output=json over.qcow2
        info over.qcow2
        rebase -b a.qcow2 -F qcow2 over.qcow2
        map --output=json over.qcow2
    """,
    "without looking": """
        rebase -u -b other.qcow2 -F qcow2 over.qcow2
        info over.qcow2
        rebase -u -b nowhere -F raw over.qcow2
        info over.qcow2
        rebase -u -b '' over.qcow2
        info over.qcow2
        rebase -u over.qcow2
        info over.qcow2
    """,
    "with a bar": """
        rebase -p -b other.qcow2 -F qcow2 over.qcow2
        rebase -p -q -b a.qcow2 -F qcow2 over.qcow2
    """,
    "compressed": """
        rebase -c -b '' over.qcow2
        check over.qcow2
    """,
    "compressed, where data begin and end amid clusters": """
        rebase -c -b other.qcow2 -F qcow2 overraw.qcow2
        map --output=json overraw.qcow2
        check overraw.qcow2
        rebase -c -b a.raw -F raw over.qcow2
        map --output=json over.qcow2
        check over.qcow2
    """,
    "behind the end of the old file": """
        create -f qcow2 -b small.qcow2 -F qcow2 longer.qcow2 2M
        rebase -b other.qcow2 -F qcow2 longer.qcow2
        map --output=json longer.qcow2
        create -f qcow2 -b small.qcow2 -F qcow2 longer.qcow2 2M
        rebase -c -b other.qcow2 -F qcow2 longer.qcow2
        map --output=json longer.qcow2
        check longer.qcow2
    """,
    "to a raw file": """
        rebase -b a.raw -F raw over.qcow2
        map --output=json over.qcow2
        info --output=json over.qcow2
    """,
    "over another layer": """
        rebase -b a.qcow2 -F qcow2 top.qcow2
        map --output=json top.qcow2
    """,
    "to a shorter file": """
        rebase -b small.qcow2 -F qcow2 over.qcow2
        map --output=json over.qcow2
    """,
    "of an image that had none": """
        rebase -b other.qcow2 -F qcow2 a.qcow2
        map --output=json a.qcow2
    """,
    "with cache modes": """
        rebase -t none -T none -b other.qcow2 -F qcow2 over.qcow2
        rebase -U -b a.qcow2 -F qcow2 over.qcow2
    """,
    "to itself": """
        rebase -u -b over.qcow2 -F qcow2 over.qcow2
        info over.qcow2
    """,
}

SCENARIOS = [
    (f"{kind}: {name}", lines)
    for kind, table in (
        ("snapshot", SNAPSHOTS),
        ("resize", RESIZES),
        ("commit", COMMITS),
        ("rebase", REBASES),
    )
    for name, lines in table.items()
]


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images with content, and overlays of them."""
    folder = tmp_path_factory.mktemp("pristine")
    for line in (
        "create -q a.raw 1M",
        "create -q -f qcow2 a.qcow2 1M",
        "create -q -f qcow2 other.qcow2 2M",
        "create -q -f qcow2 v2.qcow2 -o compat=0.10 1M",
        "create -q -f qcow2 small.qcow2 -o cluster_size=512 70000",
        "create -q -f qcow2 -b a.qcow2 -F qcow2 over.qcow2",
        "create -q -f qcow2 -b over.qcow2 -F qcow2 top.qcow2",
        "create -q -f qcow2 -b a.raw -F raw overraw.qcow2",
    ):
        assert real["qemu-img"].run(*line.split(), cwd=folder).code == 0, line
    for name, commands in {
        "a.raw": ("write -P 1 0 96k", "write -P 2 900k 64k"),
        "a.qcow2": ("write -P 1 0 96k", "write -P 2 900k 64k", "write -z 256k 64k"),
        "other.qcow2": ("write -P 1 0 96k", "write -P 3 512k 64k", "write -P 4 1500k 64k"),
        "small.qcow2": ("write -P 1 0 9k",),
        "over.qcow2": ("write -P 5 128k 8k", "write -P 6 700k 64k"),
        "top.qcow2": ("write -z 0 64k", "write -P 7 640k 64k"),
        "overraw.qcow2": ("write -P 8 128k 64k", "write -z 0 64k"),
    }.items():
        for command in commands:
            fill(real["qemu-io"], folder, name, command)
    return folder


def fill(io: Program, folder: Path, name: str, command: str) -> None:
    format = "raw" if name.endswith(".raw") else "qcow2"
    done = io.run("-f", format, "-c", command, name, cwd=folder)
    assert done.code == 0 and "failed" not in done.out, done


_PLACE = re.compile(
    r"(file length: |Image end offset: |\"image-end-offset\": ).*"
    r"|(\"virtual-size\": \d+(?=,\s+\"filename\": \"[^\"]*\",\s+\"format\": \"file\"))"
)
_RUN = re.compile(
    r'\{ "start": (\d+), "length": (\d+), (.*?"compressed": \w+)(, "offset": \d+)?\},?\n?'
)


def placeless(text: str) -> str:
    """Without where in its file an image keeps its clusters; runs that then are alike joined."""
    joined: list[list] = []

    def take(found: re.Match[str]) -> str:
        start, length, state = int(found[1]), int(found[2]), found[3] + ("@" if found[4] else "")
        if joined and joined[-1][2] == state and joined[-1][0] + joined[-1][1] == start:
            joined[-1][1] += length
        else:
            joined.append([start, length, state])
        return ""

    rest = _PLACE.sub(lambda found: f"{found[1] or ''}SOMEWHERE", _RUN.sub(take, text))
    return rest + "\n".join(str(run) for run in joined)


@pytest.mark.parametrize(("name", "lines"), SCENARIOS, ids=[name for name, _ in SCENARIOS])
def test_scenario(name: str, lines: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    touched = set()
    for line in lines.strip().splitlines():
        words = shlex.split(line)
        if words[0] == "io":
            for folder in pair.folders:
                fill(real["qemu-io"], folder, words[1], " ".join(words[2:]))
        else:
            pair.same(words, expect=0, form=placeless)
        touched |= {path.name for path in pristine.iterdir() if path.name in line}
    pair.same_tree()
    if "-b nowhere" not in lines and "to itself" not in name:
        pair.same_disks(*sorted(touched))
    if "snapshot -c" in lines:
        same_snapshots(real["qemu-img"], pair, next(iter(sorted(touched))))


def same_snapshots(img: Program, pair: Pair, name: str) -> None:
    """Every snapshot shows the same in both images."""
    listed = img.run("snapshot", "-l", name, cwd=pair.folders[0])
    for line in listed.out.splitlines()[2:]:
        number = line.split()[0]
        for folder in pair.folders:
            words = ("convert", "-l", f"snapshot.id={number}", "-O", "raw", name, f"at-{number}")
            done = img.run(*words, cwd=folder)
            assert done.code == 0, done
        pair.same_files(f"at-{number}")


def damaged(data: bytes, how: str) -> bytes:
    """A dirty image with something wrong in its metadata beside."""
    image = bytearray(data)
    (l1,), (table,) = struct.unpack_from(">Q", image, 40), struct.unpack_from(">Q", image, 48)
    (block,) = struct.unpack_from(">Q", image, table)
    l2 = struct.unpack_from(">Q", image, l1)[0] & 0x00FFFFFFFFFFFE00
    if how == "leaks":
        struct.pack_into(">30H", image, block, *[7] * 30)
    elif how == "unaligned":
        struct.pack_into(">Q", image, l2, 1 << 63 | l2 + 0x10200)
    elif how == "corrupt":
        (features,) = struct.unpack_from(">Q", image, 72)
        struct.pack_into(">Q", image, 72, features | 2)
    elif how == "outside":
        struct.pack_into(">Q", image, l1, 1 << 63 | 1 << 40)
    return bytes(image)


@pytest.fixture(scope="module")
def dirty(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image whose writer was killed."""
    folder = tmp_path_factory.mktemp("dirty")
    make = "create -q -f qcow2 -o lazy_refcounts=on d.qcow2 4M"
    assert real["qemu-img"].run(*make.split(), cwd=folder).code == 0
    real["qemu-io"].run("-c", "write -P 7 0 1M", "-c", "sigraise 9", "d.qcow2", cwd=folder)
    data = (folder / "d.qcow2").read_bytes()
    assert data[79] & 1
    return data


FAILING = "json:" + json.dumps(
    {
        "driver": "qcow2",
        "file": {
            "driver": "blkdebug",
            "inject-error": [{"event": "pwritev", "errno": 28}],
            "image": {"driver": "file", "filename": "d.qcow2"},
        },
    },
    separators=(",", ":"),
)


@pytest.mark.parametrize("field", [(0, ">Q", 0x400200), (8, ">I", 0x10000000)])
@pytest.mark.parametrize(
    "line",
    [
        "convert -l s -O qcow2 a out",
        "amend -o compat=0.10 a",
        "snapshot -a s a",
        "snapshot -d s a",
        "check a",
    ],
)
def test_a_snapshot_without_its_table(line, field, real, ours, tmp_path):
    """The place and the length of a snapshot's L1 table, which cannot be."""
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 a 64M", "snapshot -c s a")
    place, form, value = field
    for folder in pair.folders:
        data = bytearray((folder / "a").read_bytes())
        table = struct.unpack_from(">Q", data, 64)[0]
        struct.pack_into(form, data, table + place, value)
        (folder / "a").write_bytes(data)
    pair.same(line)


def test_where_a_snapshot_lies(real, ours, tmp_path):
    """The table of snapshots is where QEMU has it, if the disk has data in one L2 table."""
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 a 64M")
    for folder in pair.folders:
        real["qemu-io"].run("-c", "write 0 512", "a", cwd=folder)
    pair.same("snapshot -c s a")
    places = [(folder / "a").read_bytes()[64:72] for folder in pair.folders]
    assert places[1] == places[0]


@pytest.mark.parametrize(
    "event", "read_aio l2_load l1_update empty_image_prepare reftable_update refblock_alloc".split()
)
def test_a_commit_that_fails(event, real, ours, tmp_path):
    """In reading, or in emptying the overlay, of which ours leaves no leaks."""
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 base 4M", "create -q -f qcow2 -b base -F qcow2 a")
    for folder in pair.folders:
        real["qemu-io"].run("-c", "write -P 1 0 64k", "a", cwd=folder)
        (folder / "conf").write_text(f'[inject-error]\nevent = "{event}"\nerrno = "28"\n')
    pair.same("commit blkdebug:conf:a", expect=1)
    assert pair.run("check", "a")[1].code == 0
    pair.same("compare a base")


@pytest.mark.parametrize("how", ["killed", "leaks", "unaligned", "corrupt", "outside"])
@pytest.mark.parametrize(
    "line",
    [
        "resize d.qcow2 8M",
        "snapshot -l d.qcow2",
        "snapshot -d none d.qcow2",
        "rebase -u -b '' d.qcow2",
        "commit -q d.qcow2",
        "info d.qcow2",
    ],
)
def test_a_dirty_image_is_repaired_and_that_is_told(line, how, dirty, real, ours, tmp_path):
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 a.qcow2 64k")
    for folder in pair.folders:
        (folder / "d.qcow2").write_bytes(damaged(dirty, how))
    pair.same(line)
    pair.same("check d.qcow2" if line.split()[0] in ("snapshot", "info") else "info d.qcow2")


@pytest.mark.parametrize("how", ["killed", "leaks", "corrupt"])
def test_a_dirty_target_is_repaired_and_that_is_told(how, dirty, real, ours, tmp_path):
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 a.qcow2 64k")
    for folder in pair.folders:
        (folder / "d.qcow2").write_bytes(damaged(dirty, how))
    pair.same("convert -n -O qcow2 a.qcow2 d.qcow2")


def test_a_dirty_image_that_cannot_be_repaired_is_not_opened(dirty, real, ours, tmp_path):
    pair = Pair(real["qemu-img"], ours, tmp_path)
    for folder in pair.folders:
        (folder / "d.qcow2").write_bytes(damaged(dirty, "leaks"))
    pair.same(["snapshot", "-c", "s", FAILING], expect=1)


def test_the_library_logs_that_an_image_was_repaired(dirty, tmp_path, caplog):
    (tmp_path / "d.qcow2").write_bytes(dirty)
    with diskwright.open(tmp_path / "d.qcow2", read_only=False):
        pass
    lines = [record.message for record in caplog.records if record.name == "diskwright"]
    assert "ERROR cluster 5 refcount=0 reference=1" in lines
    assert "Rebuilding refcount structure" in lines
