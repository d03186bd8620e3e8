"""Conversions through the library: what comes out is compared by qemu-img."""

from __future__ import annotations

import errno
import os
import random
import threading

import pytest

import diskwright
from diskwright.errors import CancelledError, DiskwrightError, IOFailure, LockError, OptionError
from diskwright.operations.convert import Target, Unfinished, convert_images
from diskwright.operations.copy import Copier, Copying
from diskwright.operations.opening import Image, open_image
from diskwright.operations.workers import Steering

MIB = 1 << 20
BITMAPS = Copying(bitmaps=True)
FORMATS = ("raw", "qcow2", "vdi", "vpc")


@pytest.fixture
def image(tmp_path, real):
    """Runs qemu-img in the test's folder."""

    def run(*words: str) -> str:
        done = real["qemu-img"].run(*words, cwd=tmp_path)
        assert done.code == 0, f"{words}: {done}"
        return done.out

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The test's folder, which is the current one too."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def disk(path, rng: random.Random, size: int = 11 * MIB + 3 * 512) -> None:
    """A raw disk with data, zeroes and holes of every alignment."""
    with open(path, "wb") as file:
        file.truncate(size)
        for _ in range(60):
            offset = rng.randrange(size)
            length = min(rng.choice((1, 512, 4096, 70_000, 600_000)), size - offset)
            file.seek(offset)
            file.write(bytes(length) if rng.random() < 0.3 else rng.randbytes(length))


def same(image, first: str, first_format: str, second: str, second_format: str) -> None:
    assert "identical" in image("compare", "-f", first_format, "-F", second_format, first, second)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_every_pair_of_formats(folder, image, rng, source, target):
    options = "force_size=on" if target == "vpc" else None
    disk("disk.raw", rng)
    image("convert", "-O", source, "-o", "force_size=on", "disk.raw", "from") if (
        source == "vpc"
    ) else image("convert", "-O", source, "disk.raw", "from")
    made = diskwright.convert(
        "from", "to", source_format=source, target_format=target, options=options
    )
    assert made.format == target
    same(image, "disk.raw", "raw", "to", target)
    if target in ("qcow2", "vdi"):
        image("check", "-f", target, "to")


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10",
        "refcount_bits=1",
        "preallocation=metadata",
        "preallocation=full",
        "lazy_refcounts=on",
    ],
)
def test_create_options(folder, image, rng, options):
    disk("disk.raw", rng, 3 * MIB)
    diskwright.convert(
        "disk.raw", "to", source_format="raw", target_format="qcow2", options=options
    )
    same(image, "disk.raw", "raw", "to", "qcow2")
    image("check", "to")


@pytest.mark.parametrize("options", ["", "compression_type=zstd", "cluster_size=4k"])
@pytest.mark.parametrize("threads", [1, 3])
def test_compressed(folder, image, rng, options, threads):
    disk("disk.raw", rng)
    made = diskwright.convert(
        "disk.raw",
        "packed",
        source_format="raw",
        target_format="qcow2",
        options=options,
        compress=True,
        threads=threads,
    )
    assert made.copied.data_bytes
    same(image, "disk.raw", "raw", "packed", "qcow2")
    image("check", "packed")
    assert '"compressed": true' in image("map", "--output=json", "packed")
    image("convert", "-c", "-O", "qcow2", "-o", options or "compat=1.1", "disk.raw", "theirs")
    diskwright.convert("theirs", "back.raw")
    same(image, "disk.raw", "raw", "back.raw", "raw")
    assert os.path.getsize("packed") < os.path.getsize("theirs") * 1.1


def test_units_of_a_sequential_encoder_are_written_in_order(folder, image, rng, monkeypatch):
    from diskwright.drivers.formats.qcow2.compression import ClusterEncoder

    monkeypatch.setattr(ClusterEncoder, "sequential", True)
    with open("disk.raw", "wb") as file:
        file.write(b"".join(rng.randbytes(700) * 100 for _ in range(300)))
    diskwright.convert("disk.raw", "packed", target_format="qcow2", compress=True, threads=4)
    same(image, "disk.raw", "raw", "packed", "qcow2")
    with diskwright.open("packed") as node:
        places = [
            node.unit_of(number, node.map(number << 16, 1 << 16) and entry).host_offset
            for number, entry in enumerate(node.l2_table.get(node.l1[0] & ~(1 << 63)).items)
            if entry and entry >> 62 & 1
        ]
    assert len(places) > 100
    assert places == sorted(places)


def test_sources_one_after_the_other(folder, image, rng):
    disk("one.raw", rng, 2 * MIB + 100)  # not whole sectors
    disk("two.raw", rng, MIB)
    diskwright.convert("two.raw", "two.qcow2", target_format="qcow2")
    convert_images(
        [Image("one.raw", format="raw"), Image("two.qcow2", format="qcow2")],
        Target("both.qcow2", format="qcow2"),
    )
    image("convert", "-O", "raw", "one.raw", "two.qcow2", "theirs.raw")
    same(image, "theirs.raw", "raw", "both.qcow2", "qcow2")


def test_sparse_sizes_leave_the_holes_that_qemu_leaves(folder, image, rng):
    disk("disk.raw", rng)
    for sparse in ("0", "4k", "64k"):
        diskwright.convert("disk.raw", "ours.raw", source_format="raw", sparse=sparse)
        image("convert", "-f", "raw", "-O", "raw", "-S", sparse, "disk.raw", "theirs.raw")
        same(image, "ours.raw", "raw", "theirs.raw", "raw")
        ours, theirs = os.stat("ours.raw").st_blocks, os.stat("theirs.raw").st_blocks
        assert theirs * 0.9 <= ours <= theirs + 16, sparse
    with pytest.raises(OptionError):
        diskwright.convert("disk.raw", "x", sparse=1000)


def test_only_what_the_backing_file_lacks_is_copied(folder, image, rng):
    disk("base.raw", rng, 4 * MIB)
    image("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "work.qcow2", "6M")
    with diskwright.open("work.qcow2", read_only=False) as node:
        node.write(MIB, b"n" * 100_000)
        node.write_zeroes(2 * MIB, 65536)
    how = {"target_format": "qcow2", "backing": "base.raw", "backing_format": "raw"}
    made = diskwright.convert("work.qcow2", "slim.qcow2", **how)
    assert made.copied.data_bytes < 300_000
    same(image, "work.qcow2", "qcow2", "slim.qcow2", "qcow2")
    image("convert", "-O", "qcow2", "-B", "base.raw", "-F", "raw", "work.qcow2", "theirs.qcow2")
    assert image("map", "slim.qcow2").replace("slim", "theirs") == image("map", "theirs.qcow2")
    with pytest.raises(OptionError, match="explicit backing format"):
        diskwright.convert("work.qcow2", "x", target_format="qcow2", backing="base.raw")
    assert not os.path.exists("x")


def test_into_an_existing_image(folder, image, rng):
    disk("disk.raw", rng, 2 * MIB)
    image("create", "-f", "qcow2", "there.qcow2", "4M")
    with diskwright.open("there.qcow2", read_only=False) as node:
        node.write(0, b"o" * 4 * MIB)
    diskwright.convert(
        "disk.raw", "there.qcow2", source_format="raw", target_format="qcow2", existing=True
    )
    with diskwright.open("there.qcow2") as node:
        with open("disk.raw", "rb") as file:
            assert node.read(0, 2 * MIB) == file.read()
        assert node.read(2 * MIB, 2 * MIB) == b"o" * 2 * MIB, "more than the source was changed"
    image("check", "there.qcow2")
    image("create", "-f", "qcow2", "small.qcow2", "1M")
    with pytest.raises(OptionError, match="bytes, 2097152 are needed"):
        diskwright.convert("disk.raw", "small.qcow2", target_format="qcow2", existing=True)


def test_a_snapshot_is_read(folder, image):
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    with diskwright.open("disk.qcow2", read_only=False) as node:
        node.write(0, b"before")
    diskwright.snapshot("disk.qcow2", create="then")
    with diskwright.open("disk.qcow2", read_only=False) as node:
        node.write(0, b"after!")
    for words in ("then", "1", "snapshot.name=then", "snapshot.id=1,snapshot.name=then"):
        diskwright.convert("disk.qcow2", "old.raw", snapshot=words)
        with open("old.raw", "rb") as file:
            assert file.read(6) == b"before"
    for words in ("never", "snapshot.id=7", "snapshot.id=1,snapshot.name=x"):
        with pytest.raises(DiskwrightError) as caught:
            diskwright.convert("disk.qcow2", "no.raw", snapshot=words)
        assert caught.value.qemu_message == "Failed to load snapshot: Can't find snapshot"
    assert not os.path.exists("no.raw")


# ------------------------------------------------------------------------- progress, cancel, errors


def test_progress_never_goes_back_and_ends_at_the_total(folder, rng):
    disk("disk.raw", rng)
    seen = []
    diskwright.convert(
        "disk.raw", "to", target_format="qcow2", progress=lambda *now: seen.append(now)
    )
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("compress", [False, True])
def test_a_cancelled_conversion_leaves_nothing(folder, rng, compress):
    disk("disk.raw", rng)
    flag = threading.Event()
    with pytest.raises(CancelledError):
        diskwright.convert(
            "disk.raw",
            "to",
            target_format="qcow2",
            compress=compress,
            cancel=flag,
            progress=lambda done, total: done > total // 3 and flag.set(),
        )
    assert not os.path.exists("to")


def _set() -> threading.Event:
    flag = threading.Event()
    flag.set()
    return flag


@pytest.mark.parametrize(
    "refused",
    [
        {"compress": True, "target_format": "raw"},
        {"compress": True, "target_format": "vdi"},
        {"backing": "nosuch", "backing_format": "raw", "target_format": "qcow2"},
        {"cancel": _set()},
        {"threads": 0},
        {"rate": -1},
    ],
    ids="-".join,
)
def test_what_is_refused_leaves_the_target_alone(folder, rng, refused):
    disk("disk.raw", rng)
    with open("precious", "wb") as file:
        file.write(b"precious")
    os.symlink("precious", "to")
    with pytest.raises(DiskwrightError):
        diskwright.convert("disk.raw", "to", **refused)
    with open("precious", "rb") as file:
        assert file.read() == b"precious"
    assert os.path.islink("to")


def test_what_fails_half_way_is_removed_behind_a_link(folder, rng):
    disk("disk.raw", rng)
    os.symlink("real", "to")
    flag = threading.Event()
    with pytest.raises(CancelledError):
        diskwright.convert("disk.raw", "to", cancel=flag, progress=lambda *_: flag.set())
    assert os.path.islink("to")
    assert not os.path.exists("real")


def test_a_target_that_is_not_finished_is_no_image(folder, real, tmp_path):
    for format in ("qcow2", "vdi"):
        diskwright.create("to", "1M", format=format)
        with Unfinished("to", "unsafe", ()) as unfinished:
            with open_image(Image("to", format=format), read_only=False) as node:
                unfinished.begin(node)
                node.write(0, b"half")
                node.flush()
                meanwhile = real["qemu-img"].run("info", "-U", "--output=json", "to", cwd=tmp_path)
                assert '"format": "raw"' in meanwhile.out
        assert real["qemu-img"].run("check", "-f", format, "to", cwd=tmp_path).code == 0
        with diskwright.open("to") as node:
            assert node.driver == format
            assert node.read(0, 4) == b"half"


def test_a_target_that_somebody_else_writes_to_stays(folder, rng, monkeypatch):
    """Whoever shares everything can open the file as soon as it is there."""
    from diskwright.block.opener import Opener, open_image
    from diskwright.operations import create

    disk("disk.raw", rng)
    make, other = create.make, []

    def opened(*args, **words):
        made = make(*args, **words)
        other.append(open_image(Opener(read_only=False), "to", format="raw"))
        return made

    monkeypatch.setattr(create, "make", opened)
    with pytest.raises(LockError) as raised:
        diskwright.convert("disk.raw", "to", target_format="qcow2")
    assert raised.value.qemu_message.startswith("Could not open 'to': Failed to get shared")
    assert os.path.exists("to")
    other[0].close()


def test_a_killed_conversion_leaves_no_image(folder, rng):
    import signal
    import subprocess
    import sys

    disk("disk.raw", rng)
    code = (
        "import diskwright, os, signal\n"
        "def stop(done, total):\n"
        "    if done > total // 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "diskwright.convert('disk.raw', 'to', target_format='qcow2', progress=stop)"
    )
    root = os.path.dirname(os.path.dirname(diskwright.__file__))
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.path.getsize("to") > MIB
    assert diskwright.info("to").format == "raw"
    with pytest.raises(DiskwrightError, match="not in qcow2 format"):
        diskwright.open("to", format="qcow2")


def test_a_read_error_says_where_and_leaves_nothing(folder, rng):
    disk("disk.raw", rng, MIB)
    os.truncate("disk.raw", MIB)
    with open("rules", "w") as file:
        file.write('[inject-error]\nevent = "read_aio"\nerrno = "5"\nsector = "1000"\n')
    with open("disk.raw", "r+b") as file:
        file.write(b"d" * MIB)
    with pytest.raises(IOFailure) as caught:
        diskwright.convert("blkdebug:rules:disk.raw", "to", source_format="raw")
    assert caught.value.qemu_message.startswith("error while reading at byte ")
    assert caught.value.qemu_message.endswith(": Input/output error")
    assert not os.path.exists("to")
    lost = []
    made = diskwright.convert(
        "blkdebug:rules:disk.raw",
        "to",
        source_format="raw",
        salvage=lambda offset, error: lost.append(offset),
    )
    assert lost == [1000 * 512]
    assert made.copied.salvaged_bytes == 512
    with open("to", "rb") as file:
        assert file.read() == b"d" * 512_000 + bytes(512) + b"d" * (MIB - 512_512)


def test_a_write_error_leaves_nothing(folder, rng, monkeypatch):
    from diskwright.system import host

    disk("disk.raw", rng)
    calls = iter(range(1000))
    plain = host.write_all

    def full(descriptor, offset, view):
        if len(view) > 66_000 and next(calls) > 2:  # no table is that long
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(descriptor, offset, view)

    monkeypatch.setattr(host, "write_all", full)
    with pytest.raises(IOFailure) as caught:
        diskwright.convert("disk.raw", "to", target_format="qcow2")
    assert caught.value.kind == "no-space"
    assert caught.value.qemu_message.startswith("error while writing at byte ")
    assert caught.value.qemu_message.endswith(": No space left on device")
    assert not os.path.exists("to")


@pytest.mark.parametrize(
    ("words", "how"),
    [
        (("-O", "nope"), {"target_format": "nope"}),
        (("-O", "qcow2", "-o", "nope=1"), {"target_format": "qcow2", "options": "nope=1"}),
        (("-O", "qcow2", "-o", "cluster_size=3k"),
         {"target_format": "qcow2", "options": "cluster_size=3k"}),
        (("-c",), {"compress": True}),
        (("-c", "-O", "qcow2", "-o", "preallocation=full"),
         {"target_format": "qcow2", "compress": True, "options": "preallocation=full"}),
        (("-B", "disk.raw", "-F", "raw"), {"backing": "disk.raw", "backing_format": "raw"}),
        (("-O", "qcow2", "-B", "disk.raw"), {"target_format": "qcow2", "backing": "disk.raw"}),
        (("-O", "qcow2", "-B", "gone", "-F", "raw"),
         {"target_format": "qcow2", "backing": "gone", "backing_format": "raw"}),
        (("-n",), {"existing": True}),
        (("-l", "x"), {"snapshot": "x"}),
    ],
)  # fmt: skip
def test_refusals_are_in_qemus_words(folder, real, tmp_path, rng, words, how):
    disk("disk.raw", rng, MIB)
    theirs = real["qemu-img"].run("convert", "-f", "raw", *words, "disk.raw", "to", cwd=tmp_path)
    assert theirs.code == 1
    left = os.path.exists("to")
    with pytest.raises(DiskwrightError) as caught:
        diskwright.convert("disk.raw", "to", source_format="raw", **how)
    assert f"qemu-img: {caught.value.qemu_message}" == theirs.err.strip()
    assert left or not os.path.exists("to")


def test_the_source_is_not_overwritten(folder, rng):
    disk("disk.raw", rng, MIB)
    with open("disk.raw", "rb") as file:
        before = file.read()
    with pytest.raises(DiskwrightError) as caught:
        diskwright.convert("disk.raw", "disk.raw", source_format="raw")
    assert 'Failed to get "write" lock' in caught.value.qemu_message
    with open("disk.raw", "rb") as file:
        assert file.read() == before


# --------------------------------------------------------------------------------------- sharing


class _Shares:
    """A file system that shares blocks, played by copying: which ranges were asked for."""

    def __init__(self, monkeypatch, *, refuse: bool = False) -> None:
        from diskwright.system import host

        self.ranges = []

        def clone(source, offset, target, target_offset, *, length):
            if refuse:
                raise OSError(errno.EOPNOTSUPP, "no")
            if (offset | target_offset | length) % 4096 or offset >= os.fstat(source).st_size:
                raise OSError(errno.EINVAL, "not aligned")
            self.ranges.append((offset, target_offset, length))
            os.pwrite(target, os.pread(source, length, offset), target_offset)

        monkeypatch.setattr(host, "clone_range", clone)


@pytest.mark.usefixtures("ways_around")
@pytest.mark.parametrize("source", ["raw", "qcow2"])
@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_blocks_are_shared_where_the_file_system_does(
    folder, image, rng, monkeypatch, source, target
):
    disk("disk.raw", rng, 40 * MIB)
    with open("disk.raw", "r+b") as file:
        file.seek(20 * MIB)
        file.write(b"long" * 2 * MIB)
    image("convert", "-O", source, "disk.raw", "from")
    shares = _Shares(monkeypatch)
    made = diskwright.convert("from", "to", source_format=source, target_format=target)
    assert shares.ranges
    assert made.copied.shared_bytes == sum(length for _, _, length in shares.ranges)
    same(image, "disk.raw", "raw", "to", target)
    if target != "raw":
        image("check", "-f", target, "to")


def test_one_refusal_is_enough(folder, image, rng, monkeypatch):
    disk("disk.raw", rng)
    _Shares(monkeypatch, refuse=True)
    made = diskwright.convert("disk.raw", "to", source_format="raw", target_format="qcow2")
    assert made.copied.shared_bytes == 0
    same(image, "disk.raw", "raw", "to", "qcow2")
    image("check", "to")


@pytest.mark.usefixtures("ways_around")
def test_the_kernel_copies_where_that_is_wanted(folder, image, rng):
    disk("disk.raw", rng)
    made = convert_images(
        [Image("disk.raw", format="raw")],
        Target("to", format="qcow2"),
        copying=Copying(offload=True),
        steering=Steering(),
    )
    assert made.copied.shared_bytes
    same(image, "disk.raw", "raw", "to", "qcow2")
    image("check", "to")


def test_a_source_is_walked_once_where_nobody_looks(folder, rng, monkeypatch):
    disk("disk.raw", rng)

    class Idle:
        idle = True

        def __call__(self, done, total):
            raise AssertionError("nobody looks")

    monkeypatch.setattr(Copier, "_work", lambda self: pytest.fail("nobody looks"))
    how = {"source_format": "raw", "target_format": "qcow2"}
    diskwright.convert("disk.raw", "to", **how, progress=Idle())
    assert diskwright.compare("disk.raw", "to", first_format="raw").identical


def test_no_numpy_and_no_threading_for_a_small_image(folder):
    import subprocess
    import sys

    diskwright.create("small.qcow2", "1M", format="qcow2")
    code = (
        "import sys, diskwright\n"
        "diskwright.convert('small.qcow2', 'small.raw')\n"
        "print(*{'numpy', 'threading', 'typing', 're', 'json'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(diskwright.__file__))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""


def test_a_pipe_cannot_be_given_a_size(folder, rng):
    disk("disk.raw", rng)
    reader, writer = os.pipe()
    try:
        with pytest.raises(IOFailure, match="Could not resize file: Invalid argument"):
            diskwright.convert("disk.raw", f"/proc/self/fd/{writer}")
    finally:
        os.close(reader)
        os.close(writer)


def test_bitmaps_that_the_target_cannot_have_leave_it_alone(folder):
    diskwright.create("disk.qcow2", "1M", format="qcow2")
    with open("to", "wb") as file:
        file.write(b"precious")
    with pytest.raises(DiskwrightError, match="'raw' does not support bitmaps"):
        convert_images([Image("disk.qcow2")], Target("to", format="raw"), copying=BITMAPS)
    with open("to", "rb") as file:
        assert file.read() == b"precious"


def test_space_is_taken_in_the_order_of_the_source(folder, image, rng):
    disk("disk.raw", rng, 24 * MIB)
    how = {"source_format": "raw", "target_format": "qcow2", "sparse": 0}
    for _ in range(3):
        diskwright.convert("disk.raw", "made.qcow2", **how)
        offsets = [run.offset for run in diskwright.map("made.qcow2") if run.data]
        assert offsets == sorted(offsets)
        assert diskwright.check("made.qcow2").result.fragmented_clusters == 0


def test_known_zeroes_stay_holes_whatever_their_edges(tmp_path, monkeypatch):
    """`sparse` is for zeroes found in data; what the source says to be zero is left out anyway."""
    monkeypatch.chdir(tmp_path)
    diskwright.create("from", "1M", format="qcow2", options="cluster_size=512")
    with diskwright.open("from", read_only=False) as node:
        node.write(0, b"\1" * 3072)
        node.write(53 * 512, b"\2" * 512)
    diskwright.convert("from", "to", target_format="raw", sparse="64k")
    with open("to", "rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 4096
        assert os.lseek(file.fileno(), 4096, os.SEEK_DATA) == 6 * 4096
