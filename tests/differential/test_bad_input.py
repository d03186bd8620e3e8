"""Bad images and bad surroundings, at the level of commands.

Whatever the image: QEMU's exit code, one clear line, bounded time and memory, the file as it
was. Whatever happens around it (a full disk, a folder that takes nothing, a backing file that
is gone): one line, and a consistent image or none.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.differential import bad_images, programs
from tests.differential.programs import Program, Result
from tests.differential.zygote import Zygote

#: Bytes of address space that a command may take beside what Python has, whatever an image says.
MEMORY = 768 << 20
SECONDS = 60


@pytest.fixture(scope="module")
def bounded(real, tmp_path_factory) -> Iterator[Program]:
    """The command under test in processes that can take no more than `MEMORY`."""
    tool = os.environ.get("DISKWRIGHT_TEST_TOOL")
    if tool:
        yield real["qemu-img"] if tool == "real" else programs.under_test(real, None)
        return
    started = Zygote(tmp_path_factory.mktemp("bounded"), programs.environment())
    try:
        status = Path(f"/proc/{started.process.pid}/status").read_text()
        (size,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmSize"))
        limit = int(size) * 1024 + MEMORY
        resource.prlimit(started.process.pid, resource.RLIMIT_AS, (limit, limit))
        yield programs.under_test(real, started)
    finally:
        started.close()


def own_lines(result: Result) -> list[str]:
    """What standard error says, but for the warning about images without a named format.

    That an image was marked corrupt is a line beside the error, too.
    """
    lines = [line for line in result.err.splitlines() if line.strip()]
    beside = (
        "WARNING: Image format",
        "      ",
        "qcow2: Marking image as corrupt",
        "qcow2: Image is",
    )
    return [line for line in lines if not line.startswith(beside)]


@pytest.fixture(scope="module")
def valid(real, tmp_path_factory) -> dict[str, bytes]:
    return bad_images.make_valid(tmp_path_factory.mktemp("valid"), real)


READERS = {
    "info": ["info", "-f", "FORMAT", "IMAGE"],
    "check": ["check", "-f", "FORMAT", "IMAGE"],
    "map": ["map", "-f", "FORMAT", "IMAGE"],
    "convert": ["convert", "-f", "FORMAT", "-O", "raw", "IMAGE", "out.raw"],
}
WRITERS = {
    "resize": ["resize", "-f", "FORMAT", "IMAGE", "+1M"],
    "snapshot": ["snapshot", "-c", "one", "IMAGE"],
    "repair": ["check", "-r", "all", "-f", "FORMAT", "IMAGE"],
}


#: Where our exit code is not QEMU's, and why: image and command -> our code.
DIFFERENT = {
    # QEMU reads zeroes where the map names a block that the disk does not have.
    ("vdi with a block beyond the end", "map"): 1,
    ("vdi with a block beyond the end", "convert"): 1,
    # QEMU dies there of an assertion.
    ("qcow2 with an L1 entry that is a flag only", "snapshot"): 0,
    # What is behind the L1 entries in use would become the disk's: refused, not used.
    ("qcow2 with an L1 of 32 MiB", "resize"): 1,
    ("qcow2 whose data is its refcount block", "snapshot"): 1,
    # QEMU gives up rebuilding the refcounts.
    ("qcow2 cut after its header", "repair"): 2,
    ("qcow2 with 65536 snapshots", "repair"): 2,
    ("qcow2 with 2^31 snapshots", "repair"): 0,
    ("qcow2 whose L1 is its refcount table", "repair"): 2,
    ("qcow2 whose refcount block is unaligned", "repair"): 0,
}


class Tried:
    """One command on a fresh copy of a bad image: what it said, whether the file was changed."""

    def __init__(self, program: Program, bad, valid, folder: Path, template: list[str]) -> None:
        folder.mkdir(exist_ok=True)
        image = folder / "image"
        before = bad_images.make(image, bad, valid)
        words = [{"FORMAT": bad.format, "IMAGE": "image"}.get(word, word) for word in template]
        self.result = program.run(*words, cwd=folder, timeout=SECONDS)
        self.changed = image.read_bytes() != before


def compared(bad, valid, pair, folder: Path, commands: dict[str, list[str]]) -> list[str]:
    """Run commands with both programs; how they differ."""
    trouble = []
    for name, template in commands.items():
        wanted = Tried(pair[0], bad, valid, folder / "real", template)
        got = Tried(pair[1], bad, valid, folder / "ours", template)
        code = DIFFERENT.get((bad.name, name), wanted.result.code)
        words = f"\n  ours: {got.result.err[-400:]!r}\n  QEMU: {wanted.result.err[-400:]!r}"
        if got.result.code != code:
            trouble.append(f"{name}: exit {got.result.code}, not {code}{words}")
        if "Traceback" in got.result.err + got.result.out:
            trouble.append(f"{name}: a trace{words}")
        lines = own_lines(got.result)
        listed = name in ("check", "repair")  # they list what they find
        if (
            got.result.code == 1
            and not listed
            and not 1 <= len(lines) <= max(1, len(own_lines(wanted.result)))
        ):
            trouble.append(f"{name}: {len(lines)} lines{words}")
        if got.changed and not wanted.changed:
            trouble.append(f"{name}: changed the file{words}")
    return trouble


@pytest.mark.parametrize("bad", bad_images.ALL, ids=str)
def test_a_bad_image_is_refused_or_read_as_qemu_does(bad, valid, real, bounded, tmp_path):
    trouble = compared(bad, valid, (real["qemu-img"], bounded), tmp_path, READERS)
    assert not trouble, "\n".join(trouble)


@pytest.mark.parametrize("bad", bad_images.ALL, ids=str)
def test_a_bad_image_is_written_to_where_qemu_writes_to_it(bad, valid, real, bounded, tmp_path):
    trouble = compared(bad, valid, (real["qemu-img"], bounded), tmp_path, WRITERS)
    assert not trouble, "\n".join(trouble)
