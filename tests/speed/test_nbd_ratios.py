"""`make bench`: NBD servers and clients against their peers, paired in this run.

Requests a second by fio's nbd engine, and the server's processor time a request. The files are in
the page cache, save where the row says so. For 1 GiB: DISKWRIGHT_BENCH_NBD_MIB=1024.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.differential.nbd_servers import PLACE, serving

pytestmark = pytest.mark.speed

TOOL = str(Path(sys.executable).parent / "diskwright-nbd")
MIB = int(os.environ.get("DISKWRIGHT_BENCH_NBD_MIB", "256"))
ROUNDS, SECONDS = 3, 2
COPIED_MIB, COPIES = max(MIB, 1024), 6
ROWS: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\n\n" + "\n".join(ROWS))


@pytest.fixture(scope="module")
def fio() -> str:
    found = shutil.which("fio")
    if found is None:
        pytest.skip("not here: fio")
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """(ours, theirs) by format: copies of one disk, full of noise."""
    folder = tmp_path_factory.mktemp("nbd")
    with (folder / "source").open("wb") as file:
        for _ in range(MIB):
            file.write(os.urandom(1 << 20))
    # Both by the same way: how a file was written decides how the kernel keeps it in memory.
    for name in ("ours.raw", "theirs.raw"):
        shutil.copy(folder / "source", folder / name)
    (folder / "source").unlink()
    qemu = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
    for name in ("ours", "theirs"):
        subprocess.run([*qemu, f"{name}.raw", f"{name}.qcow2"], cwd=folder, check=True)
    return folder


#: what, fio's words, wanted against qemu-nbd: raw, qcow2; against nbdkit: raw.
WORK = [
    ("4 KiB random read, depth 1", "--rw=randread --bs=4k --iodepth=1", (1.9, 1.3), 1.0),
    ("4 KiB random read, depth 16", "--rw=randread --bs=4k --iodepth=16", (3.5, 3.3), 1.5),
    ("4 KiB random write, depth 16", "--rw=randwrite --bs=4k --iodepth=16", (1.4, 1.2), 0.9),
    ("256 KiB read, depth 8", "--rw=read --bs=256k --iodepth=8", (1.8, 1.5), 1.0),
    ("256 KiB write, depth 8", "--rw=write --bs=256k --iodepth=8", (2.0, 1.7), 1.1),
    (
        "4 KiB random read, 16 by four",
        "--rw=randread --bs=4k --iodepth=16 --numjobs=4",
        (3.0, 3.0),
        1.5,
    ),
    ("4 KiB random read, 16, cold", "--rw=randread --bs=4k --iodepth=16", (1.0, 1.0), 0.95),
]


@pytest.mark.parametrize("peer", ["qemu-nbd", "nbdkit"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("work", WORK, ids=[row[0] for row in WORK])
def test_requests_a_second(images, fio, tmp_path, work, format, peer):
    what, words, wanted, wanted_nbdkit = work
    if peer == "nbdkit" and (format != "raw" or shutil.which("nbdkit") is None):
        pytest.skip("nbdkit serves raw files")
    sides = []
    for side in ("ours", "theirs"):
        folder = tmp_path / side
        folder.mkdir()
        image = str(images / f"{side}.{format}")
        if side == "ours":
            argv = [TOOL, "-t", "-e", "0", "-k", PLACE, "-f", format, image]
        elif peer == "nbdkit":
            argv = ["nbdkit", "-f", "-U", PLACE, "file", image]
        else:
            argv = ["qemu-nbd", "-t", "-e", "0", "-k", PLACE, "-f", format, image]
        sides.append((argv, folder, image))
    results: list[list[tuple[float, float]]] = [[], []]
    for _ in range(ROUNDS):
        for number, (argv, folder, image) in enumerate(sides):
            with serving(argv, folder) as process:
                _prepare(image, cold="cold" in what)
                results[number].append(_measured(fio, folder, words, process.pid))
    ours, theirs = (sorted(each)[ROUNDS // 2] for each in results)
    ratio = ours[0] / theirs[0]
    target = wanted_nbdkit if peer == "nbdkit" else wanted[format == "qcow2"]
    ROWS.append(
        f"{what:<30} {format:<6} {ours[0]:9.0f}/s {ours[1]:6.1f} us   {peer:<9} "
        f"{theirs[0]:9.0f}/s {theirs[1]:6.1f} us   ratio {ratio:5.2f}  wanted {target:g}"
    )
    print(ROWS[-1], flush=True)
    assert ratio >= target, ROWS[-1]


def _prepare(image: str, *, cold: bool) -> None:
    """Have a file in memory, or not."""
    descriptor = os.open(image, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        if cold:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return
        while os.read(descriptor, 1 << 20):
            pass
    finally:
        os.close(descriptor)


def _measured(fio: str, folder: Path, words: str, pid: int) -> tuple[float, float]:
    """(requests a second, processor time of the server in microseconds a request)."""
    before = _processor_time(pid)
    done = subprocess.run(
        [fio, "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={folder / 's'}",
         "--time_based", f"--runtime={SECONDS}", f"--size={MIB}M", "--thread",
         "--group_reporting", "--output-format=json", *words.split()],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    spent = _processor_time(pid) - before
    text = done.stdout[done.stdout.index("{") :]
    (job,) = json.JSONDecoder().raw_decode(text)[0]["jobs"]
    way = job["read"] if "read" in words else job["write"]
    return way["iops"], spent / max(way["total_ios"], 1)


def _processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1e6 / os.sysconf("SC_CLK_TCK")


def _timed(*words: str, cwd: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(words, cwd=cwd, check=True, capture_output=True)
    return time.perf_counter() - begin


@pytest.mark.parametrize(
    ("peer", "wanted"), [("nbdcopy", 1.1), ("qemu-img", 2.0)], ids=["nbdcopy", "qemu-img"]
)
def test_a_copy_to_a_file(images, tmp_path, peer, wanted):
    """`convert nbd://… out.raw`, whole commands."""
    if shutil.which(peer) is None or shutil.which("nbdkit") is None:
        pytest.skip(f"not here: {peer}, nbdkit")
    image = tmp_path / "long"
    with image.open("wb") as file:
        for _ in range(COPIED_MIB // MIB or 1):
            file.write((images / "theirs.raw").read_bytes())
    where = f"nbd+unix:///?socket={tmp_path / 's'}"
    times: list[list[float]] = [[], []]
    ours = (TOOL.replace("-nbd", "-img"), "convert", "-f", "raw", "-O", "raw", where)
    theirs = ("nbdcopy", where) if peer == "nbdcopy" else ("qemu-img", *ours[1:])
    with serving(["nbdkit", "-f", "-U", PLACE, "file", str(image)], tmp_path):
        for turn in range(COPIES + 1):
            _prepare(str(image), cold=False)
            both = [(0, ours), (1, theirs)]
            # Whoever goes first pays for memory that the machine has lent out meanwhile.
            for number, words in reversed(both) if turn % 2 else both:
                (tmp_path / "out").unlink(missing_ok=True)
                took = _timed(*words, "out", cwd=tmp_path)
                if turn:  # the first one warms the caches
                    times[number].append(took)
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    spent = " ".join(f"{statistics.median(each):.2f} s" for each in times)
    ROWS.append(
        f"nbd to raw, {COPIED_MIB} MiB, {peer}: {spent}, ratio {ratio:.2f}, wanted {wanted}"
    )
    print(ROWS[-1], flush=True)
    assert ratio >= wanted, ROWS[-1]
