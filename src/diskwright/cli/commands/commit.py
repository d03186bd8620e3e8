"""`commit`: write what an overlay has into the image below it."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command, Flag
from diskwright.cli.images import image_of, warn_of_guess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node


def run(arguments: Arguments) -> int:
    """Commit an overlay."""
    name = flags.only_operand(arguments)
    cache = flags.cache_of(arguments, "cache")
    flags.exclude_format(arguments)
    from diskwright.cli.interrupt import CANCEL
    from diskwright.cli.progress import Progress
    from diskwright.operations.commit import commit_image
    from diskwright.operations.workers import Steering

    image = image_of(arguments, name, format=arguments.text("format"), cache=cache)
    progress = Progress(arguments.flag("progress") and not arguments.flag("quiet"))

    def opened(node: Node) -> None:
        warn_of_guess(node)
        progress.begin()

    steering = Steering(progress=progress, cancel=CANCEL, rate=arguments.number("rate") or 0)
    base, keep = arguments.text("base"), arguments.flag("drop")
    try:
        commit_image(image, base=base, keep=keep, steering=steering, opened=opened)
        progress.all_done()
    finally:
        progress.end()
    if not arguments.flag("quiet"):
        output.say("Image committed.\n")
    return 0


COMMAND = Command(
    "commit",
    "Write what an overlay has into the image below it",
    operands="FILENAME",
    flags=(
        flags.HELP,
        flags.QUIET,
        flags.PROGRESS,
        *flags.IMAGE,
        Flag("t", "cache", "CACHE", "cache mode; writeback by default"),
        Flag("d", "drop", help="leave the overlay's content where it is too"),
        Flag("b", "base", "BASE", "the image to write into, if it is deeper down (implies -d)"),
        Flag("r", "rate", "RATE", "bytes a second at most", parse=flags.number_of("rate limit")),
        flags.OBJECT,
    ),
    run=run,
)
