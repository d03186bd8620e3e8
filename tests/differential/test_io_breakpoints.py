"""Requests beside each other, stopped and let go through blkdebug, as qemu-io does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.io_pairs import IoPair

pytestmark = pytest.mark.peer

SCRIPTS = {
    "stopped": (
        "break write_aio A",
        "aio_write -P 1 0 64k",
        "wait_break A",
        "length",
        "resume A",
        "aio_flush",
        "read -P 1 0 64k",
    ),
    "others_pass": (
        "write -q -P 7 128k 64k",
        "break write_aio A",
        "aio_write -P 1 0 64k",
        "wait_break A",
        "read -P 7 128k 64k",
        "write -P 2 128k 64k",
        "aio_read -P 2 128k 64k",
        "sleep 100",
        "resume A",
        "aio_flush",
    ),
    "two": (
        "write -q 0 1M",
        "break write_aio A",
        "aio_write -P 1 0 64k",
        "wait_break A",
        "break write_aio B",
        "aio_write -P 2 128k 64k",
        "wait_break B",
        "resume B",
        "sleep 100",
        "resume A",
        "aio_flush",
    ),
    "unknown": (
        "resume A",
        "remove_break A",
        "break nothing A",
        "break write_aio A",
        "break write_aio B",
        "remove_break B",
        "remove_break B",
        "remove_break A",
        "write 0 64k",
    ),
    "removed_in_time": ("break read_aio A", "remove_break A", "read 0 64k", "write 0 64k"),
    "removed_too_late": (
        "break write_aio A",
        "aio_write -P 1 0 64k",
        "wait_break A",
        "remove_break A",
        "resume A",
        "aio_flush",
        "read -P 1 0 64k",
    ),
    "two_at_one": (
        "write -q 0 1M",
        "break write_aio A",
        "aio_write -P 1 0 64k",
        "wait_break A",
        "break write_aio A",
        "aio_write -P 2 128k 64k",
        "sleep 200",
        "resume A",
        "sleep 200",
        "resume A",
        "aio_flush",
        "resume A",
    ),
    "several_of_one_event": (
        "break write_aio A",
        "break write_aio B",
        "break write_aio B",
        "aio_write -P 1 0 64k",
        "wait_break A",
        "resume A",
        "wait_break B",
        "resume B",
        "sleep 100",
        "length",
        "resume B",
        "aio_flush",
        "write 0 64k",
    ),
    "reads": (
        "write -q -P 3 0 64k",
        "break read_aio A",
        "aio_read -P 3 0 64k",
        "wait_break A",
        "write -P 4 64k 64k",
        "resume A",
        "aio_flush",
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_breakpoints(script: str, real, io, tmp_path: Path) -> None:
    IoPair(real, io, tmp_path, "blkdebug").agree(*SCRIPTS[script])


def test_lines_of_standard_input(real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path)
    pair.opened = ["-f", "raw", "blkdebug::i"]
    pair.agree(stdin="\n".join(SCRIPTS["stopped"]) + "\n")


RULES = {
    "write once": '[inject-error]\nevent = "write_aio"\nonce = "on"\nerrno = "28"\n',
    "read once": '[inject-error]\nevent = "read_aio"\nerrno = "5"\nonce = "on"\n',
    "sector": '[inject-error]\nevent = "none"\niotype = "read"\nsector = "8"\n',
    "zeroes": '[inject-error]\nevent = "none"\niotype = "write-zeroes"\n',
    "discard": '[inject-error]\nevent = "none"\niotype = "discard"\n',
}
#: What a qcow2 driver reads and zeroes for itself is its own choice.
RAW_ALONE = ("sector", "zeroes")


@pytest.mark.parametrize(
    ("rules", "image"),
    [(name, image) for name in RULES for image in ("raw", "qcow2") if name not in RAW_ALONE]
    + [(name, "raw") for name in RAW_ALONE],
)
def test_injected_errors(rules: str, image: str, real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path, image)
    pair.opened = ["-f", image, "blkdebug:rules:i"]
    for folder in pair.folders:
        (folder / "rules").write_text(RULES[rules])
    pair.agree(
        "write -P 1 64k 64k",
        "write -P 1 64k 64k",
        "read -P 1 64k 64k",
        "read 0 64k",
        "writev 128k 512",
        "readv 128k 512",
        "aio_write 192k 512",
        "aio_flush",
        "aio_read 0 8k",
        "aio_flush",
        "write -z 1M 64k",
        "discard 2M 64k",
        "length",
    )


#: Two requests in one unit of 4 KiB each time, which have to wait for each other.
PADDED = ("head", "after_head", "tail", "after_tail")


@pytest.mark.parametrize("event", PADDED)
def test_padded_requests_wait_for_each_other(event: str, real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path)
    pair.opened = []
    pair.agree(
        "open -o driver=raw,file.align=4k blkdebug::i",
        f"break pwritev_rmw_{event} A",
        "aio_write -P 10 0x1200 0x200",
        "wait_break A",
        "aio_write -P 11 0x1400 0x200",
        "sleep 100",
        "resume A",
        "aio_flush",
        "read -P 10 0x1200 0x200",
        "read -P 11 0x1400 0x200",
        "read -P 0 0x1600 0x200",
    )


def test_who_waits_holds_nobody_up(real, io, tmp_path: Path) -> None:
    """The third request meets only the second one, which waits for the first."""
    pair = IoPair(real, io, tmp_path)
    pair.opened = []
    pair.agree(
        "open -o driver=raw,file.align=4k blkdebug::i",
        "break pwritev_rmw_after_tail A",
        "aio_write -P 10 0xa000 0x200",
        "wait_break A",
        "aio_write -P 11 0xa800 0x1000",
        "break pwritev_rmw_after_head B",
        "aio_write -P 10 0xbe00 0x200",
        "wait_break B",
        "resume A",
        "sleep 100",
        "resume B",
        "aio_flush",
        "read -P 10 0xa000 0x200",
        "read -P 11 0xa800 0x1000",
        "read -P 10 0xbe00 0x200",
    )
