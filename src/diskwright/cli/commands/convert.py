"""`convert`: write what images show into another image."""

from __future__ import annotations

from diskwright.cli import flags
from diskwright.cli.create_options import joined_options, print_options, wants_list
from diskwright.cli.grammar import Arguments, Command, Flag
from diskwright.cli.images import image_of
from diskwright.cli.run import report, warn
from diskwright.errors import DiskwrightError, OptionError, strerror_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.cli.progress import Progress
    from diskwright.operations.convert import Target
    from diskwright.operations.copy import Copying

SPARSE_BYTES = 4096
MAX_SPARSE_BYTES = 16 << 20
MAX_THREADS = 16


class Sparse(flags.number_of):
    """The value of -S."""

    def __call__(self, value: str) -> int:
        """Bytes, in whole sectors."""
        found = super().__call__(value)
        if found % 512 or found > MAX_SPARSE_BYTES:
            raise OptionError(
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of "
                f"512 up to {MAX_SPARSE_BYTES}. Select 0 to disable sparse detection "
                "(fully allocates output)."
            )
        return found


def run(arguments: Arguments) -> int:
    """Copy images into a new or an existing one."""
    format = arguments.text_or("output-format", "raw")
    words = arguments.texts("options")
    if wants_list(words):
        return print_options(format, (arguments.operands[1:] or [""])[-1])
    _check_flags(arguments)
    if len(arguments.operands) < 2:
        raise OptionError("Must specify image file name")
    from diskwright.cli.progress import Progress

    cache = flags.cache_of(arguments, "source-cache", source=True)
    progress = Progress(arguments.flag("progress") and not arguments.flag("quiet"))
    progress.begin()
    try:
        _convert(arguments, format, cache, progress)
        progress.all_done()
    except OptionError as error:
        if error.field != "target_is_zero" or arguments.friendly:
            raise
        report(error, arguments)  # and QEMU's tool ends as if all were well
        progress.all_done()
    finally:
        progress.end()
    return 0


def _convert(arguments: Arguments, format: str, cache: str | None, progress: Progress) -> None:
    from diskwright.cli.interrupt import CANCEL
    from diskwright.operations.convert import convert_images
    from diskwright.operations.workers import Steering

    flags.exclude_format(arguments, "source-format")
    flags.exclude_format(arguments, "output-format", "target-image-opts")
    target = _target_of(arguments, format)
    sources = [
        image_of(arguments, name, format=arguments.text("source-format"), cache=cache)
        for name in arguments.operands[:-1]
    ]
    convert_images(
        sources,
        target,
        copying=_copying_of(arguments),
        steering=Steering(
            progress=progress,
            cancel=CANCEL,
            rate=arguments.number("rate") or 0,
            threads=arguments.number("parallel") or Steering().threads,
        ),
        snapshot=arguments.text("snapshot"),
    )


def _check_flags(arguments: Arguments) -> None:
    """What does not go together, in the order in which QEMU's tool looks."""
    if arguments.flag("skip-broken-bitmaps") and not arguments.flag("bitmaps"):
        raise OptionError("Use of --skip-broken-bitmaps requires --bitmaps")
    offload = arguments.flag("copy-range-offloading")
    if offload and arguments.flag("compress"):
        raise OptionError("Cannot enable copy offloading when -c is used")
    if offload and arguments.flag("sparse-size"):
        raise OptionError("Cannot enable copy offloading when -S is used")
    if offload and arguments.flag("salvage"):
        raise OptionError("Cannot use copy offloading in salvaging mode")
    if arguments.flag("target-image-opts") and not arguments.flag("no-create"):
        raise OptionError("--target-image-opts requires use of -n flag")
    if arguments.flag("target-is-zero") and not arguments.flag("no-create"):
        raise OptionError("--target-is-zero requires use of -n flag")
    if arguments.flag("no-create") and arguments.flag("options"):
        raise OptionError("-o has no effect when skipping image creation")


def _target_of(arguments: Arguments, format: str) -> Target:
    from diskwright.operations.convert import Target

    name = arguments.operands[-1]
    cache = arguments.text_or("output-cache", "unsafe")
    image = None
    if arguments.flag("no-create"):
        known = None if arguments.flag("target-image-opts") else format
        image = image_of(arguments, name, format=known, cache=cache, switch="target-image-opts")
        image.force_share = False
        image.unmaps_unasked = arguments.number("sparse-size") != 0
    return Target(
        name,
        format=format,
        options=joined_options(arguments.texts("options")),
        backing=arguments.text("backing"),
        backing_format=arguments.text("backing-format"),
        image=image,
        cache=cache,
        policy=flags.policy_of(arguments),
        as_qemu=not arguments.friendly,
    )


def _copying_of(arguments: Arguments) -> Copying:
    from diskwright.operations.copy import Copying

    def salvaged(offset: int, error: DiskwrightError) -> None:
        """Say which sector could not be read; zeroes stand in its place."""
        if not arguments.flag("quiet"):
            warn(arguments, f"error while reading offset {offset}: {strerror_of(error)}")

    def unmapped(offset: int, error: DiskwrightError) -> None:
        """Say which sector is read without knowing what it is."""
        if not arguments.flag("quiet"):
            sentence = f"error while reading block status at offset {offset}"
            warn(arguments, f"{sentence}: {strerror_of(error)}")

    sparse = arguments.number("sparse-size")
    return Copying(
        compress=arguments.flag("compress"),
        sparse_bytes=SPARSE_BYTES if sparse is None else sparse,
        offload=arguments.flag("copy-range-offloading") or None,
        salvage=salvaged if arguments.flag("salvage") else None,
        unmapped=unmapped,
        target_is_zero=arguments.flag("target-is-zero"),
        bitmaps=arguments.flag("bitmaps"),
        skip_broken_bitmaps=arguments.flag("skip-broken-bitmaps"),
        in_order=not arguments.flag("oob-writes"),
    )


COMMAND = Command(
    "convert",
    "Write what one image shows, or several one after the other, into another",
    operands="SOURCE [SOURCE2 ...] TARGET",
    flags=(
        flags.HELP,
        flags.QUIET,
        Flag("p", "", help="show how far it is", key="progress"),
        Flag("", "source-image-opts", help="SOURCE is a list of options", key="image-opts"),
        Flag("f", "source-format", "FMT", "the sources' format; it is probed by default"),
        Flag("", "image-opts", help="the same", hidden=True),
        Flag("T", "source-cache", "CACHE", "cache mode of the sources; writeback by default"),
        Flag(
            "l",
            "snapshot",
            "SNAPSHOT",
            "read this internal snapshot: an id or else a name",
            parse=flags.snapshot_words,
        ),
        flags.OBJECT,
        Flag("O", "output-format", "FMT", "the target's format; raw by default"),
        Flag("", "target-image-opts", help="TARGET is a list of options (needs -n)"),
        Flag(
            "o",
            "options",
            "OPTIONS",
            "options of the target's format (a list: -o help)",
            repeats=True,
            parse=flags.option_list,
        ),
        Flag("t", "output-cache", "CACHE", "cache mode of the target; unsafe by default"),
        Flag("c", "", help="store compressed clusters", key="compress"),
        Flag("B", "backing", "BACKING", "what shows through; only what differs is stored"),
        Flag("F", "backing-format", "FMT", "the backing file's format"),
        Flag("n", "", help="write into an image that is there", key="no-create"),
        Flag("", "target-is-zero", help="it reads as zero already (needs -n)"),
        Flag(
            "S",
            "sparse-size",
            "SIZE",
            "zeroes of this length are not stored; 0 stores all",
            parse=Sparse("buffer size for sparse output"),
        ),
        Flag("", "bitmaps", help="copy dirty bitmaps too"),
        flags.SHARE,
        Flag("r", "rate", "RATE", "bytes a second at most", parse=flags.number_of("rate limit")),
        Flag(
            "m",
            "parallel",
            "COUNT",
            "how many pieces are worked on at a time",
            parse=flags.count_of("number of coroutines", 1, MAX_THREADS),
        ),
        Flag("W", "oob-writes", help="write pieces as they come, which scatters the target's file"),
        Flag("C", "copy-range-offloading", help="let the system copy, where it can"),
        Flag("", "salvage", help="put zeroes where a source cannot be read"),
        Flag("", "skip-broken-bitmaps", help="leave out bitmaps that are not in order"),
    ),
    run=run,
)
