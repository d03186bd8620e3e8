"""Noticing damage while an image is in use, and keeping writes off its metadata.

An image with wrong refcounts or entries would have data written over its tables. So a write
in place, and every cluster handed out, is looked up among the clusters that hold metadata. The
first damage noticed in an image that is open for writing is noted in its header (the corrupt
bit) and ends all writes, as it does in QEMU.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock

from diskwright.block.mapped import MappedNode, NeedWork
from diskwright.block.notice import tell
from diskwright.drivers.formats.qcow2.entries import OFFSET_MASK
from diskwright.drivers.formats.qcow2.header import FEATURES_OFFSET, Incompatible
from diskwright.drivers.formats.qcow2.settings import AREAS
from diskwright.errors import DiskwrightError, IOFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable
    from typing import NoReturn

    from diskwright.block.child import Child
    from diskwright.block.graph import Graph
    from diskwright.drivers.formats.qcow2.header import Header
    from diskwright.drivers.formats.qcow2.refcounts import Refcounts
    from diskwright.drivers.formats.qcow2.settings import Settings

#: Beyond this many clusters of metadata (a file of terabytes) the look-up would cost too much
#: memory; such an image is not guarded.
_MAX_GUARDED = 1 << 20

_FURTHER = "further corruption events will be suppressed"
_FURTHER_DAMAGE = "further non-fatal corruption events will be suppressed"


class GuardedNode(MappedNode):
    """A qcow2 node that knows which clusters of its file hold metadata."""

    file: Child
    data: Child  # has the guest's data: the file, or one beside it
    header: Header
    refcounts: Refcounts
    l1: array[int]
    settings: Settings

    if TYPE_CHECKING:

        def read_l1(self, offset: int, entries: int) -> array[int]:
            """See tables.py."""

    def __init__(self, graph: Graph, node_name: str) -> None:
        super().__init__(graph, node_name)
        self.metadata: set[int] = set()  # host offsets; empty where nothing can be written
        self.misplaced: set[int] = set()  # L2 tables that lie where other metadata do
        self._others: list[tuple[str, int, int]] = []
        self._told_corrupt = self._told_damage = False  # one such line is enough
        self._header_lock = allocate_lock()  # held while the header is written

    # ---------------------------------------------------------------------------- the look-up

    def load_metadata(self, others: list[tuple[str, int, int]]) -> None:
        """Collect the clusters of header, tables, and `others` (name, offset, length)."""
        self._others = others
        self.metadata, self.misplaced = set(), set()
        if self.read_only or len(self.l1) + len(self.refcounts.table) > _MAX_GUARDED:
            return
        size = self.header.cluster_size
        kinds = {text: kind for kind, text in AREAS.items()}
        for name, offset, length in [*self._areas(), *others]:
            self.note_metadata(kinds[name], range(offset, offset + length, size))
        self.note_metadata("refcount-block", _named(self.refcounts.table))
        tables = _named(self.l1)
        if "active-l2" in self.settings.guarded:
            self.misplaced = tables & self.metadata
        self.note_metadata("active-l2", tables)
        if "inactive-l2" in self.settings.guarded:
            for name, offset, length in others:
                if name == AREAS["inactive-l1"]:
                    l1 = self.read_l1(offset, length // 8)
                    self.note_metadata("inactive-l2", _named(l1))

    def note_metadata(self, kind: str, places: Iterable[int]) -> None:
        """Clusters hold metadata of a kind now, a name of `AREAS`; writes keep off, if wanted."""
        if kind in self.settings.guarded:
            self.metadata.update(places)

    def _areas(self) -> list[tuple[str, int, int]]:
        header = self.header
        table = header.refcount_table_clusters * header.cluster_size
        return [
            ("qcow2_header", 0, header.cluster_size),
            ("active L1 table", header.l1_table_offset, header.l1_size * 8),
            ("refcount table", header.refcount_table_offset, table),
        ]

    def guard(self, host_offset: int, length: int) -> None:
        """Refuse to have a host range written as data or made a table, if it is one already."""
        span = range(host_offset, host_offset + length, self.cluster_size)
        if not self.metadata.isdisjoint(span):
            name = self._name_of(next(place for place in span if place in self.metadata))
            self.corrupt(f"Preventing invalid write on metadata (overlaps with {name})")

    def guard_table(self, host_offset: int) -> None:
        """Refuse to change an L2 table that lies where other metadata do."""
        if host_offset in self.misplaced:
            name = self.other_metadata(host_offset, self.cluster_size) or "metadata"
            self.corrupt(f"Preventing invalid write on metadata (overlaps with {name})")

    def other_metadata(self, host_offset: int, length: int, *, but: str = "") -> str | None:
        """What lies in a host range beside active L2 tables and `but`, by its name."""
        stop = host_offset + length
        for name, offset, size in [*self._areas(), *self._others]:
            if offset < stop and host_offset < offset + size and name != but:
                return name
        for entry in self.refcounts.table:
            if entry and host_offset <= entry & OFFSET_MASK < stop:
                return "refcount block"
        return None

    def fixed_metadata(self) -> set[int]:
        """The clusters of which `other_metadata` knows a name."""
        size = self.header.cluster_size
        found = {entry & OFFSET_MASK for entry in self.refcounts.table if entry}
        for _, offset, length in [*self._areas(), *self._others]:
            found.update(range(offset // size * size, offset + length, size))
        return found

    def _name_of(self, host_offset: int) -> str:
        for name, offset, length in [*self._areas(), *self._others]:
            if offset <= host_offset < offset + length:
                return name
        if any(entry & OFFSET_MASK == host_offset for entry in self.l1):
            return "active L2 table"
        if any(entry & OFFSET_MASK == host_offset for entry in self.refcounts.table):
            return "refcount block"
        return "metadata"

    # ------------------------------------------------------------------------------- damage

    def corrupt(self, text: str) -> NoReturn:
        """Note that the image is damaged, and end the request that noticed it.

        Raises:
            IOFailure: always. Under the metadata lock by way of the engine.
        """
        if self.metadata_lock.held():
            raise NeedWork(lambda: self._mark_corrupt(text))
        self._mark_corrupt(text)

    def note_corrupt(self, text: str) -> str:
        """Say so, once, and have the header say it; the sentence. A repair can go on."""
        if self.read_only:
            return self.note_damage(text)
        words = f"qcow2: Marking image as corrupt: {text}; {_FURTHER}"
        self._write_corrupt_bit()
        if not self._told_corrupt:
            self._told_corrupt = self._told_damage = True
            tell(words)
        return words

    def note_damage(self, text: str) -> str:
        """Say, unless some damage was told of, what does not keep the image from being used."""
        words = f"qcow2: Image is corrupt: {text}; {_FURTHER_DAMAGE}"
        if not self._told_damage:
            self._told_damage = True
            tell(words)
        return words

    def _mark_corrupt(self, text: str) -> NoReturn:
        words = self.note_corrupt(text)
        if not self.read_only:
            self.broken = self.broken or "the image is corrupt"
            self.broken_kind = "corrupt"
            self._write_fd = -1
        raise IOFailure(
            words,
            errno=errno.EIO,
            path=self.filename,
            node=self.node_name,
            qemu="Input/output error",
            hint="check the image: diskwright-img check",
        )

    def _write_corrupt_bit(self) -> None:
        header = self.header
        if header.version < 3 or header.incompatible_features & Incompatible.CORRUPT:
            return
        header.incompatible_features |= Incompatible.CORRUPT
        features = header.incompatible_features.to_bytes(8, "big")
        try:
            with self._header_lock:
                # Nothing else of the header: what waits in the cache has its own order.
                self.file.write(FEATURES_OFFSET, features)
            self.file.flush()
        except (DiskwrightError, OSError):
            pass  # the damage itself is what has to be told


def _named(entries: array[int]) -> set[int]:
    """The clusters that entries of a table name, which are mostly zeroes."""
    found = {entry & OFFSET_MASK for entry in set(entries)}
    found.discard(0)
    return found
