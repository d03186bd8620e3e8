"""How an image is opened: the options beside its name, and what they come to.

Source: QEMU's QMP reference, BlockdevOptionsQcow2, and qemu(1); sentences and bounds as its tools
were seen to have them.
"""

from __future__ import annotations

from diskwright.block.options import Option, Options
from diskwright.block.record import Record
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskwright.drivers.formats.qcow2.header import Header

#: Memory for tables where nothing is said, in bytes, as QEMU has it.
DEFAULT_L2_CACHE = 32 << 20
#: Bytes of an L2 table that are loaded at once, where nothing is said.
DEFAULT_ENTRY = 1 << 16
#: Refcounts have at least this much, however little was asked for: one operation needs some.
_LEAST_CLUSTERS = 4
_INT_MAX, _UINT_MAX = (1 << 31) - 1, (1 << 32) - 1

#: What a write can be held against -> what it is called in error lines.
AREAS = {
    "main-header": "qcow2_header",
    "active-l1": "active L1 table",
    "active-l2": "active L2 table",
    "refcount-table": "refcount table",
    "refcount-block": "refcount block",
    "snapshot-table": "snapshot table",
    "inactive-l1": "inactive L1 table",
    "inactive-l2": "inactive L2 table",
    "bitmap-directory": "bitmap directory",
}
_CONSTANT = {"main-header", "refcount-table", "snapshot-table", "bitmap-directory"}
#: Which of them each word stands for; "cached" looks at what is in memory anyway.
TEMPLATES = {
    "none": frozenset[str](),
    "constant": frozenset(_CONSTANT),
    "cached": frozenset(AREAS.keys() - {"inactive-l2"}),
    "all": frozenset(AREAS),
}
_OVERLAP_REFUSAL = (
    "Unsupported value '{value}' for qcow2 option 'overlap-check'. "
    f"Allowed are any of the following: {', '.join(TEMPLATES)}"
)

OPTIONS = Options(
    Option("lazy-refcounts", "bool", None, "Postpone refcount updates"),
    Option("pass-discard-request", "bool", None, "Pass guest discards to the file; as `discard`"),
    Option("pass-discard-snapshot", "bool", True, "Discard in the file what a snapshot frees"),
    Option("pass-discard-other", "bool", False, "Discard in the file what anything else frees"),
    Option("discard-no-unref", "bool", False, "Keep the space of what is discarded allocated"),
    *(
        Option(
            name,
            "enum",
            None,
            "Which metadata a write must not lie over",
            choices=TEMPLATES,
            refusal=_OVERLAP_REFUSAL,
        )
        for name in ("overlap-check", "overlap-check.template")
    ),
    *(
        Option(f"overlap-check.{name}", "bool", None, f"Look at the {AREAS[name]}")
        for name in AREAS
    ),
    Option("cache-size", "size", None, "Maximum memory for all tables, in bytes"),
    Option("l2-cache-size", "size", None, "Maximum memory for L2 tables, in bytes; 32M"),
    Option("l2-cache-entry-size", "size", None, "How much of an L2 table is loaded at once; 64k"),
    Option("refcount-cache-size", "size", None, "Maximum memory for refcounts, in bytes"),
    Option(
        "cache-clean-interval",
        "int",
        600,
        "Forget tables that were not used for so long, when others are loaded; 0 for never",
        unit="seconds",
    ),
    Option("encrypt.format", "any", None, "How the image is encrypted; none can be opened yet"),
    Option("encrypt.key-secret", "any", None, "Id of the secret that opens it", strong=True),
    Option("encrypt.", "any", prefix=True, help="More about that; no image here needs it"),
)


def _require_encryption(format: object) -> None:
    """Refuse to be told how an image is encrypted: those that are were refused before."""
    if isinstance(format, str):
        raise OptionError(
            f"No encryption in image header, but options specified format '{format}'",
            field="encrypt.format",
        )


class Settings(Record):
    """What the options come to for one image.

    Attributes:
        l2_slice_bytes: the piece of an L2 table that is loaded as one.
        clean_seconds: after how long an unused table is forgotten; 0: never.
        guarded: the areas that writes are held against, names of `AREAS`.
        discards_requests: guest discards are passed to the file; None: as the node's `discard`.
        discards_snapshots, discards_other: what snapshots, and other changes, free is too.
        keeps_space: what is discarded stays allocated.
    """

    __slots__ = (
        "_cluster_size",
        "_wanted",
        "clean_seconds",
        "discards_other",
        "discards_requests",
        "discards_snapshots",
        "guarded",
        "keeps_space",
        "l2_slice_bytes",
    )

    def __init__(self, header: Header, options: Mapping[str, object]) -> None:
        """Raises OptionError for values that contradict each other or the image."""
        self.l2_slice_bytes = min(header.cluster_size, DEFAULT_ENTRY)
        self._choose_sizes(header, options)
        self.clean_seconds = _number(options, "cache-clean-interval") or 0
        if not 0 <= self.clean_seconds <= _UINT_MAX:
            raise OptionError("Cache clean interval too big", field="cache-clean-interval")
        self.guarded = _guarded(options)
        self.keeps_space = bool(options["discard-no-unref"])
        if self.keeps_space and header.version < 3:
            raise OptionError(
                "discard-no-unref is only supported since qcow2 version 3",
                field="discard-no-unref",
            )
        self.discards_requests = options["pass-discard-request"]
        self.discards_snapshots = bool(options["pass-discard-snapshot"])
        self.discards_other = bool(options["pass-discard-other"])
        _require_encryption(options["encrypt.format"])

    def _choose_sizes(self, header: Header, options: Mapping[str, object]) -> None:
        total, l2, refcounts = self._wanted = (
            _number(options, "cache-size"),
            _number(options, "l2-cache-size"),
            _number(options, "refcount-cache-size"),
        )
        size = self._cluster_size = header.cluster_size
        if total is not None:
            if l2 is not None and refcounts is not None:
                raise OptionError(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the "
                    "same time",
                    field="cache-size",
                )
            for name, part in (("l2-cache-size", l2), ("refcount-cache-size", refcounts)):
                if part is not None and part > total:
                    raise OptionError(f"{name} may not exceed cache-size", field=name)
        entry = _number(options, "l2-cache-entry-size")
        if entry is not None:
            self.l2_slice_bytes = _entry_size(entry, size)
        l2, refcounts = self._shares(header.size)
        if l2 // self.l2_slice_bytes > _INT_MAX:
            raise OptionError("L2 cache size too big", field="l2-cache-size")
        if refcounts // size > _INT_MAX:
            raise OptionError("Refcount cache size too big", field="refcount-cache-size")

    def _shares(self, size: int) -> tuple[int, int]:
        """Memory for L2 tables and for refcounts of an image of `size` bytes."""
        total, l2, refcounts = self._wanted
        needed = -(-size // self._cluster_size) * 8
        if total is not None:
            if l2 is not None:
                refcounts = total - min(l2, needed)
            elif refcounts is not None:
                l2 = needed = total - refcounts
            else:
                l2 = min(needed, total)
                refcounts = total - l2
        l2 = min(DEFAULT_L2_CACHE if l2 is None else l2, needed)
        return l2, max(refcounts or 0, _LEAST_CLUSTERS * self._cluster_size)

    def cache_bytes(self, size: int) -> int:
        """Memory for tables, bounded by what an image of `size` bytes has."""
        l2, refcounts = self._shares(size)
        return max(l2, 2 * self.l2_slice_bytes) + refcounts


def _number(options: Mapping[str, object], name: str) -> int | None:
    """A size or a count among options that were validated; None where it was not said."""
    value = options[name]
    assert value is None or isinstance(value, int)
    return value


def _entry_size(entry: int, cluster: int) -> int:
    if not 512 <= entry <= cluster or entry & (entry - 1):
        raise OptionError(
            "L2 cache entry size must be a power of two between 512 and the cluster size "
            f"({cluster})",
            field="l2-cache-entry-size",
        )
    return entry


def _guarded(options: Mapping[str, object]) -> frozenset[str]:
    """The areas that a write is held against."""
    plain, template = options["overlap-check"], options["overlap-check.template"]
    if plain is not None and template is not None and plain != template:
        raise OptionError(
            f"Conflicting values for qcow2 options 'overlap-check' ('{plain}') and "
            f"'overlap-check.template' ('{template}')",
            field="overlap-check",
        )
    found = set(TEMPLATES[str(plain or template or "cached")])
    for name in AREAS:
        wanted = options[f"overlap-check.{name}"]
        if wanted is not None:
            (found.add if wanted else found.discard)(name)
    return frozenset(found)
