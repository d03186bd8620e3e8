"""Runs of table entries, found piece by piece: what looking at each of them finds."""

from __future__ import annotations

import sys
from array import array

import pytest

from diskwright.drivers.formats.qcow2 import entries
from diskwright.drivers.formats.qcow2.check_flags import FlagCheck
from diskwright.drivers.formats.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from tests.unit.qcow2_images import create, memory_folder, opened

tmp_path = memory_folder

PIECE = entries._PIECE
LENGTHS = [1, 2, 3, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 5, 9 * PIECE]


def plain_runs(items, step):
    """As `runs`, in the plainest way."""
    found = []
    for index, entry in enumerate(items):
        before = items[index - 1] if index else 0
        if not entry:
            continue
        plain = before & OFFSET_MASK and not before & COMPRESSED
        follows = plain and entry == before + step
        if follows:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((index, 1))
    return found


def table(rng, step, length):
    """Entries of all kinds, in runs of all lengths."""
    items, host = [], step
    while len(items) < length:
        kind, count = rng.randrange(10), rng.choice(LENGTHS)
        if kind < 3:
            items += [0] * count
        elif kind == 3:
            items.append(COMPRESSED | rng.getrandbits(62) | rng.choice((0, COPIED)))
        elif kind == 4:
            items.append(rng.getrandbits(64))
        elif kind == 5:
            items += [ZERO_FLAG] * count
        else:
            flags = rng.choice((COPIED, COPIED, 0, ZERO_FLAG, COPIED | ZERO_FLAG))
            host += rng.choice((0, 0, step, 1 << 32))
            items += [flags | host + step * at for at in range(count)]
            host += step * count
    return array("Q", items[:length])


@pytest.mark.parametrize("step", [512, 65536, 2 << 20])
def test_runs_are_found(rng, step):
    for _ in range(60):
        items = table(rng, step, rng.choice((0, *LENGTHS, 40 * PIECE)))
        assert list(entries.runs(items, step)) == plain_runs(items, step)
        assert list(entries.named(items)) == [pair for pair in enumerate(items) if pair[1]]
        assert entries.is_empty(items) == (not any(items))
        used = [at + 1 for at, entry in enumerate(items) if entry]
        assert entries.used_length(items) == max(used, default=0)


@pytest.mark.parametrize("step", [0, 512, 65536])
def test_how_far_a_run_goes(rng, step):
    for _ in range(60):
        items = table(rng, step or 512, rng.choice((*LENGTHS, 40 * PIECE)))
        first = rng.randrange(len(items))
        stop = rng.randrange(first, len(items)) + 1
        length = 1
        while first + length < stop and items[first + length] == items[first] + length * step:
            length += 1
        rest = items, first + 1, stop
        assert entries.run_length(items[first], rest, step) == length


@pytest.mark.parametrize("at", [1, PIECE - 1, PIECE, 3 * PIECE - 2])
def test_one_entry_that_is_different_ends_a_run(at):
    items = array("Q", range(COPIED, COPIED + 4 * PIECE * 512, 512))
    rest = items, 1, len(items)
    assert entries.run_length(items[0], rest, 512) == len(items)
    items[at] += 512
    assert entries.run_length(items[0], rest, 512) == at


@pytest.mark.parametrize("step", [0, 512])
def test_a_run_may_end_at_the_highest_entry(step):
    highest = (1 << 64) - 1
    items = array("Q", [highest - (PIECE - at) * step for at in range(PIECE + 1)] * 2)
    assert entries.run_length(items[0], (items, 1, PIECE + 1), step) == PIECE + 1
    rest = items, PIECE + 1, 2 * PIECE
    assert entries.run_length(items[PIECE], rest, step) == (1 if step else PIECE)


@pytest.mark.parametrize("length", [2, PIECE])
def test_a_zero_cluster_without_space_is_no_neighbour_of_the_first_cluster(length):
    items = array("Q", [ZERO_FLAG + at * 512 for at in range(length)])
    assert list(entries.runs(items, 512)) == [(0, 1), (1, length - 1)]


def test_the_highest_entries_are_runs_of_one():
    top = array("Q", [(1 << 64) - 1] * PIECE)
    assert list(entries.runs(top, 512)) == [(at, 1) for at in range(PIECE)]


@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_a_check_looks_at_runs_and_not_at_each_cluster(tmp_path, monkeypatch, cluster_size):
    path, asked = tmp_path / "full.qcow2", []
    refcount = FlagCheck._refcount

    def noted(self, host):
        asked.append(host)
        return refcount(self, host)

    monkeypatch.setattr(FlagCheck, "_refcount", noted)
    create(path, 16384 * cluster_size, cluster_size=cluster_size, preallocation="metadata")
    with opened(path, checks=True) as node:
        found = node.check()
        assert found.clean
        assert found.allocated_clusters == 16384
        assert len(asked) == sum(map(bool, node.l1)), "L2 tables alone"


@pytest.mark.parametrize("refcount_bits", [1, 16])
def test_a_check_of_large_clusters_does_not_look_at_each_empty_entry(tmp_path, refcount_bits):
    """Tables of 262144 entries, of which a few are used: so many lines are not to be run."""
    path, lines = tmp_path / "large.qcow2", 0
    create(path, 64 << 20, cluster_size=2 << 20, refcount_bits=refcount_bits)

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    with opened(path) as node:
        node.write(0, b"x")
        node.flush()
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            assert node.check().clean
        finally:
            sys.settrace(before)
    assert lines < 262144
