"""`diskwright-io`: the grammar of qemu-io, which reads and writes an image as it is told.

Commands come from -c, or else line by line from standard input. Each is looked up in
`COMMANDS` and its module loaded when it is first used.
"""

from __future__ import annotations

import os
import sys

from diskwright.cli import output
from diskwright.cli.flags import OBJECT
from diskwright.cli.grammar import (
    AllSaid,
    Arguments,
    Flag,
    HelpWanted,
    Misused,
    Parser,
    VersionWanted,
)
from diskwright.cli.io_commands.declaration import Done, IoCommand, Refused, WrongUsage
from diskwright.errors import DiskwrightError, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskwright.cli.io_commands.session import Session

PROGRAM = "diskwright-io"
#: As QEMU's tool writes it: scripts that talk to it wait for this.
PROMPT = "qemu-io> "
_FAMILIES = {
    "asynchronous": "aio_flush aio_read aio_write",
    "breakpoints": "break remove_break resume wait_break",
    "changes": "discard flush truncate",
    "opening": "close open reopen",
    "places": "alloc info length map",
    "process": "abort help quit sigraise sleep",
    "transfer": "read readv write writev",
    "zones": "zone_append zone_close zone_finish zone_open zone_report zone_reset",
}
#: name -> the module of its family
COMMANDS = {name: family for family, names in _FAMILIES.items() for name in names.split()}
ALIASES = {
    "?": "help",
    "a": "alloc",
    "c": "close",
    "d": "discard",
    "f": "flush",
    "i": "info",
    "l": "length",
    "o": "open",
    "q": "quit",
    "r": "read",
    "t": "truncate",
    "w": "write",
    "zap": "zone_append",
    "zc": "zone_close",
    "zf": "zone_finish",
    "zo": "zone_open",
    "zrp": "zone_report",
    "zrs": "zone_reset",
}


def program_flags() -> tuple[Flag, ...]:
    """The options of the program itself."""
    from diskwright.cli.io_commands.opening import OPEN_FLAGS

    return (
        OBJECT,
        Flag("", "image-opts", help="FILE is a list of options (driver=qcow2,file.filename=...)"),
        Flag("c", "cmd", "COMMAND", "do this; may be said several times", repeats=True),
        Flag("f", "format", "FMT", "the image's format; it is probed by default"),
        *OPEN_FLAGS,
        Flag("m", "misalign", help="have buffers not aligned as direct access wants them"),
        Flag("T", "trace", "PATTERN", "accepted; there are no trace events here", repeats=True),
        Flag("h", "help", help="show this help and exit"),
        Flag("V", "version", help="show the version and exit"),
    )


def load(name: str) -> IoCommand:
    """The command with this name, which must be one."""
    from diskwright.block.loading import load_named

    loaded: IoCommand = load_named(f"diskwright.cli.io_commands.{COMMANDS[name]}:{name.upper()}")
    return loaded


def find_command(word: str) -> IoCommand | None:
    """The command that a word names, perhaps in short, or None."""
    name = ALIASES.get(word, word)
    return load(name) if name in COMMANDS else None


# --------------------------------------------------------------------------- one command


def execute(session: Session, line: str) -> bool:
    """Do what a line says; whether it could be done."""
    words = [word for word in line.split(" ") if word]
    if not words:
        return True
    command = find_command(words[0])
    if command is None:
        output.complain(f'command "{words[0]}" not found')
        return False
    if command.needs_image and not session.is_open:
        output.complain("no file open, try 'help open'")
        return False
    refusal = command.count_refusal(words[0], len(words) - 1)
    if refusal is not None:
        output.complain(refusal)
        return False
    if command.writes and session.node.read_only:
        output.complain(f"{session.program}: Block node is read-only")
        return False
    return _do(session, command, words)


def _do(session: Session, command: IoCommand, words: list[str]) -> bool:
    arguments = Arguments(session.program)
    try:
        command.parse(words[0], words[1:], arguments)
        command.run(session, arguments)
    except Done:
        return True
    except Refused as error:
        output.say("".join(f"{line}\n" for line in error.args))
    except WrongUsage:
        output.say(f"{command.usage}\n")
    except Misused as error:
        output.complain(error.message)
        output.say(f"{command.usage}\n")
    except DiskwrightError as error:
        session.complain(error)
    except OSError as error:
        output.complain(f"{session.program}: {error.strerror or error}")
    except (MemoryError, RecursionError) as error:
        output.complain(f"{session.program}: {type(error).__name__}: {error}")
    else:
        return True
    return False


# --------------------------------------------------------------------------- the program


def run(words: Sequence[str]) -> int:
    """Run the program with these words; returns its exit code."""
    arguments = Arguments(PROGRAM)
    flags = program_flags()
    try:
        code = _run(arguments, flags, words)
    except AllSaid:
        code = 0
    except HelpWanted:
        output.say(_usage(flags))
        code = 0
    except VersionWanted:
        from diskwright.cli.run import Tool, version_line

        output.say(version_line(Tool(PROGRAM, "", commands={})))
        code = 0
    except Misused as error:
        if error.message:
            output.complain(error.message)
        output.say(_usage(flags))
        code = 1
    except DiskwrightError as error:
        from diskwright.cli.run import report

        report(error, arguments)
        code = 1
    try:
        output.end()
    except OSError as error:
        output.complain(f"{PROGRAM}: Could not write to standard output: {error.strerror}")
        code = code or 1
    return code


def _usage(flags: Sequence[Flag]) -> str:
    from diskwright.cli.io_commands.help import program_help

    return program_help(PROGRAM, flags)


def _run(arguments: Arguments, flags: Sequence[Flag], words: Sequence[str]) -> int:
    Parser(flags, PROGRAM).parse(words, arguments)
    if len(arguments.operands) > 1:
        raise Misused("")
    if arguments.flag("format") and arguments.flag("image-opts"):
        raise OptionError("--image-opts and -f are mutually exclusive")
    from diskwright.block.notice import listening
    from diskwright.cli.io_commands.session import Session

    session = Session(PROGRAM)
    session.misaligned = arguments.flag("misalign")
    with listening(session.hear):
        _open_first(session, arguments)
        given = arguments.texts("cmd") if arguments.flag("cmd") else _lines(session)
        failed = False
        for line in given:
            failed |= not execute(session, line)
            if session.ended:
                break
        session.close()
    return int(failed)


def _open_first(session: Session, arguments: Arguments) -> None:
    """Open the image of the command line, if there is one."""
    if not arguments.operands:
        return
    from diskwright.cli.io_commands import opening

    (name,) = arguments.operands
    if not arguments.flag("image-opts"):
        opening.open_as_said(session, arguments, name, format=arguments.text("format"))
        return
    options = opening.plain_options(session, name)
    opening.open_as_said(session, arguments, None, options=options)


def _lines(session: Session) -> Iterator[str]:
    """What is written to standard input, line by line."""
    person = sys.stdin.isatty()
    if person:
        _edit_lines()
    while True:
        line = _typed_line(session) if person else _piped_line()
        if line is None:
            return
        yield line


def _edit_lines() -> None:
    """Have `input` edit lines, keep a history, and complete names of commands."""
    import readline

    readline.set_completer(completion)
    readline.set_completer_delims("")  # a name stands at the line's beginning only
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set show-all-if-ambiguous on")


def completion(line: str, number: int) -> str | None:
    """What a line that is being typed may become, by number; None behind the last one."""
    names = sorted(name for name in COMMANDS if name.startswith(line))
    if number >= len(names):
        return None
    return names[number] if len(names) > 1 else f"{names[0]} "


def _typed_line(session: Session) -> str | None:
    """The next line that a person types; requests that end meanwhile are reported at once."""
    output.flush()
    session.outstanding.print_at_once(True)
    try:
        return input(PROMPT)
    except EOFError:
        output.say("\n")  # the shell's own prompt shall not stand behind this one
        return None
    finally:
        session.outstanding.print_at_once(False)


def _piped_line() -> str | None:
    """The next line of a file or a pipe."""
    output.say(PROMPT)
    output.flush()
    line = os.fsdecode(sys.stdin.buffer.readline())
    return line.removesuffix("\n") if line else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code.

    A program of its own ends at once on SIGINT, and without taking the interpreter apart.
    """
    if argv is not None:
        return run(argv)
    from diskwright.cli.start import end_on_interrupt

    end_on_interrupt()
    os._exit(run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
