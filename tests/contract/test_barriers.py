"""Every call of `flush` in the engine and the formats, taken out: something is lost by a crash.

`FOUND` names what finds each. A barrier that is not in it fails, as does one that nothing needs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from diskwright.errors import DiskwrightError
from tests.contract import losses, races
from tests.contract.disk import check_clean
from tests.contract.durable import outlives_a_crash, recorded
from tests.contract.mutants import Barrier, barriers
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
diskwright.drivers.formats.qcow2.driver
diskwright.drivers.formats.qcow2.guard
diskwright.drivers.formats.qcow2.resize
diskwright.drivers.formats.qcow2.transaction
diskwright.drivers.formats.qcow2.mending
tests.contract.odd_format
""".split()

Finder = Callable[[], object]


def crash_of(name: str) -> Finder:
    """A scenario of tests/crash whose crashes find it."""
    return lambda: losses.examine_losses(losses.named(name))


def durable(row: str, how: str) -> Finder:
    """A promise that is not kept."""
    return lambda: outlives_a_crash(BY_NAME[row], how)


# ------------------------------------------------------------------------- scenarios of our own


def _reused(scene: Scene) -> None:
    """Space goes from one unit to another with flushes of the tables only, as eviction does."""
    guest, node = scene.guest, scene.node
    for number in range(5):
        guest.discard(*scene.all(number))
        node.cache.flush()  # type: ignore[attr-defined]
        node.reap()  # type: ignore[attr-defined]
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
            at.node.cache.capacity_bytes = 1 << 20  # type: ignore[attr-defined]
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
        with node.graph.request(), ExitStack() as places:  # type: ignore[union-attr]
            for offset in range(0, node.size, 64 * at.unit):
                places.enter_context(node.place(offset, at.unit))  # type: ignore[attr-defined]
        node.flush()

    _long_odd(act)


FOUND: dict[str, Finder] = {
    "block.table_cache:TableCache.make_room-0": test_table_cache.test_memory_is_bounded_by_flushing,
    "block.table_cache:TableCache._write_out-0": crash_of("odd-write new-scrambled"),
    "block.table_cache:TableCache._write_out-1": crash_of("odd-write new-scrambled"),
    "block.table_cache:TableCache._write_ranks-0": crash_of("qcow2-write new-4k"),
    "block.table_cache:TableCache._write_ranks-1": reused_space,
    "block.mapped_base:MappedBase._locked-0": a_long_discard,
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
    "drivers.formats.vdi.driver:Vdi._make_empty-0": crash_of("vdi-commit-dynamic"),
    "drivers.formats.vpc.tables:VpcTables.cut_file-0": crash_of("vpc-write new-blocks-of-64k"),
    "drivers.formats.vpc.tables:VpcTables.cut_file-1": crash_of("vpc-over a parent-discard"),
    "drivers.formats.vpc.tables:VpcTables._grow_file-0": crash_of("vpc-write new-blocks-of-64k"),
    "tests.contract.odd_format:Odd._commit-0": crash_of("odd-compressed-plain"),
    "tests.contract.odd_format:Odd.first_write-0": lambda: first_things_first("odd"),
}

ALL = [barrier for module in MODULES for barrier in barriers(module)]


@pytest.mark.parametrize("barrier", ALL, ids=repr)
def test_a_missing_barrier_is_found(barrier: Barrier):
    assert repr(barrier) in FOUND, "a barrier that nothing looks for"
    with barrier.applied(), pytest.raises((AssertionError, DiskwrightError)):
        FOUND[repr(barrier)]()


def test_no_barrier_is_gone():
    assert FOUND.keys() <= {repr(barrier) for barrier in ALL}


@pytest.mark.parametrize("name", FOUND)
def test_with_all_barriers_nothing_is_found(name: str):
    FOUND[name]()
