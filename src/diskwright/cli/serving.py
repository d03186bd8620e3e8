"""What the programs that serve have in common: sockets, signals, and when they end."""

from __future__ import annotations

import os
import signal

from diskwright.block.cancel import cancellable
from diskwright.cli import output
from diskwright.cli.interrupt import Flag
from diskwright.crypto.authz import Authorization
from diskwright.errors import CancelledError, OptionError
from diskwright.exports.nbd.export import NodeExport
from diskwright.exports.nbd.listening import (
    ANY_HOST,
    given_sockets,
    inet_sockets,
    unix_socket,
)
from diskwright.exports.nbd.secure import securer
from diskwright.exports.nbd.server import HANDSHAKE_SECONDS, NEGOTIATION, NbdServer
from diskwright.exports.nbd.service import uri_of
from diskwright.wire.nbd.places import PORT
from diskwright.wire.nbd.server import OFF, REQUIRE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from types import FrameType, TracebackType
    from typing import Self

    from diskwright.block.node import Node
    from diskwright.cli.daemon import Background
    from diskwright.cli.grammar import Arguments
    from diskwright.crypto.tls import Credentials
    from diskwright.exports.nbd.channel import AnyChannel

_ENDING = ("SIGTERM", "SIGINT", "SIGHUP")


class Serving:
    """A server as its options say: -p, -b, -k, -e, -t, -r, -v, --handshake-limit and --pid-file.

    `with` closes its sockets, and takes away the path of one, however it ends. From its beginning
    on a signal ends the server in order, and before there is one the opening of images.

    Args:
        program: its name, for what it says.
        arguments: with the values of those options.
        clients: how many there may be where -e does not say.
        persistent: -t goes without saying.
    """

    def __init__(
        self, program: str, arguments: Arguments, *, clients: int = 1, persistent: bool = False
    ) -> None:
        from diskwright.crypto.tls import SERVER

        self._program = program
        self._arguments = arguments
        self._exports: list[NodeExport] = []
        self._sockets: list[socket.socket] = []
        self._path: str | None = None
        self._tasks: list[Callable[[NbdServer], None]] = []
        self._server: NbdServer | None = None
        self._ending = Flag()
        shared = arguments.number("shared")
        self.clients = clients if shared is None else shared
        self._credentials = credentials(arguments.text("tls-creds"), SERVER)
        self._persistent = persistent or arguments.flag("persistent")

    def offer(
        self,
        node: Node,
        name: str,
        *,
        description: str = "",
        depth: bool = False,
        bitmaps: Sequence[str] = (),
    ) -> NodeExport:
        """Serve a node under a name."""
        export = NodeExport(
            node,
            name,
            description=description,
            read_only=self._arguments.flag("read-only"),
            clients=self.clients,
            depth=depth,
            bitmaps=bitmaps,
        )
        self._exports.append(export)
        return export

    def also(self, task: Callable[[NbdServer], None]) -> None:
        """Do something once the server is there and before it serves."""
        self._tasks.append(task)

    def listen(self) -> None:
        """Make the sockets.

        Raises:
            DiskwrightError: one cannot be made.
        """
        self._sockets = given_sockets()
        if self._sockets:
            return
        path, host, port = (self._arguments.text(key) for key in ("socket", "bind", "port"))
        if path is None:
            self._sockets = inet_sockets(ANY_HOST if host is None else host, port or str(PORT))
            return
        self._sockets = [unix_socket(path)]
        self._path = path

    def opening(self) -> cancellable:
        """`with` it, a signal ends the opening of an image, which is no error."""
        return cancellable(self._ending)

    def places(self) -> list[str]:
        """The URI of each export at each socket."""
        secret = "" if self._credentials is None else "s"
        return [
            uri_of(sock, export.told.name, secret)
            for sock in self._sockets
            for export in self._exports
        ]

    def run(self, background: Background | None = None) -> None:
        """Serve until the last client has left, or a signal ends it."""
        arguments = self._arguments
        limit = arguments.number("handshake-limit")
        server = NbdServer(
            self._exports,
            tls=OFF if self._credentials is None else REQUIRE,
            secure=self._securer(),
            clients=self.clients,
            handshake_seconds=HANDSHAKE_SECONDS if limit is None else limit,
            told=self._tell,
            left=self._left,
        )
        self._server = server
        if self._ending.is_set():
            server.stop()
            server.serve()  # which closes what it has
            return
        try:
            for sock in self._sockets:
                server.listen(sock)
            for task in self._tasks:
                task(server)
            if arguments.flag("pid-file"):
                from diskwright.cli.daemon import write_pid

                write_pid(arguments.text_or("pid-file", ""))
            output.flush()
            if background is not None:
                background.ready()
            _allow_many_files()
            server.serve()
        finally:
            self.close()

    def close(self) -> None:
        """Listen no more; again is no error."""
        for sock in self._sockets:
            sock.close()
        path, self._path = self._path, None
        if path is not None:
            _remove(path)

    def _end(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler; a second one ends the process where an image is still opened."""
        is_first, self._ending.number = not self._ending.is_set(), number
        if self._server is not None:
            self._server.stop()
        elif not is_first:
            self.close()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __enter__(self) -> Self:
        for name in _ENDING:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._end)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.close()
        return isinstance(error, CancelledError)

    def _securer(self) -> Callable[[AnyChannel], AnyChannel] | None:
        """What encrypts connections, if something does."""
        if self._credentials is None:
            return None
        name = self._arguments.text("tls-authz")
        return securer(self._credentials, None if name is None else _Named(name))

    def _tell(self, line: str) -> None:
        if self._arguments.flag("verbose") or line.startswith(NEGOTIATION):
            output.complain(f"{self._program}: {line}")

    def _left(self, count: int, agreed: bool) -> None:
        if agreed and not count and not self._persistent and self._server is not None:
            self._server.stop()


def credentials(name: str | None, endpoint: str) -> Credentials | None:
    """The credentials of that id, for "client" or "server".

    Raises:
        OptionError: there are none.
    """
    if name is None:
        return None
    from diskwright.block import objects
    from diskwright.crypto.tls import Credentials

    sentence = "Failed to get TLS creds"
    found = objects.find(name)
    if found is None:
        raise OptionError(f"{sentence}: No TLS credentials with id '{name}'", field="tls-creds")
    if not isinstance(found, Credentials):
        raise OptionError(
            f"{sentence}: Object with id '{name}' is not TLS credentials", field="tls-creds"
        )
    if found.endpoint != endpoint:
        raise OptionError(
            f"{sentence}: Expected TLS credentials for a {endpoint} endpoint", field="tls-creds"
        )
    return found


class _Named(Authorization):
    """The object of that id, which is looked up when a client comes, as qemu-nbd does."""

    def __init__(self, name: str) -> None:
        super().__init__(())
        self._name = name

    def allows(self, name: str) -> bool:
        """Whether the object lets the owner of that name in."""
        from diskwright.block import objects

        found = objects.find(self._name)
        return isinstance(found, Authorization) and found.allows(name)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # somebody was quicker


def _allow_many_files() -> None:
    """Have as many descriptors, that is clients, as the system allows."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):
        pass  # those that there are must do
