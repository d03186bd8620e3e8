"""A node as a file of the standard library."""

from __future__ import annotations

import io
import os

from diskwright.errors import DiskwrightError, UnsupportedError, errno_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from diskwright.block.node import Node


class _AsOSError:
    """Turns what a node raises into what callers of files expect."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UnsupportedError):
            raise io.UnsupportedOperation(str(error)) from error
        if isinstance(error, DiskwrightError):
            raise OSError(errno_of(error), str(error)) from error


class NodeFile(io.RawIOBase):
    """A seekable file over a node; one position, so one thread at a time.

    Its errors are those of files: OSError with the number and the sentence of the node's error,
    which is its `__cause__`, and ValueError for a file that was closed.
    """

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
        self._require_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; beyond the end is allowed."""
        self._require_open()
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            raise ValueError(f"cannot seek from {whence!r}")
        base = (0, self._position, self._node.size)[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read up to the node's end; returns the number of bytes."""
        self._require_open()
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self._node.size - self._position), 0)
        if count:
            with _AsOSError():
                self._node.read_into(self._position, view[:count])
            self._position += count
        return count

    def write(self, data: Any) -> int:
        """Write up to the node's end; returns the number of bytes."""
        self._require_open()
        if self._node.read_only:
            raise io.UnsupportedOperation("the node was opened read-only")
        view = memoryview(data).cast("B")
        count = max(min(len(view), self._node.size - self._position), 0)
        if len(view) and not count:
            raise OSError(28, "the node has no more room")
        if count:
            with _AsOSError():
                self._node.write(self._position, view[:count])
            self._position += count
        return count

    def truncate(self, size: int | None = None) -> int:
        """Resize the node."""
        self._require_open()
        wanted = self._position if size is None else size
        if wanted < 0:
            raise ValueError(f"a file cannot have {wanted} bytes")
        if self._node.read_only:
            raise io.UnsupportedOperation("the node was opened read-only")
        with _AsOSError():
            self._node.truncate(wanted)
        return wanted

    def flush(self) -> None:
        """Make what was written durable."""
        if not self.closed and not self._node.closed and not self._node.read_only:
            with _AsOSError():
                self._node.flush()

    def _require_open(self) -> None:
        if self.closed or self._node.closed:
            raise ValueError("I/O operation on a closed file")
