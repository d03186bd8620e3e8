"""What Tab does in qemu-io at a terminal, and in ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diskwright.cli.io import COMMANDS
from tests.differential.programs import Program
from tests.unit.test_io_terminal import Terminal

pytestmark = pytest.mark.peer

#: What moves the cursor or clears.
_CONTROLS = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x07")


def _typed(program: Program, keys: str, lists: bool, folder: Path) -> tuple[list[str], str]:
    """(the names that were offered, what the line did) when these keys were typed."""
    terminal = Terminal("-f", "qcow2", "a.qcow2", cwd=folder, program=program.prefix)
    terminal.wait_for(b"qemu-io> ")
    terminal.type(keys.encode() + b"\n")
    terminal.wait_for(b"\r\nqemu-io> ", 2 if lists else 1)
    lines = _CONTROLS.sub(b"", terminal.seen).decode().split("\r\n")
    terminal.type(b"quit\n")
    terminal.close()
    rows = [line.split() for line in lines]
    offered = [name for row in rows if row and {*row} <= {*COMMANDS} for name in row]
    silent = lines[-2].startswith("qemu-io> ")  # that line is what was typed
    return sorted(offered), "" if silent else lines[-2]


@pytest.mark.parametrize(
    ("keys", "lists"),
    [
        ("le\t", False),
        ("f\t", False),
        ("inf\t", False),
        ("length\t", False),
        ("wr\t", True),
        ("write\t", True),
        ("zone_re\t", True),
        ("aio\tfl\t", True),
        ("a\t", True),
        ("\t", True),
        ("zzz\t", False),
        ("length a\t", False),
        ("help le\t", False),
    ],
)
def test_tab_completes_the_name_of_a_command(
    keys: str, lists: bool, real, io, tmp_path: Path
) -> None:
    pytest.importorskip("readline")
    done = real["qemu-img"].run("create", "-q", "-f", "qcow2", "a.qcow2", "1M", cwd=tmp_path)
    assert done.code == 0, done
    theirs, mine = (_typed(each, keys, lists, tmp_path) for each in (real["qemu-io"], io))
    assert mine == theirs
    assert bool(mine[0]) == lists


def test_the_end_of_input_ends_the_line(real, io, tmp_path: Path) -> None:
    said = []
    for program in (real["qemu-io"], io):
        terminal = Terminal(cwd=tmp_path, program=program.prefix)
        terminal.wait_for(b"qemu-io> ")
        terminal.type(b"\x04")
        terminal.wait_for(b"\r\n")
        terminal.close()
        said.append(_CONTROLS.sub(b"", terminal.seen))
    assert said[0] == said[1] == b"qemu-io> \r\n"
