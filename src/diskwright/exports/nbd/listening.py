"""Sockets that a server listens on: by path, by host and port, or given by a service manager."""

from __future__ import annotations

import errno
import os
import socket
import stat

from diskwright.errors import IOFailure, OptionError, from_oserror
from diskwright.wire.nbd.places import check_path

ANY_HOST = "0.0.0.0"
#: Clients that may wait to be let in.
_BACKLOG = 512
#: The first descriptor that a service manager gives.
_FIRST_GIVEN = 3


def unix_socket(path: str) -> socket.socket:
    """A socket that listens at `path`; another one that lies there is taken away.

    Raises:
        OptionError: there is no such path for sockets.
        IOFailure: it cannot be made.
    """
    check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _unlink_socket(path)
        sock.bind(path)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise from_oserror(error, f"Failed to bind socket to {path}", path=path) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _unlink_socket(path: str) -> None:
    """Take a socket away that nobody may listen on any more; never anything else."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise IOFailure(
                f"Failed to bind socket to {path}: Address already in use",
                errno=errno.EADDRINUSE,
                path=path,
                hint="it is no socket, and stays where it is",
            )
        os.unlink(path)
    except FileNotFoundError:
        pass


def inet_sockets(host: str, port: str) -> list[socket.socket]:
    """Sockets that listen at each address of `host`.

    Raises:
        IOFailure: there is none, or it is taken.
    """
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise IOFailure(
            f"address resolution failed for {where}: {why}", errno=errno.EINVAL
        ) from error
    made: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            made.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        for sock in made:
            sock.close()
        if isinstance(error, OverflowError):
            error = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        taken = error.errno == errno.EADDRINUSE
        sentence = "Failed to find an available port" if taken else "Failed to bind socket"
        raised = from_oserror(error, sentence)
        raised.hint = f"{where} is in use by another program" if taken else raised.hint
        raise raised from error
    return made


def is_given() -> bool:
    """Whether a service manager says that it gave this process sockets.

    Source: sd_listen_fds(3).
    """
    count = os.environ.get("LISTEN_FDS", "")
    is_ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    return is_ours and count.isdigit() and int(count) > 0


def given_sockets() -> list[socket.socket]:
    """Sockets that a service manager gave this process (systemd's socket activation), or none.

    Raises:
        OptionError: there are several, or what was given is no socket.
    """
    if not is_given():
        return []
    count = os.environ["LISTEN_FDS"]
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if int(count) != 1:
        raise OptionError(f"One socket can be given by LISTEN_FDS, not {count}", field="LISTEN_FDS")
    try:
        os.set_inheritable(_FIRST_GIVEN, False)
        return [socket.socket(fileno=_FIRST_GIVEN)]
    except OSError as error:
        raise OptionError(
            f"Socket activation failed: invalid file descriptor fd = {_FIRST_GIVEN}: "
            f"{error.strerror}",
            field="LISTEN_FDS",
        ) from error
