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


ZONE_REPORT = IoCommand(
    "zone_report",
    "describe zones of a zoned device",
    zone_report,
    synopsis="offset number",
    words=(2, 2),
)
ZONE_OPEN = IoCommand(
    "zone_open",
    "open zones of a zoned device",
    _refusing("open"),
    synopsis="offset len",
    words=(2, 2),
)
ZONE_CLOSE = IoCommand(
    "zone_close",
    "close zones of a zoned device",
    _refusing("close"),
    synopsis="offset len",
    words=(2, 2),
)
ZONE_FINISH = IoCommand(
    "zone_finish",
    "finish zones of a zoned device",
    _refusing("finish"),
    synopsis="offset len",
    words=(2, 2),
)
ZONE_RESET = IoCommand(
    "zone_reset",
    "empty zones of a zoned device",
    _refusing("reset"),
    synopsis="offset len",
    words=(2, 2),
)
ZONE_APPEND = IoCommand(
    "zone_append",
    "append to a zone of a zoned device",
    zone_append,
    synopsis="offset len [len..]",
    words=(3, 4),
    flags=(transfer.IGNORED,),
)
