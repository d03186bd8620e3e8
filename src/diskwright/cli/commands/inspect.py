"""`inspect`: what a stranger's image is and refers to, without opening anything but itself."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command
from diskwright.cli.images import image_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.operations.inspect import Inspected, Reference


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
        output.say_lines(_lines(found))
    return 0


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
        yield f"snapshots: {len(details.snapshots)}"
    yield f"outside references: {len(found.references) or 'none'}"
    for one in found.references:
        yield from _reference_lines(one)
    yield "rules:"
    for rule in found.rules:
        yield f"    {'ok  ' if rule.passed else 'FAIL'} {rule.name}: {rule.why}"
    broken = sum(not rule.passed for rule in found.rules)
    yield f"verdict: {'safe' if found.safe else f'not safe, {broken} of the rules do not hold'}"


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
        "snapshots": 0 if details is None else len(details.snapshots),
        "references": [
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
        "error": found.error,
    }


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
    notes="A reference is harmless if it is a plain file in or below the image's own folder:\n"
    "those are what the other commands follow without --allow-references.",
)
