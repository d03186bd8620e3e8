"""A connected socket: whole buffers go out, headers and payloads come in.

Input is read ahead into a small buffer, so that a reply costs one system call; what of a payload
is not there yet goes from the socket to its place.

Calls wait for `_SLICE` at a time, for ever in all: a caller who wants the end of the operation
meanwhile does not have to wait for a server that is silent.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from diskwright.block.cancel import check_cancelled
from diskwright.block.patience import Patience
from diskwright.errors import IOFailure, from_oserror
from diskwright.wire.nbd.messages import ProtocolError
from diskwright.wire.nbd.places import check_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeVar

    from diskwright.crypto.tls_channel import Channel
    from diskwright.drivers.protocols.nbd.address import Address
    from diskwright.drivers.protocols.nbd.security import Security
    from diskwright.wire.nbd.messages import Steps

    Result = TypeVar("Result")

_AHEAD = 16384
#: For how many seconds a call on a socket waits, before it is asked whether to go on.
_SLICE = 1
#: The length of a name of a socket that is in no folder, where it is filled up.
_ABSTRACT = 108
#: TCP over several paths at once (Linux; socket.IPPROTO_MPTCP is not on all systems).
_MPTCP = 262


class EndedError(IOFailure):
    """The server has closed the connection."""


class Stream:
    """A connection to a server; one thread may send while another one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._plain = sock
        self._sock: socket.socket | Channel = sock
        self._ahead = memoryview(bytearray(_AHEAD))
        self._start = self._stop = 0
        self._patience = Patience(lambda: self.is_lone)
        self.is_lone = False  # one request is under way, and nobody has another

    @classmethod
    def connect(cls, address: Address, seconds: float | None = None) -> Stream:
        """Connect to a server.

        Args:
            address: where it is.
            seconds: for how long at most each call waits, until `be_patient`; None: for ever.

        Raises:
            IOFailure: nobody listens there.
        """
        by = _by_path if address.path is not None else _by_name
        try:
            sock = by(address, seconds)
        except (OSError, ValueError) as error:
            raise _unreachable(address, error) from error
        return cls(sock)

    def be_patient(self) -> None:
        """Wait for as long as it takes, from now on."""
        self._plain.settimeout(None)
        _wait_in_slices(self._plain)

    def send(self, *buffers: bytes | memoryview) -> None:
        """Send all of them, in order."""
        try:
            sent = self._sock.sendmsg(buffers)
        except BlockingIOError:
            sent = 0
        if sent == sum(map(len, buffers)):
            return
        for left in _rest(buffers, sent):
            while left:
                try:
                    left = left[self._sock.send(left) :]
                except BlockingIOError:
                    check_cancelled()

    def take(self, length: int) -> memoryview:
        """The next bytes, fewer than the buffer has; valid until the next call."""
        while self._stop - self._start < length:
            if self._start + length > _AHEAD or self._start == self._stop:
                held = bytes(self._ahead[self._start : self._stop])
                self._ahead[: len(held)] = held
                self._start, self._stop = 0, len(held)
            count = self._patience.receive(self._take_some, self._ahead[self._stop :])
            if not count:
                raise EndedError("The NBD server closed the connection", errno=5)
            self._stop += count
        start = self._start
        self._start += length
        return self._ahead[start : start + length]

    def _take_some(self, view: memoryview, flags: int) -> int:
        while True:
            try:
                return self._sock.recv_into(view, 0, flags)
            except BlockingIOError:
                if flags:  # it was only to look
                    raise
                check_cancelled()

    def receive_into(self, view: memoryview) -> None:
        """Fill `view`."""
        held = min(self._stop - self._start, len(view))
        if held:
            view[:held] = self._ahead[self._start : self._start + held]
            self._start += held
        while held < len(view):
            try:
                count = self._sock.recv_into(view[held:], 0, socket.MSG_WAITALL)
            except BlockingIOError:
                check_cancelled()
                continue
            if not count:
                raise EndedError("The NBD server closed the connection", errno=5)
            held += count

    def receive(self, length: int) -> bytes:
        """The next bytes, however many."""
        if length < _AHEAD:
            return bytes(self.take(length))
        buffer = bytearray(length)
        self.receive_into(memoryview(buffer))
        return bytes(buffer)

    def converse(self, steps: Steps[Result], security: Security | None = None) -> Result:
        """Do what a handshake wants; returns its result."""
        try:
            wanted = next(steps)
            while True:
                if isinstance(wanted, int):
                    wanted = steps.send(self.receive(wanted))
                    continue
                if wanted is not None:
                    self.send(wanted)
                elif security is not None:
                    self._encrypt(security)
                wanted = next(steps)
        except StopIteration as stop:
            result: Result = stop.value
            return result

    def _encrypt(self, security: Security) -> None:
        """All that follows goes through TLS."""
        from diskwright.crypto.tls_channel import Channel

        if self._start != self._stop:
            raise ProtocolError("The NBD server goes on in plain text where TLS begins")
        assert isinstance(self._sock, socket.socket)
        self._sock = Channel(
            self._sock, security.credentials, security.hostname, on_silence=check_cancelled
        )

    def close(self) -> None:
        """End the connection; whoever waits for it is woken."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the server was quicker
        self._sock.close()


def _by_path(address: Address, seconds: float | None) -> socket.socket:
    path = address.path
    assert path is not None
    if not path:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "")
    if address.switches.get("abstract"):  # a name of Linux's, which is in no folder
        path = f"\0{path}"
        if not address.switches.get("tight", True):
            path = path.ljust(_ABSTRACT, "\0")
    else:
        check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _connect(sock, path, seconds)
    except BaseException:
        sock.close()
        raise
    return sock


def _by_name(address: Address, seconds: float | None) -> socket.socket:
    """A connection to the first of a host's addresses that takes one."""
    switches = address.switches
    family = socket.AF_UNSPEC
    if switches.get("ipv4") is False or (switches.get("ipv6") and not switches.get("ipv4")):
        family = socket.AF_INET6
    elif switches.get("ipv6") is False or (switches.get("ipv4") and not switches.get("ipv6")):
        family = socket.AF_INET
    flags = socket.AI_NUMERICHOST if switches.get("numeric") else 0
    if family == socket.AF_INET6:  # which has numbers for addresses of the other kind
        flags |= getattr(socket, "AI_V4MAPPED", 0)
    found = socket.getaddrinfo(
        address.host, int(address.port), family, socket.SOCK_STREAM, flags=flags
    )
    failure: OSError | None = None
    for kind, type, protocol, _, place in found:
        protocol = _MPTCP if switches.get("mptcp") else protocol
        sock = socket.socket(kind, type, protocol)
        try:
            _connect(sock, place, seconds)
        except OSError as error:
            sock.close()
            failure = failure or error
            continue
        except BaseException:
            sock.close()
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if switches.get("keep-alive"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock
    raise failure or OSError(errno.EADDRNOTAVAIL, "")


def _connect(sock: socket.socket, place: str | tuple[object, ...], seconds: float | None) -> None:
    """Connect within so many seconds, or however long it takes.

    Raises:
        OSError: nobody is there.
        CancelledError: it was not to be waited for any longer.
    """
    if seconds is not None:
        sock.settimeout(seconds)
        sock.connect(place)
        return
    _wait_in_slices(sock)
    while True:
        try:
            sock.connect(place)
        except BlockingIOError:
            check_cancelled()
        except OSError as error:
            if error.errno != errno.EISCONN:
                raise
            return
        else:
            return


def _wait_in_slices(sock: socket.socket) -> None:
    """Have the system's calls, but for looks, wait for `_SLICE` at most."""
    if os.name == "posix":
        limit = struct.pack("@ll", _SLICE, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _rest(buffers: Sequence[bytes | memoryview], sent: int) -> list[memoryview]:
    """What of the buffers is not sent yet."""
    found = []
    for buffer in buffers:
        if sent < len(buffer):
            found.append(memoryview(buffer)[sent:])
            sent = 0
        else:
            sent -= len(buffer)
    return found


def _unreachable(address: Address, error: OSError | ValueError) -> IOFailure:
    sentence = f"Failed to connect to '{address.place}'"
    if isinstance(error, socket.gaierror):
        sentence = f"address resolution failed for {address.place}"
        return IOFailure(f"{sentence}: {error.strerror}", errno=22)
    if isinstance(error, ValueError):
        sentence = f"address resolution failed for {address.place}"
        return IOFailure(f"{sentence}: Servname not supported for ai_socktype", errno=22)
    raised = from_oserror(error, sentence)
    assert isinstance(raised, IOFailure)
    raised.hint = raised.hint or "is the server running, and is that its socket?"
    return raised
