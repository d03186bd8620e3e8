"""Finding and counting host clusters of qcow2 images: what it costs, and that it can be ended."""

from __future__ import annotations

import threading

import pytest

from diskwright.block.cancel import cancellable
from diskwright.drivers.formats.qcow2.refcounts import Refcounts
from diskwright.errors import CancelledError
from tests.unit.qcow2_images import MIB, create, memory_folder, opened

tmp_path = memory_folder

SIZE = 16 * MIB


@pytest.fixture
def full(tmp_path):
    """An image of many refcount slices, all full, none in memory."""
    path = tmp_path / "full.qcow2"
    create(path, SIZE, cluster_size=512, preallocation="metadata")
    with opened(path, **{"refcount-cache-size": 4096}) as node:
        yield node


def slices_of(node):
    return node.refcounts.last_used() // node.refcounts._slice_entries + 1


@pytest.fixture
def looked(monkeypatch):
    """The clusters whose slices were asked for."""
    found = []
    ask = Refcounts._slice

    def noted(self, cluster):
        found.append(cluster)
        return ask(self, cluster)

    monkeypatch.setattr(Refcounts, "_slice", noted)
    return found


def test_a_search_goes_on_where_a_slice_was_missing(full, looked):
    count = slices_of(full)
    assert count > 100
    looked.clear()
    full.refcounts.hint = 0
    host, pinned = full._locked(lambda: full.refcounts.take(64))
    assert host > SIZE
    assert len(looked) < 4 * count
    assert len(pinned) < count // 4, "what is full is not kept in memory"
    full._unpin(pinned)


def test_what_a_range_misses_is_loaded_at_once(full, looked):
    count = slices_of(full)
    full.cache.drop()
    looked.clear()
    _, pinned = full._locked(lambda: full.refcounts.touch(0, SIZE))
    full._unpin(pinned)
    assert len(looked) < 3 * count


def test_a_search_for_much_loads_what_it_misses_at_once(full, looked):
    count = slices_of(full)
    host, _ = full._locked(lambda: full.refcounts.take(1))
    _, pinned = full._locked(lambda: full.refcounts.add(512, host - 512, -1))
    full._unpin(pinned)
    full.flush()
    full.metadata.clear()
    full.cache.drop()
    looked.clear()
    full.refcounts.hint = 1
    _, pinned = full._locked(lambda: full.refcounts.take(SIZE // 512))
    full._unpin(pinned)
    assert len(looked) < 16 * count


@pytest.mark.parametrize("cached", [False, True])
def test_a_search_can_be_ended(full, looked, cached):
    flag = threading.Event()
    if cached:
        _, pinned = full._locked(lambda: full.refcounts.touch(0, SIZE))
        full._unpin(pinned)
    looked.clear()
    full.refcounts.hint = 0
    flag.set()
    with pytest.raises(CancelledError), cancellable(flag):
        full._locked(lambda: full.refcounts.take(1))
    assert len(looked) < 4
    assert not full.metadata_lock.held()
    assert full.check().clean


def test_room_for_tables_can_be_refused_before_it_is_taken(full):
    flag = threading.Event()
    flag.set()
    before = full.refcounts.table[:]
    with pytest.raises(CancelledError), cancellable(flag):
        full._locked(lambda: full.refcounts.reserve(full.refcounts.last_used() + 1, 1 << 20))
    assert full.refcounts.table == before
    assert full.check().clean


def test_an_image_that_grows_has_more_memory_for_its_tables(tmp_path):
    """Else they are written out again and again: each time flushes the file."""
    path, flushes = tmp_path / "small.qcow2", []
    create(path, MIB, cluster_size=512)
    with opened(path) as node:
        flush = node.file.node.flush
        node.file.node.flush = lambda: flushes.append(1) or flush()
        node.truncate(64 * MIB, preallocation="metadata")
        del node.file.node.flush
        grown = node.cache.capacity_bytes
    assert len(flushes) < 40
    with opened(path) as node:
        assert grown == node.cache.capacity_bytes


class After:
    """A wish for the end that comes once it was asked about `times` times."""

    def __init__(self, times):
        self.left = times

    def is_set(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("mode", ["metadata", "falloc"])
def test_an_end_while_space_is_reserved_waits_for_no_table(tmp_path, mode):
    """To write those that are in memory takes seconds, for a file that goes."""
    path = tmp_path / "ended.qcow2"
    with pytest.raises(CancelledError), cancellable(After(100)):
        create(path, SIZE, cluster_size=512, preallocation=mode)
    with opened(path, checks=True) as node:
        found = node.check()
        assert not found.corruptions
        assert found.allocated_clusters == 0
