"""`convert`: every option that changes what comes out, over the formats, compared with QEMU's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair, difference, timeless
from tests.differential.programs import Program
from tests.differential.test_img_change import placeless

pytestmark = pytest.mark.peer

FORMATS = ("raw", "qcow2", "vdi", "vpc")

#: All make or fill `t`; sources: src.raw, src.qcow2, src.vdi, src.vpc, over.qcow2, odd.raw.
LINES = """
convert src.raw t
convert -q src.raw t
convert -p src.raw t
convert -p -q src.raw t
convert odd.raw t
convert -O qcow2 odd.raw t
convert -S 0 src.raw t
convert -S 4k src.raw t
convert -S 64k -O qcow2 src.raw t
convert -S 0 -O qcow2 src.qcow2 t
convert --sparse-size 1M src.raw t
convert -c -O qcow2 src.raw t
convert -c -O qcow2 -o compression_type=zstd src.qcow2 t
convert -c -O qcow2 -o cluster_size=4k src.raw t
convert -c -W -m 4 -O qcow2 src.raw t
convert -c -S 0 -O qcow2 src.raw t
convert -W -m 16 -O qcow2 src.raw t
convert -m 1 src.qcow2 t
convert -C src.raw t
convert -C -O qcow2 src.raw t
convert -r 100M src.raw t
convert -T none -t none src.qcow2 t
convert -T directsync -t directsync -O qcow2 src.raw t
convert -t writethrough -O vdi src.raw t
convert -T unsafe -t writeback src.raw t
convert -U src.qcow2 t
convert --salvage src.raw t
convert -f raw src.qcow2 t
convert -f qcow2 -O raw over.qcow2 t
convert -O qcow2 over.qcow2 t
convert -O qcow2 -B base.qcow2 -F qcow2 over.qcow2 t
convert -O qcow2 -B base.qcow2 -F qcow2 src.raw t
convert -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 over.qcow2 t
convert -c -O qcow2 -B base.qcow2 -F qcow2 over.qcow2 t
convert -O qcow2 -B base.raw -F raw src.raw t
convert -O qcow2 -B short.raw -F raw src.raw t
convert -O qcow2 -B short.raw -F raw over.qcow2 t
convert -c -O qcow2 -B short.raw -F raw src.raw t
convert -O qcow2 -B odd.raw -F raw src.raw t
convert -O qcow2 -o cluster_size=512 src.raw t
convert -O qcow2 -o compat=0.10 src.raw t
convert -O qcow2 -o lazy_refcounts=on,refcount_bits=64 src.raw t
convert -O qcow2 -o preallocation=metadata src.raw t
convert -O qcow2 -o preallocation=full src.raw t
convert -O raw -o preallocation=full src.qcow2 t
convert -O raw -o preallocation=falloc src.qcow2 t
convert -O vdi -o static=on src.raw t
convert -O vpc -o subformat=fixed src.raw t
convert -O vpc -o force_size=on src.raw t
convert -O vpc -o subformat=fixed,force_size=on src.vpc t
convert -l one src.qcow2 t
convert -l 2 -O qcow2 src.qcow2 t
convert -l snapshot.id=1 src.qcow2 t
convert -l snapshot.name=two src.qcow2 t
convert -l snapshot.id=1,snapshot.name=one src.qcow2 t
convert --snapshot two -c -O qcow2 src.qcow2 t
convert -l snapshot.id=1 src.qcow2 src.raw t
convert -l snapshot.name=two -O qcow2 src.qcow2 src.raw t
convert src.raw src.qcow2 odd.raw t
convert -O qcow2 src.raw src.vdi t
convert --image-opts driver=raw,offset=512,size=64k,file.filename=src.raw t
convert --source-image-opts driver=qcow2,file.filename=src.qcow2 -O qcow2 t
convert -n src.raw full.raw
convert -n -O qcow2 src.raw full.qcow2
convert -n -O qcow2 -c src.raw empty.qcow2
convert -n -S 0 -O qcow2 src.raw full.qcow2
convert -n --target-is-zero -O qcow2 src.raw empty.qcow2
convert -n --target-image-opts src.raw driver=qcow2,file.filename=full.qcow2
convert -n -O vdi src.raw full.vdi
convert -n -O vpc src.raw full.vpc
convert -n -O qcow2 odd.raw full.qcow2
convert --bitmaps -O qcow2 src.qcow2 t
convert --bitmaps --skip-broken-bitmaps -O qcow2 src.qcow2 t
convert --source-format raw --output-format qcow2 --output-cache none src.raw t
convert --object secret,id=s,data=1 src.raw t
convert 'json:{"driver":"qcow2","file":{"driver":"file","filename":"src.qcow2"}}' t
convert -O qcow2 null-co:// t
convert -O file src.raw t
convert src.raw existing
convert -O qcow2 src.raw existing
""".strip().splitlines()
LINES += [f"convert -f {a} -O {b} src.{a} t" for a in FORMATS for b in FORMATS]


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of every format with the same content, and targets that are full of something."""
    folder = tmp_path_factory.mktemp("pristine")
    img, io = real["qemu-img"], real["qemu-io"]

    def run(program: Program, *words: str) -> None:
        done = program.run(*words, cwd=folder)
        assert done.code == 0 and "failed" not in done.out, done

    run(img, "create", "-q", "src.raw", "2M")
    for command in (
        "write -P 1 0 9k",
        "write -P 2 64k 64k",
        "write -z 256k 64k",
        "write -P 3 700k 512",
        "write -P 4 1500k 100k",
        "write -P 5 2047k 1k",
    ):
        run(io, "-f", "raw", "-c", command, "src.raw")
    for format in ("vdi", "vpc"):
        run(img, "convert", "-O", format, "src.raw", f"src.{format}")
    run(img, "convert", "-O", "qcow2", "src.raw", "src.qcow2")
    run(img, "snapshot", "-c", "one", "src.qcow2")
    run(io, "-c", "write -P 8 128k 256k", "src.qcow2")
    run(img, "snapshot", "-c", "two", "src.qcow2")
    run(img, "snapshot", "-a", "one", "src.qcow2")
    run(img, "create", "-q", "-f", "qcow2", "base.qcow2", "2M")
    run(img, "create", "-q", "base.raw", "2M")
    (folder / "short.raw").write_bytes(b"6" * (150 << 10))
    run(io, "-c", "write -P 6 0 1M", "base.qcow2")
    run(io, "-f", "raw", "-c", "write -P 6 0 1M", "base.raw")
    run(img, *"create -q -f qcow2 -b base.qcow2 -F qcow2 over.qcow2".split())
    run(io, "-c", "write -P 7 512k 64k", "-c", "write -z 64k 64k", "over.qcow2")
    (folder / "odd.raw").write_bytes(b"odd" * 1000)
    (folder / "existing").write_bytes(b"old" * 1000)
    (folder / "full.raw").write_bytes(b"f" * (3 << 20))
    for format in FORMATS[1:]:
        run(img, "convert", "-O", format, "full.raw", f"full.{format}")
    run(img, "create", "-q", "-f", "qcow2", "empty.qcow2", "2M")
    return folder


#: Targets whose clusters are there from the beginning: how many of the zeroes in them are holes
#: of the file depends on how finely they are looked for.
PREALLOCATED = ("preallocation=", "static=on", "subformat=fixed")


def target_of(line: str) -> str:
    last = line.split()[-1]
    return last.rpartition("=")[2]


@pytest.mark.parametrize("line", LINES)
def test_convert(line: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    img = real["qemu-img"]
    pair = Pair(img, ours, tmp_path, pristine)
    pair.same(line, expect=0)
    pair.same_tree()
    name = target_of(line)
    looks = []
    for folder in pair.folders:
        info = img.run("info", "--output=json", name, cwd=folder)
        mapped = img.run("map", "--output=json", name, cwd=folder)
        checked = img.run("check", name, cwd=folder)
        assert (info.code, mapped.code) == (0, 0), (info, mapped)
        runs = "" if any(word in line for word in PREALLOCATED) else placeless(mapped.out)
        looks.append(f"{placeless(timeless(info.out))}\n{runs}\n{checked.code}")
    assert not difference(*looks), difference(*looks)
    both = [str(folder / name) for folder in pair.folders]
    known = ("-f", "vpc", "-F", "vpc") if "subformat=fixed" in line else ()
    compared = img.run("compare", *known, *both, cwd=tmp_path)
    assert compared.code == 0, compared


def test_salvage_says_what_it_could_not_read(real, ours, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    for folder in pair.folders:
        rules = '[inject-error]\nevent = "read_aio"\nerrno = "5"\nsector = "8"\n'
        (folder / "rules").write_text(rules)
        (folder / "src").write_bytes(b"s" * 65536)
    pair.same("convert -q --salvage -f raw blkdebug:rules:src t", expect=0)
    pair.same("convert --salvage -f raw blkdebug:rules:src t", expect=0)
    pair.same_files("t")


def test_a_read_that_fails_leaves_no_target(real, ours, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    for folder in pair.folders:
        rules = '[inject-error]\nevent = "read_aio"\nerrno = "5"\nsector = "8"\n'
        (folder / "rules").write_text(rules)
        (folder / "src").write_bytes(b"s" * 65536)
    wanted, got = pair.run(*"convert -f raw -O qcow2 blkdebug:rules:src t".split())
    assert (wanted.code, got.code) == (1, 1)
    assert "error while reading at byte" in got.err and "error while reading" in wanted.err


def test_a_target_above_another_is_not_zero(real, ours, pristine: Path, tmp_path: Path) -> None:
    """QEMU refuses it and writes nothing, but ends as if all were well; scripts rely on that."""
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    for more in ("", "-p"):
        line = f"convert -n {more} --target-is-zero -B base.raw -F raw -O qcow2 src.raw empty.qcow2"
        said = pair.same(line, expect=0)
        assert "has a backing file" in said.err
    pair.same_files("empty.qcow2")


#: Lines that read `bad.qcow2`, an image with a table entry that leads nowhere, or go through
#: `rules`, which fail the question what a sector is.
UNMAPPED = """
convert --salvage bad.qcow2 t
convert --salvage -m 1 -S 0 bad.qcow2 t
convert --salvage -q bad.qcow2 t
convert --salvage -O qcow2 bad.qcow2 t
convert --salvage -c -O qcow2 bad.qcow2 t
convert --salvage -O qcow2 -B base.qcow2 -F qcow2 bad.qcow2 t
convert --salvage -f raw src.raw bad.raw t
convert --salvage -f qcow2 bad.qcow2 bad.qcow2 t
convert --salvage table.qcow2 t
convert --salvage -c -O qcow2 table.qcow2 t
convert --salvage -f raw blkdebug:rules:bad.raw t
convert --salvage -f raw -O qcow2 blkdebug:once:bad.raw t
convert bad.qcow2 t
convert -f qcow2 src.qcow2 bad.qcow2 t
convert -f raw blkdebug:rules:bad.raw t
map bad.qcow2
map --output=json bad.qcow2
map table.qcow2
""".strip().splitlines()


@pytest.fixture(scope="module")
def unmapped(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unmapped")
    img, io = real["qemu-img"], real["qemu-io"]

    def run(program: Program, *words: str) -> None:
        done = program.run(*words, cwd=folder)
        assert done.code == 0, done

    run(img, *"create -q -f qcow2 base.qcow2 1M".split())
    run(img, *"create -q -f qcow2 -o cluster_size=4k src.qcow2 1M".split())
    run(io, "-c", "write -P 1 0 40k", "-c", "write -P 2 64k 6k", "src.qcow2")
    (folder / "src.raw").write_bytes(b"r" * 8192)
    (folder / "bad.raw").write_bytes(b"s" * 16384)
    image = bytearray((folder / "src.qcow2").read_bytes())
    table = int.from_bytes(image[40:48], "big")
    entries = int.from_bytes(image[table : table + 8], "big") & 0x00FFFFFFFFFFFE00
    image[entries + 2 * 8 + 6] |= 0x02  # the third cluster does not begin where one may
    (folder / "bad.qcow2").write_bytes(image)
    image[table + 6] |= 0x02  # nor does the table
    (folder / "table.qcow2").write_bytes(image)
    rule = '[inject-error]\niotype = "block-status"\nevent = "none"\nerrno = "5"\n'
    (folder / "rules").write_text(f'{rule}sector = "8"\n')
    (folder / "once").write_text(f'{rule}sector = "8"\nonce = "on"\n')
    return folder


def _in_order(text: str) -> str:
    """QEMU looks at eight places at a time: only which lines it says is certain."""
    return "\n".join(sorted(text.splitlines()))


@pytest.mark.parametrize("line", UNMAPPED)
def test_what_cannot_be_told_is_salvaged(
    line: str, real, ours, unmapped: Path, tmp_path: Path
) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, unmapped)
    salvages = "--salvage" in line
    pair.same(line, expect=0 if salvages else 1, form=_in_order)
    if salvages:
        pair.same_disks("t")


def test_nothing_is_emptied_for_a_data_file_that_cannot_be_compressed(real, ours, tmp_path) -> None:
    """qemu-img says the same, and has emptied the file by then."""
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 a 1M")
    for folder in pair.folders:
        done = real["qemu-io"].run("-c", "write -q -P 1 0 200k", "a", cwd=folder)
        assert done.code == 0, done
        (folder / "kept").write_bytes(b"keep me" * 1000)
    pair.same("convert -c -O qcow2 -o data_file=kept a x", expect=1)
    mine = pair.folders[1]
    assert (mine / "kept").read_bytes() == b"keep me" * 1000
    assert not (mine / "x").exists()
