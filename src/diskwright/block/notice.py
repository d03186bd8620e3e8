"""What a node has to say to a person that is no error: it repaired itself, a word is an old one.

Commands listen and print it. Where nobody listens it goes to the logger "diskwright", as a
warning. Who listens, listens to the calling thread.
"""

from __future__ import annotations

from diskwright.block.per_thread import PerThread, holding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


#: A line of a report; a warning; an error that is not the last word on it.
REPORT, WARNING, ERROR = "report", "warning", "error"


#: Who listens to each thread.
_heard = PerThread()


class listening(holding):
    """`with listening(hear):` notices of this thread go to `hear(words, kind)`.

    Args:
        hear: gets a line, or several, and what they are: REPORT, WARNING or ERROR.
    """

    __slots__ = ()

    def __init__(self, hear: Callable[[str, str], None]) -> None:
        super().__init__(_heard, hear)


def tell(line: str) -> None:
    """Pass on a line of a report, as of a repair."""
    _pass_on(line, REPORT)


def warn(words: str) -> None:
    """Pass on a warning."""
    _pass_on(words, WARNING)


def complain(words: str) -> None:
    """Pass on an error, of which another one that is raised is the consequence."""
    _pass_on(words, ERROR)


def _pass_on(words: str, kind: str) -> None:
    if _heard.value is not None:
        _heard.value(words, kind)
        return
    import logging

    logging.getLogger("diskwright").warning("%s", words)
