"""Where the fields of a qcow2 image lie: every table, found by walking the image's bytes.

Knows nothing of Diskwright's own parsers, which are under test. The image is a sound one.

Source: QEMU, docs/interop/qcow2.txt.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

OFFSET = 0x00FFFFFFFFFFFE00
COPIED = 1 << 63
COMPRESSED = 1 << 62

#: field -> (byte, bits)
HEADER = {
    "magic": (0, 32),
    "version": (4, 32),
    "backing_file_offset": (8, 64),
    "backing_file_size": (16, 32),
    "cluster_bits": (20, 32),
    "size": (24, 64),
    "crypt_method": (32, 32),
    "l1_size": (36, 32),
    "l1_table_offset": (40, 64),
    "refcount_table_offset": (48, 64),
    "refcount_table_clusters": (56, 32),
    "nb_snapshots": (60, 32),
    "snapshots_offset": (64, 64),
}
HEADER_V3 = {
    "incompatible_features": (72, 64),
    "compatible_features": (80, 64),
    "autoclear_features": (88, 64),
    "refcount_order": (96, 32),
    "header_length": (100, 32),
    "compression_type": (104, 8),
}
EXTENSIONS = {
    0: "end",
    0xE2792ACA: "backing format",
    0x6803F857: "feature table",
    0x23852875: "bitmaps",
    0x44415441: "data file",
}
SNAPSHOT = {
    "l1_table_offset": (0, 64),
    "l1_size": (8, 32),
    "id_str_size": (12, 16),
    "name_size": (14, 16),
    "date_sec": (16, 32),
    "date_nsec": (20, 32),
    "vm_clock_nsec": (24, 64),
    "vm_state_size": (32, 32),
    "extra_data_size": (36, 32),
    "extra vm_state_size": (40, 64),
    "extra disk_size": (48, 64),
    "extra icount": (56, 64),
}
BITMAPS = {
    "nb_bitmaps": (0, 32),
    "reserved": (4, 32),
    "directory_size": (8, 64),
    "directory_offset": (16, 64),
}
BITMAP = {
    "table_offset": (0, 64),
    "table_size": (8, 32),
    "flags": (12, 32),
    "type": (16, 8),
    "granularity_bits": (17, 8),
    "name_size": (18, 16),
    "extra_data_size": (20, 32),
    "name": (24, 8),
}


class Place(NamedTuple):
    """A field: `bits` of them, most significant byte first; `shift` where it is part of a byte."""

    offset: int
    bits: int
    shift: int = 0

    def get(self, data: bytes) -> int:
        """The field's value."""
        length = max(self.bits // 8, 1)
        value = int.from_bytes(data[self.offset : self.offset + length], "big")
        return value >> self.shift & ((1 << self.bits) - 1)

    def put(self, data: bytearray, value: int) -> None:
        """Change the field; bits that do not fit are dropped."""
        mask = (1 << self.bits) - 1
        length = max(self.bits // 8, 1)
        old = int.from_bytes(data[self.offset : self.offset + length], "big")
        made = old & ~(mask << self.shift) | (value & mask) << self.shift
        data[self.offset : self.offset + length] = made.to_bytes(length, "big")


class Places:
    """The fields of an image by name, and where its tables are.

    Attributes:
        fields: name -> `Place`; the part before the first dot is the table.
        tables: name -> host offset, of one table (or cluster) of each kind.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.fields: dict[str, Place] = {}
        self.tables: dict[str, int] = {"header": 0}
        self._group("header", 0, HEADER)
        self.version = self.value("header.version")
        if self.version >= 3:
            self._group("header", 0, HEADER_V3)
        self.bits = self.value("header.cluster_bits")
        self.size = 1 << self.bits
        features = self.value("header.incompatible_features") if self.version >= 3 else 0
        self.words = 2 if features & 16 else 1
        self.external = bool(features & 4)
        self._find_extensions()
        self._find_l1("", self.value("header.l1_table_offset"), self.value("header.l1_size"))
        self._find_snapshots()
        if "extension bitmaps.nb_bitmaps" in self.fields:
            self._find_bitmaps()
        self._find_refcounts()

    def value(self, name: str) -> int:
        """What a field holds."""
        return self.fields[name].get(self.data)

    def _group(self, table: str, base: int, fields: dict[str, tuple[int, int]]) -> None:
        for name, (offset, bits) in fields.items():
            self.fields[f"{table}.{name}"] = Place(base + offset, bits)

    def _find_extensions(self) -> None:
        position = self.value("header.header_length") if self.version >= 3 else 72
        stop = self.value("header.backing_file_offset") or self.size
        if stop < self.size:
            self.fields["backing file.name"] = Place(stop, 8)
        while position + 8 <= stop:
            kind, length = struct.unpack_from(">II", self.data, position)
            name = f"extension {EXTENSIONS[kind]}"
            self._group(name, position, {"type": (0, 32), "length": (4, 32)})
            if kind == 0x23852875:
                self._group(name, position + 8, BITMAPS)
            elif length:
                self._group(name, position + 8, {"data": (0, 8)})
            if kind == 0:
                break
            position += 8 + (length + 7 & ~7)

    def _find_l1(self, owner: str, offset: int, entries: int) -> None:
        """The fields of an L1 table and of one entry of each kind in its L2 tables."""
        self.tables[f"{owner}l1"] = offset
        for index in range(entries):
            place = Place(offset + index * 8, 64)
            entry = place.get(self.data) & OFFSET
            self.fields.setdefault(f"{owner}l1.{'table' if entry else 'nothing'}", place)
            if entry:
                self.fields[f"{owner}l1.last"] = place
                self._find_l2(owner, entry)

    def _find_l2(self, owner: str, table: int) -> None:
        self.tables.setdefault(f"{owner}l2", table)
        for position in range(table, table + self.size, self.words * 8):
            entry = Place(position, 64).get(self.data)
            bitmap = Place(position + 8, 64).get(self.data) if self.words == 2 else 0
            kind = self._kind(entry, bitmap)
            if f"{owner}l2.{kind}" in self.fields:
                continue
            self.fields[f"{owner}l2.{kind}"] = Place(position, 64)
            if self.words == 2:
                self.fields[f"{owner}l2.{kind} bitmap"] = Place(position + 8, 64)
            if kind == "compressed":
                bits = 62 - (self.bits - 8)
                where = entry & ((1 << bits) - 1) & -self.size
                self.tables[f"{owner}compressed"] = where
            elif entry & OFFSET and not self.external:
                self.tables.setdefault(f"{owner}{kind}", entry & OFFSET)

    def _kind(self, entry: int, bitmap: int) -> str:
        if entry & COMPRESSED:
            return "compressed"
        zero = entry & 1 or bitmap >> 32
        if entry & OFFSET or entry & COPIED:
            if self.words == 2 and bitmap not in (0xFFFFFFFF, 0xFFFFFFFF << 32):
                return "some"
            return "kept zero" if zero else "data"
        return "zero" if zero else "nothing"

    def _find_snapshots(self) -> None:
        position = self.value("header.snapshots_offset")
        for number in range(self.value("header.nb_snapshots")):
            self.tables.setdefault("snapshot table", position)
            name = f"snapshot {number}"
            self._group(name, position, SNAPSHOT)
            extra = self.value(f"{name}.extra_data_size")
            words = position + 40 + extra
            identifier = self.value(f"{name}.id_str_size")
            self._group(name, words, {"id": (0, 8), "name": (identifier, 8)})
            offset, size = self.value(f"{name}.l1_table_offset"), self.value(f"{name}.l1_size")
            self._find_l1(f"{name} ", offset, size)
            position = words + identifier + self.value(f"{name}.name_size") + 7 & ~7

    def _find_bitmaps(self) -> None:
        position = self.value("extension bitmaps.directory_offset")
        self.tables["bitmap directory"] = position
        for number in range(self.value("extension bitmaps.nb_bitmaps")):
            name = f"bitmap {number}"
            self._group(name, position, BITMAP)
            table = self.value(f"{name}.table_offset")
            self.tables[f"{name} table"] = table
            for index in range(self.value(f"{name}.table_size")):
                place = Place(table + index * 8, 64)
                entry = place.get(self.data)
                kind = "bits" if entry & OFFSET else "ones" if entry & 1 else "zeroes"
                self.fields.setdefault(f"{name} table.{kind}", place)
                if entry & OFFSET:
                    self.tables.setdefault(f"{name} bits", entry & OFFSET)
            position += 24 + self.value(f"{name}.name_size") + 7 & ~7

    def _find_refcounts(self) -> None:
        offset = self.value("header.refcount_table_offset")
        entries = self.value("header.refcount_table_clusters") * self.size // 8
        self.tables["refcount table"] = offset
        blocks = {}
        for index in range(entries):
            place = Place(offset + index * 8, 64)
            entry = place.get(self.data)
            self.fields.setdefault(f"refcount table.{'block' if entry else 'nothing'}", place)
            if entry:
                self.fields["refcount table.last"] = place
                self.tables.setdefault("refcount block", entry)
                blocks[index] = entry
        width = 1 << (self.value("header.refcount_order") if self.version >= 3 else 4)
        places = {"free": self._free_cluster(blocks, width), **self.tables}
        for name, where in places.items():
            block, inside = divmod(where >> self.bits, self.size * 8 // width)
            if block in blocks:
                self.fields[f"refcount.{name}"] = _counter(blocks[block], inside, width)

    def _free_cluster(self, blocks: dict[int, int], width: int) -> int:
        per_block = self.size * 8 // width
        for block, where in sorted(blocks.items()):
            for inside in range(per_block):
                if not _counter(where, inside, width).get(self.data):
                    return block * per_block + inside << self.bits
        return len(self.data)


def _counter(block: int, index: int, width: int) -> Place:
    """A refcount of a block at a host offset."""
    if width >= 8:
        return Place(block + index * width // 8, width)
    return Place(block + index * width // 8, width, index * width % 8)
