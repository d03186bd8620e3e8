"""qcow2: QEMU's own format, versions 2 and 3.

Read and written: every cluster size (512 B to 2 MiB) and refcount width (1 to 64 bits), lazy
refcounts, zlib and zstd clusters, backing files, internal snapshots, zero clusters, extended L2
entries, external data files, persistent bitmaps. Refused by name: encryption.

Source: QEMU, docs/interop/qcow2.txt.
"""

from __future__ import annotations

from diskwright.block import filename
from diskwright.block.info import CheckResult, Content, Measured, NodeInfo, Repair, SnapshotInfo
from diskwright.block.limits import Limits
from diskwright.block.options import Option, Options
from diskwright.block.permission import Role
from diskwright.block.requests import FAST, UNMAP
from diskwright.block.table_cache import TableCache
from diskwright.drivers.formats.qcow2 import settings
from diskwright.drivers.formats.qcow2.create_options import AMEND, CREATE
from diskwright.drivers.formats.qcow2.data_file import has_data_file, is_raw, open_data_file
from diskwright.drivers.formats.qcow2.extensions import Extensions, refuse_unknown
from diskwright.drivers.formats.qcow2.header import (
    COMPRESSION_NAMES,
    MAGIC,
    Autoclear,
    Compatible,
    Header,
    Incompatible,
)
from diskwright.drivers.formats.qcow2.refcounts import SECTOR, Refcounts
from diskwright.drivers.formats.qcow2.tables import Qcow2Tables
from diskwright.errors import (
    BrokenNodeError,
    DiskwrightError,
    IOFailure,
    OptionError,
    UnsupportedError,
    strerror_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diskwright.block.child import Child
    from diskwright.block.opener import Opener
    from diskwright.block.reopen import Finish, Reopening
    from diskwright.drivers.formats.qcow2.bitmap_store import Qcow2Bitmaps
    from diskwright.drivers.formats.qcow2.snapshots import Snapshot


class Qcow2(Qcow2Tables):
    """A qcow2 image."""

    driver = "qcow2"
    takes_backing = True
    options = settings.OPTIONS + Options(
        Option("snapshot", "str", None, "id or name of the internal snapshot to read (read-only)"),
        Option("backing-format", "str", None, "Format of the backing file, over the image's own"),
    )
    create_options = CREATE
    amend_options = AMEND

    _lazy = False
    _unguarded: Snapshot | None = None  # its L2 tables are to be guarded, and nobody finds them
    _kept_off = False  # a write was refused for that
    _shows_holes: bool | None = None  # not looked at yet
    _kept_bitmaps: Qcow2Bitmaps | None = None  # None: there are none, or nobody asked yet

    # ------------------------------------------------------------------------------------- open

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        self.file = opener.open_child(self, "file", options["file"], Role.STORAGE)
        self.filename = filename.of_node(self)
        self._read_header(checks=opener.checks)
        self._choose(settings.Settings(self.header, options))
        if not opener.checks and not self.read_only:
            self._refuse_corrupt()
        if self.extensions.bitmaps() is not None:
            from diskwright.drivers.formats.qcow2 import bitmaps

            # Before the data file, which may be refused as well.
            if bitmaps.extension_of(self) is None:
                bitmaps.warn_of_stale(self)
        if not opener.checks:
            self._snapshots()  # refuses a table that cannot be read
        self._choose_lazy(options["lazy-refcounts"])
        open_data_file(self, opener, options.get("data-file"))
        self._set_up()
        if options["snapshot"]:
            self._open_snapshot(str(options["snapshot"]))
        self._load_bitmaps()
        self.header.require_size()
        self._open_backing(opener, options)
        dirty = self.header.incompatible_features & Incompatible.DIRTY
        if dirty and not self.read_only and not opener.checks:
            self._recover()

    def _choose(self, chosen: settings.Settings) -> None:
        """Take over what the options come to; the tables are set up afterwards."""
        self.settings = chosen
        self.cache = TableCache(
            self.file,
            self.metadata_lock,
            capacity_bytes=chosen.cache_bytes(self.header.size),
            clean_seconds=chosen.clean_seconds,
        )
        requests = chosen.discards_requests
        self.pass_discard = self.can_unmap if requests is None else bool(requests)

    def _set_up(self) -> None:
        assert self.cache is not None
        # An entry that names data must not be there before them: old ones would be seen again.
        self.cache.data_children = [] if self.data is self.file else [self.data]
        self.set_up_tables()
        self.set_up_refcounts()
        self.reload()

    def _read_header(self, *, checks: bool = False) -> None:
        try:
            head = self.file.read(0, 4096)
        except DiskwrightError as error:
            error.qemu = strerror_of(error)
            error.within("Could not read qcow2 header")
            raise
        header = self.header = Header.parse(head, checks=checks)
        if not checks:
            header.require_refcounts()
        self.first_bytes = self.file.read(0, header.cluster_size)
        self.extensions = Extensions.parse(header, self.first_bytes)
        refuse_unknown(header, self.extensions)

    def _refuse_corrupt(self) -> None:
        if self.header.incompatible_features & Incompatible.CORRUPT:
            raise BrokenNodeError(
                f"{self.describe()} is marked corrupt",
                qemu="qcow2: Image is corrupt; cannot be opened read/write",
                hint="open it read-only, or repair it",
            )

    def _choose_lazy(self, wanted: object) -> None:
        """By the option, else as the image says."""
        header = self.header
        if wanted and header.version < 3:
            raise OptionError(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
                field="lazy-refcounts",
            )
        if wanted is None:
            wanted = header.compatible_features & Compatible.LAZY_REFCOUNTS
        self._lazy = bool(wanted)

    def set_up_refcounts(self) -> None:
        """Refcounts of the width that the header says; `reload` reads them."""
        self.refcounts = Refcounts(self)
        self.refcounts.blocks.deferred = self._lazy

    def forget_lazy(self) -> None:
        """Refcounts are not deferred any more."""
        self._lazy = False
        self.refcounts.blocks.deferred = False

    def reload(self) -> None:
        """Take over what the header says now; nothing is cached from before."""
        assert self.cache is not None
        self.cache.drop()
        self.forget_decoded()
        size = self.header.cluster_size
        self.size = self.header.size & -SECTOR  # a disk is whole sectors
        self.size_cache(self.size)
        self.limits = Limits(
            zero_alignment=self.fill_size, discard_alignment=size, cluster_size=size
        )
        self.data_child = self.data
        self.refcounts.load()
        self.load_l1()
        self.packed_end = 0
        self._shows_holes = None
        self.file.node.refresh_size()
        self.virgin = -(-self.file.size // size) * size
        self.load_metadata([] if self.read_only else self._other_areas())

    def size_cache(self, size: int) -> None:
        """Let the tables have the memory that an image of `size` bytes may have."""
        assert self.cache is not None
        self.cache.capacity_bytes = self.settings.cache_bytes(size)

    def _other_areas(self) -> list[tuple[str, int, int]]:
        found: list[tuple[str, int, int]] = []
        if self.header.nb_snapshots:
            from diskwright.drivers.formats.qcow2 import snapshots

            found += snapshots.areas(self)
            self._unguarded = None
            if "inactive-l2" in self.settings.guarded:
                self._unguarded = snapshots.first_impossible(self)
        if self.extensions.bitmaps() is not None:
            from diskwright.drivers.formats.qcow2 import bitmaps

            place = bitmaps.extension_of(self)  # which refuses what is absurd
            if place is not None:
                found.append(("bitmap directory", place.directory_offset, place.directory_size))
        return found

    def _load_bitmaps(self) -> None:
        self._kept_bitmaps = None
        if self.extensions.bitmaps() is None:
            return
        from diskwright.drivers.formats.qcow2 import bitmaps

        if bitmaps.extension_of(self) is not None:
            self._bitmap_store()

    @property
    def has_bitmaps(self) -> bool:
        """Whether the image has persistent bitmaps."""
        return self._kept_bitmaps is not None and bool(self._kept_bitmaps.bitmaps)

    def _bitmap_store(self) -> Qcow2Bitmaps:
        if self._kept_bitmaps is None:
            from diskwright.drivers.formats.qcow2.bitmap_store import Qcow2Bitmaps

            self._kept_bitmaps = Qcow2Bitmaps(self)
        return self._kept_bitmaps

    def store_anew(self, name: str) -> None:
        """Have a bitmap written to another place as the image is closed, if it can be."""
        if self._kept_bitmaps is not None:
            self._kept_bitmaps.store_anew(name)

    def _open_snapshot(self, identifier: str) -> None:
        from diskwright.drivers.formats.qcow2 import snapshots

        if not self.read_only:
            raise UnsupportedError(
                "An internal snapshot can be opened read-only only", field="snapshot"
            )
        snapshot = snapshots.find(snapshots.load(self)[0], identifier)
        self.l1 = snapshots.l1_of(self, snapshot)
        self.size = min(snapshot.info.disk_size & -SECTOR, len(self.l1) << self.l1_shift)

    def _open_backing(self, opener: Opener, options: dict[str, object]) -> None:
        if not opener.follow_backing or options.get("backing") == "":
            return  # the old word for none
        form = options.get("backing-format") or self.extensions.backing_format
        opener.open_backing(
            self,
            options.get("backing", ""),
            self.extensions.backing_file,
            format=str(form) if form else None,
        )

    def _recover(self) -> None:
        """An image that was not closed: its refcounts may be behind. Count them anew."""
        from diskwright.block.notice import tell
        from diskwright.drivers.formats.qcow2.check import Checker

        self.before_repair()
        try:
            found = Checker(self, Repair.ALL, tell).run()
            if found.check_errors:
                raise IOFailure(f"{self.describe()} could not be checked as a whole")
        except DiskwrightError as error:
            error.qemu = strerror_of(error)
            error.within("Could not repair dirty image")
            raise

    # --------------------------------------------------------------------------------- reopen

    def _prepare_options(self, options: dict[str, object]) -> Finish:
        known = settings.OPTIONS
        rest = {name: value for name, value in options.items() if name not in known}
        dropped = super()._prepare_options(rest)
        if len(rest) == len(options):
            return dropped
        said = {name: value for name, value in self.opened_options.items() if name in known}
        said |= {name: value for name, value in options.items() if name in known}
        # What an earlier reopening said is as if it had not been: so it is in QEMU.
        values = known.validate(said)
        chosen = settings.Settings(self.header, values)
        before = self._lazy
        self._choose_lazy(values["lazy-refcounts"])

        def finish(done: bool) -> None:
            if not done:
                self._lazy = before
                return
            self._choose(chosen)
            self._set_up()

        return finish

    def _prepare_reopen(self, wanted: Reopening) -> Finish:
        if wanted.read_only is False:
            self._refuse_corrupt()
            if self.opened_options.get("snapshot"):
                raise UnsupportedError(
                    "An internal snapshot can be opened read-only only", field="snapshot"
                )
        return super()._prepare_reopen(wanted)

    def _reopened(self) -> None:
        super()._reopened()
        if self.read_only:
            self.metadata = set()
            return
        self._read_header()
        self._refuse_corrupt()
        self.reload()
        self._load_bitmaps()
        self.refcounts.blocks.deferred = self._lazy
        if self.header.incompatible_features & Incompatible.DIRTY:
            self._recover()

    # ---------------------------------------------------------------------------- the header

    def first_sector(self) -> bytes:
        """The file's first sector as the header is now; extensions and names as they were."""
        packed = self.header.pack()
        return packed + self.first_bytes[len(packed) : SECTOR].ljust(SECTOR - len(packed), b"\0")

    def write_header(self) -> None:
        """Write the header's fields, in one piece, and make them durable."""
        with self._header_lock:
            self.file.write(0, self.header.pack())
            with self.metadata_lock:
                self.refcounts.header_changed()
        self.file.flush()

    def write_extensions(self) -> None:
        """Write the whole first cluster; see first_cluster.py."""
        from diskwright.drivers.formats.qcow2 import first_cluster

        with self._header_lock:
            first_cluster.write(self)

    def first_write(self) -> None:
        """Clear autoclear features, set the dirty bit where refcounts will lag, use bitmaps."""
        if self._unguarded is not None:
            from diskwright.drivers.formats.qcow2 import snapshots

            self._kept_off = True
            snapshots.l1_of(self, self._unguarded)
        self._begin_writing(Incompatible.DIRTY if self._lazy else 0)
        if self._kept_bitmaps is not None:
            self._kept_bitmaps.activate()

    def before_repair(self) -> None:
        """A repair leaves the guest's data as they are, and so the bitmaps are right still."""
        self._begin_writing(0)

    def _begin_writing(self, features: int) -> None:
        """Say in the header which features are in use; what nobody kept right goes."""
        header = self.header
        before = (header.autoclear_features, header.incompatible_features)
        header.autoclear_features &= Autoclear.BITMAPS | Autoclear.RAW_DATA_FILE
        header.incompatible_features |= features
        has_bitmaps = header.autoclear_features & Autoclear.BITMAPS
        if not has_bitmaps and self.extensions.bitmaps() is not None:
            self.extensions = self.extensions.with_bitmaps(None)
            self.write_extensions()
        elif before != (header.autoclear_features, header.incompatible_features):
            self.write_header()

    def _finish(self) -> None:
        super()._finish()
        if self._unguarded is not None and self._kept_off:
            from diskwright.drivers.formats.qcow2 import snapshots

            snapshots.tell_of_unguarded(self, self._unguarded)
        if self._kept_bitmaps is not None and not self.read_only and self.broken is None:
            self._kept_bitmaps.finish()  # what a repair wants stored anew

    def finish(self) -> None:
        """Save bitmaps; clear the dirty bit: deferred refcounts were written at rest.

        Where bitmaps could not be saved it stays: nobody knows which refcounts the header names.
        """
        if self._kept_bitmaps is not None:
            self._kept_bitmaps.finish()
        self._clear_dirty()

    def _clear_dirty(self) -> None:
        if not self.header.incompatible_features & Incompatible.DIRTY:
            return
        self.header.incompatible_features &= ~Incompatible.DIRTY
        self.write_header()

    # ------------------------------------------------------------------------------- management

    def _info(self) -> NodeInfo:
        from diskwright.drivers.formats.qcow2 import glimpse

        header = self.header
        three = header.version >= 3
        specific: dict[str, object] = {
            "compat": "1.1" if three else "0.10",
            "compression-type": COMPRESSION_NAMES[header.compression_type],
        }
        if three:
            specific["lazy-refcounts"] = bool(
                header.compatible_features & Compatible.LAZY_REFCOUNTS
            )
        if header.autoclear_features & Autoclear.BITMAPS:
            from diskwright.drivers.formats.qcow2 import bitmaps

            if found := bitmaps.load(self):
                specific["bitmaps"] = [bitmap.as_info() for bitmap in found]
        specific["refcount-bits"] = header.refcount_bits
        if has_data_file(header):
            if self.extensions.data_file:
                specific["data-file"] = self.extensions.data_file
            specific["data-file-raw"] = is_raw(header)
        if three:
            specific["corrupt"] = bool(header.incompatible_features & Incompatible.CORRUPT)
            specific["extended-l2"] = self.entries.words > 1
        name = self.extensions.backing_file
        return NodeInfo(
            self.driver,
            self.size,
            cluster_size=header.cluster_size,
            backing_filename=name,
            full_backing_filename=filename.place_of(self, name),
            backing_format=self.extensions.backing_format,
            snapshots=self._snapshots(),
            dirty=bool(header.incompatible_features & Incompatible.DIRTY),
            corrupt=bool(header.incompatible_features & Incompatible.CORRUPT),
            format_specific=specific,
            references=glimpse.references(header, self.extensions),
            features=glimpse.features(header, self.extensions),
            bitmaps=glimpse.count_bitmaps(header, self.extensions),
        )

    @property
    def vm_state_offset(self) -> int:
        """Behind the disk."""
        from diskwright.drivers.formats.qcow2 import vm_state

        return vm_state.start_of(self)

    def _read_vm_state(self, offset: int, view: memoryview) -> None:
        from diskwright.drivers.formats.qcow2 import vm_state

        vm_state.read(self, offset, view)

    def _write_vm_state(self, offset: int, view: memoryview) -> None:
        from diskwright.drivers.formats.qcow2 import vm_state

        vm_state.write(self, offset, view)

    def _check(self, repair: int, report: Callable[[str], None]) -> CheckResult:
        from diskwright.drivers.formats.qcow2.check import Checker

        return Checker(self, repair, report).run()

    def _snapshots(self) -> list[SnapshotInfo]:
        if not self.header.nb_snapshots:
            return []
        from diskwright.drivers.formats.qcow2 import snapshots

        return [snapshot.info for snapshot in snapshots.load(self)[0]]

    def check_snapshots(self) -> None:
        """See Management: the data of a file of its own stay what they are."""
        if has_data_file(self.header):
            raise UnsupportedError(
                f"The data of {self.describe()} are in a file of their own, which has no snapshots",
                qemu="Operation not supported",
                field="data-file",
            )

    def _snapshot_create(self, wanted: SnapshotInfo) -> SnapshotInfo:
        from diskwright.drivers.formats.qcow2 import snapshots

        return snapshots.create(self, wanted)

    def _snapshot_apply(self, identifier: str) -> None:
        from diskwright.drivers.formats.qcow2 import snapshots

        if self.has_bitmaps:
            raise UnsupportedError("Device has active dirty bitmaps", hint="remove them before")
        snapshots.apply(self, identifier)

    def _snapshot_delete(self, identifier: str) -> None:
        from diskwright.drivers.formats.qcow2 import snapshots

        snapshots.delete(self, identifier)

    def _make_empty(self) -> None:
        from diskwright.drivers.formats.qcow2 import snapshots

        snapshots.empty(self)

    def _change_backing(self, name: str | None, format: str | None) -> None:
        if name is not None and is_raw(self.header):
            raise UnsupportedError(
                f"{self.describe()} has a raw data file, which a backing file would contradict",
                qemu="Invalid argument",
                field="backing",
            )
        extensions = self.extensions
        before = (extensions.backing_file, extensions.backing_format)
        extensions.backing_file, extensions.backing_format = name, format
        try:
            self.write_extensions()
        except BaseException:
            extensions.backing_file, extensions.backing_format = before
            raise

    def _amend(self, options: Mapping[str, object], progress: Callable[[int, int], None]) -> None:
        from diskwright.drivers.formats.qcow2 import amend

        amend.amend(self, options, progress)

    def _truncate(self, size: int, exact: bool, preallocation: str) -> None:
        from diskwright.drivers.formats.qcow2 import resize

        store = self._kept_bitmaps
        if store is None or not store.bitmaps or size == self.size:
            resize.resize(self, size, preallocation)
            return
        store.begin_resize(size)
        try:
            resize.resize(self, size, preallocation)
        finally:
            store.end_resize()

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        if is_raw(self.header):
            self._require_fast(offset, length, flags)
            self.data.write_zeroes(
                offset, length, unmap=bool(flags & UNMAP), fast=bool(flags & FAST)
            )
        super()._write_zeroes(offset, length, flags)

    def _discard(self, offset: int, length: int) -> None:
        if is_raw(self.header):
            size = self.cluster_size
            start, stop = -(-offset // size) * size, offset + length
            stop = stop if stop == self.size else stop // size * size
            if start < stop:
                self.data.write_zeroes(start, stop - start, unmap=True)
        super()._discard(offset, length)

    @property
    def can_keep_bitmaps(self) -> bool:
        """Extensions that old programs do not know came with version 3."""
        return self.header.version >= 3

    @property
    def has_zero_init(self) -> bool:
        """A new image has no content but its backing file's, or a data file's that was there."""
        return not (self.external and any(self.l1)) or self.data.node.has_zero_init

    @property
    def shows_holes(self) -> bool:
        """Whether clusters in use are holes of the file, as preallocated metadata leave them.

        The rule is what qemu-img's `map` shows when holes are punched into images: the clusters
        in use are at least ten ninths of those that the file has room for, and two more. It is
        the image's own file that is looked at, also where the data are in another one.
        """
        if self._shows_holes is None:
            real = (self.file.node.allocated_size or 1 << 62) >> self.header.cluster_bits
            enough = max(real * 10 // 9, real + 2)
            self._shows_holes = False
            if enough <= -(-self.file.size // self.header.cluster_size):
                with self.graph.request():
                    self._shows_holes = self.refcounts.uses(enough)
        return self._shows_holes

    # ------------------------------------------------------------------------------------ others

    @classmethod
    def glimpse(cls, file: Child) -> NodeInfo:
        """See glimpse.py."""
        from diskwright.drivers.formats.qcow2.glimpse import glimpse

        return glimpse(file)

    @classmethod
    def probe(cls, head: bytes, size: int, filename: str) -> int:
        """By magic and version."""
        return 100 if head[:4] == MAGIC and int.from_bytes(head[4:8], "big") >= 2 else 0

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        """See create.py."""
        from diskwright.drivers.formats.qcow2.create import create

        create(opener, size, options)

    @classmethod
    def measure(cls, content: Content, options: dict[str, object]) -> Measured:
        """See measure.py."""
        from diskwright.drivers.formats.qcow2.measure import measure

        return measure(content, options)
