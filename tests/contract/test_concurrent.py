"""Several threads on one node, several processes on one file; every sector says whose it is.

Each thread owns the sectors whose number leaves its own number when divided by THREADS: it knows
what they must hold. Of all others it knows that what it reads is theirs and never older than
what it read before. Discards hit whole clusters, so they have a region where zeroes are right.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diskwright.block.node import Node
from diskwright.errors import DiskwrightError
from tests import devices
from tests.contract import races
from tests.contract.disk import check_clean
from tests.contract.races import numbers_of
from tests.contract.rows import Row, opened, rows
from tests.crash.guest import SECTOR, stamped

THREADS = 4
ROOT = Path(__file__).resolve().parents[2]


class Crowd:
    """Threads at work on one node, until each has done its share or one found a fault."""

    def __init__(self, node: Node, seed: int, steps: int) -> None:
        self.node = node
        self.steps = steps
        self.seed = seed
        self.sectors = node.size // SECTOR
        cluster = max(node.limits.cluster_size, 4096) // SECTOR
        # [0, loose): discards; the rest: what is written stays
        self.loose = max(self.sectors // 2 // cluster, 1) * cluster
        self.kept: dict[int, int] = {}  # sector -> number of the last write; each has one owner
        self.faults: list[BaseException] = []

    def run(self, *others: Callable[[], None]) -> None:
        """Let the threads run, and `others` beside them."""
        work = [threading.Thread(target=self._guarded, args=(me,)) for me in range(THREADS)]
        work += [threading.Thread(target=self._watched, args=(other,)) for other in others]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join(120)
            assert not thread.is_alive(), f"a thread hangs (seed {self.seed})"
        if self.faults:
            raise self.faults[0]
        found = numbers_of(
            self.node.read(self.loose * SECTOR, (self.sectors - self.loose) * SECTOR), self.loose
        )
        for at, number in enumerate(found, self.loose):
            assert number == self.kept.get(at, 0), f"sector {at} has {number} at the end"

    def _watched(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            self.faults.append(error)

    def _guarded(self, me: int) -> None:
        self._watched(lambda: self._work(me, random.Random(self.seed * THREADS + me)))

    def _work(self, me: int, chance: random.Random) -> None:
        seen: dict[int, int] = {}
        for number in range(1, self.steps + 1):
            if self.faults:
                return
            what = chance.random()
            if what < 0.35:
                self._write_own(me, number, chance)
            elif what < 0.70:
                self._read(me, chance, seen)
            elif what < 0.80:
                self._zero_own(me, chance)
            elif what < 0.88:
                self._write_loose(number, chance)
            elif what < 0.96:
                self._discard(chance)
            else:
                self.node.flush()

    def _own(self, me: int, chance: random.Random) -> int:
        sector = chance.randrange(self.loose, self.sectors - THREADS)
        return sector - sector % THREADS + me

    def _write_own(self, me: int, number: int, chance: random.Random) -> None:
        sector = max(self._own(me, chance), self.loose + me)
        sector += -(sector - me) % THREADS
        self.node.write(sector * SECTOR, stamped(number, sector, 1))
        self.kept[sector] = number
        # reads its own writes, whoever works beside it
        assert numbers_of(self.node.read(sector * SECTOR, SECTOR), sector) == [number]

    def _zero_own(self, me: int, chance: random.Random) -> None:
        sector = max(self._own(me, chance), self.loose + me)
        sector += -(sector - me) % THREADS
        self.node.write_zeroes(sector * SECTOR, SECTOR, unmap=chance.random() < 0.5)
        self.kept[sector] = 0

    def _read(self, me: int, chance: random.Random, seen: dict[int, int]) -> None:
        first = chance.randrange(self.sectors - 1)
        count = min(chance.randrange(1, 64), self.sectors - first)
        data = self.node.read(first * SECTOR, count * SECTOR)
        for at in range(first, first + count):
            part = data[(at - first) * SECTOR : (at - first + 1) * SECTOR]
            self._judge(me, at, part, seen)

    def _judge(self, me: int, sector: int, part: bytes, seen: dict[int, int]) -> None:
        """Every word of a sector is its own; a sector being written may be of two writes."""
        words = {part[at : at + 8] for at in range(0, SECTOR, 8)}
        numbers = set()
        for word in words:
            stamp = int.from_bytes(word, "little")
            assert stamp == 0 or stamp & 0xFFFFFFFF == sector, (
                f"sector {sector} shows {stamp:#x} (seed {self.seed})"
            )
            numbers.add(stamp >> 32)
        if sector >= self.loose and sector % THREADS == me:
            assert numbers == {self.kept.get(sector, 0)}, (
                f"sector {sector} shows {numbers}, not {self.kept.get(sector, 0)} "
                f"(seed {self.seed})"
            )

    def _write_loose(self, number: int, chance: random.Random) -> None:
        first = chance.randrange(self.loose - 1)
        count = min(chance.randrange(1, 200), self.loose - first)
        self.node.write(first * SECTOR, stamped(number, first, count))

    def _discard(self, chance: random.Random) -> None:
        first = chance.randrange(self.loose)
        count = min(chance.randrange(1, 1024), self.loose - first)
        if chance.random() < 0.7:
            self.node.discard(first * SECTOR, count * SECTOR)
        else:
            self.node.write_zeroes(first * SECTOR, count * SECTOR, unmap=True)


class Haste:
    """Makes threads change places often while it lasts."""

    def __enter__(self) -> None:
        self._before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)

    def __exit__(self, *_: object) -> None:
        sys.setswitchinterval(self._before)


@rows(lambda row: row.name != "qcow2-2M")
def test_threads_on_one_node(row: Row, tmp_path: Path, seed: int):
    with opened(row, tmp_path) as node, Haste():
        crowd = Crowd(node, seed, 150)
        crowd.run()
        check_clean(node)
        path = node.filename
    with row.open(path, read_only=True) as node:
        again = Crowd(node, seed, 0)
        again.kept = crowd.kept
        again.run()


@pytest.mark.slow
@rows()
@pytest.mark.parametrize("number", range(4))
def test_threads_on_one_node_for_long(row: Row, tmp_path: Path, seed: int, number: int):
    with opened(row, tmp_path) as node, Haste():
        Crowd(node, seed + number, 1500).run()
        check_clean(node)


@rows(lambda row: row.cache == "writeback" and row.name != "qcow2-2M")
def test_threads_on_a_node_that_pauses(row: Row, seed: int):
    """The file node sleeps at seeded moments, so that others get ahead."""
    name = f"recorder:pausing-{row.name}"
    row.create(name)
    with row.open(name) as node, Haste():
        chance = random.Random(seed)

        def pause(kind: str, offset: int, length: int) -> None:
            if chance.random() < 0.2:
                time.sleep(chance.random() * 0.002)

        for file in row.files(name):
            devices.STORES[file.removeprefix("recorder:")].gate = pause
        Crowd(node, seed, 60).run()
        check_clean(node)


@rows(lambda row: row.name in ("qcow2", "qcow2-512", "vdi", "vpc", "odd", "raw"))
def test_owners_come_between(row: Row, tmp_path: Path, seed: int):
    """Checks, resizes and snapshots while others read and write."""
    with opened(row, tmp_path) as node, Haste():
        crowd = Crowd(node, seed, 120)

        def own() -> None:
            for _ in range(6):
                check_clean(node)
                if row.resizes:
                    node.truncate(node.size + 65536)
                if row.snapshots:
                    _snapshot(node)
                with node.graph.exclusive():
                    time.sleep(0.001)

        crowd.run(own)
        check_clean(node)


def _snapshot(node: Node) -> None:
    from diskwright.block.info import SnapshotInfo

    made = node.snapshot_create(SnapshotInfo("", "beside"))
    node.snapshot_delete(made.id)


def test_nodes_of_one_graph_come_and_go(tmp_path: Path):
    """Opening and closing beside others' requests; joined graphs have one gate."""
    from tests.contract.rows import BY_NAME

    row = BY_NAME["qcow2-overlay"]
    with opened(row, tmp_path) as node:
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                node.read(0, 4096)

        reader = races.Task(read)
        for number in range(10):
            with opened(row, tmp_path, f"other{number}") as other:
                node.graph.join(other.graph)
                assert other.graph is node.graph
                other.write(0, b"x")
                races.Task(lambda: node.graph.current().exclusive()).result()
        stop.set()
        reader.result()


PROGRAM = """
import sys, time
from diskwright.errors import LockError
from diskwright.block.permission import CONSISTENT_READ, RESIZE, WRITE
from tests.contract.rows import BY_NAME
row, path, rounds = BY_NAME[sys.argv[1]], sys.argv[2], int(sys.argv[3])
done = 0
while done < rounds:
    try:
        node = row.open(path, used=CONSISTENT_READ | WRITE | RESIZE, shared=CONSISTENT_READ)
    except LockError:
        time.sleep(0.001)
        continue
    with node:
        for offset in (0, 1 << 20, node.size - 8):
            number = int.from_bytes(node.read(offset, 8), "little")
            node.write(offset, (number + 1).to_bytes(8, "little"))
    done += 1
"""


@rows(lambda row: row.name in ("raw", "qcow2", "vdi", "vpc", "odd"))
def test_processes_on_one_file(row: Row, tmp_path: Path):
    """Each opens, adds one in three places, closes: nothing is counted twice or lost."""
    path = str(tmp_path / "image")
    row.create(path)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", PROGRAM, row.name, path, "6"]
    workers = [subprocess.Popen(command, env=environment) for _ in range(3)]
    for worker in workers:
        assert worker.wait(timeout=120) == 0
    with row.open(path) as node:
        for offset in (0, 1 << 20, node.size - 8):
            assert int.from_bytes(node.read(offset, 8), "little") == 18
        check_clean(node)


@rows(lambda row: row.name in ("raw", "qcow2", "odd"))
def test_an_error_beside_others_hurts_nobody(row: Row, seed: int):
    """Reads that fail at seeded moments: who gets the error gets it, the others their bytes."""
    name = f"recorder:failing-{row.name}"
    row.create(name)
    with row.open(name) as node, Haste():
        for sector in range(0, 4096, 16):
            node.write(sector * SECTOR, stamped(1, sector, 16))
        node.flush()
        chance = random.Random(seed)

        def fail(kind: str) -> None:
            if kind == "read" and chance.random() < 0.3:
                from diskwright.errors import IOFailure

                raise IOFailure("seeded")

        for file in row.files(name):
            devices.STORES[file.removeprefix("recorder:")].fail = fail
        errors: list[DiskwrightError] = []

        def read(number: int) -> None:
            own = random.Random(seed + number)
            for _ in range(100):
                sector = own.randrange(4096 - 8)
                try:
                    data = node.read(sector * SECTOR, 8 * SECTOR)
                except DiskwrightError as error:
                    errors.append(error)
                else:
                    assert set(numbers_of(data, sector)) == {1}

        tasks = [races.Task(lambda number=number: read(number)) for number in range(THREADS)]
        for task in tasks:
            task.result()
        assert len(errors) > 10
        for file in row.files(name):
            devices.STORES[file.removeprefix("recorder:")].fail = lambda kind: None
        node.write(0, stamped(2, 0, 1))
        assert numbers_of(node.read(0, SECTOR), 0) == [2]
