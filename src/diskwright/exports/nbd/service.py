"""A server in a thread, for programs that serve beside what else they do."""

from __future__ import annotations

import os
import sys
import threading
from urllib.parse import quote

from diskwright.errors import OptionError
from diskwright.exports.nbd.export import NodeExport
from diskwright.exports.nbd.listening import inet_sockets, unix_socket
from diskwright.exports.nbd.server import NbdServer
from diskwright.wire.nbd.server import OFF, REQUIRE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from diskwright.block.node import Node
    from diskwright.crypto.tls import Credentials

#: A request shall not wait longer than so many seconds for another thread's Python.
SWITCH_SECONDS = 0.0002


class Service:
    """A running server; `with` ends it, or `stop`.

    Attributes:
        uris: name -> where clients find that export.
    """

    def __init__(
        self, server: NbdServer, sockets: list[socket.socket], uris: dict[str, str]
    ) -> None:
        self._server = server
        self.uris = uris
        address = sockets[0].getsockname()
        self._path = None if isinstance(address, tuple) else str(address)
        for sock in sockets:
            server.listen(sock)
        self._before = sys.getswitchinterval()
        sys.setswitchinterval(min(self._before, SWITCH_SECONDS))
        self._thread = threading.Thread(target=server.serve, name="nbd-server", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer what was asked for, see the clients off, and end; again is no error."""
        if self._thread.is_alive():
            self._server.stop()
            self._thread.join()
            sys.setswitchinterval(self._before)
            if self._path is not None:
                try:
                    os.unlink(self._path)
                except OSError:
                    pass  # somebody was quicker

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def uri_of(sock: socket.socket, name: str, secret: str) -> str:
    """The URI of an export at a socket that listens; `secret` is "s" where TLS is wanted."""
    address = sock.getsockname()
    if isinstance(address, tuple):
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"nbd{secret}://{host}:{address[1]}/{quote(name)}"
    return f"nbd{secret}+unix:///{quote(name)}?socket={quote(str(address))}"


def serve(
    nodes: Mapping[str, Node],
    *,
    path: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    clients: int = 0,
    read_only: bool = False,
    credentials: Credentials | None = None,
) -> Service:
    r"""Serve open nodes to NBD clients, in threads, until the service is stopped.

    Args:
        nodes: name -> node; the empty name is what clients get who ask for none. The nodes stay the
            caller's, who may use them meanwhile.
        path: of a unix socket to be made; without one, host and port count.
        host, port: where to listen; port 0 takes one that is free.
        clients: how many there may be at once; 0: any number.
        read_only: clients may not write, whether or not the nodes take it.
        credentials: of a server, to encrypt connections; clients without TLS are refused then.

    Raises:
        OptionError: there is no node, or a name is too long.
        IOFailure: nobody can listen there.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("disk.qcow2", "1M", format="qcow2")
        >>> with diskwright.open("disk.qcow2", read_only=False) as node:
        ...     with diskwright.serve({"disk": node}) as service:
        ...         with diskwright.open(
        ...             service.uris["disk"], format="raw", read_only=False
        ...         ) as far:
        ...             far.write(0, b"through the net")
        ...     node.read(8, 7)
        b'the net'
    """
    if not nodes:
        raise OptionError("There is nothing to serve", field="nodes")
    exports = [
        NodeExport(node, name, read_only=read_only, clients=clients) for name, node in nodes.items()
    ]
    secure = None
    if credentials is not None:
        from diskwright.exports.nbd.secure import securer

        secure = securer(credentials)
    server = NbdServer(
        exports, clients=clients, tls=OFF if secure is None else REQUIRE, secure=secure
    )
    sockets = [unix_socket(path)] if path is not None else inet_sockets(host, str(port))
    secret = "" if secure is None else "s"
    return Service(server, sockets, {name: uri_of(sockets[0], name, secret) for name in nodes})
