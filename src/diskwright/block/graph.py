"""The graph of nodes: which nodes belong together, and that their permissions agree.

Every connected set of nodes shares one `Graph`, and with it one gate (`inflight.Gate`).
Invariant: for each node and each pair of its parents' edges, what one uses the other shares.
"""

from __future__ import annotations

import itertools

from diskwright.block.inflight import Gate
from diskwright.block.permission import ALL, WRITE, WRITE_UNCHANGED, describe
from diskwright.errors import PermissionConflict, ReadOnlyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskwright.block.child import Child
    from diskwright.block.node import Node

_numbers = itertools.count(1)


class _Exclusive:
    """What `with graph.exclusive():` holds."""

    __slots__ = ("_gate",)

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        while not self._gate.close():
            assert self._gate.merged is not None
            self._gate = self._gate.merged

    def __exit__(self, *_: object) -> None:
        self._gate.open()


class Graph(Gate):
    """A connected set of nodes and the gate that their outside users pass."""

    __slots__ = ("names", "nodes", "number")

    def __init__(self) -> None:
        super().__init__()
        self.number = next(_numbers)
        self.nodes: list[Node] = []
        self.names = itertools.count(1)

    def exclusive(self) -> _Exclusive:
        """Drain: wait until all requests are out, and keep others out meanwhile.

        The owner uses child calls and hooks only. Entering it inside a request is an error.
        """
        return _Exclusive(self)

    def current(self) -> Graph:
        """The graph that this one has become a part of, or itself."""
        graph = self
        while isinstance(graph.merged, Graph):
            graph = graph.merged
        return graph

    def join(self, other: Graph) -> None:
        """Make one graph of two, because an edge is about to connect them."""
        while not self._try_join(other):
            pass  # one of the two was joined with a third meanwhile

    def _try_join(self, other: Graph) -> bool:
        pair = (self.current(), other.current())
        first, second = sorted(pair, key=lambda graph: graph.number)
        if first is second:
            return True
        if not first.close():
            return False
        try:
            if not second.close():
                return False
            for node in second.nodes:
                node.graph = first
            first.nodes.extend(second.nodes)
            second.nodes = []
            first.take_over(second)
        finally:
            first.open()
        return True


def sums(edges: Iterable[Child]) -> tuple[int, int]:
    """What all edges use together, and what all of them share."""
    used, shared = 0, ALL
    for edge in edges:
        used |= edge.used
        shared &= edge.shared
    return used, shared


def attach(parent: Node, name: str, node: Node, role: int) -> Child:
    """Make `node` the child of `parent` under `name`, with the permissions of its role.

    Raises: as `refresh_permissions`; the edge is gone then.
    """
    from diskwright.block.child import Child

    edge = Child(parent, name, node, role)
    parent.graph.join(node.graph)
    edge.used, edge.shared = parent._child_permissions(edge, *sums(parent.parents))
    node.parents.append(edge)
    try:
        refresh_permissions(node)
    except BaseException:
        node.parents.remove(edge)
        raise
    parent.children[name] = edge
    return edge


def _check(node: Node) -> None:
    if node.read_only and sums(node.parents)[0] & (WRITE | WRITE_UNCHANGED):
        raise ReadOnlyError(
            f"{node.describe()} was opened for reading only",
            qemu="Block node is read-only",
            node=node.node_name,
            hint="leave out the option that says so, or open all of the image for reading only",
        )
    for edge in node.parents:
        for other in node.parents:
            conflict = edge.used & ~other.shared
            if other is not edge and conflict:
                raise PermissionConflict(
                    f"Conflicts with use by {other.user_text()}, "
                    f"which does not allow '{describe(conflict)}' on {node.node_name}",
                    node=node.node_name,
                    hint=f"close the other user of {node.filename or node.node_name} first",
                )


def refresh_permissions(node: Node) -> None:
    """Carry the sums at `node` down to the bottom; all or nothing.

    Raises:
        PermissionConflict: two users in this process want what the other does not share.
        ReadOnlyError: somebody wants to write to what was opened for reading only.
        LockError: another process does.
    """
    before: list[tuple[Child, int, int]] = []
    try:
        _apply(node, before)
    except BaseException:
        for edge, used, shared in reversed(before):
            edge.used, edge.shared = used, shared
        for edge, _, _ in before:
            bottom = edge.node
            bottom._permissions_changed(*sums(bottom.parents))
        raise


def _apply(node: Node, before: list[tuple[Child, int, int]]) -> None:
    _check(node)
    used, shared = sums(node.parents)
    for child in node.children.values():
        wanted = node._child_permissions(child, used, shared)
        if wanted == (child.used, child.shared):
            continue
        before.append((child, child.used, child.shared))
        child.used, child.shared = wanted
        _apply(child.node, before)
    node._permissions_changed(used, shared)
