"""Races that are decided by a paused request, one function each: right code passes every time.

A request is held inside of the file node (`Pauses`), something else is done meanwhile, and then
what everybody got is compared. test_concurrent.py runs them; test_mutants.py takes a mechanism
out of the engine and runs them again, and then they have to fail.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from diskwright.block.info import SnapshotInfo
from diskwright.block.mapped import MappedNode
from diskwright.block.node import Node
from tests import devices
from tests.contract.rows import Row
from tests.contract.stage import LATER_S, SOON_S, Image, Task, image, numbers_of, while_held
from tests.crash.guest import SECTOR, stamped

# --------------------------------------------------------------------------- nobody else waits


def _others_go_on(at: Image) -> None:
    """A read, a write in place, an allocation and a flush beside somebody who is held."""
    node, far = at.node, at.sectors
    assert Task(lambda: at.found(far, 8)).result("another read") == [2] * 8
    Task(lambda: at.put(3, far + 2, 4)).result("a write in place")
    Task(lambda: at.put(4, 2 * far + 3, 5)).result("an allocation")
    Task(lambda: node.write_zeroes(3 * far * SECTOR, 4096)).result("zeroing")
    Task(lambda: node.read_into(far * SECTOR, bytearray(512))).result("another read")
    assert at.found(far, 8) == [2, 2, 3, 3, 3, 3, 2, 2]
    assert at.found(2 * far + 3, 5) == [4] * 5


def a_held_read_keeps_nobody(row: Row) -> None:
    """With one read paused in the file node, all that has nothing to do with it goes on."""
    with image(row) as at:
        at.put(1, 0, at.sectors)
        at.put(2, at.sectors, at.sectors)
        at.node.flush()
        pause = at.hold("read", lambda offset, length: length == 4096)
        with while_held(pause, lambda: at.found(0, 8)) as reader:
            _others_go_on(at)
            Task(at.node.flush).result("a flush")
            assert not reader.done()
        assert reader.result() == [1] * 8


def a_held_write_keeps_nobody(row: Row) -> None:
    """With one allocating write paused in the file node, others go on."""
    with image(row) as at:
        at.put(1, 0, 8)
        at.put(2, at.sectors, at.sectors)
        at.node.flush()
        pause = at.hold("write", lambda offset, length: length > SECTOR)
        with while_held(pause, lambda: at.put(9, 3 * at.sectors, 8)) as writer:
            assert Task(lambda: at.found(at.sectors, 8)).result("a read") == [2] * 8
            Task(lambda: at.put(3, at.sectors + 2, 4)).result("a write in place")
            Task(lambda: at.put(4, 2 * at.sectors, 5)).result("an allocation")
            assert not writer.done()
        assert at.found(3 * at.sectors, 8) == [9] * 8
        assert at.found(2 * at.sectors, 5) == [4] * 5


def two_writers_in_one_block(row: Row) -> None:
    """Where a block exists, only the units that become valid are locked."""
    with image(row) as at:
        at.put(1, 0, 1)
        pause = at.hold("write")
        with while_held(pause, lambda: at.put(2, 20, 2)) as writer:
            Task(lambda: at.put(3, 40, 2)).result("a write to another unit of the block")
            assert not writer.done()
        expected = {0: 1, 20: 2, 21: 2, 40: 3, 41: 3}
        assert at.found(0, 43) == [expected.get(sector, 0) for sector in range(43)]


# ------------------------------------------------------------------------------------ the gate

#: (kind of request at the file node, what comes to it)
HELD = {
    "read": ("read", lambda node: node.read(512, 512)),
    "read_into": ("read", lambda node: node.read_into(512, bytearray(512))),
    "write": ("write", lambda node: node.write(512, b"x" * 512)),
    "write_zeroes": ("write", lambda node: node.write_zeroes(513, 512)),
    "discard": ("discard", lambda node: node.discard(0, 4096)),
    "flush": ("flush", lambda node: node.flush()),
    "write_encoded": ("write", lambda node: _encoded(node, 3, 7)),
}


def _encoded(node: Node, number: int, unit: int) -> bytes:
    """Store a stamped unit; returns what was stored."""
    encoder = node.encoder()
    assert encoder is not None
    count = encoder.unit // SECTOR
    data = stamped(number, unit * count, count)
    payload = encoder.encode(memoryview(data))
    assert payload is not None
    node.write_encoded(unit * encoder.unit, payload, encoder.unit)
    return data


def an_owner_waits_for(row: Row, request: str) -> None:
    """Who wants the graph for itself waits for a request that is inside."""
    kind, action = HELD[request]
    with image(row) as at:
        at.put(1, 0, 16)
        at.node.flush()
        at.put(1, 0, 16)
        entered = threading.Event()

        def own() -> None:
            with at.node.graph.exclusive():
                entered.set()

        pause = at.hold(kind)
        with while_held(pause, lambda: action(at.node)):
            owner = Task(own)
            assert not entered.wait(LATER_S), f"{request} is not in the gate"
        owner.result("the owner")


def an_owner_waits_for_a_populate(row: Row) -> None:
    """Populating is a request like any other."""
    with image(row, stamped(1, 0, 64)) as at:
        at.put(2, 2 * at.sectors, 1)
        assert at.found(0, 1) == [1]
        entered = threading.Event()

        def own() -> None:
            with at.node.graph.exclusive():
                entered.set()

        pause = at.hold("read")
        with while_held(pause, lambda: at.node.populate(0, 4096)):
            owner = Task(own)
            assert not entered.wait(LATER_S), "populate is not in the gate"
        owner.result("the owner")


def requests_wait_for_an_owner(row: Row) -> None:
    """While somebody has the graph to itself nobody else comes in."""
    with image(row) as at:
        node = at.node
        at.put(1, 0, 16)
        node.flush()
        requests: list[Callable[[], object]] = [
            lambda: node.read(0, 512),
            lambda: node.read_into(0, bytearray(512)),
            lambda: at.put(2, 1, 1),
            lambda: node.write_zeroes(2048, 512),
            lambda: node.discard(0, 512),
            lambda: list(node.extents(0, 512)),
            lambda: node.info(),
            lambda: node.flush(),
        ]
        with node.graph.exclusive():
            tasks = [Task(request) for request in requests]
            assert not tasks[0].done(LATER_S)
            assert not any(task.done() for task in tasks)
        for task in tasks:
            task.result()


def closing_waits(row: Row) -> None:
    """A node is not closed under somebody who reads it."""
    with image(row) as at:
        at.put(1, 0, 16)
        at.node.flush()
        pause = at.hold("read")
        with while_held(pause, lambda: at.found(0, 8)) as reader:
            closing = Task(at.node.close)
            assert not closing.done(LATER_S)
        assert reader.result() == [1] * 8
        closing.result("closing")


# ---------------------------------------------------------------------------------- retirement


def freed_space_waits_for_its_reader(row: Row) -> None:
    """What a discard freed is nobody else's while a reader may be on the way to it."""
    with image(row) as at:
        node, count = at.node, at.sectors
        at.put(1, 0, count)
        node.flush()
        pause = at.hold("read")
        with while_held(pause, lambda: at.found(0, count)) as reader:
            node.discard(0, count * SECTOR)
            node.flush()
            for number in range(2, at.node.size // at.unit, 2):
                at.put(number, number * count, count)
            node.flush()
        assert set(reader.result()) <= {0, 1}  # type: ignore[call-overload]
        for number in range(2, at.node.size // at.unit, 2):
            assert set(at.found(number * count, count)) == {number}


def freed_space_waits_for_its_writer(row: Row) -> None:
    """A write in place that found space just before it was freed hits nobody else."""
    with image(row) as at:
        node, count = at.node, at.sectors
        at.put(1, 0, count)
        node.flush()
        pause = at.hold("write")
        with while_held(pause, lambda: at.put(99, 3, 2)):
            node.discard(0, count * SECTOR)
            node.flush()
            for number in range(2, at.node.size // at.unit, 2):
                at.put(number, number * count, count)
        for number in range(2, at.node.size // at.unit, 2):
            assert set(at.found(number * count, count)) == {number}


def freed_space_comes_back(row: Row) -> None:
    """When nobody is inside any more, and the table is durable, it is used again."""
    with image(row) as at:
        node, count = at.node, at.sectors
        sizes = []
        for number in range(1, 6):
            at.put(number, 0, 2 * count)
            node.flush()
            sizes.append(sum(len(store.data) for store in at.stores))
            node.discard(0, 2 * at.unit)
            node.flush()
        assert sizes[-1] <= sizes[0] + at.unit, sizes


# ------------------------------------------------------------------------------ order in memory


def data_before_its_name(row: Row) -> None:
    """Who reads while a cluster is filled gets what was there before, never the raw space."""
    with image(row, stamped(7, 0, 1024) if row.differs else b"") as at:
        node, count = at.node, at.sectors
        at.put(1, count, 1)
        if not row.differs:
            for number in range(2, 6, 2):
                at.put(1, number * count, count)
            node.flush()
            node.discard(2 * at.unit, 3 * at.unit)
            node.flush()  # the space of other sectors is free now, with their bytes in it
        before = at.found(0, 8)
        assert before == [7 if row.differs else 0] * 8
        pause = at.hold("write", lambda offset, length: length >= 4096)
        with while_held(pause, lambda: at.put(2, 0, 8)):
            assert Task(lambda: at.found(0, 8)).result("a read of what is written") == before
        assert at.found(0, 8) == [2] * 8


def replaced_units_are_forgotten(row: Row) -> None:
    """Space of one encoded unit that became another's is decoded anew."""
    with image(row) as at:
        node = at.node
        encoder = node.encoder()
        assert encoder is not None
        count = encoder.unit // SECTOR
        for number in range(1, 5):
            unit = 2 * number
            data = _encoded(node, number, unit)
            node.flush()
            assert node.read(unit * encoder.unit + 512, 4096) == data[512:4608]
            assert set(at.found(unit * count + 1, 8)) == {number}
            node.discard(unit * encoder.unit, encoder.unit)
            node.flush()


# --------------------------------------------------------------------------------- range locks


def two_writers_of_a_new_cluster(row: Row) -> None:
    """Both are there afterwards, though both found nothing."""
    with image(row) as at:
        at.put(1, 3 * at.sectors, 1)
        pause = at.hold("write", lambda offset, length: length > SECTOR)
        with while_held(pause, lambda: at.put(2, 0, 3)):
            other = Task(lambda: at.put(3, 5, 3))
            other.done(LATER_S)
        other.result()
        assert at.found(0, 9) == [2, 2, 2, 0, 0, 3, 3, 3, 0]


def a_zeroed_edge_and_a_writer(row: Row) -> None:
    """A unit becomes zero as a whole only while nobody writes to the rest of it."""
    with image(row) as at:
        node = at.node
        assert isinstance(node, MappedNode)
        at.put(1, 3 * at.sectors, 1)
        looked, go = threading.Event(), threading.Event()
        look = node.reads_zero

        def slowly(start: int, stop: int) -> bool:
            found = look(start, stop)
            if threading.current_thread() is zeroing[0]._thread and start > 0:
                looked.set()
                go.wait(SOON_S)
            return found

        zeroing: list[Task] = []
        node.reads_zero = slowly  # type: ignore[method-assign]
        started = threading.Event()

        def zero() -> None:
            started.wait()
            node.write_zeroes(0, 100)

        zeroing.append(Task(zero))
        started.set()
        assert looked.wait(SOON_S)
        writer = Task(lambda: node.write(200, b"w" * 50))
        writer.done(LATER_S)
        go.set()
        zeroing[0].result()
        writer.result()
        assert node.read(0, 300) == bytes(200) + b"w" * 50 + bytes(50)


def a_zeroing_and_a_filling(row: Row) -> None:
    """A cluster that is zeroed while its edges are copied keeps none of its old bytes."""
    with image(row) as at:
        node = at.node
        count = _encoded_count(node)
        _encoded(node, 1, 0)
        node.flush()
        pause = at.hold("write")
        with while_held(pause, lambda: at.put(2, 3, 2)):
            zeroing = Task(lambda: node.write_zeroes(0, count * SECTOR, unmap=True))
            zeroing.done(LATER_S)
        zeroing.result()
        found = at.found(0, count)
        assert set(found[:3] + found[5:]) == {0}, found[:8]


def _encoded_count(node: Node) -> int:
    encoder = node.encoder()
    assert encoder is not None
    return encoder.unit // SECTOR


def a_unit_and_a_writer(row: Row) -> None:
    """An encoded unit and a plain write to it: one is first, none is half there."""
    with image(row) as at:
        node = at.node
        count = _encoded_count(node)
        _encoded(node, 1, 3)  # the first write of all is over
        pause = at.hold("write")
        with while_held(pause, lambda: at.put(2, 3, 2)):
            other = Task(lambda: _encoded(node, 5, 0))
            other.done(LATER_S)
        other.result()
        found = at.found(0, count)
        assert set(found[:3] + found[5:]) == {5}, found[:8]


def a_placing_and_a_writer(row: Row) -> None:
    """Host space that was handed out is published over nobody's write."""
    with image(row) as at:
        node = at.node
        assert isinstance(node, MappedNode)
        at.put(1, 3 * at.sectors, 1)
        data = stamped(2, 0, at.sectors)
        with node.graph.request():
            with node.place(0, at.unit) as places:
                for place in places:
                    part = data[place.offset : place.offset + place.length]
                    place.child.write(place.host_offset, part)
                writer = Task(lambda: at.put(3, 4, 2))
                writer.done(LATER_S)
        writer.result()
        assert at.found(0, 8) == [2, 2, 2, 2, 3, 3, 2, 2]


def a_populate_and_a_writer(row: Row) -> None:
    """What is brought up from below never covers what was written meanwhile."""
    with image(row, stamped(1, 0, 256)) as at:
        node = at.node
        at.put(9, 3 * at.sectors, 1)
        assert set(at.found(0, at.sectors)) == {1}  # tables are loaded
        pause = at.hold("read")
        with while_held(pause, lambda: node.populate(0, at.unit)):
            writer = Task(lambda: at.put(2, 3, 2))
            writer.done(LATER_S)
        writer.result()
        expected = [2 if at_ in (3, 4) else 1 for at_ in range(at.sectors)]
        assert at.found(0, at.sectors) == expected


def two_padded_writers(row: Row, kind: str = "write") -> None:
    """Two writes to parts of one sector: neither brings the other's old bytes back."""
    with image(row) as at:
        node = at.node
        node.write(0, b"o" * 4096)
        node.flush()
        pause = at.hold("write")

        def second() -> None:
            if kind == "write":
                node.write(100, b"B" * 50)
            else:
                node.write_zeroes(100, 50)

        with while_held(pause, lambda: node.write(10, b"A" * 50)):
            other = Task(second)
            other.done(LATER_S)
        other.result()
        new = b"B" * 50 if kind == "write" else bytes(50)
        expected = b"o" * 10 + b"A" * 50 + b"o" * 40 + new + b"o" * 362
        assert node.read(0, 512) == expected


# ---------------------------------------------------------------------------- flushes and first


def a_flush_starts_after_its_caller_came(row: Row) -> None:
    """Who flushes while another flush is under way waits for one that knows its write."""
    with image(row) as at:
        node = at.node
        at.put(1, 0, 8)
        node.flush()
        at.put(2, 0, 8)  # in place: a flush is one barrier
        pause = at.hold("flush")
        with while_held(pause, node.flush):
            at.put(3, 0, 8)
            begun = [len(store.log) for store in at.stores]
            second = Task(node.flush)
            assert not second.done(LATER_S)
        second.result()
        barriers = [
            sum(entry[0] == "barrier" for entry in store.log[at_:])
            for store, at_ in zip(at.stores, begun, strict=True)
        ]
        assert max(barriers) > 1, "a flush was joined that began before its caller came"


def nobody_passes_the_first_write(row: Row) -> None:
    """No byte changes before what must precede it is durable, whoever writes."""
    with image(row) as at:
        node = at.node
        pause = at.hold("flush")
        with while_held(pause, lambda: at.put(1, 0, 8)):
            before = [bytes(store.data) for store in at.stores]
            second = Task(lambda: at.put(2, at.sectors, 8))
            assert not second.done(LATER_S), "a write passed the first one"
            assert [bytes(store.data) for store in at.stores] == before
        second.result()
        assert at.found(at.sectors, 8) == [2] * 8
        assert node.broken is None


# ------------------------------------------------------------------------------- tables in memory


def tables_in_use_stay(row: Row) -> None:
    """A slice that an allocation is going to change does not leave the cache before."""
    with image(row) as at:
        node = at.node
        cluster = node.limits.cluster_size
        count = max(cluster // SECTOR, 1)
        at.put(1, 0, count)
        node.flush()
        pause = at.hold("write", lambda offset, length: length >= cluster)
        with while_held(pause, lambda: at.put(2, 2 * count, count)):
            for offset in range(1 << 16, node.size, 1 << 16):  # every table there is
                node.read(offset, 512)
            at.put(5, 5 * count, count)
            node.flush()
        node.flush()
        _reopened(at, {0: 1, 2 * count: 2, 5 * count: 5})


def changed_tables_stay(row: Row) -> None:
    """A slice that the disk does not have yet is not forgotten."""
    with image(row) as at:
        node = at.node
        at.put(1, 0, 8)
        for offset in range(1 << 16, node.size, 1 << 16):
            node.read(offset, 512)
        assert at.found(0, 8) == [1] * 8


def _reopened(at: Image, expected: dict[int, int]) -> None:
    """What is in the files now, seen by somebody who comes anew."""
    for name in [*at.row.files(at.name), f"{at.name}.base"]:
        bare = name.removeprefix("recorder:")
        if bare in devices.STORES:
            kept = bytes(devices.STORES[bare].data)
            devices.STORES[bare.replace("race", "copy")] = devices.Store(kept)
    with at.row.open(at.name.replace("race", "copy"), read_only=True) as again:
        for sector, number in expected.items():
            data = again.read(sector * SECTOR, SECTOR)
            assert numbers_of(data, sector) == [number], f"sector {sector} is lost on disk"


def a_flush_misses_nothing(row: Row) -> None:
    """What changes a table while a flush writes it is written by the next one."""
    with image(row) as at:
        node, count = at.node, at.sectors
        at.put(1, 0, count)
        node.flush()
        at.put(2, count, count)
        pause = at.hold("flush")
        with while_held(pause, node.flush):
            writer = Task(lambda: at.put(3, 2 * count, count))
            writer.done(LATER_S)
        writer.result()
        node.flush()
        _reopened(at, {0: 1, count: 2, 2 * count: 3})


def freed_space_comes_back_beside_readers(row: Row) -> None:
    """Who came in after space was freed does not keep it from being used again."""
    with image(row) as at:
        node, count = at.node, at.sectors
        at.put(1, 0, 3 * count)
        node.flush()
        at.put(1, 3 * count, 8)
        node.flush()
        node.discard(0, 2 * at.unit)
        size = sum(len(store.data) for store in at.stores)
        pause = at.hold("read", lambda offset, length: length == 4096)
        with while_held(pause, lambda: at.found(3 * count, 8)):
            node.flush()
            at.put(2, 0, 2 * count)
            assert sum(len(store.data) for store in at.stores) <= size, "the file grew"


def populate_fills_before_it_names(row: Row) -> None:
    """Who reads while a cluster is brought up gets what is below."""
    with image(row, stamped(1, 0, 256)) as at:
        node = at.node
        at.put(9, 3 * at.sectors, 1)
        assert set(at.found(0, 8)) == {1}
        pause = at.hold("write", lambda offset, length: length > SECTOR)
        with while_held(pause, lambda: node.populate(0, at.unit)):
            assert Task(lambda: at.found(0, 8)).result("a read") == [1] * 8


def units_are_there_before_their_name(row: Row) -> None:
    """Who reads while an encoded unit is stored gets what was there before."""
    with image(row) as at:
        node = at.node
        _encoded(node, 1, 3)
        at.put(2, 0, 8)
        pause = at.hold("write")
        with while_held(pause, lambda: _encoded(node, 5, 0)):
            assert Task(lambda: at.found(0, 8)).result("a read") == [2] * 8
        assert at.found(0, 8) == [5] * 8


# ---------------------------------------------------------------- operations on the whole graph

OPERATIONS: dict[str, Callable[[Node], object]] = {
    "truncate": lambda node: node.truncate(node.size + (1 << 20)),
    "check": lambda node: node.check(),
    "snapshot_create": lambda node: node.snapshot_create(SnapshotInfo("", "other")),
    "snapshot_apply": lambda node: node.snapshot_apply("kept"),
    "snapshot_delete": lambda node: node.snapshot_delete("kept"),
    "change_backing": lambda node: node.change_backing(None, None),
    "make_empty": lambda node: node.make_empty(),
    "reopen": lambda node: node.reopen(read_only=True),
}


def an_operation_waits(row: Row, operation: str) -> None:
    """What changes the whole image waits for a reader, and the reader gets what was there."""
    with image(row, stamped(1, 0, 256) if row.differs else b"") as at:
        node = at.node
        at.put(1, 0, 16)
        if row.snapshots:
            node.snapshot_create(SnapshotInfo("", "kept"))
        at.put(2, 0, 16)
        node.flush()
        pause = at.hold("read", lambda offset, length: length == 4096)
        with while_held(pause, lambda: at.found(0, 8)) as reader:
            task = Task(lambda: OPERATIONS[operation](node))
            assert not task.done(LATER_S), f"{operation} does not wait"
        assert reader.result() == [2] * 8
        task.result(operation)
