"""`diskwright-img`: the commands of qemu-img, word for word."""

from __future__ import annotations

from diskwright.cli.run import Tool, main_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS = "diskwright.cli.commands."

COMMANDS = {
    name: f"{_COMMANDS}{name}:COMMAND"
    for name in (
        "bench",
        "check",
        "commit",
        "compare",
        "convert",
        "create",
        "dd",
        "info",
        "map",
        "measure",
        "rebase",
        "resize",
        "snapshot",
    )
}

TOOL = Tool("diskwright-img", "Disk image utility", commands=COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return main_of(TOOL, argv)


if __name__ == "__main__":
    import sys

    sys.exit(main())
