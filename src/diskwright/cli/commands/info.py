"""`info`: what an image is."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command, Flag
from diskwright.cli.images import image_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.operations.info import ImageInfo


def run(arguments: Arguments) -> int:
    """Describe an image, and with -b those it builds on."""
    name = flags.only_operand(arguments)
    flags.exclude_format(arguments)
    from diskwright.operations.info import examine

    chain = arguments.flag("backing-chain")
    image = image_of(arguments, name, format=arguments.text("format"))
    found = examine(image, chain=chain).chain()
    if arguments.text("output") == "json":
        _print_json(found, chain)
    else:
        _print_text(found, escaped=arguments.friendly)
    return 0


def _print_json(found: list[ImageInfo], chain: bool) -> None:
    from diskwright.cli import json_output

    members = [json_output.info_members(image) for image in found]
    output.say(json_output.dumps(members if chain else members[0]) + "\n")


def _print_text(found: list[ImageInfo], *, escaped: bool) -> None:
    from diskwright.cli import text

    for number, image in enumerate(found):
        if number:
            output.say("\n")
        output.say_lines(text.info_lines(image), escaped=escaped)


COMMAND = Command(
    "info",
    "Describe an image: format, size, snapshots, what it builds on",
    operands="FILENAME",
    flags=(
        flags.HELP,
        *flags.IMAGE,
        Flag("b", "backing-chain", help="describe the whole chain of backing files"),
        flags.SHARE,
        flags.OUTPUT,
        flags.OBJECT,
    ),
    run=run,
)
