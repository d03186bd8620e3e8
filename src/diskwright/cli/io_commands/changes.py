"""`discard`, `flush`, `truncate`: what changes an image without data."""

from __future__ import annotations

from diskwright.cli.grammar import Arguments, Flag
from diskwright.cli.io_commands import transfer
from diskwright.cli.io_commands.declaration import IoCommand, Refused, WrongUsage
from diskwright.cli.io_commands.numbers import MAX_LENGTH, parse_number
from diskwright.errors import DiskwrightError, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.cli.io_commands.session import Session


def discard(session: Session, arguments: Arguments) -> None:
    """Say that a range's content is not needed any more."""
    if len(arguments.operands) != 2:
        raise WrongUsage
    offset, length = transfer.two_numbers(arguments)
    if length > MAX_LENGTH:
        raise Refused(f"length cannot exceed {MAX_LENGTH}, given {arguments.operands[1]}")
    node = session.node

    def work() -> None:
        session.check_range(offset, length)
        inside = min(offset + length, node.size) - offset
        if inside > 0:
            node.discard(offset, inside)

    seconds = session.timed("discard", work)
    transfer.reported(arguments, "discard", seconds, offset=offset, length=length)


def flush(session: Session, arguments: Arguments) -> None:
    """Bring what was written to the disk; of a failure the exit code alone tells, as in qemu-io."""
    try:
        session.node.flush()
    except DiskwrightError as error:
        raise Refused from error


def truncate(session: Session, arguments: Arguments) -> None:
    """Change the image's size."""
    if not arguments.operands:
        raise WrongUsage
    preallocation = arguments.text("m") or "off"
    size = parse_number(arguments.operands[0])
    session.resize(size, preallocation)
    session.outstanding.report()


def _preallocation(text: str) -> str:
    from diskwright.operations.resize import PREALLOCATIONS

    if text not in PREALLOCATIONS:
        raise OptionError(
            f"Invalid preallocation mode '{text}'", hint=f"one of {', '.join(PREALLOCATIONS)}"
        )
    return text


DISCARD = IoCommand(
    "discard",
    "say that the content of a range is not needed any more",
    discard,
    synopsis="[-Cq] off len",
    words=(2, None),
    flags=(transfer.MACHINE, transfer.QUIET),
    writes=True,
)
FLUSH = IoCommand("flush", "bring what was written to the disk", flush)
TRUNCATE = IoCommand(
    "truncate",
    "change the size of the image",
    truncate,
    synopsis="[-m prealloc_mode] off",
    words=(1, 3),
    flags=(Flag("m", "", "PREALLOC", "how to provide for what is added", parse=_preallocation),),
    writes=True,
)
