"""Every option of every command, given wrongly: refused in QEMU's words, with its exit code.

The lines are made of the commands' own declarations, so an option that is added is tried too:
each cut short, without its value, with values that are none, with a value it does not take, and
beside every other option. qemu-img says what is expected when the test runs; a line that it
takes must succeed with ours and print the same.
"""

from __future__ import annotations

import itertools
import shlex
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskwright.cli import tools
from diskwright.cli.grammar import Flag
from tests.differential.img_pairs import Pair
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

_NUMBERS = ("x", "-1", "9e", "", "1.3", "1k", "99999999999999999999")
#: what a value is called in the help -> values, of which the last one may be right; else numbers
VALUES = {
    "FMT": ("nonsense", "", "qcow2"),
    "CACHE": ("nonsense", "", "none"),
    "human|json": ("nonsense", "", "json"),
    "leaks|all": ("nonsense", "", "all"),
    "OBJDEF": ("nonsense", "", "secret", "secret,id=s", "secret,id=1,data=x", "iothread,id=i"),
    "OPTIONS": ("nonsense", "", "nonsense=1", ",", ",x=1", "size=x"),
    "PREALLOC": ("nonsense", "", "full"),
    "AIO": ("nonsense", "", "native"),
    "SNAPSHOT": ("nonsense", "", "snapshot.nonsense=1", "snapshot.id"),
    "BACKING": ("nofile", "", "b"),
    "BASE": ("nofile", "", "a.q"),
}
#: a value that is well for an image of 64k
GOOD = {
    "FMT": "qcow2",
    "CACHE": "none",
    "human|json": "json",
    "leaks|all": "leaks",
    "OBJDEF": "secret,id=s,data=x",
    "OPTIONS": "cluster_size=4k",
    "PREALLOC": "falloc",
    "AIO": "threads",
    "SNAPSHOT": "nosuch",
    "BACKING": "b",
    "BASE": "a.q",
    "SIZE": "4096",
    "OFFSET": "512",
    "LENGTH": "4096",
    "RATE": "1M",
}
#: operands that are well; one image of qcow2 for the others
OPERANDS = {
    "bench": ("a.q", "-c", "5"),
    "commit": ("o.q",),
    "compare": ("a", "b"),
    "convert": ("a", "t"),
    "create": ("t", "1M"),
    "dd": ("if=a", "of=t"),
    "rebase": ("o.q",),
    "resize": ("a.q", "2M"),
}
#: What is meant to be otherwise (docs/reference/commands/README.md): these take their value here.
OURS = ("--apply", "--create", "--delete")


def flags_of(name: str) -> list[Flag]:
    return [flag for flag in tools.IMG.load(name).flags if flag.key != "help"]


def forms(flag: Flag, value: str | None) -> Iterator[list[str]]:
    """The ways to write an option with this value, or without one."""
    if flag.short:
        yield [f"-{flag.short}", *(() if value is None else (value,))]
    if flag.long:
        yield [f"--{flag.long}" + ("" if value is None else f"={value}")]


def alone(name: str) -> Iterator[list[str]]:
    """One option of a command, or none."""
    for count in range(5):
        yield ["a.q", "b", "o.q", "a"][:count]
    for letter in string.ascii_lowercase.replace("h", ""):
        yield [f"--{letter}"]
    for letter in (string.ascii_letters + string.digits).replace("h", ""):
        yield [f"-{letter}"]
    operands = [*OPERANDS.get(name, ("a.q",))]
    for flag in flags_of(name):
        values = VALUES.get(flag.metavar, _NUMBERS) if flag.metavar else (None,)
        for words in forms(flag, values[0]):
            yield [*words, *operands]
        for value in values[1:]:
            yield [*next(forms(flag, value)), *operands]
        if flag.long and not flag.metavar:
            yield [f"--{flag.long}=x", *operands]
        if flag.metavar:
            for words in forms(flag, None):
                yield [*operands, *words]


def in_pairs(name: str) -> Iterator[list[str]]:
    """Two options of a command, each right for itself."""
    operands = OPERANDS.get(name, ("a.q",))
    for pair in itertools.combinations(flags_of(name), 2):
        words = [
            next(forms(flag, GOOD.get(flag.metavar, "3") if flag.metavar else None))
            for flag in pair
        ]
        yield [*words[0], *words[1], *operands]


def lines(kind) -> list[str]:
    """All lines of one kind, one string each."""
    made = [[name, *words] for name in tools.IMG.commands for words in kind(name)]
    kept = [words for words in made if not is_ours(words)]
    return list(dict.fromkeys(shlex.join(words) for words in kept))


def is_ours(words: list[str]) -> bool:
    """Whether a line is one of the few that are meant to work otherwise."""
    return words[0] == "snapshot" and any(
        word.startswith("--") and any(long.startswith(word.partition("=")[0]) for long in OURS)
        for word in words[1:]
    )


ALONE, PAIRS = lines(alone), lines(in_pairs)


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every line runs."""
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "a").write_bytes(bytes(65536))
    (folder / "b").write_bytes(b"b" * 65536)
    for line in ("create -q -f qcow2 a.q 64k", "create -q -f qcow2 -b a.q -F qcow2 o.q"):
        done = real["qemu-img"].run(*line.split(), cwd=folder)
        assert done.code == 0, done
    return folder


def test_there_are_enough_of_them() -> None:
    assert len(ALONE) + len(PAIRS) >= 2000


@pytest.mark.parametrize("line", ALONE)
def test_one_option(line: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    look(Pair(real["qemu-img"], ours, tmp_path, pristine), line, pristine)


@pytest.mark.slow
@pytest.mark.parametrize("line", PAIRS)
def test_two_options(line: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    look(Pair(real["qemu-img"], ours, tmp_path, pristine), line, pristine)


def look(pair: Pair, line: str, pristine: Path) -> None:
    """Both say the same; what is refused changes no file that QEMU's tool leaves as it was."""
    before = {path.name: path.read_bytes() for path in pristine.iterdir()}
    wanted = pair.same(line)
    if not wanted.code:
        pair.same_tree()
        return
    pair.same_tree(set(before))
    changed = [
        {name for name in before if (folder / name).read_bytes() != before[name]}
        for folder in pair.folders
    ]
    assert changed[1] <= changed[0]
