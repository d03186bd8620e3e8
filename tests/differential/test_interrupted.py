"""SIGINT and SIGKILL in the middle of every command: a consistent image or none, and a message.

The moments are shares of the time that the command takes when it is left alone, counted from
when it opened its first file: they lie in its work and not in the start of Python.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.differential.programs import Program, Result, ended, under_test
from tests.differential.test_bad_surroundings import sound

MIB = 1 << 20
SIZE = 24 * MIB

#: What a shell sees of a command that ended because of SIGINT.
INTERRUPTED = 130


def keeps(folder: Path, qemu_img: Program, name: str) -> None:
    """The image shows what `raw` holds."""
    words = ["compare", "-q", "-f", "raw", "-F", "qcow2", "raw", name]
    done = qemu_img.run(*words, cwd=folder)
    assert done.code == 0, done


def keeps_snapshots(folder: Path, qemu_img: Program, name: str) -> None:
    """The image shows what `raw` holds, and every snapshot in its list can be read."""
    keeps(folder, qemu_img, name)
    listed = qemu_img.run("snapshot", "-l", name, cwd=folder).out.splitlines()[2:]
    for line in listed:
        words = ["convert", "-l", line.split()[1], "-O", "raw", name, "out"]
        done = qemu_img.run(*words, cwd=folder)
        assert done.code == 0, done


def anything(folder: Path, qemu_img: Program, name: str) -> None:
    """An image that is being made may show anything."""


class Case:
    """A command line, the image it changes or makes, and what must be true of that afterwards."""

    def __init__(
        self,
        line: str,
        image: str = "",
        format: str = "qcow2",
        *,
        holds: Callable[[Path, Program, str], None] = keeps,
        new: bool = False,
    ) -> None:
        self.line = line
        self.image = image
        self.format = format
        self.holds = anything if new else holds
        self.new = new

    def __str__(self) -> str:
        return self.line


CASES = [
    Case("convert -f raw -O qcow2 raw new", "new", new=True),
    Case("convert -c -f raw -O qcow2 raw new", "new", new=True),
    Case("convert -f raw -O vdi raw new", "new", "vdi", new=True),
    Case("convert -f raw -O vpc raw new", "new", "vpc", new=True),
    Case("convert -f qcow2 -O raw full new", "new", "raw", new=True),
    Case("create -q -f qcow2 -o preallocation=full new 256M", "new", new=True),
    Case("resize -q --preallocation=full full 280M", "full", holds=anything),
    Case("snapshot -c one many", "many", holds=keeps_snapshots),
    Case("snapshot -d old many", "many", holds=keeps_snapshots),
    Case("snapshot -a old many", "many", holds=keeps_snapshots),
    Case("commit overlay", "overlay"),
    Case("rebase -b '' overlay", "overlay"),
    Case("check -r all leaking", "leaking"),
    Case("check many"),
    Case("compare raw full"),
    Case("map many"),
    Case("info full"),
]


@pytest.fixture(scope="module")
def spawned(real) -> Program:
    """The command under test as a process of its own, which gets the signals."""
    return under_test(real, None)


@pytest.fixture(scope="module")
def pristine(real, tmp_path_factory) -> Path:
    """Images that keep commands busy for a while."""
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "raw").write_bytes(random.Random(7).randbytes(SIZE))
    for line in (
        "convert -f raw -O qcow2 raw full",
        "convert -f raw -O qcow2 -o cluster_size=512 raw many",
        "snapshot -c old many",
        "create -q -f qcow2 base 24M",
        "create -q -f qcow2 -b base -F qcow2 overlay",
        "convert -n -f raw -O qcow2 raw overlay",
        "convert -f raw -O qcow2 -o cluster_size=4096 raw leaking",
    ):
        done = real["qemu-img"].run(*line.split(), cwd=folder)
        assert done.code == 0, done
    _leak(folder / "leaking")
    return folder


def _leak(path: Path) -> None:
    """Clusters of ones behind the file's last cluster, which nothing names."""
    image = bytearray(path.read_bytes())
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    at = 0
    while image[block + 2 * at : block + 2 * at + 2] != b"\0\0" and at < 2047:
        at += 1
    for free in range(at, 2048):
        image[block + 2 * free : block + 2 * free + 2] = b"\0\1"
    path.write_bytes(image)


def _furnish(pristine: Path, folder: Path) -> None:
    folder.mkdir()
    for path in pristine.iterdir():
        shutil.copy(path, folder / path.name)


def _words(line: str) -> list[str]:
    return [word.strip("'") for word in line.split()]


def _has_begun(pid: int, folder: Path) -> bool:
    """Whether a process has opened something in the folder."""
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return True  # it has ended
    for number in numbers:
        try:
            if os.readlink(f"/proc/{pid}/fd/{number}").startswith(f"{folder}/"):
                return True
        except OSError:
            continue
    return False


def _run_until(program: Program, case: Case, folder: Path, number: int, seconds: float) -> Result:
    """Run the command and send it a signal `seconds` after it opened its first file."""
    with ended(program.start(*_words(case.line), cwd=folder)) as process:
        stop = time.monotonic() + 60
        while not _has_begun(process.pid, folder) and process.poll() is None:
            assert time.monotonic() < stop, "the command does not begin"
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return Result(process.returncode, out.decode(), err.decode())


def _hold(case: Case, folder: Path, qemu_img: Program, got: Result) -> None:
    """The image is consistent and holds what it must; nothing else was touched."""
    if case.image:
        trouble = sound(qemu_img, folder / case.image, case.format)
        if not (case.new and _is_none(qemu_img, folder / case.image, case.format)):
            assert not trouble, f"{trouble}\n{got}"
            case.holds(folder, qemu_img, case.image)
    if case.image != "full":
        keeps(folder, qemu_img, "full")


def _is_none(qemu_img: Program, path: Path, format: str) -> bool:
    """Whether a new image is not there, or is not one yet: nobody takes it for one."""
    if not path.exists():
        return True
    done = qemu_img.run("info", str(path), cwd=path.parent)
    return format != "raw" and f"file format: {format}" not in done.out


SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"]
)


class Interrupted:
    """One command that is ended at several moments, each time among fresh images."""

    def __init__(self, case: Case, programs: tuple[Program, Program], pristine: Path) -> None:
        self.case = case
        self.qemu_img, self.tool = programs
        self.pristine = pristine

    def end(self, number: int, folder: Path, shares: list[float]) -> None:
        """Run it alone, and then with a signal at each of these shares of that time."""
        case = self.case
        _furnish(self.pristine, folder / "alone")
        began = time.monotonic()
        done = self.tool.run(*_words(case.line), cwd=folder / "alone")
        work = max(time.monotonic() - began - _startup(self.tool, folder), 0)
        assert done.code in (0, 3), done
        shutil.rmtree(folder / "alone")
        for share in shares:
            place = folder / f"at{share}"
            _furnish(self.pristine, place)
            got = _run_until(self.tool, case, place, number, work * share)
            assert "Traceback" not in got.err, got
            assert got.code in (0, 3) or self._ended_by(number, got, done), got
            _hold(case, place, self.qemu_img, got)
            shutil.rmtree(place)

    def _ended_by(self, number: int, got: Result, done: Result) -> bool:
        if number == signal.SIGKILL:
            return got.code == -signal.SIGKILL
        if got.code == -signal.SIGINT:  # the command was done, and Python on its way out
            return got.out == done.out and not got.err
        lines = got.err.splitlines()
        return got.code == INTERRUPTED and len(lines) == 1 and "interrupted" in lines[0]


@SIGNALS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_command_is_ended_in_its_middle(case, number, pristine, real, spawned, rng, tmp_path):
    tried = Interrupted(case, (real["qemu-img"], spawned), pristine)
    tried.end(number, tmp_path, [round(rng.uniform(0.1, 0.9), 2)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@SIGNALS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_command_is_ended_at_many_moments(case, number, pristine, real, spawned, tmp_path):
    tried = Interrupted(case, (real["qemu-img"], spawned), pristine)
    tried.end(number, tmp_path, [share / 10 for share in range(11)])


def _startup(program: Program, folder: Path) -> float:
    """How long it takes to begin with work, about."""
    began = time.monotonic()
    assert program.run("--version", cwd=folder).code == 0
    return time.monotonic() - began
