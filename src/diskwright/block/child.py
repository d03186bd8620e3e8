"""An edge of the graph: what a parent holds of another node.

A child has the data operations of a node without the gate: whoever holds one is inside
already. Drivers hold children only.
"""

from __future__ import annotations

from diskwright.block import requests
from diskwright.block.permission import ALL
from diskwright.errors import ReadOnlyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.block.extent import Extent
    from diskwright.block.node import Node


class Child:
    """`parent` uses `node` under `name`; `used` and `shared` are permissions.

    The edge of a user outside of the graph (a caller of the library, an export) has no parent.
    """

    __slots__ = ("name", "node", "parent", "role", "shared", "used")

    def __init__(self, parent: Node | None, name: str, node: Node, role: int) -> None:
        self.parent = parent
        self.name = name
        self.node = node
        self.role = role
        self.used = 0
        self.shared = ALL

    @property
    def size(self) -> int:
        """Bytes in the node."""
        return self.node.size

    def user_text(self) -> str:
        """Who uses the node, for error lines."""
        if self.parent is None:
            return f"user '{self.name}'"
        return f"node '{self.parent.node_name}' as '{self.name}'"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; what lies beyond the node's end reads as zero."""
        requests.read_padded(self.node, offset, buffer)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset + length), zeroes beyond the node's end."""
        buffer = bytearray(length)
        requests.read_padded(self.node, offset, memoryview(buffer))
        return bytes(buffer)

    def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """Write; past the end the node grows, if this edge may resize it."""
        node = self.node
        if node.read_only:
            raise ReadOnlyError(f"{node.describe()} is read-only", node=node.node_name)
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        if offset + len(view) > node.size:
            requests.grow_for(self, offset, offset + len(view))
        requests.write_checked(node, offset, view, fua)

    def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        unmap: bool = False,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        """Make the range read as zero; see `Node.write_zeroes`."""
        if offset + length > self.node.size:
            requests.grow_for(self, offset, offset + length)
        requests.zero_checked(self.node, offset, length, requests.zero_flags(unmap, fast, fua))

    def discard(self, offset: int, length: int) -> None:
        """Say that the range's content is not needed any more."""
        stop = min(offset + length, self.node.size)
        if stop > offset:
            requests.discard_checked(self.node, offset, stop - offset)

    def flush(self) -> None:
        """Make everything written so far durable."""
        self.node.flush_inside()

    def extents(self, offset: int, length: int, *, depth: int | None = None) -> Iterator[Extent]:
        """The runs of the range, cut at its ends; see `Node.extents`."""
        return requests.walk_extents(self.node, offset, length, depth)

    def grow(self, size: int, preallocation: str = "off") -> None:
        """Make the node at least `size` bytes long; never shorter."""
        requests.grow(self.node, size, preallocation)

    def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Change the node's size; only for whoever has the graph to itself."""
        requests.truncate_checked(self.node, size, exact, preallocation)

    def event(self, name: str) -> None:
        """Tell a fault-injecting node below what its parent is about to do."""
        hook = self.node.event_hook
        if hook is not None:
            hook(name)
