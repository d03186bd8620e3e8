"""Finding the parent of a differencing VDI image.

Such an image says who its parent is (an identifier), not where. The files beside it are
looked at; VirtualBox keeps differencing images in a folder `Snapshots` below their base, so
from there the folder above is looked at too. Copies have the identifier of what they were made
of, so two files that have it are not told apart here: whoever opens the image says which.
"""

from __future__ import annotations

import os

from diskwright.block import filename
from diskwright.block.differencing import require_fit
from diskwright.drivers.formats.vdi.header import HEADER_BYTES, Header, uuid_text
from diskwright.errors import FormatError, NotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.drivers.formats.vdi.driver import Vdi

#: Files of one folder that are looked at: a bound for folders like /tmp.
MAX_FILES = 4096


_HINT = (
    "name it: backing.file.filename=… in --image-opts or json:{…}, options={'backing': …} in Python"
)


def find_parent(image: str, header: Header, policy: Policy) -> str:
    """The name of the parent, relative to the folder of `image`.

    Args:
        image: the image's name; only plain paths have a folder to look at.
        header: of the image.
        policy: says which files may be opened at all.

    Raises:
        NotFoundError: no file there is the parent.
        FormatError: the image is its own parent, or several files may be it.
    """
    if header.uuid_link == header.uuid_image:
        raise FormatError(
            "The image says that it is its own parent", field="uuid_link", offset=0x1A8, path=image
        )
    found: dict[str, str] = {}  # real path -> reference: links to one file are one parent
    if not filename.protocol_of(image):
        for reference in _candidates(image):
            path = filename.join(image, reference)
            if policy.refusal("backing file", path, image) is not None:
                continue
            one = header_of(path)
            if one is not None and one.uuid_image == header.uuid_link:
                found.setdefault(os.path.realpath(path), reference)
    if not found:
        raise NotFoundError(
            f"The parent of '{image}', the VDI image "
            f"{uuid_text(header.uuid_link)}, is not beside it",
            errno=2,
            path=image,
            hint=f"put it into the same folder, or {_HINT}",
        ).beyond_qemu()
    if len(found) > 1:
        names = " and ".join(f"'{filename.join(image, one)}'" for one in found.values())
        raise FormatError(
            f"The parent of '{image}' is not clear: {names} are all the VDI image "
            f"{uuid_text(header.uuid_link)}",
            field="uuid_link",
            value=uuid_text(header.uuid_link),
            offset=0x1A8,
            path=image,
            hint=f"move away those that are not it, or {_HINT}",
        ).beyond_qemu()
    return next(iter(found.values()))


def require_parent(image: str, header: Header, node: Node) -> None:
    """Refuse a parent that was given and is another image; filters are looked through.

    Its last change is not asked for: who names a parent knows of what happened to it.

    Raises:
        FormatError: it does not have the identifier that the image's header asks for.
    """
    node = node.unfiltered
    found: Header | None = getattr(node, "header", None) if node.driver == "vdi" else None
    if found is not None and found.uuid_image == header.uuid_link:
        return
    what = "no VDI image" if found is None else f"the VDI image {uuid_text(found.uuid_image)}"
    raise FormatError(
        f"'{node.filename}' is not the parent of '{image}': it is {what}, "
        f"not {uuid_text(header.uuid_link)}",
        field="uuid_link",
        value=None if found is None else uuid_text(found.uuid_image),
        offset=0x1A8,
        expected=uuid_text(header.uuid_link),
        path=image,
        hint="give the right one, or make this one the parent: rebase -u -b",
    ).beyond_qemu()


def new_parent(node: Vdi, name: str, format: str | None) -> Header:
    """The header of what an image is to have as its parent from now on.

    Args:
        node: the image.
        name: of the parent, relative to it.
        format: of the parent, if somebody said it.

    Raises:
        OptionError: it is no VDI image, the image itself, or of another size.
    """
    path = filename.join_at(node, name)
    found = header_of(path) if format in (None, node.driver) else None
    parent = None if found is None else (found.uuid_image, found.size)
    require_fit(path, "VDI", parent=parent, own=(node.header.uuid_image, node.size))
    assert found is not None
    return found


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


def header_of(path: str) -> Header | None:
    """The header of the VDI image at `path`, or None where there is none."""
    try:
        with open(path, "rb", buffering=0) as file:
            return Header.parse(file.read(HEADER_BYTES))
    except (OSError, FormatError):
        return None
