"""Reads of a file that is not in memory: many at once, without a thread for each.

What is in memory is read at once. For the rest the kernel is asked to bring it (it does so while
further requests come in), and when nothing more comes the oldest is waited for: the others have
arrived by then, or are about to. Worker threads would cost four times the processor time.

See docs/explanation/architecture.md, "Servers".
"""

from __future__ import annotations

import errno
import os
from collections import deque

from diskwright.block.pages import Way

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node
    from diskwright.wire.nbd.transmission import Replies

    Buffer = bytes | bytearray | memoryview
    #: cookie, offset, length
    Read = tuple[int, int, int]

#: As many reads wait for the disk at once.
MOST_WAITING = 32
#: After so many reads that were in memory the others' way is good enough again.
_ENOUGH_HITS = 256
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


class Cold:
    """The reads of one connection that wait for the disk.

    Attributes:
        is_on: the file seems not to be in memory.
        waiting: reads that the kernel was asked for, oldest first.
    """

    def __init__(self, node: Node, replies: Replies) -> None:
        self._node = node
        self._way = Way(node)
        self._replies = replies
        self._hits = 0
        self._works = bool(_NOWAIT) and hasattr(os, "posix_fadvise")
        self.is_on = False
        self.waiting: deque[Read] = deque()

    def begin(self) -> None:
        """A read took so long that the file cannot be in memory."""
        self.is_on = self._works
        self._hits = 0

    def take(self, read: Read, host: int, out: list[Buffer]) -> None:
        """Read at once, or let it wait; inside the gate.

        Args:
            read: what is asked for.
            host: where it lies in the file.
            out: where the reply goes.
        """
        data = bytearray(read[2])
        if self._now(data, host):
            self._hits += 1
            if self._hits >= _ENOUGH_HITS and not self.waiting:
                self.is_on = False
            out += [self._replies.data(*read), data]
            return
        self._hits = 0
        os.posix_fadvise(self._way.descriptor, host, read[2], os.POSIX_FADV_WILLNEED)
        self.waiting.append(read)

    def _now(self, data: bytearray, host: int) -> bool:
        """Whether `data` could be filled without waiting."""
        try:
            return os.preadv(self._way.descriptor, [data], host, _NOWAIT) == len(data)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                self._works = self.is_on = False  # the file system does not tell
            return False

    def finish(self, out: list[Buffer]) -> Read | None:
        """Wait for the oldest, and take those after it that have come too.

        Returns:
            A read that is to be done by the node itself, or None.
        """
        node, way = self._node, self._way
        is_first = True
        with node.graph.request():
            while self.waiting:
                cookie, offset, length = self.waiting[0]
                there = way.is_open and offset + length <= node.size
                host = node.locate(offset, length) if there else -1
                if host < 0:  # it lies elsewhere by now
                    return self.waiting.popleft()
                data = bytearray(length)
                if is_first:
                    if not _all(way.descriptor, data, host + way.base):
                        return self.waiting.popleft()
                elif not self._now(data, host + way.base):
                    break
                is_first = False
                self.waiting.popleft()
                out += [self._replies.data(cookie, offset, length), data]
        return None


def _all(descriptor: int, data: bytearray, host: int) -> bool:
    try:
        return os.preadv(descriptor, [data], host) == len(data)
    except OSError:
        return False  # the node says what is wrong
