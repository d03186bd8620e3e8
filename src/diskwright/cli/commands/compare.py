"""`compare`: do two images show the same disk."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command, Flag, Misused
from diskwright.cli.images import image_of
from diskwright.cli.run import report
from diskwright.errors import DiskwrightError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.cli.progress import Progress
    from diskwright.operations.compare import Compared

SAME, DIFFERENT, FAILED, NO_ALLOCATION, NO_CONTENT = 0, 1, 2, 3, 4


def run(arguments: Arguments) -> int:
    """Compare two images; the exit code says what came out."""
    if len(arguments.operands) != 2:
        raise Misused("Expecting two image file names")
    from diskwright.cli.progress import Progress
    from diskwright.operations.compare import ALLOCATION, CONTENT

    quiet = arguments.flag("quiet")
    progress = Progress(arguments.flag("progress") and not quiet, step=2.0)
    progress.begin_later()
    try:
        found = _compare(arguments, progress, None if quiet else _say_line)
    except DiskwrightError as error:
        if error.field not in (ALLOCATION, CONTENT):
            raise
        report(error, arguments)
        return NO_ALLOCATION if error.field == ALLOCATION else NO_CONTENT
    finally:
        progress.end()
    return SAME if found.identical else DIFFERENT


def _compare(
    arguments: Arguments, progress: Progress, notice: Callable[[str], None] | None
) -> Compared:
    from diskwright.cli.interrupt import CANCEL
    from diskwright.operations.compare import compare_images
    from diskwright.operations.opening import open_image
    from diskwright.operations.workers import Steering

    cache = flags.cache_of(arguments, "cache", source=True)
    flags.exclude_format(arguments, "first")
    first, second = (
        image_of(arguments, name, format=arguments.text(key), cache=cache)
        for name, key in zip(arguments.operands, ("first", "second"), strict=True)
    )
    if arguments.flag("second") and arguments.flag("image-opts"):
        open_image(first).close()  # QEMU's tool looks at the second one's options after this
        flags.exclude_format(arguments, "second")
    return compare_images(
        first,
        second,
        strict=arguments.flag("strict"),
        steering=Steering(progress=progress, cancel=CANCEL),
        notice=notice,
        opened=progress.begin,
    )


def _say_line(line: str) -> None:
    output.say(f"{line}\n")


COMMAND = Command(
    "compare",
    "Compare what two images show",
    operands="FILENAME1 FILENAME2",
    flags=(
        flags.HELP,
        flags.QUIET,
        flags.PROGRESS,
        Flag("f", "a-format", "FMT", "the first image's format", key="first"),
        Flag("", "left-format", "FMT", "the same", key="first", hidden=True),
        Flag("F", "b-format", "FMT", "the second image's format", key="second"),
        Flag("", "right-format", "FMT", "the same", key="second", hidden=True),
        flags.IMAGE_OPTS,
        Flag("s", "strict", help="sizes and allocated ranges must be the same too"),
        Flag("T", "cache", "CACHE", "cache mode of both images"),
        flags.SHARE,
        flags.OBJECT,
    ),
    run=run,
    failure=FAILED,
    notes="Exit codes: 0 they show the same, 1 they do not, 2 an image could not be opened,\n"
    "4 it could not be read.",
)
