"""Which drivers there are: names and URI schemes to classes, imported when first used.

Built-in drivers are "module:Class" strings, so opening a raw file imports two of them. Others
can be added through the entry-point group `diskwright.drivers`, looked at only after the
built-in names failed.
"""

from __future__ import annotations

from diskwright.block.loading import load_named
from diskwright.errors import OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node

_FORMATS = "diskwright.drivers.formats."
_PROTOCOLS = "diskwright.drivers.protocols."
_FILTERS = "diskwright.drivers.filters."

FORMATS: dict[str, str] = {
    "raw": _FORMATS + "raw:Raw",
    "qcow2": _FORMATS + "qcow2.driver:Qcow2",
    "vdi": _FORMATS + "vdi.driver:Vdi",
    "vpc": _FORMATS + "vpc.driver:Vpc",
}
PROTOCOLS: dict[str, str] = {
    "file": _PROTOCOLS + "file.driver:File",
    "host_device": _PROTOCOLS + "file.driver:HostDevice",
    "nbd": _PROTOCOLS + "nbd.driver:Nbd",
    "null-co": _PROTOCOLS + "null:NullCo",
    "null-aio": _PROTOCOLS + "null:NullAio",
}
FILTERS: dict[str, str] = {
    "blkdebug": _FILTERS + "blkdebug.driver:Blkdebug",
    "copy-on-read": _FILTERS + "copy_on_read:CopyOnRead",
    "throttle": _FILTERS + "throttle:Throttle",
}

#: Drivers of QEMU's that are not built: an image may name one of them for its backing file.
FOREIGN = frozenset(
    "blklogwrites blkverify bochs cloop compress copy-before-write dmg ftp ftps "
    "gluster host_cdrom http https io_uring iscsi iser luks nfs nvme "
    "nvme-io_uring parallels preallocate qcow qed quorum raw rbd replication snapshot-access ssh "
    "vhdx virtio-blk-vfio-pci virtio-blk-vhost-user virtio-blk-vhost-vdpa vmdk vvfat".split()
)

#: What precedes ":" in a name -> the driver that understands the rest.
SCHEMES: dict[str, str] = {
    "file": "file",
    "host_device": "host_device",
    "nbd": "nbd",
    "nbd+tcp": "nbd",
    "nbd+unix": "nbd",
    "nbds": "nbd",
    "nbds+tcp": "nbd",
    "nbds+unix": "nbd",
    "null-co": "null-co",
    "null-aio": "null-aio",
    "blkdebug": "blkdebug",
}

#: The format of new images, where nothing is said.
DEFAULT_FORMAT = "raw"

_classes: dict[str, type[Node]] = {}


def register(name: str, target: str | type[Node], *, kind: str = "formats") -> None:
    """Add a driver for this process (tests and programs that bring their own).

    Args:
        name: of the driver.
        target: the class, or "module:Class".
        kind: "formats", "protocols" or "filters".
    """
    table = {"formats": FORMATS, "protocols": PROTOCOLS, "filters": FILTERS}[kind]
    if isinstance(target, str):
        table[name] = target
        _classes.pop(name, None)
    else:
        table[name] = f"{target.__module__}:{target.__qualname__}"
        _classes[name] = target


def driver_class(name: str) -> type[Node]:
    """The class of driver `name`.

    Raises:
        OptionError: there is no such driver.
        UnsupportedError: QEMU has it, this release has not.
    """
    found = _classes.get(name)
    if found is None:
        target = FORMATS.get(name) or PROTOCOLS.get(name) or FILTERS.get(name)
        if target is None:
            target = _entry_point(name)
        found = _classes[name] = load_named(target)
    return found


def is_known(name: str) -> bool:
    """Whether a built-in or registered driver has this name, or one of QEMU's."""
    return name in FORMATS or name in PROTOCOLS or name in FILTERS or name in FOREIGN


def _entry_point(name: str) -> str:
    from importlib.metadata import entry_points

    for point in entry_points(group="diskwright.drivers", name=name):
        return point.value
    if name in FOREIGN:
        raise UnsupportedError(
            f"The driver '{name}' is not part of this release",
            field="driver",
            hint=f"the formats are: {', '.join(sorted(FORMATS))}",
        )
    raise OptionError(
        f"Unknown driver '{name}'",
        field="driver",
        hint=f"known formats: {', '.join(sorted(FORMATS))}",
    )
