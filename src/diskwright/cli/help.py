"""Help texts, made of the commands' own declarations."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskwright.cli.grammar import Command, Flag
    from diskwright.cli.run import Tool

_INDENT = "  "


def tool_help(tool: Tool) -> str:
    """What `--help` of the program prints."""
    from diskwright.block import registry
    from diskwright.cli.run import STANDARD_FLAGS

    formats = {**registry.FORMATS, **registry.PROTOCOLS, **registry.FILTERS}
    commands = [tool.load(name) for name in tool.commands]
    lines = [
        f"{tool.title}.  Usage:",
        "",
        f"{_INDENT}{tool.name} [standard options] COMMAND [--help | command options]",
        "",
        "Standard options:",
        *flag_lines(STANDARD_FLAGS),
        "",
        f"Commands (each has its own help: {tool.name} COMMAND --help):",
        "",
        *(f"{_INDENT}{command.name} - {command.summary}" for command in commands),
        "",
        "Supported image formats:",
        "",
        f"{_INDENT}{' '.join(sorted(formats))}",
    ]
    return "\n".join(lines) + "\n"


def command_help(tool: Tool, command: Command, flags: Sequence[Flag]) -> str:
    """What `COMMAND --help` prints."""
    lines = [
        f"{command.summary}.  Usage:",
        "",
        f"{_INDENT}{tool.name} {command.name} [options] {command.operands}",
        "",
        "Options:",
        *flag_lines(flags),
    ]
    if command.notes:
        lines += ["", *command.notes.splitlines()]
    return "\n".join(lines) + "\n"


def flag_lines(flags: Sequence[Flag]) -> Iterator[str]:
    """Two lines an option: how it is written, and what it does."""
    for flag in flags:
        if flag.hidden:
            continue
        yield f"{_INDENT}{', '.join(flag.words)}{flag.value_text}"
        yield f"{_INDENT}   {flag.help}"
