"""`inspect`: what a stranger's image is and refers to, without opening anything but itself."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command
from diskwright.cli.images import image_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.operations.inspect import Inspected, Reference


#: `Inspected.safe` -> the exit code; 1 is left to commands that fail.
_CODES = {True: 0, False: 2, None: 3}

_MARKS = {True: "ok  ", False: "FAIL", None: "?   "}


def run(arguments: Arguments) -> int:
    """Say what an image is, what it refers to, and which rules it keeps."""
    name = flags.only_operand(arguments)
    flags.exclude_format(arguments)
    from diskwright.operations.inspect import inspect_image

    found = inspect_image(image_of(arguments, name, format=arguments.text("format")))
    if arguments.text("output") == "json":
        from diskwright.cli.json_output import dumps

        output.say(dumps(_members(found)) + "\n")
    else:
        output.say_lines(_lines(found), escaped=True)
    return _CODES[found.safe]


def _lines(found: Inspected) -> Iterator[str]:
    from diskwright.cli.text import size_text

    yield f"image: {found.name}"
    yield f"format: {found.format or 'unknown'}"
    if found.size is not None:
        yield f"virtual size: {size_text(found.size)} ({found.size} bytes)"
    if found.disk_size is not None:
        yield f"disk size: {size_text(found.disk_size)}"
    details = found.details
    if found.features:
        yield f"features: {', '.join(found.features)}"
    if details is not None:
        yield f"encrypted: {'yes' if details.encrypted else 'no'}"
        yield f"snapshots: {details.snapshot_count}"
        if details.bitmaps:
            yield f"bitmaps: {details.bitmaps}"
    count = str(len(found.references) or "none") if details is not None else "cannot be told"
    yield f"outside references: {count}"
    for one in found.references:
        yield from _reference_lines(one)
    yield "rules:"
    for rule in found.rules:
        yield f"    {_MARKS[rule.passed]} {rule.name}: {rule.why}"
    yield f"verdict: {_verdict(found)}"


def _verdict(found: Inspected) -> str:
    if found.safe:
        return "safe"
    broken = sum(rule.passed is False for rule in found.rules)
    if broken:
        return f"not safe, {broken} of the rules do not hold"
    unknown = sum(rule.passed is None for rule in found.rules)
    return f"cannot be told, {unknown} of the rules could not be looked at"


def _reference_lines(one: Reference) -> Iterator[str]:
    yield f"    {one.role}: {one.name}"
    if one.resolved != one.name:
        yield f"        from here: {one.resolved or 'cannot be told'}"
    yield f"        format: {one.format or 'not said'}"


def _members(found: Inspected) -> dict[str, object]:
    details = found.details
    return {
        "filename": found.name,
        "format": found.format,
        "virtual-size": found.size,
        "actual-size": found.disk_size,
        "features": list(found.features),
        "encrypted": bool(details is not None and details.encrypted),
        "snapshots": 0 if details is None else details.snapshot_count,
        "bitmaps": 0 if details is None else details.bitmaps,
        "references": None
        if details is None
        else [
            {
                "role": one.role,
                "name": one.name,
                "resolved": one.resolved,
                "format": one.format,
            }
            for one in found.references
        ],
        "rules": [
            {"name": rule.name, "passed": rule.passed, "why": rule.why} for rule in found.rules
        ],
        "safe": found.safe,
        "error": None if found.error is None else str(found.error),
    }


COMMAND = Command(
    "inspect",
    "Say what an image is and refers to, opening nothing but the image",
    operands="IMAGE",
    flags=(
        flags.HELP,
        *flags.IMAGE,
        flags.SHARE,
        flags.OUTPUT,
        flags.OBJECT,
    ),
    run=run,
    notes="A reference is harmless if it is a plain file in or below the image's own folder:\n"
    "those are what the other commands follow without --allow-references.\n"
    "\n"
    "An image that cannot be opened here is described as far as its header goes. In what is\n"
    "printed for people, control characters of names are shown as \\x0a and the like.\n"
    "\n"
    "Exit codes:\n"
    "\n"
    "- 0: safe, every rule holds\n"
    "- 1: the command failed: no such file, no permission, a lock, a wrong call\n"
    "- 2: not safe, a rule does not hold\n"
    "- 3: it cannot be told: the image needs what this release does not read, and nothing that\n"
    "  could be looked at breaks a rule",
)
