"""Changing what an image was made with: its version, the width of its refcounts, and the like.

Each change leaves an image that reads the same. An upgrade comes first and a downgrade last, as in
QEMU. New refcount blocks are a Transaction. For a downgrade, zero clusters, which version 2 has
not, become data clusters of zeroes one table after the other, and then the header is written.

Source: QEMU, docs/interop/qcow2.txt; sentences and their order as its tools were seen to have them.
"""

from __future__ import annotations

import sys
from array import array

from diskwright.block import requests
from diskwright.block.cancel import check_cancelled
from diskwright.block.notice import complain
from diskwright.block.options import whole
from diskwright.drivers.formats.qcow2.create_options import refcount_width
from diskwright.drivers.formats.qcow2.data_file import has_data_file, is_raw
from diskwright.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    ZERO_FLAG,
    number,
)
from diskwright.drivers.formats.qcow2.header import (
    FULL_LENGTH,
    V2_LENGTH,
    Autoclear,
    Compatible,
    Incompatible,
)
from diskwright.drivers.formats.qcow2.refcounts import Width
from diskwright.drivers.formats.qcow2.transaction import Transaction
from diskwright.errors import (
    FormatError,
    IOFailure,
    OptionError,
    Step,
    UnsupportedError,
    strerror_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diskwright.drivers.formats.qcow2.driver import Qcow2

    Progress = Callable[[int, int], None]

#: Refcounts of version 2 have this width.
_V2_ORDER = 4
_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_VM_STATE_LIMIT = 1 << 32


def amend(node: Qcow2, wanted: Mapping[str, object], progress: Progress) -> None:
    """Change the image; the caller has the graph to itself and the node is at rest.

    Args:
        node: the image.
        wanted: options by their names, those that were given.
        progress: called with (steps done, steps in all).

    Raises:
        OptionError: a value is impossible, or impossible for this image.
        UnsupportedError: the image has something that the change would lose.
    """
    header = node.header
    version, order = _checked(node, wanted)
    if version > header.version:
        _upgrade(node)
    if order != header.refcount_order:
        _change_width(node, order, progress)
    if "data_file" in wanted:
        node.extensions.data_file = str(wanted["data_file"] or "") or None
        node.write_extensions()
    if wanted.get("data_file_raw") is False and is_raw(header):
        header.autoclear_features &= ~Autoclear.RAW_DATA_FILE
        node.write_header()
    if "lazy_refcounts" in wanted:
        _set_lazy(node, bool(wanted["lazy_refcounts"]))
    size = wanted.get("size")
    if size is not None:
        requests.truncate_checked(node, whole(size), True, "off")
    if version < header.version:
        _downgrade(node, progress)
    progress(1, 1)


def _checked(node: Qcow2, wanted: Mapping[str, object]) -> tuple[int, int]:
    """The version and the order of refcounts that are wanted, all that was given looked at."""
    header = node.header
    version, order = header.version, header.refcount_order
    if "compat" in wanted:
        word = str(wanted["compat"])
        if word not in _VERSIONS:
            raise OptionError(f"Unknown compatibility level {word}", field="compat")
        version = _VERSIONS[word]
    if "refcount_bits" in wanted:
        bits = whole(wanted["refcount_bits"])
        order = refcount_width(bits).bit_length() - 1
    if "data_file" in wanted and not has_data_file(header):
        raise OptionError(
            "data-file can only be set for images that use an external data file",
            field="data_file",
        )
    if wanted.get("data_file_raw") and not is_raw(header):
        raise OptionError("data-file-raw cannot be set on existing images", field="data_file_raw")
    if _other_backing(node, wanted):
        raise UnsupportedError(
            "Cannot amend the backing file",
            qemu="Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.",
            field="backing_file",
        )
    for name in wanted:
        if name.startswith("encrypt."):
            raise UnsupportedError(
                "Can't amend encryption options - encryption not present", field=name
            )
    _check_version(node, version, order, wanted)
    return version, order


def _other_backing(node: Qcow2, wanted: Mapping[str, object]) -> bool:
    """Whether another backing file is asked for than the one that there is, both words given."""
    names = [wanted[name] for name in ("backing_file", "backing_fmt") if name in wanted]
    return bool(names) and names != [node.extensions.backing_file, node.extensions.backing_format]


def _check_version(node: Qcow2, version: int, order: int, wanted: Mapping[str, object]) -> None:
    """Refuse what version 2 cannot have."""
    if version >= 3:
        return
    if order != _V2_ORDER:
        if "refcount_bits" in wanted:
            raise OptionError(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above "
                "(use compat=1.1 or greater)",
                field="refcount_bits",
            )
        raise OptionError("compat=0.10 requires refcount_bits=16", field="compat")
    lazy = node.header.compatible_features & Compatible.LAZY_REFCOUNTS  # it goes with the rest
    if wanted.get("lazy_refcounts") and not lazy:
        raise OptionError(
            "Lazy refcounts only supported with compatibility level 1.1 and above "
            "(use compat=1.1 or greater)",
            field="lazy_refcounts",
        )


def _set_lazy(node: Qcow2, lazy: bool) -> None:
    header = node.header
    if header.version < 3:
        return  # it was refused, or there is nothing to turn off
    if lazy:
        header.compatible_features |= Compatible.LAZY_REFCOUNTS
    else:
        node.settle()
        header.compatible_features &= ~Compatible.LAZY_REFCOUNTS
    node.write_header()


# ------------------------------------------------------------------------------- the version


def _upgrade(node: Qcow2) -> None:
    """Version 2 to 3: the header is longer, and what follows it moves."""
    header = node.header
    _complete_snapshots(node)
    header.version, header.header_length = 3, FULL_LENGTH
    node.extensions.names_features = header.cluster_size > 4096  # as in a new image
    _write_first_cluster(node)
    node.reload()


def _write_first_cluster(node: Qcow2) -> None:
    """Write the header of another version; if that fails, nobody knows which one there is."""
    try:
        node.write_extensions()
    except BaseException as error:
        node.break_off(f"the header could not be written ({error})")
        raise


def _complete_snapshots(node: Qcow2) -> None:
    """Write a snapshot table that says each disk's size, if there is an older one."""
    from diskwright.drivers.formats.qcow2 import snapshots

    if not node.header.nb_snapshots:
        return
    found, length = snapshots.load(node)
    if all(len(snapshot.extra) >= snapshots.COMPLETE_EXTRA for snapshot in found):
        return
    change = Transaction(node)
    snapshots.store(change, found, length)
    change.commit()


def _downgrade(node: Qcow2, progress: Progress) -> None:
    """Version 3 to 2."""
    from diskwright.drivers.formats.qcow2 import snapshots

    header = node.header
    if has_data_file(header):
        raise UnsupportedError("Cannot downgrade an image with a data file", field="compat")
    if node.has_bitmaps:
        text = "Cannot downgrade an image with bitmaps, which version 2 would lose"
        todo = "remove them before (bitmap --remove)"
        raise UnsupportedError(text, qemu=f"{text}: {todo}", field="compat", hint=todo)
    for snapshot in snapshots.load(node)[0] if header.nb_snapshots else ():
        info = snapshot.info
        if info.vm_state_size >= _VM_STATE_LIMIT or info.disk_size != header.size:
            raise UnsupportedError("Internal snapshots prevent downgrade of image", field="compat")
    if header.compression_type and _has_encoded(node):
        raise UnsupportedError(
            "Cannot downgrade an image with zstd compression type and existing compressed clusters",
            field="compat",
        )
    rest = header.incompatible_features & ~(Incompatible.DIRTY | Incompatible.COMPRESSION)
    if rest:
        raise UnsupportedError(
            f"Cannot downgrade an image with incompatible features {rest:#x} set", field="compat"
        )
    _expand_zeroes(node, progress)
    header.version, header.header_length = 2, V2_LENGTH
    header.incompatible_features = header.compatible_features = header.autoclear_features = 0
    header.compression_type = 0
    node.forget_lazy()
    _write_first_cluster(node)
    node.reload()


def _l2_tables(node: Qcow2) -> list[int]:
    """Where the L2 tables of the disk and of its snapshots lie; 0 where there is none."""
    from diskwright.drivers.formats.qcow2 import snapshots

    node.settle()
    tables = [node.active_l1()]
    if node.header.nb_snapshots:
        try:
            tables += [snapshots.l1_of(node, one) for one in snapshots.load(node)[0]]
        except FormatError as error:
            complain(error.qemu_message)
            error.qemu = f"Failed to turn zero into data clusters: {strerror_of(error)}"
            raise
    return [entry & OFFSET_MASK for l1 in tables for entry in l1]


def _has_encoded(node: Qcow2) -> bool:
    """Whether any table has a compressed cluster; QEMU looks at the disk's own alone."""
    step = node.header.l2_entry_bytes // 8
    for host in sorted(set(_l2_tables(node)) - {0}):
        check_cancelled()
        items = node.l2_table.decode(node.file.read(host, node.cluster_size))
        if any(entry & COMPRESSED for entry in items[::step]):
            return True
    return False


def _expand_zeroes(node: Qcow2, progress: Progress) -> None:
    """Let no entry of any table have the flag of zero clusters."""
    hosts = _l2_tables(node)
    seen = {0}
    try:
        for done, host in enumerate(hosts):
            progress(done, len(hosts))
            if host not in seen:
                check_cancelled()
                seen.add(host)
                if host & (node.cluster_size - 1):
                    index = number(done % max(len(node.l1), 1))
                    node.corrupt(f"L2 table offset {number(host)} unaligned (L1 index: {index})")
                _expand_table(node, host)
    except (IOFailure, UnsupportedError) as error:
        error.qemu = f"Failed to turn zero into data clusters: {strerror_of(error)}"
        raise
    node.reload()


def _expand_table(node: Qcow2, host: int) -> None:
    """One L2 table: its new clusters are counted and durable before it names them."""
    items = node.l2_table.decode(node.file.read(host, node.cluster_size))
    flagged = [at for at, entry in enumerate(items) if entry & ZERO_FLAG and not entry & COMPRESSED]
    if not flagged:
        return
    named = node.under_lock(lambda: node.refcounts.get(host >> node.header.cluster_bits))
    for at in flagged:
        entry = items[at] & ~ZERO_FLAG
        if (place := entry & OFFSET_MASK) & (node.cluster_size - 1):
            node.corrupt(
                f"Cluster allocation offset {number(place)} unaligned "
                f"(L2 offset: {number(host)}, L2 index: {number(at)})"
            )
        if not entry & OFFSET_MASK and node.backing is None and not node.extensions.backing_file:
            items[at] = 0
            continue
        if not entry & OFFSET_MASK:
            entry = _new_cluster(node, named)
        node.file.write_zeroes(entry & OFFSET_MASK, node.cluster_size)
        items[at] = entry
    node.settle()
    node.file.write(host, node.l2_table.encode(items))
    node.file.flush()


def _new_cluster(node: Qcow2, times: int) -> int:
    """A data cluster that `times` L2 tables are going to name; the entry for it."""
    host = node.under_lock(lambda: node.refcounts.take(1))
    for _ in range(times - 1):
        node.under_lock(lambda: node.refcounts.add(host, node.cluster_size, 1))
    node.file.grow(host + node.cluster_size)
    return host | COPIED if times == 1 else host


# ------------------------------------------------------------------------- width of refcounts


class _NewWidth(Transaction):
    """A rebuild whose refcounts have another width."""

    def __init__(self, node: Qcow2, order: int) -> None:
        super().__init__(node, rebuild=True)
        self._have = Transaction(node)
        self.width = Width(1 << order)
        self.entries = node.cluster_size * 8 >> order
        self.maximum = self.width.maximum
        self.fields["refcount_order"] = order

    def before(self, block: int) -> array[int]:
        """The refcounts that the new block `block` has, as they are on disk."""
        found = self._old.get(block)
        if found is None:
            found = self._old[block] = array(self.width.typecode, self._collected(block))
        return found

    def _collected(self, block: int) -> list[int]:
        counts: list[int] = []
        cluster, stop = block * self.entries, (block + 1) * self.entries
        while cluster < stop:
            have, inside = divmod(cluster, self._have.entries)
            part = self._have.before(have)[inside : inside + stop - cluster]
            counts += part
            cluster += len(part)
        most = max(counts)
        if most > self.maximum:
            bits = self.width.bits
            place = (block * self.entries + counts.index(most)) * self.size
            raise UnsupportedError(
                f"Cannot decrease refcount entry width to {bits} bits: Cluster at offset "
                f"{place:#x} has a refcount of {most}",
                field="refcount_bits",
            )
        return counts

    def block_offset(self, block: int) -> int:
        """There is none of the new blocks yet."""
        return 0

    def encode_block(self, counts: array[int]) -> bytes:
        """As stored: the node's tables have the old width still."""
        items = self.width.pack(counts)
        if sys.byteorder == "little":
            items.byteswap()
        return items.tobytes()

    def _take_over(self) -> None:
        self.node.set_up_refcounts()
        super()._take_over()


def _change_width(node: Qcow2, order: int, progress: Progress) -> None:
    """Write all refcounts anew, with another width."""
    node.settle()
    change = _NewWidth(node, order)
    old = Transaction(node)
    used = node.refcounts.last_used() + 1
    blocks = -(-used // change.entries)
    for block in range(blocks):
        check_cancelled()
        progress(block, blocks)
        have = change.before(block)
        change.replace(block, have, have[:])
    for block in range(len(old.table)):
        if host := old.block_offset(block):
            change.change(host, node.cluster_size, -1)
    header = node.header
    length = header.refcount_table_clusters * node.cluster_size
    change.change(header.refcount_table_offset, length, -1)
    with Step("Failed to write refblock"):
        change.commit()
