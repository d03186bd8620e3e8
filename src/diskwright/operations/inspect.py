"""Is an image safe to open? Everything it says of itself, opening nothing but the image."""

from __future__ import annotations

from diskwright.block.record import Record
from diskwright.errors import DiskwrightError
from diskwright.operations.opening import Image, disk_size, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.info import NodeInfo
    from diskwright.block.node import Node
    from diskwright.operations.opening import Name

#: An image that claims to be this much longer than its file is not usual.
MAX_VIRTUAL_BYTES = 64 << 40


class Reference(Record):
    """Something outside that the image names.

    Attributes:
        role: "backing file", "data file" or what else the format calls it.
        name: as the image has it.
        resolved: as it would be opened, or None where that cannot be told.
        format: the driver that the image names for it, or None: it would be guessed.
    """

    __slots__ = ("format", "name", "resolved", "role")

    def __init__(
        self, role: str, name: str, *, resolved: str | None = None, format: str | None = None
    ) -> None:
        self.role = role
        self.name = name
        self.resolved = resolved
        self.format = format


class Rule(Record):
    """One thing that makes an image safe.

    Attributes:
        name: of the rule.
        passed: whether it holds; None where that could not be found out.
        why: one sentence.
    """

    __slots__ = ("name", "passed", "why")

    def __init__(self, name: str, passed: bool | None, why: str) -> None:
        self.name = name
        self.passed = passed
        self.why = why


class Inspected(Record):
    """What an image says of itself.

    Attributes:
        name: of the image.
        format: guessed from its bytes unless it was given; None where it cannot be told.
        guessed: it was guessed, and no format claims these bytes.
        ends_as: the format that the last sector alone would make it, or None.
        size: what a guest sees, in bytes; None where it cannot be told.
        disk_size: bytes that the file occupies, or None.
        details: what the driver says (`diskwright.block.info.NodeInfo`), or None. Where the
            image cannot be opened, it is what its header alone says.
        features: names of what the image uses beyond the plain format.
        references: everything outside that it names; known only where `details` are.
        rules: every one there is.
        error: why it could not be opened, or None.
    """

    __slots__ = (
        "details",
        "disk_size",
        "ends_as",
        "error",
        "features",
        "format",
        "guessed",
        "name",
        "references",
        "rules",
        "size",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.format: str | None = None
        self.guessed = False
        self.ends_as: str | None = None
        self.size: int | None = None
        self.disk_size: int | None = None
        self.details: NodeInfo | None = None
        self.features: list[str] = []
        self.references: list[Reference] = []
        self.rules: list[Rule] = []
        self.error: DiskwrightError | None = None

    @property
    def safe(self) -> bool | None:
        """Whether every rule holds; None if none is broken, but some could not be looked at."""
        if any(rule.passed is False for rule in self.rules):
            return False
        return True if all(rule.passed for rule in self.rules) else None


def inspect_image(image: Image) -> Inspected:
    """Open an image, and nothing that it names, and look at it. Raises nothing of ours but for
    files that are not there or may not be read.

    Raises:
        NotFoundError, AccessError, LockError: the file cannot be read.
    """
    from diskwright.block.policy import FollowNothing

    alone = Image(
        image.name,
        format=image.format,
        options=image.options,
        cache=image.cache,
        force_share=image.force_share,
        policy=FollowNothing(),
        shown=image.title,
    )
    found = Inspected(image.title)
    location = image.title
    try:
        with open_image(alone, follow_backing=False) as node:
            _describe(found, node)
            location = node.filename
    except DiskwrightError as error:
        if error.kind in ("not-found", "access", "locked"):
            raise
        found.error = error
        location = _describe_unopened(found, alone) or location
    found.rules = [_evaluate(name, rule, found, location) for name, rule in RULES]
    return found


def _describe(found: Inspected, node: Node) -> None:
    found.format = node.driver
    found.guessed = node.probed and not _claims(node)
    if found.guessed:
        from diskwright.block.probe import probe_end

        found.ends_as = probe_end(node.children["file"])
    found.size = disk_size(node)
    found.disk_size = node.allocated_size
    _take_details(found, node.info(), node)


def _describe_unopened(found: Inspected, image: Image) -> str | None:
    """What the header says of an image that cannot be opened; returns where it lies."""
    from diskwright.block import registry
    from diskwright.block.child import Child
    from diskwright.block.opener import open_storage

    try:
        opener = image.opener().derive(force_share=True)
        found.format, storage = open_storage(opener, image.spec(), format=image.format)
    except (DiskwrightError, OSError):
        return None  # there is nothing to look at; `found.error` says why
    with storage:
        location = storage.filename
        found.disk_size = storage.allocated_size
        try:
            file = Child(None, "inspect", storage, 0)
            details = registry.driver_class(found.format).glimpse(file)
        except (DiskwrightError, OSError):
            return location  # no driver, or no header
        found.size = details.virtual_size
        _take_details(found, details, storage)
    return location


def _take_details(found: Inspected, details: NodeInfo, node: Node) -> None:
    found.details = details
    found.features = list(details.features)
    found.references = [
        Reference(role, name, resolved=_resolved(node, name), format=format)
        for role, name, format in details.references
    ]


def _resolved(node: Node, name: str) -> str | None:
    from diskwright.block import filename

    try:
        return filename.join_at(node, name)
    except DiskwrightError:
        return None


def _claims(node: Node) -> bool:
    """Whether the driver knows the image by its bytes."""
    from diskwright.block.probe import HEAD_BYTES

    child = node.children.get("file")
    if child is None:
        return True
    head = child.read(0, min(HEAD_BYTES, child.size))
    return type(node).probe(head, child.size, node.filename) > 0


def _evaluate(
    name: str,
    rule: Callable[[Inspected, str], tuple[bool | None, str]],
    found: Inspected,
    location: str,
) -> Rule:
    """A rule's outcome; one that fails to come to any is not known to hold."""
    try:
        passed, why = rule(found, location)
    except (DiskwrightError, OSError, ValueError) as error:
        return Rule(name, None, f"it could not be looked at: {error}")
    return Rule(name, passed, why)


# ------------------------------------------------------------------------------------ the rules

_NOT_SEEN = (None, "it could not be looked at")

#: Kinds of errors that say nothing against an image: another program may read it.
_LIMITS = ("unsupported", "missing-dependency", "policy")


def _opens(found: Inspected, location: str) -> tuple[bool | None, str]:
    if found.error is not None:
        words = f"it cannot be opened: {found.error}"
        return (None if found.error.kind in _LIMITS else False), words
    return True, f"it is a {found.format} image"


def _has_a_format(found: Inspected, location: str) -> tuple[bool | None, str]:
    """What no format claims can become another format by what a guest writes."""
    if found.format is None:
        return _NOT_SEEN
    if found.guessed:
        sentence = "no format claims its bytes: say the format whenever it is opened"
        if found.ends_as is not None:
            sentence += f" ('{found.ends_as}', if its last sector is not what a guest wrote there)"
        return False, sentence
    return True, "its format cannot be taken for another"


def _names_nothing_outside(found: Inspected, location: str) -> tuple[bool | None, str]:
    from os.path import realpath

    from diskwright.block.policy import SameFolder

    if found.details is None:
        return _NOT_SEEN
    refused = []
    for reference in found.references:
        name = reference.resolved
        if name is None:
            reason: str | None = "it cannot be told where it is"
        elif realpath(name) == realpath(location):
            reason = "it is the image itself, which cannot be opened so"
        else:
            reason = SameFolder().refusal(reference.role, name, location)
        if reason is not None:
            refused.append(f"the {reference.role} '{reference.name}': {reason}")
    if refused:
        return False, "; ".join(refused)
    if found.references:
        return True, "what it names lies in or below its own folder"
    return True, "it names nothing outside of itself"


def _says_formats(found: Inspected, location: str) -> tuple[bool | None, str]:
    """A backing file whose format is guessed can be made to name any file by its guest."""
    if found.details is None:
        return _NOT_SEEN
    guessed = [one.name for one in found.references if one.format is None]
    if guessed:
        return False, f"it does not say which format these have: {', '.join(guessed)}"
    return True, "the format of everything it names is said"


def _was_closed(found: Inspected, location: str) -> tuple[bool | None, str]:
    if found.details is None:
        return _NOT_SEEN
    if found.details.dirty:
        return False, "it was not closed, or is open elsewhere: check it"
    return True, "it was closed in order"


def _is_sound(found: Inspected, location: str) -> tuple[bool | None, str]:
    if found.details is None:
        return _NOT_SEEN
    if found.details.corrupt:
        return False, "it is marked as corrupt"
    return True, "it is not marked as corrupt"


def _has_a_usual_size(found: Inspected, location: str) -> tuple[bool | None, str]:
    if found.size is None:
        return _NOT_SEEN
    if found.size > MAX_VIRTUAL_BYTES:
        return False, f"it claims {found.size} bytes, more than {MAX_VIRTUAL_BYTES}"
    return True, f"it has {found.size} bytes"


#: Every rule, in the order in which they are shown.
RULES: list[tuple[str, Callable[[Inspected, str], tuple[bool | None, str]]]] = [
    ("opens", _opens),
    ("has a format of its own", _has_a_format),
    ("names nothing outside of its folder", _names_nothing_outside),
    ("says the format of what it names", _says_formats),
    ("was closed", _was_closed),
    ("is not marked corrupt", _is_sound),
    ("has a usual size", _has_a_usual_size),
]


def inspect(name: Name, *, format: str | None = None, force_share: bool = False) -> Inspected:
    """Look at an image that is not trusted; nothing that it names is opened.

    Args:
        name: a path, URI, "json:{…}", or a dict of options.
        format: the driver; None probes.
        force_share: look although another process may write to it.

    Raises: as `inspect_image`.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("mine.qcow2", "1M", format="qcow2")
        >>> report = diskwright.inspect("mine.qcow2")
        >>> report.format, report.size, report.references, report.safe
        ('qcow2', 1048576, [], True)
        >>> made = diskwright.create(
        ...     "odd.qcow2", "1M", format="qcow2", backing="/etc/passwd", backing_format="raw",
        ...     check_backing=False,
        ... )
        >>> [rule.name for rule in diskwright.inspect("odd.qcow2").rules if not rule.passed]
        ['names nothing outside of its folder']
    """
    return inspect_image(Image(name, format=format, force_share=force_share))
