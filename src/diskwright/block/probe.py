"""Guessing an image's format from its first bytes; from its name where a format has no others.

A table of magic numbers says which drivers are worth importing; the driver decides. What no
driver claims may be of a format that has no driver yet (`foreign`); else it is raw.
"""

from __future__ import annotations

from diskwright.block import registry
from diskwright.block.record import Record
from diskwright.errors import DiskwrightError, strerror_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.child import Child

#: Bytes of an image that probing looks at, as in QEMU.
HEAD_BYTES = 512
#: How the file is opened for that, whatever the image is opened for.
LOOKING: dict[str, object] = {
    "read_only": True,
    "force_share": True,
    "direct": False,
    "copy_on_read": False,
    "aio": "threads",
}


class Magic(Record):
    """`value` at `offset` makes `driver` worth asking."""

    __slots__ = ("driver", "offset", "value")

    def __init__(self, driver: str, offset: int, value: bytes) -> None:
        self.driver = driver
        self.offset = offset
        self.value = value


MAGICS = [
    Magic("qcow2", 0, b"QFI\xfb"),
    Magic("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    Magic("vpc", 0, b"conectix"),
]

#: Formats whose only mark is in the last sector, which whoever writes to a raw disk can put there:
#: probing does not go by it, but a user may want to know.
ENDS = [Magic("vpc", 0, b"conectix")]


def probe_bytes(head: bytes, size: int, filename: str) -> str:
    """The name of the format that claims these bytes most strongly.

    Args:
        head: the first bytes.
        size: of all, in bytes.
        filename: as the user or the image wrote it; "" where it was not written as one.
    """
    best, best_score = "raw", 0
    for magic in MAGICS:
        if head[magic.offset : magic.offset + len(magic.value)] == magic.value:
            score = registry.driver_class(magic.driver).probe(head, size, filename)
            if score > best_score:
                best, best_score = magic.driver, score
    if not best_score and head:
        from diskwright.block import foreign

        found = foreign.strongest(head, filename)
        if found is not None:
            best = found.name
    return best


def probe(child: Child, filename: str = "") -> str:
    """The format of what lies in a protocol node.

    Args:
        child: the node.
        filename: as the user or the image wrote it; "" where it was not written as one.

    Raises:
        DiskwrightError: it cannot be read.
    """
    try:
        head = child.read(0, min(HEAD_BYTES, max(child.size, 0)))
    except DiskwrightError as error:
        error.qemu = strerror_of(error)
        error.within("Could not read image for determining its format")
        raise
    return probe_bytes(head, child.size, filename)


def probe_end(child: Child) -> str | None:
    """The format that the last sector of a protocol node alone would make it, if one does."""
    if child.size < HEAD_BYTES:
        return None
    end = child.read(child.size - HEAD_BYTES, HEAD_BYTES)
    for magic in ENDS:
        marked = end[magic.offset : magic.offset + len(magic.value)] == magic.value
        if marked and registry.driver_class(magic.driver).probe_end(end, child.size):
            return magic.driver
    return None
