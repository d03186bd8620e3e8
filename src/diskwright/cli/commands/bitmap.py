"""`bitmap`: dirty bitmaps that are kept inside of an image."""

from __future__ import annotations

from diskwright.cli import flags
from diskwright.cli.grammar import Arguments, Command, Flag
from diskwright.cli.images import image_of, warn_of_guess
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.operations.bitmap import BitmapChange

_ACTIONS = "action"


class Action:
    """Parses one of the options that say what to do: they are done in their order."""

    def __init__(self, action: str) -> None:
        self._action = action

    def __call__(self, value: str) -> BitmapChange:
        """The change; `value` is a bitmap to merge."""
        from diskwright.operations.bitmap import BitmapChange

        return BitmapChange(self._action, value)


def _actions(arguments: Arguments) -> list[BitmapChange]:
    return arguments.values(_ACTIONS)  # type: ignore[return-value]  # as `Action` made them


def _check_flags(arguments: Arguments) -> None:
    """What does not go together, in the order in which QEMU's tool looks."""
    wanted = {change.action for change in _actions(arguments)}
    if not wanted:
        raise OptionError(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
        )
    if arguments.number("granularity") and "add" not in wanted:
        raise OptionError("granularity only supported with --add")
    if arguments.flag("source-format") and not arguments.flag("source-file"):
        raise OptionError("-F only supported with -b")
    if arguments.flag("source-file") and "merge" not in wanted:
        raise OptionError("Merge bitmap source file only supported with --merge")
    if len(arguments.operands) != 2:
        raise OptionError("Expecting filename and bitmap name")
    flags.exclude_format(arguments)


def run(arguments: Arguments) -> int:
    """Do to a bitmap what is asked for, in that order."""
    _check_flags(arguments)
    from diskwright.operations.bitmap import change_bitmap
    from diskwright.operations.opening import Image

    name, bitmap = arguments.operands
    other = arguments.text("source-file")
    source = None
    if other is not None:
        policy = flags.policy_of(arguments)
        source = Image(other, format=arguments.text("source-format"), policy=policy, shown=other)
    change_bitmap(
        image_of(arguments, name, format=arguments.text("format")),
        bitmap,
        _actions(arguments),
        granularity=arguments.number("granularity"),
        source=source,
        opened=warn_of_guess,
    )
    return 0


COMMAND = Command(
    "bitmap",
    "Add, remove or change a dirty bitmap inside of an image",
    operands="FILENAME BITMAP",
    flags=(
        flags.HELP,
        Flag("f", "", "FMT", "the image's format; it is probed by default", key="format"),
        flags.IMAGE_OPTS,
        Flag("", "add", help="begin a bitmap", parse=Action("add"), key=_ACTIONS),
        Flag(
            "g",
            "granularity",
            "SIZE",
            "bytes a bit of it stands for; as the clusters by default",
            parse=flags.number_of("granularity"),
        ),
        Flag(
            "", "remove", help="drop it, be it inconsistent", parse=Action("remove"), key=_ACTIONS
        ),
        Flag("", "clear", help="forget what it has noted", parse=Action("clear"), key=_ACTIONS),
        Flag("", "enable", help="note what is written", parse=Action("enable"), key=_ACTIONS),
        Flag("", "disable", help="note nothing more", parse=Action("disable"), key=_ACTIONS),
        Flag(
            "",
            "merge",
            "SOURCE",
            "note what the bitmap SOURCE has noted too",
            parse=Action("merge"),
            key=_ACTIONS,
        ),
        Flag("b", "source-file", "FILE", "the image that has SOURCE"),
        Flag("F", "source-format", "FMT", "its format; it is probed by default"),
        flags.OBJECT,
    ),
    run=run,
    notes="What is to be done is done in the order in which it is written.",
)
