"""How every command runs: words to arguments, one place for errors, exit codes, interruption."""

from __future__ import annotations

import os
import sys

from diskwright.cli import output
from diskwright.cli.grammar import (
    AllSaid,
    Arguments,
    Command,
    Flag,
    HelpWanted,
    Misused,
    Parser,
    VersionWanted,
)
from diskwright.cli.start import INTERRUPTED
from diskwright.errors import CancelledError, DiskwrightError, without_controls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Tool:
    """A program that has commands.

    Attributes:
        name: of the program.
        title: what it is, in a phrase.
        commands: name -> "module:attribute" of a `Command`, loaded when it is run.
        friendly: it is ours, not one that is compatible with QEMU's: careful with what images
            refer to, and with hints.
    """

    __slots__ = ("commands", "friendly", "name", "title")

    def __init__(
        self, name: str, title: str, *, commands: Mapping[str, str], friendly: bool = False
    ) -> None:
        self.name = name
        self.title = title
        self.commands = commands
        self.friendly = friendly

    def load(self, name: str) -> Command:
        """The command `name`, which must be one."""
        from diskwright.block.loading import load_named

        loaded: Command = load_named(self.commands[name])
        return loaded


#: New objects between two looks for unused ones: loading a command makes thousands that stay.
YOUNG = 20_000

STANDARD_FLAGS = (
    Flag("h", "help", help="show this help and exit"),
    Flag("V", "version", help="show the version and exit"),
    Flag("T", "trace", "PATTERN", "accepted; there are no trace events here", repeats=True),
)


def run(tool: Tool, words: Sequence[str]) -> int:
    """Run the program with these words; returns its exit code."""
    arguments = Arguments(tool.name, friendly=tool.friendly)
    try:
        code = _run(tool, words, arguments)
    except AllSaid:
        code = 0
    except Misused as error:
        complain_misuse(error, tool.name, tool.name)
        code = 1
    except DiskwrightError as error:
        report(error, arguments)
        code = 1
    except KeyboardInterrupt:  # before or after the command itself, which heeds a flag
        code = INTERRUPTED
    try:
        output.end()
    except OSError as error:
        output.complain(f"{tool.name}: Could not write to standard output: {error.strerror}")
        code = code or 1
    return code


def _run(tool: Tool, words: Sequence[str], arguments: Arguments) -> int:
    try:
        Parser(STANDARD_FLAGS, tool.name, mixed=False).parse(words, arguments)
    except HelpWanted:
        from diskwright.cli.help import tool_help

        output.say(version_line(tool) + tool_help(tool))
        return 0
    except VersionWanted:
        output.say(version_line(tool))
        return 0
    if not arguments.operands:
        raise Misused("Not enough arguments")
    name, *rest = arguments.operands
    if name not in tool.commands:
        raise Misused(f"Command not found: {name}")
    return run_command(tool, tool.load(name), rest)


def version_line(tool: Tool) -> str:
    """The line of `--version`."""
    from diskwright import __version__

    return f"{tool.name} version {__version__}\nCopyright (c) the Diskwright authors, Apache-2.0\n"


def run_command(tool: Tool, command: Command, words: Sequence[str]) -> int:
    """Run one command with the words after its name."""
    name = f"{tool.name} {command.name}"
    arguments = Arguments(tool.name, friendly=tool.friendly)
    flags = command.flags
    if tool.friendly:
        from diskwright.cli.flags import ALLOW_REFERENCES

        flags = (*flags, ALLOW_REFERENCES)
    parser = Parser(flags, name, negative_operand=command.name == "resize")

    def heard(words: str, kind: str) -> None:
        words = without_controls(words) if arguments.friendly else words
        output.complain(output.noticed(tool.name, words, kind))

    from diskwright.block.cancel import cancellable
    from diskwright.block.notice import listening
    from diskwright.cli.interrupt import CANCEL, heeded

    try:
        with listening(heard):
            parser.parse(words, arguments)
            with heeded(), cancellable(CANCEL):
                return command.run(arguments)
    except HelpWanted:
        from diskwright.cli.help import command_help

        output.say(command_help(tool, command, flags))
        return 0
    except Misused as error:
        complain_misuse(error, tool.name, name)
        return 1
    except CancelledError as error:
        words = f"{tool.name}: {command.name} was interrupted"
        if error.path is not None:
            words += f"; '{error.path}' is incomplete"
        output.complain(without_controls(words) if tool.friendly else words)
        return CANCEL.exit_code
    except DiskwrightError as error:
        report(error, arguments)
    except OSError as error:
        output.complain(f"{tool.name}: {error.strerror or error}")
    except (MemoryError, RecursionError) as error:
        output.complain(f"{tool.name}: {type(error).__name__}: {error}")
    return command.failure


def complain_misuse(error: Misused, program: str, help_of: str) -> None:
    """Say what is wrong with the command line, and where the help is."""
    words = error.message if error.field == "getopt" else f"{program}: {error.message}"
    output.complain(f"{words}\nTry '{help_of} --help' for more info")


def report(error: DiskwrightError, arguments: Arguments) -> None:
    """Print an error; where QEMU's line cannot be meant, with what can be done about it."""
    words = error.qemu_message
    if arguments.friendly and "\n" in words:
        words = error.message  # a name in QEMU's could have forged a line
    others = [holder for holder in getattr(error, "holders", ()) if holder[0] != os.getpid()]
    if others:
        who = ", ".join(f"process {pid} ({command})" for pid, command in others)
        words += f"\nIt is in use by {who}."
    if error.hint and (arguments.friendly or error.hint_always):
        words += f"\nhint: {error.hint}"
    if arguments.friendly:
        words = "\n".join(map(without_controls, words.split("\n")))
    if error.then:
        words += f"\n{arguments.program}: {error.then}"
    output.complain(f"{arguments.program}: {words}")


def warn(arguments: Arguments, words: str) -> None:
    """Print a warning."""
    output.complain(f"{arguments.program}: warning: {words}")


def main_of(tool: Tool, argv: Sequence[str] | None) -> int:
    """The `main` of a tool: words of the command line, or `argv`.

    A program of its own ends without taking the interpreter apart: all is closed and written,
    and small commands would spend a third of their time on it.
    """
    if argv is not None:
        return run(tool, argv)
    import gc

    from diskwright.cli.interrupt import heeded

    heeded.for_good = True
    gc.set_threshold(YOUNG)
    os._exit(run(tool, sys.argv[1:]))
