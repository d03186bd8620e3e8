"""Options, declared once: name, type, default, unit, help.

From one declaration come the parser of `-o` words and dotted names, the values a driver
gets, keyword arguments in Python, `create -o help`, and the reference pages.

Invariants:
1. `validate` gives every declared option a value of its type, or None where it has no default.
2. Whatever a user can write ends in a value or an OptionError, never in another exception.
3. The order of declaration is the order in which QEMU announces options ("Formatting …").
"""

from __future__ import annotations

from diskwright.block.record import Record
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

_SUFFIXES = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_SPACE = " \t\n\v\f\r"

_SIZE_HELP = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)

#: Names of children that a driver may have without declaring an option for them.
CHILD_NAMES = ("file", "backing", "image", "data-file")

TRUE_WORDS = ("on", "yes", "true", "y")
FALSE_WORDS = ("off", "no", "false", "n")


class SizeRangeError(ValueError):
    """A size that is well written but negative, or not below 2**64."""


def whole(value: object) -> int:
    """The value of an option that is declared as a number, after its validation."""
    number: int = int(value)  # type: ignore[call-overload]  # the declaration says what it is
    return number


def parse_size(text: str | int) -> int:
    """A size in bytes from QEMU's words: "512", "64k", "1.5G", "0x200".

    Suffixes are powers of 1024, in either case. A fraction must come with a suffix or be
    zero; it is rounded to a byte.

    Raises:
        ValueError: it is not one.
        SizeRangeError: it is negative, or not below 2**64.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        size = _parse_size_word(text)
    if not 0 <= size < 1 << 64:
        raise SizeRangeError(f"out of range: {text}")
    return size


def _parse_size_word(text: object) -> int:
    if not isinstance(text, str):
        raise ValueError(f"not a size: {text!r}")
    word = text.lstrip(_SPACE)
    if word[:1] == "-" and _is_digits(word[1:]):
        raise SizeRangeError(f"negative: {text}")
    word = word.removeprefix("+")
    if word[:2].lower() == "0x":
        if not word[2:].isascii() or not word[2:].isalnum():
            raise ValueError(f"not a size: {text!r}")
        return int(word[2:], 16)
    shift = _SUFFIXES.get(word[-1:].upper())
    if shift is not None:
        word = word[:-1]
    whole, point, fraction = word.partition(".")
    if not (_is_digits(whole or "0") and _is_digits(fraction or "0") and whole + fraction):
        raise ValueError(f"not a size: {text!r}")
    if len(word) > 64:
        raise SizeRangeError("too many digits")
    parts = int(fraction or "0")
    if point and parts and not shift:
        raise ValueError(f"not a whole number of bytes: {text!r}")
    shift = shift or 0
    # QEMU computes the fraction as a double, and rounds it
    rest = int(float(f"0.{fraction or '0'}") * (1 << shift) + 0.5)
    return (int(whole or "0") << shift) + rest


def _is_digits(word: str) -> bool:
    return word.isascii() and word.isdigit()


def word_of(value: object) -> str:
    """A number or a switch of JSON as the word that QEMU makes of it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.17g}" if isinstance(value, float) else str(value)


class Option(Record):
    """One option.

    Attributes:
        name: as users write it.
        type: "str", "bool", "size" (bytes), "int", "enum", "number" (a float) or "any".
        default: the value a driver gets when nothing is said, announced by `create`; None: not
            set, and not announced.
        help: a phrase.
        choices: of an enum.
        prefix: the option is any name that begins with `name` ("encrypt.").
        strong: what is read depends on it, so it belongs into the node's `json:` name.
        refusal: QEMU's sentence for a value that is none of the choices, with {value}.
        unit: of an "int" or "number", for the reference pages.
        deprecated: what to use instead, or "".
        loose: of a "str": a number or a switch of JSON stands for its word (`1`, `on`).
    """

    __slots__ = (
        "name",
        "type",
        "default",
        "help",
        "choices",
        "prefix",
        "strong",
        "refusal",
        "unit",
        "deprecated",
        "loose",
    )

    def __init__(
        self,
        name: str,
        type: str = "str",
        default: object = None,
        help: str = "",
        *,
        choices: Iterable[str] = (),
        prefix: bool = False,
        strong: bool = False,
        refusal: str = "",
        unit: str = "",
        deprecated: str = "",
        loose: bool = False,
    ) -> None:
        self.name = name
        self.type = type
        self.default = default
        self.help = help
        self.choices = tuple(choices)
        self.prefix = prefix
        self.strong = strong
        self.refusal = refusal
        self.unit = unit
        self.deprecated = deprecated
        self.loose = loose

    def convert(self, value: object) -> object:
        """The value as the option's type.

        Raises:
            OptionError: it is none.
        """
        if value is None:
            return None
        if self.type == "str":
            return self._str(value)
        if self.type == "bool":
            return self._bool(value)
        if self.type == "size":
            return self._size(value)
        if self.type == "int":
            return self._int(value)
        if self.type == "enum":
            return self._enum(value)
        if self.type == "number":
            return self._number(value)
        return value

    def _str(self, value: object) -> object:
        if isinstance(value, str | dict | list):
            return value  # a dict or list is a child's options, for whoever takes such
        if isinstance(value, bytes) or hasattr(value, "__fspath__"):
            from os import fsdecode

            return fsdecode(value)
        if self.loose:
            return word_of(value)
        raise OptionError(
            f"Invalid parameter type for '{self.name}', expected: string", field=self.name
        )

    def _bool(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        if value in TRUE_WORDS:
            return True
        if value in FALSE_WORDS:
            return False
        raise OptionError(f"Parameter '{self.name}' expects 'on' or 'off'", field=self.name)

    def _size(self, value: object) -> int:
        try:
            return parse_size(value)  # type: ignore[arg-type]  # whatever it is, it is refused
        except SizeRangeError:
            raise OptionError(
                f"Value '{value}' is out of range for parameter '{self.name}'", field=self.name
            ) from None
        except ValueError:
            message = f"Parameter '{self.name}' expects a non-negative number below 2^64"
            raise OptionError(message, qemu=f"{message}\n{_SIZE_HELP}", field=self.name) from None

    def _int(self, value: object) -> int:
        number = value
        if isinstance(value, str):
            number = parse_int(value)
        if not isinstance(number, int) or isinstance(number, bool):
            raise OptionError(f"Parameter '{self.name}' expects a number", field=self.name)
        if not -(1 << 63) <= number < 1 << 64:
            raise OptionError(
                f"Value '{value}' is too large for parameter '{self.name}'", field=self.name
            )
        return number

    def _enum(self, value: object) -> str:
        if isinstance(value, bool):
            value = word_of(value)
        if value in self.choices:
            return str(value)
        words = self.refusal or f"Parameter '{self.name}' does not accept value '{{value}}'"
        raise OptionError(
            words.replace("{value}", str(value)),
            field=self.name,
            hint=f"{self.name} is one of: {', '.join(self.choices)}",
        )

    def _number(self, value: object) -> float:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                number = float("nan")
            if number == number and abs(number) != float("inf"):
                return number
        raise OptionError(f"Parameter '{self.name}' expects a number", field=self.name)

    @property
    def type_text(self) -> str:
        """The type as help texts show it."""
        words = {"bool": "bool (on/off)", "int": "num", "number": "num", "size": "size"}
        return words.get(self.type, "str")

    def help_line(self) -> str:
        """The option's line in `create -o help`."""
        left = f"  {self.name}=<{self.type_text}>"
        return f"{left:<24} - {self.help}" if self.help else left

    def announced(self, value: object) -> str:
        """The value as "Formatting …" shows it, and `-o` takes it; sizes are in bytes."""
        if isinstance(value, bool):
            return word_of(value)
        if self.type == "size":
            size = parse_size(value)  # type: ignore[arg-type]  # validated before
            return str(size if size < 1 << 63 else size - (1 << 64))
        if self.type == "int":
            number = self._int(value)
            return str(number if number < 1 << 63 else number - (1 << 64))
        return str(value).replace(",", ",,")


def parse_int(text: str) -> int | None:
    """C's numbers: decimal, 0x…, 0… (octal), with leading space and a sign; None if none."""
    word = text.lstrip(_SPACE)
    sign = -1 if word[:1] == "-" else 1
    if word[:1] in ("-", "+"):
        word = word[1:]
    if not word.isascii() or not word.isalnum() or len(word) > 64:
        return None
    try:
        if word[:2].lower() == "0x":
            return sign * int(word[2:], 16)
        return sign * int(word, 8 if word[0] == "0" else 10)
    except ValueError:
        return None


class Options:
    """A driver's declared options, in order."""

    __slots__ = ("_by_name", "_prefixes")

    def __init__(self, *options: Option) -> None:
        self._by_name = {option.name: option for option in options}
        self._prefixes = [option for option in options if option.prefix]

    def __iter__(self) -> Iterator[Option]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __add__(self, other: Options) -> Options:
        return Options(*self, *(option for option in other if option.name not in self))

    def get(self, name: str) -> Option | None:
        """The option that covers `name`, or None."""
        found = self._by_name.get(name)
        if found is None:
            for option in self._prefixes:
                if name.startswith(option.name):
                    return option
        return found

    def validate(
        self,
        given: Mapping[str, object],
        *,
        children: Collection[str] | None = None,
        unknown: str = "Invalid parameter '{name}'",
        refused: list[OptionError] | None = None,
    ) -> dict[str, object]:
        """Values of the declared types, defaults filled in.

        Args:
            given: names to words or values.
            children: for opening a node, names of CHILD_NAMES that pass, whatever their value;
                others only where they say that there is no backing file.
            unknown: the sentence for a name that is not declared, with {name}.
            refused: gets the errors for such names, which are not raised then.

        Raises:
            OptionError: for an unknown name or a bad value.
        """
        values: dict[str, object] = {
            option.name: option.default for option in self if not option.prefix
        }
        opens = children is not None
        for name, value in self._spread(given, children or ()) if opens else given.items():
            option = self.get(name)
            if opens and value in ({}, []) and option is not None:
                continue  # as with QEMU, an object or a list without members says nothing
            if option is not None:
                values[name] = option.convert(value)
            elif name in (children or ()) or (opens and name == "backing" and value in (None, "")):
                values[name] = value
            else:
                error = OptionError(
                    unknown.replace("{name}", str(name)), field=name, hint=self._known()
                )
                if refused is None:
                    raise error
                refused.append(error)
        if opens:
            values.setdefault("file", None)  # the opener refuses None where a file is needed
        return values

    def _spread(
        self, given: Mapping[str, object], children: Collection[str]
    ) -> Iterator[tuple[str, object]]:
        """Names and values; members of what is neither an option nor a node with dotted names."""
        for name, value in given.items():
            option = self.get(name)
            whole = option is not None and option.type in ("any", "str")
            if isinstance(value, list) and value and not whole and name not in children:
                value = {str(index): one for index, one in enumerate(value)}
            if not isinstance(value, dict) or not value or whole or name in children:
                yield name, value
                continue
            yield from self._spread({f"{name}.{key}": value[key] for key in value}, children)

    def _known(self) -> str | None:
        """What could have been written, for a hint."""
        names = [option.name for option in self]
        return f"known options: {', '.join(names)}" if names else None

    def parse_words(self, text: str) -> dict[str, object]:
        """`-o` words as values of the declared types; only what was said, no defaults.

        Raises:
            OptionError: for an unknown name or a bad value.
        """
        values: dict[str, object] = {}
        for name, value in parse_words(text).items():
            option = self.get(name)
            if option is None:
                raise OptionError(f"Invalid parameter '{name}'", field=name, hint=self._known())
            values[name] = option.convert(value)
        return values

    def help_lines(self) -> list[str]:
        """A line an option, in the order of their names, as QEMU's tools print them."""
        ordered = sorted(self, key=lambda option: option.name)
        return [option.help_line() for option in ordered if not option.prefix]

    def help_text(self, title: str = "Supported options:") -> str:
        """The whole of `create -o help`: the title, then the lines."""
        return "\n".join([title, *self.help_lines()])

    def announcement(self, given: Mapping[str, object]) -> str:
        """What `create` says after "fmt=…": " cluster_size=65536 size=1048576".

        Args:
            given: the options as they were written or set; None counts as not given.
        """
        words = []
        for option in self:
            value = given.get(option.name)
            if value is None:
                value = option.default
            if value is not None:
                words.append(f" {option.name}={option.announced(value)}")
        return "".join(words)


def split_words(text: str) -> list[tuple[str, str | None]]:
    """`a=1,b=2,c` -> [("a", "1"), ("b", "2"), ("c", None)]; ",," stands for a comma.

    A comma ends a name even when it is doubled: only values can hold one.
    """
    pairs: list[tuple[str, str | None]] = []
    position = 0
    while position < len(text):
        equals = text.find("=", position)
        comma = text.find(",", position)
        if equals < 0 or 0 <= comma < equals:
            end = len(text) if comma < 0 else comma
            if end > position:
                pairs.append((text[position:end], None))
            position = end + 1
            continue
        value, next_word = _value_at(text, equals + 1)
        pairs.append((text[position:equals], value))
        position = next_word
    return pairs


def _value_at(text: str, start: int) -> tuple[str, int]:
    """The value that begins at `start`, and where the next word does."""
    pieces: list[str] = []
    while True:
        comma = text.find(",", start)
        if comma < 0:
            pieces.append(text[start:])
            return "".join(pieces), len(text)
        if text[comma + 1 : comma + 2] != ",":
            pieces.append(text[start:comma])
            return "".join(pieces), comma + 1
        pieces.append(text[start : comma + 1])
        start = comma + 2


def parse_words(text: str) -> dict[str, object]:
    """`-o` words as a dict; a bare word means "on", and "noword" means "off".

    A later word wins over an earlier one.

    Raises:
        OptionError: an empty list, or one with a comma at an end.
    """
    trailing = len(text) - len(text.rstrip(","))
    if not text or text[0] == "," or trailing % 2:
        raise OptionError(f"Invalid option list: {text}", field="-o")
    return words_as_dict(split_words(text))


def words_as_dict(pairs: Iterable[tuple[str, str | None]]) -> dict[str, object]:
    """Split words as a dict; see `parse_words`."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if value is None:
            value, name = ("off", name[2:]) if name.startswith("no") else ("on", name)
        found[name] = value
    return found


def wants_help(text: str) -> bool:
    """Whether `-o` words ask for the list of options: a bare "help" or "?" among them."""
    return any(value is None and name in ("help", "?") for name, value in split_words(text))
