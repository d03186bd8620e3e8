"""The lock matrix: every pair of modes, with QEMU's four programs, in both directions.

What has to come out is not written here: in each test the real programs try among themselves.

- A peer holds, we try: our command's answer must be qemu-img's, our library's that of the real
  program that uses the image in the same way.
- We hold, a peer tries: the answer must be the one that the peer gets where a real program
  does the holding.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from tests.differential import lock_holders, lock_tries
from tests.differential.lock_holders import (
    MODES,
    NO_SUCH_MODE,
    OUR_HOLDERS,
    REAL_HOLDERS,
    Holder,
    Place,
)
from tests.differential.lock_tries import LIKE, OUR_TRIES, PEER_TRIES, Tries, verdict
from tests.differential.programs import Program, Result, without_program_name

pytestmark = pytest.mark.peer

FORMATS = ("raw", "qcow2")
SIZE = 4 << 20
SCATTERED = 4096  # sectors
PEERS = ("qemu-img", "qemu-io", "qemu-nbd", "qemu-system")
REAL_BY_ID = {holder.id: holder for holder in REAL_HOLDERS}

#: (direction, format) -> (row's program, mode) -> column -> cells; filled as tests run.
_cells: dict = defaultdict(lambda: defaultdict(dict))


def _standing_in() -> bool:
    return os.environ.get("DISKWRIGHT_TEST_TOOL") == "real"


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that each holder's folder starts from."""
    folder = tmp_path_factory.mktemp("pristine")
    block = os.urandom(1 << 20)
    for name in ("under.raw", "other.raw", "plain.raw", "x.raw"):
        with open(folder / name, "wb") as file:
            for index in range(SIZE >> 20):
                file.write(name.encode() + bytes([index]) + block[len(name) + 1 :])
    (folder / "small.raw").write_bytes(bytes(65536))
    for line in (
        "create -q -f qcow2 -o cluster_size=1k -b under.raw -F raw x.qcow2",
        "snapshot -c s0 x.qcow2",
        "create -q -f qcow2 alone.qcow2 4M",
    ):
        _good(real["qemu-img"].run(*line.split(), cwd=folder))
    _write(real, folder, "x.qcow2", 3)
    for image_format in FORMATS:
        for name in ("held", "over"):
            if name == "held":
                _scatter(real, folder, image_format)
            else:
                line = f"create -q -f qcow2 -b x.{image_format} -F {image_format} over.qcow2"
                _good(real["qemu-img"].run(*line.split(), cwd=folder))
                _write(real, folder, "over.qcow2", 3)
            (folder / f"{name}.qcow2").rename(folder / f"{name}-{image_format}")
    return folder


def _write(real: dict[str, Program], folder: Path, name: str, mib: int) -> None:
    _good(real["qemu-io"].run("-f", "qcow2", "-c", f"write -q -P 9 0 {mib}M", name, cwd=folder))


def _scatter(real: dict[str, Program], folder: Path, image_format: str) -> None:
    """Every other sector, so that a commit takes its time."""
    stripes = folder / "stripes.raw"
    with open(stripes, "wb") as file:
        for index in range(SCATTERED):
            file.write((b"%8d" % index) * 64 if index % 2 else bytes(512))
    words = ["-q", "-f", "raw", "-O", "qcow2", "-S", "512", "-o", "cluster_size=512"]
    words += ["-B", f"x.{image_format}", "-F", image_format, "stripes.raw", "held.qcow2"]
    _good(real["qemu-img"].run("convert", *words, cwd=folder))


def _good(result: Result) -> Result:
    assert result.code == 0, result
    return result


class Folder:
    """One holder's folder, and how its files are put back between tries."""

    OTHERS = ("plain.raw", "small.raw", "other.raw", "alone.qcow2")

    def __init__(self, pristine: Path, folder: Path, image_format: str) -> None:
        self.pristine = pristine
        self.place = Place(folder, image_format)
        self.place.names |= {"fresh": self.fresh, "refresh": self.refresh}
        self.marks: dict[str, tuple[int, int, int]] = {}
        folder.mkdir()
        self.fresh()

    def _source(self, name: str) -> Path:
        if name in ("held.qcow2", "over.qcow2"):
            name = f"{name.partition('.')[0]}-{self.place.format}"
        return self.pristine / name

    def fresh(self) -> None:
        """All files as they were; nobody holds any of them."""
        held = ("held.qcow2", "under.raw", self.place.x)
        for name in (*self.OTHERS, "over.qcow2", *held):
            if self._mark(name) != self.marks.get(name, ()):
                shutil.copyfile(self._source(name), self.place.folder / name)
                self.marks[name] = self._mark(name)

    def refresh(self) -> None:
        """Put back what a try changed: in place what may be held, anew what is not."""
        for name in (self.place.x, "under.raw", *self.OTHERS, "over.qcow2"):
            path = self.place.folder / name
            if self._mark(name) != self.marks[name]:
                if name in (self.place.x, "under.raw"):
                    path.write_bytes(self._source(name).read_bytes())
                else:
                    path.unlink(missing_ok=True)
                    shutil.copyfile(self._source(name), path)
                self.marks[name] = self._mark(name)

    def settled(self) -> None:
        """The holder holds; what it changed so far is how the files are from here on."""
        for name in self.marks:
            self.marks[name] = self._mark(name)

    def _mark(self, name: str) -> tuple[int, int, int] | None:
        try:
            status = (self.place.folder / name).stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


def _tries_of(program: str, image_format: str, tries: tuple) -> list:
    return [t for t in tries if t.program == program and image_format in t.formats]


def _params(holders: tuple[Holder, ...]) -> list:
    return [
        pytest.param(holder, image_format, id=f"{image_format}-{holder.id}".replace(" ", "_"))
        for image_format in FORMATS
        for holder in holders
        if image_format in holder.formats
    ]


@pytest.mark.parametrize(("holder", "image_format"), _params(REAL_HOLDERS))
def test_peer_holds(
    holder: Holder, image_format: str, real, ours, zygote, pristine: Path, tmp_path: Path
) -> None:
    """A real program holds the image: our tries are answered as the real ones' are."""
    folder = Folder(pristine, tmp_path / "f", image_format)
    programs = {**real, "ours": ours}
    wrong = []
    with holder.hold(programs, folder.place) as process:
        folder.settled()
        attempt = Tries(programs, folder.place, zygote=zygote)
        peers = {(t.program, t.name): t for t in PEER_TRIES}
        for ours_try in OUR_TRIES:
            if image_format not in ours_try.formats:
                continue
            if _standing_in() and ours_try.program == "library":
                continue
            like = LIKE.get((ours_try.program, ours_try.name), ("qemu-img", ours_try.name))
            expected = attempt(peers[like])
            got = attempt(ours_try)
            _cells["they hold", image_format][holder.program, holder.mode][
                ours_try.mode, f"{holder.name} > {ours_try.name}"
            ] = verdict(got)
            if verdict(got) != verdict(expected):
                wrong.append(f"{ours_try.name}: {verdict(got)}, real: {verdict(expected)}")
            elif not _standing_in():
                wrong += _wrong_words(ours_try, expected, got, process.pid)
        assert process.poll() is None
    assert not wrong, "\n".join(wrong)


def _wrong_words(ours_try: lock_tries.Try, expected: Result, got: Result, pid: int) -> list[str]:
    """What is wrong in the words of our refusal; they are QEMU's, then the holder's."""
    if verdict(got) == "free":
        return []
    if ours_try.program == "library":
        text = got.out
        sentence = [line for line in expected.err.splitlines() if "Is another process" in line]
        if not all(line in text for line in sentence) or str(pid) not in text:
            return [f"{ours_try.name}: {text!r} has not {sentence} and {pid}"]
        return []
    theirs, said = without_program_name(expected.err), without_program_name(got.err)
    if "Is another process" not in theirs:
        return [] if theirs == said else [f"{ours_try.name}: {said!r}, real: {theirs!r}"]
    rest = said.removeprefix(theirs.rstrip("\n"))
    command = Path(f"/proc/{pid}/comm").read_text().strip()
    if rest == said or str(pid) not in rest or command not in rest:
        words = f"{theirs!r} and the holder ({pid}, {command})"
        return [f"{ours_try.name}: {said!r} is not {words}"]
    return [] if got.code == expected.code else [f"{ours_try.name}: exit {got.code}"]


@pytest.mark.parametrize(("holder", "image_format"), _params(OUR_HOLDERS))
def test_we_hold(
    holder: Holder, image_format: str, real, ours, zygote, pristine: Path, tmp_path: Path
) -> None:
    """We hold the image: the real programs are answered as when a real one holds it."""
    programs = {**real, "ours": ours}
    if _standing_in() and "open" in holder.name:
        holder = REAL_BY_ID[holder.like]
    answers = []
    for number, one in enumerate((REAL_BY_ID[holder.like or holder.id], holder)):
        folder = Folder(pristine, tmp_path / str(number), image_format)
        with one.hold(programs, folder.place) as process:
            folder.settled()
            held = sorted(lock_holders.lock_bytes(folder.place.image))
            attempt = Tries(programs, folder.place, zygote=zygote)
            seen = {"lock bytes": str(held)}
            for peer_try in PEER_TRIES:
                if image_format in peer_try.formats:
                    seen[f"{peer_try.program}: {peer_try.name}"] = verdict(attempt(peer_try))
                    _cells["we hold", image_format][peer_try.program, holder.mode][
                        peer_try.mode, f"{holder.name} > {peer_try.name}"
                    ] = seen[f"{peer_try.program}: {peer_try.name}"]
            assert process.poll() is None
        answers.append(seen)
    expected, got = answers
    wrong = [
        f"{name}: {got[name]}, with the real holder: {word}"
        for name, word in expected.items()
        if got[name] != word
    ]
    assert not wrong, "\n".join(wrong)


def test_matrix_is_full(table) -> None:
    """Every pair of modes, program, direction and format has a cell; the tables are printed."""
    if not _cells:
        pytest.skip("the other tests of this file did not run in this process")
    lines, empty = [], []
    for (direction, image_format), rows in sorted(_cells.items()):
        lines.append(f"Locks, {image_format}, {direction}. Rows: program and mode that holds")
        lines.append(" " * 28 + "".join(f"{'x ' + mode:18}" for mode in MODES))
        for program in PEERS:
            for mode in MODES:
                row = rows.get((program, mode), {})
                cells = [
                    _cell(row, tried) or _no_cell(direction, program, mode, tried, image_format)
                    for tried in MODES
                ]
                lines.append(f"{program:12}{mode:16}" + "".join(f"{c or '?':18}" for c in cells))
                where = f"{direction} {image_format} {program} {mode}"
                empty += [f"{where} x {t}" for t, c in zip(MODES, cells, strict=True) if not c]
    lines.append(LEGEND)
    table("\n".join(lines))
    assert not empty, "\n".join(empty)


LEGEND = (
    "ok: opened. Else the lock refused: w write, r resize; !w, !r: the second party would not "
    "share it; x: refused without naming a lock.\n"
    "Several where ways of holding or trying in one mode differ. -: "
    + "; ".join(f"{program}, {mode}: {why}" for (program, mode), why in NO_SUCH_MODE.items())
    + "; raw has no snapshots"
)
_SHORT = {"free": "ok", "write": "w", "not write": "!w", "resize": "r", "not resize": "!r"}


def _cell(row: dict, tried: str) -> str:
    answers = [_SHORT.get(answer, "x") for (mode, _), answer in row.items() if mode == tried]
    return "/".join(sorted(set(answers)))


def _no_cell(direction: str, program: str, mode: str, tried: str, image_format: str) -> str:
    """`-` where there is nothing to try or to hold in this mode, for a reason in LEGEND."""
    if image_format == "raw" and lock_holders.SNAPSHOT in (mode, tried):
        return "-"
    return "-" if (program, mode if direction == "they hold" else tried) in NO_SUCH_MODE else ""
