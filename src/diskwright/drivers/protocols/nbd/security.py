"""Whether a connection is encrypted, with what credentials, and whom it must reach."""

from __future__ import annotations

from diskwright.block import objects
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskwright.crypto.tls import Credentials
    from diskwright.drivers.protocols.nbd.address import Address


class Security:
    """How a connection is encrypted.

    Attributes:
        credentials: of a client.
        hostname: of the server, as its certificate has it; None: it is not known.
    """

    __slots__ = ("credentials", "hostname")

    def __init__(self, credentials: Credentials, hostname: str | None = None) -> None:
        self.credentials = credentials
        self.hostname = hostname


def from_options(options: Mapping[str, object], where: Address) -> Security | None:
    """How connections to an address are encrypted, by validated options; None: not at all.

    Raises:
        OptionError: there are no such credentials, or they are a server's.
    """
    credentials = _credentials(options)
    if credentials is None:
        return None
    name = options.get("tls-hostname")
    if name is None:
        return Security(credentials, None if where.path is not None else where.host)
    return Security(credentials, str(name))


def _credentials(options: Mapping[str, object]) -> Credentials | None:
    given = options.get("tls-creds")
    folder = options.get("tls-certificates")
    if given is not None:
        if folder is not None:
            raise OptionError(
                "tls-creds and tls-certificates may not be used at the same time",
                field="tls-certificates",
            )
        return named(given)
    if folder is None and not options.get("tls"):
        return None
    from diskwright.crypto.tls import SystemCredentials, X509Credentials

    verify = options.get("tls-verify-peer") is not False
    if folder is None:
        return SystemCredentials(verify_peer=verify)
    return X509Credentials(str(folder), verify_peer=verify)


def named(given: object) -> Credentials:
    """The client's credentials of that id, or those themselves.

    Raises:
        OptionError: there are none.
    """
    found = objects.find(given) if isinstance(given, str) else given
    if found is None:
        raise OptionError(f"No TLS credentials with id '{given}'", field="tls-creds")
    from diskwright.crypto.tls import CLIENT, Credentials

    if not isinstance(found, Credentials):
        raise OptionError(f"Object with id '{given}' is not TLS credentials", field="tls-creds")
    if found.endpoint != CLIENT:
        raise OptionError("Expected TLS credentials for a client endpoint", field="tls-creds")
    return found
