"""What a qcow2 header says, without opening the image: for who only wants to be told.

Nothing here follows an offset out of the header, and no value makes it do more than to repeat it.
Source: QEMU, docs/interop/qcow2.txt, "Header", "Header extensions".
"""

from __future__ import annotations

from diskwright.block.info import NodeInfo
from diskwright.drivers.formats.qcow2.extensions import FEATURE_NAMES, Extensions
from diskwright.drivers.formats.qcow2.header import Autoclear, Header, Incompatible
from diskwright.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.child import Child

_KINDS = ("incompatible", "compatible", "autoclear")
_KNOWN = {(kind, bit): name for kind, bit, name in FEATURE_NAMES}
_ENCRYPTION = {1: "AES encryption", 2: "LUKS encryption"}

#: Bits of a cluster's size that there can be.
_CLUSTER_BITS = range(9, 22)


def features(header: Header, extensions: Extensions) -> list[str]:
    """What the image uses beyond the plain format; unknown bits with the image's word for them."""
    found = []
    fields = (
        header.incompatible_features,
        header.compatible_features,
        header.autoclear_features,
    )
    for kind, bits in enumerate(fields):
        for bit in range(64):
            if not bits >> bit & 1:
                continue
            name = _KNOWN.get((kind, bit))
            if name is None:
                own = extensions.features.get((kind, bit))
                said = f" ('{own}')" if own else ""
                name = f"unknown {_KINDS[kind]} feature, bit {bit}{said}"
            found.append(name)
    if header.crypt_method:
        unknown = f"unknown encryption {header.crypt_method}"
        found.append(_ENCRYPTION.get(header.crypt_method, unknown))
    return found


def references(header: Header, extensions: Extensions) -> list[tuple[str, str, str | None]]:
    """What the image names outside of itself: (role, name, format)."""
    found: list[tuple[str, str, str | None]] = []
    if extensions.backing_file:
        found.append(("backing file", extensions.backing_file, extensions.backing_format))
    if header.incompatible_features & Incompatible.DATA_FILE and extensions.data_file:
        found.append(("data file", extensions.data_file, "raw"))
    return found


def count_bitmaps(header: Header, extensions: Extensions) -> int:
    """How many bitmaps the image says it has."""
    if not header.autoclear_features & Autoclear.BITMAPS:
        return 0
    try:
        found = extensions.bitmaps()
    except FormatError:
        return 0
    return found.count if found is not None else 0


def glimpse(file: Child) -> NodeInfo:
    """What the header of the image in `file` says.

    Raises:
        FormatError: there is none.
    """
    most = 1 << _CLUSTER_BITS[-1]
    data = file.read(0, min(file.size, most))
    header = Header.glimpse(data)
    sane = header.cluster_bits in _CLUSTER_BITS
    extensions = Extensions.glimpse(header, data[: header.cluster_size] if sane else data)
    return NodeInfo(
        "qcow2",
        header.size,
        cluster_size=header.cluster_size if sane else None,
        encrypted=bool(header.crypt_method),
        backing_filename=extensions.backing_file,
        backing_format=extensions.backing_format,
        dirty=bool(header.incompatible_features & Incompatible.DIRTY),
        corrupt=bool(header.incompatible_features & Incompatible.CORRUPT),
        references=references(header, extensions),
        features=features(header, extensions),
        bitmaps=count_bitmaps(header, extensions),
        snapshot_count=header.nb_snapshots,
    )
