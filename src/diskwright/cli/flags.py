"""Options that several commands have, and what their values may be."""

from __future__ import annotations

from diskwright.cli.grammar import AllSaid, Arguments, Flag, Misused
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.policy import Policy

#: Sizes and counts on command lines are signed 64-bit numbers in QEMU's tools.
MAX_NUMBER = (1 << 63) - 1


def output_kind(value: str) -> str:
    """The value of --output."""
    if value not in ("human", "json"):
        raise Misused(f"--output expects 'human' or 'json' not '{value}'")
    return value


class count_of:
    """Parses a number without a suffix, and refuses as QEMU's tools do.

    Args:
        what: "queue depth", for the sentence.
        lowest, highest: what is accepted.
    """

    def __init__(self, what: str, lowest: int = 0, highest: int = MAX_NUMBER) -> None:
        self._what = what
        self._lowest = lowest
        self._highest = highest

    def __call__(self, value: str) -> int:
        """The number."""
        found = self._parse(value)
        if found is None:
            raise OptionError(f"Invalid {self._what} specified: '{value}'.")
        if not self._lowest <= found <= self._highest:
            raise OptionError(
                f"Invalid {self._what} specified. "
                f"Must be between {self._lowest} and {self._highest}."
            )
        return found

    def _parse(self, value: str) -> int | None:
        """The number, -1 for one of too many digits; None for what is none."""
        from diskwright.block.options import parse_int

        return parse_int(value)


class number_of(count_of):
    """Parses a size with a suffix."""

    def _parse(self, value: str) -> int | None:
        from diskwright.block.options import SizeRangeError, parse_size

        try:
            return parse_size(value)
        except SizeRangeError:
            return -1
        except ValueError:
            return None


def define_object(value: str) -> str:
    """Make the object that --object describes."""
    from diskwright.cli.objects import define, help_of

    answer = help_of(value)
    if answer is not None:
        from diskwright.cli import output

        output.say(answer)
        raise AllSaid
    define(value)
    return value


HELP = Flag("h", "help", help="show this help and exit")
QUIET = Flag("q", "quiet", help="say nothing but errors")
PROGRESS = Flag("p", "progress", help="show how far it is")
FORMAT = Flag("f", "format", "FMT", "the image's format; it is probed by default")
IMAGE_OPTS = Flag(
    "",
    "image-opts",
    help="FILENAME is a list of options (driver=qcow2,file.filename=...)",
)
#: How the operands are to be opened.
IMAGE = (FORMAT, IMAGE_OPTS)
SHARE = Flag("U", "force-share", help="look although another process may write to it")
OUTPUT = Flag("", "output", "human|json", "what is printed", parse=output_kind)
OBJECT = Flag(
    "",
    "object",
    "OBJDEF",
    "define an object: a secret, TLS credentials, a group of throttles",
    parse=define_object,
    repeats=True,
)
ALLOW_REFERENCES = Flag(
    "",
    "allow-references",
    help="follow what images refer to, wherever it is",
)


def exclude_format(arguments: Arguments, key: str = "format", switch: str = "image-opts") -> None:
    """Refuse --image-opts together with -f."""
    if arguments.flag(key) and arguments.flag(switch):
        raise OptionError("--image-opts and --format are mutually exclusive")


def only_operand(arguments: Arguments) -> str:
    """The one file name that most commands take."""
    if len(arguments.operands) != 1:
        raise Misused("Expecting one image file name")
    return arguments.operands[0]


def policy_of(arguments: Arguments) -> Policy:
    """Compatible programs follow every reference, the friendly one those nearby."""
    from diskwright.block.policy import FollowAll, SameFolder

    if arguments.friendly and not arguments.flag("allow-references"):
        return SameFolder()
    return FollowAll()


def cache_of(arguments: Arguments, key: str, *, source: bool = False) -> str | None:
    """The cache mode that was given, if it is one."""
    from diskwright.block.common_options import CACHE_MODES

    word = arguments.text(key)
    if word is not None and word not in CACHE_MODES:
        kind = "source cache" if source else "cache"
        raise OptionError(f"Invalid {kind} option: {word}", hint=f"one of {', '.join(CACHE_MODES)}")
    return word


def option_list(value: str) -> str:
    """The value of -o, if it can be split; what is in it is looked at later."""
    from diskwright.block.options import parse_words

    parse_words(value)
    return value


def snapshot_words(value: str) -> str:
    """The value of -l: a name, or words of which only two are known."""
    if value.startswith("snapshot."):
        from diskwright.operations.snapshot import snapshot_words

        warn_of_bare_words(value)
        snapshot_words(value)
    return value


def warn_of_bare_words(text: str, *, begin: int = 0) -> None:
    """Say of each word without a value, from the one numbered `begin` on, how it should be."""
    from diskwright.block.notice import warn
    from diskwright.block.options import split_words, words_as_dict

    for number, pair in enumerate(split_words(text)):
        if number >= begin and pair[1] is None:
            ((name, value),) = words_as_dict([pair]).items()
            warn(
                f"short-form boolean option '{pair[0]}' deprecated\n"
                f"Please use {name}={value} instead"
            )
