"""Runs of bytes: cutting and joining them keeps what they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.block.extent import DATA, UNALLOCATED, ZERO, Extent, joined

KINDS = st.sampled_from([DATA, ZERO, UNALLOCATED])


@st.composite
def extents(draw: st.DrawFn) -> Extent:
    kind = draw(KINDS)
    return Extent(
        draw(st.integers(0, 1 << 50)),
        draw(st.integers(1, 1 << 40)),
        kind,
        allocated=draw(st.booleans()),
        encoded=draw(st.booleans()),
        depth=draw(st.integers(0, 3)),
        host_offset=draw(st.none() | st.integers(0, 1 << 50)),
    )


@given(extents(), st.data())
def test_cutting_and_joining(extent: Extent, data: st.DataObject):
    cut = data.draw(st.integers(extent.offset, extent.end))
    parts = [extent.clipped(0, cut), extent.clipped(cut, extent.end)]
    parts = [part for part in parts if part.length > 0]
    assert sum(part.length for part in parts) == extent.length
    assert list(joined(parts)) == [extent]


@given(extents(), st.integers(0, 1 << 51), st.integers(0, 1 << 51))
def test_a_part_lies_where_it_lay(extent: Extent, start: int, stop: int):
    part = extent.clipped(start, stop)
    if part.length <= 0:
        return
    assert extent.offset <= part.offset
    assert part.end <= extent.end
    assert (part.kind, part.allocated, part.encoded, part.depth) == (
        extent.kind,
        extent.allocated,
        extent.encoded,
        extent.depth,
    )
    if extent.host_offset is not None and not extent.encoded:
        assert part.host_offset == extent.host_offset + part.offset - extent.offset
    else:
        assert part.host_offset == extent.host_offset


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("offset", 11),
        ("kind", ZERO),
        ("allocated", False),
        ("encoded", True),
        ("depth", 1),
        ("child", object()),
        ("host_offset", 1011),
        ("host_offset", None),
    ],
)
def test_unlike_neighbours_stay_apart(change: str, value: object):
    first = Extent(0, 10, DATA, host_offset=1000)
    second = Extent(10, 10, DATA, host_offset=1010)
    assert first.continues(second)
    setattr(second, change, value)
    assert not first.continues(second)
    assert len(list(joined([first, second]))) == 2
