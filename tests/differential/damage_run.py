"""One damaged image, checked and repaired by both programs on copies, and what came of it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.differential.damage_cases import LAYOUTS
from tests.differential.img_pairs import difference, plain, timeless
from tests.differential.programs import Program, Result
from tests.differential.qcow2_places import Places

#: Each begins with a fresh copy of the damaged image.
LINES = ("check --output=json x", "check -r leaks x", "check -r all x")
#: Bytes of a file that is compared as it is; QEMU makes some very long.
MOST = 16 << 20
#: What is wrong with an image that cannot be checked.
_MANY = 1 << 40
_TOO_LONG = 1 << 36

#: Ours writes new tables before it gives up the old ones, so they may lie elsewhere.
_END = re.compile(r"(Image end offset: |\"image-end-offset\": )\d+")
#: Of `info`: how long the file is, which depends on that.
_FILE = re.compile(r'"children": \[.*?\n    \],\n', re.DOTALL)


class Outcome(NamedTuple):
    """What one command line did to a damaged image.

    Attributes:
        line: it.
        wanted, got: what QEMU's program and ours said.
        said: where they said not the same, lines that differ.
        state: where they left not the same, lines that differ.
    """

    line: str
    wanted: Result
    got: Result
    said: str
    state: str


class Portrait:
    """An image as QEMU's program sees it.

    Attributes:
        sound: a check finds nothing.
        wrong: the corruptions and leaks that it finds, and places that it cannot look at.
        disks: "" and the ids of snapshots -> a digest of what can be read; no others.
        text: all of it, and `info` and `map`.
        snapshots: how many the header says there are.
    """

    def __init__(self, program: Program, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self.sound, self.wrong, self.disks = False, _MANY, {}
        self.text = "too long to be looked at"
        with open(folder / "x", "rb") as file:
            self.snapshots = int.from_bytes(file.read(64)[60:], "big")
        if (folder / "x").stat().st_size < _TOO_LONG:
            self._look()

    def _look(self) -> None:
        checked = self._ask("check", "--output=json", "x")
        self.sound = checked.code == 0
        counts = json.loads(checked.out or "{}")
        if counts:
            self.wrong = sum(counts.get(key, 0) for key in ("corruptions", "leaks", "check-errors"))
        info = self._ask("info", "--output=json", "x")
        mapped = self._ask("map", "--output=json", "x")
        names = [""]
        if info.code == 0:
            names += [each["id"] for each in json.loads(info.out).get("snapshots", [])]
        self.disks = {name: shown for name in names if (shown := self._disk(name))}
        told = [_form(result) for result in (checked, info, mapped)]
        self.text = _FILE.sub("", "\n".join([*told, *map(str, self.disks.items())]))

    def _ask(self, *words: str) -> Result:
        return self._program.run(*words, cwd=self._folder)

    def _disk(self, name: str) -> str:
        words = ["-l", f"snapshot.id={name}"] if name else []
        if self._ask("convert", "-O", "raw", *words, "x", "out").code:
            return ""
        return hashlib.sha1(_content(self._folder / "out")).hexdigest()


class Bench:
    """Images of every layout, and folders where damaged ones are repaired.

    Args:
        real: QEMU's programs.
        ours: the command under test.
        folder: an empty one.
    """

    def __init__(self, real: dict[str, Program], ours: Program, folder: Path) -> None:
        self.real = real
        self.programs = (real["qemu-img"], ours)
        self.folder = folder
        self._layouts: dict[str, tuple[Places, dict[str, bytes]]] = {}
        self.sides = (folder / "real", folder / "ours")

    def layout(self, name: str) -> tuple[Places, dict[str, bytes]]:
        """(where all is, file name -> content) of a sound image, which QEMU's program made."""
        if name not in self._layouts:
            made = self.folder / "made"
            made.mkdir()
            LAYOUTS[name].make(self.real, made)
            files = {path.name: path.read_bytes() for path in made.iterdir()}
            shutil.rmtree(made)
            self._layouts[name] = Places(files["x"]), files
        return self._layouts[name]

    def damaged(self, layout: str, field: str, value: int) -> dict[str, bytes]:
        """The files of an image with one field changed."""
        places, files = self.layout(layout)
        data = bytearray(files["x"])
        places.fields[field].put(data, value)
        return {**files, "x": bytes(data)}

    def outcomes(self, files: dict[str, bytes]) -> Iterator[Outcome]:
        """What LINES do to an image; repairs are left out where they could not do a thing.

        After each, `sides` have what the two programs left.
        """
        first = self._outcome(LINES[0], files)
        yield first
        lines = LINES[1:]
        if first.wanted.code == first.got.code == 0:
            lines = LINES[2:]
        if "Could not open" in first.wanted.err and not first.said:
            lines = ()
        for line in lines:
            yield self._outcome(line, files)

    def _outcome(self, line: str, files: dict[str, bytes]) -> Outcome:
        for side in self.sides:
            lay(side, files)
        wanted, got = (
            program.run(*line.split(), cwd=side)
            for program, side in zip(self.programs, self.sides, strict=True)
        )
        said = difference(_form(wanted), _form(got))
        return Outcome(line, wanted, got, said, self._state(files, repairs="-r" in line))

    def _state(self, files: dict[str, bytes], *, repairs: bool) -> str:
        """Lines that differ between what the two images are now, as QEMU's program sees them."""
        left = [{name: _content(side / name) for name in files} for side in self.sides]
        if not repairs:
            return "changed by a check" if left[1] != files else ""
        if left[0] == left[1]:
            return ""
        if any(left[1][name] != data for name, data in files.items() if name != "x"):
            return "another file changed"
        theirs, ours = (Portrait(self.programs[0], side) for side in self.sides)
        return difference(theirs.text, ours.text)

    def portraits(self, files: dict[str, bytes]) -> tuple[Portrait, Portrait, Portrait]:
        """(The image before, and what QEMU's program and ours left.)"""
        before = self.folder / "before"
        lay(before, files)
        return (
            Portrait(self.programs[0], before),
            Portrait(self.programs[0], self.sides[0]),
            Portrait(self.programs[0], self.sides[1]),
        )


def lay(folder: Path, files: dict[str, bytes]) -> None:
    """Have nothing but these files in a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _content(path: Path) -> bytes:
    """What is in a file; of one that QEMU made very long only how long it is."""
    size = path.stat().st_size
    return path.read_bytes() if size <= MOST else b"%d bytes" % size


def _form(result: Result) -> str:
    # QEMU's hint about stale bitmaps has no end of line.
    err = re.sub(r"(the image file to fix\.)(?!\n)", r"\1\n", result.err)
    text = f"exit {result.code}\nstdout:\n{plain(result.out)}\nstderr:\n{plain(err)}"
    return timeless(_END.sub(r"\1END", text))
