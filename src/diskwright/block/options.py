"""Options, declared once: name, type, default, unit, help.

From one declaration come the parser of `-o` words and dotted names, the values a driver
gets, keyword arguments in Python, `create -o help`, and the reference pages.
"""

from __future__ import annotations

from diskwright.block.record import Record
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SUFFIXES = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}

_SIZE_HELP = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)


def parse_size(text: str | int) -> int:
    """A size in bytes from QEMU's words: "512", "64k", "1.5G".

    Raises:
        ValueError: it is not one, or not below 2**64.
    """
    if isinstance(text, int):
        return text
    word = text.strip()
    shift = 0
    if word and word[-1].upper() in _SUFFIXES and not word.lower().startswith("0x"):
        shift = _SUFFIXES[word[-1].upper()]
        word = word[:-1]
    if word.lower().startswith("0x"):
        value = int(word, 16)
    elif "." in word:
        whole, _, fraction = word.partition(".")
        if not (whole + fraction).isdecimal() or not whole:
            raise ValueError(f"not a size: {text}")
        value = (int(whole) << shift) + (int(fraction or "0") << shift) // 10 ** len(fraction)
        shift = 0
    else:
        if not word.isdecimal():
            raise ValueError(f"not a size: {text}")
        value = int(word)
    value <<= shift
    if value >= 1 << 64:
        raise ValueError(f"too large: {text}")
    return value


class Option(Record):
    """One option.

    Attributes:
        name: as users write it.
        type: "str", "bool", "size" (bytes), "int", "enum" or "any".
        default: the value a driver gets when nothing is said; None: not set.
        help: a phrase.
        choices: of an enum.
        prefix: the option is any name that begins with `name` ("encrypt.").
    """

    __slots__ = ("choices", "default", "help", "name", "prefix", "type")

    def __init__(
        self,
        name: str,
        type: str = "str",
        default: object = None,
        help: str = "",
        *,
        choices: Iterable[str] = (),
        prefix: bool = False,
    ) -> None:
        self.name = name
        self.type = type
        self.default = default
        self.help = help
        self.choices = tuple(choices)
        self.prefix = prefix

    def convert(self, value: object) -> object:
        """The value as the option's type.

        Raises:
            OptionError: it is none.
        """
        if value is None:
            return None
        if self.type == "bool":
            return self._bool(value)
        if self.type == "size":
            return self._size(value)
        if self.type == "int":
            return self._int(value)
        if self.type == "enum":
            return self._enum(value)
        return value

    def _bool(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        if value in ("on", "yes", "true", "y"):
            return True
        if value in ("off", "no", "false", "n"):
            return False
        raise OptionError(f"Parameter '{self.name}' expects 'on' or 'off'", field=self.name)

    def _size(self, value: object) -> int:
        try:
            size = parse_size(value)  # type: ignore[arg-type]
            if size >= 0:
                return size
        except (ValueError, AttributeError, TypeError):
            pass
        message = f"Parameter '{self.name}' expects a non-negative number below 2^64"
        raise OptionError(message, qemu=f"{message}\n{_SIZE_HELP}", field=self.name)

    def _int(self, value: object) -> int:
        try:
            return int(str(value), 0)
        except ValueError:
            raise OptionError(
                f"Parameter '{self.name}' expects a number", field=self.name
            ) from None

    def _enum(self, value: object) -> str:
        if value in self.choices:
            return str(value)
        raise OptionError(
            f"Parameter '{self.name}' does not accept value '{value}'",
            field=self.name,
            hint=f"one of {', '.join(self.choices)}",
        )

    @property
    def type_text(self) -> str:
        """The type as help texts show it."""
        words = {"bool": "bool (on/off)", "int": "num", "size": "size"}
        return words.get(self.type, "str")


class Options:
    """A driver's declared options, in order."""

    __slots__ = ("_by_name",)

    def __init__(self, *options: Option) -> None:
        self._by_name = {option.name: option for option in options}

    def __iter__(self) -> Iterator[Option]:
        return iter(self._by_name.values())

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __add__(self, other: Options) -> Options:
        return Options(*self, *other)

    def get(self, name: str) -> Option | None:
        """The option that covers `name`, or None."""
        found = self._by_name.get(name)
        if found is None:
            for option in self:
                if option.prefix and name.startswith(option.name):
                    return option
        return found

    def validate(self, given: dict[str, object], *, children: bool = False) -> dict[str, object]:
        """Values of the declared types, defaults filled in.

        Args:
            given: names to words or values.
            children: let entries that are nodes (dicts, lists, and "file", "backing") pass.

        Raises:
            OptionError: for an unknown name or a bad value.
        """
        values: dict[str, object] = {
            option.name: option.default for option in self if not option.prefix
        }
        for name, value in given.items():
            option = self.get(name)
            if option is not None:
                values[name] = option.convert(value)
            elif children and (isinstance(value, (dict, list)) or name in _CHILD_NAMES):
                values[name] = value
            else:
                raise OptionError(f"Invalid parameter '{name}'", field=name)
        return values

    def help_lines(self) -> list[str]:
        """A line an option, in the order of their names, as QEMU's tools print them."""
        lines = []
        for option in sorted(self, key=lambda option: option.name):
            if option.prefix:
                continue
            left = f"  {option.name}=<{option.type_text}>"
            lines.append(f"{left:<24} - {option.help}" if option.help else left)
        return lines


_CHILD_NAMES = ("file", "backing", "image", "data-file")


def split_words(text: str) -> list[tuple[str, str | None]]:
    """`a=1,b=2,c` -> [("a", "1"), ("b", "2"), ("c", None)]; ",," stands for a comma."""
    words: list[str] = [""]
    position = 0
    while position < len(text):
        letter = text[position]
        if letter == ",":
            if text[position + 1 : position + 2] == ",":
                words[-1] += ","
                position += 1
            else:
                words.append("")
        else:
            words[-1] += letter
        position += 1
    pairs: list[tuple[str, str | None]] = []
    for word in words:
        if word:
            name, equals, value = word.partition("=")
            pairs.append((name, value if equals else None))
    return pairs


def parse_words(text: str) -> dict[str, object]:
    """`-o` words as a dict; a bare word means "on", and "noword" means "off"."""
    found: dict[str, object] = {}
    for name, value in split_words(text):
        if value is None:
            value, name = ("off", name[2:]) if name.startswith("no") else ("on", name)
        found[name] = value
    return found
