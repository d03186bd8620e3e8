"""`aio_read`, `aio_write`, `aio_flush`: requests that run beside the commands after them."""

from __future__ import annotations

from time import monotonic

from diskwright.cli import output
from diskwright.cli.grammar import Arguments, Flag
from diskwright.cli.io_commands import transfer
from diskwright.cli.io_commands.declaration import Done, IoCommand, Refused, WrongUsage
from diskwright.cli.io_commands.numbers import report_text
from diskwright.errors import DiskwrightError, strerror_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.cli.io_commands.session import Session


def _invalid(kind: str) -> Flag:
    """-i, which is all that is heeded of a call."""

    def parse(_: str) -> object:
        output.say(f"injecting invalid {kind} request\n")
        raise Done

    return Flag("i", "", help="count a request as invalid, and do nothing", parse=parse)


def aio_read(session: Session, arguments: Arguments) -> None:
    """Begin to read a range."""
    if len(arguments.operands) < 2:
        raise WrongUsage
    offset, lengths = transfer.vector(arguments)
    length, pattern = sum(lengths), arguments.number("P")

    def work() -> str:
        begun = monotonic()
        data = session.read(offset, length)
        seconds = monotonic() - begun
        words = "" if pattern is None else transfer.verified(data, pattern, offset)
        words += transfer.shown(arguments, data, offset)
        return words + _report(arguments, "read", seconds, offset=offset, length=length)

    _begin(session, "readv", work)


def aio_write(session: Session, arguments: Arguments) -> None:
    """Begin to write a range."""
    operands, zeroes = arguments.operands, arguments.flag("z")
    if len(operands) < 2:
        raise WrongUsage
    if zeroes and len(operands) != 2:
        raise Refused("-z supports only a single length parameter")
    if arguments.flag("u") and not zeroes:
        raise Refused("-u requires -z to be specified")
    if zeroes:
        transfer.refuse_registered(arguments)
        offset, length = transfer.two_numbers(arguments)
    else:
        offset, lengths = transfer.vector(arguments)
        length = sum(lengths)
        pattern = arguments.number("P")
        fill = transfer.DEFAULT_PATTERN if pattern is None else pattern
        data = transfer.joined(session, lengths, fill)
    node, fua = session.node, arguments.flag("f")

    def work() -> str:
        begun = monotonic()
        session.reach(offset, length)
        if zeroes:
            node.write_zeroes(offset, length, unmap=arguments.flag("u"), fua=fua)
        else:
            node.write(offset, data, fua=fua)
        return _report(arguments, "wrote", monotonic() - begun, offset=offset, length=length)

    _begin(session, "aio_write", work)


def _report(arguments: Arguments, done: str, seconds: float, *, offset: int, length: int) -> str:
    if arguments.flag("q"):
        return ""
    machine = arguments.flag("C")
    return report_text(done, seconds, offset=offset, length=length, total=length, machine=machine)


def _begin(session: Session, name: str, work: Callable[[], str]) -> None:
    """Run `work` beside what follows; a failure is a line of its report."""

    def guarded() -> str:
        try:
            return work()
        except (DiskwrightError, OSError) as error:
            return f"{name} failed: {strerror_of(error)}\n"
        except MemoryError:
            return f"{name} failed: Cannot allocate memory\n"

    session.outstanding.begin(guarded, session.hear)


def aio_flush(session: Session, arguments: Arguments) -> None:
    """Wait for all that is under way, and print the results."""
    session.outstanding.wait()


_NOTES = (
    "It counts as done once it is begun; its result is printed later, at the latest by\n"
    "`aio_flush`. Neither an error nor a wrong pattern changes the exit code."
)
AIO_READ = IoCommand(
    "aio_read",
    "begin to read a range",
    aio_read,
    synopsis="[-Ciqrv] [-P pattern] off len [len..]",
    words=(2, None),
    flags=(
        transfer.MACHINE,
        _invalid("read"),
        transfer.VERIFY,
        transfer.QUIET,
        transfer.REGISTER,
        transfer.SHOW,
    ),
    notes=_NOTES,
)
AIO_WRITE = IoCommand(
    "aio_write",
    "begin to write a range",
    aio_write,
    synopsis="[-Cfiqruz] [-P pattern] off len [len..]",
    words=(2, None),
    flags=(
        transfer.MACHINE,
        transfer.FUA,
        _invalid("write"),
        transfer.FILL,
        transfer.QUIET,
        transfer.REGISTER,
        transfer.UNMAP,
        transfer.ZERO,
    ),
    writes=True,
    notes=_NOTES,
)
AIO_FLUSH = IoCommand(
    "aio_flush", "wait for every request under way, and print its result", aio_flush
)
