"""Random sequences of everything, beside a bytearray; `check` is clean after each step.

Hypothesis draws the steps and shrinks a failure to the shortest sequence that still fails; the
seed is printed with it. Offsets are drawn near boundaries, so edges meet.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from diskwright.block.info import SnapshotInfo
from tests.contract.disk import SECTOR, Disk, check_clean, noise
from tests.contract.rows import Row, rows

#: How many times an image is made, and how many steps are done with it.
FAST, LONG = (3, 12), (20, 30)

#: Places are drawn as (unit, how far from its border).
PLACES = st.tuples(st.integers(0, 40), st.sampled_from([-513, -512, -1, 0, 1, 512, 513, 3000]))
LENGTHS = st.sampled_from([1, 511, 512, 513, 4096, 65535, 65536, 70_000, 200_000])
SIZES = st.integers(1, 60)


class Machine(RuleBasedStateMachine):
    """One image and what must be in it; `row` is set by `machine_of`."""

    row: Row

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="machine")
        self.path = str(Path(self.folder.name, "image"))
        self.rng = random.Random(0)
        self.kept: dict[str, bytes] = {}

    @initialize(value=st.integers(0, 1 << 32), below=st.booleans())
    def create(self, value: int, below: bool) -> None:
        """A new image; an overlay's base may have something in it."""
        self.rng.seed(value)
        row = self.row
        if row.differs:
            base = f"{self.path}.base"
            row.create_base(base, row.size)
            with row.open_base_at(base) as node:
                shown = noise(self.rng, 300_000) if below else b""
                node.write(70_000, shown)
                model = bytes(70_000) + shown
            row.create(self.path, **{row.parent: base})
        else:
            row.create(self.path)
            model = b""
        self.node = row.open(self.path)
        self.disk = Disk(self.node, model.ljust(self.node.size, b"\0"))
        self.unit = min(max(self.node.limits.cluster_size, 4096), 1 << 20)
        self.encoder = self.node.encoder()

    def _range(self, place: tuple[int, int], length: int) -> tuple[int, int]:
        unit, beside = place
        size = self.node.size
        offset = min(max(unit * self.unit % max(size, 1) + beside, 0), size)
        return offset, min(length, size - offset)

    def _step(self) -> None:
        """What holds after each step."""
        assert self.node.size == len(self.disk.model)
        self.disk.verify()
        self.disk.noted.verify(self.node)
        check_clean(self.node)

    # ------------------------------------------------------------------------------- steps

    @rule(place=PLACES, length=LENGTHS, fua=st.booleans())
    def write(self, place: tuple[int, int], length: int, fua: bool) -> None:
        offset, length = self._range(place, length)
        self.disk.write(offset, noise(self.rng, length), fua=fua)
        self._step()

    @rule(place=PLACES, length=LENGTHS)
    def write_zero_bytes(self, place: tuple[int, int], length: int) -> None:
        offset, length = self._range(place, length)
        self.disk.write(offset, bytes(length))
        self._step()

    @rule(place=PLACES, length=LENGTHS, unmap=st.booleans())
    def zero(self, place: tuple[int, int], length: int, unmap: bool) -> None:
        offset, length = self._range(place, length)
        self.disk.zero(offset, length, unmap=unmap)
        self._step()

    @rule(place=PLACES, length=LENGTHS)
    def discard(self, place: tuple[int, int], length: int) -> None:
        offset, length = self._range(place, length)
        self.disk.discard(offset, length)
        self._step()

    @rule(places=st.lists(st.tuples(PLACES, LENGTHS, st.integers(0, 2)), min_size=2, max_size=6))
    def burst(self, places: list[tuple[tuple[int, int], int, int]]) -> None:
        """Several things without a flush or a check between them."""
        for place, length, what in places:
            offset, length = self._range(place, length)
            if what == 0:
                self.disk.write(offset, noise(self.rng, length))
            elif what == 1:
                self.disk.zero(offset, length, unmap=True)
            else:
                self.disk.discard(offset, length)
        self.disk.verify()
        self._step()

    @rule()
    def flush(self) -> None:
        self.node.flush()
        self._step()

    @rule(place=PLACES, length=LENGTHS)
    def populate(self, place: tuple[int, int], length: int) -> None:
        self.node.populate(*self._range(place, length))
        self._step()

    @precondition(lambda self: self.row.encodes)
    @rule(number=st.integers(0, 30))
    def write_encoded(self, number: int) -> None:
        assert self.encoder is not None
        count = self.node.size // self.encoder.unit
        if count:
            piece = noise(self.rng, 48)
            self.disk.write_unit(number % count, piece * (self.encoder.unit // 48 + 1))
        self._step()

    @rule(read_only_first=st.booleans())
    def close_and_open(self, read_only_first: bool) -> None:
        self.node.close()
        if read_only_first:
            with self.row.open(self.path, read_only=True) as node:
                assert node.read(0, node.size) == bytes(self.disk.model)
        self.node = self.disk.node = self.row.open(self.path)
        self._step()

    @rule()
    def reopen(self) -> None:
        self.node.reopen(read_only=True)
        self.node.reopen(read_only=False)
        self._step()

    @precondition(lambda self: self.row.resizes)
    @rule(units=SIZES, odd=st.sampled_from([0, SECTOR, 3 * SECTOR]))
    def resize(self, units: int, odd: int) -> None:
        size = min(units * self.unit, 2 * self.row.size) + odd
        if self.kept and self.row.options.get("compat") == "0.10":
            return  # version 2 keeps no size with a snapshot
        self.disk.resize(size)
        self._step()

    @precondition(lambda self: self.row.snapshots and len(self.kept) < 4)
    @rule()
    def snapshot(self) -> None:
        name = f"s{self.rng.randrange(1 << 30)}"
        self.node.snapshot_create(SnapshotInfo("", name))
        self.kept[name] = bytes(self.disk.model)
        self._step()

    @precondition(lambda self: self.kept)
    @rule(number=st.integers(0, 3), delete=st.booleans())
    def use_snapshot(self, number: int, delete: bool) -> None:
        name = sorted(self.kept)[number % len(self.kept)]
        if delete:
            self.node.snapshot_delete(name)
            del self.kept[name]
        else:
            self.node.snapshot_apply(name)
            self.disk.model[:] = self.kept[name]
        self._step()

    @precondition(lambda self: self.row.bitmaps)
    @rule(
        what=st.sampled_from(("add", "remove", "clear", "enable", "disable", "merge")),
        number=st.integers(0, 7),
        grain=st.sampled_from((512, 4096, 65536)),
    )
    def change_bitmap(self, what: str, number: int, grain: int) -> None:
        if what != "add" or len(self.disk.noted.models) < 6:
            self.disk.noted.change(self.node, what, number, grain)
        self._step()

    def teardown(self) -> None:
        node = getattr(self, "node", None)
        if node is not None:
            node.close()
            for name, content in self.kept.items():
                with self.row.open(self.path, read_only=True, options={"snapshot": name}) as old:
                    assert old.read(0, old.size) == content, name
        self.folder.cleanup()


def run(row: Row, seed: int, examples: int, steps: int) -> None:
    """Run the machine of a row; the seed repeats it."""
    machine = seeded(seed)(type(f"Machine_{row.name}", (Machine,), {"row": row}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@rows()
def test_a_few_sequences(row: Row, seed: int):
    run(row, seed, *FAST)


@pytest.mark.slow
@rows()
def test_many_sequences(row: Row, seed: int):
    run(row, seed, *LONG)
