"""`make bench`: every claim about speed as a ratio to a peer, measured in this run.

Both sides are whole commands, start-up included, with a warm page cache, in turn; medians.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.rooms import ROOT
from tests.speed.measure import REPEATS, Pair, real_disk, run

pytestmark = pytest.mark.speed

TOOL = Path(sys.executable).parent / "diskwright-img"
#: Turns where both sides may take equally long, and a few say nothing.
CLOSE = 40
ROWS: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\n\n" + "\n".join(ROWS))


def note(what: str, pair: Pair, wanted: float | None = None) -> None:
    """Remember a line for the end, and hold the ratio where one is wanted."""
    target = f"wanted {wanted:g}" if wanted is not None else ""
    ROWS.append(
        f"{what:<34} {pair.ours * 1000:9.1f} ms  {pair.theirs * 1000:9.1f} ms"
        f"  ratio {pair.ratio:6.2f}  {target}"
    )
    print(ROWS[-1], flush=True)
    if wanted is not None:
        assert pair.ratio >= wanted, ROWS[-1]


@pytest.fixture(scope="module")
def peer() -> str:
    found = shutil.which("qemu-img")
    if not found:
        pytest.skip("not here: qemu-img")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def disk(folder) -> Path:
    os.environ["PATH"] += os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    return real_disk(folder)


@pytest.fixture(scope="module")
def qcow2(disk, folder, peer) -> Path:
    path = folder / "disk.qcow2"
    run([peer, "convert", "-O", "qcow2", disk, path])
    return path


def bare() -> None:
    run([sys.executable, "-I", "-c", "pass"])


def convert(disk, folder, peer, *words: str, repeats: int = REPEATS) -> Pair:
    target = folder / "target"

    def by(tool):
        return lambda: run([tool, "convert", *words, disk, target])

    before = partial(target.unlink, missing_ok=True)
    return Pair(by(TOOL), by(peer), before=before, repeats=repeats)


def test_version_costs_at_most_two_interpreters():
    pair = Pair(lambda: run([TOOL, "--version"]), bare, repeats=15)
    note("--version, beside python -I", pair, 1 / 2)


def test_info_costs_at_most_three_interpreters(qcow2):
    pair = Pair(lambda: run([TOOL, "info", qcow2]), bare, repeats=15)
    note("info of a qcow2, beside python -I", pair, 1 / 3)


def test_raw_to_qcow2(disk, folder, peer):
    note("raw -> qcow2", convert(disk, folder, peer, "-O", "qcow2", repeats=CLOSE), 1.0)


def test_raw_over_an_old_qcow2(disk, folder, peer):
    """A file that is emptied must not be written out before the command ends."""
    words = ("convert", "-O", "qcow2", disk, folder / "old")
    pair = Pair(lambda: run([TOOL, *words]), lambda: run([peer, *words]))
    note("raw -> qcow2, over an old one", pair)


def test_qcow2_to_raw(qcow2, folder, peer):
    note("qcow2 -> raw", convert(qcow2, folder, peer, "-O", "raw", repeats=CLOSE), 1.0)


def test_compressed(disk, folder, peer):
    note("raw -> qcow2 -c", convert(disk, folder, peer, "-c", "-O", "qcow2"), 5.0)


def test_compressed_with_zstd(disk, folder, peer):
    words = ("-c", "-O", "qcow2", "-o", "compression_type=zstd")
    note("raw -> qcow2 -c, zstd", convert(disk, folder, peer, *words))


def test_compressed_to_raw(disk, folder, peer):
    packed = folder / "packed.qcow2"
    run([peer, "convert", "-c", "-O", "qcow2", disk, packed])
    note("qcow2 (zlib) -> raw", convert(packed, folder, peer, "-O", "raw"))


@pytest.mark.parametrize("words", [("check",), ("map",), ("map", "--output=json"), ("info",)])
def test_looking(qcow2, peer, words):
    pair = Pair(lambda: run([TOOL, *words, qcow2]), lambda: run([peer, *words, qcow2]))
    note(" ".join(words), pair)


def test_compare(disk, qcow2, peer):
    words = ("compare", disk, qcow2)
    note("compare", Pair(lambda: run([TOOL, *words]), lambda: run([peer, *words])))


def test_small_reads_in_process(qcow2):
    """Against dissect.hypervisor, the Python library that reads qcow2, in its own environment."""
    import diskwright

    count, seed = 20_000, 1
    other = subprocess.run(
        [ROOT / "tests" / "peers" / "python_readers.sh", ROOT / ".peers" / "readers"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHON": sys.executable},
    ).stdout.strip()
    theirs = float(
        subprocess.run(
            [other, ROOT / "tests" / "speed" / "read_others.py", qcow2, str(count), str(seed)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    with diskwright.open(qcow2) as node:
        rng = random.Random(seed)
        places = [rng.randrange(node.size // 4096) * 4096 for _ in range(count)]
        for place in places:
            node.read(place, 4096)
        started = time.perf_counter()
        for place in places:
            node.read(place, 4096)
        ours = (time.perf_counter() - started) / count
    line = f"4 KiB random reads: {ours * 1e6:.1f} µs, dissect.hypervisor {theirs * 1e6:.1f} µs"
    ROWS.append(f"{line}, ratio {theirs / ours:.1f}  wanted 10")
    print(ROWS[-1])
    assert theirs / ours >= 10
