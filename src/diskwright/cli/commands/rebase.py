"""`rebase`: put an overlay on top of another image."""

from __future__ import annotations

from diskwright.cli import flags
from diskwright.cli.grammar import Arguments, Command, Flag, Misused
from diskwright.cli.images import image_of, warn_of_guess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.cli.progress import Progress


def run(arguments: Arguments) -> int:
    """Change an overlay's backing file."""
    name = flags.only_operand(arguments)
    backing = arguments.text("backing")
    if backing is None and not arguments.flag("backing-unsafe"):
        raise Misused("Must specify backing file (-b) or use unsafe mode (-u)")
    from diskwright.cli.progress import Progress

    progress = Progress(arguments.flag("progress") and not arguments.flag("quiet"), step=2.0)
    progress.begin()
    try:
        _rebase(arguments, name, backing, progress)
        progress.all_done()
    finally:
        progress.end()
    return 0


def _rebase(arguments: Arguments, name: str, backing: str | None, progress: Progress) -> None:
    unsafe = arguments.flag("backing-unsafe")
    cache = flags.cache_of(arguments, "cache")
    below_cache = flags.cache_of(arguments, "backing-cache", source=True)
    flags.exclude_format(arguments)
    from diskwright.cli.interrupt import CANCEL
    from diskwright.operations.rebase import Below, rebase_image
    from diskwright.operations.workers import Steering

    image = image_of(arguments, name, format=arguments.text("format"), cache=cache)
    image.force_share = False  # -U is for the new backing file: the overlay is written to
    rebase_image(
        image,
        Below(
            backing or "",
            arguments.text("backing-format"),
            cache=below_cache or "writeback",
            force_share=arguments.flag("force-share"),
        ),
        unsafe=unsafe,
        compress=arguments.flag("compress"),
        steering=Steering(progress=progress, cancel=CANCEL),
        opened=warn_of_guess,
    )


COMMAND = Command(
    "rebase",
    "Put an overlay on top of another image, or of none",
    operands="FILENAME",
    flags=(
        flags.HELP,
        flags.QUIET,
        flags.PROGRESS,
        flags.SHARE,
        *flags.IMAGE,
        Flag("t", "cache", "CACHE", "cache mode of the overlay; writeback by default"),
        Flag("c", "compress", help="store compressed what has to be copied into it"),
        Flag("b", "backing", "BACKING", 'the new backing file; "" for none'),
        Flag("F", "backing-format", "FMT", "its format"),
        Flag("T", "backing-cache", "CACHE", "cache mode of the backing files"),
        Flag("u", "backing-unsafe", help="change the name only, whatever the image shows then"),
        flags.OBJECT,
    ),
    run=run,
)
