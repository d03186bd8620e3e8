"""`amend`: change what an image was made with."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.create_options import joined_options, wants_list
from diskwright.cli.grammar import Arguments, Command, Flag, Misused
from diskwright.cli.images import image_of, warn_of_guess
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.options import Options
    from diskwright.cli.progress import Progress


def run(arguments: Arguments) -> int:
    """Amend an image, or list what can be."""
    words = arguments.texts("options")
    if not words:
        raise Misused("Must specify options (-o)")
    wants = wants_list(words)
    format = arguments.text("format")
    if wants and format:
        return _print_options(format)
    if len(arguments.operands) != 1:
        raise OptionError("Expecting one image file name", field="filename")
    from diskwright.cli.progress import Progress

    progress = Progress(arguments.flag("progress") and not arguments.flag("quiet"))
    progress.begin_later()
    try:
        return _amend(arguments, {} if wants else joined_options(words), progress, wants=wants)
    finally:
        if progress.was_written:
            progress.all_done()
        progress.end()


def _amend(
    arguments: Arguments, words: dict[str, object], progress: Progress, *, wants: bool
) -> int:
    from diskwright.operations.amend import amend_image, amendable

    cache = flags.cache_of(arguments, "cache")
    flags.exclude_format(arguments)
    (name,) = arguments.operands
    image = image_of(arguments, name, format=arguments.text("format"), cache=cache)
    if wants:
        from diskwright.operations.opening import open_image

        with open_image(image, read_only=False) as node:
            _say_options(node.driver, amendable(node))
        return 0
    amend_image(image, words, progress=progress, opened=warn_of_guess)
    return 0


def _print_options(format: str) -> int:
    """The options of a format, without an image."""
    from diskwright.operations.amend import amendable
    from diskwright.operations.create import format_class

    _say_options(format, amendable(format_class(format)))
    return 0


def _say_options(format: str, options: Options) -> None:
    output.say(options.help_text(f"Amend options for '{format}':") + "\n")


COMMAND = Command(
    "amend",
    "Change what an image was made with",
    operands="FILENAME",
    flags=(
        flags.HELP,
        flags.QUIET,
        flags.PROGRESS,
        *flags.IMAGE,
        Flag("t", "cache", "CACHE", "cache mode of the image; writeback by default"),
        Flag("", "force", help="accepted; it is about key slots of encrypted images"),
        flags.OBJECT,
        Flag("o", "options", "OPTIONS", "what to change; `help` lists it", repeats=True),
    ),
    run=run,
)
