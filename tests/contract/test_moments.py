"""A node's map is of one moment: between any two looks at a table another thread may change it.

Readers hold no lock. What they may see is the state before a change or the one after it, and no
mixture: whoever looks at an entry twice can find its cluster in a place where it never was.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from diskwright.block.extent import DATA
from diskwright.block.mapped import MappedNode, Run
from tests.contract.rows import BY_NAME, opened

SECONDS = 20
UNITS = 4

ROWS = [
    "qcow2", "qcow2-512", "qcow2-v2", "qcow2-extended", "qcow2-overlay", "vdi", "vdi-512",
    "vpc", "vpc-4k", "vpc-diff", "vdi-diff",
]  # fmt: skip


def _write(node: MappedNode, unit: int) -> None:
    node.write(0, b"new!" * (unit // 4))


def _encode(node: MappedNode, unit: int) -> None:
    encoder = node.encoder()
    assert encoder is not None
    node.write_encoded(0, encoder.encode(memoryview(b"soft" * (unit // 4))), unit)


CHANGES: dict[str, Callable[[MappedNode, int], object]] = {
    "discarded": lambda node, unit: node.discard(0, unit),
    "zeroed": lambda node, unit: node.write_zeroes(0, unit),
    "encoded": _encode,
    "written": _write,
}


class Between:
    """Runs something in another thread before the bytecode with a given number.

    Counted are those of the drivers alone, while the block runs.
    """

    def __init__(self, moment: int, action: Callable[[], object]) -> None:
        self._left = moment
        self._action = action

    def __enter__(self) -> Between:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    @property
    def came(self) -> bool:
        return self._left < 0

    def _call(self, frame, event, argument):
        name = frame.f_code.co_filename
        if "/drivers/formats/" not in name and "odd_format" not in name:
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame, event, argument):
        if event == "opcode":
            self._left -= 1
            if self._left == -1:
                thread = threading.Thread(target=self._action)
                thread.start()
                thread.join(SECONDS)
                assert not thread.is_alive(), "the change waits for who looks"
        return self._step


def _first(run: Run) -> tuple[object, ...]:
    """What a run says of its first byte."""
    place = run.host_offset if run.kind == DATA and run.unit is None else None
    return run.kind, place, run.unit is None


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, how) for name in ROWS for how in CHANGES if how != "encoded" or BY_NAME[name].encodes],
)
def test_a_map_is_of_one_moment(name: str, change: str, tmp_path: Path):
    row = BY_NAME[name]
    with opened(row, tmp_path) as node:
        assert isinstance(node, MappedNode)
        unit = node.limits.cluster_size
        whole = min(UNITS * unit, node.size)
        moment, seen = 0, set()
        while True:
            if change == "written":
                node.discard(0, unit)
            else:
                node.write(0, b"old!" * (whole // 4))
            with node.graph.request():
                before = node.map(0, whole)
                with Between(moment, lambda: CHANGES[change](node, unit)) as between:
                    run = node.map(0, whole)
                after = node.map(0, whole)
                assert _first(run) in (_first(before), _first(after)), f"moment {moment}"
                assert run.length > 0, f"moment {moment}"
                seen.add(_first(run))
                if run.kind == DATA and run.unit is None:
                    for at in range(unit, min(run.length, whole), unit):
                        assert node.map(at, 1).host_offset == run.host_offset + at
            if not between.came:
                break
            moment += 1
        assert moment > 10


@pytest.mark.parametrize("name", ["vpc-diff", "qcow2-extended"])
def test_a_map_of_parts_is_of_one_moment(name: str, tmp_path: Path):
    """Parts of a cluster that is there: one more of them comes with each write."""
    with opened(BY_NAME[name], tmp_path) as node:
        assert isinstance(node, MappedNode)
        part = node.limits.zero_alignment or 512
        count = node.limits.cluster_size // part
        cluster = moment = 0
        came = True
        while came:
            if moment % (count - 1) == 0:
                cluster, at = cluster + (moment > 0), 0
                node.write(cluster * node.limits.cluster_size, b"1" * part)
            at += part
            place = cluster * node.limits.cluster_size + at
            with node.graph.request():
                before = node.map(place, part)
                data = bytes([moment % 255 + 1]) * part
                with Between(moment, lambda p=place, d=data: node.write(p, d)) as between:
                    run = node.map(place, part)
                assert before.kind != DATA
                assert run.length > 0, f"moment {moment}"
                assert _first(run) in (_first(before), _first(node.map(place, part)))
            came = between.came
            moment += 1
        assert moment > 10
