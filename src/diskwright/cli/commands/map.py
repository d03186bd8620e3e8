"""`map`: where the bytes of an image lie."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command, Flag
from diskwright.cli.images import image_of
from diskwright.errors import DiskwrightError, IOFailure, UnsupportedError, strerror_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from diskwright.operations.map import MapEntry


def run(arguments: Arguments) -> int:
    """Print the runs of an image."""
    name = flags.only_operand(arguments)
    flags.exclude_format(arguments)
    from diskwright.operations.map import entries
    from diskwright.operations.opening import open_image

    image = image_of(arguments, name, format=arguments.text("format"))
    start = arguments.number("start-offset") or 0
    with open_image(image) as node:
        found = _as_read(entries(node, start, arguments.number("max-length")))
        if arguments.text("output") == "json":
            _print_json(found, start)
        else:
            _print_text(found, escaped=arguments.friendly)
    return 0


def _as_read(found: Iterable[MapEntry]) -> Iterator[MapEntry]:
    """The runs; where they cannot be read, with the sentence that QEMU's tool puts first."""
    try:
        yield from found
    except DiskwrightError as error:
        words = strerror_of(error) if isinstance(error, IOFailure) else error.qemu_message
        error.qemu = f"Could not read file metadata: {words}"
        raise


def _print_json(found: Iterable[MapEntry], start: int) -> None:
    """All runs; an empty range is one run of length zero, as QEMU's tool prints it."""
    from diskwright.cli.json_output import map_line
    from diskwright.operations.map import MapEntry

    output.say("[")
    before = ""
    for entry in found:
        output.say(before + map_line(entry))
        before = ",\n"
    if not before:
        output.say(map_line(MapEntry(start, 0)))
    output.say("]\n")


def _print_text(found: Iterable[MapEntry], *, escaped: bool) -> None:
    """The runs that lie in a file as they are."""
    from diskwright.cli.text import MAP_HEAD, map_line

    output.say(f"{MAP_HEAD}\n")
    for entry in found:
        if not entry.data or entry.zero:
            continue
        if entry.offset is None:
            raise UnsupportedError(
                "File contains external, encrypted or compressed clusters.",
                hint="--output=json shows those too",
            )
        output.say_lines([map_line(entry)], escaped=escaped)


COMMAND = Command(
    "map",
    "Show where the bytes of an image lie, through all its backing files",
    operands="FILENAME",
    flags=(
        flags.HELP,
        *flags.IMAGE,
        Flag("s", "start-offset", "OFFSET", "begin there", parse=flags.number_of("start offset")),
        Flag("l", "max-length", "LENGTH", "look so far", parse=flags.number_of("max length")),
        flags.OUTPUT,
        flags.SHARE,
        flags.OBJECT,
    ),
    run=run,
)
