"""Opening: from what a user names to a node with its children.

An `Opener` carries what is common to one call (policy, cache mode, permissions asked for). It
is the only way from an image to anything outside of it.
"""

from __future__ import annotations

import errno
import os

from diskwright.block import filename, registry
from diskwright.block.common_options import COMMON, cache_flags, common_options
from diskwright.block.graph import Graph, attach
from diskwright.block.notice import warn
from diskwright.block.options import CHILD_NAMES
from diskwright.block.permission import CONSISTENT_READ, RESIZE, WRITE, Role
from diskwright.block.policy import FollowAll, Policy
from diskwright.errors import (
    DiskwrightError,
    FormatError,
    IOFailure,
    OptionError,
    UnsupportedError,
    from_oserror,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from diskwright.block.child import Child
    from diskwright.block.node import Node
    from diskwright.system.new_file import NewFile

    Spec = str | dict[str, object]
    Made = NewFile


#: Longest backing chain that is followed: each image of it takes some frames of the stack.
MAX_DEPTH = 140


class Opener:
    """How to open what an image or a user names.

    Attributes:
        read_only: of the node to open; backing files are read-only.
        force_share: take and check no locks on what is opened read-only (QEMU's -U).
        direct, no_flush, write_through: the cache mode.
        can_unmap: discards are passed to what is opened.
        unmaps_unasked: detect-zeroes=unmap is taken without discard=unmap beside it, as always
            for the storage of an image.
        follow_backing: False opens an image without its backing file.
        copy_on_read: what the node to open reads from its backing file is kept in it.
        checks: it is opened to be checked: what a check can mend does not stop that.
        looks_only: nobody will ask for the guest's data: files that have nothing else stay closed.
        aio: how protocols are asked to wait for the system, unless their options say it.
        depth: how many references lie between the user's name and this one.
        made: the files that were made through it or those derived from it, locked until the
            caller closes them (`NewFile.close`).
    """

    def __init__(
        self,
        *,
        policy: Policy | None = None,
        read_only: bool = True,
        force_share: bool = False,
        cache: str = "writeback",
        can_unmap: bool = True,
        follow_backing: bool = True,
        copy_on_read: bool = False,
    ) -> None:
        self.graph = Graph()
        self.policy = policy or FollowAll()
        self.read_only = read_only
        self.force_share = force_share
        self.direct, self.no_flush, self.write_through = cache_flags(cache)
        self.can_unmap = can_unmap
        self.follow_backing = follow_backing
        self.copy_on_read = copy_on_read
        self.checks = False
        self.looks_only = False
        self.aio = "threads"
        self.unmaps_unasked = False
        self.detect_zeroes = ""
        self.depth = 0
        self.chain: tuple[str, ...] = ()  # files above, to see a cycle
        self.made: list[Made] = []

    def derive(self, **changes: object) -> Self:
        """A copy with some attributes changed."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.__dict__.update(changes)
        return made

    # ---------------------------------------------------------------------- for drivers

    def open_child(
        self,
        parent: Node,
        name: str,
        spec: object,
        role: int = Role.STORAGE,
        *,
        format: str | None = None,
        protocol: bool | None = None,
    ) -> Child:
        """Open what `spec` says and attach it to `parent` as child `name`.

        Args:
            parent: the node being opened.
            name: of the child: "file", "backing", …
            spec: a name, or a dict of options: what the user gave.
            role: a permission Role.
            format: the format, where it is known.
            protocol: expect a protocol rather than an image; None: by the role.
        """
        if isinstance(spec, filename.Reference):
            raise spec.refusal()
        if role != Role.BACKING and not _names_a_node(spec):
            raise OptionError(f'A block device must be specified for "{name}"', field=name)
        if protocol is None:
            inside = parent.protocol_level and role != Role.BACKING
            protocol = role in (Role.STORAGE, Role.DATA) or inside
        # Whose backing file was not wanted is the node that was asked for.
        opener = self.derive(
            write_through=False, detect_zeroes="", follow_backing=True, copy_on_read=False
        )
        opener.unmaps_unasked = True
        if role != Role.BACKING:
            opener.read_only = parent.read_only
        # What else it may be is refused there.
        node = open_node(opener, spec, format=format, protocol=protocol)  # type: ignore[arg-type]
        try:
            return attach(parent, name, node, role)
        except BaseException:
            node._close_inside()
            raise

    def open_backing(
        self, parent: Node, given: object, reference: str | None, *, format: str | None
    ) -> Child | None:
        """Open the backing file of `parent`.

        Args:
            parent: the image.
            given: what the user says of it: a name, options, None for none at all, or "".
            reference: what the image says. Options without a name go with it.
            format: of the reference, where the image or the user names one.
        """
        if given is None:
            return None
        options = dict(given) if isinstance(given, dict) else {}
        named = bool(given) and not (options and reference and options.keys().isdisjoint(_NAMES))
        if not named:
            if not reference:
                return None
            return self.open_reference(
                parent, "backing", reference, format=format, role=Role.BACKING, options=options
            )
        try:
            return self.derive(read_only=True).open_child(
                parent,
                "backing",
                given,
                Role.BACKING,
            )
        except DiskwrightError as error:
            error.qemu = f"Could not open backing file: {error.qemu_message}"
            raise

    def open_reference(
        self,
        parent: Node,
        name: str,
        reference: str,
        *,
        format: str | None,
        role: int,
        options: dict[str, object] | None = None,
        joins: bool = True,
    ) -> Child:
        """Open what the image `parent` names inside of itself, if the policy lets it.

        `options` go with the name, as the user gave them. A path begins in the image's folder,
        or, where it is not joined, in the present one.

        Raises:
            PolicyError: it does not.
        """
        image = parent.filename
        word = {Role.BACKING: "backing file", Role.DATA: "data file"}.get(role, name)
        if "\0" in reference:
            raise FormatError(f"The name of the {word} has a zero byte in it", path=image)
        full = filename.join_at(parent, reference) if joins else reference
        self.policy.require(word, full, image)
        above = (*self.chain, _place(image))
        if self.depth >= MAX_DEPTH:
            raise UnsupportedError(
                f"'{full}' is the last of more than {MAX_DEPTH} images over each other",
                path=image,
                hint="commit some of them into those below",
            )
        if format != "raw" and _place(full) in above:  # what is raw names nothing further
            raise DiskwrightError(
                f"The {word} '{full}' leads back to itself",
                kind="format",
                path=image,
                hint="an image must not be its own backing file",
            )
        writable = role != Role.BACKING and not parent.read_only
        opener = self.derive(
            read_only=not writable,
            depth=self.depth + 1,
            chain=above,
        )
        try:
            spec = _with_options(full, options) if options else full
            return opener.open_child(parent, name, spec, role, format=format)
        except DiskwrightError as error:
            if role == Role.BACKING:
                error.qemu = f"Could not open backing file: {error.qemu_message}"
            raise

    def make_file(self, options: dict[str, object], size: int = 0) -> dict[str, object]:
        """Make the protocol file a new image lives in.

        Args:
            options: "filename" (a name as users give it) and create options of the protocol.
            size: in bytes.

        Returns:
            What opens it.
        """
        from diskwright.block.existing import parse_target

        spec = parse_target(str(options["filename"]))
        name = str(spec.get("driver", "file"))
        cls = registry.driver_class(name)
        own = {
            option.name: options[option.name]
            for option in cls.create_options
            if option.name in options and option.name not in ("size", "preallocation")
        }
        for key in ("preallocation",):
            if key in options and options[key] is not None:
                own[key] = options[key]
        cls.create(self, size, {**own, **spec})
        return spec

    def create_file(self, options: dict[str, object], size: int = 0) -> Node:
        """As `make_file`, and open it for writing; the caller closes it (`with`)."""
        return self.open_made(self.make_file(options, size))

    def open_made(self, spec: dict[str, object]) -> Node:
        """Open for writing what `make_file` made; the caller closes it (`with`)."""
        opener = self.derive(read_only=False, graph=Graph(), write_through=False)
        node = open_node(opener, spec, protocol=True)
        try:
            node.acquire("create", WRITE | RESIZE)
        except BaseException:
            node._close_inside()
            raise
        return node


#: What says which file is meant, among a node's options.
_NAMES = {"file", "filename"}


def _with_options(name: str, options: dict[str, object]) -> Spec:
    """The options that `name` stands for with those of the user."""
    if name.startswith("json:") and options.get("driver") not in registry.PROTOCOLS:
        return {**filename.parse(name), **options}
    return filename.with_name(options, name)


def _place(name: str) -> str:
    """A name that can be compared: paths to one file are many."""
    return name if filename.has_protocol(name) else os.path.realpath(name)


def _as_options(spec: Spec, format: str | None, protocol: bool) -> dict[str, object]:
    """A dict with a driver, or one without that says what is to be probed."""
    if isinstance(spec, str):
        apart = format in registry.PROTOCOLS or format in registry.SCHEMES.values()
        if apart and not protocol and not spec.startswith("json:"):
            return filename.with_name({"driver": format}, spec)  # by its driver's name
        options = filename.parse(spec)
        if protocol or spec.startswith("json:"):
            if format is not None and not protocol:
                options["driver"] = format  # as with QEMU: what is said beside a name wins
            return _resolved(options, protocol)
        wanted: dict[str, object] = {"file": options}
        if format is not None:
            wanted["driver"] = format
        return wanted
    try:
        options = dict(spec)
    except (TypeError, ValueError):
        raise OptionError(
            f"A node is given by a name or by a dict of options, not as {spec!r}", field="filename"
        ) from None
    if format is not None:
        options.setdefault("driver", format)
    return _resolved(options, protocol)


def _resolved(options: dict[str, object], protocol: bool) -> dict[str, object]:
    """Options whose `filename`, if that is all they have, was looked at."""
    if "driver" in options or ("file" in options and not protocol):
        return options
    name = options.pop("filename", None)
    if name is None:
        return options
    parsed = filename.parse(str(name))
    if protocol:
        return {**parsed, **options}
    common = {key: options.pop(key) for key in COMMON if key in options}
    return {"file": {**parsed, **options}, **common}


def open_node(
    opener: Opener, spec: Spec, *, format: str | None = None, protocol: bool = False
) -> Node:
    """Open a node and its children; nobody uses it yet (see `Node.acquire`).

    Args:
        opener: how.
        spec: a file name, URI, "json:{…}", or a dict of options.
        format: the driver; None probes, unless `spec` names one.
        protocol: what is named is a protocol, nothing is probed.

    Raises:
        DiskwrightError: of every kind; whatever was opened on the way is closed.
    """
    options = _as_options(spec, format, protocol)
    opener, common = common_options(opener, options)
    if opener.force_share and not opener.read_only:
        raise OptionError(
            "force-share=on can only be used with read-only images", field="force-share"
        )
    if opener.copy_on_read and opener.read_only:
        raise OptionError("Can't use copy-on-read on read-only device", field="copy-on-read")
    driver = options.pop("driver", None)
    if not isinstance(driver, str):
        driver = None  # as with QEMU: what is no name names nothing
    probed = False
    if options.get("backing") == "":
        warn('Use of "backing": "" is deprecated; use "backing": null instead')
    if driver is None:
        if protocol or not _names_a_node(options.get("file")):
            raise OptionError("Must specify either driver or file", field="driver")
        named = isinstance(spec, str) and not spec.startswith("json:")
        driver = _probe_file(opener, options, str(spec) if named else "")
        probed = True
    cls = _class_of(str(driver), probed)
    backed = _names_a_node(options.get("backing"))
    if backed and not cls.takes_backing and opener.follow_backing:
        raise OptionError("Driver doesn't support backing files", field="backing")
    if not cls.is_protocol and not cls.is_filter and not _names_a_node(options.get("file")):
        raise OptionError('A block device must be specified for "file"', field="file")
    node = cls(opener.graph, _node_name(opener.graph, common))
    node.read_only = opener.read_only
    node.probed = probed
    node.protocol_level = protocol
    node.can_unmap = opener.can_unmap
    node.detect_zeroes = opener.detect_zeroes
    node.copy_on_read = opener.copy_on_read
    node.write_through = opener.write_through
    given = dict(options)
    opener.graph.nodes.append(node)
    try:
        node.opened_options = given
        refused: list[OptionError] = []
        known = cls.options.validate(
            options,
            children=_children_of(cls, opener, options),
            unknown=_unknown(cls),
            refused=refused,
        )
        node._open(opener, known)
        if refused:  # as with QEMU: what is wrong with the image itself is told first
            raise refused[0]
        node.filename = filename.of_node(node)
        node._attach_lent()
    except BaseException:
        _give_up(node)
        raise
    return node


def _children_of(cls: type[Node], opener: Opener, options: dict[str, object]) -> list[str]:
    """Children that may be given: of a backing file nothing where it is not going to be opened."""
    backed = cls.takes_backing and opener.follow_backing and _names_a_node(options.get("backing"))
    absent = {
        "file": cls.is_protocol,
        "image": cls.is_protocol or "file" in options,
        "data-file": not cls.takes_backing,
        "backing": not backed,
    }
    return [name for name in CHILD_NAMES if not absent.get(name)]


#: Longest name of a node.
_MAX_NODE_NAME = 31


def _names_a_node(below: object) -> bool:
    """Whether an option says what is to be a child: neither nothing nor a number."""
    return below not in (None, "", {}, []) and not isinstance(below, (int, float))


def _node_name(graph: Graph, common: dict[str, object]) -> str:
    """The name that was given, or one that is free."""
    if "node-name" not in common:
        return f"#block{next(graph.names):03d}"
    name = str(common["node-name"])
    rest = name.translate({ord(char): None for char in "-._"})
    if not (name.isascii() and name[:1].isalpha() and rest.isalnum()):
        raise OptionError(f"Invalid node-name: '{name}'", field="node-name")
    if len(name) > _MAX_NODE_NAME:
        raise OptionError("Node name too long", field="node-name")
    if any(node.node_name == name and not node.closed for node in graph.nodes):
        raise OptionError(f"Duplicate nodes with node-name='{name}'", field="node-name")
    return name


def _unknown(cls: type[Node]) -> str:
    """QEMU's sentence for an option that the driver does not have."""
    if cls.is_protocol:
        return f"Block protocol '{cls.driver}' doesn't support the option '{{name}}'"
    return f"Block format '{cls.driver}' does not support the option '{{name}}'"


def _class_of(driver: str, probed: bool) -> type[Node]:
    """The driver's class; where an image was found to be of a format without one, that is said."""
    try:
        return registry.driver_class(driver)
    except UnsupportedError:
        if probed:
            from diskwright.block import foreign

            if (error := foreign.refusal(driver)) is not None:
                raise error from None
        raise


def _probe_file(opener: Opener, options: dict[str, object], name: str) -> str:
    """Open the protocol below for a look at its first bytes, and close it again.

    `name` is what the user or the image wrote, if it was a plain name.
    """
    from diskwright.block.child import Child
    from diskwright.block.probe import LOOKING, probe

    spec = options["file"]
    if isinstance(spec, filename.Reference):
        raise spec.refusal()
    if not isinstance(spec, (str, dict)):
        raise OptionError("'file' must be a name or options", field="file")
    try:
        node = open_node(opener.derive(graph=Graph(), **LOOKING), spec, protocol=True)
    except IOFailure as error:
        if error.errno == errno.EISDIR and not opener.read_only:  # as opening it to write says
            reason = OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            path = error.path
            raise from_oserror(reason, f"Could not open '{path}'", path=path) from error
        raise
    try:
        return probe(Child(None, "probe", node, 0), name)
    finally:
        node._close_inside()


def open_storage(opener: Opener, spec: Spec, *, format: str | None = None) -> tuple[str, Node]:
    """What an image lies in, for who looks at its header only; nothing but that is opened.

    Args:
        opener, spec, format: as for `open_node`.

    Returns:
        The name of the image's format, which may have no driver, and the open protocol node.
    """
    options = _as_options(spec, format, False)
    opener, _ = common_options(opener, options)
    below = options.get("file")
    if isinstance(below, filename.Reference):
        raise below.refusal()
    if not isinstance(below, (str, dict)):
        raise OptionError('A block device must be specified for "file"', field="file")
    named = isinstance(spec, str) and not spec.startswith("json:")
    driver = options.get("driver") or _probe_file(opener, options, str(spec) if named else "")
    return str(driver), open_node(opener, below, protocol=True)


def _give_up(node: Node) -> None:
    """Close what a failed `_open` left, without flushing anything."""
    node.read_only = True
    try:
        node._close_inside()
    except (DiskwrightError, OSError):
        pass  # the error that is on its way says more


def open_image(
    opener: Opener,
    spec: Spec,
    *,
    format: str | None = None,
    used: int | None = None,
    shared: int | None = None,
) -> Node:
    """Open a node as an outside user does: with permissions and locks.

    Args:
        opener, spec, format: as for `open_node`.
        used, shared: permissions; by default what QEMU's tools take: reading, or writing too,
            sharing all. The library's writable `open` shares all but writing, as a guest's disk.
    """
    from diskwright.block.permission import ALL

    node = open_node(opener, spec, format=format)
    if used is None:
        used = CONSISTENT_READ if opener.read_only else CONSISTENT_READ | WRITE
    try:
        node.acquire("user", used, ALL if shared is None else shared)
    except BaseException:
        _give_up(node)
        raise
    return node
