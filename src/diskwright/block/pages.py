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
from diskwright.block.record import Record

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


class Way(Record):
    """The way around a node's operations that there is at this moment; good until the gate is left.

    Attributes:
        descriptor: of the file that has the node's bytes, for reading.
        write_descriptor: the same for writing in place, or -1.
        base: what is added to what `locate` answers.
        lender: the node of that file.
    """

    __slots__ = ("base", "descriptor", "lender", "write_descriptor")

    def __init__(self, node: Node) -> None:
        self.descriptor = node._fd
        self.write_descriptor = node._write_fd
        self.base = node._base
        self.lender = node._lender

    def pages(self) -> Pages:
        """The pages of the file."""
        lender = self.lender
        if lender.pages is None:
            lender.pages = Pages()
        return lender.pages


def way_around(node: Node) -> Way | None:
    """The way around `node`, if there is one and it is not closed off; inside its gate only."""
    return Way(node) if node._fd >= 0 and around.is_open else None


def read_ahead(node: Node, offset: int, length: int) -> None:
    """Begin to bring to memory what of the range lies in files; waits for nothing."""
    if not hasattr(os, "posix_fadvise"):
        return
    for extent in node.resolve(offset, length):
        spot = around.spot_of(extent.child, extent.host_offset or 0)
        if extent.kind == DATA and spot is not None:
            os.posix_fadvise(spot.descriptor, spot.offset, extent.length, os.POSIX_FADV_WILLNEED)
