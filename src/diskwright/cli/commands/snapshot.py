"""`snapshot`: states of a disk that are kept inside of its image."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command, Flag, Misused
from diskwright.cli.images import image_of, warn_of_guess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node

_ACTIONS = ("list", "apply", "create", "delete")


def run(arguments: Arguments) -> int:
    """List an image's snapshots, or create, apply or delete one."""
    if sum(arguments.count(action) for action in _ACTIONS) > 1:
        raise Misused("Cannot mix '-l', '-a', '-c', '-d'")
    name = flags.only_operand(arguments)
    flags.exclude_format(arguments)
    from diskwright.operations.snapshot import APPLY, CREATE, LIST, LONGEST_NAME, snapshot_image

    action = next((one for one in _ACTIONS if arguments.flag(one)), LIST)
    image = image_of(arguments, name, format=arguments.text("format"))
    tag = arguments.text(action) or ""
    if action == CREATE and not arguments.friendly:  # QEMU's tool cuts names without a word
        stored = tag.encode("utf-8", "surrogateescape")[:LONGEST_NAME]
        tag = stored.decode("utf-8", "surrogateescape")
    opened = {LIST: None, APPLY: _warn_before_apply}.get(action, warn_of_guess)
    found = snapshot_image(image, action, tag, opened=opened)
    if action == LIST and found:
        from diskwright.cli.text import snapshot_table

        output.say("Snapshot list:\n")
        output.say_lines(snapshot_table(found), escaped=arguments.friendly)
    return 0


def _warn_before_apply(node: Node) -> None:
    """QEMU's tool asks the file below a format without snapshots, and opens both once more."""
    warn_of_guess(node)
    if not node.can_snapshot:
        warn_of_guess(node)


COMMAND = Command(
    "snapshot",
    "List, create, apply or delete the snapshots inside of an image",
    operands="FILENAME",
    flags=(
        flags.HELP,
        flags.QUIET,
        *flags.IMAGE,
        flags.SHARE,
        Flag("l", "list", help="list the snapshots (the default)"),
        Flag("a", "apply", "SNAPSHOT", "go back to a snapshot, by its id or else its name"),
        Flag("c", "create", "SNAPSHOT", "keep the present content under this name"),
        Flag("d", "delete", "SNAPSHOT", "remove the first snapshot of this name"),
        flags.OBJECT,
    ),
    run=run,
)
