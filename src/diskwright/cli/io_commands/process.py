"""`sleep`, `sigraise`, `abort`, `quit`, `help`: about the program itself."""

from __future__ import annotations

import os

from diskwright.cli import output
from diskwright.cli.grammar import Arguments
from diskwright.cli.io_commands.declaration import IoCommand, Refused
from diskwright.cli.io_commands.numbers import parse_number, parse_plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.cli.io_commands.session import Session

#: Longer sleeps than this are cut: the clock takes no more.
_LONGEST_SLEEP_S = 1 << 31


def sleep(session: Session, arguments: Arguments) -> None:
    """Wait, and print the results of what ends meanwhile."""
    milliseconds = parse_plain(arguments.operands[0])
    if milliseconds < 0:
        raise Refused(f"{arguments.operands[0]} is not a valid number")
    from time import sleep as wait

    wait(min(milliseconds / 1000, _LONGEST_SLEEP_S))
    session.outstanding.report()


def sigraise(session: Session, arguments: Arguments) -> None:
    """Send a signal to this process."""
    from signal import NSIG, raise_signal

    word = arguments.operands[0]
    number = parse_number(word)
    if number > NSIG:
        raise Refused(f"signal argument '{word}' is too large to be a valid signal")
    output.flush()
    if 0 < number < NSIG:
        raise_signal(number)


def abort(session: Session, arguments: Arguments) -> None:
    """End as a program does that found a fault in itself."""
    os.abort()


def quit(session: Session, arguments: Arguments) -> None:
    """Look at no more commands."""
    session.ended = True


def help(session: Session, arguments: Arguments) -> None:
    """Print a line about each command, or more about one."""
    from diskwright.cli.io import COMMANDS, find_command, load
    from diskwright.cli.io_commands.help import command_help

    if arguments.operands:
        name = arguments.operands[0]
        found = find_command(name)
        if found is None:
            raise Refused(f"command {name} not found")
        output.say(command_help(found))
        return
    for name in sorted(COMMANDS):
        output.say(f"{load(name).usage}\n")
    output.say("\nUse 'help commandname' for extended help.\n")


ABORT = IoCommand("abort", "end by abort(3), as after a crash", abort, needs_image=False)
HELP = IoCommand(
    "help",
    "list the commands, or describe one",
    help,
    synopsis="[command]",
    words=(0, 1),
    needs_image=False,
)
QUIT = IoCommand("quit", "end the program", quit, words=(0, None), needs_image=False)
SIGRAISE = IoCommand(
    "sigraise",
    "send a signal to this process",
    sigraise,
    synopsis="signal",
    words=(1, 1),
    needs_image=False,
    notes="`sigraise 9` ends it at once, and what was not flushed is lost.",
)
SLEEP = IoCommand(
    "sleep",
    "wait for so many milliseconds",
    sleep,
    synopsis="milliseconds",
    words=(1, 1),
    needs_image=False,
)
