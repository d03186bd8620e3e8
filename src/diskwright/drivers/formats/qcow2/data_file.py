"""The external data file: the guest's data in a file of their own, at the guest's offsets.

The image has the tables only, and no refcount speaks of the data. Where the header says so the data
file is to be readable as a raw image, so what reads as zero must be zero in it.

Source: QEMU, docs/interop/qcow2.txt, "Header" (external data file bit, raw external data bit),
"Header extensions"; how its name is taken as QEMU's tools were seen to do it.
"""

from __future__ import annotations

from diskwright.block import filename
from diskwright.block.permission import Role
from diskwright.drivers.formats.qcow2.header import Autoclear, Incompatible, bad_field
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.opener import Opener
    from diskwright.drivers.formats.qcow2.driver import Qcow2
    from diskwright.drivers.formats.qcow2.header import Header


def has_data_file(header: Header) -> bool:
    """Whether the guest's data are in a file of their own."""
    return bool(header.incompatible_features & Incompatible.DATA_FILE)


def is_raw(header: Header) -> bool:
    """Whether that file is to be readable as a raw image."""
    return has_data_file(header) and bool(header.autoclear_features & Autoclear.RAW_DATA_FILE)


def open_data_file(node: Qcow2, opener: Opener, given: object) -> None:
    """Set `node.data`.

    Args:
        node: the image, its header read.
        opener: how, and whether at all.
        given: what the user says of the data file, or None.

    Raises:
        OptionError: the image has none although one is given, or names none and none is given.
        FormatError: it has none and says that the one it has is raw.
    """
    node.data = node.file
    if opener.looks_only:
        return
    if not has_data_file(node.header):
        if given is not None:
            # What cannot be opened is told first.
            opener.open_child(node, "data-file", given, Role.DATA)
            raise OptionError(
                "'data-file' can only be set for images with an external data file",
                field="data-file",
            )
        if node.header.autoclear_features & Autoclear.RAW_DATA_FILE:
            raise bad_field(
                "autoclear_features",
                node.header.autoclear_features,
                88,
                "data-file-raw requires a data file",
            )
        return
    name = node.extensions.data_file
    if given is not None:
        node.data = opener.open_child(node, "data-file", given, Role.DATA)
    elif name == "":
        raise OptionError("The 'file' block driver requires a file name", field="data-file")
    elif name is not None:
        # A plain path, whatever it looks like, and as QEMU has it not from the image on.
        spec: dict[str, object] | None = None
        if filename.has_protocol(name):
            spec = {"driver": "file", "filename": name}
        node.data = opener.open_reference(
            node, "data-file", name, format=None, role=Role.DATA, options=spec, joins=False
        )
    else:
        raise OptionError("'data-file' is required for this image", field="data-file")
