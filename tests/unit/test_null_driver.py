"""null-co and null-aio: a disk of any size that keeps nothing."""

from __future__ import annotations

import time

import pytest

from diskwright.block.extent import DATA, ZERO
from diskwright.block.opener import Opener, open_image


@pytest.mark.parametrize("driver", ["null-co", "null-aio"])
def test_it_takes_everything_and_reads_as_zero(driver: str) -> None:
    spec: dict[str, object] = {"driver": driver, "size": "1T", "read-zeroes": "on"}
    with open_image(Opener(read_only=False), spec) as node:
        assert node.size == 1 << 40
        node.write(1 << 30, b"gone")
        node.write_zeroes(0, 1 << 40)
        node.discard(0, 4096)
        node.flush()
        assert node.read(1 << 30, 4) == bytes(4)
        assert [extent.kind for extent in node.extents(0, 4096)] == [ZERO]


def test_name_and_default_size() -> None:
    with open_image(Opener(), "null-co://", format="raw") as node:
        assert node.size == 1 << 30
        assert node.filename == "null-co://"
        assert [extent.kind for extent in node.extents(0, 4096)] == [DATA]


def test_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    spec: dict[str, object] = {"driver": "null-co", "latency-ns": 2_000_000}
    with open_image(Opener(read_only=False), spec) as node:
        node.read(0, 1)
        node.write(0, b"x")
        node.flush()
    assert waits[:3] == [0.002] * 3
