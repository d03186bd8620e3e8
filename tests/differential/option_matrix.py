"""Which create options go together, and rows in which every two values of them meet.

A row is a `Combo`: a format, its size, its create options and what it lies upon. `pairs(format)`
covers every pair of values that may stand together (all-pairs testing); `singles(format)`
every value at least once. Both come out the same on every machine, so that a test's name
(`Combo.name`) repeats it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

KIB = 1024
MIB = 1024 * KIB
SECTOR = 512

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


class Backing(NamedTuple):
    """What an image lies upon: a format, and a size beside the image's."""

    format: str
    longer: bool


BACKINGS = {
    "none": None,
    "raw-shorter": Backing("raw", False),
    "raw-longer": Backing("raw", True),
    "qcow2-shorter": Backing("qcow2", False),
    "qcow2-longer": Backing("qcow2", True),
}

#: format -> axis -> its values; the first of each is what an image has without the option
AXES: dict[str, dict[str, tuple[str, ...]]] = {
    "raw": {
        "preallocation": ("off", "falloc", "full"),
        "extent": ("tiny", "whole", "odd"),
    },
    "qcow2": {
        "cluster_size": (
            "64k",
            "512",
            *(f"{1 << bits}k" for bits in (0, 1, 2, 3, 4, 5, 7, 8, 9)),
            "1M",
            "2M",
        ),
        "refcount_bits": ("16", "1", "2", "4", "8", "32", "64"),
        "compat": ("1.1", "0.10"),
        "lazy_refcounts": ("off", "on"),
        "compression_type": ("zlib", "zstd"),
        "extended_l2": ("off", "on"),
        "preallocation": ("off", "metadata", "falloc", "full"),
        "data_file": ("none", "beside"),
        "data_file_raw": ("off", "on"),
        "backing": tuple(BACKINGS),
        "extent": ("odd", "whole", "tiny"),
    },
    "vdi": {
        "static": ("off", "on"),
        "extent": ("odd", "whole", "tiny"),
    },
    "vpc": {
        "subformat": ("dynamic", "fixed"),
        "force_size": ("off", "on"),
        "extent": ("odd", "whole", "tiny"),
    },
}

#: axes that are no words for `-o` -> the create options that they stand for
NO_OPTIONS = {"backing": ("backing_file", "backing_fmt"), "extent": ("size",)}


def _may_be(format: str, row: Mapping[str, str]) -> bool:
    """Whether values (not necessarily of every axis) may stand together."""
    if format != "qcow2":
        return True
    covers = row.get("backing", "none") != "none" and row.get("preallocation", "off") != "off"
    extended = row.get("extended_l2", "on" if covers else "off") == "on"
    raw = row.get("data_file_raw", "off") == "on"
    beside = row.get("data_file", "beside" if raw else "none") == "beside"
    if raw and (not beside or row.get("backing", "none") != "none"):
        return False
    if row.get("compat") == "0.10" and (
        row.get("refcount_bits", "16") != "16"
        or row.get("lazy_refcounts", "off") != "off"
        or row.get("compression_type", "zlib") != "zlib"
        or beside
        or extended
    ):
        return False
    if extended:
        return in_bytes(row.get("cluster_size", "64k")) >= 16 * KIB
    return not covers


class Combo(NamedTuple):
    """One row: a format and a value for each of its axes."""

    format: str
    values: tuple[tuple[str, str], ...]

    @property
    def row(self) -> Row:
        return dict(self.values)

    @property
    def name(self) -> str:
        """What pytest calls it: the format and what is not the default."""
        axes = AXES[self.format]
        said = [
            value if axis in NO_OPTIONS else f"{axis}={value}"
            for axis, value in self.values
            if value != axes[axis][0]
        ]
        return "-".join([self.format, *said])

    @property
    def unit(self) -> int:
        """Bytes that the format maps at once."""
        if self.format == "qcow2":
            return in_bytes(self.row["cluster_size"])
        return {"raw": 4096, "vdi": MIB, "vpc": 2 * MIB}[self.format]

    @property
    def size(self) -> int:
        """Of the disk, in bytes: a few units, some tables where the units are small."""
        unit = self.unit
        units = {512: 700, 1024: 500, 2048: 300, 4096: 300}.get(
            unit, max(4, min(64, 3 * MIB // unit))
        )
        extent = self.row["extent"]
        if extent == "tiny":
            return max(SECTOR, min(unit // 2, 20 * SECTOR))
        odd = min(unit // 2 // SECTOR + 3, 37) * SECTOR if extent == "odd" else 0
        return units * unit + odd

    @property
    def words(self) -> str:
        """The create options of `disk` as `-o` takes them."""
        return self.words_for("disk")

    def words_for(self, image: str) -> str:
        """The create options as `-o` takes them; a data file has its image's name before."""
        axes = AXES[self.format]
        return ",".join(
            f"{axis}={image}.data" if axis == "data_file" else f"{axis}={value}"
            for axis, value in self.values
            if axis not in NO_OPTIONS and value != axes[axis][0]
        )

    @property
    def data_file(self) -> str | None:
        """What the data file of `disk` is called, where there is one."""
        return "disk.data" if self.row.get("data_file", "none") != "none" else None

    @property
    def backing(self) -> Backing | None:
        return BACKINGS[self.row.get("backing", "none")]

    @property
    def backing_size(self) -> int:
        """Of the backing file's disk: well beyond this one's, or amid one of its units."""
        if self.backing is not None and self.backing.longer:
            return self.size + 3 * self.unit + 5 * SECTOR
        return max(SECTOR, self.size // 2 // SECTOR * SECTOR - SECTOR)

    @property
    def encodes(self) -> bool:
        """Whether QEMU writes compressed to a new image: not to clusters that are there.

        Nor is anything compressed in a data file.
        """
        return (
            self.format == "qcow2" and self.row["preallocation"] == "off" and self.data_file is None
        )

    @property
    def checks(self) -> bool:
        return self.format in ("qcow2", "vdi")


def in_bytes(words: str) -> int:
    """A number with k or M behind it."""
    return int(words.rstrip("kM")) * {"k": KIB, "M": MIB}.get(words[-1], 1)


def default(format: str, **values: str) -> Combo:
    """The row of defaults, with some values changed."""
    row = {axis: choices[0] for axis, choices in AXES[format].items()}
    if format == "raw":
        row["extent"] = "odd"
    assert values.keys() <= row.keys()
    return Combo(format, tuple({**row, **values}.items()))


@cache
def pairs(format: str) -> tuple[Combo, ...]:
    """Rows in which every two values that may stand together do."""
    axes = AXES[format]
    open_pairs: set[Pair] = set()
    for one, other in itertools.combinations(axes, 2):
        for a, b in itertools.product(axes[one], axes[other]):
            if _may_be(format, {one: a, other: b}):
                open_pairs.add(((one, a), (other, b)))
    return _cover(format, open_pairs, lambda row: set(itertools.combinations(row.items(), 2)))


@cache
def singles(format: str) -> tuple[Combo, ...]:
    """Rows in which every value is at least once."""
    wanted = {((axis, value),) for axis, values in AXES[format].items() for value in values}
    return _cover(format, wanted, lambda row: {((axis, value),) for axis, value in row.items()})


def _cover(format: str, wanted: set, covered: Callable[[Row], set]) -> tuple[Combo, ...]:
    """Rows, each the one of many tries that has most of what is still wanted."""
    axes = AXES[format]
    rng = random.Random(f"rows of {format}")
    missing = set(wanted)
    rows: list[Row] = []
    while missing:
        seed_items = dict(min(missing, key=repr))
        tries = [_complete(format, axes, dict(seed_items), rng) for _ in range(60)]
        best = max(tries, key=lambda row: len(covered(row) & missing))
        missing -= covered(best)
        rows.append(best)
    return tuple(Combo(format, tuple(row.items())) for row in rows)


def _complete(format: str, axes: Mapping, start: Row, rng: random.Random) -> Row:
    """A row that has the values of `start`, the others by chance."""
    while True:
        row = {axis: start.get(axis) or rng.choice(values) for axis, values in axes.items()}
        if _may_be(format, row):
            return row


def check_rows() -> None:
    """Hold what this module promises; run by a test."""
    for format, axes in AXES.items():
        rows = pairs(format)
        assert len({combo.name for combo in rows}) == len(rows), format
        for combo in (*rows, *singles(format)):
            assert _may_be(format, combo.row)
        for one, other in itertools.combinations(axes, 2):
            met = {(combo.row[one], combo.row[other]) for combo in rows}
            for a, b in itertools.product(axes[one], axes[other]):
                assert ((a, b) in met) == _may_be(format, {one: a, other: b}), (one, a, other, b)
        for axis, values in axes.items():
            assert {combo.row[axis] for combo in singles(format)} == set(values)
