"""Measuring: paired runs, medians, ratios; data that looks like a disk in use."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

#: Files of this machine that a file system for measuring is filled with, in this order.
SOURCES = ("/usr/lib", "/usr/share", "/usr/bin")
REPEATS = int(os.environ.get("DISKWRIGHT_BENCH_REPEATS", "6"))


def run(words: Sequence[str | Path]) -> None:
    """Run a command quietly; it must succeed."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


def seconds(action: Callable[[], object]) -> float:
    """How long it took."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Pair:
    """Two things done in turn.

    Attributes:
        ours, theirs: medians, in seconds.
        ratio: how many times faster the first is: the median of what single turns say, since the
            machine's speed changes between them.
    """

    def __init__(
        self,
        ours: Callable[[], object],
        theirs: Callable[[], object],
        *,
        before: Callable[[], object] = lambda: None,
        repeats: int = REPEATS,
    ) -> None:
        mine: list[float] = []
        other: list[float] = []
        both = [(mine, ours), (other, theirs)]
        for turn in range(repeats + 1):
            # Whoever goes first pays for memory that the machine has lent out meanwhile.
            for kept, action in reversed(both) if turn % 2 else both:
                before()
                took = seconds(action)
                if turn:  # the first turn warms the caches
                    kept.append(took)
        self.ours = statistics.median(mine)
        self.theirs = statistics.median(other)
        self.ratio = statistics.median(b / a for a, b in zip(mine, other, strict=True))


def collect(folder: Path, limit_bytes: int) -> None:
    """Copy files of this machine until there are enough."""
    total = 0
    for source in SOURCES:
        for parent, folders, names in os.walk(source):
            folders.sort()
            for name in sorted(names):
                path = Path(parent, name)
                if path.is_symlink() or not path.is_file():
                    continue
                target = folder / path.relative_to("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                total += path.stat().st_size
                if total > limit_bytes:
                    return


def real_disk(folder: Path, used_mib: int = 600, size_mib: int = 1024) -> Path:
    """A raw disk with an ext4 file system of real files."""
    path = folder / "disk.raw"
    if not path.exists():
        files = folder / "files"
        files.mkdir()
        collect(files, used_mib << 20)
        run(["mke2fs", "-q", "-t", "ext4", "-d", files, path, f"{size_mib}M"])
        shutil.rmtree(files)
    return path
