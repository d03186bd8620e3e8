"""Reopening: a node becomes writable or read-only, or gets another cache mode, while it is open.

Invariants (tests/unit/test_reopen.py):

1. The caller has the graph to itself, and nothing is dirty: a writable node has written all
   that marks a clean end, and its next write is a first one again.
2. Whatever can fail is tried before anything changes; a refusal leaves the node as it was.
3. Locks are taken for the new use before those of the old one are given up.
"""

from __future__ import annotations

from diskwright.block.graph import refresh_permissions
from diskwright.block.permission import ALL, CONSISTENT_READ, RESIZE, WRITE, Role
from diskwright.block.record import Record
from diskwright.errors import BrokenNodeError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.node import Node

    #: told whether the reopening came about, it takes over what was prepared, or drops it
    Finish = Callable[[bool], None]


class Reopening(Record):
    """What a node and its storage are to become; None: as it is."""

    __slots__ = ("direct", "no_flush", "read_only", "write_through")

    def __init__(
        self,
        *,
        read_only: bool | None = None,
        direct: bool | None = None,
        no_flush: bool | None = None,
        write_through: bool | None = None,
    ) -> None:
        self.read_only = read_only
        self.direct = direct
        self.no_flush = no_flush
        self.write_through = write_through

    @classmethod
    def to(cls, *, read_only: bool | None, cache: str | None) -> Reopening:
        """From the words that `open` takes.

        Raises:
            OptionError: there is no such cache mode.
        """
        if cache is None:
            return cls(read_only=read_only)
        from diskwright.block.opener import cache_flags

        direct, no_flush, write_through = cache_flags(cache)
        return cls(
            read_only=read_only, direct=direct, no_flush=no_flush, write_through=write_through
        )


def reopen(node: Node, wanted: Reopening, options: dict[str, object]) -> None:
    """Change how `node` and what it is stored in are open; see `Node.reopen`."""
    if any(edge.parent is not None for edge in node.parents):
        raise UnsupportedError(
            f"{node.describe()} is used by another node; reopen that one", node=node.node_name
        )
    if node.broken is not None:
        raise BrokenNodeError(
            f"{node.describe()} is broken since: {node.broken}",
            node=node.node_name,
            hint="close it and open it again; what was flushed before is safe",
        )
    affected = storage_of(node)
    node.settle()
    prepared: list[Finish] = []
    before = [(one, one.read_only) for one in affected]
    edges = [(edge, edge.used, edge.shared) for edge in node.parents]
    try:
        for one in affected:
            if not one.read_only:
                one._finish()
                one.flush_inside()
        prepared.append(node._prepare_options(options))
        prepared += [one._prepare_reopen(wanted) for one in reversed(affected)]
        _change_use(node, affected, wanted)
    except BaseException:
        for one, read_only in before:
            one.read_only = read_only
        for edge, used, shared in edges:
            edge.used, edge.shared = used, shared
        for finish in reversed(prepared):
            finish(False)
        raise
    for finish in prepared:
        finish(True)
    if wanted.write_through is not None:
        node.write_through = wanted.write_through
    for one in reversed(affected):
        one._reopened()
    for one in node.graph.nodes:
        one._attach_lent()


def storage_of(node: Node) -> list[Node]:
    """The node and all that holds its bytes, from the top down; backing files are others."""
    found = [node]
    for child in node.children.values():
        if child.role != Role.BACKING:
            found += storage_of(child.node)
    return found


def _change_use(node: Node, affected: list[Node], wanted: Reopening) -> None:
    """Have the users from outside use the node as wanted, down to the locks."""
    if wanted.read_only is None:
        return
    for one in affected:
        one.read_only = wanted.read_only
    for edge in node.parents:
        if wanted.read_only:
            edge.used, edge.shared = edge.used & ~(WRITE | RESIZE), ALL
        else:
            edge.used, edge.shared = edge.used | WRITE | RESIZE, CONSISTENT_READ
    refresh_permissions(node)
