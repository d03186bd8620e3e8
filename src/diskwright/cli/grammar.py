"""The grammar of the commands, as data: from one table come the parser, the help and the pages.

It is `getopt_long`'s: short options may be bundled, long ones cut short as long as they are
unambiguous, options and operands may be mixed, and `--` ends the options. The words of its
refusals are those of QEMU's tools. No library parser: `argparse` alone costs more time than
all of `info`. And nothing of the engine, not even its records: `--version` loads this.
"""

from __future__ import annotations

from diskwright.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Misused(UsageError):
    """A wrong command line; the line that points to the help follows it."""


class AllSaid(Exception):
    """An option asked for something that was told: the program ends, and has not failed."""


class HelpWanted(Exception):
    """`--help` was met; nothing after it is looked at."""


class VersionWanted(Exception):
    """`--version` was met; nothing after it is looked at."""


class Flag:
    """One option of a command.

    Attributes:
        short: its letter, or "".
        long: its word, or "".
        metavar: what its value is called in the help; "" where it takes none.
        help: a phrase.
        parse: turns the value's text into what `Arguments` holds; it refuses by raising. Where
            the option takes no value it gets an empty text.
        optional: its value may be left out; only `--long=VALUE` gives one.
        repeats: all values are kept, not only the last one.
        hidden: accepted, but left out of the help (another name of one that is there).
        key: the name in `Arguments`; by default the long word.
    """

    __slots__ = (
        "help", "hidden", "key", "long", "metavar", "optional", "parse", "repeats",
        "short",
    )  # fmt: skip

    def __init__(
        self,
        short: str,
        long: str,
        metavar: str = "",
        help: str = "",
        *,
        parse: Callable[[str], object] | None = None,
        optional: bool = False,
        repeats: bool = False,
        hidden: bool = False,
        key: str = "",
    ) -> None:
        self.short = short
        self.long = long
        self.metavar = metavar
        self.help = help
        self.parse = parse
        self.optional = optional
        self.repeats = repeats
        self.hidden = hidden
        self.key = key or long or short

    @property
    def words(self) -> list[str]:
        """The ways to write it."""
        short = [f"-{self.short}"] if self.short else []
        return [*short, f"--{self.long}"] if self.long else short

    @property
    def value_text(self) -> str:
        """How its value is written after those words, with what is between."""
        if self.optional:
            return f"[={self.metavar}]"
        return f" {self.metavar}" if self.metavar else ""


class Command:
    """One command: its words, and the function that does it.

    Attributes:
        name: the word after the program's name.
        summary: what it does, in a phrase.
        operands: how its operands are written in the help.
        flags: its options, in the order in which ambiguous words are listed.
        run: does it; returns the exit code.
        failure: the exit code of every error that has no other.
        notes: sentences for the help.
    """

    __slots__ = ("failure", "flags", "name", "notes", "operands", "run", "summary")

    def __init__(
        self,
        name: str,
        summary: str,
        *,
        operands: str,
        flags: Sequence[Flag],
        run: Callable[[Arguments], int],
        failure: int = 1,
        notes: str = "",
    ) -> None:
        self.name = name
        self.summary = summary
        self.operands = operands
        self.flags = tuple(flags)
        self.run = run
        self.failure = failure
        self.notes = notes


class Arguments:
    """What was written: values by the flags' keys, and the operands.

    Attributes:
        operands: the words that are no options.
        program: the program's name, for lines that begin with it.
        friendly: the command runs under `diskwright`, not under a name of QEMU's.
    """

    __slots__ = ("_values", "friendly", "operands", "program")

    def __init__(self, program: str = "", *, friendly: bool = False) -> None:
        self._values: dict[str, list[object]] = {}
        self.operands: list[str] = []
        self.program = program
        self.friendly = friendly

    def add(self, key: str, value: object) -> None:
        """Note one occurrence of an option."""
        self._values.setdefault(key, []).append(value)

    def flag(self, key: str) -> bool:
        """Whether the option was given."""
        return key in self._values

    def count(self, key: str) -> int:
        """How often the option was given."""
        return len(self._values.get(key, ()))

    def text(self, key: str) -> str | None:
        """The option's last value, or None."""
        value = self._values.get(key, [None])[-1]
        return None if value is None else str(value)

    def text_or(self, key: str, otherwise: str) -> str:
        """The option's last value, be it empty, or `otherwise` where it was not given."""
        value = self.text(key)
        return otherwise if value is None else value

    def number(self, key: str) -> int | None:
        """The option's last value as its `parse` made a number of it, or None."""
        value = self._values.get(key, [None])[-1]
        assert value is None or isinstance(value, int)
        return value

    def values(self, key: str) -> list[object]:
        """All values of the option, as its `parse` made them."""
        return list(self._values.get(key, ()))

    def texts(self, key: str) -> list[str]:
        """All values of the option."""
        return [str(value) for value in self._values.get(key, ())]


class Parser:
    """Reads the words of one command line.

    Args:
        flags: the options.
        name: what precedes getopt's own refusals, "diskwright-img create".
        mixed: whether options may follow operands.
        negative_operand: a word like -4k right after the first operand is an operand too.
        long_words: there are long options; else "--x" is the letters "-" and "x".
    """

    def __init__(
        self,
        flags: Sequence[Flag],
        name: str,
        *,
        mixed: bool = True,
        negative_operand: bool = False,
        long_words: bool = True,
    ) -> None:
        self._short = {flag.short: flag for flag in flags if flag.short}
        self._long = [flag for flag in flags if flag.long]
        self._name = name
        self._mixed = mixed
        self._negative_operand = negative_operand
        self._long_words = long_words

    def parse(self, words: Sequence[str], into: Arguments) -> None:
        """Fill `into`.

        Raises:
            Misused: a word is no option, or lacks its value.
            HelpWanted, VersionWanted: the option was there, and nothing wrong before it.
        """
        rest = list(words)
        after_operand = False
        while rest:
            word = rest.pop(0)
            if word == "--":
                into.operands += rest
                return
            negative = after_operand and self._negative_operand and len(into.operands) == 1
            after_operand = _is_operand(word) or (negative and word[1:2].isdecimal())
            if after_operand:
                into.operands.append(word)
                if not self._mixed:
                    into.operands += rest
                    return
            elif self._long_words and word.startswith("--"):
                self._take_long(word[2:], rest, into)
            else:
                self._take_short(word[1:], rest, into)

    def _misused(self, words: str) -> Misused:
        return Misused(f"{self._name}: {words}", field="getopt")

    def _take_long(self, word: str, rest: list[str], into: Arguments) -> None:
        name, equals, value = word.partition("=")
        flag = self._find_long(name, word)
        if not flag.metavar or (flag.optional and not equals):
            if equals:
                raise self._misused(f"option '--{flag.long}' doesn't allow an argument")
            _note(flag, None, into)
            return
        if not equals:
            if not rest:
                raise self._misused(f"option '--{flag.long}' requires an argument")
            value = rest.pop(0)
        _note(flag, value, into)

    def _find_long(self, name: str, word: str) -> Flag:
        found = [flag for flag in self._long if flag.long == name]
        found = found or [flag for flag in self._long if flag.long.startswith(name)]
        if not found:
            raise self._misused(f"unrecognized option '--{word}'")
        if any(flag.key != found[0].key for flag in found):
            words = " ".join(f"'--{flag.long}'" for flag in found)
            raise self._misused(f"option '--{word}' is ambiguous; possibilities: {words}")
        return found[0]

    def _take_short(self, letters: str, rest: list[str], into: Arguments) -> None:
        while letters:
            flag = self._short.get(letters[0])
            if flag is None:
                raise self._misused(f"invalid option -- '{letters[0]}'")
            value, letters = letters[1:], letters[1:]
            if not flag.metavar:
                _note(flag, None, into)
                continue
            if not value:
                if not rest:
                    raise self._misused(f"option requires an argument -- '{flag.short}'")
                value = rest.pop(0)
            _note(flag, value, into)
            return


def _is_operand(word: str) -> bool:
    return not word.startswith("-") or word == "-"


def _note(flag: Flag, value: str | None, into: Arguments) -> None:
    if flag.key == "help":
        raise HelpWanted
    if flag.key == "version":
        raise VersionWanted
    if flag.key == "trace":  # looked at where it stands, as QEMU does: before what may end it all
        from diskwright.cli.tracing import trace

        trace(into.program, value or "")
    into.add(flag.key, flag.parse(value or "") if flag.parse is not None else value)
