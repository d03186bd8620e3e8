"""A file's pages as a buffer, for system calls alone: what is sent from it passes no user space.

Nothing here or above may look into the buffer: where the file has become shorter meanwhile, that
would end the process (SIGBUS). System calls answer EFAULT instead.

The file is opened once more for it: a mapping keeps a duplicate of the descriptor that it was made
of, and a duplicate keeps the locks of an image that was closed.
"""

from __future__ import annotations

import os
import sys

from diskwright.block import around
from diskwright.block.extent import DATA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node

#: Longer files are not mapped where addresses have 32 bits.
_MAX_LENGTH = 1 << 46 if sys.maxsize > 1 << 32 else 1 << 29


class Pages:
    """The pages of the file that a node's bytes lie in; renewed when the file has grown.

    Attributes:
        view: the file's bytes from its beginning, read-only; empty where there is no mapping.
    """

    __slots__ = ("_refused", "view")

    def __init__(self) -> None:
        self.view = memoryview(b"")
        self._refused = False

    def cover(self, descriptor: int, stop: int) -> bool:
        """Whether `view` reaches to `stop`, after a look at how long the file is by now.

        Args:
            descriptor: of the file; always the same one's.
            stop: in bytes.
        """
        if stop <= len(self.view):
            return True
        if self._refused:
            return False
        length = os.fstat(descriptor).st_size
        if not stop <= length <= _MAX_LENGTH or not self._map(descriptor, length):
            self._refused = length > _MAX_LENGTH
            return False
        return True

    def _map(self, descriptor: int, length: int) -> bool:
        import mmap

        try:
            again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._refused = True
            return False
        try:
            self.view = memoryview(mmap.mmap(again, length, prot=mmap.PROT_READ))
        except (OSError, ValueError):
            self._refused = True
            return False
        finally:
            os.close(again)
        return True


class Way:
    """The way around a node's operations; what it says holds until the gate is left."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def is_open(self) -> bool:
        """Whether there is one at this moment, and it is not closed off."""
        return self._node._fd >= 0 and around.is_open

    @property
    def descriptor(self) -> int:
        """Of the file that has the node's bytes, for reading."""
        return self._node._fd

    @property
    def write_descriptor(self) -> int:
        """The same for writing in place, or -1."""
        return self._node._write_fd

    @property
    def base(self) -> int:
        """What is added to what `locate` answers."""
        return self._node._base

    @property
    def lender(self) -> Node:
        """The node of that file."""
        return self._node._lender

    def pages(self) -> Pages:
        """The pages of the file."""
        lender = self._node._lender
        if lender.pages is None:
            lender.pages = Pages()
        return lender.pages


def read_ahead(node: Node, offset: int, length: int) -> None:
    """Have what of the range lies in files brought to memory, of servers to theirs.

    Files are not waited for.

    Raises:
        DiskwrightError: it cannot be told what lies where, or a server refuses.
    """
    for extent in node.resolve(offset, length):
        if extent.kind == DATA and extent.child is not None and extent.host_offset is not None:
            extent.child.node._read_ahead(extent.host_offset, extent.length)
