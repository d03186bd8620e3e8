"""Processes that hold an image in one mode, for as long as a test wants.

QEMU's servers and machines just wait. A command that does its work and ends (convert, commit,
resize ...) is stopped with SIGSTOP as soon as the kernel shows the locks of its working phase;
where it was too quick, it is started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.differential.programs import Program, ended

RO, RW, U, RESIZE, BACKING, COMMIT, SNAPSHOT = (
    "read-only",
    "read-write",
    "force-share",
    "resize",
    "backing in use",
    "commit",
    "snapshot",
)
MODES = (RO, RW, U, RESIZE, BACKING, COMMIT, SNAPSHOT)

#: Lock bytes: 100 + permission held, 200 + permission not shared.
READING = frozenset({100})
WRITING = frozenset({101})

HOLD_IMAGE = Path(__file__).with_name("hold_image.py")
START_S = 20.0
ATTEMPTS = 60
LOOK_S = 0.0001
#: How long after the first sight of the locks a command is stopped; shorter where it is over then.
SETTLE_S = (0.05, 0.005, 0.001, 0)

#: A disk of 4 MiB whose every request takes hours, so that what uses it does not end.
SLOW = (
    'json:{"driver":"raw","file":{"driver":"null-co","size":4194304,"latency-ns":10000000000000}}'
)


class NotHeldError(Exception):
    """The holder ended, or never came to the point."""


@dataclass
class Place:
    """The folder of one holder, with the image `x` in one format."""

    folder: Path
    format: str
    names: dict[str, str] = field(default_factory=dict)

    @property
    def image(self) -> Path:
        """The image that is held."""
        return self.folder / self.x

    @property
    def x(self) -> str:
        """Its name in the folder."""
        return f"x.{self.format}"

    def words(self, template: str) -> list[str]:
        """A command line from its template."""
        return [word.format(x=self.x, F=self.format, slow=SLOW) for word in template.split()]


def lock_bytes(path: Path) -> frozenset[int]:
    """The bytes of the file that anybody holds a lock on."""
    status = path.stat()
    mark = f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        if mark in line:
            first, last = line.split()[-2:]
            found.update(range(int(first), int(last) + 1 if last != "EOF" else int(first) + 1))
    return frozenset(found)


# ------------------------------------------------------------------------- ways of holding


@contextlib.contextmanager
def waiting_io(io: Program, place: Place, words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """qemu-io with its input open; it has answered a command, so the image is open."""
    with ended(io.start(*words, cwd=place.folder)) as process:
        process.stdin.write(b"read 0 512\n")
        process.stdin.flush()
        _expect(process, b"read 512/512")
        yield process


@contextlib.contextmanager
def waiting_nbd(nbd: Program, place: Place, words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """qemu-nbd that has greeted a client."""
    address = place.folder / "holder.sock"
    with ended(nbd.start("-t", "-k", str(address), *words, cwd=place.folder)) as process:
        stop = time.monotonic() + START_S
        while time.monotonic() < stop and process.poll() is None:
            try:
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(address))
                    if client.recv(8) == b"NBDMAGIC":
                        break
            except OSError:
                time.sleep(0.005)
        else:
            raise NotHeldError(_words(process))
        yield process
    address.unlink(missing_ok=True)


MACHINE = "-S -nodefaults -display none -machine pc -m 16 -qmp stdio".split()


@contextlib.contextmanager
def waiting_machine(
    machine: Program, place: Place, words: list[str], *commands: dict[str, object]
) -> Iterator[subprocess.Popen[bytes]]:
    """A paused machine that has answered its monitor, and carried out `commands`."""
    with ended(machine.start(*MACHINE, *words, cwd=place.folder)) as process:
        for command in ({"execute": "qmp_capabilities"}, *commands):
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
            _expect(process, b'{"return"')
        yield process


@contextlib.contextmanager
def library(place: Place, mode: str, name: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A Python program that has the image open with diskwright.open."""
    words = [mode, "qcow2" if name else place.format, name or place.x]
    python = Program("python", [sys.executable, str(HOLD_IMAGE)])
    with ended(python.start(*words, cwd=place.folder)) as process:
        _expect(process, b"ready")
        yield process


@contextlib.contextmanager
def stopped(
    program: Program, place: Place, words: list[str], until: frozenset[int]
) -> Iterator[subprocess.Popen[bytes]]:
    """A command stopped while the image has at least the lock bytes `until`."""
    for attempt in range(ATTEMPTS):
        place.names["fresh"]()
        devnull = subprocess.DEVNULL
        with ended(
            program.start(*words, cwd=place.folder, stdin=devnull, stdout=devnull, stderr=devnull)
        ) as process:
            with _before(process):
                held = _stop_when(process, place.image, until, SETTLE_S[attempt // 3 % 4])
            if held:
                yield process
                return
    raise NotHeldError(f"{words} was never seen with the lock bytes {sorted(until)}")


@contextlib.contextmanager
def _before(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Run on the process's processor, and first whenever we want to, where we may.

    Then it gets no further between two looks at its locks than the time between them.
    """
    processors = os.sched_getaffinity(0)
    one = {max(processors)}
    try:
        os.sched_setaffinity(0, one)
        os.sched_setaffinity(process.pid, one)
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, processors)


def _stop_when(
    process: subprocess.Popen[bytes], image: Path, until: frozenset[int], settle_s: float
) -> bool:
    give_up = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < give_up:
        if image.exists() and until <= lock_bytes(image):
            time.sleep(settle_s)
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.001)
            return process.poll() is None and until <= lock_bytes(image)
        time.sleep(LOOK_S)
    return False


def _expect(process: subprocess.Popen[bytes], mark: bytes) -> None:
    seen = b""
    stop = time.monotonic() + START_S
    descriptor = process.stdout.fileno()
    while mark not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(0, stop - time.monotonic()))
        piece = os.read(descriptor, 65536) if ready else b""
        if not piece:
            raise NotHeldError(seen.decode() + _words(process))
        seen += piece


def _words(process: subprocess.Popen[bytes]) -> str:
    if process.poll() is None:
        return "(no answer in time)"
    return (process.stderr.read() or b"").decode() if process.stderr else ""


# ------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Holder:
    """One row: who holds the image, how, and (for ours) the real one to compare with."""

    program: str
    mode: str
    name: str
    hold: Callable[[dict[str, Program], Place], contextlib.AbstractContextManager]
    formats: tuple[str, ...] = ("raw", "qcow2")
    like: str = ""

    @property
    def id(self) -> str:
        """A word for test names."""
        return f"{self.program}:{self.name}"


def _io(template: str) -> Callable:
    return lambda programs, place: waiting_io(programs["qemu-io"], place, place.words(template))


def _nbd(template: str) -> Callable:
    return lambda programs, place: waiting_nbd(programs["qemu-nbd"], place, place.words(template))


def _machine(template: str) -> Callable:
    return lambda programs, place: waiting_machine(
        programs["qemu-system-x86_64"], place, place.words(template)
    )


def _command(program: str, template: str, until: frozenset[int]) -> Callable:
    return lambda programs, place: stopped(programs[program], place, place.words(template), until)


_DRIVE = "-device virtio-blk-pci,drive=d -drive if=none,id=d,format={F},file={x}"
_OVERLAY = "-device virtio-blk-pci,drive=d -drive if=none,id=d,format=qcow2,file=held.qcow2"


def _slow_commit(programs: dict[str, Program], place: Place) -> contextlib.AbstractContextManager:
    """A machine that commits an overlay into the image, one byte a second."""
    arguments = {"device": "d", "job-id": "j", "speed": 1, "base": place.x}
    words = place.words(_OVERLAY)
    command = {"execute": "block-commit", "arguments": arguments}
    return waiting_machine(programs["qemu-system-x86_64"], place, words, command)


#: Commands that both qemu-img and ours can be stopped in: (mode, name, command, bytes, formats).
COMMANDS = (
    (RO, "convert from", "convert -n -f {F} -O raw {x} {slow}", READING, ()),
    (RW, "convert to", "convert -n -f raw -O {F} {slow} {x}", WRITING, ()),
    (RW, "rebase", "rebase -f qcow2 -b {slow} -F raw {x}", WRITING, ("qcow2",)),
    (U, "convert -U from", "convert -n -U -f {F} -O raw {x} {slow}", READING, ()),
    (RESIZE, "resize", "resize -f {F} --preallocation=full {x} +2G", WRITING, ()),
    (RESIZE, "create", "create -f {F} -o preallocation=full {x} 2G", WRITING, ("raw",)),
    (BACKING, "convert overlay", "convert -n -f qcow2 -O raw held.qcow2 {slow}", READING, ()),
    (COMMIT, "commit base", "commit -f qcow2 held.qcow2", WRITING | {203}, ()),
    (SNAPSHOT, "snapshot -c", "snapshot -c new {x}", WRITING, ("qcow2",)),
    (SNAPSHOT, "snapshot -a", "snapshot -a s0 {x}", WRITING, ("qcow2",)),
    (SNAPSHOT, "snapshot -d", "snapshot -d s0 {x}", WRITING, ("qcow2",)),
)
_BOTH = ("raw", "qcow2")
_SHARED = "driver={F},file.filename={x},force-share=on,read-only=on"

REAL_HOLDERS = (
    *(
        Holder("qemu-img", mode, name, _command("qemu-img", words, until), formats or _BOTH)
        for mode, name, words, until, formats in COMMANDS
    ),
    Holder("qemu-io", RO, "-r", _io("-r -f {F} {x}")),
    Holder("qemu-io", RW, "rw", _io("-f {F} {x}")),
    Holder("qemu-io", U, "-r -U", _io("-r -U -f {F} {x}")),
    Holder(
        "qemu-io",
        RESIZE,
        "truncate",
        lambda programs, place: stopped(
            programs["qemu-io"],
            place,
            ["-f", place.format, "-c", "truncate -m full 2G", place.x],
            WRITING,
        ),
    ),
    Holder("qemu-io", BACKING, "overlay", _io("-f qcow2 held.qcow2")),
    Holder("qemu-io", SNAPSHOT, "-s", _io("-s -f {F} {x}")),
    Holder("qemu-nbd", RO, "-r", _nbd("-r -f {F} {x}")),
    Holder("qemu-nbd", RW, "rw", _nbd("-f {F} {x}")),
    Holder("qemu-nbd", U, "force-share", _nbd(f"-r --image-opts {_SHARED}")),
    Holder("qemu-nbd", BACKING, "overlay", _nbd("-f qcow2 held.qcow2")),
    Holder("qemu-nbd", SNAPSHOT, "-s", _nbd("-s -f {F} {x}")),
    Holder("qemu-nbd", SNAPSHOT, "-l", _nbd("-l snapshot.name=s0 -f {F} {x}"), ("qcow2",)),
    Holder("qemu-system", RO, "readonly", _machine(_DRIVE + ",readonly=on")),
    Holder("qemu-system", RW, "rw", _machine(_DRIVE)),
    Holder(
        "qemu-system", RW, "share-rw", _machine(_DRIVE.replace("drive=d", "drive=d,share-rw=on", 1))
    ),
    Holder("qemu-system", U, "force-share", _machine(_DRIVE + ",readonly=on,force-share=on")),
    Holder("qemu-system", BACKING, "overlay", _machine(_OVERLAY)),
    Holder("qemu-system", COMMIT, "block-commit", _slow_commit),
    Holder("qemu-system", SNAPSHOT, "snapshot=on", _machine(_DRIVE + ",snapshot=on")),
)

OUR_HOLDERS = (
    *(
        Holder(
            "ours", mode, name, _command("ours", words, until), formats or _BOTH, f"qemu-img:{name}"
        )
        for mode, name, words, until, formats in COMMANDS
    ),
    Holder("ours", RO, "open", lambda _, p: library(p, "ro"), like="qemu-io:-r"),
    Holder("ours", RW, "open rw", lambda _, p: library(p, "rw"), like="qemu-system:rw"),
    Holder("ours", U, "open force_share", lambda _, p: library(p, "u"), like="qemu-io:-r -U"),
    Holder(
        "ours",
        BACKING,
        "open overlay",
        lambda _, p: library(p, "rw", "held.qcow2"),
        like="qemu-system:overlay",
    ),
)

#: Modes that a program has no way to hold or to try, with the reason; tables show it.
NO_SUCH_MODE = {
    ("qemu-io", COMMIT): "qemu-io has no commit",
    ("qemu-nbd", RESIZE): "a server never resizes",
    ("qemu-nbd", COMMIT): "a server never commits",
    ("qemu-system", RESIZE): "block_resize ends at once: tried, not held",
}
