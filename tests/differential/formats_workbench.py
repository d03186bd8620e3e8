"""Both sides at work on one image in turn: what one writes, the other reads and changes.

A *side* is QEMU (`real`) or ours. A *lineage* is a pair of sides and a folder: the first side
makes and fills images there, the second works on them (`by`: 0 the first, 1 the second). A
`Bench` runs each step in all four lineages, so the images of real-real are what is wanted:

- both sides must say the same, word for word, of one image (`View`): its content, `info`,
  `map`, `check`, `snapshot -l`;
- the images of all lineages must be alike in everything but what may differ between two images
  that are both right: where in the file a cluster lies, when it was made, what it occupies.

What fails prints the command lines that lead there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.differential.formats_pattern import Pattern
from tests.differential.img_pairs import difference, plain
from tests.differential.option_matrix import Combo
from tests.differential.programs import ForkedProgram, Program, Result

HERE = Path(__file__).resolve().parent


#: What the images of one test may need.
ROOM_BYTES = 256 << 20


@contextlib.contextmanager
def room(otherwise: Path) -> Iterator[Path]:
    """A folder for images: in memory where there is room, `otherwise` where there is none.

    On ext4 and others what `map` says depends on what has been read before (pages of an extent
    that was never written count as data once they are cached) and on how much of a file has
    been written out. In memory the same steps leave the same holes.

    DISKWRIGHT_TEST_ROOM names a folder to use instead; what was made stays there.
    """
    kept = os.environ.get("DISKWRIGHT_TEST_ROOM")
    if kept:
        yield Path(tempfile.mkdtemp(prefix=f"{otherwise.name}-", dir=kept))
        return
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK):
        space = os.statvfs(memory)
        if space.f_bavail * space.f_frsize >= ROOM_BYTES:
            with tempfile.TemporaryDirectory(prefix="diskwright-", dir=memory) as folder:
                yield Path(folder)
            return
    yield otherwise


class View(NamedTuple):
    """What one side says of one image."""

    map: str
    info: str
    check: str
    snapshots: str
    content: str

    def __str__(self) -> str:
        return "\n".join(f"--- {name}\n{value}" for name, value in self._asdict().items())


class Side:
    """QEMU: its programs, and how an image is looked at with them."""

    name = "real"

    def __init__(self, img: Program, io: Program) -> None:
        self.img = img
        self.io = io

    def batch(self, lines: list[list[str]], folder: Path) -> list[Result]:
        """Run command lines, `sha256 FORMAT NAME` among them."""
        return [
            self._sha256(folder, *words[1:])
            if words[0] == "sha256"
            else self.img.run(*words, cwd=folder)
            for words in lines
        ]

    def _sha256(self, folder: Path, format: str, name: str) -> Result:
        target = folder / "content.tmp"
        done = self.img.run("convert", "-f", format, "-O", "raw", name, target.name, cwd=folder)
        if done.code:
            return done
        with open(target, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256")
        target.unlink()
        return Result(0, found.hexdigest(), "")


class OurSide(Side):
    """Ours: command lines that only read share a process."""

    name = "ours"

    def __init__(self, img: Program, io: Program, reader: Program) -> None:
        super().__init__(img, io)
        self.reader = reader

    def batch(self, lines: list[list[str]], folder: Path) -> list[Result]:
        done = self.reader.run(cwd=folder, stdin=json.dumps(lines))
        assert done.code == 0, done
        return [Result(*answer) for answer in json.loads(done.out)]


def sides(real: dict[str, Program], ours: Program) -> tuple[Side, Side]:
    """The two sides; where qemu-img is the command under test, QEMU is both."""
    qemu = Side(real["qemu-img"], real["qemu-io"])
    if ours.prefix == qemu.img.prefix:
        return qemu, Side(qemu.img, qemu.io)
    scripts = [[sys.executable, str(HERE / f"formats_{name}.py")] for name in ("writer", "reader")]
    if isinstance(ours, ForkedProgram):
        writer, reader = (ForkedProgram(words[1], words, ours.zygote) for words in scripts)
    else:
        writer, reader = (Program(words[1], words) for words in scripts)
    return qemu, OurSide(ours, writer, reader)


class Lineage:
    """Two sides that work on the same images in turn, in a folder; see the module's text."""

    def __init__(self, first: Side, second: Side, folder: Path) -> None:
        self.sides = (first, second)
        self.name = f"{first.name}-{second.name}"
        self.folder = folder / self.name
        self.log: list[str] = []
        self.folder.mkdir()

    def run(self, words: list[str], *, by: int) -> Result:
        """Run an img command line."""
        return self._run(self.sides[by].img, words)

    def io(self, words: list[str], *, by: int) -> Result:
        """Run the writer of a side."""
        return self._run(self.sides[by].io, words)

    def _run(self, program: Program, words: list[str]) -> Result:
        self.log.append(shlex.join(program.argv(*words)))
        return program.run(*words, cwd=self.folder)

    def history(self) -> str:
        """The command lines so far, to be run in an empty folder."""
        return "\n".join([f"# lineage {self.name}, in {self.folder}", *self.log])


class Bench:
    """Lineages in a folder, and what is told to all of them.

    Args:
        both: the two sides, QEMU first.
        folder: an empty one.
        crossed: all four lineages; else only the two in which one side does it all.
    """

    def __init__(self, both: tuple[Side, Side], folder: Path, *, crossed: bool = True) -> None:
        qemu, ours = both
        self.both = both
        self.stamps = folder / "stamps"
        self.stamps.mkdir()
        couples = [(qemu, qemu), (qemu, ours), (ours, qemu), (ours, ours)]
        if not crossed:
            couples = [couples[0], couples[3]]
        if both[0].name == both[1].name:
            couples = couples[:1]
        self.lineages = [Lineage(first, second, folder) for first, second in couples]

    @property
    def wanted(self) -> Lineage:
        """The lineage of QEMU alone."""
        return self.lineages[0]

    def img(self, line: str | list[str], *, by: int = 1, code: int | None = 0) -> Result:
        """Run a command line in every lineage; words and codes must be QEMU's.

        Args:
            line: the words, or one string of them.
            by: the first or the second side of each lineage.
            code: the exit code it must have; None: whatever QEMU's is.
        """
        words = shlex.split(line) if isinstance(line, str) else line
        results = [lineage.run(words, by=by) for lineage in self.lineages]
        return self._same(results, code)

    def write(
        self, name: str, format: str, commands: Iterable[str], *, by: int = 0, unmap: bool = True
    ) -> None:
        """Write to an image in every lineage, in the words of qemu-io."""
        words = [*(["-d", "unmap"] if unmap else []), "-f", format]
        for command in commands:
            words += ["-c", command]
        for lineage in self.lineages:
            done = lineage.io([*words, name], by=by)
            if done.code:
                raise AssertionError(f"{done}\n{lineage.history()}")

    def _same(self, results: list[Result], code: int | None) -> Result:
        wanted = results[0]
        if code is not None and wanted.code != code:
            raise AssertionError(f"QEMU's own:\n{wanted}\n{self.wanted.history()}")
        for lineage, result in zip(self.lineages, results, strict=True):
            different = difference(plain(str(wanted)), plain(str(result)))
            if different:
                raise AssertionError(f"{different}\n{lineage.history()}")
        return wanted

    # ------------------------------------------------------------------------------ looking

    def look(self, name: str, format: str, *, alike: Callable[[View], str] | None = None) -> View:
        """Look at an image with both sides, in every lineage, and compare it all.

        Args:
            name, format: of the image.
            alike: what of a view is the same in all lineages, by default `layout_free`.

        Returns:
            What QEMU says of its own.
        """
        views = []
        for lineage in self.lineages:
            seen = look_at(self.both, lineage.folder, name, format)
            different = difference(str(seen[0]), str(seen[1]))
            if different:
                raise AssertionError(
                    f"{name}: - what QEMU says of it, + what ours does\n"
                    f"{different}\n{lineage.history()}"
                )
            views.append(seen[0])
        shape = alike or layout_free
        for lineage, view in zip(self.lineages, views, strict=True):
            different = difference(shape(views[0]), shape(view))
            if different:
                raise AssertionError(
                    f"{name}: - the image of {self.wanted.name}, + of {lineage.name}\n"
                    f"{different}\n{self.wanted.history()}\n{lineage.history()}"
                )
        return views[0]

    def sound(self, name: str) -> None:
        """QEMU finds nothing wrong with the images that ours worked on."""
        for lineage in self.lineages:
            if lineage.sides[1] is not self.both[0]:
                done = self.both[0].img.run("check", name, cwd=lineage.folder)
                assert done.code == 0, f"{done}\n{lineage.history()}"

    def content(self, name: str, format: str, lineage: Lineage | None = None) -> bytes:
        """What QEMU reads of an image, its own unless another lineage is given."""
        folder = (lineage or self.wanted).folder
        target = folder / "content.tmp"
        done = self.both[0].img.run(
            "convert", "-f", format, "-O", "raw", name, target.name, cwd=folder
        )
        assert done.code == 0, done
        found = target.read_bytes()
        target.unlink()
        return found

    def same(self, line: str) -> None:
        """What both sides say of the images of each lineage must be the same.

        Lineages are not compared with each other.
        """
        words = shlex.split(line)
        for lineage in self.lineages:
            wanted, got = (side.img.run(*words, cwd=lineage.folder) for side in self.both)
            different = difference(plain(str(wanted)), plain(str(got)))
            if different:
                raise AssertionError(f"{line}\n{different}\n{lineage.history()}")

    def files_sizes(self, name: str) -> list[int]:
        """How long one file is in every lineage."""
        return [(lineage.folder / name).stat().st_size for lineage in self.lineages]

    def files(self, name: str) -> list[bytes]:
        """The bytes of one file in every lineage."""
        return [(lineage.folder / name).read_bytes() for lineage in self.lineages]


def look_at(both: tuple[Side, Side], folder: Path, name: str, format: str) -> list[View]:
    """What each side says of an image.

    `map` comes first, the content last: on some file systems pages that were only read are
    data to SEEK_DATA (see `room`).
    """
    lines = [
        ["map", "--output=json", "-f", format, name],
        ["info", "--output=json", "-f", format, name],
        ["check", "--output=json", "-f", format, name],
        ["snapshot", "-l", name],
    ]
    content = ["sha256", format, name]
    qemu, ours = both
    real = qemu.batch(lines, folder)
    other = ours.batch([*lines, content], folder)
    real += qemu.batch([content], folder)
    return [View(*(plain(_said(done)) for done in said)) for said in (real, other)]


def _said(done: Result) -> str:
    return done.out.strip() if done.code == 0 and not done.err else str(done)


# --------------------------------------------------------------------- what all images share

#: fields of `info` that depend on the clock, the file system, or where in the file things lie
_INFO_OWN = ("actual-size", "date-sec", "date-nsec", "virtual-size-of-file")
#: fields of `check` that say where in the file things lie
_CHECK_OWN = ("image-end-offset", "fragmented-clusters")


def layout_free(view: View) -> str:
    """A view without what may differ between two images that are both right."""
    check = _without(_loaded(view.check), _CHECK_OWN)
    return "\n".join(
        [
            view.content,
            json.dumps(_info_without_files(_loaded(view.info)), indent=1),
            *map_lines(view.map),
            json.dumps(check, indent=1),
            *(" ".join(line.split()[:2]) for line in view.snapshots.splitlines()),
        ]
    )


def content_and_info(view: View) -> str:
    """A view of an image of which QEMU allocates more than ours does."""
    info = _info_without_files(_loaded(view.info))
    return f"{view.content}\n{json.dumps(info, indent=1)}"


def _loaded(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _without(value: object, names: Iterable[str]) -> object:
    if isinstance(value, dict):
        return {key: _without(part, names) for key, part in value.items() if key not in names}
    if isinstance(value, list):
        return [_without(part, names) for part in value]
    return value


def _info_without_files(info: object) -> object:
    """`info` without the size of the file, which depends on the order of allocations."""
    if not isinstance(info, dict):
        return info
    return _without({**info, "children": []}, _INFO_OWN)


def map_lines(text: str) -> list[str]:
    """`map` without host offsets and the file's holes, runs joined that then say the same."""
    entries = _loaded(text)
    if not isinstance(entries, list):
        return [text]
    joined: list[dict] = []
    for entry in entries:
        shown = {key: value for key, value in entry.items() if key != "offset"}
        shown["in file"] = "offset" in entry
        shown["zero"] = entry["zero"] and not entry["data"]
        last = joined[-1] if joined else None
        if last and _kind(last) == _kind(shown):
            last["length"] += shown["length"]
        else:
            joined.append(shown)
    return [json.dumps(entry) for entry in joined]


def _kind(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if key not in ("start", "length")}


# ------------------------------------------------------------------------------------ making


def create(bench: Bench, combo: Combo, rng: random.Random, *, by: int = 0) -> None:
    """Make the image `disk` of a row in every lineage, over `base` where it has one."""
    words = ["create", "-q", "-f", combo.format]
    if combo.backing is not None:
        create_base(bench, combo, rng, by=by)
        words += ["-b", "base", "-F", combo.backing.format]
    if combo.words:
        words += ["-o", combo.words]
    bench.img([*words, "disk", str(combo.size)], by=by)


def create_base(bench: Bench, combo: Combo, rng: random.Random, *, by: int = 0) -> None:
    """Make and fill the backing file of a row."""
    size, format = combo.backing_size, combo.backing.format
    bench.img(f"create -q -f {format} base {size}", by=by)
    pattern = Pattern(size, min(combo.unit, 65536), rng, stamps=bench.stamps)
    bench.write("base", format, pattern.fill(6, encodes=False, discards=False), by=by)
