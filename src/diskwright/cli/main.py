"""`diskwright`: the same commands, careful with strangers' images, and `inspect`."""

from __future__ import annotations

from diskwright.cli.img import COMMANDS
from diskwright.cli.run import Tool, main_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

TOOL = Tool(
    "diskwright",
    "Disk images and virtual disks",
    commands={**COMMANDS, "inspect": "diskwright.cli.commands.inspect:COMMAND"},
    friendly=True,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return main_of(TOOL, argv)


if __name__ == "__main__":
    import sys

    sys.exit(main())
