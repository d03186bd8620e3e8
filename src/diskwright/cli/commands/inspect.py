"""`inspect`: what a stranger's image is and refers to, without opening anything but itself."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command
from diskwright.cli.images import image_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.block.node import Node
    from diskwright.operations.info import ImageInfo


class Reference:
    """A name inside of an image that leads out of it, and whether it would be followed.

    `reason` says why it would not, or is None.
    """

    __slots__ = ("name", "reason", "resolved", "role")

    def __init__(self, role: str, name: str, resolved: str, reason: str | None) -> None:
        self.role = role
        self.name = name
        self.resolved = resolved
        self.reason = reason


def run(arguments: Arguments) -> int:
    """Say what an image is and what it refers to."""
    name = flags.only_operand(arguments)
    flags.exclude_format(arguments)
    from diskwright.block.policy import FollowNothing
    from diskwright.operations.info import describe
    from diskwright.operations.opening import open_image

    image = image_of(arguments, name, format=arguments.text("format"))
    image.policy = FollowNothing()
    with open_image(image, follow_backing=False) as node:
        found = describe(node)
        references = list(references_of(node, found))
        if arguments.text("output") == "json":
            from diskwright.cli.json_output import dumps

            output.say(dumps(_members(node, found, references)) + "\n")
        else:
            output.say_lines(_lines(node, found, references))
    return 0


def references_of(node: Node, found: ImageInfo) -> Iterator[Reference]:
    """Every outside name that the image mentions, judged as the library's default does."""
    from diskwright.block import filename
    from diskwright.block.policy import SameFolder
    from diskwright.errors import DiskwrightError

    policy = SameFolder()
    for role, name in found.details.references:
        try:
            resolved = filename.join_at(node, name)
        except DiskwrightError as error:
            yield Reference(role, name, name, error.message)
            continue
        yield Reference(role, name, resolved, policy.refusal(role, resolved, node.filename))


def _lines(node: Node, found: ImageInfo, references: list[Reference]) -> Iterator[str]:
    from diskwright.cli.text import size_text

    details = found.details
    how = "found out from its bytes" if node.probed else "as you said"
    yield f"image: {found.name}"
    yield f"format: {found.format} ({how})"
    yield f"virtual size: {size_text(found.virtual_size)} ({found.virtual_size} bytes)"
    if found.disk_size is not None:
        yield f"disk size: {size_text(found.disk_size)}"
    if details.features:
        yield f"features: {', '.join(details.features)}"
    if details.snapshots:
        yield f"snapshots: {len(details.snapshots)}"
    yield f"encrypted: {_word(details.encrypted)}"
    if details.dirty:
        yield "not closed cleanly: its tables may need a repair"
    if details.corrupt:
        yield "marked as corrupt"
    if node.probed and node.driver == "raw":
        yield "note: raw has no mark of its own; whoever can write to this disk can make it"
        yield "      look like another format: say --format raw when you open it"
    yield f"outside references: {len(references) or 'none'}"
    for one in references:
        yield f"  {one.role}: {one.name}"
        if one.resolved != one.name:
            yield f"    from here: {one.resolved}"
        if one.role == "backing file" and details.backing_format:
            yield f"    format: {details.backing_format}"
        verdict = "safe: in or below the image's folder" if one.reason is None else one.reason
        yield f"    {verdict}"
    refused = sum(one.reason is not None for one in references)
    if refused:
        yield f"not safe: {refused} of them would be refused without --allow-references"
    else:
        yield "safe: nothing outside of the image's folder is needed"


def _members(node: Node, found: ImageInfo, references: list[Reference]) -> dict[str, object]:
    details = found.details
    return {
        "filename": found.name,
        "format": found.format,
        "probed": node.probed,
        "virtual-size": found.virtual_size,
        "actual-size": found.disk_size,
        "features": list(details.features),
        "snapshots": len(details.snapshots),
        "encrypted": bool(details.encrypted),
        "dirty-flag": bool(details.dirty),
        "corrupt": bool(details.corrupt),
        "references": [
            {
                "role": one.role,
                "name": one.name,
                "resolved": one.resolved,
                "safe": one.reason is None,
                "reason": one.reason,
            }
            for one in references
        ],
        "safe": all(one.reason is None for one in references),
    }


def _word(flag: bool | None) -> str:
    return "yes" if flag else "no"


COMMAND = Command(
    "inspect",
    "Say what an image is and refers to, opening nothing but the image",
    operands="IMAGE",
    flags=(
        flags.HELP,
        flags.FORMAT,
        flags.IMAGE_OPTS,
        flags.SHARE,
        flags.OUTPUT,
        flags.OBJECT,
    ),
    run=run,
    notes="A reference is safe if it is a plain file in or below the image's own folder: those\n"
    "are what the other commands follow without --allow-references.",
)
