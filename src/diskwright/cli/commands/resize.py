"""`resize`: make an image longer or shorter."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command, Flag, Misused
from diskwright.cli.images import image_of, warn_of_guess
from diskwright.cli.run import warn
from diskwright.errors import DiskwrightError, OptionError

_SHRINKING = (
    "Shrinking an image will delete all data beyond the shrunken image's end. "
    "Before performing such an operation, make sure there is no important data there."
)


def _preallocation_of(value: str) -> str:
    from diskwright.operations.resize import PREALLOCATIONS

    if value not in PREALLOCATIONS:
        raise OptionError(
            f"Invalid preallocation mode '{value}'", hint=f"one of {', '.join(PREALLOCATIONS)}"
        )
    return value


def run(arguments: Arguments) -> int:
    """Change an image's size."""
    if len(arguments.operands) < 2:
        raise Misused("Expecting image file name and size")
    if len(arguments.operands) > 2:
        raise Misused("Extra argument(s) in command line")
    from diskwright.operations.resize import SizeChange, resize_image

    name, word = arguments.operands
    change = SizeChange.parse(word)
    flags.exclude_format(arguments)
    image = image_of(arguments, name, format=arguments.text("format"))
    try:
        done = resize_image(
            image,
            change,
            shrink=arguments.flag("shrink"),
            preallocation=arguments.text("preallocation") or "off",
            opened=warn_of_guess,
        )
    except DiskwrightError as error:
        if error.kind != "shrink":
            raise
        output.complain(f"{arguments.program}: {error.qemu_message}")
        warn(arguments, _SHRINKING)
        return 1
    if done.new_size != -(-done.wanted_size // 512) * 512:
        warn(
            arguments,
            f"Image should have been resized to {done.wanted_size} bytes, "
            f"but was resized to {done.new_size} bytes",
        )
    if not arguments.flag("quiet"):
        output.say("Image resized.\n")
    return 0


COMMAND = Command(
    "resize",
    "Change the size of an image",
    operands="FILENAME [+|-]SIZE",
    flags=(
        flags.HELP,
        flags.QUIET,
        *flags.IMAGE,
        Flag("", "shrink", help="allow it to become shorter: what lies behind the end is lost"),
        Flag(
            "",
            "preallocation",
            "PREALLOC",
            "how to provide for what is added",
            parse=_preallocation_of,
        ),
        flags.OBJECT,
    ),
    run=run,
    notes="SIZE is a number of bytes, with k, M, G, T, P or E as suffix (powers of 1024); with a\n"
    "sign, it is by how much the size changes.",
)
