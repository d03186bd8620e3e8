"""The paths of mapped formats where a contract suite cannot look: hooks, locks, space, journals."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskwright.block.child import Child
from diskwright.block.extent import DATA
from diskwright.block.mapped import MappedNode, NeedGrowth
from diskwright.block.mapped_base import RETIRED_BATCH
from diskwright.block.mapping import NeedWork
from diskwright.block.node import Node
from diskwright.block.table_cache import TableMiss
from diskwright.errors import IOFailure, NoSpaceError, RangeError
from tests.contract import odd_format, races
from tests.contract.disk import Disk, check_clean, noise
from tests.contract.rows import BY_NAME, opened

CLUSTER = odd_format.CLUSTER


@pytest.fixture
def node(tmp_path: Path):
    with opened(BY_NAME["odd"], tmp_path) as opened_node:
        assert isinstance(opened_node, odd_format.Odd)
        yield opened_node


# ---------------------------------------------------------------------- room that stays empty


def _placed(node: odd_format.Odd) -> None:
    with node.graph.request(), node.place(0, CLUSTER) as places:
        for place in places:
            place.child.write(place.host_offset, bytes(place.length))


WAYS = {
    "write": lambda node: node.write(0, bytes([1]) * CLUSTER),
    "write_encoded": lambda node: node.write_encoded(0, bytes([1]) * 100, CLUSTER),
    "place": _placed,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [NoSpaceError("full"), IOFailure("no")], ids=["full", "failed"])
def test_a_full_file_system_gets_back_what_could_not_be_filled(node, monkeypatch, way, error):
    """Tables of what was written before need room there."""
    given: list[tuple[int, int]] = []

    def fail(*_: object) -> None:
        raise error

    node.write(CLUSTER, b"1")  # what a first write does is done
    monkeypatch.setattr(Child, "write", fail)
    monkeypatch.setattr(Child, "discard", lambda _, offset, length: given.append((offset, length)))
    with pytest.raises(type(error)):
        WAYS[way](node)
    assert len(given) == (1 if isinstance(error, NoSpaceError) else 0)


# -------------------------------------------------------------------------- under the lock


def test_work_is_done_without_the_lock_and_the_hook_called_again(node: odd_format.Odd):
    calls: list[str] = []

    def work() -> None:
        assert not node.metadata_lock.held()
        calls.append("work")

    def hook() -> int:
        assert node.metadata_lock.held()
        calls.append("hook")
        if calls.count("work") < 2:
            raise NeedWork(work)
        return 42

    assert node._locked(hook) == (42, [])
    assert calls == ["hook", "work", "hook", "work", "hook"]
    assert not node.metadata_lock.held()


def test_growth_is_a_kind_of_work(node: odd_format.Odd):
    wanted = node.file.size + 70_000

    def hook() -> int:
        if node.file.size < wanted:
            raise NeedGrowth(node.file, wanted)
        return node.file.size

    assert node._locked(hook)[0] >= wanted


def test_missing_tables_are_loaded_and_pinned(node: odd_format.Odd):
    node.cache.drop()

    def hook() -> str:
        node.table.get(odd_format.TABLE_AT)
        node.table.get(odd_format.TABLE_AT + odd_format.SLICE)
        return "both"

    with node.metadata_lock, pytest.raises(TableMiss):
        hook()
    done, pinned = node._locked(hook)
    assert done == "both"
    assert [found.pins for found in pinned] == [1, 1]
    node._unpin(pinned)
    assert [found.pins for found in pinned] == [0, 0]


def test_a_hook_that_fails_leaves_no_pins(node: odd_format.Odd):
    node.cache.drop()

    def hook() -> None:
        node.table.get(odd_format.TABLE_AT)
        raise IOFailure("no")

    with pytest.raises(IOFailure):
        node._locked(hook)
    assert all(found.pins == 0 for found in node.table.slices.values())
    assert not node.metadata_lock.held()


def test_nothing_stays_pinned(node: odd_format.Odd, rng):
    disk = Disk(node)
    for _ in range(30):
        offset = rng.randrange(node.size - 100_000)
        disk.write(offset, noise(rng, rng.randrange(1, 100_000)))
        disk.discard(rng.randrange(node.size // 2), 100_000)
    node.flush()
    assert all(found.pins == 0 for found in node.table.slices.values())
    assert not node.ranges._spans
    assert not node.graph.inside


# ------------------------------------------------------------------------------------ failures


def test_a_failed_write_gives_its_space_back(rng):
    with races.image(BY_NAME["odd"]) as at:
        node = at.node
        assert isinstance(node, odd_format.Odd)
        at.put(1, 0, 8)
        node.flush()
        before = dict(node.ends), {side: list(free) for side, free in node.free.items()}

        def fail(kind: str) -> None:
            if kind == "write":
                raise IOFailure("no")

        for store in at.stores:
            store.fail = fail
        with pytest.raises(IOFailure):
            at.put(2, 2 * at.sectors, 8)
        for store in at.stores:
            store.fail = lambda kind: None
        taken = node.ends[0] - before[0][0]
        assert len(node.free[0]) - len(before[1][0]) == taken // CLUSTER
        assert node.broken is None, "no table was touched"
        assert at.found(2 * at.sectors, 8) == [0] * 8
        at.put(3, 2 * at.sectors, 8)
        assert at.found(2 * at.sectors, 8) == [3] * 8
        assert node.ends[0] - before[0][0] == taken
        assert not node.ranges._spans


def test_a_failed_first_write_is_tried_again():
    with races.image(BY_NAME["odd"]) as at:
        for store in at.stores:
            store.fail = _failing("flush")
        with pytest.raises(IOFailure):
            at.put(1, 0, 8)
        assert at.found(0, 8) == [0] * 8


def _failing(kind: str):
    def fail(what: str) -> None:
        if what == kind:
            raise IOFailure("no")

    return fail


# ------------------------------------------------------------------------------------- journals


def test_a_commit_is_never_longer_than_the_journal(tmp_path: Path, rng, monkeypatch):
    """Writes, discards and releases over many slices, from several threads."""
    commits: list[int] = []
    commit = odd_format.Odd._commit

    def counting(self, writes):
        commits.append(sum(len(data) for _, data in writes))
        commit(self, writes)

    monkeypatch.setattr(odd_format.Odd, "_commit", counting)
    row = BY_NAME["odd"]
    path = str(tmp_path / "long")
    row.create(path, size=1 << 30)
    with row.open(path) as node:
        assert isinstance(node, odd_format.Odd)
        capacity = node.cache.journal.capacity
        step = odd_format.HALF * CLUSTER  # one slice each

        def work(me: int) -> None:
            for number in range(me, 1024, 4):
                node.write(number * (1 << 20) % node.size + me * 4096, b"x" * 600)

        tasks = [races.Task(lambda me=me: work(me)) for me in range(4)]
        for task in tasks:
            assert task.done(120)
            task.result()
        node.discard(0, node.size)
        node.flush()
        for at in range(0, node.size, step):
            node.write(at, b"y")
        check_clean(node)
    assert len(commits) > 20
    assert max(commits) <= capacity
    with row.open(path, read_only=True) as node:
        assert node.read(step, 2) == b"y\0"
        assert node.read(step + 4096, 1) == b"\0"


# ---------------------------------------------------------------------------------------- space


def test_freed_space_is_looked_at_in_batches():
    """Without any flush of the caller's, freed space is not kept for ever."""
    with races.image(BY_NAME["odd"]) as at:
        node = at.node
        assert isinstance(node, odd_format.Odd)
        for round_ in range(4):
            for number in range(RETIRED_BATCH):
                at.put(round_ + 1, number * at.sectors, 1)
            node.discard(0, RETIRED_BATCH * at.unit)
            node.cache.flush()
        assert len(node._retired) <= 2 * RETIRED_BATCH
        used = node.ends[0] + node.ends[1] - odd_format.TABLE_AT
        assert used <= 3 * RETIRED_BATCH * CLUSTER


def test_space_waits_for_the_table_that_named_it():
    with races.image(BY_NAME["odd"]) as at:
        node = at.node
        assert isinstance(node, odd_format.Odd)
        at.put(1, 0, at.sectors)
        node.flush()
        node.discard(0, at.unit)
        node.reap()
        assert node._retired, "the disk still says whose it is"
        assert not node.free[0]
        node.flush()
        assert not node._retired
        assert len(node.free[0]) == 1


def test_zeroing_makes_blocks_of_nothing(tmp_path: Path):
    """VDI cannot zero a block that it has: only those are written, none is made."""
    with opened(BY_NAME["vdi-512"], tmp_path) as node:
        node.write(100 * 512, b"x" * 512)
        node.flush()
        path = Path(node.filename)
        size = path.stat().st_size
        node.write_zeroes(0, node.size)
        node.flush()
        assert path.stat().st_size == size
        data = [extent for extent in node.extents(0, node.size) if extent.kind == DATA]
        assert sum(extent.length for extent in data) == 512
        assert node.read(100 * 512, 512) == bytes(512)


# ---------------------------------------------------------------------------------------- places


def _put_places(node: MappedNode, offset: int, data: bytes) -> None:
    with node.graph.request():  # type: ignore[union-attr]
        with node.place(offset, len(data)) as places:
            for place in places:
                first = place.offset - offset
                place.child.write(place.host_offset, data[first : first + place.length])


def test_places_are_what_was_asked_for(node: odd_format.Odd, rng):
    """Also where the format must replace a whole cluster: the engine fills the rest."""
    disk = Disk(node)
    disk.write_unit(0, noise(rng, 64) * (CLUSTER // 64))
    disk.zero(CLUSTER, CLUSTER)
    disk.write(2 * CLUSTER, noise(rng, CLUSTER))
    for offset, length in (
        (1024, 4096),
        (CLUSTER + 512, 512),
        (2 * CLUSTER + 8192, 8192),
        (3 * CLUSTER + 512, 3 * CLUSTER),
    ):
        data = noise(rng, length)
        _put_places(node, offset, data)
        disk.model[offset : offset + length] = data
        disk.verify()
    check_clean(node)


def test_places_given_up_change_nothing(node: odd_format.Odd, rng):
    disk = Disk(node)
    disk.write(0, noise(rng, CLUSTER))
    with pytest.raises(ZeroDivisionError):
        _fail_with_places(node)
    disk.verify()
    assert not node.ranges._spans
    disk.write(CLUSTER, noise(rng, CLUSTER))
    disk.verify()
    check_clean(node)


def _fail_with_places(node: MappedNode) -> None:
    with node.graph.request():  # type: ignore[union-attr]
        with node.place(CLUSTER, CLUSTER) as places:
            for place in places:
                place.child.write(place.host_offset, b"garbage" * 100)
            raise ZeroDivisionError


def test_own_space_is_what_can_be_filled(node: odd_format.Odd, rng):
    assert node.own_space(0, node.size) == [(node.size, False)]
    node.write_encoded(0, b"x" * 100, CLUSTER)
    for at in (1, 2, 4):
        node.write(at * CLUSTER, noise(rng, CLUSTER))
    ends = [(CLUSTER, False), (3 * CLUSTER, True), (4 * CLUSTER, False), (5 * CLUSTER, True)]
    assert node.own_space(0, node.size) == [*ends, (node.size, False)]
    assert node.own_space(CLUSTER + 512, 512) == [(512, True)]
    assert node.own_space(node.size - 512, CLUSTER) == [(512, False)], "cut at the end"


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 511), (-512, 512), (1 << 40, 512)])
def test_places_are_whole_units(node: odd_format.Odd, offset: int, length: int):
    with pytest.raises(RangeError):
        node.place(offset, length)


# -------------------------------------------------------------------------------- what is zero


def test_reads_zero_knows_without_reading(node: odd_format.Odd, monkeypatch):
    node.write(CLUSTER + 512, b"x" * 512)
    node.write_zeroes(2 * CLUSTER, CLUSTER)
    monkeypatch.setattr(Node, "_read_into", None)
    assert node.reads_zero(0, CLUSTER)
    assert node.reads_zero(CLUSTER, CLUSTER + 512)
    assert not node.reads_zero(CLUSTER, CLUSTER + 1024)
    assert node.reads_zero(CLUSTER + 1024, 4 * CLUSTER)
    assert node.reads_zero(node.size - 5, node.size + CLUSTER)


def test_bytes_behind_the_end_do_not_come_back(tmp_path: Path):
    """A shrunken image of another program may have something in its last cluster."""
    row = BY_NAME["qcow2"]
    path = str(tmp_path / "image")
    row.create(path, size=1 << 20)
    with row.open(path) as node:
        node.write(0, b"x" * (1 << 20))
        host = next(iter(node.resolve(0, 1))).host_offset
        node.truncate(1000 * 512)
    with open(path, "r+b") as file:
        file.seek(host + 1000 * 512)
        file.write(b"stale" * 1000)
    with row.open(path) as node:
        node.truncate(1 << 20)
        assert node.read(1000 * 512, (1 << 20) - 1000 * 512) == bytes((1 << 20) - 1000 * 512)
        assert node.read(0, 1000 * 512) == b"x" * 1000 * 512
