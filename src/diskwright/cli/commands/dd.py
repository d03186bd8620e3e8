"""`dd`: copy blocks of an image into a new one."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command, Flag
from diskwright.cli.images import image_of
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_BLOCK = (1 << 31) - 1

#: what the operands may say -> what reads it
_OPERANDS: dict[str, Callable[[str], object]] = {
    "bs": flags.number_of("bs", 1, _MAX_BLOCK),
    "count": flags.count_of("count"),
    "if": str,
    "of": str,
    "skip": flags.count_of("skip"),
}


def run(arguments: Arguments) -> int:
    """Copy blocks."""
    given = _operands_of(arguments)
    source, target = given.get("if"), given.get("of")
    if source is None or target is None:
        raise OptionError("Must specify both input and output files")
    flags.exclude_format(arguments)
    from diskwright.cli.interrupt import CANCEL
    from diskwright.operations.dd import Blocks, copy_blocks

    image = image_of(arguments, str(source), format=arguments.text("format"))
    blocks = Blocks(
        _number(given.get("bs")) or 512,
        count=_number(given.get("count")),
        skip=_number(given.get("skip")) or 0,
    )
    copied = copy_blocks(
        image,
        str(target),
        format=arguments.text_or("output-format", "raw"),
        blocks=blocks,
        cancel=CANCEL,
    )
    if copied is None:
        output.complain(f"{arguments.program}: {source}: cannot skip to specified offset")
    return 0


def _operands_of(arguments: Arguments) -> dict[str, object]:
    """The last value of each word; all are looked at in order."""
    given: dict[str, object] = {}
    for operand in arguments.operands:
        name, equals, value = operand.partition("=")
        if not equals or name not in _OPERANDS:
            raise OptionError(f"unrecognized operand {name}")
        given[name] = _OPERANDS[name](value)
    return given


def _number(value: object) -> int | None:
    assert value is None or isinstance(value, int)
    return value


COMMAND = Command(
    "dd",
    "Copy blocks of an image into a new one",
    operands="[bs=SIZE] [count=COUNT] [skip=COUNT] if=INPUT of=OUTPUT",
    flags=(
        flags.HELP,
        *flags.IMAGE,
        flags.SHARE,
        flags.OBJECT,
        Flag("O", "output-format", "FMT", "the output's format; raw by default"),
    ),
    run=run,
    notes="bs is the length of a block, 512 bytes by default; count blocks from the input's\n"
    "beginning are copied, but the first skip of them are left out. Everything is written:\n"
    "zeroes take room in the output as well.",
)
