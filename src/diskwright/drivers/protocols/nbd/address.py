"""Where an NBD server is: URIs, `nbd:` names and options, and back.

Source: NetworkBlockDevice/nbd, doc/uri.md; QEMU, docs/system/device-url-syntax.rst.inc, "NBD".
"""

from __future__ import annotations

from diskwright.block.options import Option, word_of
from diskwright.errors import OptionError
from diskwright.wire.nbd.places import PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: scheme -> whether it is a unix socket's
_SCHEMES = {"nbd": False, "nbd+tcp": False, "nbd+unix": True}
_SCHEMES |= {scheme.replace("nbd", "nbds"): unix for scheme, unix in _SCHEMES.items()}
#: What a URI of an encrypted connection may say of it: names of options.
_OF_TLS = ("tls-certificates", "tls-hostname", "tls-verify-peer")


class Address:
    """A server and one of its exports.

    Attributes:
        path: of a unix socket, or None.
        host, port: of an inet socket, where there is no path.
        export: a name; "" is the default export.
        switches: how it is reached: ipv4, ipv6, keep-alive, mptcp and numeric, or abstract and
            tight.
        tls: the connection is encrypted, by what the URI itself says of that; None: it does not
            say so (options may).
    """

    __slots__ = ("_names_export", "export", "host", "path", "port", "switches", "tls")

    def __init__(
        self, *, path: str | None = None, host: str = "", port: str = "", export: str | None = None
    ) -> None:
        self.switches: dict[str, bool] = {}
        self.tls: dict[str, object] | None = None
        self.path = path
        self.host = host
        self.port = port or str(PORT)
        self.export = export or ""
        self._names_export = export is not None

    @property
    def place(self) -> str:
        """The server in a sentence."""
        return f"{self.host}:{self.port}" if self.path is None else self.path

    def __str__(self) -> str:
        """The URI, as QEMU prints it, which has none of encrypted connections."""
        name = f"/{self.export}" if self._names_export else ""
        scheme = "nbd" if self.tls is None else "nbds"
        query = [f"{option}={_word(value)}" for option, value in (self.tls or {}).items()]
        if self.path is not None:
            return f"{scheme}+unix://{name}?{'&'.join([f'socket={self.path}', *query])}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        asked = f"?{'&'.join(query)}" if query else ""
        return f"{scheme}://{host}:{self.port}{name}{asked}"


def _word(value: object) -> str:
    """A value as a word of a URI's query."""
    from urllib.parse import quote

    return ("off", "on")[value] if isinstance(value, bool) else quote(str(value))


def parse(name: str) -> dict[str, object]:
    """The options that a name stands for: `server`, and `export` where one is named.

    Raises:
        OptionError: it is none of an NBD server.
    """
    scheme = name.partition(":")[0]
    if scheme in _SCHEMES and name[len(scheme) :].startswith("://"):
        return _parse_uri(name, scheme)
    if scheme != "nbd":
        raise _no_uri(name)
    return _parse_legacy(name)


def _parse_uri(name: str, scheme: str) -> dict[str, object]:
    from urllib.parse import parse_qsl, unquote, urlsplit

    if _has_bad_escape(name):
        raise _no_uri(name)
    try:
        parts = urlsplit(name)
        port = parts.port
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise _no_uri(name) from error
    export = unquote(parts.path.removeprefix("/"))
    found: dict[str, object] = {"export": export} if export else {}
    if scheme.startswith("nbds"):
        found |= {"tls": True, **{name: value for name, value in query if name in _OF_TLS}}
        query = [(name, value) for name, value in query if name not in _OF_TLS]
    if _SCHEMES[scheme]:
        said = dict(query)  # of what is said twice, the latter counts
        if list(said) != ["socket"] or parts.netloc:
            raise _no_uri(name)
        return {**found, "server": {"type": "unix", "path": said["socket"]}}
    place = parts.netloc.rpartition("@")[2]
    host = place[1:].partition("]")[0] if place.startswith("[") else place.partition(":")[0]
    if query or not host:
        raise _no_uri(name)
    return {**found, "server": {"type": "inet", "host": host, "port": str(port or PORT)}}


def _has_bad_escape(name: str) -> bool:
    """Whether a sign `%` begins no escape, or one of the byte that ends a name."""
    escapes = [piece[:2].lower() for piece in name.split("%")[1:]]
    return any(len(two) < 2 or two == "00" or two.strip("0123456789abcdef") for two in escapes)


def _no_uri(name: str) -> OptionError:
    return OptionError(
        f"'{name}' is no URI of an NBD server",
        qemu="No valid URL specified",
        field="filename",
        hint="it is nbd://HOST[:PORT]/[EXPORT] or nbd+unix:///[EXPORT]?socket=PATH, or nbds "
        "for nbd where the connection is to be encrypted",
    )


def _parse_legacy(name: str) -> dict[str, object]:
    """`nbd:unix:PATH[:exportname=NAME]`, `nbd:HOST:PORT[:exportname=NAME]`."""
    rest, mark, export = name[4:].partition(":exportname=")
    found: dict[str, object] = {"export": export} if mark else {}
    if not rest or (mark and not export):
        raise _missing()
    if rest.startswith("unix:"):
        return {**found, "server": {"type": "unix", "path": rest.removeprefix("unix:")}}
    if rest.startswith("["):
        host, colon, port = rest.rpartition(":")
    else:
        host, colon, port = rest.partition(":")
    if not colon:
        raise OptionError(
            f"'{name}' names no host and port",
            qemu=f"error parsing address '{rest}'",
            field="filename",
            hint="it is nbd:HOST:PORT or nbd:unix:PATH",
        )
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    return {**found, "server": {"type": "inet", "host": host, "port": port}}


def _missing() -> OptionError:
    return OptionError(
        "No NBD server is named",
        qemu="NBD server address missing",
        field="server",
        hint="give nbd://HOST[:PORT]/[EXPORT], or host= or path=",
    )


def from_options(options: Mapping[str, object]) -> Address:
    """The address that validated options say: `server`, or `host`, `port` and `path`.

    Raises:
        OptionError: it is not there, or twice.
    """
    export = options.get("export")
    made = _place(options, None if export is None else str(export))
    if options.get("tls") and options.get("tls-creds") is None:
        made.tls = {name: options[name] for name in _OF_TLS if options.get(name) is not None}
    return made


def _place(options: Mapping[str, object], export: str | None) -> Address:
    given = options.get("server")
    path, host, port = (_only_word(options.get(name)) for name in ("path", "host", "port"))
    if isinstance(given, dict):
        if (path, host, port) != (None, None, None):
            raise OptionError(
                "Cannot use 'server' and path/host/port at the same time", field="server"
            )
        return _from_server(given, export)
    if path is not None and host is not None:
        raise OptionError("path and host may not be used at the same time", field="path")
    if path is not None:
        return Address(path=path, export=export)
    if host is None:
        raise _missing()
    return Address(host=host, port=port or "", export=export)


def _only_word(value: object) -> str | None:
    """A list or an object is taken for nothing, as with QEMU."""
    return value if isinstance(value, str) else None


#: kind of a server -> what must be said of it.
_NEEDED = {"unix": ("path",), "inet": ("host", "port")}
#: kind -> switches that it may have.
_SWITCHES = {
    "unix": ("abstract", "tight"),
    "inet": ("ipv4", "ipv6", "keep-alive", "mptcp", "numeric"),
}


def _from_server(server: Mapping[str, object], export: str | None) -> Address:
    kind = server.get("type")
    needed = _NEEDED.get(str(kind))
    if kind is None:
        raise OptionError("Parameter 'type' is missing", field="server.type")
    if needed is None:
        raise OptionError(
            f"Parameter 'type' does not accept value '{kind}'",
            field="server.type",
            hint="an NBD server is reached through inet or unix",
        )
    for name in needed:
        if server.get(name) is None:
            raise OptionError(f"Parameter '{name}' is missing", field=f"server.{name}")
    known = _SWITCHES[str(kind)]
    surplus = sorted(set(server) - {"type", *needed, *known})
    if surplus:
        raise OptionError(f"Parameter '{surplus[0]}' is unexpected", field=f"server.{surplus[0]}")
    if kind == "unix":
        made = Address(path=word_of(server["path"]), export=export)
    else:
        host, port = word_of(server["host"]), word_of(server["port"])
        made = Address(host=host, port=port, export=export)
    made.switches = {name: _switch(name, server[name]) for name in known if name in server}
    if not made.switches.get("ipv4", True) and not made.switches.get("ipv6", True):
        raise OptionError("Cannot disable IPv4 and IPv6 at same time", field="server.ipv4")
    return made


def _switch(name: str, value: object) -> bool:
    return bool(Option(name, "bool").convert(value))
