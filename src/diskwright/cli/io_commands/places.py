"""`alloc`, `map`, `length`, `info`: what is known of the image."""

from __future__ import annotations

from diskwright.cli import output
from diskwright.cli.grammar import Arguments
from diskwright.cli.io_commands.declaration import IoCommand, Refused
from diskwright.cli.io_commands.numbers import SECTOR, parse_number, size_text
from diskwright.operations.opening import disk_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.block.node import Node
    from diskwright.cli.io_commands.session import Session


def alloc(session: Session, arguments: Arguments) -> None:
    """Count how much of a range this layer of the image holds."""
    offset = parse_number(arguments.operands[0])
    wanted = parse_number(arguments.operands[1]) if len(arguments.operands) > 1 else SECTOR
    session.outstanding.report()
    length = max(min(wanted, disk_size(session.node) - offset), 0)
    held = sum(part for _, part, there in _runs(session.node, offset, length) if there)
    output.say(f"{held}/{length} bytes allocated at offset {size_text(offset)}\n")


def map(session: Session, arguments: Arguments) -> None:
    """Print the runs of the image that this layer holds, and those that it does not."""
    session.outstanding.report()
    for start, length, held in _runs(session.node, 0, disk_size(session.node)):
        word = "    allocated" if held else "not allocated"
        output.say(
            f"{size_text(length)} (0x{length:x}) bytes {word} "
            f"at offset {size_text(start)} (0x{start:x})\n"
        )


def _runs(node: Node, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, whether this layer holds it) of runs that are as long as can be.

    The last sector counts as a whole one, as what lies before its missing bytes.
    """
    if length <= 0:
        return
    stop = offset + length
    start, held = offset, True
    position = offset
    for run in node.extents(offset, max(min(stop, node.size) - offset, 0), depth=0):
        if run.allocated != held and position > start:
            yield start, position - start, held
            start = position
        held = run.allocated
        position = run.offset + run.length
    yield start, stop - start, held


def length(session: Session, arguments: Arguments) -> None:
    """Print the image's size."""
    output.say(f"{size_text(disk_size(session.node))}\n")


def info(session: Session, arguments: Arguments) -> None:
    """Print what the format says of the image."""
    session.outstanding.report()
    node = session.node
    output.say(f"format name: {node.driver}\n" * (2 if _names_files(node) else 1))
    details = node.info()
    if details.dirty is None:  # the driver says nothing of what lies there
        raise Refused
    output.say(f"cluster size: {size_text(details.cluster_size or 0)}\n")
    output.say(f"vm state offset: {size_text(node.vm_state_offset)}\n")
    if details.format_specific:
        from diskwright.cli.text import specific_lines

        output.say_lines(specific_lines(details.format_specific))


def _names_files(node: Node) -> bool:
    """Whether the driver has a word of its own before a name, as `file:` or `blkdebug:`."""
    from diskwright.block.registry import SCHEMES

    return node.driver in SCHEMES.values()


ALLOC = IoCommand(
    "alloc",
    "count the bytes of a range that this layer of the image holds",
    alloc,
    synopsis="offset [count]",
    words=(1, 2),
)
MAP = IoCommand("map", "show which ranges this layer of the image holds", map)
LENGTH = IoCommand("length", "show the image's size", length)
INFO = IoCommand("info", "show what the format says of the image", info)
