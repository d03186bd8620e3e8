"""What users call an image: paths, `protocol:rest`, `json:{…}`, dotted words; and back.

`parse` knows no driver but through the registry's table of schemes; what follows a scheme is
parsed by the driver's `parse_filename`.
"""

from __future__ import annotations

import os

from diskwright.errors import OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node


def protocol_of(name: str) -> str:
    """The text before ":" where it looks like a protocol's, else "". A path has none."""
    colon = name.find(":")
    if colon <= 0:
        return ""
    head = name[:colon]
    if "/" in head or (os.name == "nt" and len(head) == 1):
        return ""
    return head


def parse(name: str) -> dict[str, object]:
    """The options that `name` stands for.

    Raises:
        OptionError: no driver knows its protocol, or the JSON is none.
    """
    if name.startswith("json:"):
        return parse_json(name)
    scheme = protocol_of(name)
    if not scheme:
        return {"driver": "file", "filename": name}
    from diskwright.block import registry

    driver = registry.SCHEMES.get(scheme)
    if driver is None:
        raise OptionError(
            f"Unknown protocol '{scheme}'",
            field="filename",
            hint="write './' before a file name that has a colon in it",
        )
    cls = registry.driver_class(driver)
    return {"driver": driver, **cls.parse_filename(name)}


def parse_json(name: str) -> dict[str, object]:
    """`json:{…}` as nested options; dotted names inside are nested too."""
    import json

    try:
        loaded = json.loads(name.removeprefix("json:"))
    except (ValueError, RecursionError) as error:
        text = str(error)
        reason = "premature EOI" if "char" in text and _at_end(text, name) else "invalid"
        raise OptionError(
            f"Could not parse the JSON options: JSON parse error, {reason}", field="filename"
        ) from None
    if not isinstance(loaded, dict):
        raise OptionError("Invalid JSON object given", field="filename")
    return nested(loaded)


def _at_end(text: str, name: str) -> bool:
    digits = text.rpartition("(char ")[2].rstrip(")")
    return digits.isdecimal() and int(digits) >= len(name) - len("json:") - 1


def nested(flat: dict[str, object]) -> dict[str, object]:
    """{"file.filename": x} -> {"file": {"filename": x}}, at every depth."""
    made: dict[str, object] = {}
    for key, value in flat.items():
        target = made
        *path, last = key.split(".")
        for part in path:
            inner = target.setdefault(part, {})
            if not isinstance(inner, dict):
                raise OptionError(f"'{part}' is given both as a value and with members")
            target = inner
        target[last] = nested(value) if isinstance(value, dict) else value
    return made


def join(image: str, reference: str) -> str:
    """A reference inside of `image` as a name that can be opened from here.

    Relative names are relative to the image's folder, absolute ones and other protocols stay.
    """
    if not reference or reference.startswith("json:") or protocol_of(reference):
        return reference
    if os.path.isabs(reference):
        return reference
    if image.startswith("json:"):
        raise UnsupportedError(
            f"A relative backing file name ('{reference}') cannot be used with '{image}'",
            qemu="Cannot use relative paths with VMDK descriptor file"
            if reference.endswith(".vmdk")
            else f"Cannot generate a base directory with the extension nodes set "
            f"for '{image}'",
            hint="open the image by its file name",
        )
    scheme = protocol_of(image)
    bare = image[len(scheme) + 1 :] if scheme else image
    folder = bare.rpartition("/")[0]
    prefix = f"{scheme}:" if scheme and scheme != "file" else ""
    if "/" not in bare:
        return prefix + reference
    return f"{prefix}{folder}/{reference}"


def of_node(node: Node) -> str:
    """A name for a node above a protocol: the child's where nothing else was said of it."""
    child = node.children.get("file")
    if child is None:
        child = next(iter(node.children.values()), None)
    if child is None:
        return ""
    below = child.node.filename
    own = {
        key: value
        for key, value in node.opened_options.items()
        if key not in ("file", "backing", "image", "driver")
    }
    if not own and not below.startswith("json:") and not node.is_filter:
        return below
    return to_json({"driver": node.driver, **own, "file": describe(child.node)})


def describe(node: Node) -> dict[str, object]:
    """The options that open `node` again."""
    if node.is_protocol:
        found = dict(node.opened_options)
        return {"driver": node.driver, **found}
    made: dict[str, object] = {"driver": node.driver, **node.opened_options}
    for name, child in node.children.items():
        if name != "backing":
            made[name] = describe(child.node)
    return made


def to_json(options: dict[str, object]) -> str:
    """`json:{…}` of nested options."""
    import json

    return "json:" + json.dumps(options)
