"""What is promised to be durable is there after a crash that loses all that may be lost."""

from __future__ import annotations

import itertools
import random

from diskwright.block.node import Node
from tests import devices
from tests.contract.disk import noise
from tests.contract.rows import Row

#: What makes a write durable.
HOWS = ["flush", "again", "fua", "zero fua", "writethrough", "close", "reopen"]

_numbers = itertools.count(1)


def recorded(row: Row, **how: object) -> tuple[str, Node, devices.Timeline]:
    """An empty image in memory: its name, its node, and all that its files are told."""
    name = f"recorder:durable-{next(_numbers)}"
    row.create(name)
    names = [file.removeprefix("recorder:") for file in row.files(name)]
    for file in names:
        devices.STORES.setdefault(file, devices.Store())
    timeline = devices.record_together(names)
    return name, row.open(name, **how), timeline  # type: ignore[arg-type]


def crash(timeline: devices.Timeline) -> None:
    """Leave in the stores what a crash leaves at worst: nothing that no barrier followed."""
    kept = {name: bytearray(data) for name, data in timeline.starts.items()}
    pending: dict[str, list[devices.Entry]] = {name: [] for name in kept}
    for name, entry in timeline.log:
        pending[name].append(entry)
        if entry[0] == "barrier":
            for done in pending[name]:
                devices.apply(kept[name], done)
            pending[name] = []
    for name, data in kept.items():
        devices.STORES[name] = devices.Store(bytes(data))


def outlives_a_crash(row: Row, how: str) -> None:
    """Write something, make it durable in one of the ways, crash, and look."""
    rng = random.Random(how)
    through = how in ("writethrough", "encoded")
    name, node, timeline = recorded(row, cache="writethrough" if through else "writeback")
    offset, data = 70_000, noise(rng, 5000)
    if how == "encoded":
        encoder = node.encoder()
        assert encoder is not None
        offset, data = 2 * encoder.unit, (noise(rng, 64) * (encoder.unit // 64))[: encoder.unit]
        payload = encoder.encode(memoryview(data))
        assert payload is not None
        node.write_encoded(offset, payload, encoder.unit)
    else:
        node.write(offset, data, fua=how == "fua")
    if how in ("flush", "again", "zero fua"):
        node.flush()
    if how == "again":  # in place: no table changes
        data = noise(rng, 5000)
        node.write(offset, data)
        node.flush()
    if how == "zero fua":
        node.write_zeroes(offset, 4096, fua=True)
        data = bytes(4096) + data[4096:]
    if how == "reopen":
        node.reopen(read_only=True)
    if how == "close":
        node.close()
    else:
        assert node.read(offset, len(data)) == data
    crash(timeline)
    node.broken = "it crashed"
    node.close()
    with row.open(name) as again:
        assert again.read(offset, len(data)) == data, f"{how} promised too much"
        assert again.read(0, offset) == bytes(offset)
