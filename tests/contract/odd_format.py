"""A format nobody else has, so that the engine is not one format in disguise.

Two data children, validity in units far smaller than a cluster, entries of two words, a
journal, encoded units, a transform, a first write. Layout of the `file` child:

    sector 0        magic, in-use flag, size, scramble flag
    64 KiB          journal: one record, valid by its checksum
    128 KiB         table: two 64-bit words a cluster (host offset and flags; validity bits)
    after the table clusters of even index; those of odd index lie in the `data` child
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from diskwright.block.child import Child
from diskwright.block.extent import DATA, UNALLOCATED, ZERO
from diskwright.block.info import CheckResult, Repair
from diskwright.block.limits import Limits
from diskwright.block.mapped import Allocation, Encoder, Freed, MappedNode, Place, Run, Unit
from diskwright.block.opener import Opener
from diskwright.block.options import Option, Options
from diskwright.block.permission import Role
from diskwright.block.table_cache import Journal, Slice, TableCache
from diskwright.errors import FormatError

CLUSTER, FILL = 32768, 512
JOURNAL_AT, TABLE_AT, SLICE = 65536, 131072, 512
_HEAD = struct.Struct("<4sIQI")
_RECORD = struct.Struct("<4sII")
_MIXED = [bytes(value ^ mask for value in range(256)) for mask in range(256)]
NAMED, ENCODED, ZEROES = 1, 2, 4


class OddEncoder(Encoder):
    """zlib, in any order."""

    unit = CLUSTER

    def encode(self, view: memoryview) -> bytes | None:
        """Shorter, or None."""
        payload = zlib.compress(view, 1)
        return payload if len(payload) < CLUSTER // 2 else None


class Odd(MappedNode):
    """See the module's text."""

    driver = "odd"
    options = Options(Option("data-file"), Option("backing-file"))
    create_options = Options(
        Option("size", "size"), Option("scramble", "bool", False), Option("backing_file")
    )

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        self.file = opener.open_child(self, "file", options["file"], Role.STORAGE)
        magic, _, self.size, scramble = _HEAD.unpack(self.file.read(0, _HEAD.size))
        if magic != b"ODDF":
            raise FormatError("not an odd image", field="magic", value=magic, offset=0)
        self.has_transform = bool(scramble)
        name = options["data-file"] or {
            "driver": "file",
            "filename": self.file.node.filename + ".data",
        }
        self.data = opener.open_child(self, "data", name, Role.STORAGE)
        if options["backing-file"] and opener.follow_backing:
            opener.derive(read_only=True).open_child(
                self, "backing", options["backing-file"], Role.BACKING
            )
        self.cluster_size, self.fill_size = CLUSTER, FILL
        sector = FILL if scramble else 1
        self.limits = Limits(
            request_alignment=sector, discard_alignment=CLUSTER, cluster_size=CLUSTER
        )
        self.clusters = -(-self.size // CLUSTER)
        self.table_bytes = -(-self.clusters * 16 // SLICE) * SLICE
        self.cache = TableCache(
            self.file,
            self.metadata_lock,
            capacity_bytes=8 * SLICE,
            journal=Journal(16 * SLICE, self._commit),
            data=[self.data],
        )
        self.table = self.cache.table("odd", typecode="Q", byteorder="big", slice_bytes=SLICE)
        self._replay()
        self._find_room()

    def _commit(self, writes: Sequence[tuple[int, bytes]]) -> None:
        body = b"".join(struct.pack("<QI", at, len(data)) + data for at, data in writes)
        self.file.write(JOURNAL_AT, _RECORD.pack(b"JRNL", len(body), zlib.crc32(body)) + body)
        self.file.flush()
        for at, data in writes:
            self.file.write(at, data)
        self.file.flush()

    def _replay(self) -> None:
        record = self.file.read(JOURNAL_AT, TABLE_AT - JOURNAL_AT)
        magic, length, checksum = _RECORD.unpack_from(record)
        body = record[_RECORD.size : _RECORD.size + length]
        if magic != b"JRNL" or zlib.crc32(body) != checksum:
            return
        self.replayed: dict[int, bytes] = {}
        position = 0
        while position < len(body):
            at, size = struct.unpack_from("<QI", body, position)
            self.replayed[at] = body[position + 12 : position + 12 + size]
            position += 12 + size
        if not self.read_only:
            for at, data in self.replayed.items():
                self.file.write(at, data)
            self.file.flush()
            return
        for at, data in self.replayed.items():
            self.table.slices[at] = Slice(self.table, at, self.table.decode(data))

    def _entries(self) -> list[tuple[int, int, int]]:
        found = []
        for at in range(0, self.table_bytes, SLICE):
            items = self.table.get(TABLE_AT + at).items
            for index in range(0, len(items), 2):
                if items[index] & NAMED:
                    found.append((at // 16 + index // 2, items[index], items[index + 1]))
        return found

    def _find_room(self) -> None:
        self.ends = {0: TABLE_AT + -(-self.table_bytes // CLUSTER) * CLUSTER, 1: 0}
        self.free: dict[int, list[int]] = {0: [], 1: []}
        for number, word, _ in self._entries():
            if not word & ZEROES:
                self.ends[number & 1] = max(self.ends[number & 1], (word & ~7) + CLUSTER)

    def _child(self, number: int) -> Child:
        return self.data if number & 1 else self.file

    def _at(self, number: int) -> tuple[int, int]:
        key = TABLE_AT + number * 16 // SLICE * SLICE
        return key, (number * 16 - (key - TABLE_AT)) // 8

    def map(self, offset: int, length: int, *, write: bool = False) -> Run:
        number, within = divmod(offset, CLUSTER)
        length = min(length, CLUSTER - within)
        key, at = self._at(number)
        found = self.table.get(key)
        with self.metadata_lock:  # two words
            word, valid = found.items[at], found.items[at + 1]
        host = word & ~7
        if word & ENCODED:
            unit = Unit(
                number * CLUSTER, CLUSTER, self._child(number), host_offset=host, host_length=valid
            )
            return Run(DATA, length, child=unit.child, plain=False, unit=unit)
        if word & ZEROES:
            return Run(ZERO, length)
        first = within // FILL
        state = valid >> first & 1
        stop = first + 1
        while stop < 64 and valid >> stop & 1 == state:
            stop += 1
        length = min(length, stop * FILL - within)
        if not word & NAMED or not state:
            return Run(UNALLOCATED, length)
        return Run(
            DATA, length, child=self._child(number), host_offset=host + within, writable=True
        )

    def allocate(self, offset: int, length: int) -> Allocation:
        number, within = divmod(offset, CLUSTER)
        length = min(length, CLUSTER - within)
        key, at = self._at(number)
        found = self.table.get(key)
        word = found.items[at]
        if word & NAMED and not word & (ENCODED | ZEROES):
            place = Place(
                offset, length, self._child(number), host_offset=(word & ~7) + within, fresh=False
            )
            return Allocation(offset, length, [place], token=(found, at, word & ~7))
        host = self._take(number & 1)
        if word & (ENCODED | ZEROES):  # replaced whole: validity of the rest would be lost
            offset, length, within = number * CLUSTER, CLUSTER, 0
        place = Place(offset, length, self._child(number), host_offset=host + within)
        return Allocation(offset, length, [place], token=(found, at, host))

    def has_block(self, offset: int) -> bool:
        key, at = self._at(offset // CLUSTER)
        return self.table.get(key).items[at] & 7 == NAMED

    def _take(self, side: int) -> int:
        if self.free[side]:
            return self.free[side].pop()
        self.ends[side] += CLUSTER
        return self.ends[side] - CLUSTER

    def publish(self, allocation: Allocation, start: int, stop: int) -> list[Freed]:
        found, at, host = allocation.token
        number = allocation.offset // CLUSTER
        word, valid = found.items[at], found.items[at + 1]
        freed = []
        if isinstance(host, tuple):
            found.items[at], found.items[at + 1] = host[0] | NAMED | ENCODED, host[1]
        else:
            first, last = (start % CLUSTER) // FILL, -(-(stop - number * CLUSTER) // FILL)
            bits = (1 << last) - (1 << first)
            same = word & NAMED and not word & (ENCODED | ZEROES)
            found.items[at], found.items[at + 1] = host | NAMED, (valid if same else 0) | bits
        if word & NAMED and not word & ZEROES and found.items[at] & ~7 != word & ~7:
            freed.append(
                Freed(self._child(number), word & ~7, CLUSTER, slice=found, token=number & 1)
            )
        found.dirty()
        return freed

    def abandon(self, allocation: Allocation) -> None:
        if allocation.places[0].fresh:
            host = allocation.places[0].host_offset // CLUSTER * CLUSTER
            self.free[allocation.offset // CLUSTER & 1].append(host)

    def unmap(self, offset: int, length: int, to: int, *, keep: bool) -> tuple[int, list[Freed]]:
        if offset % CLUSTER or (length < CLUSTER and offset + length < self.size):
            return 0, []
        number = offset // CLUSTER
        key, at = self._at(number)
        found = self.table.get(key)
        word = found.items[at]
        found.items[at], found.items[at + 1] = (0, 0) if to == 1 else (NAMED | ZEROES, 0)
        found.dirty()
        freed = []
        if word & NAMED and not word & ZEROES:
            freed = [Freed(self._child(number), word & ~7, CLUSTER, slice=found, token=number & 1)]
        return min(CLUSTER, length), freed

    def release(self, freed: Freed) -> None:
        self.free[freed.token].append(freed.host_offset)

    def decode(self, unit: Unit, encoded: memoryview, out: memoryview) -> None:
        try:
            out[:] = zlib.decompress(encoded)
        except (zlib.error, ValueError) as error:
            raise FormatError(f"a unit cannot be decoded: {error}") from error

    def encoder(self) -> Encoder:
        return OddEncoder()

    def allocate_encoded(self, offset: int, length: int, host_length: int) -> Allocation:
        number = offset // CLUSTER
        key, at = self._at(number)
        found = self.table.get(key)
        host = self._take(number & 1)
        place = Place(offset, host_length, self._child(number), host_offset=host)
        return Allocation(offset, length, [place], token=(found, at, (host, host_length)))

    def transform(self, offset: int, host_offset: int, view: memoryview, encrypt: bool) -> None:
        for at in range(0, len(view), FILL):
            part = bytes(view[at : at + FILL])
            view[at : at + FILL] = part.translate(_MIXED[(offset + at) // FILL & 0xFF])

    def first_write(self) -> None:
        self.file.write(4, struct.pack("<I", 1))
        self.file.flush()

    def finish(self) -> None:
        self.file.write(4, struct.pack("<I", 0))

    def _check(self, repair: Repair, report: object) -> CheckResult:
        result = CheckResult()
        seen: set[tuple[int, int]] = set()
        for number, word, _ in self._entries():
            place = (number & 1, word & ~7)
            if not word & ZEROES and (place in seen or place[1] % CLUSTER):
                result.corruptions += 1
            seen.add(place) if not word & ZEROES else None
        return result

    @classmethod
    def probe(cls, head: bytes, size: int, filename: str) -> int:
        return 100 if head[:4] == b"ODDF" else 0

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        name = str(options["filename"])
        with opener.create_file({"filename": name + ".data"}):
            pass
        with opener.create_file({"filename": name}) as file:
            file.truncate(TABLE_AT + -(-size // CLUSTER) * 16 + SLICE)
            file.write(0, _HEAD.pack(b"ODDF", 0, size, bool(options["scramble"])))
