"""Every mechanism of the engine, taken out: a race that right code wins is lost then.

A mutant that survives means that a mechanism is not tested, or not needed. Barriers are taken
out one by one in test_barriers.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from diskwright.block import requests
from diskwright.block.mapped import MappedNode
from diskwright.errors import DiskwrightError
from tests.contract import losses, races, stage
from tests.contract.mutants import Mutant
from tests.contract.rows import BY_NAME

ALONE = ("with self.graph.exclusive():", "if True:")
INSIDE = ("with self.graph.request():", "if True:")

#: Where a mutant's target is, by the first letters of its name.
PLACES = {
    "Node": "node",
    "populate": "requests",
    "Management": "management",
    "reopen_with": "reopen",
    "Lifetime": "lifetime",
    "MappedNode": "mapped",
    "MappedBase": "mapped_base",
    "Placing": "placing",
    "Gate": "inflight",
    "RangeLocks": "inflight",
    "Joined": "inflight",
    "TableCache": "table_cache",
    "Slice": "table_cache",
}

Race = Callable[..., None]
Loss = tuple[Mutant, Race, str, tuple[str, ...]]


def lost(where: str, changes: list[tuple[str, str]], race: Race, rows: str, *told: str) -> Loss:
    """A mutant of `where`, the race that it loses, the rows that lose it."""
    module = PLACES[where.partition(".")[0]]
    mutant = Mutant(
        f"{where}: {changes[0][0][:40]}", f"diskwright.block.{module}:{where}", *changes
    )
    return mutant, race, rows, told


def unlocked(where: str, ends: str, race: Race, rows: str) -> Loss:
    """A range lock that is not taken."""
    old = f"with self.ranges.span(*self._cluster_around({ends})):"
    return lost(where, [(old, "if True:")], race, rows)


def gates() -> Iterator[Loss]:
    """Everything that enters the gate, and what the gate does."""
    waits, kept_out = races.an_owner_waits_for, races.requests_wait_for_an_owner
    for method, rows in (("read", "raw odd"), ("write", "raw odd")):
        short = [("inside[me] = graph.epoch\n", "pass\n"), ("del graph.inside[me]", "pass")]
        yield lost(f"Node.{method}", short, waits, rows, method)
        closed = [("if graph.closed:\n            graph =", "if False:\n            graph =")]
        yield lost(f"Node.{method}", closed, kept_out, rows)
    for method, rows in (
        ("read_into", "raw odd"),
        ("write_zeroes", "raw odd"),
        ("discard", "raw"),
        ("flush", "raw odd"),
        ("write_encoded", "odd qcow2"),
    ):
        yield lost(f"Node.{method}", [INSIDE], waits, rows, method)
    around = [("with node.graph.request():", "if True:")]
    yield lost("populate", around, races.an_owner_waits_for_a_populate, "qcow2-overlay")
    yield lost("Node._walk", [INSIDE], kept_out, "raw odd")
    yield lost("Management.info", [INSIDE], kept_out, "raw odd")
    uncounted = [("self.inside[me] = self.epoch\n", "return _Request(self, False)\n")]
    yield lost("Gate.request", uncounted, waits, "raw odd", "read_into")
    yield lost("Gate.request", [("if self.closed:", "if False:")], kept_out, "raw odd")
    impatient = [("while self.inside:", "while False:")]
    yield lost("Gate.close", impatient, races.closing_waits, "raw qcow2 vdi vpc odd")
    yield lost("Lifetime.close", [ALONE], races.closing_waits, "raw odd")
    for operation in races.OPERATIONS:
        row = "qcow2-overlay" if operation in ("change_backing", "make_empty") else "qcow2"
        where, change = f"Management.{operation}", ALONE
        if operation == "reopen":
            where, change = "reopen_with", ("with node.graph.exclusive():", "if True:")
        yield lost(where, [change], races.an_operation_waits, row, operation)


def retirement() -> Iterator[Loss]:
    """Freed space waits for those inside, and only for those."""
    reader, writer = races.freed_space_waits_for_its_reader, races.freed_space_waits_for_its_writer
    inside = "return min(list(self.inside.values()), default=self.epoch + 1)"
    for race in (reader, writer):
        yield lost("Gate.oldest", [(inside, "return self.epoch + 1")], race, "odd qcow2")
        now = [("entry[0] < oldest and durable", "durable")]
        yield lost("MappedBase.reap", now, race, "odd qcow2")
        early = [("epoch = self.graph.next_epoch()", "epoch = -1")]
        yield lost("MappedBase.retire", early, race, "odd qcow2")
    stuck = [("self.epoch = ended + 1", "self.epoch = ended")]
    beside = races.freed_space_comes_back_beside_readers
    yield lost("Gate.next_epoch", stuck, beside, "odd qcow2")
    never = [("self._retired = waiting", "self._retired = waiting + ready; ready = []")]
    yield lost("MappedBase.reap", never, races.freed_space_comes_back, "odd qcow2")
    forgets = [("if key[0] == id(freed.child)", "if False")]
    yield lost("MappedBase._drop_decoded", forgets, races.replaced_units_are_forgotten, "odd")


def ranges() -> Iterator[Loss]:
    """Range locks: each place that takes one, and what one is."""
    new, padded = races.two_writers_of_a_new_cluster, races.two_padded_writers
    overlap = ("if overlaps and not (self._overtaking and other.waiting):", "if False:")
    yield lost("RangeLocks._must_wait", [overlap], new, "qcow2 vdi vpc odd")
    yield lost("RangeLocks._must_wait", [overlap], padded, "odd-scramble")
    span = "with self.ranges.span(offset // unit * unit, -(-stop // unit) * unit) as span:"
    nothing = "for span in [self.ranges.span(0, 1 << 62)]:"
    yield lost("MappedNode._write_locked", [(span, nothing)], new, "qcow2 vdi vpc odd")
    edge = races.a_zeroed_edge_and_a_writer
    yield unlocked("MappedNode._zero_edge", "first, last", edge, "qcow2 qcow2-512")
    filling = races.a_zeroing_and_a_filling
    yield unlocked("MappedNode._unmap", "start, part", filling, "qcow2 odd")
    populating = races.a_populate_and_a_writer
    yield unlocked("MappedNode._populate", "start, part", populating, "qcow2-overlay vdi-diff")
    unit = races.a_unit_and_a_writer
    yield unlocked("MappedNode._write_encoded", "offset, offset + length", unit, "qcow2 odd")
    span = "node.ranges.span(*node._cluster_around(offset, offset + length))"
    placing = [(span, "__import__('contextlib').nullcontext()")]
    yield lost("Placing.__init__", placing, races.a_placing_and_a_writer, "qcow2 odd vdi")
    two = races.two_writers_in_one_block
    yield lost("MappedNode._write_new", [("self.has_block(offset)", "False")], two, "odd vpc-diff")


def orders() -> Iterator[Loss]:
    """What comes before what, in memory."""
    places = "for place in allocation.places:\n"
    for method, ends, race, rows in (
        ("_write_locked", "first, last", races.data_before_its_name, "odd qcow2-overlay vdi-diff"),
        (
            "_copy_up",
            "allocation.offset, end",
            races.populate_fills_before_it_names,
            "qcow2-overlay vdi-diff",
        ),
        (
            "_write_encoded",
            "offset, offset + length",
            races.units_are_there_before_their_name,
            "odd qcow2",
        ),
    ):
        publish = f"self._publish(allocation, {ends})"
        early = publish.replace("end)", "allocation.offset + allocation.length)")
        for_early = "for _ in [0]: " + early
        swapped = [(publish, "pass"), (places, f"{for_early}\n$INDENT{places}")]
        yield lost(f"MappedNode.{method}", swapped, race, rows)
    joins = [("ticket = self._started + 1", "ticket = max(self._started, 1)")]
    later = races.a_flush_starts_after_its_caller_came
    yield lost("Joined.__call__", joins, later, "raw qcow2 vdi vpc odd")
    passes = [
        ("with self._first_write_lock:", "if True:"),
        ("self.first_write()\n", "self._first_write_done = True\n            self.first_write()\n"),
    ]
    first = races.nobody_passes_the_first_write
    yield lost("MappedBase.before_write", passes, first, "qcow2-lazy vdi odd")
    leaves = [("found.pins or found.is_dirty", "found.is_dirty")]
    yield lost("TableCache._evict", leaves, races.tables_in_use_stay, "vdi-512 vpc-4k")
    dirty = [("found.pins or found.is_dirty", "found.pins")]
    yield lost("TableCache._evict", dirty, races.changed_tables_stay, "vdi-512 vpc-4k")
    misses = [("self._written = generation", "generation = self._written = self.generation")]
    yield lost("Slice._became_durable", misses, races.a_flush_misses_nothing, "qcow2 vdi odd")


LOST = [*gates(), *retirement(), *ranges(), *orders()]


CASES = [
    pytest.param(mutant, race, row, told, id=f"{number}-{mutant}-{row}")
    for number, (mutant, race, names, told) in enumerate(LOST)
    for row in names.split()
]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """What hangs because of a mutant is not waited for as long."""
    monkeypatch.setattr(stage, "SOON_S", 2.0)


@pytest.mark.parametrize(("mutant", "race", "row", "told"), CASES)
def test_a_mutant_is_found(mutant: Mutant, race: Race, row: str, told: tuple[str, ...]):
    with mutant.applied(), pytest.raises((AssertionError, DiskwrightError)):
        race(BY_NAME[row], *told)


def test_one_big_lock_is_found(monkeypatch):
    """A tree in which each request holds the whole node gives the same bytes, later."""
    lock = threading.RLock()

    def holding(function: Callable[..., object]) -> Callable[..., object]:
        def held(*arguments: object) -> object:
            with lock:
                return function(*arguments)

        return held

    for name in ("read_checked", "write_checked", "zero_checked", "discard_checked"):
        monkeypatch.setattr(requests, name, holding(getattr(requests, name)))
    for row in ("raw", "qcow2", "vdi", "vpc", "odd"):
        with pytest.raises(AssertionError, match="nothing to do with"):
            races.a_held_read_keeps_nobody(BY_NAME[row])


@pytest.mark.parametrize("row", ["qcow2", "vdi", "odd"])
def test_writing_under_the_metadata_lock_is_found(row: str, monkeypatch):
    def held(write: Callable[..., None]) -> Callable[..., None]:
        def run(node: MappedNode, *arguments: object) -> None:
            with node.metadata_lock:
                write(node, *arguments)

        return run

    for name in ("_reserve", "_write_place"):
        monkeypatch.setattr(MappedNode, name, held(getattr(MappedNode, name)))
    with pytest.raises(AssertionError, match="nothing to do with"):
        races.a_held_write_keeps_nobody(BY_NAME[row])


STORE = "diskwright.drivers.formats.qcow2.bitmap_store:Qcow2Bitmaps."


def unsafe(method: str, old: str, new: str, scenario: str) -> tuple[Mutant, str]:
    """A mutant of the store of bitmaps, and the scenario whose crashes find it."""
    return Mutant(f"{method}: {old[:30]}", STORE + method, (old, new)), f"qcow2-{scenario}"


#: How bitmaps come to be known as in use before they are behind.
UNSAFE = [
    unsafe("_mark_in_use", "if extension is not None and", "if False and", "noted writes-cleared"),
    unsafe("_mark_in_use", "self._entries[name].flags |= IN_USE", "pass", "noted writes-cleared"),
    unsafe(
        "activate",
        "self._mark_in_use(bitmap.name for bitmap in noting)",
        "pass",
        "noted writes-cleared",
    ),
    unsafe("activate", "self.node.watch(noting)", "pass", "noted writes-cleared"),
    unsafe("begin_resize", "self._mark_in_use(self.bitmaps)", "pass", "noted writes-long"),
    unsafe("save", "live = self.node.writes_begun", "live = False", "bitmaps-4k"),
    unsafe("save", "self.node.watch(self._noting())", "pass", "bitmaps-4k"),
]


@pytest.mark.parametrize(("mutant", "scenario"), UNSAFE, ids=str)
def test_a_crash_finds_a_mutant(mutant: Mutant, scenario: str):
    with mutant.applied(), pytest.raises((AssertionError, DiskwrightError)):
        losses.examine_losses(losses.named(scenario), 600)
