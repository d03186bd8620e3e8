"""Finding the parent of a differencing VDI image.

Such an image says who its parent is (an identifier), not where. The files beside it are
looked at; VirtualBox keeps differencing images in a folder `Snapshots` below their base, so
from there the folder above is looked at too.
"""

from __future__ import annotations

import os

from diskwright.block import filename
from diskwright.drivers.formats.vdi.header import HEADER_BYTES, NO_UUID, Header, uuid_text
from diskwright.errors import FormatError, NotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.block.policy import Policy

#: Files of one folder that are looked at: a bound for folders like /tmp.
MAX_FILES = 4096


def find_parent(image: str, header: Header, policy: Policy) -> str:
    """The name of the parent, relative to the folder of `image`.

    Args:
        image: the image's name; only plain paths have a folder to look at.
        header: of the image.
        policy: says which files may be opened at all.

    Raises:
        NotFoundError: no file there is the parent.
        FormatError: the image is its own parent.
    """
    if header.uuid_link == header.uuid_image:
        raise FormatError(
            "The image says that it is its own parent", field="uuid_link", offset=0x1A8, path=image
        )
    if not filename.protocol_of(image):
        for reference in _candidates(image):
            path = filename.join(image, reference)
            if policy.refusal("backing file", path, image) is not None:
                continue
            if _identifier(path) == header.uuid_link:
                return reference
    raise NotFoundError(
        f"The parent of '{image}', the VDI image {uuid_text(header.uuid_link)}, is not beside it",
        errno=2,
        path=image,
        hint="put it into the same folder, or name it: backing.file.filename=… in --image-opts, "
        "options={'backing': …} in Python",
    )


def _candidates(image: str) -> Iterator[str]:
    """Names that may be the parent's, likely ones first."""
    folder, own = os.path.split(image)
    for name in _files(folder, "", own):
        yield f"./{name}" if filename.has_protocol(name) else name
    if os.path.basename(os.path.abspath(folder)) == "Snapshots":
        yield from _files(os.path.join(folder, ".."), "../", "")


def _files(folder: str, prefix: str, own: str) -> list[str]:
    found: list[str] = []
    try:
        with os.scandir(folder or ".") as entries:
            for entry in entries:
                if entry.name != own and len(found) < MAX_FILES and entry.is_file():
                    found.append(prefix + entry.name)
    except OSError:
        return []  # a folder that cannot be listed has no parent to offer
    return sorted(found, key=lambda name: (not name.lower().endswith(".vdi"), name))


def _identifier(path: str) -> bytes:
    """The identifier of the VDI image at `path`, or NO_UUID."""
    try:
        with open(path, "rb", buffering=0) as file:
            return Header.parse(file.read(HEADER_BYTES)).uuid_image
    except (OSError, FormatError):
        return NO_UUID
