"""`--image-opts`: what is accepted and refused, as qemu-img does, and that options do something."""

from __future__ import annotations

import os
import struct

import pytest

import diskwright
from diskwright.block import table_cache
from diskwright.block.info import SnapshotInfo
from diskwright.errors import IOFailure
from tests.differential.img_pairs import Pair

pytestmark = pytest.mark.peer

MIB = 1 << 20

#: lists of options of an image a.qcow2 of version 3 and b.qcow2 of version 2
QCOW2 = """
cache-size=1M
l2-cache-size=1M
l2-cache-entry-size=64k
l2-cache-entry-size=512
l2-cache-entry-size=100
l2-cache-entry-size=256
l2-cache-entry-size=128k
refcount-cache-size=1M
cache-clean-interval=0
cache-clean-interval=0x10
cache-clean-interval=-1
cache-clean-interval=abc
cache-clean-interval=1k
cache-clean-interval=4294967296
cache-size=0
l2-cache-size=0
refcount-cache-size=0
l2-cache-size=-1
l2-cache-size=abc
l2-cache-size=8E
refcount-cache-size=8E
cache-size=8E
cache-size=8E,refcount-cache-size=1M
cache-size=8E,l2-cache-size=1M
cache-size=1M,l2-cache-size=2M
cache-size=1M,refcount-cache-size=2M
cache-size=1M,refcount-cache-size=512k
cache-size=1M,l2-cache-size=512k,refcount-cache-size=512k
overlap-check=all
overlap-check=none
overlap-check=constant
overlap-check=cached
overlap-check=foo
overlap-check.template=all
overlap-check.template=foo
overlap-check.main-header=off
overlap-check.main-header=x
overlap-check.foo=on
overlap-check=all,overlap-check.template=all
overlap-check=all,overlap-check.template=none
overlap-check.template=none,overlap-check=all
overlap-check.template=none,overlap-check.bitmap-directory=on
pass-discard-request=on
pass-discard-request=maybe
pass-discard-snapshot=off
pass-discard-other=on
discard-no-unref=on
lazy-refcounts=on
encrypt.key-secret=none
encrypt.format=luks
encrypt.format=
encrypt.format=aes,encrypt.key-secret=none
encrypt.foo=1
encrypt.foo.bar=1
encrypt=1
encrypt.format=luks,cache-size=0
encrypt.format=luks,discard-no-unref=on
foo.bar=1
foo.bar.baz=1
node-name=fine
node-name=1bad
node-name=bad name
node-name=#block123
node-name=
node-name=abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz
node-name=same,file.node-name=same
node-name=one,file.node-name=two
""".strip().splitlines()


@pytest.fixture
def pair(real, ours, tmp_path) -> Pair:
    made = Pair(real["qemu-img"], ours, tmp_path)
    made.prepare("create -f qcow2 a.qcow2 1M", "create -f qcow2 -o compat=0.10 b.qcow2 1M")
    return made


@pytest.mark.parametrize("words", QCOW2)
def test_options_of_qcow2(pair, words):
    pair.same(["info", "--image-opts", f"driver=qcow2,file.filename=a.qcow2,{words}"])


@pytest.mark.parametrize("below", ["file", "file.file", "file.image"])
def test_a_file_that_is_called_as_options_are_written(pair, below):
    pair.prepare("create -f qcow2 ./json:{} 1M")
    between = {"file.file": "file.driver=raw,", "file.image": "file.driver=blkdebug,"}
    words = f"{between.get(below, '')}{below}.driver=file,{below}.filename=json:{{}}"
    pair.same(["info", "--image-opts", f"driver=qcow2,{words}"], expect=0)


COMMON = """
read-only=true
read-only=yes
read-only=y
read-only=True
read-only=1
file.read-only=yes
auto-read-only=maybe
auto-read-only=n
cache.direct=yes
cache.direct=false
cache.no-flush=n
cache.writeback=on
cache.writeback=maybe
file.cache.writeback=off
""".split()


@pytest.mark.parametrize("words", COMMON)
def test_options_of_every_driver(pair, words):
    pair.same(["info", "--image-opts", f"driver=qcow2,file.filename=a.qcow2,{words}"])


@pytest.mark.parametrize("option", ["read-only=on", "file.read-only=on"])
@pytest.mark.parametrize(
    "line",
    [
        "resize {} 2M",
        "snapshot -c s {}",
        "snapshot -l {}",
        "check {}",
        "check -r all {}",
        "amend -o lazy_refcounts=on {}",
        "rebase -u -b x -F raw {}",
        "commit {}",
        "bench -w -c 1 {}",
        "bitmap --add {} b",
    ],
)
def test_what_is_to_be_read_only_is_not_opened_for_writing(pair, line, option):
    image = f"--image-opts driver=qcow2,file.filename=a.qcow2,{option}"
    pair.same(line.format(image))
    pair.same("info a.qcow2")


@pytest.mark.parametrize("word", ["true", "false", "y", "n", "yes", "no", "maybe"])
def test_what_is_written_for_on_and_off(pair, word):
    """Whoever asks for read-only storage and writes is refused, and nobody else."""
    image = f"driver=qcow2,file.filename=a.qcow2,file.read-only={word}"
    pair.same(["snapshot", "-l", "--image-opts", image])
    for common in ("read-only", "force-share"):
        pair.same(f"resize --image-opts driver=qcow2,file.filename=a.qcow2,{common}={word} 2M")


BACKING = """
backing.driver=raw
backing.driver=qcow2
backing.foo=1
backing.read-only=on
backing.file.filename=b.qcow2
backing.driver=qcow2,backing.file.filename=b.qcow2
backing.0=1
backing=
""".strip().splitlines()


@pytest.mark.parametrize("words", BACKING)
@pytest.mark.parametrize("driver", ["qcow2", "raw"])
@pytest.mark.parametrize("line", ["info", "info -b", "rebase -u -b b.qcow2 -F qcow2"])
def test_a_backing_file_that_is_not_opened_has_no_options(pair, line, driver, words):
    pair.same([*line.split(), "--image-opts", f"driver={driver},file.filename=a.qcow2,{words}"])


@pytest.mark.parametrize("words", BACKING[:-2])
@pytest.mark.parametrize("line", ["map", "check", "snapshot -l", "rebase -b b.qcow2 -F qcow2"])
def test_a_format_without_backing_files_has_no_options_of_them(pair, line, words):
    pair.same([*line.split(), "--image-opts", f"driver=raw,file.filename=a.qcow2,{words}"])


#: What stands in JSON where a word is meant.
SHAPES = ['["b.qcow2"]', "5", "1.5", '{"x":"b.qcow2"}', "null", "true", "[]", "{}", '""']

#: With a shape in the place of %s.
PLACES = """
{"driver":"qcow2","file":{"driver":"file","filename":%s}}
{"driver":"raw","file":{"filename":%s}}
{"driver":"file","filename":%s}
{"driver":%s,"file":{"driver":"file","filename":"a.qcow2"}}
{"driver":"raw","file":{"driver":%s,"filename":"a.qcow2"}}
{"driver":%s,"filename":"a.qcow2"}
{"driver":"raw","file":%s}
{"file":%s}
{"driver":"file","filename":"a.qcow2","file":%s}
{"driver":"blkdebug","image":%s}
{"driver":"qcow2","backing":%s,"file":{"driver":"file","filename":"a.qcow2"}}
{"driver":"raw","backing":%s,"file":{"driver":"file","filename":"a.qcow2"}}
{"driver":"file","backing":%s,"filename":"a.qcow2"}
{"driver":"raw","read-only":%s,"file":{"driver":"file","filename":"a.qcow2"}}
{"driver":"raw","discard":%s,"file":{"driver":"file","filename":"a.qcow2"}}
{"driver":"raw","detect-zeroes":%s,"file":{"driver":"file","filename":"a.qcow2"}}
{"driver":"raw","cache":%s,"file":{"driver":"file","filename":"a.qcow2"}}
{"driver":"qcow2","node-name":%s,"file":{"driver":"file","filename":"a.qcow2"}}
{"driver":"qcow2","lazy-refcounts":%s,"file":{"driver":"file","filename":"a.qcow2"}}
{"driver":"qcow2","overlap-check":%s,"file":{"driver":"file","filename":"a.qcow2"}}
""".strip().splitlines()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_no_word_in_json(pair, place, shape):
    for command in ("info", "map"):
        pair.same([command, "json:" + place.replace("%s", shape)])


REFERENCES = """
filename=a.qcow2
file=a.qcow2
file=
driver=raw,file=
driver=qcow2,file=a.qcow2
driver=file,file=a.qcow2
driver=file,file.filename=a.qcow2
driver=file,filename=a.qcow2,backing=b.qcow2
driver=blkdebug,image=a.qcow2
driver=raw,file.filename=a.qcow2,backing=b.qcow2
driver=raw,file.filename=a.qcow2,backing=
driver=qcow2,file.filename=a.qcow2,backing=b.qcow2
driver=qcow2,file.filename=a.qcow2,backing=b.qcow2,foo=1
driver=raw,file.driver=raw,file.file=a.qcow2
driver=raw,file.driver=blkdebug,file.image=a.qcow2
driver=null-co,filename=null-co://
driver=null-co,latency-ns=-1
driver=null-aio,latency-ns=9223372036854775808
""".strip().splitlines()


@pytest.mark.parametrize("words", REFERENCES)
@pytest.mark.parametrize("line", ["info", "map", "info --backing-chain"])
def test_names_of_nodes_that_are_not_there(pair, line, words):
    pair.same([*line.split(), "--image-opts", words])


@pytest.mark.parametrize("option", ["read-only=on", "file.read-only=on"])
@pytest.mark.parametrize(
    "line",
    [
        "resize --image-opts IMAGE 2M",
        "snapshot -c s --image-opts IMAGE",
        "rebase -u -b '' --image-opts IMAGE",
        "commit --image-opts IMAGE",
        "amend -o compat=0.10 --image-opts IMAGE",
        "bitmap --add --image-opts IMAGE b",
        "check -r all --image-opts IMAGE",
        "convert -n --target-image-opts b.qcow2 IMAGE",
        "bench -w -c 1 --image-opts IMAGE",
        "info --image-opts IMAGE",
    ],
)
def test_writing_to_what_an_option_made_read_only(pair, line, option):
    image = f"driver=qcow2,file.filename=a.qcow2,{option}"
    pair.same(line.replace("IMAGE", image))


@pytest.mark.parametrize(
    "words", ["discard-no-unref=on", "discard-no-unref=off", "lazy-refcounts=on"]
)
def test_options_that_version_2_has_not(pair, words):
    pair.same(["info", "--image-opts", f"driver=qcow2,file.filename=b.qcow2,{words}"])


@pytest.mark.parametrize(
    "line",
    [
        "resize --image-opts driver=qcow2,file.filename=a.qcow2,force-share=on 2M",
        "resize --image-opts driver=qcow2,file.filename=a.qcow2,file.force-share=on 2M",
        "snapshot -c s --image-opts driver=qcow2,file.filename=a.qcow2,force-share=on",
        "rebase -u -b '' --image-opts driver=qcow2,file.filename=a.qcow2,force-share=on",
        "info --image-opts driver=qcow2,file.filename=a.qcow2,force-share=on",
        "info -U --image-opts driver=qcow2,file.filename=a.qcow2,force-share=off",
        "info -U --image-opts driver=qcow2,file.filename=a.qcow2,force-share=no",
        "info -U --image-opts driver=qcow2,file.filename=a.qcow2,force-share=yes",
        "info -U --image-opts driver=qcow2,file.filename=a.qcow2,force-share=maybe",
        "info --image-opts driver=qcow2,file.filename=a.qcow2,force-share=maybe",
    ],
)
def test_force_share_and_writing(pair, line):
    pair.same(line)


# -------------------------------------------------------------------------- that they do something


def blocks(path) -> int:
    return os.stat(path).st_blocks * 512


def image(tmp_path, **create):
    path = tmp_path / "disk.qcow2"
    diskwright.create(path, 8 * MIB, format="qcow2", options=create)
    return path


@pytest.mark.parametrize("passed", [True, False])
def test_discards_reach_the_file_or_not(tmp_path, passed):
    path = image(tmp_path)
    options = {"pass-discard-request": passed}
    with diskwright.open(path, read_only=False, options=options) as node:
        node.write(0, b"x" * 4 * MIB)
        node.flush()
        node.discard(0, 4 * MIB)
    assert (blocks(path) < 2 * MIB) is passed


@pytest.mark.parametrize("passed", [True, False])
def test_what_a_snapshot_frees_reaches_the_file_or_not(tmp_path, real, passed):
    path = image(tmp_path)
    with diskwright.open(path, read_only=False) as node:
        node.write(0, b"x" * 4 * MIB)
    options = {"pass-discard-snapshot": passed}
    with diskwright.open(path, read_only=False, options=options) as node:
        node.snapshot_create(SnapshotInfo("", "s"))
        node.write(0, b"y" * 4 * MIB)
        node.snapshot_delete("s")
    assert (blocks(path) < 6 * MIB) is passed
    assert real["qemu-img"].run("check", str(path), cwd=tmp_path).code == 0


@pytest.mark.parametrize("passed", [True, False])
def test_space_of_what_is_discarded_can_be_kept(tmp_path, real, passed):
    path = image(tmp_path)
    options = {"discard-no-unref": "on", "pass-discard-request": passed}
    with diskwright.open(path, read_only=False, options=options) as node:
        node.write(0, b"x" * 4 * MIB)
        node.flush()
        before = os.path.getsize(path)
        node.discard(0, 2 * MIB)
        node.write_zeroes(2 * MIB, 2 * MIB, unmap=True)
        assert node.read(0, 4 * MIB) == bytes(4 * MIB)
        kept = [one.host_offset for one in node.extents(0, 4 * MIB)]
        assert None not in kept
        node.write(MIB, b"y" * MIB)
        node.flush()
        assert os.path.getsize(path) == before
        assert node.read(MIB, MIB) == b"y" * MIB
    assert (blocks(path) < 2 * MIB) is passed
    assert real["qemu-img"].run("check", str(path), cwd=tmp_path).code == 0
    read = real["qemu-io"].run(
        "-c", "r -P 0 0 1M", "-c", "r -P 0x79 1M 1M", str(path), cwd=tmp_path
    )
    assert "verification failed" not in read.out


def overlapping(tmp_path) -> str:
    """An image whose first data cluster is its refcount block."""
    path = image(tmp_path)
    with diskwright.open(path, read_only=False) as node:
        node.write(0, b"x")
    with open(path, "r+b") as file:
        head = file.read(64)
        (l1,) = struct.unpack(">Q", head[40:48])
        (table,) = struct.unpack(">Q", head[48:56])
        file.seek(table)
        block = file.read(8)
        file.seek(l1)
        (l2,) = struct.unpack(">Q", file.read(8))
        file.seek(l2 & ~(1 << 63))
        file.write(bytes([block[0] | 0x80]) + block[1:])
    return path


@pytest.mark.parametrize(
    ("words", "prevented"),
    [
        ({}, True),
        ({"overlap-check": "none"}, False),
        ({"overlap-check": "constant"}, False),
        ({"overlap-check": "all"}, True),
        ({"overlap-check.refcount-block": "off"}, False),
        ({"overlap-check.template": "none", "overlap-check.refcount-block": "on"}, True),
    ],
)
def test_writes_over_metadata_are_prevented_or_not(tmp_path, real, words, prevented):
    path = overlapping(tmp_path)
    listed = "".join(f",{name}={value}" for name, value in words.items())
    opened = f"driver=qcow2,file.filename={path}{listed}"
    copy = path.read_bytes()
    wrote = real["qemu-io"].run("--image-opts", opened, "-c", "w 0 512", cwd=tmp_path)
    assert ("Input/output error" in wrote.out + wrote.err) is prevented
    path.write_bytes(copy)
    with diskwright.open(path, read_only=False, options=words) as node:
        if prevented:
            with pytest.raises(IOFailure, match="overlaps with refcount block"):
                node.write(0, bytes(512))
        else:
            node.write(0, bytes(512))


def test_inactive_l2_tables_are_guarded_where_all_is(tmp_path, real):
    path = image(tmp_path)
    with diskwright.open(path, read_only=False) as node:
        node.write(0, b"x")
    assert real["qemu-img"].run("snapshot", "-c", "s", str(path), cwd=tmp_path).code == 0
    assert real["qemu-io"].run("-c", "w 0 64k", str(path), cwd=tmp_path).code == 0
    with diskwright.open(path, read_only=False) as node:
        plain = set(node.metadata)
    with diskwright.open(path, read_only=False, options={"overlap-check": "all"}) as node:
        assert node.metadata > plain


def test_tables_that_nobody_uses_are_forgotten(tmp_path, monkeypatch):
    path = image(tmp_path, cluster_size=512)
    now = [0.0]
    monkeypatch.setattr(table_cache, "monotonic", lambda: now[0])
    with diskwright.open(path, read_only=False) as node:
        for offset in range(0, MIB, 32768):
            node.write(offset, b"x")
    with diskwright.open(path, options={"cache-clean-interval": 10}) as node:
        for offset in range(0, MIB // 2, 32768):
            node.read(offset, 512)
        full = node.cache.bytes
        for _ in range(3):
            now[0] += 11
            node.read(MIB // 2 + int(now[0]) * 4096 // 11 * 8, 512)
        assert node.cache.bytes < full
        assert node.read(0, 1) == b"x"


def test_the_memory_for_tables_is_bounded_as_asked(tmp_path):
    path = image(tmp_path, cluster_size=512)
    with diskwright.open(path, read_only=False) as node:
        node.write(0, b"x" * 8 * MIB)
    with diskwright.open(path, options={"l2-cache-size": "4k"}) as node:
        assert node.read(0, 8 * MIB) == b"x" * 8 * MIB
        assert node.cache.bytes <= node.cache.capacity_bytes < 16384
    with diskwright.open(path, options={"l2-cache-entry-size": 512}) as node:
        node.read(0, 1)
        assert node.l2_table.slice_bytes == 512


@pytest.mark.parametrize("driver", ["null-co", "raw", "qcow2"])
@pytest.mark.parametrize("name", ["a.qcow2", "over.qcow2"])
@pytest.mark.parametrize("more", ["", ",backing.file.filename=b.qcow2"])
def test_options_of_the_backing_file(pair, name, driver, more):
    """Without a name they go with the one that the image has."""
    pair.prepare("create -f qcow2 -b a.qcow2 -F qcow2 over.qcow2")
    pair.same(
        ["map", "--image-opts", f"driver=qcow2,file.filename={name},backing.driver={driver}{more}"]
    )


def test_the_same_name_twice_in_a_chain(pair):
    pair.prepare("create -f qcow2 -b a.qcow2 -F qcow2 over.qcow2")
    words = "driver=qcow2,file.filename=over.qcow2,backing.node-name=x,node-name=x"
    pair.same(["map", "--image-opts", words])


@pytest.mark.parametrize("bytes_", [b"", b"QFI\xfb", b"QFI\xfb\0\0\0\x09", b"x" * 700, b"\0"])
def test_short_files_as_qcow2(pair, bytes_):
    for folder in pair.folders:
        (folder / "short").write_bytes(bytes_)
    pair.same("info -f qcow2 short", expect=1)


# -------------------------------------------------------------------------------------- filters

GROUP = "--object throttle-group,id=g"


@pytest.mark.parametrize(
    "line",
    [
        "info blkdebug::a.qcow2",
        "info -f qcow2 blkdebug::a.qcow2",
        "info --image-opts driver=blkdebug,image.filename=a.qcow2",
        "info --image-opts driver=blkdebug,image.driver=file,image.filename=a.qcow2",
        "info --image-opts driver=blkdebug,image.driver=qcow2,image.file.filename=a.qcow2",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2",
        "info --image-opts file.driver=blkdebug,file.image.filename=a.qcow2",
        "info --image-opts driver=raw,file.driver=qcow2,file.file.filename=a.qcow2",
        f"info {GROUP} --image-opts driver=throttle,throttle-group=g,file.filename=a.qcow2",
        f"info {GROUP} --image-opts driver=throttle,throttle-group=g,file.driver=qcow2,"
        "file.file.filename=a.qcow2",
        f"info {GROUP} --image-opts driver=qcow2,file.driver=throttle,file.throttle-group=g,"
        "file.file.filename=a.qcow2",
        f"info {GROUP} --image-opts file.driver=throttle,file.throttle-group=g,"
        "file.file.filename=a.qcow2",
        f"info {GROUP} --image-opts driver=throttle,throttle-group=g",
        "info --image-opts driver=throttle,throttle-group=none,file.filename=a.qcow2",
        "info --image-opts driver=throttle,file.filename=a.qcow2",
        "info --object secret,id=g,data=x --image-opts "
        "driver=throttle,throttle-group=g,file.filename=a.qcow2",
    ],
)
def test_what_is_below_a_filter(pair, line):
    """A plain name there is that of the storage: what is above the filter looks for a format."""
    pair.same(line)


@pytest.mark.parametrize(
    "words",
    [
        "driver=qcow2,filename=a.qcow2",
        "driver=qcow2,file.filename=a.qcow2,detect-zeroes=foo",
        "driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap",
        "driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap,discard=unmap",
        "driver=qcow2,file.filename=a.qcow2,cache.foo=x",
        "driver=qcow2,file.filename=a.qcow2,cache.direct=x",
        "driver=qcow2,file.filename=a.qcow2,discard=foo",
        "driver=null-co,file.filename=a.qcow2",
    ],
)
def test_options_of_every_node(pair, words):
    pair.same(["info", "--image-opts", words])


@pytest.mark.parametrize(
    "line",
    [
        "convert --target-image-opts -n a.qcow2",
        "convert --target-image-opts -n -S 0 a.qcow2",
        "convert --target-image-opts -n -S 64k a.qcow2",
        "map --image-opts",
    ],
)
@pytest.mark.parametrize("node", ["", "file."])
def test_who_gives_back_space_where_zeroes_are(pair, node, line):
    pair.prepare("create -f qcow2 t.qcow2 1G")
    words = "driver=qcow2,file.driver=file,file.filename=t.qcow2"
    pair.same(f"{line} {words},{node}detect-zeroes=unmap")


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"raw","file":[1]}',
        'json:{"driver":"qcow2","file":{}}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"},"x":{}}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"},"x":[1,{"a":2}]}',
    ],
)
def test_odd_json(pair, name):
    pair.same(["info", name], expect=1)


def test_an_empty_backing_file_is_none(pair):
    pair.prepare("create -f qcow2 -b a.qcow2 -F qcow2 over.qcow2")
    (pair.folders[1] / "a.qcow2").unlink()
    (pair.folders[0] / "a.qcow2").unlink()
    wanted, got = pair.run("map", "--image-opts", "driver=qcow2,file.filename=over.qcow2,backing=")
    assert (got.code, got.out) == (wanted.code, wanted.out)
