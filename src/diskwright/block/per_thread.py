"""Something that a thread has while a `with` block lasts: who hears it, what ends it."""

from __future__ import annotations

from _thread import _local

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any


class PerThread(_local):
    """A place with a value for each thread, at first None."""

    value: Any = None


class holding:
    """`with holding(place, value):` the thread has that value; then what it had before.

    Args:
        place: where.
        value: what; None leaves what is there.
    """

    __slots__ = ("_before", "_place", "_value")

    def __init__(self, place: PerThread, value: object) -> None:
        self._place = place
        self._value = value

    def __enter__(self) -> None:
        self._before = self._place.value
        if self._value is not None:
            self._place.value = self._value

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._place.value = self._after(error)

    def _after(self, error: BaseException | None) -> object:
        """What the thread has when the block is left, with an error or without one."""
        return self._before
