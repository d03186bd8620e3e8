"""What a server says of its exports, without opening one as a disk."""

from __future__ import annotations

from contextlib import closing

from diskwright.drivers.protocols.nbd.link import Link, conversation
from diskwright.errors import UnsupportedError
from diskwright.wire.nbd import transmission
from diskwright.wire.nbd.client import ClientHandshake, OptionRefused
from diskwright.wire.nbd.numbers import Answer, Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.drivers.protocols.nbd.address import Address
    from diskwright.drivers.protocols.nbd.security import Security
    from diskwright.wire.nbd.messages import Export, Steps


class Survey:
    """What a server said.

    Attributes:
        protocol: "oldstyle", "newstyle" or "newstyle-fixed".
        tls: the connection was encrypted.
        structured, extended: which replies and headers the server has; extended are structured too.
        asked: the name that was asked about, where it was one: a server may call it otherwise.
        exports: with the contexts of each. One whose flags are 0 is known by its name alone.
    """

    __slots__ = ("asked", "exports", "extended", "protocol", "structured", "tls")

    def __init__(
        self, handshake: ClientHandshake, exports: list[Export], asked: str | None = None
    ) -> None:
        self.asked = asked
        self.protocol = handshake.protocol
        self.tls = handshake.tls
        self.structured = handshake.structured
        self.extended = handshake.extended
        self.exports = exports


def look_at_export(where: Address, security: Security | None = None) -> Survey:
    """What the server of `where` says of that export.

    Raises:
        IOFailure: there is no server, or it hangs up.
        OptionRefused: it does not serve that.
        ProtocolError: it is no NBD server.
    """
    return conversation(where, security, _one(where.export))


def list_exports(where: Address, security: Security | None = None) -> Survey:
    """What the server of `where` says of all its exports; which one `where` names is not asked.

    Raises:
        IOFailure, OptionRefused, ProtocolError: as for `look_at_export`.
        UnsupportedError: it is one that tells of none.
    """
    return conversation(where, security, _all)


def runs_of_export(
    where: Address, context: str, security: Security | None = None
) -> list[tuple[int, int, int]]:
    """(offset, length, number) of each run of an export, by a context.

    Raises:
        IOFailure, OptionRefused, ProtocolError: as for `look_at_export`.
        UnsupportedError: the server has no such context.
    """
    with closing(Link(where, context=context, security=security)) as link:
        if link.context_id is None:
            raise UnsupportedError(
                f"The NBD server has no context '{context}' for this export",
                hint="without --map the contexts are listed",
            )
        return link.runs(0, link.export.size)


def _one(name: str) -> Callable[[ClientHandshake], Steps[Survey]]:
    """The part of the handshake that asks about one export."""

    def steps(handshake: ClientHandshake) -> Steps[Survey]:
        contexts = yield from _contexts(handshake, name)
        agreed = yield from handshake.go(name, {})
        agreed.export.contexts = contexts
        yield transmission.request(agreed, Command.DISC, 0, (0, 0, 0))
        return Survey(handshake, [agreed.export], name)

    return steps


def _all(handshake: ClientHandshake) -> Steps[Survey]:
    """The part of the handshake that asks about all exports, one after the other."""
    if handshake.protocol == "oldstyle":
        return (yield from _one("")(handshake))
    if handshake.protocol != "newstyle-fixed":
        raise UnsupportedError(
            "The NBD server is too old to tell of its exports",
            qemu="Server does not support export lists",
        )
    found = []
    for listed in (yield from handshake.exports()):
        try:
            export = yield from handshake.info(listed.name)
        except OptionRefused as error:
            if error.answer != Answer.UNSUPPORTED:
                raise
            found.append(listed)
            continue
        export.name = listed.name
        export.description = export.description or listed.description
        export.contexts = yield from _contexts(handshake, listed.name)
        found.append(export)
    yield from handshake.leave()
    return Survey(handshake, found)


def _contexts(handshake: ClientHandshake, name: str) -> Steps[list[str]]:
    try:
        found = yield from handshake.contexts(name, [], choose=False)
    except OptionRefused:
        return []
    return list(found.values())
