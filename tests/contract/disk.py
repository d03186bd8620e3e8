"""A node beside a bytearray that says what it must read as."""

from __future__ import annotations

import random

from diskwright.block.node import Node
from tests.contract.noted import Noted

SECTOR = 512


class Disk:
    """Does each thing to the node and to the model; `verify` compares.

    What a discard leaves is open: each byte is the old one or zero, and stays what it is then.
    """

    def __init__(self, node: Node, model: bytes | None = None) -> None:
        self.node = node
        self.model = bytearray(node.size) if model is None else bytearray(model)
        self.noted = Noted(node)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self.node.write(offset, data, fua=fua)
        self.noted.touch(offset, len(data))
        self.model[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, *, unmap: bool = False) -> None:
        self.node.write_zeroes(offset, length, unmap=unmap)
        self.noted.touch(offset, length)
        self.model[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self.node.discard(offset, length)
        self.noted.touch(offset, length)
        found = self.node.read(offset, length)
        for at in range(0, length, SECTOR):
            part = found[at : at + SECTOR]
            old = self.model[offset + at : offset + at + len(part)]
            if part != old and any(part):
                mixed = all(a in (b, 0) for a, b in zip(part, old, strict=True))
                assert mixed, f"discard({offset}, {length}) changed the bytes at {offset + at}"
        self.model[offset : offset + length] = found

    def write_unit(self, number: int, data: bytes) -> bool:
        """Store one encoded unit; False where it would not be shorter."""
        encoder = self.node.encoder()
        assert encoder is not None
        offset = number * encoder.unit
        length = min(encoder.unit, self.node.size - offset)
        payload = encoder.encode(memoryview(data[:length].ljust(encoder.unit, b"\0")))
        if payload is None:
            return False
        self.node.write_encoded(offset, payload, length)
        self.noted.touch(offset, length)
        self.model[offset : offset + length] = data[:length]
        return True

    def resize(self, size: int) -> None:
        self.node.truncate(size)
        self.noted.resize(size)
        assert self.node.size == size
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def verify(self, start: int = 0, stop: int | None = None) -> None:
        """Compare a range, by default all."""
        stop = len(self.model) if stop is None else min(stop, len(self.model))
        start = max(start, 0)
        found = self.node.read(start, stop - start)
        expected = bytes(self.model[start:stop])
        if found != expected:
            at = next(at for at in range(len(found)) if found[at] != expected[at])
            raise AssertionError(
                f"byte {start + at} of {self.node.size} is {found[at : at + 8].hex()}…, "
                f"not {expected[at : at + 8].hex()}…"
            )


def check_clean(node: Node) -> None:
    """`check` finds nothing, where the format has one."""
    if not node.can_check:
        return
    lines: list[str] = []
    result = node.check(report=lines.append)
    assert result.clean, (
        f"{result.corruptions} corruptions, {result.leaks} leaks, "
        f"{result.check_errors} errors: {lines[:5]}"
    )


def boundaries(node: Node) -> list[int]:
    """Offsets at which something may begin or end, and their neighbours."""
    size = node.size
    units = {SECTOR, 4096, max(node.limits.cluster_size, SECTOR)}
    found = {0, 1, size // 2, size - 1, size}
    for unit in units:
        for at in (unit, 2 * unit, size // unit * unit, size // 2 // unit * unit):
            found.update((at - 1, at, at + 1))
    return sorted(at for at in found if 0 <= at <= size)


def noise(rng: random.Random, length: int) -> bytes:
    """Bytes without a zero among them, so that a hole is seen."""
    return rng.randbytes(length).translate(_WITHOUT_ZERO)


_WITHOUT_ZERO = bytes([0xA5, *range(1, 256)])
