"""The formats and their options under which things go wrong; see scenarios.py."""

from __future__ import annotations

from tests.crash.guest import SECTOR


class Variant:
    """A format with options.

    Attributes:
        name, driver: for messages, and what makes and opens the image.
        options: create options.
        unit: sectors of a cluster or block.
        size: bytes of the disk.
        spread: sectors from one unit to be used to the next, on disks of many units.
        opened: more options to open with.
        qemu: whether QEMU reads such images.
    """

    def __init__(
        self,
        name: str,
        driver: str,
        options: dict[str, object],
        *,
        unit: int,
        units: int,
        spread: int = 0,
        opened: dict[str, object] | None = None,
        qemu: bool = True,
    ) -> None:
        self.name = name
        self.driver = driver
        self.options = options
        self.unit = unit
        self.units = units
        self.spread = spread or unit
        self.size = self.spread * units * SECTOR
        self.opened = opened or {}
        self.qemu = qemu

    @property
    def lazy(self) -> bool:
        """Whether refcounts may be behind."""
        return bool(self.options.get("lazy_refcounts"))

    @property
    def has_data_file(self) -> bool:
        """Whether the data lie in a file beside the image."""
        return self.driver == "odd" or "data_file" in self.options


def named(variant: Variant, name: str) -> Variant:
    """The same under another name."""
    given, unit, units = variant.options, variant.unit, variant.units
    return Variant(name, variant.driver, given, unit=unit, units=units, opened=variant.opened)


def _qcow2(
    name: str,
    cluster: int,
    units: int,
    opened: dict[str, object] | None = None,
    **options: object,
) -> Variant:
    given = {"cluster_size": cluster, **options}
    unit = cluster // SECTOR
    # QEMU would look for a data file beside the image.
    qemu = "data_file" not in options
    return Variant(name, "qcow2", given, unit=unit, units=units, opened=opened, qemu=qemu)


Q4K = _qcow2("4k", 4096, 24)
Q64K = _qcow2("64k", 65536, 12)
Q512 = _qcow2("512", 512, 96)
Q_V2 = _qcow2("v2", 4096, 24, compat="0.10")
Q_LAZY = _qcow2("lazy", 4096, 24, lazy_refcounts=True)
Q_LAZY_64K = _qcow2("lazy-64k", 65536, 10, lazy_refcounts=True)
Q_WIDE = _qcow2("refcount64", 512, 400, refcount_bits=64)
Q_NARROW = _qcow2("refcount1", 512, 96, refcount_bits=1)
Q_ZSTD = _qcow2("zstd", 4096, 24, compression_type="zstd")
Q_META = _qcow2("metadata", 4096, 24, preallocation="metadata")
Q_KEEPS = _qcow2("keeps-space", 4096, 24, opened={"discard-no-unref": True})
Q_PUNCHES = _qcow2(
    "keeps-holes", 512, 96, opened={"discard-no-unref": True, "pass-discard-request": True}
)
Q_FULL = _qcow2("full", 4096, 24, preallocation="full")
Q_EXT = _qcow2("extended", 16384, 24, extended_l2=True)
Q_EXT_META = _qcow2("extended-metadata", 16384, 24, extended_l2=True, preallocation="metadata")
Q_DATA = _qcow2("data-file", 4096, 24, data_file=True)
Q_DATA_RAW = _qcow2("data-file-raw", 4096, 24, data_file=True, data_file_raw=True)

VDI = Variant("dynamic", "vdi", {}, unit=2048, units=6)
VDI_WIDE = Variant("many-sectors", "vdi", {}, unit=2048, units=6, spread=2048 * 100)
VDI_SMALL = Variant("blocks-of-8k", "vdi", {"block_size": 8192}, unit=16, units=300, qemu=False)
VDI_STATIC = Variant("static", "vdi", {"static": True}, unit=2048, units=8)

VPC = Variant("blocks-of-64k", "vpc", {"block_size": 65536}, unit=128, units=24)
VPC_4K = Variant("blocks-of-4k", "vpc", {"block_size": 4096}, unit=8, units=300)
VPC_2M = Variant("dynamic", "vpc", {}, unit=4096, units=4)
VPC_FIXED = Variant("fixed", "vpc", {"subformat": "fixed"}, unit=128, units=16)

ODD = Variant("plain", "odd", {}, unit=64, units=24, qemu=False)
ODD_SCRAMBLED = Variant("scrambled", "odd", {"scramble": True}, unit=64, units=12, qemu=False)
