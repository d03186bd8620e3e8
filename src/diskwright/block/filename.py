"""What users call an image: paths, `protocol:rest`, `json:{…}`, dotted words; and back.

`parse` knows no driver but through the registry's table of schemes; what follows a scheme is
parsed by the driver's `parse_filename`.
"""

from __future__ import annotations

import os
import stat

from diskwright.errors import OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskwright.block.node import Node

#: Members of a node's options that are nodes themselves.
_CHILD_NAMES = ("file", "backing", "image", "data-file")

#: Options that a node's plain name says.
_NAMED = (
    "filename", "config", "server", "host", "port", "path", "export",
    "tls", "tls-creds", "tls-hostname", "tls-certificates", "tls-verify-peer",
)  # fmt: skip

#: QEMU prints the members of a `json:` name in the order of its hash table. This is that order,
#: as its tools show it, for the words that our drivers use; others follow.
_QEMU_ORDER = (
    "offset",
    "read-zeroes",
    "throttle-group",
    "inject-error.0.state",
    "opt-write-zero",
    "set-state.0.event",
    "max-write-zero",
    "image",
    "backing",
    "max-transfer",
    "force_size_calc",
    "server.abstract",
    "server.path",
    "server.tight",
    "server.host",
    "server.port",
    "port",
    "host",
    "encrypt.key-secret",
    "driver",
    "path",
    "export",
    "server.type",
    "server.ipv4",
    "server.ipv6",
    "tls-creds",
    "tls-hostname",
    "size",
    "config",
    "set-state.0.new_state",
    "inject-error.0.event",
    "opt-discard",
    "max-discard",
    "align",
    "file",
    "filename",
)


# ------------------------------------------------------------------- from names to options


def has_protocol(name: str) -> bool:
    """Whether `name` begins with a protocol: a colon before any slash. A path has none."""
    head, colon, _ = name.partition(":")
    return bool(colon) and "/" not in head and not (os.name == "nt" and len(head) == 1)


def protocol_of(name: str) -> str:
    """The text before ":" where it is a protocol's, else ""."""
    return name.partition(":")[0] if has_protocol(name) else ""


def parse(name: str) -> dict[str, object]:
    """The options that `name` stands for.

    Raises:
        OptionError: no driver knows its protocol, or the JSON is none.
    """
    if name.startswith("json:"):
        return parse_json(name)
    if not has_protocol(name):
        return {"driver": _storage_at(name), "filename": name}
    from diskwright.block import registry

    driver = driver_of(protocol_of(name))
    return {"driver": driver, **registry.driver_class(driver).parse_filename(name)}


def driver_of(scheme: str) -> str:
    """The driver of a protocol, by the word that names of its files begin with.

    Raises:
        OptionError: no driver knows it.
    """
    from diskwright.block import registry

    driver = registry.SCHEMES.get(scheme)
    if driver is None:
        raise OptionError(
            f"Unknown protocol '{scheme}'",
            field="filename",
            hint="write './' before a file name that has a colon in it",
        )
    return driver


def _storage_at(path: str) -> str:
    """The driver for what lies there: devices have one of their own."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "file"  # it is to be made, or the driver says what is wrong
    return "host_device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "file"


def with_name(options: dict[str, object], name: str, *, below: bool = False) -> dict[str, object]:
    """The options of a node, with what a name stands for put where it belongs: its storage.

    Args:
        options: as a user gave them, of the node and of those below it.
        name: a path, a URI, `protocol:rest`.
        below: it is the node's storage that is meant, where no driver is said.
    """
    from diskwright.block import registry

    driver = options.get("driver")
    if below and "filename" in options:
        raise OptionError(
            f"'{name}' and the option 'filename' both say which file is meant",
            qemu="Can't specify 'file' and 'filename' options at the same time",
            field="filename",
        )
    if driver is None and below:
        return {**parse(name), **options}
    if driver in registry.PROTOCOLS or driver in registry.SCHEMES.values():
        named = registry.driver_class(str(driver)).parse_filename(name)
        image, inner = named.get("image"), options.get("image")
        if isinstance(image, str) and isinstance(inner, (str, Reference)):
            raise _twofold("image")
        if isinstance(image, str) and isinstance(inner, dict):
            return {**named, **options, "image": with_name(inner, image, below=True)}
        return {**named, **options}
    file = options.get("file", {})
    if not isinstance(file, dict):
        raise _twofold("file", "'file' is said by the image's name already")
    return {**options, "file": with_name(file, name, below=True)}


def parse_json(name: str) -> dict[str, object]:
    """`json:{…}` as nested options; dotted names inside are nested too.

    Raises:
        OptionError: it is no JSON, or says not what to open.
    """
    from diskwright.block import json_text

    try:
        loaded = json_text.parse(name.removeprefix("json:"))
    except ValueError as error:
        raise OptionError(f"Could not parse the JSON options: {error}", field="filename") from None
    if not isinstance(loaded, dict):
        raise OptionError("Invalid JSON object given", field="filename")
    return written(nested(loaded))


def parse_image_options(text: str) -> dict[str, object]:
    """`--image-opts` words ("driver=qcow2,file.filename=x") as nested options.

    Raises:
        OptionError: they do not say what to open, or contradict each other.
    """
    from diskwright.block.options import split_words, words_as_dict

    pairs = split_words(text)
    if pairs and pairs[0][1] is None:
        pairs[0] = ("file", pairs[0][0])
    return written(nested(words_as_dict(pairs)))


class Reference:
    """The name of a node, in the place of a node: a command has none that it could mean."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def refusal(self) -> OptionError:
        """The error for whoever wants that node."""
        return OptionError(
            f"Cannot find device='{self.name}' nor node-name='{self.name}'",
            field="node-name",
            hint="give the node's own options, as file.driver and file.filename",
        )


def written(options: dict[str, object]) -> dict[str, object]:
    """Nested options that were written, in JSON or as words, as an opener takes them.

    In programs the name of a file may stand where a node belongs; in what is written such a
    string names a node.

    Raises:
        OptionError: they do not say what to open.
    """
    made = taken(options)
    names_file = isinstance(made.get("file"), (dict, Reference)) and made["file"] != {}
    if "driver" not in made and not names_file:
        raise OptionError("Must specify either driver or file", field="driver")
    return made


def taken(options: dict[str, object]) -> dict[str, object]:
    """As QEMU takes them: what is no text names nothing, and members are options of their own."""
    from diskwright.block.common_options import COMMON

    made: dict[str, object] = {}
    for name, value in options.items():
        if name in _CHILD_NAMES:
            made[name] = _child_taken(name, value)
        elif name == "filename":
            made[name] = value if isinstance(value, str) else None
        elif name == "driver" and not isinstance(value, str):
            made.update(_members(name, value) if isinstance(value, (dict, list)) else {})
        elif name in COMMON and name != "cache" and isinstance(value, (dict, list, type(None))):
            made.update(_members(name, value or {}))
        else:
            made[name] = value
    return made


def _child_taken(name: str, value: object) -> object:
    if isinstance(value, str) and (value or name != "backing"):
        return Reference(value)
    if isinstance(value, list) and value:
        return _members("", value)
    if isinstance(value, dict) and value:
        return taken(value)
    return value


def _members(name: str, value: dict[str, object] | list[object]) -> dict[str, object]:
    """The members of a value that should have none, with dotted names."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {f"{name}.{key}" if name else str(key): one for key, one in pairs}


def nested(flat: Mapping[str, object]) -> dict[str, object]:
    """{"file.filename": x} -> {"file": {"filename": x}}, at every depth.

    Raises:
        OptionError: a name is given both as a value and with members.
    """
    made: dict[str, object] = {}
    for key, value in flat.items():
        target = made
        *path, last = key.split(".")
        for depth, part in enumerate(path):
            inner = target.setdefault(part, {})
            if not isinstance(inner, dict):
                if part in _CHILD_NAMES:
                    raise _twofold(part)
                last = ".".join([*path[depth:], last])  # for the driver to judge
                break
            target = inner
        if not isinstance(value, dict):
            members = target.get(last)
            if isinstance(members, dict):
                if last in _CHILD_NAMES:
                    raise _twofold(last)
                target.update({f"{last}.{name}": one for name, one in members.items()})
            target[last] = value
            continue
        inner = target.setdefault(last, {})
        if not isinstance(inner, dict):
            raise _twofold(last)
        inner.update(nested(value))
    return made


def _twofold(name: str, message: str = "") -> OptionError:
    return OptionError(
        message or f"'{name}' is given both as a value and with members",
        qemu="Cannot reference an existing block device with additional options or a new filename"
        if name in _CHILD_NAMES
        else None,
        field=name,
    )


# ------------------------------------------------------------------- references inside of images


def join(image: str, reference: str) -> str:
    """A reference inside of the image named `image` as a name that can be opened from here.

    Relative names are relative to the image's folder; absolute ones and those with a
    protocol stay.
    """
    if not reference or has_protocol(reference) or os.path.isabs(reference):
        return reference
    if image.startswith("json:"):
        raise _no_folder(image)
    return _folder(image) + reference


def join_at(node: Node, reference: str) -> str:
    """As `join`, for an image that is open: its folder is that of the file at the bottom.

    Raises:
        UnsupportedError: `reference` is relative, and nothing below `node` lies in a folder.
    """
    if not reference or has_protocol(reference) or os.path.isabs(reference):
        return reference
    below = node
    while True:
        child = below.children.get("file") or below.children.get("image")
        if child is None:
            break
        below = child.node
    if below.no_folder:
        raise UnsupportedError(
            f"{below.describe()} lies in no folder that '{reference}' could start from",
            qemu=below.no_folder,
            hint="give the backing file's name with its full path",
        )
    if not has_plain_name(below):
        raise _no_folder(node.filename)
    return _folder(below.filename) + reference


def place_of(node: Node, reference: str | None) -> str | None:
    """As `join_at`, for who only tells of it; None where there is nothing to tell."""
    try:
        return join_at(node, reference) if reference else None
    except UnsupportedError:
        return None


def _folder(image: str) -> str:
    """The name's part up to and with the last slash, or its protocol."""
    scheme, colon, bare = image.partition(":") if has_protocol(image) else ("", "", image)
    folder, slash, _ = bare.rpartition("/")
    prefix = scheme + colon if scheme != "file" else ""
    return prefix + folder + slash


def _no_folder(image: str) -> UnsupportedError:
    return UnsupportedError(
        f"'{image}' lies in no folder that a relative name could start from",
        qemu=f"Cannot use relative backing file names for '{image}'",
        hint="give the backing file's name with its full path",
    )


# ------------------------------------------------------------------- from nodes to names


def of_node(node: Node) -> str:
    """What QEMU calls the node: a plain name where that is all there is to say, else `json:`.

    `node.filename`, if the driver set it, is what the driver makes of its own options.
    """
    plain = not _strong(node, named=False)
    if node.filename and plain:
        return node.filename
    if plain and not node.is_filter and not node.is_protocol:
        child = node.children.get("file")
        if child is not None and _is_named(child.node):
            return child.node.filename
    return to_json(describe(node))


def has_plain_name(node: Node) -> bool:
    """Whether a name says all that opens it; a file may be called like options are written."""
    name = node.filename
    return bool(name) and not (name.startswith("json:") and name == to_json(describe(node)))


def _is_named(node: Node) -> bool:
    """Whether a format above `node` has its name: protocols, and filters that have one."""
    return has_plain_name(node) and (node.is_protocol or node.is_filter)


def _strong(node: Node, *, named: bool) -> dict[str, object]:
    """The options given to `node` on which the bytes that one reads depend.

    Args:
        node: any.
        named: with those that the node's plain name says as well.
    """
    found: dict[str, object] = {}
    for name, value in _flat(node.opened_options, "").items():
        option = node.options.get(name) or node.options.get(name.partition(".")[0])
        if option is None:
            continue
        if option.strong or (named and option.name in _NAMED):
            found[name] = value
    return found


def _flat(options: Mapping[str, object], prefix: str) -> dict[str, object]:
    """Nested options with dotted names, children left out."""
    found: dict[str, object] = {}
    for name, value in options.items():
        if not prefix and name in _CHILD_NAMES:
            continue
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found


def describe(node: Node) -> dict[str, object]:
    """The options that open `node` again, in QEMU's order."""
    made: dict[str, object] = {"driver": node.driver, **_strong(node, named=True)}
    for name, child in node.children.items():
        if name != "backing":
            made[name] = describe(child.node)
    return dict(sorted(made.items(), key=_order))


def _order(member: tuple[str, object]) -> int:
    try:
        return _QEMU_ORDER.index(member[0])
    except ValueError:
        return len(_QEMU_ORDER)


def to_json(options: Mapping[str, object]) -> str:
    """`json:{…}` of nested options."""
    import json

    return "json:" + json.dumps(options, default=_written)


def _written(value: object) -> str:
    """A value that JSON has no form for: a path, or what only a program can hand over."""
    try:
        return os.fsdecode(value)  # type: ignore[arg-type]  # whatever it is, it is shown
    except TypeError:
        return f"({type(value).__name__})"
