"""Where a buffer holds nothing but zeroes.

A unit's first eight bytes decide most units, and eight in its middle most others; the rest are
compared with zeroes whole, a bytearray with bytes, which is as fast as memory (two memoryviews
are compared item by item).
"""

from __future__ import annotations

_ZEROES = bytes(1 << 16)


def is_zero(view: memoryview) -> bool:
    """Whether every byte of `view` is zero."""
    length = len(view)
    step = len(_ZEROES)
    if length <= step:
        return view == _ZEROES[:length] if length < 64 else bytes(view) == _ZEROES[:length]
    for start in range(0, length, step):
        part = bytes(view[start : start + step])
        if part != (_ZEROES if len(part) == step else _ZEROES[: len(part)]):
            return False
    return True


def zero_runs(view: memoryview, unit: int, head: int = 0) -> list[tuple[int, int, bool]]:
    """(start, stop, whether it is zero) of runs of units that are alike, in order.

    Args:
        view: bytes.
        unit: length of a unit, a multiple of eight.
        head: where the first whole unit begins; what is before it is a unit too.
    """
    length = len(view)
    if head or length % 8:
        bounds = [0, *range(head if head else unit, length, unit), length]
        return _runs_between(view, bounds)
    words = view.cast("Q")
    heads = words[:: unit // 8].tolist()
    if all(heads):
        return [(0, length, False)] if length else []
    return _runs_by_heads(view, unit, words, heads)


def _runs_by_heads(
    view: memoryview, unit: int, words: memoryview, heads: list[int]
) -> list[tuple[int, int, bool]]:
    """Units that do not begin with a zero are data; the others are looked at."""
    length, count, middle, last = len(view), len(heads), unit // 16, len(words) - 1
    runs: list[tuple[int, int, bool]] = []
    index = 0
    while index < count:
        first = index
        if heads[index]:
            try:
                index = heads.index(0, index)
            except ValueError:
                index = count
            _join(runs, first * unit, min(index * unit, length), False)
            continue
        while index < count and not heads[index]:
            index += 1
        stop = min(index * unit, length)
        at = first * unit // 8 + middle
        if not words[min(at, last)] and is_zero(view[first * unit : stop]):
            _join(runs, first * unit, stop, True)
            continue
        for start in range(first * unit, stop, unit):
            end = min(start + unit, stop)
            _join(runs, start, end, not words[min(at, last)] and is_zero(view[start:end]))
            at += unit // 8
    return runs


def _runs_between(view: memoryview, bounds: list[int]) -> list[tuple[int, int, bool]]:
    runs: list[tuple[int, int, bool]] = []
    for index in range(len(bounds) - 1):
        start, stop = bounds[index], bounds[index + 1]
        if stop > start:
            _join(runs, start, stop, is_zero(view[start:stop]))
    return runs


def _join(runs: list[tuple[int, int, bool]], start: int, stop: int, empty: bool) -> None:
    """Add a run, or make the last one longer."""
    if runs and runs[-1][2] == empty:
        runs[-1] = (runs[-1][0], stop, empty)
    else:
        runs.append((start, stop, empty))
