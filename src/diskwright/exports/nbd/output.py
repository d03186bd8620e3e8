"""What goes to one client: replies leave in order, and whoever sends one does not wait for it.

Invariants (tests/unit/test_nbd_server.py):

1. What the socket does not take at once is kept, as a private copy, and goes out before anything
   else. The session reads no more requests until all of it has gone.
2. A mapping is given to system calls only: what is kept of one is read from the file.
"""

from __future__ import annotations

import errno
import os
import socket
from _thread import allocate_lock

from diskwright.errors import IOFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskwright.exports.nbd.channel import AnyChannel

    Buffer = bytes | bytearray | memoryview

_NOW = getattr(socket, "MSG_DONTWAIT", 0)
#: More buffers than this are not sent at once (IOV_MAX).
MAX_BUFFERS = 1000


class VanishedPagesError(Exception):
    """The file that a mapping is of cannot be read there; nothing was sent."""


class Output:
    """The sending side of a channel."""

    def __init__(self, channel: AnyChannel) -> None:
        self._channel = channel
        self._lock = allocate_lock()
        self._kept: list[memoryview] = []

    @property
    def waits(self) -> bool:
        """Whether something is kept that must go out first."""
        return bool(self._kept) or self._channel.holds_output

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send, or keep copies of what does not go."""
        with self._lock:
            sent = 0 if self._kept else self._now(buffers)
            if sent < sum(map(len, buffers)):
                self._keep([bytes(buffer) for buffer in buffers], sent)

    def send_pages(self, buffers: list[Buffer], hosts: Sequence[int], descriptor: int) -> None:
        """Send buffers of which each memoryview is a part of the mapping of a file.

        Args:
            buffers: headers as bytes, parts of the mapping as memoryviews.
            hosts: where in the file each of those parts begins.
            descriptor: of the file.

        Raises:
            VanishedPagesError: nothing was sent, as a part cannot be read.
            IOFailure: as before, but something was sent: the connection is of no use any more.
        """
        with self._lock:
            try:
                sent = 0 if self._kept else self._now(buffers)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    raise VanishedPagesError from error
                raise
            if sent < sum(map(len, buffers)):
                self._keep(*_private(buffers, sent, hosts, descriptor))

    def flush(self, *, wait: bool) -> bool:
        """Send what was kept; whether all of it went.

        Args:
            wait: for as long as the socket's own limit says.
        """
        with self._lock:
            while self._kept:
                try:
                    buffers = self._kept[:MAX_BUFFERS]
                    sent = self._channel.send(buffers, 0 if wait else _NOW)
                except BlockingIOError:
                    return False
                rest, self._kept = self._kept, []
                self._keep(rest, sent)
            return self._channel.push(0 if wait else _NOW)

    def _now(self, buffers: Sequence[Buffer]) -> int:
        try:
            return self._channel.send(buffers, _NOW)
        except BlockingIOError:
            return 0

    def _keep(self, buffers: Sequence[Buffer], sent: int) -> None:
        for buffer in buffers:
            if sent >= len(buffer):
                sent -= len(buffer)
                continue
            self._kept.append(memoryview(buffer)[sent:])
            sent = 0


def _private(
    buffers: Sequence[Buffer], sent: int, hosts: Sequence[int], descriptor: int
) -> tuple[list[Buffer], int]:
    """Buffers without what went wholly, their parts of the mapping read, and what went of them."""
    found: list[Buffer] = []
    places = iter(hosts)
    skip = sent
    for buffer in buffers:
        host = next(places) if isinstance(buffer, memoryview) else -1
        if not found and skip >= len(buffer):
            skip -= len(buffer)
            continue
        found.append(buffer if host < 0 else _read(descriptor, host, len(buffer), sent))
    return found, skip


def _read(descriptor: int, host: int, length: int, sent: int) -> bytes:
    try:
        data = os.pread(descriptor, length, host)
    except OSError as error:
        if sent:
            raise IOFailure(
                "A reply that was sent in part cannot be ended", errno=error.errno or errno.EIO
            ) from error
        raise VanishedPagesError from error
    return data + bytes(length - len(data))
