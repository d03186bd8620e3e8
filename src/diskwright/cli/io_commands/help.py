"""Help texts, made of the commands' own declarations."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskwright.cli.grammar import Flag
    from diskwright.cli.io_commands.declaration import IoCommand


def command_help(command: IoCommand) -> str:
    """What `help NAME` prints."""
    lines = [command.usage]
    if command.notes:
        lines += ["", *(f" {line}" for line in command.notes.splitlines())]
    if command.flags:
        lines += ["", *(f" {line}" for line in letter_lines(command.flags))]
    return "\n".join(lines) + "\n"


def letter_lines(flags: Sequence[Flag]) -> Iterator[str]:
    """A line an option of one letter."""
    for flag in flags:
        value = f" {flag.metavar}" if flag.metavar else ""
        yield f"-{flag.short}{value}, -- {flag.help}"


def program_help(program: str, flags: Sequence[Flag]) -> str:
    """What `--help` prints, and a wrong call."""
    from diskwright.cli.help import flag_lines

    lines = [
        f"Usage: {program} [OPTIONS]... [-c STRING]... [file]",
        "Reads and writes disk images, one command at a time",
        "",
        *flag_lines(flags),
        "",
        f"See '{program} -c help' for information on available commands.",
    ]
    return "\n".join(lines) + "\n"
