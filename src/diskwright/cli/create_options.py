"""`-o`: create options as `create` and `convert` take them, and the list of `-o help`."""

from __future__ import annotations

from diskwright.cli import output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def wants_list(words: Sequence[str]) -> bool:
    """Whether one of the values of -o asks for the list of options."""
    from diskwright.block.options import wants_help

    return any(wants_help(text) for text in words)


def joined_options(words: Sequence[str]) -> dict[str, object]:
    """All values of -o as one dict; a later word wins."""
    from diskwright.block.options import parse_words

    given: dict[str, object] = {}
    for text in words:
        given.update(parse_words(text))
    return given


def print_options(format: str, name: str) -> int:
    """Print the options of a format, with those of what `name` lies in."""
    from diskwright.operations.create import creatable, create_options

    if name:
        output.say(create_options(format, name).help_text() + "\n")
        return 0
    declared = creatable(format).create_options
    output.say(declared.help_text(f"Supported {format} options:") + "\n")
    output.say(
        "\nThe protocol level may support further options.\n"
        "Specify the target filename to include those options.\n"
    )
    return 0
