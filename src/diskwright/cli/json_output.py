"""Results as JSON, in the layout of QEMU's tools; costs no import.

Members come in the order in which QEMU prints them. That is the order of its hash table, so it
is one order for all words, found by looking at what its tools print.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.block.info import CheckResult, Measured, SnapshotInfo
    from diskwright.operations.info import ImageInfo
    from diskwright.operations.map import MapEntry

_ORDER = {
    word: index
    for index, word in enumerate(
        """
        image-end-offset compressed-clusters total-clusters corruptions corruptions-fixed
        check-errors leaks leaks-fixed allocated-clusters
        flags children icount vm-clock-nsec name date-sec date-nsec vm-clock-sec id vm-state-size
        backing-filename-format snapshots virtual-size filename cluster-size format
        actual-size format-specific info type data compat compression-type lazy-refcounts
        bitmaps refcount-bits data-file data-file-raw corrupt extended-l2
        full-backing-filename encrypted backing-filename
        compressed dirty-flag fragmented-clusters
        """.split()
    )
}
_ESCAPES = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}


def dumps(value: object, depth: int = 0) -> str:
    """Indented text, one member a line; an empty container takes two lines."""
    return "".join(_pieces(value, depth))


def _pieces(value: object, depth: int) -> Iterator[str]:
    margin = "    " * depth
    if isinstance(value, dict):
        yield "{\n"
        between = ""
        for key in sorted(value, key=_position):
            yield f"{between}{margin}    {quoted(key)}: "
            yield from _pieces(value[key], depth + 1)
            between = ",\n"
        yield f"\n{margin}}}" if value else f"{margin}}}"
    elif isinstance(value, list):
        yield "[\n"
        between = ""
        for item in value:
            yield f"{between}{margin}    "
            yield from _pieces(item, depth + 1)
            between = ",\n"
        yield f"\n{margin}]" if value else f"{margin}]"
    else:
        yield scalar(value)


def _position(key: str) -> int:
    return _ORDER.get(key, len(_ORDER))


def scalar(value: object) -> str:
    """A string, number, truth value or None."""
    if isinstance(value, str):
        return quoted(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def quoted(text: str) -> str:
    """A string in quotes; all but printable ASCII is escaped, broken UTF-8 replaced."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    if " " <= letter <= "~":
        return letter
    code = ord(letter)
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
    if 0xD800 <= code < 0xE000:
        code = 0xFFFD  # how Python keeps a byte that is no UTF-8
    return f"\\u{code:04X}"


# ------------------------------------------------------------------------------- results


#: What is told of a device is of the kind that is told of a file.
_SPECIFIC = {"host_device": "file"}


def info_members(image: ImageInfo) -> dict[str, object]:
    """The object that `info` prints for one image."""
    details = image.details
    members: dict[str, object] = {
        "children": [{"name": name, "info": info_members(child)} for name, child in image.children],
        "virtual-size": image.virtual_size,
        "filename": image.name,
        "format": image.format,
    }
    optional = {
        "dirty-flag": details.dirty,
        "actual-size": image.disk_size,
        "cluster-size": details.cluster_size or None,
        "encrypted": details.encrypted or None,
        "compressed": details.compressed or None,
        "backing-filename": details.backing_filename,
        "full-backing-filename": details.full_backing_filename,
        "backing-filename-format": details.backing_format,
    }
    members.update((key, value) for key, value in optional.items() if value is not None)
    if details.snapshots:
        members["snapshots"] = [_snapshot_members(one) for one in details.snapshots]
    if details.format_specific is not None:
        members["format-specific"] = {
            "type": _SPECIFIC.get(image.format, image.format),
            "data": dict(details.format_specific),
        }
    return members


def _snapshot_members(one: SnapshotInfo) -> dict[str, object]:
    seconds, nanoseconds = divmod(one.vm_clock_nanoseconds, 10**9)
    members: dict[str, object] = {
        "id": one.id,
        "name": one.name,
        "vm-state-size": one.vm_state_size,
        "date-sec": one.date_seconds,
        "date-nsec": one.date_nanoseconds,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
    }
    if one.icount is not None:
        members["icount"] = one.icount
    return members


def check_members(
    name: str, format: str, result: CheckResult, *, fixed: tuple[int, int] = (0, 0)
) -> dict[str, object]:
    """The object that `check` prints.

    Args:
        name, format: of the image.
        result: what was counted.
        fixed: (leaks, corruptions) that a repair did away with.
    """
    members: dict[str, object] = {
        "check-errors": result.check_errors,
        "filename": name,
        "format": format,
    }
    counts = {
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "leaks-fixed": fixed[0],
        "corruptions-fixed": fixed[1],
    }
    members.update((key, count) for key, count in counts.items() if count)
    return members


def measure_members(found: Measured) -> dict[str, object]:
    """The object that `measure` prints."""
    members: dict[str, object] = {}
    if found.bitmaps is not None:
        members["bitmaps"] = found.bitmaps
    return {**members, "required": found.required, "fully-allocated": found.fully_allocated}


def map_line(entry: MapEntry) -> str:
    """One run, as an object in a line of its own."""
    words = {
        "start": entry.start,
        "length": entry.length,
        "depth": entry.depth,
        "present": entry.present,
        "zero": entry.zero,
        "data": entry.data,
        "compressed": entry.compressed,
    }
    text = ", ".join(f'"{name}": {scalar(value)}' for name, value in words.items())
    if entry.offset is not None:
        text += f', "offset": {entry.offset}'
    return f"{{ {text}}}"
