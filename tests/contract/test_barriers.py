"""Every call of `flush` in the engine and the formats, taken out: something is lost by a crash.

`FOUND` names what finds each. A barrier that is not in it fails, as does one that nothing needs.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from diskwright.block import mapped_base
from diskwright.block.info import Repair
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from diskwright.drivers.formats.qcow2.driver import Qcow2
from diskwright.drivers.formats.qcow2.extensions import BITMAPS
from diskwright.drivers.formats.vpc import parents
from diskwright.drivers.formats.vpc.naming import Naming
from diskwright.errors import DiskwrightError
from tests import devices
from tests.contract import losses, races
from tests.contract.disk import check_clean
from tests.contract.durable import crash, outlives_a_crash, recorded
from tests.contract.mutants import Barrier, barriers, replaced
from tests.contract.rows import BY_NAME
from tests.contract.stage import Image
from tests.crash import scenarios
from tests.crash.scenarios import Scenario, Scene
from tests.unit import test_table_cache

MODULES = """
diskwright.block.table_cache
diskwright.block.mapped_base
diskwright.block.lifetime
diskwright.block.node
diskwright.block.reopen
diskwright.block.requests
diskwright.drivers.formats.vdi.driver
diskwright.drivers.formats.vdi.tables
diskwright.drivers.formats.vpc.driver
diskwright.drivers.formats.vpc.tables
diskwright.drivers.formats.qcow2.bitmap_store
diskwright.drivers.formats.qcow2.driver
diskwright.drivers.formats.qcow2.first_cluster
diskwright.drivers.formats.qcow2.guard
diskwright.drivers.formats.qcow2.resize
diskwright.drivers.formats.qcow2.transaction
diskwright.drivers.formats.qcow2.mending
tests.contract.odd_format
""".split()

Finder = Callable[[], object]
Look = Callable[[Node, bool, str], object]


def crash_of(name: str) -> Finder:
    """A scenario of tests/crash whose crashes find it."""

    def crashes() -> int:
        return losses.examine_losses(losses.named(name))

    return crashes


def durable(row: str, how: str) -> Finder:
    """A promise that is not kept."""
    return lambda: outlives_a_crash(BY_NAME[row], how)


# ------------------------------------------------------------------------- scenarios of our own


def _reused(scene: Scene) -> None:
    """Space goes from one unit to another with flushes of the tables only, as eviction does."""
    guest, node = scene.guest, scene.node
    for number in range(5):
        guest.discard(*scene.all(number))
        node.cache.flush()
        node.reap()
        guest.write(*scene.all(number + 12))


def reused_space() -> None:
    scenario = Scenario("reuse", scenarios.Q4K, _reused, prepare=scenarios.fill)
    losses.examine_losses(scenario, 600)


def first_things_first(row: str) -> None:
    """Nothing but the header changes before the first barrier after opening."""
    name, node, timeline = recorded(BY_NAME[row])
    node.write(70_000, b"x" * 4096)
    node.close()
    before = []
    for _, entry in timeline.log:
        if entry[0] == "barrier":
            break
        before.append(entry)
    assert before, f"{name}: there is no first write"
    assert all(entry[1] < 512 for entry in before), "data are changed before the header is safe"


def an_unflushed_check(row: str) -> None:
    """`check` sees what was done, not what the disk has."""
    with races.image(BY_NAME[row]) as at:
        at.put(1, 0, 2 * at.sectors)
        at.put(1, 4 * at.sectors, 1)
        check_clean(at.node)
        at.node.discard(0, at.unit)
        check_clean(at.node)


def _long_odd(act: Callable[[Image], None]) -> None:
    row = BY_NAME["odd"]
    size, row.size = row.size, 128 << 20
    try:
        with races.image(row) as at:
            at.node.cache.capacity_bytes = 1 << 20
            act(at)
    finally:
        row.size = size


def a_long_discard() -> None:
    """More slices change than one commit takes."""

    def act(at: Image) -> None:
        for number in range(0, at.node.size // at.unit, 64):
            at.put(1, number * at.sectors, 1)
            at.node.flush()
        at.node.discard(0, at.node.size)
        at.node.flush()

    _long_odd(act)


def many_publishes() -> None:
    """All got their places while nothing was dirty, and together are more than one commit."""

    def act(at: Image) -> None:
        node = at.node
        with node.graph.request(), ExitStack() as places:
            for offset in range(0, node.size, 64 * at.unit):
                places.enter_context(node.place(offset, at.unit))
        node.flush()

    _long_odd(act)


def _crashes_while(
    row: str, prepare: Callable[[Node], object], change: Callable[[Node], object], look: Look
) -> None:
    """Look at what crashes leave of a change: it was done or not, and done when that is said.

    Args:
        row: of an empty image.
        prepare: what is durable before.
        change: what the power fails in.
        look: called with what was left, opened without a parent, and whether `change` had ended.
    """
    name, node, timeline = recorded(BY_NAME[row])
    prepare(node)
    node.flush()
    starts = {bare: bytes(devices.STORES[bare].data) for bare in timeline.starts}
    timeline.starts.update(starts)
    timeline.log.clear()
    change(node)
    for state in losses.losses(timeline):
        for bare, data in state.files.items():
            devices.STORES[bare] = devices.Store(data)
        below = {"driver": "recorder", "filename": name.removeprefix("recorder:")}
        opener = Opener(read_only=True, follow_backing=False)
        with open_image(opener, {"driver": node.driver, "file": below}) as seen:
            look(seen, state.index == len(timeline.log), state.how)
    node.broken = "its stores are others'"
    node.close()


def a_changed_name() -> None:
    """A backing file's name is the old one or the new one, and the new one when that is said."""
    names = ["old" * 250, "new" * 270]

    def look(seen: Node, done: bool, how: str) -> None:
        assert seen.info().backing_filename in names[done:], how

    _crashes_while(
        "qcow2",
        lambda node: node.change_backing(names[0], "raw"),
        lambda node: node.change_backing(names[1], "raw"),
        look,
    )


def extensions_that_move() -> None:
    """The extensions reach out of the first sector, and another one goes before them."""

    def look(seen: Node, done: bool, how: str) -> None:
        assert seen.info().backing_filename == "base", how
        assert len(seen.dirty_bitmaps()) >= done, how
        assert isinstance(seen, Qcow2)
        strange = [kind for kind, _ in seen.extensions.unknown if kind != BITMAPS]
        assert not strange, how

    _crashes_while(
        "qcow2",
        lambda node: node.change_backing("base", "raw"),
        lambda node: node.bitmap_add("one"),
        look,
    )


def no_parent_any_more(row: str) -> None:
    """What was the parent's is so still, or is zero; never what lies there in the file."""

    def prepare(node: Node) -> None:
        node.write(131072, b"y" * 4096)
        node.flush()
        with node.graph.request():
            for offset, length in getattr(node, "hidden_bytes", list)():
                node.file.write(offset, b"x" * length)

    def look(seen: Node, done: bool, how: str) -> None:
        if seen.can_have_backing:
            assert not done, f"{how}: it has a parent still"
            return
        shown = seen.read(0, seen.size).rstrip(b"\0")
        assert shown == bytes(131072) + b"y" * 4096, f"{how}: something old is shown"

    _crashes_while(row, prepare, lambda node: node.change_backing(None, None), look)


def another_parent_of_vpc() -> None:
    """An image names the old parent or the new one, also where the new name needs more room.

    The header has two sectors: a tear between them leaves an identifier and another's names,
    and that is refused.
    """
    one, other = ("old.vhd", b"o" * 16), ("n" * 200 + ".vhd", b"n" * 16)
    torn = [
        ([first[0], first[0], second[0]], second[1])  # names of the second sector, and of the first
        for first, second in ((one, other), (other, one))
    ]

    def whole(parent: tuple[str, bytes]) -> tuple[list[str], bytes]:
        return [parent[0], parent[0]], parent[1]

    def change(node: Node, parent: tuple[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, parent[0])
            path.touch()
            naming = Naming(str(Path(folder, "image")), str(path), parent[1], node.size)
            with replaced(parents, "new_parent", lambda *which: naming):
                node.change_backing(parent[0], "vpc")

    def look(seen: Node, done: bool, how: str) -> None:
        names = [Path(name).name for _, name, _ in seen.info().references]
        found = names, seen.dynamic.parent_id
        if done or "last" not in how:  # else there are tears
            assert found in [whole(one), whole(other)][done:], how
        else:
            assert found in [whole(one), whole(other), *torn], how

    _crashes_while(
        "vpc-diff", lambda node: change(node, one), lambda node: change(node, other), look
    )


def a_corrupt_bit() -> None:
    """An image that was found to be corrupt says so after a crash."""
    row = BY_NAME["qcow2"]
    name, node, timeline = recorded(row)
    node.write(0, b"x" * 65536)
    node.flush()
    table = node.l1[0] & 0x00FFFFFFFFFFFE00
    node.close()
    (bare,) = timeline.starts
    image = bytearray(devices.STORES[bare].data)
    image[table + 6] ^= 2  # the first cluster begins in the middle of another
    devices.STORES[bare] = devices.Store(bytes(image))
    timeline = devices.record_together([bare])
    node = row.open(name)
    with pytest.raises(DiskwrightError, match="corrupt"):
        node.write(0, b"y" * 512)
    told = len(timeline.log)
    node.close()
    del timeline.log[told:]
    crash(timeline)
    assert devices.STORES[bare].data[79] & 2, "nobody knows that it is corrupt"


def a_bounded_growth() -> None:
    """Preallocating holds no more changed tables than the cache may have."""
    row = BY_NAME["qcow2-512"]
    name, node, _ = recorded(row)
    held = [0]

    def look(kind: str, offset: int, length: int) -> None:
        held[0] = max(held[0], node.cache.dirty_bytes)

    devices.STORES[name.removeprefix("recorder:")].gate = look
    node.truncate(node.size + (8 << 20), preallocation="metadata")
    node.close()
    assert held[0] <= 3 * row.table_bytes, f"{held[0]} bytes of changed tables"


def a_file_that_does_not_grow() -> None:
    """What is discarded is written to again, although the user never flushes."""
    with replaced(mapped_base, "RETIRED_BYTES", 1 << 20):
        name, node, _ = recorded(BY_NAME["qcow2"])
        for _ in range(12):
            node.write(0, b"x" * (1 << 20))
            node.discard(0, 1 << 20)
        length = len(devices.STORES[name.removeprefix("recorder:")].data)
        node.close()
    assert length < 4 << 20, f"a file of {length} bytes for 1 MiB"


def a_repair() -> None:
    """What a repair says that it mended is mended after a crash."""
    row = BY_NAME["qcow2"]
    name, node, timeline = recorded(row)
    node.write(0, b"x" * (1 << 20))
    node.flush()
    table = node.l1[0] & 0x00FFFFFFFFFFFE00
    node.close()
    (bare,) = timeline.starts
    image = bytearray(devices.STORES[bare].data)
    image[table] &= 0x7F  # "nobody else names this cluster" is not said
    devices.STORES[bare] = devices.Store(bytes(image))
    timeline = devices.record_together([bare])
    node = row.open(name)
    result = node.check(Repair.ALL)
    assert result.leaks_fixed + result.corruptions_fixed, "there was something to mend"
    crash(timeline)
    node.broken = "it crashed"
    node.close()
    with row.open(name, read_only=True) as again:
        check_clean(again)


FOUND: dict[str, Finder] = {
    "block.table_cache:TableCache.make_room-0": test_table_cache.test_memory_is_bounded_by_flushing,
    "block.table_cache:TableCache._write_out-0": crash_of("odd-write new-scrambled"),
    "block.table_cache:TableCache._write_out-1": crash_of("odd-write new-scrambled"),
    "block.table_cache:TableCache._write_ranks-0": crash_of("qcow2-write new-4k"),
    "block.table_cache:TableCache._write_ranks-1": reused_space,
    "block.mapped_base:MappedBase._locked-0": a_long_discard,
    "block.mapped_base:MappedBase._take_back-0": a_file_that_does_not_grow,
    "block.mapped_base:MappedBase._publish-0": many_publishes,
    "block.mapped_base:MappedBase._flush-0": durable("odd", "flush"),
    "block.mapped_base:MappedBase._flush-1": durable("vdi", "again"),
    "block.mapped_base:MappedBase._flush_tables-0": durable("odd", "flush"),
    "block.mapped_base:MappedBase.settle-0": lambda: an_unflushed_check("odd"),
    "block.mapped_base:MappedBase.settle-1": lambda: an_unflushed_check("qcow2-lazy"),
    "block.lifetime:Lifetime._close_inside-0": durable("raw", "close"),
    "block.node:Node.write_encoded-0": durable("odd", "encoded"),
    "block.node:Node.flush-0": durable("raw", "flush"),
    "block.node:Node._flush-0": durable("raw", "flush"),
    "block.reopen:_exchange-0": durable("raw", "reopen"),
    "block.requests:write_checked-0": durable("odd", "fua"),
    "block.requests:zero_checked-0": durable("odd", "zero fua"),
    "drivers.formats.vdi.driver:Vdi.first_write-0": lambda: first_things_first("vdi"),
    "drivers.formats.vdi.driver:Vdi._change_backing-0": lambda: no_parent_any_more("vdi-diff"),
    "drivers.formats.vdi.driver:Vdi._make_empty-0": crash_of("vdi-commit-dynamic"),
    "drivers.formats.vpc.driver:Vpc._change_backing-0": another_parent_of_vpc,
    "drivers.formats.vpc.driver:Vpc._change_backing-1": another_parent_of_vpc,
    "drivers.formats.vpc.driver:Vpc._leave_parent-0": lambda: no_parent_any_more("vpc-diff"),
    "drivers.formats.vpc.driver:Vpc._make_empty-0": crash_of("vpc-commit-blocks-of-64k"),
    "drivers.formats.vpc.tables:VpcTables.cut_file-0": crash_of("vpc-write new-blocks-of-64k"),
    "drivers.formats.vpc.tables:VpcTables._grow_file-0": crash_of("vpc-write new-blocks-of-64k"),
    "drivers.formats.qcow2.bitmap_store:Qcow2Bitmaps._write_entries-0": crash_of(
        "qcow2-noted writes-cleared"
    ),
    "drivers.formats.qcow2.driver:Qcow2.write_header-0": crash_of(
        "qcow2-lazy refcounts-lazy-snapshots"
    ),
    "drivers.formats.qcow2.first_cluster:write-0": a_changed_name,
    "drivers.formats.qcow2.first_cluster:write-1": a_changed_name,
    "drivers.formats.qcow2.first_cluster:_clear_way-0": extensions_that_move,
    "drivers.formats.qcow2.first_cluster:_move_name-0": extensions_that_move,
    "drivers.formats.qcow2.guard:GuardedNode._write_corrupt_bit-0": a_corrupt_bit,
    "drivers.formats.qcow2.resize:_bound_memory-0": a_bounded_growth,
    "drivers.formats.qcow2.transaction:Transaction.commit-0": crash_of("qcow2-snapshot-4k"),
    "drivers.formats.qcow2.mending:Mending.apply-1": a_repair,
    "tests.contract.odd_format:Odd._commit-0": crash_of("odd-compressed-plain"),
    "tests.contract.odd_format:Odd.first_write-0": lambda: first_things_first("odd"),
}

#: Barriers without which nothing is worse than before, and why they are there.
SPARE = {
    "drivers.formats.qcow2.mending:Mending.apply-0": "what is repaired is damaged anyway; "
    "this order leaves less to the next repair",
}

ALL = [barrier for module in MODULES for barrier in barriers(module)]


NEEDED = [barrier for barrier in ALL if repr(barrier) not in SPARE]


@pytest.fixture
def dropped() -> Iterator[None]:
    """Nodes of a search that ends at what it finds are not closed; they go before the next."""
    yield
    gc.collect()


@pytest.mark.parametrize("barrier", NEEDED, ids=repr)
@pytest.mark.filterwarnings("ignore:.* was not closed:ResourceWarning")
@pytest.mark.usefixtures("dropped")
def test_a_missing_barrier_is_found(barrier: Barrier):
    assert repr(barrier) in FOUND, "a barrier that nothing looks for"
    with barrier.applied(), pytest.raises((AssertionError, DiskwrightError)):
        FOUND[repr(barrier)]()


def test_every_barrier_has_its_line():
    assert FOUND.keys() | SPARE.keys() == {repr(barrier) for barrier in ALL}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if finder.__name__ == "crashes" else [])
        for name, finder in FOUND.items()
    ],
)
def test_with_all_barriers_nothing_is_found(name: str):
    FOUND[name]()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", scenarios.SCENARIOS, ids=str)
def test_no_single_loss_hurts(scenario: Scenario):
    """Random crashes seldom lose exactly one pending write of many; these do nothing else."""
    losses.examine_losses(scenario, 600)


def test_data_in_another_file_come_before_what_names_them():
    losses.examine_losses(losses.named("qcow2-zero-data-file"), 600)
