"""Permissions of the edges of a graph: summed, refused with both names, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diskwright.block.child import Child
from diskwright.block.graph import Graph, attach, refresh_permissions, sums
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_node
from diskwright.block.permission import (
    ALL,
    CONSISTENT_READ,
    RESIZE,
    WRITE,
    WRITE_UNCHANGED,
    Role,
    default_permissions,
    describe,
)
from diskwright.errors import LockError, PermissionConflict


class Plain(Node):
    """A node that notes what its file would be locked with."""

    driver = "plain"

    def __init__(self, graph: Graph, name: str) -> None:
        super().__init__(graph, name)
        graph.nodes.append(self)
        self.read_only = False
        self.told: list[tuple[int, int]] = []
        self.refuses = False

    def _permissions_changed(self, used: int, shared: int) -> None:
        if self.refuses:
            raise LockError("somebody else has it")
        self.told.append((used, shared))


@pytest.fixture
def stack() -> Iterator[tuple[Plain, Plain, Plain]]:
    """top -> middle -> bottom, as a format over a filter over a file."""
    graph = Graph()
    top, middle, bottom = (Plain(graph, name) for name in ("top", "middle", "bottom"))
    attach(middle, "file", bottom, Role.FILTERED)
    attach(top, "file", middle, Role.STORAGE)
    yield top, middle, bottom
    top.close()


def test_sums():
    one, two = Child(None, "one", None, 0), Child(None, "two", None, 0)  # type: ignore[arg-type]
    one.used, one.shared = CONSISTENT_READ, ALL & ~RESIZE
    two.used, two.shared = WRITE, ALL & ~WRITE
    assert sums([one, two]) == (CONSISTENT_READ | WRITE, ALL & ~(WRITE | RESIZE))
    assert sums([]) == (0, ALL)


def test_what_a_user_takes_reaches_the_bottom(stack):
    top, _, bottom = stack
    user = top.acquire("user", CONSISTENT_READ | WRITE, CONSISTENT_READ)
    used, shared = bottom.told[-1]
    assert used == CONSISTENT_READ | WRITE | RESIZE
    assert not shared & (WRITE | RESIZE)
    top.release_user(user)


def test_a_conflict_names_both(stack):
    top = stack[0]
    top.acquire("first", CONSISTENT_READ, CONSISTENT_READ)
    with pytest.raises(PermissionConflict) as caught:
        top.acquire("second", WRITE, ALL)
    assert "'first'" in str(caught.value)
    assert "'write'" in str(caught.value)
    assert caught.value.node == "top"
    assert [edge.name for edge in top.parents] == ["first"]


def test_a_refusal_at_the_bottom_changes_nothing():
    graph = Graph()
    top, middle, bottom = (Plain(graph, name) for name in ("top", "middle", "bottom"))
    attach(middle, "file", bottom, Role.FILTERED)
    attach(top, "file", middle, Role.FILTERED)
    before = [(edge.used, edge.shared) for edge in (*middle.parents, *bottom.parents)]
    bottom.refuses = True
    with pytest.raises(LockError):
        _acquire_leniently(top, bottom)
    assert not top.parents
    assert [(edge.used, edge.shared) for edge in (*middle.parents, *bottom.parents)] == before


def _acquire_leniently(top: Plain, bottom: Plain) -> None:
    """The bottom refuses the first time only: going back must work."""
    told = bottom._permissions_changed

    def once(used: int, shared: int) -> None:
        bottom.refuses, refuses = False, bottom.refuses
        if refuses:
            raise LockError("somebody else has it")
        told(used, shared)

    bottom._permissions_changed = once  # type: ignore[method-assign]
    top.acquire("user", CONSISTENT_READ | WRITE, CONSISTENT_READ)


def test_a_refused_edge_is_gone(stack):
    top = stack[0]
    other = Plain(Graph(), "other")
    other.acquire("owner", WRITE, CONSISTENT_READ | WRITE)
    other.read_only = False
    parents = list(other.parents)
    with pytest.raises(PermissionConflict):
        attach(top, "data", other, Role.STORAGE)
    assert other.parents == parents
    assert "data" not in top.children
    other.close()


def test_attaching_joins_the_graphs():
    one, two = Plain(Graph(), "one"), Plain(Graph(), "two")
    attach(one, "file", two, Role.FILTERED)
    assert one.graph is two.graph
    assert set(one.graph.nodes) == {one, two}


def test_roles():
    """What each kind of edge asks of its node and leaves to others."""
    both = CONSISTENT_READ | WRITE
    assert default_permissions(Role.FILTERED, both, ALL, read_only=False) == (both, ALL)
    used, shared = default_permissions(Role.BACKING, both, CONSISTENT_READ, read_only=False)
    assert used == CONSISTENT_READ
    assert shared == CONSISTENT_READ | WRITE_UNCHANGED
    used, shared = default_permissions(Role.STORAGE, both, ALL, read_only=False)
    assert used == CONSISTENT_READ | WRITE | RESIZE
    assert not shared & (WRITE | RESIZE)
    used, shared = default_permissions(Role.STORAGE, CONSISTENT_READ, ALL, read_only=True)
    assert used == CONSISTENT_READ
    assert not shared & (WRITE | RESIZE)
    _, shared = default_permissions(
        Role.BACKING, both, CONSISTENT_READ, read_only=False, commits=True
    )
    assert shared & WRITE


def test_permissions_have_qemus_names():
    assert describe(CONSISTENT_READ | WRITE | WRITE_UNCHANGED | RESIZE) == (
        "consistent read, write, write unchanged, resize"
    )


def test_refreshing_is_idempotent(stack):
    top, _, bottom = stack
    top.acquire("user", CONSISTENT_READ, ALL)
    last = bottom.told[-1]
    refresh_permissions(top)
    assert bottom.told[-1] == last


def test_a_closed_node_leaves_its_graph(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    node = open_node(Opener(), {"driver": "raw", "file": {"filename": str(path)}})
    graph = node.graph
    assert len(graph.nodes) == 2
    node.close()
    assert not graph.nodes
