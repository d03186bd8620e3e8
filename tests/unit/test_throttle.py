"""throttle: what the buckets let through, in simulated time; what the node counts."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from diskwright.drivers.filters import throttle
from diskwright.drivers.filters.throttle import Bucket, Group, check_limits
from diskwright.errors import OptionError

MIB = 1 << 20


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def opened(**options: Any) -> Node:
    null = {"driver": "null-co", "size": 16 * MIB}
    spec: dict[str, object] = {"driver": "throttle", "file": null, **options}
    return open_image(Opener(read_only=False), spec)


def test_a_rate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with opened(**{"limits.iops-total": 100}) as node:
        start = clock.now
        for n in range(500):
            node.read(n * 512, 512)
        # A tenth of a second's worth goes at once.
        assert 4.8 <= clock.now - start <= 5.0


def test_bytes_are_counted_by_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with opened(limits={"bps-write": MIB}) as node:
        start = clock.now
        for n in range(8):
            node.read(n * MIB, MIB)
        assert clock.now == start
        node.write(0, bytes(MIB))
        node.write_zeroes(MIB, MIB)
        node.discard(0, MIB)
        node.flush()
        assert 1.8 <= clock.now - start <= 2.0


def test_a_burst_is_let_through_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    limits = {"iops-total": 10, "iops-total-max": 100}
    with opened(limits=limits) as node:
        start = clock.now
        for _ in range(100):
            node.read(0, 512)
        assert clock.now == start
        for _ in range(50):
            node.read(0, 512)
        assert 4.8 <= clock.now - start <= 5.0


def test_a_long_burst_keeps_to_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    limits = {"iops-total": 10, "iops-total-max": 100, "iops-total-max-length": 3}
    with opened(limits=limits) as node:
        start = clock.now
        for _ in range(300):
            node.read(0, 512)
        assert 2.7 <= clock.now - start <= 3.0


def test_large_requests_count_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with opened(limits={"iops-total": 10, "iops-size": 4096}) as node:
        start = clock.now
        node.read(0, 40960)
        node.read(0, 512)
        assert 0.85 <= clock.now - start <= 1.0


@given(
    rate=st.integers(1, 10**6),
    costs=st.lists(st.integers(1, 10**5), min_size=1, max_size=50),
    idle=st.lists(st.floats(0, 2), min_size=50, max_size=50),
)
def test_no_more_than_the_rate_beside_one_capacity(
    rate: int, costs: list[int], idle: list[float]
) -> None:
    bucket = Bucket(rate)
    now, poured = 0.0, 0.0
    for cost, pause in zip(costs, idle, strict=False):
        now += bucket.delay(now)
        assert poured <= rate * now + rate / 10 + 1e-3 * (poured + 1)
        bucket.pour(cost)
        poured += cost
        now += pause


def test_groups_are_shared_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with (
        opened(**{"throttle-group": "g", "limits.iops-total": 10}) as first,
        opened(**{"throttle-group": "g"}) as second,
    ):
        start = clock.now
        for _ in range(10):
            first.read(0, 512)
            second.read(0, 512)
        assert 1.7 <= clock.now - start <= 2.0
    del first, second
    gc.collect()
    assert throttle._groups["g"]() is None


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (
            {"bps-total": 10, "bps-read": 5},
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        ({"bps-total-max": 100}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"bps-total": 100, "bps-total-max": 50}, "bps_max/iops_max cannot be lower than bps/iops"),
        ({"iops-total": -1}, "Property values cannot be negative"),
        (
            {"iops-total": 10, "iops-total-max": 100, "iops-total-max-length": 0},
            "the burst length cannot be 0",
        ),
        (
            {"iops-total": 10, "iops-total-max-length": 5},
            "burst length set without burst rate",
        ),
        ({"iops-size": 10}, "iops size requires an iops value to be set"),
        ({"bps-total": 10**17}, "bps/iops/max values must be within [0, 1000000000000000]"),
    ],
)
def test_contradictions_in_qemus_words(limits: dict[str, int], sentence: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_limits(limits)
    assert caught.value.qemu_message == sentence
    with pytest.raises(OptionError):
        Group().configure(limits)


def test_options() -> None:
    with pytest.raises(OptionError) as caught:
        opened()
    assert caught.value.qemu_message == "Please specify a throttle group"
    with pytest.raises(OptionError, match=r"Invalid parameter 'limits\.bogus'"):
        opened(limits={"bogus": 1})


def test_it_passes_everything_on(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\x11" * MIB)
    below = {"driver": "file", "filename": str(path)}
    spec: dict[str, object] = {
        "driver": "throttle",
        "file": below,
        "limits": {"iops-total": 10**9},
    }
    with open_image(Opener(read_only=False), spec) as node:
        assert node.size == MIB
        assert node._lend() is None
        node.write(5, b"hello")
        node.write_zeroes(65536, 65536, unmap=True)
        assert [extent.kind for extent in node.extents(0, MIB)] == [0, 1, 0]
        node.truncate(2 * MIB)
        assert node.size == 2 * MIB
        node.flush()
    content = path.read_bytes()
    assert content[5:10] == b"hello"
    assert content[65536:131072] == bytes(65536)
    assert len(content) == 2 * MIB
