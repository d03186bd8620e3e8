"""A client's socket: bytes in, bytes out, with limits to how long a call may wait.

Reading waits for `LINGER` at most, so that a client that asks for one thing after another keeps its
thread and an idle one gives it back. `socket.settimeout` would cost a system call more each time.
"""

from __future__ import annotations

import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from diskwright.exports.nbd.secure import SecureChannel

    Buffer = bytes | bytearray | memoryview
    #: what sessions talk through
    AnyChannel: TypeAlias = "Channel | SecureChannel"

#: For how long a call on the socket waits, in microseconds.
LINGER = 2000
#: What the kernel may hold of output, where it lets us say so.
_SEND_BUFFER = 1 << 20
NOW = getattr(socket, "MSG_DONTWAIT", 0)


class Channel:
    """A connection without encryption.

    Args:
        sock: connected; it belongs to the channel from now on.
    """

    #: parts of a mapping may be sent: only system calls see them
    takes_pages = True

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(True)
        limit = struct.pack("@ll", 0, LINGER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        if sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def receive_into(self, view: memoryview, flags: int = 0) -> int:
        """Receive what there is; 0 is the end.

        Raises:
            BlockingIOError: there is nothing.
        """
        return self._sock.recv_into(view, 0, flags)

    def send(self, buffers: Sequence[Buffer], flags: int = 0) -> int:
        """Send; how many bytes were taken.

        Raises:
            BlockingIOError: none.
        """
        return self._sock.sendmsg(buffers, (), flags)

    @property
    def holds_output(self) -> bool:
        """Whether something that was taken has not gone to the socket."""
        return False

    def push(self, flags: int = 0) -> bool:
        """Bring what was taken to the socket; whether all of it went."""
        return True

    def end_input(self) -> None:
        """Take nothing more; what was received can be read still."""
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # the client was quicker

    def interrupt(self) -> None:
        """End the connection; whoever waits for it is woken, and the descriptor stays taken."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client was quicker

    def close(self) -> None:
        """Give the descriptor back."""
        self._sock.close()
