"""blkdebug: rules, states, breakpoints, limits; the scenarios run through qemu-io as well."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from diskwright.block.permission import CONSISTENT_READ, WRITE
from diskwright.drivers.filters.blkdebug.driver import Blkdebug
from diskwright.errors import (
    DiskwrightError,
    IOFailure,
    NoSpaceError,
    NotFoundError,
    OptionError,
)

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def opened(path: Path, **options: Any) -> Node:
    """raw over blkdebug over the file."""
    below: dict[str, object] = {"driver": "file", "filename": str(path)}
    debug: dict[str, object] = {"driver": "blkdebug", "image": below, **options}
    return open_image(Opener(read_only=False), {"driver": "raw", "file": debug})


def debugged(node: Node) -> Blkdebug:
    found = node.children["file"].node
    assert isinstance(found, Blkdebug)
    return found


def outcome(node: Node, word: str) -> str:
    """Either "ok" or the error's sentence of one request, spelt as for qemu-io."""
    verb, *numbers = word.split()
    offset, length = (int(number) for number in numbers)
    try:
        if verb == "read":
            node.read(offset, length)
        elif verb == "write":
            node.write(offset, b"\xcd" * length)
        elif verb == "zero":
            node.write_zeroes(offset, length)
        else:
            node.discard(offset, length)
    except IOFailure as error:
        return str(error)
    return "ok"


EIO, ENOSPC = "Input/output error", "No space left on device"

# (configuration, [(request, outcome)])
SCENARIOS: list[tuple[str, list[tuple[str, str]]]] = [
    (
        '[inject-error]\nevent = "none"\n',
        [
            ("discard 0 65536", EIO),
            ("zero 0 65536", EIO),
            ("read 0 512", EIO),
            ("write 0 512", EIO),
        ],
    ),
    (
        '[inject-error]\nevent = "none"\nonce = "on"\n',
        [("read 0 512", EIO), ("read 0 512", "ok")],
    ),
    (
        '[inject-error]\nevent = "read_aio"\nsector = "1"\n',
        [("read 0 512", "ok"), ("read 512 512", EIO), ("read 0 2048", EIO), ("write 512 512", EIO)],
    ),
    (
        '[inject-error]\nevent = "read_aio"\nonce = "on"\n',
        [("write 0 512", "ok"), ("read 512 512", EIO), ("read 0 2048", "ok")],
    ),
    (
        '[inject-error]\nevent = "write_aio"\niotype = "read"\n',
        [("read 0 512", "ok"), ("write 512 512", "ok"), ("read 0 512", EIO), ("write 0 512", "ok")],
    ),
    (
        '[inject-error]\nevent = "none"\niotype = "discard"\n',
        [("zero 0 4096", "ok"), ("discard 0 4096", EIO), ("read 0 2048", "ok")],
    ),
    (
        '[inject-error]\nevent = "none"\niotype = "write-zeroes"\n',
        [("zero 0 4096", EIO), ("discard 0 4096", "ok"), ("write 0 2048", "ok")],
    ),
    (
        '[set-state]\nevent = "write_aio"\nnew_state = "2"\n'
        '[inject-error]\nevent = "write_aio"\nstate = "2"\nerrno = "28"\n',
        [("write 0 512", "ok"), ("write 0 512", ENOSPC), ("read 0 512", ENOSPC)],
    ),
    (
        '[set-state]\nevent = "write_aio"\nstate = "1"\nnew_state = "2"\n'
        '[set-state]\nevent = "write_aio"\nstate = "2"\nnew_state = "3"\n'
        '[inject-error]\nevent = "write_aio"\nstate = "3"\nerrno = "28"\n',
        [("write 0 512", "ok"), ("write 0 512", "ok"), ("write 0 512", ENOSPC)],
    ),
    (
        '[inject-error]\nevent = "write_aio"\nerrno = "28"\nonce = "on"\n'
        '[inject-error]\nevent = "read_aio"\nerrno = "5"\n',
        [("write 0 512", ENOSPC), ("write 0 512", "ok"), ("read 0 512", EIO), ("write 0 512", EIO)],
    ),
    (
        '[inject-error]\nevent = "pwritev_zero"\n',
        [("read 0 512", "ok"), ("write 0 512", "ok"), ("zero 0 4096", EIO)],
    ),
    (
        '[inject-error]\nevent = "pwritev_done"\n',
        [("write 0 512", "ok"), ("write 0 512", EIO)],
    ),
    (
        '[inject-error]\nevent = "read_aio"\nerrno = "28"\nsector = "0"\n'
        '# both at once\n[inject-error]\nevent = "read_aio"\nerrno = "5"\n',
        [("read 0 512", ENOSPC), ("read 1024 512", EIO)],
    ),
    ('[inject-error]\nevent = "read_aio"\nerrno = "0"\n', [("read 0 512", "ok")]),
]


@pytest.mark.parametrize(("config", "steps"), SCENARIOS)
def test_scenarios(image: Path, tmp_path: Path, config: str, steps: list[tuple[str, str]]) -> None:
    (tmp_path / "rules").write_text(config)
    with opened(image, config=str(tmp_path / "rules")) as node:
        assert [outcome(node, request) for request, _ in steps] == [wanted for _, wanted in steps]
        debugged(node).rules._active = []  # so that closing can flush
        debugged(node).rules._rules = []


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")
@pytest.mark.parametrize(("config", "steps"), SCENARIOS)
def test_qemu_does_the_same(
    image: Path, tmp_path: Path, config: str, steps: list[tuple[str, str]]
) -> None:
    (tmp_path / "rules").write_text(config)
    words: list[str] = []
    for request, _ in steps:
        words += ["-c", request.replace("zero", "write -z")]
    name = f"blkdebug:{tmp_path / 'rules'}:{image}"
    result = subprocess.run(
        ["qemu-io", "-f", "raw", *words, name], capture_output=True, text=True, check=False
    )
    found = [
        line.partition("failed: ")[2] if "failed" in line else "ok"
        for line in result.stdout.splitlines()
        if "failed" in line or " bytes at offset " in line
    ]
    assert found == [wanted for _, wanted in steps]


def test_errors_have_their_class_and_leave_the_bytes(image: Path) -> None:
    rule = {"event": "write_aio", "errno": 28, "immediately": True}
    with opened(image, **{"inject-error": [rule]}) as node:
        with pytest.raises(NoSpaceError) as caught:
            node.write(0, b"x" * 512)
        assert caught.value.errno == 28
        debugged(node).rules._active = []
        assert node.read(0, 512) == bytes(512)


def test_rules_by_dotted_words(image: Path) -> None:
    dotted = {"inject-error": {"0": {"event": "read_aio"}}}
    with opened(image, **dotted) as node:
        assert outcome(node, "read 0 512") == EIO
        debugged(node).rules._active = []


def test_flush_and_block_status(image: Path) -> None:
    rules = [
        {"event": "none", "iotype": "flush", "once": True},
        {"event": "none", "iotype": "block-status", "once": True},
    ]
    with opened(image, **{"inject-error": rules}) as node:
        node.write(0, b"x")
        with pytest.raises(IOFailure):
            debugged(node).flush()
        with pytest.raises(IOFailure):
            list(node.extents(0, MIB))
        assert sum(extent.length for extent in node.extents(0, MIB)) == MIB


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[inject-error]\nevent = "bogus"\n', "invalid parameter value: bogus"),
        ('[inject-error]\nerrno = "5"\n', "Missing event name for rule"),
        ('[bad]\nerrno = "5"\n', "There is no option group 'bad'"),
        ("[inject-error]\ngarbage\n", "Invalid parameter 'garbage'"),
        ('event = "read_aio"\n', "no group defined"),
        (
            '[inject-error]\nevent = "read_aio"\nerrno = "x28"\n',
            "Parameter 'errno' expects a number",
        ),
        (
            '[inject-error]\nevent = "read_aio"\nonce = "maybe"\n',
            "Parameter 'once' expects 'on' or 'off'",
        ),
        ('[set-state]\nevent = "read_aio"\nerrno = "5"\n', "Invalid parameter 'errno'"),
    ],
)
def test_bad_files_in_qemus_words(image: Path, tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "rules").write_text(text)
    with pytest.raises(OptionError) as caught:
        opened(image, config=str(tmp_path / "rules"))
    assert caught.value.qemu_message == sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"align": 3}, "Cannot meet constraints with align 3"),
        ({"align": 512, "max-transfer": 100}, "Cannot meet constraints with max-transfer 100"),
        ({"align": 512, "opt-discard": 100}, "Cannot meet constraints with opt-discard 100"),
        ({"inject-error": [{"event": "bogus"}]}, "invalid parameter value: bogus"),
        (
            {"inject-error": [{"event": "read_aio", "foo": 1}]},
            "[inject-error] section doesn't support the option 'foo'",
        ),
        ({"image": None}, 'A block device must be specified for "image"'),
        ({"config": "/nosuch/rules"}, None),
    ],
)
def test_bad_options_in_qemus_words(
    image: Path, options: dict[str, Any], sentence: str | None
) -> None:
    with pytest.raises((OptionError, NotFoundError)) as caught:
        opened(image, **options)
    wanted = sentence or "Could not read blkdebug config file: No such file or directory"
    assert caught.value.qemu_message == wanted


def test_names(image: Path) -> None:
    opener = Opener(read_only=True)
    with open_image(opener, f"blkdebug::{image}", format="raw") as node:
        assert node.filename == f"blkdebug::{image}"
        assert node.read(0, 4) == bytes(4)
    with pytest.raises(OptionError, match="requires both config file and image path"):
        open_image(opener, "blkdebug:only", format="raw")


def test_limits_are_kept(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "align": 4096,
        "max-transfer": 8192,
        "opt-write-zero": 4096,
        "max-write-zero": 16384,
        "max-discard": 65536,
    }
    with opened(image, **options) as node:
        debug = debugged(node)
        seen: list[tuple[str, int, int]] = []
        real = debug.rules.error_for

        def watch(io_type: str, offset: int, length: int) -> int:
            seen.append((io_type, offset, length))
            return real(io_type, offset, length)

        monkeypatch.setattr(debug.rules, "error_for", watch)
        node.write(100, b"x" * 20000)
        node.write_zeroes(0, 65536)
        node.discard(0, 131072)
        assert node.read(0, 5) == bytes(5)
    for io_type, offset, length in seen:
        if io_type in ("read", "write"):
            assert offset % 4096 == length % 4096 == 0
            assert length <= 8192
        elif io_type == "write-zeroes":
            assert length <= 16384
    assert ("discard", 65536, 65536) in seen


def test_nobody_goes_around_it(image: Path) -> None:
    with opened(image) as node:
        assert node._fd == -1
        assert node._lend() is None
        for extent in node.resolve(0, MIB):
            assert extent.child is None or extent.child.node is debugged(node)


def test_permissions_can_be_bent(image: Path) -> None:
    options = {"take-child-perms": ["write"], "unshare-child-perms": ["write", "resize"]}
    with opened(image, **options) as node:
        edge = debugged(node).below
        assert edge.used & WRITE
        assert not edge.shared & WRITE
        assert edge.shared & CONSISTENT_READ
    with pytest.raises(OptionError):
        opened(image, **{"take-child-perms": ["fly"]})


def test_delay(image: Path) -> None:
    rule = {"event": "read_aio", "milliseconds": 60, "state": 1}
    with opened(image, delay=[rule]) as node:
        started = time.monotonic()
        node.read(0, 512)
        assert time.monotonic() - started >= 0.05


# ------------------------------------------------------------------------- breakpoints


def _write_in_thread(node: Node) -> tuple[threading.Thread, threading.Event]:
    done = threading.Event()

    def write() -> None:
        node.write(0, b"late" * 128)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    return thread, done


def test_a_breakpoint_stops_one_request(image: Path) -> None:
    lines: list[str] = []
    with opened(image) as node:
        debug = debugged(node)
        debug.watch_breakpoints(lines.append)
        debug.breakpoint("write_aio", "A")
        thread, done = _write_in_thread(node)
        debug.wait_breakpoint("A")
        assert debug.is_suspended("A")
        assert not done.is_set()
        assert node.read(0, 4) == bytes(4)  # others pass
        node.write(4096, b"x")
        with pytest.raises(NotFoundError) as caught:
            debug.resume("B")
        assert caught.value.qemu_message == "Could not resume request: No such file or directory"
        debug.resume("A")
        thread.join(10)
        assert done.is_set()
        assert not debug.is_suspended("A")
        assert node.read(0, 4) == b"late"
    assert lines == ["blkdebug: Suspended request 'A'", "blkdebug: Resuming request 'A'"]


def test_removing_a_breakpoint_resumes(image: Path) -> None:
    with opened(image) as node:
        debug = debugged(node)
        debug.breakpoint("write_aio", "A")
        thread, done = _write_in_thread(node)
        debug.wait_breakpoint("A")
        with pytest.raises(NotFoundError):  # it is gone as soon as it has stopped somebody
            debug.remove_breakpoint("A")
        thread.join(10)
        assert done.is_set()
        debug.breakpoint("write_aio", "C")
        debug.remove_breakpoint("C")
        node.write(0, b"x")
        with pytest.raises(NotFoundError) as caught:
            debug.breakpoint("bogus", "A")
        assert caught.value.qemu_message == "Could not set breakpoint: No such file or directory"


@pytest.mark.parametrize(
    "option", [{"config": 42}, {"align": "x"}, {"align": 512, "max-discard": 1000}]
)
def test_options_that_cannot_be_leave_nothing_open(image: Path, option: dict[str, object]) -> None:
    with pytest.raises(DiskwrightError):
        opened(image, **option)


@pytest.mark.parametrize("event", ["cluster_alloc", "l2_alloc_write", "cluster_alloc_space"])
def test_a_request_that_fails_after_it_took_space_keeps_nothing(tmp_path, event):
    path = tmp_path / "i"
    diskwright.create(path, "4M", format="qcow2")
    below = {"driver": "file", "filename": str(path)}
    rule = {"event": event, "once": True}
    debugged = {"driver": "blkdebug", "image": below, "inject-error": [rule]}
    options = {"driver": "qcow2", "file": debugged}
    with diskwright.open(options, read_only=False) as node:
        with pytest.raises(IOFailure):
            node.write(0, b"\1" * 512)
        slices = [one for table in node.cache.tables for one in table.slices.values()]
        assert not any(one.pins for one in slices)
        node.write(0, b"\1" * 512)
        [extent] = node.resolve(0, 512)
        places = {extent.host_offset, *(entry & ~(1 << 63) for entry in node.l1)}
    assert max(places) < path.stat().st_size
    assert diskwright.check(path).clean
