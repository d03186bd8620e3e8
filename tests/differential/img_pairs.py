"""One command line, run by qemu-img and by ours in two folders that are alike, and compared.

What differs by nature is put into one form before: the program's own name, those that it gives
to nodes, the lines that name
the holder of a lock or say what to do (ours alone has them), the steps of a progress bar, how long
a run of `bench` took, and, where a test asks for it, what a file occupies and when a snapshot was
taken.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.differential.programs import Program, Result

_NAME = re.compile(r"[\w./-]*\b(diskwright|qemu)-(img|io)\b")
_NODE = re.compile(r"#block\d+")
_OURS_ALONE = re.compile(r"^(It is in use by process|hint:) .*\n", re.MULTILINE)
_BAR = re.compile(r"(    \([0-9.]+/100%\)\r)+")
_TIME = re.compile(r"^(Run completed in )[0-9.]+ ", re.MULTILINE)
_DISK_SIZE = re.compile(r"(disk size: ).*|(\"actual-size\": )\d+")
_DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|(\"date-n?sec\": )\d+")


def plain(text: str) -> str:
    """`text` without what differs in every case."""
    text = _OURS_ALONE.sub("", _NODE.sub("#blockN", _NAME.sub("PROGRAM", text)))
    return _TIME.sub(r"\1TIME ", _BAR.sub("", text))


def timeless(text: str) -> str:
    """`text` without what depends on the file system and the clock."""
    text = _DISK_SIZE.sub(lambda found: f"{found[1] or found[2]}DISK SIZE", text)
    return _DATE.sub(lambda found: f"{found[1] or ''}DATE", text)


class Pair:
    """Two folders with the same files, one for each program.

    Args:
        real, ours: the programs.
        folder: an empty one, where the two are made.
        pristine: the files to begin with.
    """

    def __init__(self, real: Program, ours: Program, folder: Path, pristine: Path | None = None):
        self.programs = (real, ours)
        self.folders = (folder / "real", folder / "ours")
        for each in self.folders:
            if pristine is None:
                each.mkdir()
            else:
                copy_tree(pristine, each)

    def run(self, *words: str, stdin: str = "") -> tuple[Result, Result]:
        """Run one command line in both."""
        return tuple(
            program.run(*words, cwd=folder, stdin=stdin)
            for program, folder in zip(self.programs, self.folders, strict=True)
        )

    def same(
        self,
        line: str | list[str],
        *,
        expect: int | None = None,
        form: Callable[[str], str] = str,
        stdin: str = "",
    ) -> Result:
        """Run a command line in both; words, errors and exit codes must be the same.

        Args:
            line: the words, or one string of them.
            expect: the exit code, where the test wants a certain one.
            form: what else to do to the texts before they are compared.
            stdin: what is written to its standard input.

        Returns:
            What the real program said.
        """
        words = shlex.split(line) if isinstance(line, str) else line
        wanted, got = self.run(*words, stdin=stdin)
        shown = shlex.join(words)
        different = difference(form(_comparable(wanted)), form(_comparable(got)))
        if different:
            raise AssertionError(f"{shown}\n{different}")
        if expect is not None:
            assert wanted.code == expect, f"{shown}\n{wanted}"
        return wanted

    def prepare(self, *lines: str) -> None:
        """Run command lines of the real programs, from the same words, in both folders."""
        for line in lines:
            for folder in self.folders:
                done = self.programs[0].run(*shlex.split(line), cwd=folder)
                assert done.code == 0, f"{line}\n{done}"

    def same_files(self, *names: str) -> None:
        """Files must have the same bytes."""
        for name in names:
            wanted, got = ((folder / name).read_bytes() for folder in self.folders)
            assert len(got) == len(wanted), f"{name}: {len(got)} bytes, wanted {len(wanted)}"
            if got != wanted:
                pairs = enumerate(zip(got, wanted, strict=True))
                first = next(place for place, (one, other) in pairs if one != other)
                raise AssertionError(f"{name}: differs first at byte {first}")

    def same_disks(self, *names: str) -> None:
        """Images must have the same content and map, as qemu-img reads both, and be sound."""
        real = self.programs[0]
        wanted, got = self.folders
        for name in names:
            compared = real.run("compare", "-U", str(wanted / name), str(got / name), cwd=got)
            assert compared.code == 0, f"{name}: {compared}"
            checked = [real.run("check", name, cwd=folder) for folder in self.folders]
            assert checked[1].code == checked[0].code, f"{name}: {checked[1]}"

    def same_tree(self, kept: set[str] = frozenset()) -> None:
        """Both folders must have files of the same names.

        Args:
            kept: the files of the beginning; where given, ours may have fewer new ones, as it
                removes what it could not finish and QEMU at times does not.
        """
        wanted, got = (set(os.listdir(folder)) for folder in self.folders)
        assert got <= wanted
        assert kept <= got
        assert kept or got == wanted


def _comparable(result: Result) -> str:
    """All that has to be the same, as one text."""
    return timeless(
        f"exit {result.code}\nstdout:\n{plain(result.out)}\nstderr:\n{plain(result.err)}"
    )


def difference(wanted: str, got: str) -> str:
    """Lines that differ, `-` what was wanted, `+` what came; "" where nothing does."""
    lines = difflib.unified_diff(
        wanted.splitlines(), got.splitlines(), "wanted", "got", lineterm="", n=2
    )
    return "" if wanted == got else "\n".join(lines)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder of small files, holes kept."""
    target.mkdir()
    for path in source.iterdir():
        copied = target / path.name
        if path.is_dir():
            copy_tree(path, copied)
        elif path.is_symlink():
            copied.symlink_to(os.readlink(path))
        else:
            copy_sparse(path, copied)


def copy_sparse(source: Path, target: Path) -> None:
    """Copy one file, data only where there is some."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        position = 0
        while position < size:
            try:
                start = os.lseek(reader.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            stop = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            reader.seek(start)
            writer.seek(start)
            writer.write(reader.read(stop - start))
            position = stop
    shutil.copymode(source, target)
