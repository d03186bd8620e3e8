"""The programs, and which commands each has."""

from __future__ import annotations

from diskwright.cli.run import Tool

_COMMANDS = "diskwright.cli.commands."

_OF_QEMU = {
    name: f"{_COMMANDS}{name}:COMMAND"
    for name in (
        "amend",
        "bench",
        "bitmap",
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

#: The commands of qemu-img, word for word.
IMG = Tool("diskwright-img", "Disk image utility", commands=_OF_QEMU)

#: The same commands, careful with strangers' images, and our own.
FRIENDLY = Tool(
    "diskwright",
    "Disk images and virtual disks",
    commands={
        **_OF_QEMU,
        **{name: f"{_COMMANDS}{name}:COMMAND" for name in ("inspect", "nbdinfo", "serve")},
    },
    friendly=True,
)

TOOLS = {tool.name: tool for tool in (IMG, FRIENDLY)}
