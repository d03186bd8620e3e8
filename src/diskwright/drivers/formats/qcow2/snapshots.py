"""Internal snapshots: the table of them, and creating, applying and deleting one.

Source: QEMU, docs/interop/qcow2.txt, "Snapshots".
"""

from __future__ import annotations

import struct
from array import array

from diskwright.block.info import SnapshotInfo
from diskwright.block.notice import complain
from diskwright.block.record import Record
from diskwright.drivers.formats.qcow2.extensions import name_of
from diskwright.drivers.formats.qcow2.header import MAX_L1_BYTES, MAX_SNAPSHOTS, bad_field
from diskwright.drivers.formats.qcow2.transaction import Transaction
from diskwright.errors import FormatError, NotFoundError, UnsupportedError, strerror_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.child import Child
    from diskwright.drivers.formats.qcow2.driver import Qcow2

_ENTRY = struct.Struct(">QIHHIIQII")

#: Bound on one snapshot's extra data and on the whole table, as QEMU has them.
MAX_EXTRA = 1024
_MAX_TABLE = 1024 * 65536
#: Bound on where an entry may end, from the table's beginning, before its extra data are cut.
_MAX_PLACE = (1 << 31) - 1
_READ_AHEAD = 4096

#: Extra data that say the disk's size; shorter ones are those of old writers.
COMPLETE_EXTRA = 16
#: The extra data's icount of a machine that does not count instructions.
_NO_ICOUNT = (1 << 64) - 1


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
        icount = _NO_ICOUNT if info.icount is None else info.icount
        extra = struct.pack(">QQQ", info.vm_state_size, info.disk_size, icount)
        extra += self.extra[len(extra) :]
        name = info.name.encode("utf-8", "surrogateescape")
        identifier = info.id.encode("utf-8", "surrogateescape")
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


class Cuts:
    """What a repair drops of a snapshot table that is too long.

    Attributes:
        extra: (number of the entry, bytes of its extra data), which are cut off.
        overhanging: entries at the end, behind what a table may take.
        surplus: entries of an absurd number of them that are none.
    """

    __slots__ = ("extra", "overhanging", "surplus")

    def __init__(self) -> None:
        self.extra: list[tuple[int, int]] = []
        self.overhanging = 0
        self.surplus = 0


class _Reader:
    """The file from the table's beginning on; behind its end it reads as zero, as for QEMU."""

    __slots__ = ("_data", "_file", "_first", "_start")

    def __init__(self, file: Child, start: int) -> None:
        self._file = file
        self._start = start
        self._first = 0
        self._data = b""

    def read(self, position: int, length: int) -> bytes:
        at = position - self._first
        if at < 0 or at + length > len(self._data):
            self._data = self._file.read(self._start + position, max(length, _READ_AHEAD))
            self._first, at = position, 0
        return self._data[at : at + length]


def load(node: Qcow2, cuts: Cuts | None = None) -> tuple[list[Snapshot], int]:
    """(the node's snapshots, bytes that their table takes).

    Args:
        node: the image.
        cuts: if it is given, what is too long is cut off, and noted there.

    Raises:
        FormatError: the table is absurdly long.
    """
    header = node.header
    table = _Reader(node.file, header.snapshots_offset)
    found: list[Snapshot] = []
    position = cut = 0
    for number in range(header.nb_snapshots):
        aligned = (position + 7) & ~7
        if cuts is not None and _is_surplus(node, table, number, aligned):
            cuts.surplus = header.nb_snapshots - number
            break
        snapshot, stop = _parse(table, (number, aligned), header.size, cuts)
        if cuts is not None and cuts.extra and cuts.extra[-1][0] == number:
            cut += cuts.extra[-1][1] - MAX_EXTRA
        if stop - cut > _MAX_TABLE or stop > _MAX_PLACE:
            overhanging = header.nb_snapshots - number
            if cuts is None:
                raise _too_long(number, overhanging)
            cuts.overhanging = overhanging
            break
        found.append(snapshot)
        position = stop
    return found, position


def _is_surplus(node: Qcow2, table: _Reader, number: int, position: int) -> bool:
    """Whether of an absurd number of entries this one and those after it are none."""
    if node.header.nb_snapshots <= MAX_SNAPSHOTS:
        return False
    if not node.header.snapshots_offset:  # the header lies there
        return True
    if number == MAX_SNAPSHOTS or node.header.snapshots_offset + position >= node.file.size:
        return True
    return not any(table.read(position, _ENTRY.size))


def _parse(
    table: _Reader, name: tuple[int, int], size: int, cuts: Cuts | None
) -> tuple[Snapshot, int]:
    """(one entry, where it ends; the next one begins at a multiple of eight bytes).

    Args:
        table: is read.
        name: the entry's number and position.
        size: the disk's, for old entries.
        cuts: as for `load`.
    """
    number, position = name
    offset, entries, id_length, name_length, seconds, nanos, clock, state, extra_length = (
        _ENTRY.unpack(table.read(position, _ENTRY.size))
    )
    position += _ENTRY.size
    if extra_length > MAX_EXTRA:
        if cuts is None:
            raise _too_much_extra(number, extra_length)
        cuts.extra.append((number, extra_length))
    extra = table.read(position, min(extra_length, MAX_EXTRA))
    position += extra_length
    words = table.read(position, id_length + name_length)
    info = SnapshotInfo(
        name_of(words[:id_length]),
        name_of(words[id_length:]),
        vm_state_size=struct.unpack_from(">Q", extra)[0] if extra_length >= 8 else state,
        date_seconds=seconds,
        date_nanoseconds=nanos,
        vm_clock_nanoseconds=clock,
        icount=_icount(extra),
        disk_size=struct.unpack_from(">Q", extra, 8)[0] if extra_length >= 16 else size,
    )
    return Snapshot(info, offset, entries, extra), position + len(words)


def _icount(extra: bytes) -> int | None:
    if len(extra) < 24:
        return None
    value: int = struct.unpack_from(">Q", extra, 16)[0]
    return None if value == _NO_ICOUNT else value


def _too_much_extra(number: int, length: int) -> FormatError:
    sentence = f"Too much extra metadata in snapshot table entry {number}"
    hint = "You can force-remove this extra metadata with qemu-img check -r all"
    error = bad_field("extra_data_size", length, 36, sentence, expected=MAX_EXTRA)
    error.hint, error.qemu = hint, f"{sentence}\n{hint}"
    return error


def _too_long(number: int, overhanging: int) -> FormatError:
    sentence = "Snapshot table is too big"
    hint = (
        f"You can force-remove all {overhanging} overhanging snapshots with qemu-img check -r all"
    )
    error = bad_field("snapshot table", number, 0, sentence, expected=_MAX_TABLE)
    error.hint, error.qemu = hint, f"{sentence}\n{hint}"
    return error


def areas(node: Qcow2) -> list[tuple[str, int, int]]:
    """(name, offset, length) of the snapshot table and the snapshots' L1 tables."""
    snapshots, length = load(node, Cuts())
    found = [("snapshot table", node.header.snapshots_offset, length)]
    for snapshot in snapshots:
        if snapshot.l1_size * 8 <= MAX_L1_BYTES:
            found.append(("inactive L1 table", snapshot.l1_offset, snapshot.l1_size * 8))
    return found


def check_l1(snapshot: Snapshot) -> None:
    """Refuse an L1 table that is absurdly long.

    Raises:
        FormatError: it is.
    """
    if snapshot.l1_size * 8 > MAX_L1_BYTES:
        text = "Snapshot L1 table too large"
        limit = MAX_L1_BYTES // 8
        error = bad_field("l1_size", snapshot.l1_size, 8, text, expected=limit)
        error.kind = "too-large"
        raise error


def l1_of(node: Qcow2, snapshot: Snapshot) -> array[int]:
    """A snapshot's L1 table.

    Raises:
        FormatError: it cannot be one, by its place or length.
    """
    check_l1(snapshot)
    if snapshot.l1_offset & (node.cluster_size - 1):
        text = "Snapshot L1 table offset invalid"
        raise bad_field("l1_table_offset", snapshot.l1_offset, 0, text)
    return node.read_l1(snapshot.l1_offset, snapshot.l1_size)


def first_impossible(node: Qcow2) -> Snapshot | None:
    """The first snapshot whose L1 table cannot be one, by its place or length."""
    limit, mask = MAX_L1_BYTES // 8, node.cluster_size - 1
    for snapshot in load(node, Cuts())[0]:
        if snapshot.l1_size > limit or snapshot.l1_offset & mask:
            return snapshot
    return None


def tell_of_unguarded(node: Qcow2, snapshot: Snapshot) -> None:
    """Say at the end that writes were refused because of a snapshot's L1 table, as QEMU does."""
    try:
        l1_of(node, snapshot)
    except FormatError as error:
        complain(f"Failed to flush the refcount block cache: {strerror_of(error)}")


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
        f"Can't find the snapshot '{identifier}'", errno=2, qemu="Can't find snapshot"
    )


def store(change: Transaction, snapshots: list[Snapshot], old_length: int) -> None:
    """Write a new table and let the header name it."""
    header = change.node.header
    if header.nb_snapshots:
        change.change(header.snapshots_offset, old_length, -1)
    data = b"".join(snapshot.pack() for snapshot in snapshots)
    change.fields["nb_snapshots"] = len(snapshots)
    change.fields["snapshots_offset"] = change.write(data) if snapshots else 0


def create(node: Qcow2, wanted: SnapshotInfo) -> SnapshotInfo:
    """Keep the active tables as a snapshot and go on with copies of them.

    Raises:
        UnsupportedError: the table is full, or a refcount would not fit into its bits.
    """
    snapshots, length = load(node)
    if len(snapshots) >= MAX_SNAPSHOTS:
        raise UnsupportedError("There are too many snapshots already", qemu="File too large")
    if not wanted.id:
        numbers = [int(s.info.id) for s in snapshots if s.info.id.isdecimal()]
        wanted.id = str(max(numbers, default=0) + 1)
    elif any(s.info.id == wanted.id for s in snapshots):
        raise UnsupportedError(
            f"There is a snapshot with the id '{wanted.id}' already", qemu="File exists"
        )
    wanted.disk_size = node.size
    header = node.header
    change = Transaction(node, discard=node.settings.discards_snapshots)
    change.keep_l1(node.l1)
    kept = Snapshot(wanted, header.l1_table_offset, header.l1_size)
    made = change.copy_l1(node.l1)
    store(change, [*snapshots, kept], length)
    change.activate(made)
    change.commit()
    return wanted


def apply(node: Qcow2, identifier: str) -> None:
    """Drop the active tables and go on with copies of the snapshot's."""
    snapshot = find(load(node)[0], identifier)
    header = node.header
    change = Transaction(node, discard=node.settings.discards_snapshots)
    try:
        l1 = l1_of(node, snapshot)
    except FormatError as error:
        complain(error.qemu_message)
        error.qemu = f"Failed to load snapshot: {strerror_of(error)}"
        raise
    change.keep_l1(l1)
    change.drop_l1(node.l1, header.l1_table_offset)
    size = snapshot.info.disk_size
    if header.version < 3 and size != header.size:
        raise UnsupportedError("The image was resized since; version 2 cannot say so")
    made = change.copy_l1(l1)
    made.extend([0] * (-(-size >> node.l1_shift) - len(made)))
    change.activate(made)
    change.fields["size"] = size
    change.commit()


def delete(node: Qcow2, identifier: str) -> None:
    """Drop a snapshot; the active state becomes the sole user of what only both used."""
    snapshots, length = load(node)
    snapshot = find(snapshots, identifier)
    header = node.header
    change = Transaction(node, discard=node.settings.discards_snapshots)
    change.drop_l1(l1_of(node, snapshot), snapshot.l1_offset)
    made = change.refresh_l1(node.l1)
    if made != node.l1:
        change.activate(made, header.l1_table_offset, header.l1_size)
    store(change, [other for other in snapshots if other is not snapshot], length)
    change.commit()


def empty(node: Qcow2) -> None:
    """Forget all active content: an L1 table of zeroes, and a file as short as it can be."""
    from diskwright.drivers.formats.qcow2.resize import give_back_end

    header = node.header
    node.file.event("empty_image_prepare")
    change = Transaction(node, discard=node.settings.discards_snapshots)
    change.drop_l1(node.l1, header.l1_table_offset)
    change.activate(array("Q", bytes(8 * header.l1_size)))
    change.commit()
    give_back_end(node)
