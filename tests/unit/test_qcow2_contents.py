"""What a qcow2 image holds: random work by us, judged by QEMU; QEMU's images, read by us."""

from __future__ import annotations

import pytest

from diskwright.block.extent import DATA
from diskwright.errors import IOFailure
from tests.unit.qcow2_images import MIB, Fields, Qemu, create, memory_folder, opened, words

tmp_path = memory_folder


@pytest.fixture
def qemu(real, tmp_path) -> Qemu:
    return Qemu(real, tmp_path)


VARIANTS = [
    {},
    {"compat": "0.10"},
    {"cluster_size": 512},
    {"cluster_size": "2M"},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 1024, "refcount_bits": 2},
    {"cluster_size": 512, "refcount_bits": 4},
    {"refcount_bits": 8},
    {"refcount_bits": 32},
    {"cluster_size": 512, "refcount_bits": 64},
    {"lazy_refcounts": "on"},
    {"cluster_size": 4096, "preallocation": "metadata"},
]
SIZE = 2 * MIB + 512


def work(node, content, rng, steps):
    """Random requests to a node and to the bytes that it should hold."""
    for _ in range(steps):
        offset = rng.randrange(len(content))
        length = min(len(content) - offset, rng.choice([1, 512, 5000, 70000, 300000]))
        kind = rng.random()
        if kind < 0.6:
            data = rng.randbytes(length)
            node.write(offset, data)
            content[offset : offset + length] = data
        elif kind < 0.8:
            node.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            content[offset : offset + length] = bytes(length)
        else:
            node.discard(offset, length)
            content[offset : offset + length] = node.read(offset, length)
        if rng.random() < 0.1:
            node.flush()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_random_work_is_what_qemu_reads(qemu, tmp_path, rng, options):
    path, content = tmp_path / "work.qcow2", bytearray(SIZE)
    create(path, SIZE, **options)
    for _ in range(2):
        with opened(path) as node:
            work(node, content, rng, 60)
            assert node.read(0, SIZE) == content
            assert node.check().clean
        qemu.clean(path)
        qemu.same(path, content)


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"cluster_size": 4096}], ids=str)
def test_an_overlay_hides_what_was_written_to_it(qemu, tmp_path, rng, options):
    base, path = tmp_path / "base.qcow2", tmp_path / "over.qcow2"
    content = bytearray(rng.randbytes(MIB) + bytes(SIZE - MIB))
    create(base, MIB)
    with opened(base) as node:
        node.write(0, bytes(content[:MIB]))
    before = base.read_bytes()
    create(path, SIZE, **options, backing_file="base.qcow2", backing_fmt="qcow2")
    with opened(path) as node:
        assert node.read(0, SIZE) == content
        work(node, content, rng, 60)
        assert node.read(0, SIZE) == content
    qemu.clean(path)
    qemu.same(path, content)
    assert base.read_bytes() == before


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 * MIB])
def test_compressed_clusters_in_both_directions(qemu, tmp_path, rng, kind, cluster):
    content = bytearray(rng.randbytes(64) * (SIZE // 64))
    for start in range(0, SIZE, 3 * cluster):  # some do not become shorter, some are zero
        stop = min(start + cluster, SIZE)
        content[start:stop] = rng.choice([rng.randbytes, bytes])(stop - start)
    path, raw = tmp_path / "packed.qcow2", tmp_path / "plain.raw"
    raw.write_bytes(content)
    options = {"compression_type": kind, "cluster_size": cluster}
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", *words(options), raw, path)
    with opened(path) as node:
        assert node.read(0, SIZE) == content
        work(node, content, rng, 15)
        assert node.read(0, SIZE) == content
    qemu.clean(path)
    qemu.same(path, content)
    create(path, SIZE, **options)
    with opened(path) as node:
        encoder = node.encoder()
        for start in range(0, SIZE, cluster):
            plain = bytes(content[start : start + cluster])
            payload = encoder.encode(memoryview(plain.ljust(cluster, b"\0")))
            if payload is None:
                node.write(start, plain)
            else:
                node.write_encoded(start, payload, cluster)
        assert node.read(0, SIZE) == content
    qemu.clean(path)
    qemu.same(path, content)


def test_fresh_runs_lie_where_qemu_puts_them(qemu, tmp_path):
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    steps = [(0, 300000), (MIB, 65536), (MIB + 70000, 4096), (512, 1024), (SIZE - 4096, 4096)]
    for cluster in (512, 65536):
        for path in (ours, theirs):
            create(path, SIZE, cluster_size=cluster)
        with opened(ours) as node:
            for offset, length in steps:
                offset -= offset % 512
                node.write(offset, b"\5" * (length - length % 512))
        commands = [f"w -q -P 5 {o - o % 512} {n - n % 512}" for o, n in steps]
        qemu.io(theirs, *commands)
        said = [qemu.json("map", "--output=json", path) for path in (ours, theirs)]
        assert said[0] == said[1]


def test_extents_are_those_of_qemus_map(qemu, tmp_path):
    path = tmp_path / "map.qcow2"
    create(path, SIZE)
    qemu.io(path, "w -q 64k 128k", "w -q -z 512k 64k", "w -q -c -P 7 1M 64k")
    with opened(path, read_only=True) as node:
        found = [
            (extent.offset, extent.length, extent.kind == DATA, extent.allocated, extent.encoded)
            for extent in node.extents(0, node.size)
        ]
    wanted = [
        (run["start"], run["length"], run["data"], run["present"], run["compressed"])
        for run in qemu.json("map", "--output=json", path)
    ]
    assert found == wanted


def test_info_has_the_fields_of_qemus(qemu, tmp_path):
    path = tmp_path / "info.qcow2"
    for options in VARIANTS:
        create(path, SIZE, **options)
        said = qemu.json("info", "--output=json", path)
        with opened(path, read_only=True) as node:
            info = node.info()
        assert info.format_specific == said["format-specific"]["data"]
        assert (info.virtual_size, info.cluster_size) == (
            said["virtual-size"],
            said["cluster-size"],
        )
        assert (info.dirty, info.corrupt) == (
            said["dirty-flag"],
            False if "compat" in said else info.corrupt,
        )


def test_damage_seen_while_writing_ends_all_writes(qemu, tmp_path):
    wrongs = {
        "header": lambda f: f.put(f.l2, 1 << 63),
        "L1": lambda f: f.put(f.l2, 1 << 63 | f.l1),
        "refcount table": lambda f: f.put(f.l2, 1 << 63 | f.table),
        "refcount block": lambda f: f.put(f.l2, 1 << 63 | f.block),
        "L2": lambda f: f.put(f.l2, 1 << 63 | f.l2),
        "unaligned data": lambda f: f.put(f.l2, f.get(f.l2) + 512),
        "unaligned L2": lambda f: f.put(f.l1, f.get(f.l1) + 512),
    }
    for name, damage in wrongs.items():
        ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
        for path in (ours, theirs):
            create(path, SIZE)
            with opened(path) as node:
                node.write(0, b"x" * 4096)
            damage(Fields(path))
        said = qemu.io(theirs, "write 0 4k", fails=True)
        with opened(ours) as node:
            if "corrupt" not in said.err + said.out:
                node.write(0, b"y" * 4096)
                continue
            with pytest.raises(IOFailure) as caught:
                node.write(0, b"y" * 4096)
            assert str(caught.value) in said.err + said.out, name
            assert node.broken
        assert Fields(ours).get(72) == Fields(theirs).get(72) == 2, name


@pytest.mark.parametrize("way", ["fresh", "zeroed", "zeroed in its place", "written"])
def test_what_is_alike_is_one_run(tmp_path, way):
    """However many clusters it has: a walk over a disk takes a step for each run."""
    path, whole = tmp_path / "disk", 200 * 65536
    create(path, whole, preallocation="metadata" if way == "zeroed in its place" else "off")
    with opened(path) as node:
        if way == "written":
            node.write(0, bytes([1]) * whole)
        elif way != "fresh":
            node.write_zeroes(0, whole)
        for start in (0, 5 * 65536 + 512):
            with node.graph.request():
                assert node.map(start, whole - start).length == whole - start
