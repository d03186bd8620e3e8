"""Reopening: a node becomes writable or read-only, or gets another cache mode, while it is open.

Backing files are open read-only; the one that a commit writes to is reopened for that time.

Invariants (tests/unit/test_reopen.py):

1. The caller has the graph to itself, and nothing is dirty: a writable node has written all
   that marks a clean end, and its next write is a first one again.
2. Whatever can fail is tried before anything changes; a refusal leaves the node as it was.
3. Locks are taken for the new use before those of the old one are given up.
"""

from __future__ import annotations

import errno

from diskwright.block.graph import refresh_permissions, sums
from diskwright.block.permission import ALL, RESIZE, WRITE, Role
from diskwright.block.record import Record
from diskwright.errors import (
    BrokenNodeError,
    DiskwrightError,
    NotFoundError,
    OptionError,
    UnsupportedError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.node import Node

    #: told whether the reopening came about, it takes over what was prepared, or drops it
    Finish = Callable[[bool], None]


#: options that name another node
_CHILDREN = ("backing", "data-file", "file")


class Reopening(Record):
    """What a node and its storage are to become; None: as it is."""

    __slots__ = (
        "can_unmap",
        "detect_zeroes",
        "direct",
        "no_flush",
        "read_only",
        "share_writes",
        "write_through",
    )

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
        self.can_unmap: bool | None = None
        self.detect_zeroes: str | None = None
        self.share_writes = False

    def take(self, options: dict[str, object], *, unmaps: bool) -> None:
        """Take the options that every node has out of `options`.

        Args:
            options: by name.
            unmaps: whether discards are passed on as yet.

        Raises:
            OptionError: a value is none.
        """
        from diskwright.block.common_options import (
            DISCARD_MODES,
            option_flag,
            zero_detection,
        )

        if "cache.direct" in options:
            self.direct = option_flag(options.pop("cache.direct"), "cache.direct")
        if "cache.no-flush" in options:
            self.no_flush = option_flag(options.pop("cache.no-flush"), "cache.no-flush")
        if "auto-read-only" in options:  # about storage that opens as it can: files do not
            option_flag(options.pop("auto-read-only"), "auto-read-only")
        discard = options.pop("discard", None)
        if discard is not None:
            if discard not in DISCARD_MODES:
                raise OptionError("Invalid discard option", field="discard")
            self.can_unmap = DISCARD_MODES[str(discard)]
        if "detect-zeroes" in options:
            unmaps = unmaps if self.can_unmap is None else self.can_unmap
            self.detect_zeroes = zero_detection(options.pop("detect-zeroes"), unmaps)

    def over(self, general: Reopening) -> Reopening:
        """What a child is to become where its user is to become as `general` says."""
        made = Reopening(
            read_only=general.read_only,
            direct=general.direct if self.direct is None else self.direct,
            no_flush=general.no_flush if self.no_flush is None else self.no_flush,
            write_through=general.write_through,
        )
        made.share_writes = general.share_writes
        return made

    def settle(self, node: Node) -> None:
        """Take over what no driver has to prepare."""
        if self.write_through is not None:
            node.write_through = self.write_through
        if self.can_unmap is not None:
            node.can_unmap = self.can_unmap
        if self.detect_zeroes is not None:
            node.detect_zeroes = self.detect_zeroes

    @classmethod
    def to(cls, *, read_only: bool | None, cache: str | None) -> Reopening:
        """From the words that `open` takes.

        Raises:
            OptionError: there is no such cache mode.
        """
        if cache is None:
            return cls(read_only=read_only)
        from diskwright.block.common_options import cache_flags

        direct, no_flush, write_through = cache_flags(cache)
        return cls(
            read_only=read_only, direct=direct, no_flush=no_flush, write_through=write_through
        )


def reopen_with(node: Node, wanted: Reopening, options: dict[str, object]) -> None:
    """As `Node.reopen`, with options of the driver, or common ones, by their own names."""
    given = dict(options)
    wanted.take(given, unmaps=node.can_unmap)
    with node.graph.exclusive():
        node._check_open()
        reopen(node, wanted, given)


def reopen(node: Node, wanted: Reopening, options: dict[str, object]) -> None:
    """Change how `node` and what it is stored in are open; see `Node.reopen`."""
    if any(edge.parent is not None for edge in node.parents):
        raise UnsupportedError(
            f"{node.describe()} is used by another node; reopen that one", node=node.node_name
        )

    def use() -> None:
        if wanted.read_only is None:
            return
        for edge in node.parents:
            if wanted.read_only:
                edge.used, edge.shared = edge.used & ~(WRITE | RESIZE), ALL
            else:
                shared = edge.shared if wanted.share_writes else ALL & ~WRITE
                edge.used, edge.shared = edge.used | WRITE, shared

    _exchange(node, wanted, options, use)
    wanted.settle(node)
    node._attach_lent()


class CommitTarget:
    """`with CommitTarget(base, grows=…) as base:` a backing file is written to meanwhile.

    Its overlays must show the same before and after; they let it be written to. Afterwards it
    is read-only again.

    Args:
        base: a backing file of a node that is open.
        grows: it will be made longer.
    """

    def __init__(self, base: Node, *, grows: bool) -> None:
        from diskwright.block.child import Child

        self._base = base
        self._was_read_only = base.read_only
        self._user = Child(None, "commit", base, Role.FILTERED)
        self._user.used = WRITE | (RESIZE if grows else 0)
        self._user.shared = ALL & ~RESIZE

    def __enter__(self) -> Node:
        base = self._base
        with base.graph.exclusive():
            _exchange(base, Reopening(read_only=False), {}, self._begin)
        return base

    def _begin(self) -> None:
        self._base.keeps_content = True
        self._base.parents.append(self._user)
        self._ask_overlays(True)

    def _ask_overlays(self, commits: bool) -> None:
        for edge in self._base.parents:
            if edge.parent is not None:
                edge.parent.commits = commits
                edge.used, edge.shared = edge.parent._child_permissions(
                    edge, *sums(edge.parent.parents)
                )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        base = self._base
        if base.closed:
            return
        with base.graph.exclusive():
            wanted = Reopening(read_only=True) if self._was_read_only else Reopening()
            try:
                if base.broken is None:
                    _exchange(base, wanted, {}, self._end)
            except DiskwrightError:
                if kind is None:  # else what went wrong first says more
                    raise
            finally:
                if self._user in base.parents:
                    self._end()

    def _end(self) -> None:
        self._base.keeps_content = False
        self._base.parents.remove(self._user)
        self._ask_overlays(False)


class _Before:
    """How a node and its users were, to go back to."""

    def __init__(self, node: Node, affected: list[Node]) -> None:
        self._node = node
        self._read_only = [(one, one.read_only) for one in affected]
        self._parents = list(node.parents)
        self._uses = [(edge, edge.used, edge.shared) for edge in node.parents]
        self._commits = [
            (edge.parent, edge.parent.commits) for edge in node.parents if edge.parent is not None
        ]
        self._target = node.keeps_content

    def restore(self) -> None:
        for one, read_only in self._read_only:
            one.read_only = read_only
        self._node.parents[:] = self._parents
        for edge, used, shared in self._uses:
            edge.used, edge.shared = used, shared
        for parent, commits in self._commits:
            parent.commits = commits
        self._node.keeps_content = self._target


def _exchange(
    node: Node, wanted: Reopening, options: dict[str, object], use: Callable[[], None]
) -> None:
    """Prepare, have the users use the node as `use` says, down to the locks, and take over."""
    if node.broken is not None:
        raise BrokenNodeError(
            f"{node.describe()} is broken since: {node.broken}",
            node=node.node_name,
            hint="close it and open it again; what was flushed before is safe",
        )
    affected = storage_of(node)
    node.settle()
    prepared: list[Finish] = []
    changes: dict[Node, Reopening] = {}
    before = _Before(node, affected)
    try:
        for one in affected:
            if not one.read_only:
                one._finish()
                one.flush_inside()
        prepared += _prepare_options(node, options, changes)
        for one in reversed(affected):
            own = changes.get(one)
            prepared.append(one._prepare_reopen(own.over(wanted) if own else wanted))
        if wanted.read_only is not None:
            for one in affected:
                one.read_only = wanted.read_only
        use()
        refresh_permissions(node)
    except BaseException:
        before.restore()
        for finish in reversed(prepared):
            finish(False)
        raise
    for finish in prepared:
        finish(True)
    for one, change in changes.items():
        change.settle(one)
    for one in reversed(affected):
        one._reopened()
    for one in node.graph.nodes:
        one._attach_lent()


def _prepare_options(
    node: Node, options: dict[str, object], changes: dict[Node, Reopening]
) -> list[Finish]:
    """Options of the node and, with dotted names, of its children; all that is to change.

    Args:
        node: the node.
        options: by name; those that every node has were taken out for the node itself.
        changes: gets what those of its children say.
    """
    own: dict[str, object] = {}
    below: dict[str, dict[str, object]] = {}
    for name, value in options.items():
        child, dot, rest = name.partition(".")
        known = {**node.opened_options, "driver": node.driver, "node-name": node.node_name}
        if name in known and str(known[name]) == str(value):
            continue
        if not dot and name in _CHILDREN and _names_child(node, name, str(value)):
            continue
        if dot and child in node.children:
            below.setdefault(child, {})[rest] = value
        else:
            own[name] = value
    prepared = [node._prepare_options(own)]
    for child, given in below.items():
        target = node.children[child].node
        changes.setdefault(target, Reopening()).take(given, unmaps=target.can_unmap)
        prepared += _prepare_options(target, given, changes)
    return prepared


def _names_child(node: Node, name: str, wanted: str) -> bool:
    """Whether the node's child is already the one of that node name.

    Raises:
        NotFoundError: there is no such node.
    """
    named = [one for one in node.graph.nodes if one.node_name == wanted]
    if not named:
        raise NotFoundError(
            f"No node has the name '{wanted}' that '{name}' asks for",
            qemu=f"Cannot find device='' nor node-name='{wanted}'",
            errno=errno.ENOENT,
        )
    edge = node.children.get(name)
    return edge is not None and edge.node is named[0]


def storage_of(node: Node) -> list[Node]:
    """The node and all that holds its bytes, from the top down; backing files are others."""
    found = [node]
    for child in node.children.values():
        if child.role != Role.BACKING:
            found += storage_of(child.node)
    return found
