"""Random writes to a disk, in the words of qemu-io, with what must be read afterwards.

Data are stamps: each sector carries its number and the number of the write, so that data of
another place or of another time is seen. What a discard leaves is open; QEMU says it.
"""

from __future__ import annotations

import random
from pathlib import Path

SECTOR = 512
MOST = 384 * 1024


class Pattern:
    """A disk's model beside the commands that make it so.

    Attributes:
        commands: for `Bench.write`.
        model: what is read.
        open: 1 for each sector whose content a discard left open.
        touched: the units that may be allocated, which QEMU does not write compressed.
    """

    def __init__(self, size: int, unit: int, rng: random.Random, *, stamps: Path) -> None:
        self.size = size
        self.unit = unit
        self.rng = rng
        self.stamps = stamps
        self.model = bytearray(size)
        self.open = bytearray(size // SECTOR)
        self.touched: set[int] = set()
        self._packed: set[int] = set()  # the units written compressed
        self._freed = False  # one of them was changed
        self.commands: list[str] = []

    def fill(self, count: int, *, encodes: bool, discards: bool = True) -> list[str]:
        """Add `count` writes of every kind; returns their commands alone."""
        before = len(self.commands)
        kinds = [self.data, self.data, self.data, self.zero, self.zero_unmap]
        if discards:
            kinds.append(self.discard)
        if encodes:
            kinds += [self.encoded, self.encoded]
        first = [self.data, *([self.encoded] if encodes else [])]
        for number in range(count):
            kind = first[number] if number < len(first) else self.rng.choice(kinds)
            kind(*self._range())
        return self.commands[before:]

    def data(self, offset: int, length: int) -> None:
        name = self._stamp(offset, length)
        self.commands.append(f"write -s ../stamps/{name} {offset} {length}")

    def zero(self, offset: int, length: int) -> None:
        self._zeroed(offset, length)
        self.commands.append(f"write -z {offset} {length}")

    def zero_unmap(self, offset: int, length: int) -> None:
        self._zeroed(offset, length)
        self.commands.append(f"write -z -u {offset} {length}")

    def discard(self, offset: int, length: int) -> None:
        first, stop = offset // SECTOR, (offset + length) // SECTOR
        self.open[first:stop] = bytes([1]) * (stop - first)
        self._touch(offset, length)
        self.commands.append(f"discard {offset} {length}")

    def encoded(self, offset: int, length: int) -> None:
        """Whole units, compressed; some are noise, which does not become shorter.

        Where the range meets units that were written before, plain data take its place; and from
        the first change of a compressed unit on: QEMU then puts compressed data into the cluster
        that it has given to somebody else ("OFLAG_COPIED data cluster", says its own check).
        """
        offset -= offset % self.unit
        length = min(-(-length // self.unit) * self.unit, self.size - offset)
        units = self._units(offset, length)
        if units & self.touched or self._freed:
            self.data(offset, length)
            return
        name = self._stamp(offset, length, noise=self.rng.random() < 0.2)
        self._packed |= units
        self.commands.append(f"write -c -s ../stamps/{name} {offset} {length}")

    def _touch(self, offset: int, length: int) -> None:
        units = self._units(offset, length)
        self._freed = self._freed or bool(units & self._packed)
        self.touched |= units

    def _units(self, offset: int, length: int) -> set[int]:
        return set(range(offset // self.unit, -(-(offset + length) // self.unit)))

    def _range(self) -> tuple[int, int]:
        """A range of sectors; half of them begin or end where a unit does."""
        sectors = self.size // SECTOR
        per_unit = max(1, self.unit // SECTOR)
        longest = max(1, min(3 * per_unit, MOST // SECTOR, sectors))
        length = self.rng.randint(1, longest)
        first = self.rng.randint(0, sectors - length)
        if self.rng.random() < 0.5:
            first -= first % per_unit
        if self.rng.random() < 0.3:
            length = max(1, -(-length // per_unit) * per_unit)
        length = min(length, sectors - first)
        return first * SECTOR, length * SECTOR

    def _zeroed(self, offset: int, length: int) -> None:
        self._known(offset, length)
        self.model[offset : offset + length] = bytes(length)

    def _known(self, offset: int, length: int) -> None:
        first, stop = offset // SECTOR, (offset + length) // SECTOR
        self.open[first:stop] = bytes(stop - first)
        self._touch(offset, length)

    def _stamp(self, offset: int, length: int, *, noise: bool = False) -> str:
        number = len(list(self.stamps.iterdir()))
        if noise:
            content = self.rng.randbytes(length)
        else:
            first, stop = offset // SECTOR, (offset + length) // SECTOR
            content = b"".join(
                b"sector%12d write%8d" % (sector, number) * (SECTOR // 32)
                for sector in range(first, stop)
            )
        assert len(content) == length
        self._known(offset, length)
        self.model[offset : offset + length] = content
        (self.stamps / str(number)).write_bytes(content)
        return str(number)

    def verify(self, found: bytes) -> None:
        """Compare what was read with what is known."""
        assert len(found) >= self.size  # a format may round up
        for sector, left_open in enumerate(self.open):
            at = sector * SECTOR
            if not left_open and found[at : at + SECTOR] != self.model[at : at + SECTOR]:
                raise AssertionError(
                    f"sector {sector}: {found[at : at + 40]!r}, "
                    f"not {bytes(self.model[at : at + 40])!r}\n{self.commands}"
                )
