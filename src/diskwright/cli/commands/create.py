"""`create`: make a new image."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.create_options import joined_options, print_options, wants_list
from diskwright.cli.grammar import Arguments, Command, Flag, Misused
from diskwright.cli.run import warn
from diskwright.errors import DiskwrightError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.operations.create import Created


def run(arguments: Arguments) -> int:
    """Make an image."""
    format = arguments.text_or("format", "raw")
    words = arguments.texts("options")
    if wants_list(words):
        return print_options(format, (arguments.operands or [""])[0])
    if not arguments.operands:
        raise Misused("Expecting image file name")
    size = _size_of(arguments)
    if len(arguments.operands) > 2:
        raise Misused(f"Unexpected argument: {arguments.operands[2]}")
    from diskwright.operations.create import NewImage, create_image

    wanted = NewImage(
        arguments.operands[0],
        format=format,
        size=size,
        options=joined_options(words),
        backing=arguments.text("backing"),
        backing_format=arguments.text("backing-format"),
        check_backing=not arguments.flag("backing-unsafe"),
        policy=flags.policy_of(arguments),
        as_qemu=not arguments.friendly,
    )
    made = create_image(wanted, announce=None if arguments.flag("quiet") else _announce)
    if arguments.friendly and made.backing is not None:
        _warn_of_lost_parent(arguments, made)
    return 0


def _warn_of_lost_parent(arguments: Arguments, made: Created) -> None:
    """A format without room for a name may not find the parent again that it was made of."""
    from diskwright.operations.create import creatable
    from diskwright.operations.opening import Image, open_image

    if not creatable(made.format).parent_option:
        return
    try:
        open_image(Image(made.name, format=made.format, policy=flags.policy_of(arguments))).close()
    except DiskwrightError as error:
        warn(arguments, f"{error.message}; {error.hint}" if error.hint else error.message)


def _announce(line: str) -> None:
    output.say(f"{line}\n")
    output.flush()


def _size_of(arguments: Arguments) -> int | None:
    if len(arguments.operands) < 2:
        return None
    from diskwright.operations.create import size_of

    return size_of(arguments.operands[1])


COMMAND = Command(
    "create",
    "Make a new image",
    operands="FILENAME [SIZE]",
    flags=(
        flags.HELP,
        flags.QUIET,
        Flag("f", "format", "FMT", "the new image's format; raw by default"),
        flags.OBJECT,
        Flag(
            "o",
            "options",
            "OPTIONS",
            "options of the format (a list: -o help)",
            repeats=True,
            parse=flags.option_list,
        ),
        Flag("b", "backing", "BACKING", "what shows through where the image has nothing"),
        Flag("F", "backing-format", "FMT", "the backing file's format"),
        Flag("u", "backing-unsafe", help="do not look whether the backing file is there"),
    ),
    run=run,
    notes="SIZE is a number of bytes, with k, M, G, T, P or E as suffix (powers of 1024). It may\n"
    "be left out where there is a backing file.",
)
