"""A client's socket, encrypted: the same operations as `channel.Channel`, never longer waits.

OpenSSL works on memory here, under a lock that is held for no wait: one thread may send while
another receives. Whatever it wants sent leaves in the order in which it was made.
"""

from __future__ import annotations

import ssl
from _thread import allocate_lock

from diskwright.crypto.authz import distinguished_name
from diskwright.errors import AccessError, IOFailure
from diskwright.exports.nbd.channel import NOW

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskwright.crypto.authz import Authorization
    from diskwright.crypto.tls import Credentials
    from diskwright.exports.nbd.channel import AnyChannel, Buffer

#: How much is decrypted at once, and encrypted before it is sent.
_PIECE = 1 << 18
#: Room for what is received; a record of TLS is 16 KiB long at most.
_RECEIVED = 1 << 16


def securer(
    credentials: Credentials, authorization: Authorization | None = None
) -> Callable[[AnyChannel], AnyChannel]:
    """What encrypts the channels of clients.

    Args:
        credentials: the server's.
        authorization: whom of those that the credentials trust it lets in; None: all of them.

    Raises:
        OptionError: the credentials cannot be used.
    """
    context = credentials.context()

    def secure(channel: AnyChannel) -> AnyChannel:
        return SecureChannel(channel, context, authorization)

    return secure


class SecureChannel:
    """A connection with TLS; the handshake is a part of the first reading.

    Args:
        plain: its next byte is one of TLS.
        context: of a server.
        authorization: asked about the name in the client's certificate.
    """

    takes_pages = False  # a mapping may be given to system calls only

    def __init__(
        self,
        plain: AnyChannel,
        context: ssl.SSLContext,
        authorization: Authorization | None = None,
    ) -> None:
        self._plain = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = allocate_lock()  # for whatever OpenSSL does
        self._sending = allocate_lock()
        self._left = memoryview(b"")  # encrypted, and not sent yet
        self._authorization = authorization
        self._is_known = False  # the handshake is over

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._plain.fileno()

    def receive_into(self, view: memoryview, flags: int = 0) -> int:
        """Receive what there is; 0 is the end.

        Raises:
            BlockingIOError: there is nothing.
            AccessError: the client is not trusted.
            IOFailure: it speaks no TLS, or another one.
        """
        while True:
            try:
                with self._lock:
                    self._shake_hands()
                    return self._tls.read(len(view), view)  # type: ignore[return-value]  # a count
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError as error:
                self._say_why()
                raise _failure(error) from error
            self.push(NOW)
            received = bytearray(_RECEIVED)
            count = self._plain.receive_into(memoryview(received), flags)
            if not count:
                return 0
            with self._lock:
                self._incoming.write(memoryview(received)[:count])

    def _shake_hands(self) -> None:
        """Go on with the handshake; at its end see who the client is.

        Raises:
            AccessError: nobody who may in.
        """
        if self._is_known:
            return
        self._tls.do_handshake()
        self._is_known = True
        if self._authorization is None:
            return
        name = distinguished_name(self._tls.getpeercert() or {})
        if not self._authorization.allows(name):
            raise AccessError(f"TLS x509 authz check for {name} is denied", errno=13)

    def send(self, buffers: Sequence[Buffer], flags: int = 0) -> int:
        """Take what there is room for; how many bytes that was.

        Raises:
            BlockingIOError: none, since what was taken before has not gone.
        """
        if not self.push(flags):
            raise BlockingIOError
        taken = 0
        for buffer in buffers:
            piece = memoryview(buffer)[: _PIECE - taken]
            if piece:
                with self._lock:
                    self._tls.write(piece)
                taken += len(piece)
            if taken == _PIECE:
                break
        self.push(flags)
        return taken

    @property
    def holds_output(self) -> bool:
        """Whether something that was taken has not gone to the socket."""
        return bool(self._left) or bool(self._outgoing.pending)

    def push(self, flags: int = 0) -> bool:
        """Bring what was taken to the socket; whether all of it went."""
        with self._sending:
            while self.holds_output:
                if not self._left:
                    with self._lock:
                        self._left = memoryview(self._outgoing.read())
                try:
                    sent = self._plain.send([self._left], flags)
                except BlockingIOError:
                    return False
                self._left = self._left[sent:]
        return True

    def _say_why(self) -> None:
        """Send the alert that OpenSSL has made."""
        try:
            self.push(NOW)
        except OSError:
            pass  # the client has gone

    def end_input(self) -> None:
        """Take nothing more."""
        self._plain.end_input()

    def interrupt(self) -> None:
        """End the connection; the descriptor stays taken."""
        with self._lock:
            try:
                self._tls.unwrap()  # says farewell; the client's is not waited for
            except (ssl.SSLError, OSError):
                pass
        self._say_why()
        self._plain.interrupt()

    def close(self) -> None:
        """Give the descriptor back."""
        self._plain.close()


def _failure(error: ssl.SSLError) -> AccessError | IOFailure:
    from diskwright.crypto.tls import reason_of

    if isinstance(error, ssl.SSLCertVerificationError):
        return AccessError(f"A client is not trusted: {reason_of(error)}", errno=13)
    words = str(error.reason or error).lower().replace("_", " ")
    return IOFailure(f"The TLS connection with a client broke: {words}")
