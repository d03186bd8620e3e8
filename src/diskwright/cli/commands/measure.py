"""`measure`: how long the file of a new image would be."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.create_options import joined_options
from diskwright.cli.grammar import Arguments, Command, Flag
from diskwright.cli.images import image_of
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.info import Measured


def _size_of(value: str) -> int:
    from diskwright.operations.create import size_of

    return size_of(value)


def run(arguments: Arguments) -> int:
    """Print what a new image would take."""
    _check_request(arguments)
    format = arguments.text_or("target-format", "raw")
    found = _measured(arguments, format)
    if arguments.text("output") == "json":
        from diskwright.cli import json_output

        output.say(json_output.dumps(json_output.measure_members(found)) + "\n")
    else:
        from diskwright.cli import text

        output.say_lines(text.measure_lines(found))
    return 0


def _check_request(arguments: Arguments) -> None:
    operands, sized = arguments.operands, arguments.flag("size")
    if len(operands) > 1:
        raise OptionError("At most one filename argument is allowed.")
    if not operands and any(map(arguments.flag, ("image-opts", "format", "snapshot"))):
        raise OptionError("--image-opts, -f, and -l require a filename argument.")
    if not operands and not sized:
        raise OptionError("Either --size N or one filename must be specified.")
    if operands and sized:
        raise OptionError("--size N cannot be used together with a filename.")


def _measured(arguments: Arguments, format: str) -> Measured:
    from diskwright.operations.measure import measure_image, measure_size

    options = joined_options(arguments.texts("options"))
    size = arguments.number("size")
    if size is not None:
        return measure_size(size, format, options)
    flags.exclude_format(arguments)
    image = image_of(arguments, arguments.operands[0], format=arguments.text("format"))
    return measure_image(image, format, options, snapshot=arguments.text("snapshot"))


COMMAND = Command(
    "measure",
    "Tell how long the file of a new image would be",
    operands="(--size SIZE | FILENAME)",
    flags=(
        flags.HELP,
        Flag("O", "target-format", "FMT", "the new image's format; raw by default"),
        Flag(
            "o",
            "options",
            "OPTIONS",
            "create options of its format",
            repeats=True,
            parse=flags.option_list,
        ),
        *flags.IMAGE,
        Flag(
            "l",
            "snapshot",
            "SNAPSHOT",
            "measure this internal snapshot: an id or else a name",
            parse=flags.snapshot_words,
        ),
        Flag("", "size", "SIZE", "of a new, empty image", parse=_size_of),
        flags.OBJECT,
        flags.OUTPUT,
        flags.SHARE,
    ),
    run=run,
    notes="FILENAME is an image that is going to be converted. Only raw and qcow2 can be measured.",
)
