"""Encoded units: stored, read whole and in part, replaced, and hostile ones."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from diskwright.block.mapped import MappedNode
from diskwright.errors import DiskwrightError, FormatError, RangeError, ReadOnlyError
from tests.contract.disk import Disk, check_clean, noise
from tests.contract.rows import Row, opened, rows

ENCODING = rows(lambda row: row.encodes)


def _shrinking(rng, length: int) -> bytes:
    """Bytes that become shorter, and that are no zeroes."""
    return (noise(rng, 64) * (length // 64 + 1))[:length]


@ENCODING
def test_units_come_back(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        encoder = node.encoder()
        assert encoder is not None
        units = -(-node.size // encoder.unit)
        chosen = [*rng.sample(range(units - 1), min(units - 1, 20)), units - 1]
        for number in sorted(chosen) if encoder.sequential else chosen:
            assert disk.write_unit(number, _shrinking(rng, encoder.unit))
        disk.verify()
        for _ in range(40):
            start = rng.randrange(node.size)
            disk.verify(start, start + rng.randrange(1, 3 * encoder.unit))
        check_clean(node)
        found = [extent for extent in node.extents(0, node.size) if extent.encoded]
        assert sum(extent.length for extent in found) >= 3 * encoder.unit or units < 4
        path = node.filename
    with row.open(path, read_only=True) as node:
        Disk(node, disk.model).verify()
        check_clean(node)


@ENCODING
def test_units_are_written_over(row: Row, tmp_path: Path, rng):
    """In part, as a whole, by other units, by zeroes, by nothing."""
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        encoder = node.encoder()
        assert encoder is not None
        unit = encoder.unit
        units = min(node.size // unit, 6)
        for round_ in range(4):
            for number in range(units):
                disk.write_unit(number, _shrinking(rng, unit))
            for number in range(units):
                at = number * unit
                what = (number + round_) % 5
                if what == 0:
                    disk.write(at + rng.randrange(unit // 2), noise(rng, unit // 3))
                elif what == 1:
                    disk.write(at, noise(rng, unit))
                elif what == 2:
                    disk.zero(at, unit)
                elif what == 3:
                    disk.zero(at + 5, unit // 2)
                else:
                    disk.discard(at, unit)
                disk.verify(at - 600, at + unit + 600)
            if round_ % 2:
                node.flush()
        disk.verify()
        check_clean(node)


@ENCODING
def test_what_does_not_shrink_is_not_encoded(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        encoder = node.encoder()
        assert encoder is not None
        assert encoder.encode(memoryview(rng.randbytes(encoder.unit))) is None


@ENCODING
def test_decoded_units_are_kept(row: Row, tmp_path: Path, rng, monkeypatch):
    """Small reads of one unit decode it once; one decode at a time."""
    with opened(row, tmp_path) as node:
        assert isinstance(node, MappedNode)
        disk = Disk(node)
        encoder = node.encoder()
        assert encoder is not None
        disk.write_unit(1, _shrinking(rng, encoder.unit))
        decoded = []
        decode = node.decode

        def counting(unit, encoded, out):
            decoded.append(unit.offset)
            decode(unit, encoded, out)

        monkeypatch.setattr(node, "decode", counting)
        start = encoder.unit
        threads = [
            threading.Thread(target=lambda: disk.verify(start + 7, start + 100)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for at in range(0, encoder.unit - 64, max(encoder.unit // 16, 64)):
            disk.verify(start + at, start + at + 64)
        assert decoded == [start]


@ENCODING
def test_the_kept_units_are_bounded(row: Row, tmp_path: Path, rng, monkeypatch):
    from diskwright.block import mapped

    with opened(row, tmp_path) as node:
        assert isinstance(node, MappedNode)
        disk = Disk(node)
        encoder = node.encoder()
        assert encoder is not None
        monkeypatch.setattr(mapped, "DECODED_BYTES", 3 * encoder.unit)
        for number in range(min(node.size // encoder.unit, 12)):
            disk.write_unit(number, _shrinking(rng, encoder.unit))
            disk.verify(number * encoder.unit + 1, number * encoder.unit + 50)
            assert node._decoded_bytes <= 3 * encoder.unit
            assert sum(map(len, node._decoded.values())) == node._decoded_bytes
        disk.verify()


@ENCODING
def test_wrong_places_are_refused(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        encoder = node.encoder()
        assert encoder is not None
        payload = encoder.encode(memoryview(_shrinking(rng, encoder.unit)))
        assert payload is not None
        for offset, length in (
            (1, encoder.unit),
            (512 if encoder.unit > 512 else 256, encoder.unit),
            (0, encoder.unit - 1),
            (0, 2 * encoder.unit),
            (-encoder.unit, encoder.unit),
            (-(-node.size // encoder.unit) * encoder.unit, encoder.unit),
        ):
            with pytest.raises(RangeError):
                node.write_encoded(offset, payload, length)
        assert node.read(0, node.size) == bytes(node.size)
        check_clean(node)


@rows(lambda row: not row.encodes)
def test_formats_without(row: Row, tmp_path: Path):
    with opened(row, tmp_path) as node:
        assert node.encoder() is None
        with pytest.raises(DiskwrightError) as caught:
            node.write_encoded(0, b"payload", 65536)
        assert caught.value.kind == "unsupported"
        assert node.read(0, node.size) == bytes(node.size)


@ENCODING
def test_a_damaged_unit_is_an_error_of_the_format(row: Row, tmp_path: Path, rng):
    with opened(row, tmp_path) as node:
        disk = Disk(node)
        encoder = node.encoder()
        assert encoder is not None
        disk.write_unit(0, noise(rng, 300) * (encoder.unit // 300 + 1))
        disk.write_unit(2, _shrinking(rng, encoder.unit))
        path = node.filename
        run = node.map(0, 1)  # type: ignore[attr-defined]
        assert run.unit is not None
        host, length = run.unit.host_offset, min(run.unit.host_length, 200)
    with open(path, "r+b") as file:
        file.seek(host)
        file.write(bytes(255 - byte for byte in Path(path).read_bytes()[host : host + length]))
    with row.open(path, read_only=True) as node:
        for offset, count in ((0, 100), (0, min(encoder.unit, node.size)), (5, 10)):
            with pytest.raises(FormatError):
                node.read(offset, count)
        Disk(node, disk.model).verify(2 * encoder.unit)
        with pytest.raises(ReadOnlyError):
            node.write_encoded(0, b"x", encoder.unit)
