"""`create`: the same words, the same announcement, images that are alike to QEMU's tools."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair, timeless
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

#: Each makes `x`; the folder has base.raw (1 MiB), base.qcow2 (2 MiB) and small.raw (1000 bytes).
LINES = """
create x 1M
create x 0
create x 1000
create x 1.5k
create x 0x10000
create x 10b
create -q x 1M
create -f raw -o preallocation=off x 1M
create -f raw -o preallocation=falloc x 1M
create -f raw -o preallocation=full x 1M
create -f raw -o nocow=on x 64k
create -f raw -o extent_size_hint=1M x 64k
create -o size=1M x
create -o preallocation=full -o size=64k x
create -o size=1M,size=2M x
create file:x 64k
create -f file x 64k
create ./x 64k
create -f qcow2 -o size=18446744073709551615 -b base.qcow2 -F qcow2 x
create -f qcow2 x 64M
create -f qcow2 x 0
create -f qcow2 x 1000
create -f qcow2 x 1T
create -f qcow2 -q x 1M
create -f qcow2 -o cluster_size=512 x 3M
create -f qcow2 -o cluster_size=4k,size=5M x
create -f qcow2 -o cluster_size=2M x 1G
create -f qcow2 -o cluster_size=65536 x 1M
create -f qcow2 -o compat=0.10 x 1M
create -f qcow2 -o compat=1.1 x 1M
create -f qcow2 -o compat=v2 x 1M
create -f qcow2 -o compat=v3 x 1M
create -f qcow2 -o lazy_refcounts=on x 1M
create -f qcow2 -o lazy_refcounts x 1M
create -f qcow2 -o nolazy_refcounts x 1M
create -f qcow2 -o lazy_refcounts=yes,extended_l2=no x 1M
create -f qcow2 -o lazy_refcounts=y x 1M
create -f qcow2 -o lazy_refcounts=false x 1M
create -f vdi -o static=true x 1M
create -f vpc -o force_size=yes x 1M
create -o nocow=n x 1M
create -f qcow2 -o refcount_bits=1 x 1M
create -f qcow2 -o refcount_bits=8,cluster_size=1k x 10M
create -f qcow2 -o refcount_bits=64 x 1M
create -f qcow2 -o compression_type=zlib x 1M
create -f qcow2 -o compression_type=zstd x 1M
create -f qcow2 -o preallocation=metadata x 1M
create -f qcow2 -o preallocation=metadata,cluster_size=512 x 4M
create -f qcow2 -o preallocation=falloc x 1M
create -f qcow2 -o preallocation=full x 1M
create -f qcow2 -o preallocation=full,refcount_bits=1,cluster_size=4k x 1M
create -f qcow2 -o preallocation=metadata,lazy_refcounts=on x 128M
create -f qcow2 -o extended_l2=off x 1M
create -f qcow2 -b base.raw -F raw x
create -f qcow2 -b base.raw -F raw x 4M
create -f qcow2 -b base.qcow2 -F qcow2 x
create -f qcow2 -b ./base.qcow2 -F qcow2 x 1M
create -f qcow2 -b small.raw -F raw x
create -f qcow2 -u -b nowhere -F raw x 1M
create -f qcow2 -u -b nowhere,near -F raw x 1M
create -f qcow2 -o backing_file=nowhere,,,,near -F raw -u x 1M
create -f qcow2 -b 'json:{"driver":"raw","file":{"filename":"base.qcow2"}}' -F qcow2 x
create -f qcow2 -u -b base.raw -F raw -o preallocation=off x 1M
create -f qcow2 -o backing_file=base.raw,backing_fmt=raw x
create -f qcow2 -o backing_file=base.raw -F raw x 5M
create -f vdi x 64M
create -f vdi x 0
create -f vdi x 1000
create -f vdi -o static=on x 3M
create -f vdi -o static=off x 3M
create -f vdi -o preallocation=off x 3M
create -f vpc x 64M
create -f vpc x 1M
create -f vpc x 0
create -f vpc x 127G
create -f vpc -o subformat=dynamic x 10M
create -f vpc -o subformat=fixed x 10M
create -f vpc -o force_size=on x 10M
create -f vpc -o force_size=off x 10M
create -f vpc -o subformat=fixed,force_size=on x 3M
create -f vpc -o subformat=fixed,size=5M x
create --object secret,id=s,data=1 x 64k
create --format=qcow2 --options=cluster_size=1k --backing=base.raw --backing-format=raw x
create --backing base.raw -F raw --opt cluster_size=1k --form qcow2 x
create -fqcow2 -ocluster_size=1k -q x 1M
create -f qcow2 x -o cluster_size=1k 1M
create -f qcow2 -- x 1M
create -f qcow2 -u x 1M
""".strip().splitlines()


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What new images can build on."""
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "small.raw").write_bytes(bytes(1000))
    for line in ("create -q base.raw 1M", "create -q -f qcow2 base.qcow2 2M"):
        assert real["qemu-img"].run(*line.split(), cwd=folder).code == 0
    return folder


#: Fields that a run of the same program again would not have the same.
_UNLIKE = re.compile(r'("virtual-size": \d+,\s+"filename": "x",\s+"format": "file")')


def described(real: Program, folder: Path) -> str:
    """What qemu-img says of `x`: everything but how long and how dense the file is."""
    info = real.run("info", "--output=json", "x", cwd=folder)
    assert info.code == 0, info
    return _UNLIKE.sub('"virtual-size": FILE, "format": "file"', timeless(info.out))


@pytest.mark.parametrize("line", LINES)
def test_create(line: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    img = real["qemu-img"]
    pair = Pair(img, ours, tmp_path, pristine)
    pair.same(line, expect=0)
    pair.same_tree()
    wanted, got = pair.folders
    assert described(img, got) == described(img, wanted)
    broken = "nowhere" in line
    if not broken:
        checks = [img.run("check", "x", cwd=folder) for folder in pair.folders]
        assert checks[1].code == checks[0].code, checks[1]
        maps = [img.run("map", "--output=json", "x", cwd=folder) for folder in pair.folders]
        assert runs(maps[1].out) == runs(maps[0].out)


def runs(text: str) -> list[tuple]:
    """The runs of a map without where in the file they lie, joined where alike."""
    found: list[tuple] = []
    for entry in json.loads(text):
        state = (entry["depth"], entry["present"], entry["zero"], entry["data"])
        if found and found[-1][1] == state:
            found[-1] = (found[-1][0] + entry["length"], state)
        else:
            found.append((entry["length"], state))
    return found


def test_a_file_is_overwritten(real, ours, pristine: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    for folder in pair.folders:
        (folder / "x").write_bytes(b"old" * 100_000)
    pair.same("create x 64k", expect=0)
    pair.same_files("x")
    pair.same("create -f qcow2 x 64k", expect=0)
    pair.same_disks("x")


OPTION = re.compile(r"^  ([\w.-]+)=<([^>]*)>", re.MULTILINE)


@pytest.mark.parametrize(
    "line",
    [
        f"{command} -o help{name}"
        for command in (
            "create -f raw",
            "create -f qcow2",
            "create -f vdi",
            "create -f vpc",
            "create -f file",
            "convert -O qcow2",
            "convert -O raw",
        )
        for name in ("", " a x")
    ]
    + ["create -o ? x", "create -f qcow2 -o cluster_size=64k,help", "create -o help -o x x"],
)
def test_list_of_options(line: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    """The names and types are facts; what they are for is said in our words."""
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    wanted, got = pair.run(*line.split())
    assert (got.code, got.err) == (wanted.code, wanted.err) == (0, "")
    assert got.out.splitlines()[0] == wanted.out.splitlines()[0]
    offered = dict(OPTION.findall(got.out))
    for name, kind in OPTION.findall(wanted.out):
        assert offered.get(name) == kind, name
    assert list(offered) == sorted(offered)


@pytest.mark.usefixtures("beyond_qemu")
@pytest.mark.parametrize("words", ["encryption=on", "encrypt.format=luks,encrypt.key-secret=s"])
def test_encryption_is_refused_by_name(words: str, real, ours, tmp_path: Path) -> None:
    """It is not built yet; what is announced before is as QEMU announces it."""
    line = ["create", "-f", "qcow2", "-o", words, "x", "1M"]
    wanted = real["qemu-img"].run(*line, cwd=tmp_path)
    (tmp_path / "x").unlink(missing_ok=True)
    got = ours.run(*line, cwd=tmp_path)
    assert got.out == wanted.out
    assert got.code == 1
    name = words.partition("=")[0]
    assert got.err == f"diskwright-img: x: The qcow2 option '{name}' is not supported yet\n"
    assert not (tmp_path / "x").exists()


def test_encryption_that_is_off_changes_nothing(real, ours, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.same("create -f qcow2 -o encryption=off x 1M", expect=0)
    pair.same_disks("x")


CONFLICTS = (
    "extended_l2=on", "compat=0.10", "cluster_size=3k", "cluster_size=4k",
    "preallocation=metadata", "backing_fmt=qcow2", "backing_file=base.qcow2,backing_fmt=qcow2",
    "lazy_refcounts=on", "refcount_bits=8", "refcount_bits=3", "data_file_raw=on",
    "data_file=data", "compression_type=zstd", "preallocation=foo", "compression_type=foo",
    "compat=foo",
)  # fmt: skip


@pytest.mark.parametrize("first", CONFLICTS)
def test_which_conflict_is_told_first(first: str, real, ours, tmp_path: Path) -> None:
    """Of several options that do not go together, with each of the others and compat=0.10."""
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 base.qcow2 1M")
    later = CONFLICTS[CONFLICTS.index(first) + 1 :]
    for words in (*(f"{first},{other}" for other in later),
                  *(f"compat=0.10,{first},{other}" for other in later)):  # fmt: skip
        for folder in pair.folders:
            for name in ("x", "data"):
                (folder / name).unlink(missing_ok=True)
        pair.same(["create", "-q", "-f", "qcow2", "-o", words, "x", "1M"])


@pytest.mark.usefixtures("beyond_qemu")
@pytest.mark.parametrize("line", ["create -f raw -o size=18446744073709551105 x",
                                  "resize -f raw --shrink y +18446744073709550592"])  # fmt: skip
def test_sizes_do_not_begin_anew(line: str, real, ours, tmp_path: Path) -> None:
    """Near 2^64 qemu-img's do: an image becomes empty, or shorter."""
    for program, code in ((real["qemu-img"], 0), (ours, 1)):
        (tmp_path / "y").write_bytes(bytes(2 << 20))
        (tmp_path / "x").unlink(missing_ok=True)
        assert program.run(*line.split(), cwd=tmp_path).code == code
    assert not (tmp_path / "x").exists()
    assert (tmp_path / "y").stat().st_size == 2 << 20
