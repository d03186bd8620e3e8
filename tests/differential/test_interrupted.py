"""Signals in the middle of every command: a consistent image or none, and a message.

The moments are shares of the time that the command takes when it is left alone, counted from
when it opened its first file: they lie in its work and not in the start of Python. Commands
that have work for many seconds must heed a signal at its beginning, at once.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.differential.programs import Program, Result, ended, under_test
from tests.differential.test_bad_surroundings import sound

MIB = 1 << 20
SIZE = 24 * MIB

#: What an image is cut to.
SHORTER = 12 << 20

#: What a shell sees of a command that ended because of SIGINT.
INTERRUPTED = 130

#: A command that is slow by itself is told to end so long after it began, and must have ended
#: so long after that.
WORKS_S = 0.6
HEEDS_S = 5.0


def keeps(folder: Path, qemu_img: Program, name: str, raw: str = "raw") -> None:
    """The image shows what `raw` holds."""
    words = ["compare", "-q", "-f", "raw", "-F", "qcow2", raw, name]
    done = qemu_img.run(*words, cwd=folder)
    assert done.code == 0, done


def keeps_snapshots(folder: Path, qemu_img: Program, name: str, raw: str = "raw") -> None:
    """The image shows what `raw` holds, and every snapshot in its list can be read."""
    keeps(folder, qemu_img, name, raw)
    listed = qemu_img.run("snapshot", "-l", name, cwd=folder).out.splitlines()[2:]
    for line in listed:
        words = ["convert", "-l", line.split()[1], "-O", "raw", name, "out"]
        done = qemu_img.run(*words, cwd=folder)
        assert done.code == 0, done


def keeps_or_cuts(folder: Path, qemu_img: Program, name: str) -> None:
    """The image shows what `raw` holds, or as much of it as its new size has room for."""
    size = json.loads(qemu_img.run("info", "--output=json", name, cwd=folder).out)["virtual-size"]
    assert size in (SIZE, SHORTER)
    shutil.copy(folder / "raw", folder / "cut")
    os.truncate(folder / "cut", size)
    keeps_snapshots(folder, qemu_img, name, "cut")


def keeps_size(folder: Path, qemu_img: Program, name: str) -> None:
    """The file is as long as it was."""
    assert (folder / name).stat().st_size == SIZE


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


def _run_until(
    program: Program, case: Case, folder: Path, when: tuple[int, float], patience: float = 60
) -> Result:
    """Run the command; send it a signal (number, seconds after it opened its first file)."""
    number, seconds = when
    with ended(program.start(*_words(case.line), cwd=folder)) as process:
        stop = time.monotonic() + 60
        while not _has_begun(process.pid, folder) and process.poll() is None:
            assert time.monotonic() < stop, "the command does not begin"
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(number)
        out, err = process.communicate(timeout=patience)
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


def slowly(name: str, requests_a_second: int = 20) -> str:
    """An image whose file takes its time for each request."""
    return (
        "--image-opts driver=qcow2,file.driver=throttle,"
        f"file.limits.iops-total={requests_a_second},file.file.driver=file,"
        f"file.file.filename={name}"
    )


#: Each of these has work for ten seconds at least, most of them for minutes.
LONG = [
    Case(f"check {slowly('many')}", "many", holds=keeps_snapshots),
    Case(f"check -r all {slowly('leaking')}", "leaking"),
    Case(f"map {slowly('many')}", "many", holds=keeps_snapshots),
    Case(f"map --output=json {slowly('many')}", "many", holds=keeps_snapshots),
    Case(f"compare {slowly('many', 10)} {slowly('many', 10)}"),
    Case(f"compare -s {slowly('many', 10)} {slowly('many', 10)}"),
    Case(f"compare {slowly('many', 10)} driver=raw,file.filename=raw"),
    Case(f"convert -O qcow2 {slowly('many', 10)} new", "new", new=True),
    Case(f"convert -S 0 -O qcow2 {slowly('many', 10)} new", "new", new=True),
    Case(f"snapshot -c one {slowly('many', 10)}", "many", holds=keeps_snapshots),
    Case(f"snapshot -d old {slowly('many', 10)}", "many", holds=keeps_snapshots),
    Case(f"snapshot -a old {slowly('many', 10)}", "many", holds=keeps_snapshots),
    Case("create -f qcow2 -o preallocation=metadata,cluster_size=512 new 2G", "new", new=True),
    Case("create -q -f raw -o preallocation=full new 16G", "new", "raw", new=True),
    Case("create -q -f qcow2 -o preallocation=full new 16G", "new", new=True),
    Case("create -q -f vdi -o preallocation=full,static=on new 16G", "new", "vdi", new=True),
    Case("create -q -f vpc -o preallocation=full,subformat=fixed new 16G", "new", "vpc", new=True),
    Case(
        f"resize --preallocation=metadata {slowly('many', 10)} 256M", "many", holds=keeps_snapshots
    ),
    Case("resize --preallocation=metadata many 8G", "many", holds=keeps_snapshots),
    Case("resize --preallocation=falloc many 8G", "many", holds=keeps_snapshots),
    Case("resize --preallocation=full full 16G", "full"),
    Case("resize --preallocation=full -f raw raw 16G", "raw", "raw", holds=keeps_size),
    Case(f"resize --shrink {slowly('many', 10)} {SHORTER}", "many", holds=keeps_or_cuts),
    Case(f"rebase -b '' {slowly('overlay', 2)}", "overlay"),
    Case(f"commit {slowly('overlay', 2)}", "overlay"),
]

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
            got = _run_until(self.tool, case, place, (number, work * share))
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


@pytest.mark.parametrize("case", LONG, ids=str)
def test_a_long_command_heeds_sigint(case, pristine, real, spawned, tmp_path):
    _heeds(signal.SIGINT, case, (real["qemu-img"], spawned), pristine, tmp_path)


@pytest.mark.parametrize("case", LONG[::6], ids=str)
def test_a_long_command_heeds_sigterm(case, pristine, real, spawned, tmp_path):
    _heeds(signal.SIGTERM, case, (real["qemu-img"], spawned), pristine, tmp_path)


def _heeds(
    number: int, case: Case, programs: tuple[Program, Program], pristine: Path, tmp_path: Path
) -> None:
    """The command ends soon, says why, and leaves all as if it had not begun."""
    qemu_img, tool = programs
    place = tmp_path / "place"
    _furnish(pristine, place)
    got = _run_until(tool, case, place, (number, WORKS_S), HEEDS_S)
    assert got.code == 128 + number, got
    assert got.err.splitlines()[-1].endswith(" was interrupted"), got
    assert "Traceback" not in got.err, got
    if case.new:
        assert not (place / case.image).exists()
    _hold(case, place, qemu_img, got)


def _startup(program: Program, folder: Path) -> float:
    """How long it takes to begin with work, about."""
    began = time.monotonic()
    assert program.run("--version", cwd=folder).code == 0
    return time.monotonic() - began


def _ignoring(number: int) -> list[str]:
    """What runs a command line in which a signal is ignored from its beginning on."""
    code = f"import os, signal, sys\nsignal.signal({number}, signal.SIG_IGN)\n"
    return [sys.executable, "-c", code + "os.execv(sys.argv[1], sys.argv[1:])"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_that_the_caller_ignores_stays_ignored(number, pristine, real, spawned, tmp_path):
    _furnish(pristine, tmp_path / "place")
    for tool in (real["qemu-img"], spawned):
        prefix = [*_ignoring(number), shutil.which(tool.prefix[0]), *tool.prefix[1:]]
        case = Case(f"convert -r 24M -f raw -O raw raw {tool.name}.new")
        got = _run_until(Program(tool.name, prefix), case, tmp_path / "place", (number, 0.3))
        assert (got.code, got.err) == (0, ""), got
        made = (tmp_path / "place" / f"{tool.name}.new").read_bytes()
        assert made == (pristine / "raw").read_bytes()


#: Options and a name: QEMU's tools want the limits in an object of their own.
_SLOWLY = "--object throttle-group,id=slow,x-iops-total=8 --image-opts"
_SLOW_RAW = "driver=raw,file.driver=throttle,file.throttle-group=slow,file.file.filename=raw"
_FAST_RAW = "driver=raw,file.filename=raw"

#: Each of these takes seconds.
LOOKED_AT = [
    ("convert -r 12M -f raw -O raw raw new", True),
    ("convert -p -r 12M -f raw -O raw raw new", False),
    (f"compare {_SLOWLY} {_SLOW_RAW} {_FAST_RAW}", True),
    (f"compare -p {_SLOWLY} {_SLOW_RAW} {_FAST_RAW}", False),
    (f"dd {_SLOWLY} bs=1M count=12 if={_SLOW_RAW} of=new", False),
]


@pytest.mark.parametrize(("line", "tells"), LOOKED_AT, ids=[line for line, _ in LOOKED_AT])
def test_sigusr1_asks_for_a_look_and_ends_nothing(line, tells, pristine, real, spawned, tmp_path):
    for tool in (real["qemu-img"], spawned):
        _furnish(pristine, tmp_path / tool.name)
        got = _run_until(tool, Case(line), tmp_path / tool.name, (signal.SIGUSR1, 0.4))
        assert got.code == 0, got
        assert bool(re.fullmatch(r" {4}\(\d+\.\d\d/100%\)\n", got.err)) == tells, got
        assert tells or not got.err


def test_two_signals_at_once_are_one(pristine, spawned, tmp_path):
    _furnish(pristine, tmp_path / "place")
    line = "convert -r 4M -f raw -O raw raw new"
    with ended(spawned.start(*line.split(), cwd=tmp_path / "place")) as process:
        while not (tmp_path / "place" / "new").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(0.3)
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (INTERRUPTED, 128 + signal.SIGTERM), err
    assert err == b"diskwright-img: convert was interrupted\n"
    assert not (tmp_path / "place" / "new").exists()
