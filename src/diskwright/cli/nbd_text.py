"""What an NBD server serves, as text: as `qemu-nbd --list` prints it, and as libnbd's nbdinfo."""

from __future__ import annotations

from diskwright.wire.nbd.numbers import BASE_ALLOCATION, Transmission

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.drivers.protocols.nbd.address import Address
    from diskwright.drivers.protocols.nbd.survey import Survey
    from diskwright.wire.nbd.messages import Export

#: QEMU's words for the flags of an export, in the order of their bits.
_FLAGS = (
    (Transmission.READ_ONLY, "readonly"),
    (Transmission.SEND_FLUSH, "flush"),
    (Transmission.SEND_FUA, "fua"),
    (Transmission.ROTATIONAL, "rotational"),
    (Transmission.SEND_TRIM, "trim"),
    (Transmission.SEND_WRITE_ZEROES, "zeroes"),
    (Transmission.SEND_DF, "df"),
    (Transmission.CAN_MULTI_CONN, "multi"),
    (Transmission.SEND_RESIZE, "resize"),
    (Transmission.SEND_CACHE, "cache"),
    (Transmission.SEND_FAST_ZERO, "fast-zero"),
    (Transmission.BLOCK_STATUS_PAYLOAD, "block-status-payload"),
)
_BLOCKS = ("min block", "opt block", "max block")

#: libnbd's names for the same, in its order.
_ABILITIES = (
    ("is_rotational", Transmission.ROTATIONAL),
    ("is_read_only", Transmission.READ_ONLY),
    ("can_cache", Transmission.SEND_CACHE),
    ("can_df", Transmission.SEND_DF),
    ("can_fast_zero", Transmission.SEND_FAST_ZERO),
    ("can_flush", Transmission.SEND_FLUSH),
    ("can_fua", Transmission.SEND_FUA),
    ("can_multi_conn", Transmission.CAN_MULTI_CONN),
    ("can_trim", Transmission.SEND_TRIM),
    ("can_zero", Transmission.SEND_WRITE_ZEROES),
)
_BLOCK_SIZES = ("block_size_minimum", "block_size_preferred", "block_size_maximum")

#: number of a run -> what it is, by context.
_ALLOCATION = ("data", "hole", "zero", "hole,zero")
_DIRTY = ("clean", "dirty")
_DEPTH = ("absent", "local")


# --------------------------------------------------------------------------------- as qemu-nbd


def list_lines(survey: Survey) -> Iterator[str]:
    """The lines of `qemu-nbd --list`."""
    yield f"exports available: {len(survey.exports)}"
    for export in survey.exports:
        yield f" export: '{export.name}'"
        if export.description:
            yield f"  description: {export.description}"
        if not export.flags & Transmission.HAS_FLAGS:
            continue
        yield f"  size:  {export.size}"
        words = "".join(f"{word} " for flag, word in _FLAGS if export.flags & flag)
        yield f"  flags: 0x{export.flags:x} ( {words})"
        if export.tells_blocks:
            for word, size in zip(_BLOCKS, export.blocks, strict=True):
                yield f"  {word}: {size}"
        yield f"  transaction size: {64 if survey.extended else 32}-bit"
        if export.contexts:
            yield f"  available meta contexts: {len(export.contexts)}"
            for context in export.contexts:
                yield f"   {context}"


# ---------------------------------------------------------------------------------- as nbdinfo


def members(survey: Survey, where: Address) -> dict[str, object]:
    """What `nbdinfo --json` prints."""
    return {
        "protocol": survey.protocol,
        "TLS": survey.tls,
        "structured": survey.structured,
        "extended": survey.extended,
        "exports": [
            _export_members(export, _uri_in(survey, export, where)) for export in survey.exports
        ],
    }


def _uri_in(survey: Survey, export: Export, where: Address) -> str:
    return uri_of(where, export.name if survey.asked is None else survey.asked)


def _export_members(export: Export, uri: str) -> dict[str, object]:
    made: dict[str, object] = {"export-name": export.name}
    if export.description:
        made["description"] = export.description
    made["uri"] = uri
    if export.contexts:
        made["contexts"] = list(export.contexts)
    for name, flag in _ABILITIES:
        made[name] = bool(export.flags & flag)
    if export.tells_blocks:
        made.update(zip(_BLOCK_SIZES, export.blocks, strict=True))
    made["export-size"] = export.size
    made["export-size-str"] = size_text(export.size)
    return made


def info_lines(survey: Survey, where: Address) -> Iterator[str]:
    """What `nbdinfo` prints."""
    tls = "with" if survey.tls else "without"
    kind = "extended" if survey.extended else "structured" if survey.structured else "simple"
    yield f"protocol: {survey.protocol} {tls} TLS, using {kind} packets"
    for export in survey.exports:
        yield f'export="{export.name}":'
        for line in _export_lines(_export_members(export, _uri_in(survey, export, where))):
            yield f"\t{line}"


def _export_lines(about: dict[str, object]) -> Iterator[str]:
    """The lines of one export, from what there is to say of it."""
    del about["export-name"]
    size, short = about.pop("export-size"), about.pop("export-size-str")
    if "description" in about:
        yield f"description: {about.pop('description')}"
    yield f"export-size: {size}" + (f" ({short})" if str(size) != short else "")
    for name, value in about.items():
        if isinstance(value, list):
            yield f"{name}:"
            yield from (f"\t{one}" for one in value)
        else:
            yield f"{name}: {str(value).lower() if isinstance(value, bool) else value}"


def uri_of(where: Address, name: str) -> str:
    """The URI of an export of the server that `where` names."""
    from urllib.parse import quote

    export = quote(name, safe="/")
    scheme = "nbds" if where.tls is not None else "nbd"
    if where.path is not None:
        return f"{scheme}+unix:///{export}?socket={quote(where.path, safe='/')}"
    host = f"[{where.host}]" if ":" in where.host else where.host
    port = "" if where.port == "10809" else f":{where.port}"
    return f"{scheme}://{host}{port}/{export}"


def size_text(size: int) -> str:
    """A size in the largest unit of which it is a multiple: 8M."""
    unit = 0
    while size and size % 1024 == 0 and unit < 6:
        size //= 1024
        unit += 1
    return f"{size}{' KMGTPE'[unit].strip()}"


def can(survey: Survey, feature: str) -> bool | None:
    """Whether the server, or its export, has a feature of libnbd's names; None: no such name."""
    word = feature.lower().replace("_", "-").replace(" ", "-")
    flags = survey.exports[0].flags
    if word in ("connect", "read"):
        return True
    if word == "tls":
        return survey.tls
    if word in ("structured", "structured-reply", "structured-replies"):
        return survey.structured
    if word in ("extended", "extended-headers"):
        return survey.extended
    if word == "write":
        return not flags & Transmission.READ_ONLY
    word = {"readonly": "read-only"}.get(word, word)
    for name, flag in _ABILITIES:
        if name.partition("_")[2].replace("_", "-") == word:
            return bool(flags & flag)
    return None


# ----------------------------------------------------------------------------------- the map


def describe(context: str, number: int) -> str:
    """What a run of that number is, in a word, or nothing."""
    if context == BASE_ALLOCATION:
        return _ALLOCATION[number] if number < len(_ALLOCATION) else ""
    if context.startswith("qemu:dirty-bitmap:"):
        return _DIRTY[number] if number < len(_DIRTY) else ""
    if context == "qemu:allocation-depth":
        return _DEPTH[number] if number < len(_DEPTH) else f"backing depth {number}"
    return ""


def map_members(runs: list[tuple[int, int, int]], context: str) -> list[dict[str, object]]:
    """What `nbdinfo --map --json` prints."""
    return [
        {"offset": offset, "length": length, **_kind(context, number)}
        for offset, length, number in runs
    ]


def map_lines(runs: list[tuple[int, int, int]], context: str) -> Iterator[str]:
    """What `nbdinfo --map` prints."""
    for offset, length, number in runs:
        words = describe(context, number)
        yield f"{offset:10}  {length:10}  {number:3}" + (f"  {words}" if words else "")


def totals(runs: list[tuple[int, int, int]]) -> list[tuple[int, float, int]]:
    """(bytes, percent, number) of all runs of each number."""
    found: dict[int, int] = {}
    for _, length, number in runs:
        found[number] = found.get(number, 0) + length
    whole = sum(found.values())
    return [(size, 100 * size / whole, number) for number, size in sorted(found.items())]


def totals_members(runs: list[tuple[int, int, int]], context: str) -> list[dict[str, object]]:
    """What `nbdinfo --map --totals --json` prints."""
    return [
        {"size": size, "percent": float(f"{percent:g}"), **_kind(context, number)}
        for size, percent, number in totals(runs)
    ]


def totals_lines(runs: list[tuple[int, int, int]], context: str) -> Iterator[str]:
    """What `nbdinfo --map --totals` prints."""
    for size, percent, number in totals(runs):
        words = describe(context, number)
        yield f"{size:10} {percent:5.1f}% {number:3}" + (f" {words}" if words else "")


def _kind(context: str, number: int) -> dict[str, object]:
    words = describe(context, number)
    return {"type": number, "description": words} if words else {"type": number}
