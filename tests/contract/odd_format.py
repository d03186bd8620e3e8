"""A format nobody else has, so that the engine is not one format in disguise.

Two data children, validity in units far smaller than a cluster, entries of two words, a
journal, encoded units, a transform, a first write. Layout of the `file` child:

    sector 0        magic, in-use flag, size, scramble flag
    64 KiB          journal: one record, valid by its checksum
    128 KiB         table, in pieces of two sectors for 64 clusters: 64-bit words of the host
                    offset and flags in the first, of validity bits in the second
    after the table clusters of even index; those of odd index lie in the `data` child
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence

from diskwright.block.child import Child
from diskwright.block.extent import DATA, UNALLOCATED, ZERO
from diskwright.block.info import CheckResult
from diskwright.block.limits import Limits
from diskwright.block.mapped import Allocation, Encoder, Freed, MappedNode, Place, Run, Unit
from diskwright.block.opener import Opener
from diskwright.block.options import Option, Options
from diskwright.block.permission import Role
from diskwright.block.table_cache import Journal, Slice, TableCache
from diskwright.errors import FormatError

CLUSTER, FILL = 32768, 512
JOURNAL_AT, TABLE_AT, SLICE, HALF = 65536, 131072, 1024, 64
MAX_SIZE = 1 << 34  # the whole table is looked at as an image is opened
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
    create_options = Options(Option("size", "size"), Option("scramble", "bool", False))

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        self.file = opener.open_child(self, "file", options["file"], Role.STORAGE)
        magic, _, self.size, scramble = _HEAD.unpack(self.file.read(0, _HEAD.size))
        self.table_bytes = -(-self.size // CLUSTER // HALF) * SLICE
        if magic != b"ODDF" or scramble > 1:
            raise FormatError("not an odd image", field="magic", value=magic, offset=0)
        if self.size > MAX_SIZE or TABLE_AT + self.table_bytes > self.file.size:
            raise FormatError("no table for that size", field="size", value=self.size, offset=8)
        self.has_transform = bool(scramble)
        beside = {"driver": "file", "filename": self.file.node.filename + ".data"}
        self.data = opener.open_child(self, "data", options["data-file"] or beside, Role.STORAGE)
        if options["backing-file"] and opener.follow_backing:
            below = opener.derive(read_only=True)
            below.open_child(self, "backing", options["backing-file"], Role.BACKING)
        self.cluster_size, self.fill_size = CLUSTER, FILL
        self.limits = Limits(discard_alignment=CLUSTER, cluster_size=CLUSTER)
        self.limits.request_alignment = FILL if scramble else 1
        journal = Journal(16 * SLICE, self._commit)
        self.cache = TableCache(self.file, self.metadata_lock, journal=journal, data=[self.data])
        self.cache.capacity_bytes = 8 * SLICE
        self.table = self.cache.table("odd", typecode="Q", byteorder="big", slice_bytes=SLICE)
        self._replay()
        self.ends = {0: TABLE_AT + -(-self.table_bytes // CLUSTER) * CLUSTER, 1: 0}
        self.free: dict[int, list[int]] = {0: [], 1: []}
        for number, word in self._named():
            self.ends[number & 1] = max(self.ends[number & 1], (word & ~7) + CLUSTER)

    def _commit(self, writes: Sequence[tuple[int, bytes]]) -> None:
        body = b"".join(struct.pack("<QI", at, len(data)) + data for at, data in writes)
        self.file.write(JOURNAL_AT, _RECORD.pack(b"JRNL", len(body), zlib.crc32(body)) + body)
        self.file.flush()
        for at, data in writes:  # the engine flushes them before the next commit
            self.file.write(at, data)

    def _replay(self) -> None:
        record = self.file.read(JOURNAL_AT, TABLE_AT - JOURNAL_AT)
        magic, length, checksum = _RECORD.unpack_from(record)
        body = record[_RECORD.size : _RECORD.size + length]
        if magic != b"JRNL" or zlib.crc32(body) != checksum:
            return
        for position in range(0, length, 12 + SLICE):
            at, _ = struct.unpack_from("<QI", body, position)
            data = body[position + 12 : position + 12 + SLICE]
            if self.read_only:  # the file stays as it is
                self.table.slices[at] = Slice(self.table, at, self.table.decode(data))
                self.table.slices[at].pins = 1
            else:
                self.file.write(at, data)

    def _named(self) -> Iterator[tuple[int, int]]:
        """(cluster, its first word) of those that have host space."""
        for first in range(0, self.table_bytes, SLICE):
            items = self.table.get(TABLE_AT + first).items
            for at in range(HALF):
                if items[at] & (NAMED | ZEROES) == NAMED:
                    yield first // SLICE * HALF + at, items[at]

    def _child(self, number: int) -> Child:
        return self.data if number & 1 else self.file

    def _entry(self, number: int) -> tuple[Slice, int]:
        """The slice of a cluster's words, and the index of the first; HALF on is the other."""
        return self.table.get(TABLE_AT + number // HALF * SLICE), number % HALF

    def map(self, offset: int, length: int, *, write: bool = False) -> Run:
        number, within = divmod(offset, CLUSTER)
        length = min(length, CLUSTER - within)
        found, at = self._entry(number)
        with self.metadata_lock:  # two words
            word, valid = found.items[at], found.items[at + HALF]
        host, child = word & ~7, self._child(number)
        if word & ENCODED:
            if valid > CLUSTER:
                raise FormatError("a unit is too long", field="length", value=valid)
            unit = Unit(number * CLUSTER, CLUSTER, child, host_offset=host, host_length=valid)
            return Run(DATA, length, child=child, plain=False, unit=unit)
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
        return Run(DATA, length, child=child, host_offset=host + within, writable=True)

    def has_block(self, offset: int) -> bool:
        found, at = self._entry(offset // CLUSTER)
        return found.items[at] & 7 == NAMED

    def allocate(self, offset: int, length: int) -> Allocation:
        number, within = divmod(offset, CLUSTER)
        length = min(length, CLUSTER - within)
        found, at = self._entry(number)
        word = found.items[at]
        fresh = word & 7 != NAMED
        host = self._take(number & 1) if fresh else word & ~7
        if word & (ENCODED | ZEROES):  # replaced whole: validity of the rest would be lost
            offset, length, within = number * CLUSTER, CLUSTER, 0
        place = Place(offset, length, self._child(number), host_offset=host + within, fresh=fresh)
        return Allocation(offset, length, [place], token=(found, at, host, 0))

    def _take(self, side: int) -> int:
        if self.free[side]:
            return self.free[side].pop()
        self.ends[side] += CLUSTER
        return self.ends[side] - CLUSTER

    def publish(self, allocation: Allocation, start: int, stop: int) -> list[Freed]:
        found, at, host, encoded = allocation.token
        number = allocation.offset // CLUSTER
        word, valid = found.items[at], found.items[at + HALF]
        if encoded:
            found.items[at], found.items[at + HALF] = host | NAMED | ENCODED, encoded
        else:
            first, last = (start % CLUSTER) // FILL, -(-(stop - number * CLUSTER) // FILL)
            bits = (1 << last) - (1 << first) | (valid if word & 7 == NAMED else 0)
            found.items[at], found.items[at + HALF] = host | NAMED, bits
        found.dirty()
        return self._freed(found, number, word) if word & ~7 != host else []

    def _freed(self, found: Slice, number: int, word: int) -> list[Freed]:
        if word & (NAMED | ZEROES) != NAMED:
            return []
        return [Freed(self._child(number), word & ~7, CLUSTER, slice=found, token=number & 1)]

    def abandon(self, allocation: Allocation) -> None:
        if allocation.places[0].fresh:
            self.free[allocation.offset // CLUSTER & 1].append(allocation.token[2])

    def unmap(self, offset: int, length: int, to: int, *, keep: bool) -> tuple[int, list[Freed]]:
        if offset % CLUSTER or (length < CLUSTER and offset + length < self.size):
            return 0, []
        number = offset // CLUSTER
        found, at = self._entry(number)
        word = found.items[at]
        found.items[at], found.items[at + HALF] = (0, 0) if to == 1 else (NAMED | ZEROES, 0)
        found.dirty()
        return min(CLUSTER, length), self._freed(found, number, word)

    def release(self, freed: Freed) -> None:
        self.free[freed.token].append(freed.host_offset)

    def decode(self, unit: Unit, encoded: memoryview, out: memoryview) -> None:
        try:
            out[:] = zlib.decompressobj().decompress(encoded, CLUSTER)
        except (zlib.error, ValueError) as error:
            raise FormatError(f"a unit cannot be decoded: {error}") from error

    def encoder(self) -> Encoder:
        return OddEncoder()

    def allocate_encoded(self, offset: int, length: int, host_length: int) -> Allocation:
        number = offset // CLUSTER
        found, at = self._entry(number)
        host = self._take(number & 1)
        place = Place(offset, host_length, self._child(number), host_offset=host)
        return Allocation(offset, length, [place], token=(found, at, host, host_length))

    def transform(self, offset: int, host_offset: int, view: memoryview, encrypt: bool) -> None:
        for at in range(0, len(view), FILL):
            part = bytes(view[at : at + FILL])
            view[at : at + FILL] = part.translate(_MIXED[(offset + at) // FILL & 0xFF])

    def first_write(self) -> None:
        self.file.write(4, struct.pack("<I", 1))
        self.file.flush()

    def finish(self) -> None:
        self.file.write(4, struct.pack("<I", 0))

    def _check(self, repair: int, report: object) -> CheckResult:
        result = CheckResult()
        places = [(number & 1, word & ~7) for number, word in self._named()]
        misplaced = sum(at % CLUSTER > 0 for _, at in places)
        result.corruptions = len(places) - len(set(places)) + misplaced
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
            file.truncate(TABLE_AT + -(-size // CLUSTER // HALF) * SLICE)
            file.write(0, _HEAD.pack(b"ODDF", 0, size, bool(options["scramble"])))
