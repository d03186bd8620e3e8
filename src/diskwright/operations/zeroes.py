"""Where a buffer holds nothing but zeroes.

A unit's first eight bytes decide most units; the others are compared with zeroes whole, a
bytearray with bytes, which is as fast as memory (two memoryviews are compared item by item).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_ZEROES = bytes(1 << 16)


def is_zero(view: memoryview) -> bool:
    """Whether every byte of `view` is zero."""
    length = len(view)
    step = len(_ZEROES)
    for start in range(0, length, step):
        part = bytes(view[start : start + step])
        if part != (_ZEROES if len(part) == step else _ZEROES[: len(part)]):
            return False
    return True


def zero_runs(view: memoryview, unit: int, head: int = 0) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether it is zero) of runs of units that are alike, in order.

    Args:
        view: bytes.
        unit: length of a unit, a multiple of eight.
        head: where the first whole unit begins; what is before it is a unit too.
    """
    length = len(view)
    bounds = [0, *range(head if head else unit, length, unit), length]
    known = _first_words(view, unit) if not head and not length % 8 else None
    begin = 0
    last: bool | None = None
    for index in range(len(bounds) - 1):
        start = bounds[index]
        if known is not None and known[index]:
            empty = False
        else:
            empty = is_zero(view[start : bounds[index + 1]])
        if empty is not last:
            if last is not None:
                yield begin, start, last
            begin, last = start, empty
    if last is not None:
        yield begin, length, last


def _first_words(view: memoryview, unit: int) -> list[int]:
    """The first eight bytes of each unit, as a number."""
    return view.cast("Q")[:: unit // 8].tolist()
