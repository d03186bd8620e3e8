"""Results as people read them, in the layout of QEMU's tools."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from diskwright.block.info import CheckResult, Measured, SnapshotInfo
    from diskwright.operations.info import ImageInfo
    from diskwright.operations.map import MapEntry

_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
#: The next unit begins where the number before this one would have four digits.
_UNIT_FULL = 1000
_ID_WIDTH, _TAG_WIDTH = 7, 16
_MAP_WIDTH = 16


def size_text(size: int) -> str:
    """Bytes in three digits and a unit: "32 MiB", "0.977 GiB"."""
    unit = 0
    while unit + 1 < len(_UNITS) and size >= _UNIT_FULL << 10 * unit:
        unit += 1
    return f"{size / (1 << 10 * unit):.3g} {_UNITS[unit]}B"


# ------------------------------------------------------------------------------- info


def info_lines(image: ImageInfo, *, path: str = "") -> Iterator[str]:
    """The lines of `info`; those of a child, with `path` "/file", are not indented yet."""
    storage = bool(path) and image.is_protocol
    first, kind, size = (
        ("filename", "protocol type", "file length")
        if storage
        else ("image", "file format", "virtual size")
    )
    details = image.details
    yield f"{first}: {image.name}"
    yield f"{kind}: {image.format}"
    yield f"{size}: {size_text(image.virtual_size)} ({image.virtual_size} bytes)"
    disk = "unavailable" if image.disk_size is None else size_text(image.disk_size)
    yield f"disk size: {disk}"
    if details.encrypted:
        yield "encrypted: yes"
    if details.cluster_size:
        yield f"cluster_size: {details.cluster_size}"
    if details.compressed:
        yield "compressed: yes"
    if details.dirty:
        yield "cleanly shut down: no"
    yield from _backing_lines(image)
    if details.snapshots:
        yield "Snapshot list:"
        yield from snapshot_table(details.snapshots)
    if details.format_specific:
        yield from specific_lines(details.format_specific)
    for name, child in image.children:
        inner = f"{path}/{name}"
        yield f"Child node '{inner}':"
        for line in info_lines(child, path=inner):
            yield f"    {line}"


def specific_lines(members: Mapping[str, object]) -> Iterator[str]:
    """What only images of one format have to say, with their head."""
    yield "Format specific information:"
    yield from _member_lines(members, 1)


def _backing_lines(image: ImageInfo) -> Iterator[str]:
    details = image.details
    if details.backing_filename is None:
        return
    line = f"backing file: {details.backing_filename}"
    if details.full_backing_filename is None:
        line += " (cannot determine actual path)"
    elif details.full_backing_filename != details.backing_filename:
        line += f" (actual path: {details.full_backing_filename})"
    yield line
    if details.backing_format is not None:
        yield f"backing file format: {details.backing_format}"


def _member_lines(members: Mapping[str, object], depth: int) -> Iterator[str]:
    """Members of a driver's own information, one a line; deeper ones further in."""
    for name, value in members.items():
        yield from _value_lines(name.replace("-", " "), value, depth)


def _value_lines(label: str, value: object, depth: int) -> Iterator[str]:
    margin = "    " * depth
    if isinstance(value, dict):
        yield f"{margin}{label}:"
        yield from _member_lines(value, depth + 1)
    elif isinstance(value, list):
        yield f"{margin}{label}:"
        for index, item in enumerate(value):
            yield from _value_lines(f"[{index}]", item, depth + 1)
    else:
        yield f"{margin}{label}: {_scalar(value)}"


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


# ------------------------------------------------------------------------------- snapshots


def snapshot_table(snapshots: Iterable[SnapshotInfo]) -> Iterator[str]:
    """The table of internal snapshots, with its head."""
    yield "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
    for one in snapshots:
        icount = "--" if one.icount is None else str(one.icount)
        yield (
            f"{_padded(one.id, _ID_WIDTH)} {_padded(one.name, _TAG_WIDTH)} "
            f"{size_text(one.vm_state_size):>8} {_date(one.date_seconds):>19} "
            f"{_clock(one.vm_clock_nanoseconds):>15} {icount:>10}"
        )


def _padded(word: str, width: int) -> str:
    """Filled up to `width` bytes, as C counts them."""
    return word + " " * (width - len(word.encode("utf-8", "surrogateescape")))


def _date(seconds: int) -> str:
    """Local time."""
    from time import localtime, strftime

    try:
        return strftime("%Y-%m-%d %H:%M:%S", localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return str(seconds)  # a hostile image may say any number


def _clock(nanoseconds: int) -> str:
    """Guest time as hours, minutes, seconds, milliseconds."""
    seconds, rest = divmod(nanoseconds, 10**9)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:04d}:{minutes:02d}:{seconds:02d}.{rest // 10**6:03d}"


# ------------------------------------------------------------------------------- check


def repair_lines(leaks: int, corruptions: int) -> Sequence[str]:
    """What a repair did away with."""
    return (
        "The following inconsistencies were found and repaired:",
        "",
        f"    {leaks} leaked clusters",
        f"    {corruptions} corruptions",
        "",
        "Double checking the fixed image now...",
    )


def check_lines(result: CheckResult) -> Iterator[str]:
    """What a check counted."""
    if result.clean:
        yield "No errors were found on the image."
    if result.corruptions:
        yield ""
        yield f"{result.corruptions} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if result.leaks:
        yield ""
        yield f"{result.leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if result.check_errors:
        yield ""
        yield f"{result.check_errors} internal errors have occurred during the check."
    total, allocated = result.total_clusters, result.allocated_clusters
    if total and allocated:
        yield (
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        yield f"Image end offset: {result.image_end_offset}"


# ------------------------------------------------------------------------------- map

MAP_HEAD = "Offset          Length          Mapped to       File"


def map_line(entry: MapEntry) -> str:
    """One run of data that lies plainly in a file."""
    assert entry.offset is not None
    cells = (entry.start, entry.length, entry.offset)
    return "".join(f"{_hex(cell):<{_MAP_WIDTH}}" for cell in cells) + (entry.file or "")


def _hex(number: int) -> str:
    """As C writes it: zero has no prefix."""
    return hex(number) if number else "0"


# ------------------------------------------------------------------------------- measure


def measure_lines(found: Measured) -> Iterator[str]:
    """What a new image would take."""
    yield f"required size: {found.required}"
    yield f"fully allocated size: {found.fully_allocated}"
    if found.bitmaps is not None:
        yield f"bitmaps size: {found.bitmaps}"
