"""Records that nodes answer with when asked about themselves."""

from __future__ import annotations

from diskwright.block.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskwright.errors import DiskwrightError


class Repair:
    """What `check` may change."""

    NONE = 0
    LEAKS = 1
    ALL = 2


class SnapshotInfo(Record):
    """An internal snapshot. Sizes in bytes; the VM clock in nanoseconds of guest time."""

    __slots__ = (
        "id",
        "name",
        "vm_state_size",
        "date_seconds",
        "date_nanoseconds",
        "vm_clock_nanoseconds",
        "icount",
        "disk_size",
    )

    def __init__(
        self,
        id: str,
        name: str,
        *,
        vm_state_size: int = 0,
        date_seconds: int = 0,
        date_nanoseconds: int = 0,
        vm_clock_nanoseconds: int = 0,
        icount: int | None = None,
        disk_size: int = 0,
    ) -> None:
        self.id = id
        self.name = name
        self.vm_state_size = vm_state_size
        self.date_seconds = date_seconds
        self.date_nanoseconds = date_nanoseconds
        self.vm_clock_nanoseconds = vm_clock_nanoseconds
        self.icount = icount
        self.disk_size = disk_size


class NodeInfo(Record):
    """What a node says of itself; None where the format has no such thing.

    `format_specific` has the key words of QEMU's JSON output, `references` every outside
    name the image mentions as (role, name, format or None), whether it was opened or not.
    `backing_error` is why the backing file of an image that says only which one it is, not where,
    cannot be told; `backing_filename` is in words then.
    `snapshot_count` may be more than `snapshots` where only the header was looked at.
    """

    __slots__ = (
        "driver",
        "virtual_size",
        "cluster_size",
        "compressed",
        "encrypted",
        "backing_filename",
        "full_backing_filename",
        "backing_format",
        "backing_error",
        "snapshots",
        "dirty",
        "corrupt",
        "format_specific",
        "references",
        "features",
        "bitmaps",
        "snapshot_count",
    )

    def __init__(
        self,
        driver: str,
        virtual_size: int,
        *,
        cluster_size: int | None = None,
        compressed: bool | None = None,
        encrypted: bool | None = None,
        backing_filename: str | None = None,
        full_backing_filename: str | None = None,
        backing_format: str | None = None,
        backing_error: DiskwrightError | None = None,
        snapshots: list[SnapshotInfo] | None = None,
        dirty: bool | None = False,
        corrupt: bool | None = None,
        format_specific: dict[str, object] | None = None,
        references: list[tuple[str, str, str | None]] | None = None,
        features: list[str] | None = None,
        bitmaps: int = 0,
        snapshot_count: int | None = None,
    ) -> None:
        self.driver = driver
        self.virtual_size = virtual_size
        self.cluster_size = cluster_size
        self.compressed = compressed
        self.encrypted = encrypted
        self.backing_filename = backing_filename
        self.full_backing_filename = full_backing_filename
        self.backing_format = backing_format
        self.backing_error = backing_error
        self.snapshots = snapshots or []
        self.dirty = dirty
        self.corrupt = corrupt
        self.format_specific = format_specific
        self.references = references or []
        self.features = features or []
        self.bitmaps = bitmaps
        self.snapshot_count = len(self.snapshots) if snapshot_count is None else snapshot_count


class CheckResult(Record):
    """What a check counted: numbers of clusters, and of errors that ended part of it."""

    __slots__ = (
        "corruptions",
        "leaks",
        "check_errors",
        "corruptions_fixed",
        "leaks_fixed",
        "allocated_clusters",
        "total_clusters",
        "compressed_clusters",
        "fragmented_clusters",
        "image_end_offset",
    )

    def __init__(self) -> None:
        self.corruptions = 0
        self.leaks = 0
        self.check_errors = 0
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        self.allocated_clusters = 0
        self.total_clusters = 0
        self.compressed_clusters = 0
        self.fragmented_clusters = 0
        self.image_end_offset = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong (any more)."""
        return not (self.corruptions or self.leaks or self.check_errors)


class Content(Record):
    """What an image would have to hold, for a format to say how long its file becomes.

    Attributes:
        size: of the disk, in bytes, whole sectors.
        runs: (offset, length) of what has to be stored, in order; the rest reads as zero. None
            where there is no content yet, and only the size is known.
        bitmaps: (name, bytes that one bit stands for) of the dirty bitmaps that go with it; None
            where it comes from something that can have none.
    """

    __slots__ = ("bitmaps", "runs", "size")

    def __init__(
        self,
        size: int,
        runs: Iterable[tuple[int, int]] | None = None,
        *,
        bitmaps: list[tuple[str, int]] | None = None,
    ) -> None:
        self.size = size
        self.runs = runs
        self.bitmaps = bitmaps


class Measured(Record):
    """How long an image's file becomes, in bytes.

    Attributes:
        required: when it holds the content.
        fully_allocated: when everything has been written to.
        bitmaps: what the dirty bitmaps take in addition; None where there can be none.
    """

    __slots__ = ("bitmaps", "fully_allocated", "required")

    def __init__(self, required: int, fully_allocated: int, *, bitmaps: int | None = None) -> None:
        self.required = required
        self.fully_allocated = fully_allocated
        self.bitmaps = bitmaps
