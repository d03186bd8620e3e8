"""`zone_*`: no driver knows zones; refused as QEMU's tool does on files."""

from __future__ import annotations

from diskwright.cli.grammar import Arguments
from diskwright.cli.io_commands import transfer
from diskwright.cli.io_commands.declaration import IoCommand, WrongUsage
from diskwright.errors import UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.cli.io_commands.session import Session


def _refuse(what: str, session: Session, offset: int, length: int) -> None:
    def work() -> None:
        session.check_range(offset, length)
        raise UnsupportedError(f"{session.node.describe()} is no zoned device")

    session.timed(f"zone {what}", work)


def _refusing(what: str) -> Callable[[Session, Arguments], None]:
    """A command about a range of zones."""

    def run(session: Session, arguments: Arguments) -> None:
        _refuse(what, session, *transfer.two_numbers(arguments))

    return run


def zone_report(session: Session, arguments: Arguments) -> None:
    """Describe zones: there are none."""
    transfer.two_numbers(arguments)
    _refuse("report", session, 0, 0)


def zone_append(session: Session, arguments: Arguments) -> None:
    """Append to a zone: there is none."""
    if len(arguments.operands) < 2:
        raise WrongUsage
    transfer.vector(arguments)
    _refuse("append", session, 0, 0)


def _of_zones(what: str, summary: str) -> IoCommand:
    """A command about a range of zones."""
    return IoCommand(f"zone_{what}", summary, _refusing(what), synopsis="offset len", words=(2, 2))


ZONE_REPORT = IoCommand(
    "zone_report",
    "describe zones of a zoned device",
    zone_report,
    synopsis="offset number",
    words=(2, 2),
)
ZONE_OPEN = _of_zones("open", "open zones of a zoned device")
ZONE_CLOSE = _of_zones("close", "close zones of a zoned device")
ZONE_FINISH = _of_zones("finish", "finish zones of a zoned device")
ZONE_RESET = _of_zones("reset", "empty zones of a zoned device")
ZONE_APPEND = IoCommand(
    "zone_append",
    "append to a zone of a zoned device",
    zone_append,
    synopsis="offset len [len..]",
    words=(3, 4),
    flags=(transfer.IGNORED,),
)
