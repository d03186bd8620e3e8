"""`-T`: accepted as QEMU's tools do. There are no trace events here; who names one is told."""

from __future__ import annotations

from diskwright.cli import output
from diskwright.cli.grammar import AllSaid
from diskwright.errors import OptionError, from_oserror

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def trace(program: str, text: str) -> None:
    """Look at a value of -T.

    Raises:
        AllSaid: all that was wanted is the list, which is empty.
        OptionError, IOFailure: it is wrong, or names a file that cannot be read.
    """
    from diskwright.block.options import split_words

    if text in ("help", "?"):
        raise AllSaid
    pairs = split_words(text)
    if pairs and pairs[0][1] is None:
        pairs[0] = ("enable", pairs[0][0])
    for name, _ in pairs:
        if name not in ("enable", "events", "file"):
            raise OptionError(f"Invalid parameter '{name}'", field="trace")
    for name, value in pairs:
        for pattern in _patterns(name, value or ""):
            if not any(mark in pattern for mark in "*?["):
                output.complain(f"{program}: warning: trace event '{pattern}' does not exist")


def _patterns(name: str, value: str) -> Iterator[str]:
    """The names of events that one word asks for."""
    if name == "enable":
        yield value.removeprefix("-")
    elif name == "events":
        for line in _read(value).splitlines():
            pattern = line.strip()
            if pattern and not pattern.startswith("#"):
                yield pattern.removeprefix("-")


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise from_oserror(error, path, path=path) from error
