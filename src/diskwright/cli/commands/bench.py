"""`bench`: many requests at a time, and how long they take."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command, Flag
from diskwright.cli.images import image_of, warn_of_guess
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node
    from diskwright.operations.bench import Load

_MAX_INT = (1 << 31) - 1


def _aio_of(value: str) -> str:
    if value not in ("threads", "native", "io_uring"):
        raise OptionError(f"Invalid aio option: {value}")
    return value


def _cache_of(value: str) -> str:
    from diskwright.block.common_options import CACHE_MODES

    if value not in CACHE_MODES:
        raise OptionError("Invalid cache mode", hint=f"one of {', '.join(CACHE_MODES)}")
    return value


def run(arguments: Arguments) -> int:
    """Put a load on an image."""
    name = flags.only_operand(arguments)
    load = _load_of(arguments)
    flags.exclude_format(arguments)
    from diskwright.cli.interrupt import CANCEL
    from diskwright.operations.bench import bench_image

    image = image_of(
        arguments, name, format=arguments.text("format"), cache=arguments.text("cache")
    )
    image.aio = "native" if arguments.flag("native") else arguments.text("aio") or "threads"

    def opened(node: Node) -> None:
        if load.pattern is not None:
            warn_of_guess(node)
        _announce(load)

    done = bench_image(image, load, cancel=CANCEL, opened=opened)
    output.say(f"Run completed in {done.seconds:3.3f} seconds.\n")
    return 0


def _load_of(arguments: Arguments) -> Load:
    from diskwright.operations.bench import Load

    def number(key: str, default: int) -> int:
        given = arguments.number(key)
        return default if given is None else given

    return Load(
        number("count", 75000),
        depth=number("depth", 64),
        length=number("buffer-size", 4096),
        offset=number("offset", 0),
        step=number("step-size", 0),
        pattern=number("pattern", 0) if arguments.flag("write") else None,
        flush_interval=number("flush-interval", 0),
        drain=not arguments.flag("no-drain"),
    )


def _announce(load: Load) -> None:
    kind = "read" if load.pattern is None else "write"
    output.say(
        f"Sending {load.count} {kind} requests, {load.length} bytes each, {load.depth} in parallel "
        f"(starting at offset {load.offset}, step size {load.step})\n"
    )
    if load.flush_interval:
        output.say(f"Sending flush every {load.flush_interval} requests\n")


COMMAND = Command(
    "bench",
    "Put many requests at a time on an image, and tell how long they take",
    operands="FILENAME",
    flags=(
        flags.HELP,
        Flag("q", "", help="accepted; what there is to say is said", key="quiet"),
        *flags.IMAGE,
        Flag("t", "cache", "CACHE", "cache mode; writeback by default", parse=_cache_of),
        Flag(
            "c",
            "count",
            "COUNT",
            "how many requests; 75000 by default",
            parse=flags.count_of("request count", 1, _MAX_INT),
        ),
        Flag(
            "d",
            "depth",
            "DEPTH",
            "how many at a time; 64 by default",
            parse=flags.count_of("queue depth", 1, _MAX_INT),
        ),
        Flag(
            "s",
            "buffer-size",
            "SIZE",
            "bytes of each; 4096 by default",
            parse=flags.number_of("buffer size", 1, _MAX_INT),
        ),
        Flag(
            "S",
            "step-size",
            "SIZE",
            "bytes from the beginning of one to that of the next; the length by default",
            parse=flags.number_of("step size", 0, _MAX_INT),
        ),
        Flag("o", "offset", "OFFSET", "where they begin", parse=flags.number_of("offset")),
        Flag("w", "write", help="write; they read by default"),
        Flag(
            "",
            "pattern",
            "BYTE",
            "what is written; 0 by default",
            parse=flags.count_of("pattern byte", 0, 255),
        ),
        Flag(
            "",
            "flush-interval",
            "COUNT",
            "flush whenever the number of writes to come is a multiple of it",
            parse=flags.count_of("flush interval", 0, _MAX_INT),
        ),
        Flag("n", "native", help="the same as -i native"),
        Flag("", "no-drain", help="go on writing while a flush runs"),
        Flag(
            "i",
            "aio",
            "AIO",
            "threads, native or io_uring: accepted; each request has a thread",
            parse=_aio_of,
        ),
        flags.SHARE,
    ),
    run=run,
)
