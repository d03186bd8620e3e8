"""`read`, `write`, `readv`, `writev`: requests that the program waits for."""

from __future__ import annotations

from diskwright.cli import output
from diskwright.cli.grammar import Arguments, Flag
from diskwright.cli.io_commands.declaration import IoCommand, Refused, WrongUsage
from diskwright.cli.io_commands.numbers import (
    MAX_LENGTH,
    dump_lines,
    parse_number,
    parse_pattern,
    report_text,
    require_sectors,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskwright.cli.io_commands.session import Session

#: What is written where no pattern is asked for.
DEFAULT_PATTERN = 0xCD

MACHINE = Flag("C", "", help="report in one line for programs")
IGNORED = Flag("p", "", help="accepted and ignored, as by QEMU's tool")
QUIET = Flag("q", "", help="report nothing, show no bytes")
REGISTER = Flag("r", "", help="accepted: there is nothing that buffers could be registered with")
SHOW = Flag("v", "", help="show the bytes")
FUA = Flag("f", "", help="have the bytes on the disk before the request ends")
UNMAP = Flag("u", "", help="with -z, space may be given back")
ZERO = Flag("z", "", help="make the range zero")
VERIFY = Flag("P", "", "BYTE", "compare what was read with this byte", parse=parse_pattern)
FILL = Flag("P", "", "BYTE", "write this byte, not 0xcd", parse=parse_pattern)


def verified(data: memoryview, pattern: int, offset: int) -> str:
    """The line about bytes read from `offset` that are not all `pattern`, or nothing."""
    if bytes(data) == bytes([pattern]) * len(data):
        return ""
    return f"Pattern verification failed at offset {offset}, {len(data)} bytes\n"


def two_numbers(arguments: Arguments) -> tuple[int, int]:
    """The offset and the length that are the operands."""
    offset = parse_number(arguments.operands[0])
    return offset, parse_number(arguments.operands[1])


def vector(arguments: Arguments) -> tuple[int, list[int]]:
    """The offset and the lengths that are the operands."""
    offset = parse_number(arguments.operands[0])
    lengths: list[int] = []
    for word in arguments.operands[1:]:
        length = parse_number(word)
        if length > MAX_LENGTH:
            raise Refused(f"Argument '{word}' exceeds maximum size {MAX_LENGTH}")
        if sum(lengths) > MAX_LENGTH - length:
            raise Refused(f"The total number of bytes exceed the maximum size {MAX_LENGTH}")
        lengths.append(length)
    return offset, lengths


def reported(arguments: Arguments, done: str, seconds: float, *, offset: int, length: int) -> None:
    """Print what was done, unless nothing is wanted."""
    if not arguments.flag("q"):
        machine = arguments.flag("C")
        output.say(
            report_text(done, seconds, offset=offset, length=length, total=length, machine=machine)
        )


def shown(arguments: Arguments, data: memoryview, offset: int) -> str:
    """The bytes as -v shows them, or nothing."""
    wanted = arguments.flag("v") and not arguments.flag("q")
    return dump_lines(data, offset) if wanted else ""


# ----------------------------------------------------------------------------------- read


def read(session: Session, arguments: Arguments) -> None:
    """Read a range, compare it, show it."""
    if len(arguments.operands) != 2:
        raise WrongUsage
    offset, length = two_numbers(arguments)
    if length > MAX_LENGTH:
        raise Refused(f"length cannot exceed {MAX_LENGTH}, given {arguments.operands[1]}")
    pattern = arguments.number("P")
    start, part = _part_to_compare(arguments, pattern, length)
    node = session.node
    found: list[memoryview] = []

    def work() -> None:
        if arguments.flag("b"):
            found.append(memoryview(node.read_vm_state(offset, length)))
        else:
            found.append(session.read(offset, length))

    if arguments.flag("b"):
        require_sectors(offset, "offset")
        require_sectors(length, "count")
        if arguments.flag("r"):
            raise Refused("I/O buffer registration is not supported when reading from vmstate")
    seconds = session.timed("read", work)
    (data,) = found
    wrong = "" if pattern is None else verified(data[start : start + part], pattern, offset + start)
    output.say(wrong + shown(arguments, data, offset))
    reported(arguments, "read", seconds, offset=offset, length=length)
    if wrong:
        raise Refused


def _part_to_compare(arguments: Arguments, pattern: int | None, length: int) -> tuple[int, int]:
    """Where the pattern is expected: an offset in what is read, and how far."""
    part, start = arguments.number("l"), arguments.number("s")
    if pattern is None and (part is not None or start is not None):
        raise WrongUsage
    start = start or 0
    part = length - start if part is None else part
    if start + part > length or part < 0:
        raise Refused("pattern verification range exceeds end of read data")
    return start, part


def readv(session: Session, arguments: Arguments) -> None:
    """Read one range into several buffers, compare it, show it."""
    if len(arguments.operands) < 2:
        raise WrongUsage
    offset, lengths = vector(arguments)
    length = sum(lengths)
    found: list[memoryview] = []
    seconds = session.timed("readv", lambda: found.append(session.read(offset, length)))
    (data,) = found
    pattern = arguments.number("P")
    wrong = "" if pattern is None else verified(data, pattern, offset)
    output.say(wrong + shown(arguments, data, offset))
    reported(arguments, "read", seconds, offset=offset, length=length)
    if wrong:
        raise Refused


# ---------------------------------------------------------------------------------- write


def write(session: Session, arguments: Arguments) -> None:
    """Write a range: bytes, a file's content, zeroes, or compressed."""
    if len(arguments.operands) != 2:
        raise WrongUsage
    flag = arguments.flag
    _check_combination(flag)
    offset, length = two_numbers(arguments)
    if length > MAX_LENGTH and not flag("n"):
        raise Refused(
            f"length cannot exceed {MAX_LENGTH} without -n, given {arguments.operands[1]}"
        )
    if flag("b") or flag("c"):
        require_sectors(offset, "offset")
        require_sectors(length, "count")
    if flag("z"):
        refuse_registered(arguments)
        work = _zeroing(session, arguments, offset, length)
    else:
        work = _writing(session, arguments, offset, _data(session, arguments, length))
    seconds = session.timed("write", work)
    reported(arguments, "wrote", seconds, offset=offset, length=length)


def _check_combination(flag: Callable[[str], bool]) -> None:
    if flag("b") and flag("z"):
        raise Refused("-b and -z cannot be specified at the same time")
    if flag("f") and (flag("b") or flag("c")):
        raise Refused("-f and -b or -c cannot be specified at the same time")
    if flag("n") and not flag("z"):
        raise Refused("-n requires -z to be specified")
    if flag("u") and not flag("z"):
        raise Refused("-u requires -z to be specified")
    if flag("z") + flag("P") + flag("s") > 1:
        raise Refused("Only one of -z, -P, and -s can be specified at the same time")


def refuse_registered(arguments: Arguments) -> None:
    """A request for zeroes has no buffer."""
    if arguments.flag("r"):
        raise Refused("cannot combine zero write with registered I/O buffer")


def _data(session: Session, arguments: Arguments, length: int) -> memoryview:
    """What is to be written."""
    path = arguments.text("s")
    if path is None:
        pattern = arguments.number("P")
        return session.filled(length, DEFAULT_PATTERN if pattern is None else pattern)
    view = session.buffer(length)
    try:
        with open(path, "rb") as file:
            piece = file.read(max(length, 1))
    except OSError as error:
        output.complain(f"{path}: {error.strerror}")
        raise Refused from error
    if not piece:
        output.complain(f"{path}: file is empty")
        raise Refused
    for start in range(0, length, len(piece)):
        part = min(len(piece), length - start)
        view[start : start + part] = piece[:part]
    return view


def _writing(
    session: Session, arguments: Arguments, offset: int, data: memoryview
) -> Callable[[], None]:
    node = session.node

    def work() -> None:
        if arguments.flag("b"):
            node.write_vm_state(offset, data)
        elif arguments.flag("c"):
            session.check_range(offset, len(data))
            node.write_compressed(offset, data)
        else:
            session.reach(offset, len(data))
            node.write(offset, data, fua=arguments.flag("f"))

    return work


def _zeroing(
    session: Session, arguments: Arguments, offset: int, length: int
) -> Callable[[], None]:
    def work() -> None:
        session.reach(offset, length)
        session.node.write_zeroes(
            offset,
            length,
            unmap=arguments.flag("u"),
            fast=arguments.flag("n"),
            fua=arguments.flag("f"),
        )

    return work


def writev(session: Session, arguments: Arguments) -> None:
    """Write one range out of several buffers."""
    if len(arguments.operands) < 2:
        raise WrongUsage
    offset, lengths = vector(arguments)
    pattern = arguments.number("P")
    data = joined(session, lengths, DEFAULT_PATTERN if pattern is None else pattern)

    def work() -> None:
        session.reach(offset, len(data))
        session.node.write(offset, data, fua=arguments.flag("f"))

    seconds = session.timed("writev", work)
    reported(arguments, "wrote", seconds, offset=offset, length=len(data))


def joined(session: Session, lengths: Sequence[int], pattern: int) -> memoryview:
    """Bytes of a request of several buffers, which lie one after the other."""
    return session.filled(sum(lengths), pattern)


READ = IoCommand(
    "read",
    "read a range, and wait for it",
    read,
    synopsis="[-abCqrv] [-P pattern [-s off] [-l len]] off len",
    words=(2, None),
    flags=(
        Flag("b", "", help="read the state of a virtual machine, not its disk"),
        MACHINE,
        Flag("l", "", "LEN", "with -P, so much is compared", parse=parse_number),
        IGNORED,
        VERIFY,
        QUIET,
        REGISTER,
        Flag("s", "", "OFF", "with -P, comparing begins so far behind OFF", parse=parse_number),
        SHOW,
    ),
    notes="`read -v 512 1k` shows the second and the third sector.",
)
READV = IoCommand(
    "readv",
    "read a range into several buffers",
    readv,
    synopsis="[-Cqrv] [-P pattern] off len [len..]",
    words=(2, None),
    flags=(MACHINE, VERIFY, QUIET, REGISTER, SHOW),
    notes="`readv -v 512 1k 1k` reads 2 KiB into two buffers of 1 KiB.",
)
WRITE = IoCommand(
    "write",
    "write a range, and wait for it",
    write,
    synopsis="[-bcCfnqruz] [-P pattern | -s source_file] off len",
    words=(2, None),
    flags=(
        Flag("b", "", help="write the state of a virtual machine, not its disk"),
        Flag("c", "", help="write compressed clusters"),
        MACHINE,
        FUA,
        Flag("n", "", help="with -z, refuse what could only be done by writing zeroes"),
        IGNORED,
        FILL,
        QUIET,
        REGISTER,
        Flag("s", "", "FILE", "write the content of a file, over and over"),
        UNMAP,
        ZERO,
    ),
    writes=True,
    notes="`write -P 7 512 1k` fills the second and the third sector with the byte 7.",
)
WRITEV = IoCommand(
    "writev",
    "write a range out of several buffers",
    writev,
    synopsis="[-Cfqr] [-P pattern] off len [len..]",
    words=(2, None),
    flags=(MACHINE, FUA, FILL, QUIET, REGISTER),
    writes=True,
    notes="`writev 512 1k 1k` writes 2 KiB out of two buffers of 1 KiB.",
)
