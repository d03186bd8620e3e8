"""Entries of L1, L2 and refcount tables: their bits, and runs of them that belong together.

Source: QEMU, docs/interop/qcow2.txt, "Cluster mapping", "Host cluster management".
"""

from __future__ import annotations

import sys
from array import array

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Rest = tuple[array[int], int, int]

#: "Nothing else names this": the cluster may be overwritten in place.
COPIED = 1 << 63
#: The rest of the entry is a compressed cluster's descriptor.
COMPRESSED = 1 << 62
#: Reads as zero, whatever the cluster that the entry may name holds (version 3).
ZERO_FLAG = 1
#: Bits 9 to 55 are an offset in the file.
OFFSET_MASK = 0x00FFFFFFFFFFFE00
#: Bits that must be 0; check reports them.
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
REFTABLE_RESERVED = 0x1FF

#: Everything but the flag COPIED.
WITHOUT_COPIED = COPIED - 1
#: An entry without flags lies below this.
PLAIN_LIMIT = 1 << 56

_NO_ENTRY = -1

#: So many entries are compared as a whole before each is looked at.
_PIECE = 64


def runs(items: array[int], step: int) -> Iterator[tuple[int, int]]:
    """(index, count) of maximal runs in which each entry is the one before plus `step`.

    Entries that are 0 are left out, and one that names no plain cluster is a run of its own: the
    entry of a zero cluster without space, and `step` more, are no neighbours.
    """
    start = 0
    expected = _NO_ENTRY
    last = 0
    for base in range(0, len(items), _PIECE):
        piece = items[base : base + _PIECE]
        if _is_run(piece, step):
            if piece[0] != expected and (last or piece[0]):
                if last:
                    yield start, base - start
                last, start = piece[0], base
            expected = piece[-1] + step if last else _NO_ENTRY
            continue
        for index, entry in enumerate(piece, base):
            if entry == expected:
                expected += step
                continue
            if last:
                yield start, index - start
            last, start = entry, index
            plain = entry & OFFSET_MASK and not entry & COMPRESSED
            expected = entry + step if plain else _NO_ENTRY
    if last:
        yield start, len(items) - start


def _is_run(piece: array[int], step: int) -> bool:
    """Whether a whole piece is one run, or nothing but zeroes."""
    first = piece[0]
    if not first:
        return not piece[-1] and piece == _ZEROES
    whole = piece[-1] - first == (_PIECE - 1) * step and len(piece) == _PIECE
    plain = first & OFFSET_MASK and not first & COMPRESSED
    return whole and bool(plain) and piece == _progression(first, step)


_ZEROES = array("Q", bytes(8 * _PIECE))

#: A one in each item, as one long number; and by step what is `step` higher in each.
_ONES = int.from_bytes((1).to_bytes(8, "little") * _PIECE, "little")
_ramps: dict[int, int] = {}


def _progression(first: int, step: int) -> array[int]:
    """A piece of `first`, `first` + `step` and so on: long numbers are added up fast."""
    ramp = _ramps.get(step)
    if ramp is None:
        ramp = sum(at * step << 64 * at for at in range(_PIECE))
        _ramps[step] = ramp
    made = array("Q", (first * _ONES + ramp).to_bytes(8 * _PIECE, "little"))
    if sys.byteorder != "little":
        made.byteswap()
    return made


def run_length(entry: int, rest: Rest, step: int) -> int:
    """How many entries, `entry` being the first, are each `step` above the one before.

    Args:
        entry: what was read of the table once, and is not looked at again.
        rest: (items, start, stop): those that follow it.
    """
    items, start, stop = rest
    expected = entry + step
    index, ahead = start, _PIECE - 1
    while index < stop and items[index] == expected:
        whole = (
            index + ahead < stop
            and items[index + ahead] == expected + ahead * step
            and items[index : index + _PIECE] == _progression(expected, step)
        )
        count = _PIECE if whole else 1
        index += count
        expected += count * step
    return 1 + index - start


def named(items: array[int]) -> Iterator[tuple[int, int]]:
    """(index, entry) of the entries that are not 0, of a table that may be mostly empty."""
    for base in range(0, len(items), _PIECE):
        piece = items[base : base + _PIECE]
        if piece != _ZEROES:
            for index, entry in enumerate(piece, base):
                if entry:
                    yield index, entry


def is_empty(items: array[int]) -> bool:
    """Whether every entry is 0."""
    return not items or (not items[0] and items == array(items.typecode, (0,)) * len(items))


def used_length(items: array[int]) -> int:
    """How many items there are up to the last that is not 0."""
    return -(-len(items.tobytes().rstrip(b"\0")) // items.itemsize)


def number(value: int) -> str:
    """A number as QEMU's sentences about damage show it: hexadecimal, and 0 as "0"."""
    return f"{value:#x}" if value else "0"


def add_to_counts(counts: array[int], start: int, stop: int, step: int) -> None:
    """Add `step` to counts[start:stop]; the caller knows that every result fits."""
    first, length = counts[start], stop - start
    if length == 1:
        counts[start] = first + step
        return
    part = counts[start:stop]
    if part == array(counts.typecode, (first,)) * length:  # most often they are alike
        counts[start:stop] = array(counts.typecode, (first + step,)) * length
    else:
        counts[start:stop] = array(counts.typecode, [value + step for value in part])
