"""Finding the parent of a differencing VHD.

Such an image has the parent's identifier, its file name, and up to eight *locators*: the
parent's path in the words of a platform. What Windows wrote is read anywhere: a path relative
to the image as it is, of an absolute one at least its last part, beside the image.

Source: Virtual Hard Disk Image Format Specification 1.0, "Parent Locator Entries".
"""

from __future__ import annotations

import os

from diskwright.block import filename
from diskwright.block.differencing import require_fit
from diskwright.drivers.formats.vpc.header import (
    FOOTER_BYTES,
    SECTOR,
    DynamicHeader,
    Footer,
    uuid_text,
)
from diskwright.drivers.formats.vpc.naming import Naming, not_a_file
from diskwright.errors import DiskwrightError, FormatError, NotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.child import Child
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.drivers.formats.vpc.driver import Vpc

#: The longest path of Windows, in bytes of UTF-16.
MAX_NAME_BYTES = 65536

#: Platform codes with a path from the image's folder, and with a whole path.
RELATIVE = (b"W2ru", b"Wi2r")
ABSOLUTE = (b"W2ku", b"Wi2k", b"MacX")

_HINT = (
    "put it beside the image, or name it: backing.file.filename=… in --image-opts, "
    "options={'backing': …} in Python"
)


def references(file: Child, dynamic: DynamicHeader) -> tuple[str, ...]:
    """What the parent may be called, as references from the image's folder, likely ones first.

    Args:
        file: of the image.
        dynamic: its header.
    """
    texts = {code: _text(file, dynamic, code) for code in RELATIVE + ABSOLUTE}
    own = _until_nul(_utf16(dynamic.parent_name, "utf-16-be"))
    found = [_below(texts[code]) for code in RELATIVE]
    whole = [texts[code] for code in ABSOLUTE] + [own]
    found += [text for text in whole if os.path.isabs(text)]
    found += [_below(text.replace("\\", "/").rpartition("/")[2]) for text in whole]
    return tuple(dict.fromkeys(name for name in found if name))


def _text(file: Child, dynamic: DynamicHeader, code: bytes) -> str:
    """The text of the first locator of that platform, or ""."""
    for locator in dynamic.locators:
        if locator.code != code or not 0 < locator.length <= MAX_NAME_BYTES:
            continue
        if locator.offset + locator.length > file.size:
            continue
        raw = file.read(locator.offset, locator.length)
        if code in (b"W2ru", b"W2ku"):
            # little-endian, but there are writers of the other order
            orders = (_utf16(raw, "utf-16-le"), _utf16(raw, "utf-16-be"))
            return _until_nul(max(orders, key=lambda text: sum(char < "\x7f" for char in text)))
        if code == b"MacX":
            return _from_url(_until_nul(raw.decode("utf-8", "replace")))
        return _until_nul(raw.decode("cp1252", "replace"))
    return ""


def _utf16(raw: bytes, order: str) -> str:
    return raw[: len(raw) // 2 * 2].decode(order, "replace")


def _until_nul(text: str) -> str:
    return text.partition("\0")[0]


def _from_url(text: str) -> str:
    """The path of a `file:` URL."""
    from urllib.parse import unquote

    if not text.startswith("file:"):
        return ""
    rest = text.removeprefix("file:")
    if rest.startswith("//"):
        rest = "/" + rest.removeprefix("//").partition("/")[2]
    return unquote(rest)


def _below(text: str) -> str:
    """A relative path of either style as one of this system that is nothing but a path."""
    text = text.replace("\\", "/")
    while text.startswith("./"):
        text = text[2:].lstrip("/")
    if not text or os.path.isabs(text):
        return ""
    return f"./{text}" if filename.has_protocol(text) else text


def find_parent(node: Node, names: tuple[str, ...], policy: Policy) -> str:
    """Which of `names`, references from the image's folder, is the parent.

    Args:
        node: the differencing image; its `dynamic` says who the parent is.
        names: as `references` gives them.
        policy: says which files may be opened at all.

    Raises:
        NotFoundError: none is there.
        FormatError: one is there, and is not the parent.
        PolicyError: the one that may be it may not be opened.
    """
    wanted: bytes = node.dynamic.parent_id  # type: ignore[attr-defined]
    other: tuple[str, Footer] | None = None
    refused: str | None = None
    for name in names:
        path = filename.join_at(node, name)
        if policy.refusal("backing file", path, node.filename) is not None:
            refused = refused or path
            continue
        if filename.has_protocol(path):
            return name  # whoever opens it looks at its identifier
        footer = _footer_of(path)
        if footer is None:
            continue
        if footer.unique_id == wanted:
            return name
        other = other or (path, footer)
    if other is not None:
        raise wrong_parent(node.filename, *other, wanted)
    if refused is not None:
        policy.require("backing file", refused, node.filename)
    called = f"'{names[0]}'" if names else "which it does not name"
    raise NotFoundError(
        f"The parent of {node.describe()}, {called} (the VHD image {uuid_text(wanted)}), "
        "was not found",
        errno=2,
        path=node.filename,
        hint=_HINT,
    ).beyond_qemu()


def wrong_parent(image: str, path: str, footer: Footer | None, wanted: bytes) -> FormatError:
    """The error for a file in the parent's place with another identifier, or none."""
    what = "no VHD image" if footer is None else f"the VHD image {uuid_text(footer.unique_id)}"
    return FormatError(
        f"'{path}' is not the parent of '{image}': it is {what}, not {uuid_text(wanted)}",
        field="parent_id",
        value=None if footer is None else uuid_text(footer.unique_id),
        expected=uuid_text(wanted),
        path=image,
        hint=f"{_HINT}; or make this one the parent: rebase -u -b",
    ).beyond_qemu()


def require_parent(image: Node, node: Node, wanted: bytes) -> None:
    """Refuse a parent that is another image; filters are looked through.

    The time of its last change is not asked for: copying a file changes that too.

    Raises:
        FormatError: its footer does not have the identifier `wanted`.
    """
    node = node.unfiltered
    footer: Footer | None = getattr(node, "footer", None) if node.driver == "vpc" else None
    if footer is None or footer.unique_id != wanted:
        raise wrong_parent(image.filename, node.filename, footer, wanted)


def new_parent(node: Vpc, name: str, format: str | None) -> Naming:
    """What an image is to say of the parent that it gets.

    Args:
        node: the image.
        name: of the parent, relative to it.
        format: of the parent, if somebody said it.

    Raises:
        OptionError: it is no VHD image, the image itself, or of another size.
    """
    path = filename.join_at(node, name)
    if filename.has_protocol(path) or filename.has_protocol(node.filename):
        raise not_a_file(path)
    found = _footer_of(path) if format in (None, node.driver) else None
    parent = None if found is None else (found.unique_id, found.size())
    require_fit(path, "VHD", parent=parent, own=(node.footer.unique_id, node.size))
    assert found is not None
    return Naming(node.filename, path, found.unique_id, node.size)


def _footer_of(path: str) -> Footer | None:
    """The footer of the VHD at `path`, from its end or its beginning."""
    if not os.path.isfile(path):
        return None  # opening others can block, or have effects
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for at in (max(-(-size // SECTOR) * SECTOR - FOOTER_BYTES, 0), 0):
                file.seek(at)
                try:
                    return Footer.parse(file.read(FOOTER_BYTES), at)
                except DiskwrightError:
                    continue
    except OSError:
        return None  # a file that cannot be read is no parent to offer
    return None
