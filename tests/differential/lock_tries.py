"""What a second program tries on an image that is held, each in one line of a table."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.differential.lock_holders import (
    BACKING,
    COMMIT,
    HOLD_IMAGE,
    MACHINE,
    RESIZE,
    RO,
    RW,
    SNAPSHOT,
    Place,
    U,
)
from tests.differential.programs import Program, Result

_QCOW2 = ("qcow2",)
_BOTH = ("raw", "qcow2")


@dataclass(frozen=True)
class Try:
    """One attempt: by which program, in which mode, how."""

    program: str
    mode: str
    name: str
    words: str
    formats: tuple[str, ...] = _BOTH


#: For qemu-img and for ours.
COMMANDS = (
    (RO, "info", "info -f {F} {x}", _BOTH),
    (RO, "map", "map -f {F} {x}", _BOTH),
    (RO, "check", "check -f {F} {x}", _QCOW2),
    (RO, "convert from", "convert -f {F} -O raw {x} out.raw", _BOTH),
    (RO, "compare", "compare -f {F} -F raw {x} plain.raw", _BOTH),
    (RO, "measure", "measure -f {F} -O qcow2 {x}", _BOTH),
    (RO, "dd from", "dd -f {F} if={x} of=out.raw count=1", _BOTH),
    (RO, "bench", "bench -c 1 -f {F} {x}", _BOTH),
    (RW, "bench -w", "bench -w -c 1 -f {F} {x}", _BOTH),
    (RW, "convert to", "convert -n -f raw -O {F} small.raw {x}", _BOTH),
    (RW, "check -r", "check -r all -f {F} {x}", _QCOW2),
    (RW, "rebase -u", "rebase -u -f qcow2 -b under.raw -F raw {x}", _QCOW2),
    (RW, "commit top", "commit -f qcow2 {x}", _QCOW2),
    (U, "info -U", "info -U -f {F} {x}", _BOTH),
    (U, "map -U", "map -U -f {F} {x}", _BOTH),
    (U, "compare -U", "compare -U -f {F} -F raw {x} small.raw", _BOTH),
    (U, "measure -U", "measure -U -f {F} -O qcow2 {x}", _BOTH),
    (U, "dd -U", "dd -U -f {F} if={x} of=out.raw count=1", _BOTH),
    (RESIZE, "dd to", "dd -f raw -O {F} if=small.raw of={x}", _BOTH),
    (RESIZE, "resize", "resize -f {F} {x} +64k", _BOTH),
    (RESIZE, "shrink", "resize -f {F} --shrink {x} 1M", _BOTH),
    (RESIZE, "create", "create -q -f {F} {x} 1M", _BOTH),
    (BACKING, "map overlay", "map -f qcow2 over.qcow2", _BOTH),
    (BACKING, "create -b", "create -q -f qcow2 -b {x} -F {F} new.qcow2", _BOTH),
    (BACKING, "rebase to", "rebase -f qcow2 -b {x} -F {F} alone.qcow2", _BOTH),
    (COMMIT, "commit base", "commit -f qcow2 over.qcow2", _BOTH),
    (SNAPSHOT, "snapshot -l", "snapshot -l {x}", _QCOW2),
    (SNAPSHOT, "snapshot -l -U", "snapshot -U -l {x}", _QCOW2),
    (SNAPSHOT, "snapshot -c", "snapshot -c new {x}", _QCOW2),
    (SNAPSHOT, "snapshot -a", "snapshot -a s0 {x}", _QCOW2),
    (SNAPSHOT, "snapshot -d", "snapshot -d s0 {x}", _QCOW2),
)
_DRIVE = "if=none,id=d,format={F},file={x}"
_OVERLAY = "if=none,id=d,format=qcow2,file=over.qcow2"

PEER_TRIES = (
    *(Try("qemu-img", mode, name, words, formats) for mode, name, words, formats in COMMANDS),
    Try("qemu-io", RO, "-r", "read|-r -f {F} {x}"),
    Try("qemu-io", RW, "rw", "write|-f {F} {x}"),
    Try("qemu-io", U, "-r -U", "read|-r -U -f {F} {x}"),
    Try("qemu-io", U, "-U", "read|-U -f {F} {x}"),
    Try("qemu-io", RESIZE, "truncate", "truncate|-f {F} {x}"),
    Try("qemu-io", BACKING, "overlay", "write|-f qcow2 over.qcow2"),
    Try("qemu-io", SNAPSHOT, "-s", "write|-s -f {F} {x}"),
    Try("qemu-nbd", RO, "-r", "-r -f {F} {x}"),
    Try("qemu-nbd", RW, "rw", "-f {F} {x}"),
    Try(
        "qemu-nbd",
        U,
        "force-share",
        "-r --image-opts driver={F},file.filename={x},force-share=on,read-only=on",
    ),
    Try("qemu-nbd", BACKING, "overlay", "-f qcow2 over.qcow2"),
    Try("qemu-nbd", SNAPSHOT, "-s", "-s -f {F} {x}"),
    Try("qemu-nbd", SNAPSHOT, "-l", "-l snapshot.name=s0 -f {F} {x}", _QCOW2),
    Try("qemu-system", RO, "readonly", f"|{_DRIVE},readonly=on"),
    Try("qemu-system", RW, "rw", f"|{_DRIVE}"),
    Try("qemu-system", RW, "share-rw", f"|{_DRIVE}|share-rw=on"),
    Try("qemu-system", U, "force-share", f"|{_DRIVE},readonly=on,force-share=on"),
    Try("qemu-system", RESIZE, "block_resize", f"block_resize d 2M|{_DRIVE}|share-rw=on"),
    Try("qemu-system", BACKING, "overlay", f"|{_OVERLAY}"),
    Try("qemu-system", COMMIT, "commit", f"commit d|{_OVERLAY}"),
    Try("qemu-system", SNAPSHOT, "snapshot=on", f"|{_DRIVE},snapshot=on"),
    Try("qemu-system", SNAPSHOT, "savevm", f"savevm v|{_DRIVE}", _QCOW2),
)
_LIBRARY = (
    Try("library", RO, "open", "ro {F} {x}"),
    Try("library", RW, "open rw", "rw {F} {x}"),
    Try("library", U, "open force_share", "u {F} {x}"),
    Try("library", BACKING, "open overlay", "rw qcow2 over.qcow2"),
)
OUR_TRIES = (
    *(Try("ours", mode, name, words, formats) for mode, name, words, formats in COMMANDS),
    *_LIBRARY,
)
#: Whose answer ours has to be.
LIKE = {
    ("library", "open"): ("qemu-io", "-r"),
    ("library", "open rw"): ("qemu-system", "rw"),
    ("library", "open force_share"): ("qemu-io", "-r -U"),
    ("library", "open overlay"): ("qemu-system", "overlay"),
}
_IO = {"read": "read 0 512", "write": "write -P 7 0 512", "truncate": "truncate 5M"}
_LOCK = re.compile(r'Failed to get (shared )?"([a-z ]+)" lock')
_ERROR = re.compile(r"\b[Ee]rror\b")
_counter = itertools.count()


class Tries:
    """Carries out tries in one place, and puts the files back afterwards."""

    def __init__(self, programs: dict[str, Program], place: Place, *, zygote: object) -> None:
        self.programs = programs
        self.place = place
        self.zygote = zygote

    def __call__(self, attempt: Try) -> Result:
        """Try once."""
        self.place.names["refresh"]()
        result = getattr(self, "_" + attempt.program.replace("-", "_"))(attempt.words)
        self.place.names["refresh"]()
        return result

    def _run(self, name: str, words: list[str], stdin: str = "") -> Result:
        return self.programs[name].run(*words, cwd=self.place.folder, stdin=stdin, timeout=30)

    def _qemu_img(self, template: str) -> Result:
        return self._run("qemu-img", self.place.words(template))

    def _ours(self, template: str) -> Result:
        return self._run("ours", self.place.words(template))

    def _qemu_io(self, template: str) -> Result:
        command, _, words = template.partition("|")
        return self._run("qemu-io", ["-c", _IO[command], *self.place.words(words)])

    def _qemu_nbd(self, template: str) -> Result:
        number = next(_counter)
        pid_file = self.place.folder / f"try{number}.pid"
        address = self.place.folder / f"try{number}.sock"
        words = ["--fork", f"--pid-file={pid_file}", "-k", str(address)]
        result = self._run("qemu-nbd", [*words, *self.place.words(template)])
        if result.code == 0:
            _end(int(pid_file.read_text()))
        address.unlink(missing_ok=True)
        return result

    def _qemu_system(self, template: str) -> Result:
        command, drive, *device = template.split("|")
        extra = "," + device[0] if device else ""
        words = [*MACHINE, "-drive", *self.place.words(drive)]
        words += ["-device", f"virtio-blk-pci,drive=d{extra}"]
        lines: list[dict[str, object]] = [{"execute": "qmp_capabilities"}]
        if command:
            arguments = {"command-line": command}
            lines.append({"execute": "human-monitor-command", "arguments": arguments})
        lines.append({"execute": "quit"})
        stdin = "".join(json.dumps(line) + "\n" for line in lines)
        result = self._run("qemu-system-x86_64", words, stdin)
        said = [json.loads(line).get("return") for line in result.out.splitlines()]
        return Result(result.code, "\n".join(word for word in said if word), result.err)

    def _library(self, template: str) -> Result:
        words = [str(HOLD_IMAGE), *self.place.words(template)]
        if self.zygote is None:
            program = Program("python", [sys.executable])
            return program.run(*words, cwd=self.place.folder)
        code, out, err = self.zygote.run(words, self.place.folder, 30, b"")
        return Result(code, out.decode(), err.decode())


def _end(pid: int) -> None:
    """End a server that forked away, and wait until its locks are gone."""
    os.kill(pid, signal.SIGKILL)  # right after its start it overlooks a SIGTERM
    while Path(f"/proc/{pid}/fd").exists():
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.001)


def verdict(result: Result) -> str:
    """A cell: `free`, or the lock that was refused, or the last words of another error."""
    text = f"{result.err}\n{result.out}"
    found = _LOCK.search(text)
    if found:
        return f"{'not ' if found[1] else ''}{found[2]}"
    if (result.code == 0 and not _ERROR.search(result.out)) or "Content mismatch" in text:
        return "free"
    return "error: " + (text.strip().splitlines() or ["?"])[-1][-60:]
