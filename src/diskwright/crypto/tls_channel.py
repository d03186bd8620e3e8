"""A TLS connection over a socket, for one thread that sends while another one receives.

Why not `ssl.SSLSocket`: OpenSSL allows one call on a connection at a time, and a call of an
SSLSocket lasts as long as the wait for the peer, so that a reader would keep writers waiting, or
both would be inside at once. Here OpenSSL works on memory alone, under a lock that is held for no
wait, and the sockets' calls are made outside of it.

Invariants:
1. What OpenSSL wants sent leaves in the order in which it made it: whoever takes it from the
   memory holds the senders' lock until it is on its way.
2. A receiver never sends, so that it cannot wait for a peer that waits for it. What it has caused
   (the answer to a change of keys) leaves before the next data, as the protocol wants it.
"""

from __future__ import annotations

import socket
from _thread import allocate_lock
from ssl import (
    MemoryBIO,
    SSLCertVerificationError,
    SSLError,
    SSLWantReadError,
    SSLZeroReturnError,
)

from diskwright.crypto.tls import refusal_of
from diskwright.errors import AccessError, IOFailure, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskwright.crypto.tls import Credentials

#: How much is encrypted before it is sent, and received before it is decrypted.
_PIECE = 256 << 10
_HOSTNAME_MISMATCH = (62, 63, 64)
_ENDED = "Cannot read from TLS channel: The TLS connection was non-properly terminated."
_ALERT = "Cannot read from TLS channel: A TLS fatal alert has been received."


class Channel:
    """What of a socket's operations a connection uses, encrypted.

    Args:
        sock: connected; its next byte is one of TLS. The channel owns it from here.
        credentials: of this side.
        hostname: whom a client expects to reach, if it cares.
        on_silence: is called when a call on the socket waited as long as its limits let it
            (SO_RCVTIMEO, SO_SNDTIMEO); unless it raises something, the wait goes on.

    Raises:
        AccessError: the other side is not who it should be.
        IOFailure: it ended the connection, or speaks no TLS.
        OptionError: there is no name to compare the server's certificate with.
    """

    def __init__(
        self,
        sock: socket.socket,
        credentials: Credentials,
        hostname: str | None = None,
        *,
        on_silence: Callable[[], None] = lambda: None,
    ) -> None:
        self._sock = sock
        self._on_silence = on_silence
        self._incoming, self._outgoing = MemoryBIO(), MemoryBIO()
        self._buffer = memoryview(bytearray(_PIECE))
        self._lock = allocate_lock()  # for whatever OpenSSL does
        self._sending = allocate_lock()
        context = credentials.context()
        is_client = credentials.endpoint == "client"
        if not hostname:  # OpenSSL would take that for "whoever it is"
            context.check_hostname = False
        try:
            self._tls = context.wrap_bio(
                self._incoming,
                self._outgoing,
                server_side=not is_client,
                server_hostname=hostname if is_client and hostname else None,
            )
        except ValueError as error:  # no name, or one that none can have
            raise _mismatch(hostname) from error
        self._shake_hands(hostname)
        if credentials.names_peer and hostname is None:
            raise OptionError(
                "No hostname for certificate validation",
                field="tls-hostname",
                hint="tls-hostname says whom the server's certificate is to name",
            )
        if credentials.names_peer and not hostname:
            raise _mismatch(hostname)

    def _shake_hands(self, hostname: str | None) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except SSLWantReadError:
                self._flush()
                if not self._fill():
                    raise IOFailure(
                        "The peer ended the connection within the TLS handshake",
                        qemu="TLS handshake failed: "
                        "The TLS connection was non-properly terminated.",
                    ) from None
                continue
            except SSLCertVerificationError as error:
                self._flush()  # it is told why
                if error.verify_code in _HOSTNAME_MISMATCH:
                    raise _mismatch(hostname) from error
                raise refusal_of(error) from error
            except SSLError as error:
                self._flush()
                raise _failure("TLS handshake failed", error) from error
            self._flush()
            return

    # ---------------------------------------------------------------------------- as a socket

    def sendmsg(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Send all of the buffers; returns how much that was."""
        for buffer in buffers:
            self._encrypt(buffer)
        self._flush()
        return sum(map(len, buffers))

    def send(self, buffer: bytes | memoryview) -> int:
        """Send all of the buffer; returns how much that was."""
        return self.sendmsg((buffer,))

    def recv_into(self, view: memoryview, length: int = 0, flags: int = 0) -> int:
        """Receive something, and with MSG_WAITALL all of it; returns how much, 0 at the end."""
        wanted = length or len(view)
        done = 0
        while done < wanted:
            count = self._receive(view[done:wanted])
            done += count
            if not count or not flags & socket.MSG_WAITALL:
                break
        return done

    def shutdown(self, how: int) -> None:
        """Say farewell, if that can be done at once, and wake whoever waits."""
        with self._lock:
            try:
                self._tls.unwrap()
            except SSLError:
                pass  # the peer's farewell is not waited for
        if self._sending.acquire(blocking=False):
            try:
                self._sock.send(self._outgoing.read(), socket.MSG_DONTWAIT)
            except OSError:
                pass  # it is gone already
            finally:
                self._sending.release()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    # --------------------------------------------------------------------------------- inside

    def _encrypt(self, buffer: bytes | memoryview) -> None:
        whole = memoryview(buffer).cast("B")
        for start in range(0, len(whole), _PIECE):
            try:
                with self._lock:
                    self._tls.write(whole[start : start + _PIECE])
            except SSLError as error:
                raise _failure("The TLS connection broke", error) from error
            if len(whole) > _PIECE:
                self._flush()

    def _flush(self) -> None:
        with self._sending:
            while self._outgoing.pending:
                with self._lock:
                    data = memoryview(self._outgoing.read())
                while data:
                    try:
                        data = data[self._sock.send(data) :]
                    except BlockingIOError:
                        self._on_silence()

    def _fill(self) -> bool:
        """Receive what there is; False at the end."""
        while True:
            try:
                count = self._sock.recv_into(self._buffer)
                break
            except BlockingIOError:
                self._on_silence()
        with self._lock:
            if count:
                self._incoming.write(self._buffer[:count])
            else:
                self._incoming.write_eof()
        return count > 0

    def _receive(self, view: memoryview) -> int:
        while True:
            try:
                with self._lock:
                    return self._tls.read(len(view), view)  # type: ignore[return-value]  # a count
            except SSLWantReadError:
                self._fill()
            except SSLZeroReturnError:
                return 0
            except SSLError as error:
                raise _failure("The TLS connection broke", error) from error


def _mismatch(hostname: str | None) -> AccessError:
    return AccessError(f"Certificate does not match the hostname {hostname}", errno=13)


def _failure(sentence: str, error: SSLError) -> IOFailure:
    reason = str(error.reason or error)
    words = reason.lower().replace("_", " ")
    if "EOF" in type(error).__name__ or "UNEXPECTED_EOF" in reason:
        return IOFailure(f"{sentence}: the peer ended it without a farewell", qemu=_ENDED)
    if "ALERT" in reason:
        return IOFailure(f"{sentence}: the peer says {words}", qemu=_ALERT)
    return IOFailure(f"{sentence}: {words}")
