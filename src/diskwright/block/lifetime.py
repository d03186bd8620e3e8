"""How a node comes into use and ends: users from outside, closing, and what a fork leaves.

Invariants (tests/contract/test_close.py):

1. Closing flushes and finishes first, then closes what only this node uses; whatever fails on
   the way is raised at the end, with all closed nevertheless.
2. A node that is dropped and not closed is as after a crash: what it had in memory is lost,
   its descriptors and locks are given back.
3. In a forked child every open writable node is as closed: the parent goes on with it, so
   what the child remembers of it is soon wrong. Read-only nodes stay usable.
"""

from __future__ import annotations

import os
from _weakref import ref

from diskwright.block.graph import refresh_permissions
from diskwright.block.permission import ALL
from diskwright.errors import DiskwrightError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from diskwright.block.child import Child
    from diskwright.block.graph import Graph
    from diskwright.block.node import Node
    from diskwright.block.pages import Pages

_open_nodes: dict[int, ref[Lifetime]] = {}


class Lifetime:
    """Mixed into Node, which has the attributes declared here."""

    graph: Graph
    children: dict[str, Child]
    parents: list[Child]
    read_only: bool
    broken: str | None
    closed: bool = True  # until it is born
    pages: Pages | None = None  # of a file that somebody sends from
    _fd: int
    _write_fd: int
    driver: str
    node_name: str
    filename: str
    size: int

    if TYPE_CHECKING:

        def flush_inside(self) -> None:
            """See Node."""

        def _finish(self) -> None: ...
        def _close(self) -> None: ...
        def _after_fork(self) -> None: ...

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.size} bytes"
        return f"<{self.driver or type(self).__name__} {self.node_name} {self.filename!r} {state}>"

    def _born(self) -> None:
        _open_nodes[id(self)] = ref(self)

    def acquire(self, user: str, used: int, shared: int = ALL) -> Child:
        """Become a user from outside: take permissions, down to the locks on the files.

        Raises:
            PermissionConflict, LockError: somebody else's use conflicts.
        """
        from diskwright.block.child import Child

        node = _node(self)
        edge = Child(None, user, node, 0)
        edge.used, edge.shared = used, shared
        self.parents.append(edge)
        try:
            refresh_permissions(node)
        except BaseException:
            self.parents.remove(edge)
            raise
        return edge

    def release_user(self, edge: Child) -> None:
        """End what `acquire` began."""
        self.parents.remove(edge)
        if not self.closed and self.parents:
            refresh_permissions(_node(self))

    def close(self) -> None:
        """Flush, finish and close the node and what only it uses; again is no error.

        Raises:
            IOFailure: something could not be made durable; all is closed nevertheless.
        """
        if self.closed:
            return
        with self.graph.exclusive():
            self._close_inside()

    @property
    def has_unflushed(self) -> bool:
        """Whether a flush could have something to do, here or below."""
        here = _node(self).unflushed
        return here or any(child.node.has_unflushed for child in self.children.values())

    def _close_inside(self) -> None:
        if self.closed:
            return
        problem: BaseException | None = None
        try:
            if not self.read_only and self.broken is None:
                self._finish()
                if self.has_unflushed:
                    self.flush_inside()
        except Exception as error:  # a fault of a driver must not keep files and locks open
            problem = error
        self.closed = True
        self._fd = self._write_fd = -1
        self.pages = None
        _open_nodes.pop(id(self), None)
        for child in list(self.children.values()):
            child.node.parents.remove(child)
            if not child.node.parents:
                try:
                    child.node._close_inside()
                except (DiskwrightError, OSError) as error:
                    if self.broken is None:  # else that was told already
                        problem = problem or error
        try:
            self._close()
        finally:
            if self in self.graph.nodes:
                self.graph.nodes.remove(_node(self))
        if problem is not None:
            raise problem

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as closing:  # of whatever kind, it must not hide what came first
            if error is None:
                raise
            error.add_note(f"closing it failed too: {closing}")

    def _dropped(self) -> None:
        """Hook: give back to the system what it lent; nothing is written, no lock is waited for."""

    def __del__(self) -> None:
        """Warn of a node that was opened for a user and that nobody can close any more.

        It is not closed here: that waits for locks, and this may run amid anything. What the
        system lent it goes back, and with that the locks on its files.
        """
        if self.closed:
            return
        self.closed = True  # for whoever gets hold of it by the warning
        self._fd = self._write_fd = -1
        self._dropped()
        if self.broken is not None:
            return
        if any(edge.parent is None for edge in self.parents):
            try:
                from warnings import warn
            except ImportError:  # the interpreter is being taken apart: nobody would hear it
                return
            text = f"{_node(self).describe()} was not closed: what it kept in memory is lost"
            warn(text, ResourceWarning, stacklevel=2, source=self)


def _node(part: Lifetime) -> Node:
    """The node that `part` is a part of."""
    return part  # type: ignore[return-value]  # Node is the only subclass


def _forked() -> None:
    """In a forked child every open writable node is dead; see invariant 3."""
    for weak in list(_open_nodes.values()):
        node = weak()
        if node is None:
            continue
        node.graph.after_fork()
        node._after_fork()
        if not node.read_only:
            node.broken = "this process was forked from the one that opened it"
            node.closed = True
            node._fd = node._write_fd = -1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
