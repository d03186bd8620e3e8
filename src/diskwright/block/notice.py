"""What a node has to say to a person that is no error: it repaired itself, a word is an old one.

Commands listen and print it. Where nobody listens it goes to the logger "diskwright", as a
warning. Who listens, listens to the calling thread.
"""

from __future__ import annotations

from _thread import _local

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class _Heard(_local):
    """Who listens to each thread."""

    by: Callable[[str, bool], None] | None = None


_heard = _Heard()


class listening:
    """`with listening(hear):` notices of this thread go to `hear(words, warning)`.

    Args:
        hear: gets a line, and whether it is a warning; else it is a line of a report.
    """

    __slots__ = ("_before", "_hear")

    def __init__(self, hear: Callable[[str, bool], None]) -> None:
        self._hear = hear

    def __enter__(self) -> None:
        self._before = _heard.by
        _heard.by = self._hear

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _heard.by = self._before


def tell(line: str) -> None:
    """Pass on a line of a report, as of a repair."""
    _pass_on(line, False)


def warn(words: str) -> None:
    """Pass on a warning."""
    _pass_on(words, True)


def _pass_on(words: str, warning: bool) -> None:
    if _heard.by is not None:
        _heard.by(words, warning)
        return
    import logging

    logging.getLogger("diskwright").warning("%s", words)
