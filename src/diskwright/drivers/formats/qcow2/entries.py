"""Entries of L1, L2 and refcount tables: their bits, and runs of them that belong together.

Source: QEMU, docs/interop/qcow2.txt, "Cluster mapping", "Host cluster management".
"""

from __future__ import annotations

from array import array

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

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


def runs(items: array[int], step: int) -> Iterator[tuple[int, int]]:
    """(index, count) of maximal runs in which each entry is the one before plus `step`.

    Entries that are 0 are left out, and a compressed one is a run of its own.
    """
    start = 0
    expected = _NO_ENTRY
    last = 0
    for index, entry in enumerate(items):
        if entry == expected:
            expected += step
            continue
        if last:
            yield start, index - start
        last, start = entry, index
        plain = entry and not entry & COMPRESSED
        expected = entry + step if plain else _NO_ENTRY
    if last:
        yield start, len(items) - start


def is_empty(items: array[int]) -> bool:
    """Whether every entry is 0."""
    return items.count(0) == len(items)


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
    if part.count(first) == length:  # most often they are alike
        counts[start:stop] = array(counts.typecode, (first + step,)) * length
    else:
        counts[start:stop] = array(counts.typecode, [value + step for value in part])
