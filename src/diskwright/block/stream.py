"""A node as a file of the standard library."""

from __future__ import annotations

import io
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from diskwright.block.node import Node


class NodeFile(io.RawIOBase):
    """A seekable file over a node; one position, so one thread at a time."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """Whether the node is."""
        return not self._node.read_only

    def tell(self) -> int:
        """The position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; beyond the end is allowed."""
        base = (0, self._position, self._node.size)[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read up to the node's end; returns the number of bytes."""
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self._node.size - self._position), 0)
        if count:
            self._node.read_into(self._position, view[:count])
            self._position += count
        return count

    def write(self, data: Any) -> int:
        """Write up to the node's end; returns the number of bytes."""
        if self._node.read_only:
            raise io.UnsupportedOperation("the node was opened read-only")
        view = memoryview(data).cast("B")
        count = max(min(len(view), self._node.size - self._position), 0)
        if len(view) and not count:
            raise OSError(28, "the node has no more room")
        if count:
            self._node.write(self._position, view[:count])
            self._position += count
        return count

    def truncate(self, size: int | None = None) -> int:
        """Resize the node."""
        wanted = self._position if size is None else size
        self._node.truncate(wanted)
        return wanted

    def flush(self) -> None:
        """Make what was written durable."""
        if not self.closed and not self._node.closed and not self._node.read_only:
            self._node.flush()
