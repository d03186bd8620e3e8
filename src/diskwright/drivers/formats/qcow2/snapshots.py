"""Internal snapshots: the table of them, and creating, applying and deleting one.

Source: QEMU, docs/interop/qcow2.txt, "Snapshots".
"""

from __future__ import annotations

import struct
from array import array

from diskwright.block.info import SnapshotInfo
from diskwright.block.record import Record
from diskwright.drivers.formats.qcow2.transaction import Transaction
from diskwright.errors import FormatError, NotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.drivers.formats.qcow2.driver import Qcow2

_ENTRY = struct.Struct(">QIHHIIQII")

#: Bound on one snapshot's extra data and on the whole table, as QEMU has them.
_MAX_EXTRA = 1024
_MAX_TABLE = 1024 * 65536


class Snapshot(Record):
    """An entry of the snapshot table; `extra` is kept as it was."""

    __slots__ = ("extra", "info", "l1_offset", "l1_size")

    def __init__(
        self, info: SnapshotInfo, l1_offset: int, l1_size: int, extra: bytes = b""
    ) -> None:
        self.info = info
        self.l1_offset = l1_offset
        self.l1_size = l1_size
        self.extra = extra

    def pack(self) -> bytes:
        """The entry as stored, padded to eight bytes."""
        info = self.info
        extra = struct.pack(">QQ", info.vm_state_size, info.disk_size)
        if info.icount is not None:
            extra += struct.pack(">Q", info.icount)
        if len(self.extra) > len(extra):
            extra += self.extra[len(extra) :]
        name, identifier = info.name.encode("utf-8", "surrogateescape"), info.id.encode()
        data = _ENTRY.pack(
            self.l1_offset,
            self.l1_size,
            len(identifier),
            len(name),
            info.date_seconds & 0xFFFFFFFF,
            info.date_nanoseconds,
            info.vm_clock_nanoseconds,
            min(info.vm_state_size, 0xFFFFFFFF),
            len(extra),
        )
        data += extra + identifier + name
        return data + bytes(-len(data) % 8)


def parse_table(data: bytes, count: int, size: int) -> tuple[list[Snapshot], int]:
    """(the snapshots, bytes the table takes); `size` is the disk's, for old entries.

    Raises:
        FormatError: the table is cut off or absurd.
    """
    found: list[Snapshot] = []
    position = 0
    for number in range(count):
        if position + _ENTRY.size > len(data):
            raise _cut(number)
        offset, entries, id_length, name_length, seconds, nanos, clock, state, extra_length = (
            _ENTRY.unpack_from(data, position)
        )
        position += _ENTRY.size
        stop = position + extra_length + id_length + name_length
        if extra_length > _MAX_EXTRA or stop > len(data):
            raise _cut(number)
        extra = data[position : position + extra_length]
        position += extra_length
        identifier = data[position : position + id_length].decode("utf-8", "surrogateescape")
        name = data[position + id_length : stop].decode("utf-8", "surrogateescape")
        position = (stop + 7) & ~7
        info = SnapshotInfo(
            identifier,
            name,
            vm_state_size=struct.unpack_from(">Q", extra)[0] if extra_length >= 8 else state,
            date_seconds=seconds,
            date_nanoseconds=nanos,
            vm_clock_nanoseconds=clock,
            icount=_icount(extra),
            disk_size=struct.unpack_from(">Q", extra, 8)[0] if extra_length >= 16 else size,
        )
        found.append(Snapshot(info, offset, entries, extra))
    return found, position


def _icount(extra: bytes) -> int | None:
    if len(extra) < 24:
        return None
    value: int = struct.unpack_from(">Q", extra, 16)[0]
    return None if value == 0xFFFFFFFFFFFFFFFF else value


def _cut(number: int) -> FormatError:
    return FormatError(
        f"Snapshot table entry {number} does not fit into the table",
        field="snapshot table",
        value=number,
        qemu="Snapshot table is too large" if number >= 65536 else "Could not read snapshots",
    )


def load(node: Qcow2) -> tuple[list[Snapshot], int]:
    """The node's snapshots and the bytes their table takes."""
    header = node.header
    if not header.nb_snapshots:
        return [], 0
    room = max(node.file.size - header.snapshots_offset, 0)
    data = node.file.read(header.snapshots_offset, min(room, _MAX_TABLE))
    return parse_table(data, header.nb_snapshots, header.size)


def find(snapshots: list[Snapshot], identifier: str) -> Snapshot:
    """The snapshot with this id, else with this name.

    Raises:
        NotFoundError: there is none.
    """
    for snapshot in snapshots:
        if snapshot.info.id == identifier:
            return snapshot
    for snapshot in snapshots:
        if snapshot.info.name == identifier:
            return snapshot
    raise NotFoundError(
        f"Can't find the snapshot '{identifier}'", errno=2, qemu="Can't find the snapshot"
    )


def _store(change: Transaction, snapshots: list[Snapshot], old_length: int) -> None:
    """Write a new table and let the header name it."""
    header = change.node.header
    if header.nb_snapshots:
        change.change(header.snapshots_offset, old_length, -1)
    header.nb_snapshots = len(snapshots)
    data = b"".join(snapshot.pack() for snapshot in snapshots)
    header.snapshots_offset = change.write(data) if snapshots else 0


def create(node: Qcow2, wanted: SnapshotInfo) -> SnapshotInfo:
    """Keep the active tables as a snapshot and go on with copies of them."""
    snapshots, length = load(node)
    if not wanted.id:
        numbers = [int(s.info.id) for s in snapshots if s.info.id.isdecimal()]
        wanted.id = str(max(numbers, default=0) + 1)
    elif any(s.info.id == wanted.id for s in snapshots):
        raise FormatError(f"There is a snapshot with the id '{wanted.id}' already", field="id")
    wanted.disk_size = node.size
    header = node.header
    change = Transaction(node)
    l1 = node.l1[:]
    change.each_l2(l1, lambda index, entry, items: change.change_named(items, 1))
    kept = Snapshot(wanted, header.l1_table_offset, header.l1_size)
    change.activate(change.copy_l1(l1))
    _store(change, [*snapshots, kept], length)
    change.commit()
    return wanted


def apply(node: Qcow2, identifier: str) -> None:
    """Drop the active tables and go on with copies of the snapshot's."""
    snapshots, _ = load(node)
    snapshot = find(snapshots, identifier)
    header = node.header
    change = Transaction(node)
    l1 = node.read_l1(snapshot.l1_offset, snapshot.l1_size)
    change.each_l2(l1, lambda index, entry, items: change.change_named(items, 1))
    change.drop_l1(node.l1, header.l1_table_offset)
    per_entry = 1 << node._l1_shift
    size = snapshot.info.disk_size if header.version >= 3 else header.size
    made = change.copy_l1(l1)
    made.extend([0] * (max(-(-size // per_entry), 1) - len(made)))
    change.activate(made)
    header.size = size
    change.commit()
    node.size = size


def delete(node: Qcow2, identifier: str) -> None:
    """Drop a snapshot; the active state becomes the sole user of what only both used."""
    snapshots, length = load(node)
    snapshot = find(snapshots, identifier)
    header = node.header
    change = Transaction(node)
    l1 = node.read_l1(snapshot.l1_offset, snapshot.l1_size)
    change.drop_l1(l1, snapshot.l1_offset)
    made = change.refresh_l1(node.l1)
    if made != node.l1:
        change.activate(made, header.l1_table_offset, header.l1_size)
    _store(change, [other for other in snapshots if other is not snapshot], length)
    change.commit()


def empty(node: Qcow2) -> None:
    """Forget all active content: an L1 table of zeroes."""
    header = node.header
    change = Transaction(node)
    change.drop_l1(node.l1, header.l1_table_offset)
    change.activate(array("Q", bytes(8 * header.l1_size)))
    change.commit()
