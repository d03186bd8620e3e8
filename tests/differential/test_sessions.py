"""Sessions: commands of both programs, drawn at random, one after the other on the same images.

What a command leaves is what the next ones find, so that what no single command shows comes out:
an image in a state that only a history of its own makes. After each command its words and exit
code must be the same, and what the images show; at the end QEMU's `check` and `info` of all.

Left out is what has no one answer: images over each other's raw bytes, and writes that fail in
their middle.
"""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair, difference, plain

pytestmark = pytest.mark.peer

QUICK, SLOW, STEPS = 8, 120, 30
SIZES = ("1M", "2M", "3M", "1536k", "2097664", "700k", "65536", "4M")
CREATE = (
    ("cluster_size", ("512", "1k", "4k", "16k", "64k", "128k"), 0.6),
    ("refcount_bits", ("1", "2", "8", "16", "32", "64"), 0.3),
    ("preallocation", ("metadata", "falloc", "full", "off"), 0.3),
    ("extended_l2", ("on",), 0.3),
    ("lazy_refcounts", ("on",), 0.2),
    ("compat", ("0.10",), 0.2),
    ("compression_type", ("zstd",), 0.2),
)
AMEND = (
    "compat=0.10", "compat=1.1", "lazy_refcounts=on", "lazy_refcounts=off", "refcount_bits=1",
    "refcount_bits=8", "refcount_bits=64", "backing_fmt=raw",
)  # fmt: skip
BITMAP = ("--add", "--add -g 4k", "--remove", "--clear", "--enable", "--disable", "--merge m")
SNAPSHOT = ("-c x", "-c y", "-a x", "-a y", "-d x", "-d y", "-l")
LOOK = (
    "check", "check --output=json", "check -r all", "info", "info --backing-chain", "map",
    "measure -O qcow2", "measure -O raw",
)  # fmt: skip


#: What may differ: how long a file is, and where in it something lies; times.
_FREE = re.compile(
    r"file length: .*|disk size: .*|at offset 0x[0-9a-f]+|has a refcount of \d+|end offset: \d+|"
    r"[0-9.]+% fragmented|.* ops; .*|\d\d:\d\d:\d\d"
)
#: Where qemu-img fails and ours does what was asked for.
_ONLY_OURS = (
    "Failed to zero out new clusters: Operation not supported",
    "Error while writing to COW image: Input/output error",
)


class PeerFailed(Exception):
    """QEMU's program ended by an assertion, or could not do it: there is nothing to compare."""


def _form(text: str) -> str:
    return _FREE.sub("", text)


class Session:
    """Two folders, and what there is in them.

    Args:
        img, io: the same commands' pairs, in the same two folders.
        rng: draws.
    """

    def __init__(self, img: Pair, io: Pair, rng: random.Random) -> None:
        self.img, self.io = img, io
        self.rng = rng
        self.infos: dict[str, dict] = {}
        self.made = 0
        self.lines: list[str] = []

    def step(self) -> None:
        """One command, and a look at what it left."""
        kinds = [self.create, self.overlay]
        if self.infos:
            kinds += [self.write] * 6 + [
                self.snapshot, self.resize, self.convert, self.commit, self.rebase, self.amend,
                self.bitmap, self.compare, self.look,
            ]  # fmt: skip
        target = self.rng.choice(kinds)()
        if target:
            self.see(target)

    def see(self, name: str) -> None:
        """What the image shows must be the same; one that could not be made is forgotten."""
        real = self.img.programs[0]
        found = real.run("info", "-U", "--output=json", name, cwd=self.img.folders[0])
        if found.code:
            self.infos.pop(name, None)
            for folder in self.img.folders:
                (folder / name).unlink(missing_ok=True)
            return
        self.infos[name] = json.loads(found.out)
        wanted, got = (str(folder / name) for folder in self.img.folders)
        compared = real.run("compare", "-U", wanted, got, cwd=self.img.folders[1])
        assert compared.code == 0, f"{name}: {compared}"
        checked = [real.run("check", name, cwd=folder) for folder in self.img.folders]
        assert checked[1].code in (0, checked[0].code), f"{name}: {checked[1]}"

    def run(self, words: str) -> int:
        self.lines.append(words)
        return self.same(self.img, shlex.split(words))

    def same(self, pair: Pair, words: list[str]) -> int:
        """Run words in both; returns their exit code."""
        wanted, got = pair.run(*words)
        if wanted.code < 0 or (got.code == 0 and any(word in wanted.err for word in _ONLY_OURS)):
            raise PeerFailed
        forms = [_form(plain(each)) for each in (*wanted[1:], *got[1:])]
        shown = difference("\n".join(forms[:2]), "\n".join(forms[2:]))
        assert wanted.code == got.code, f"{wanted}\n{got}"
        assert not shown, shown
        return wanted.code

    def any(self) -> str:
        return self.rng.choice(sorted(self.infos))

    def new(self) -> str:
        self.made += 1
        return f"i{self.made}"

    def is_qcow2(self, name: str) -> bool:
        return self.infos[name]["format"] == "qcow2"

    def options(self, format: str) -> str:
        rng = self.rng
        chosen = [
            f"{key}={rng.choice(words)}" for key, words, odds in CREATE if rng.random() < odds
        ]
        return f"-o {','.join(chosen)}" if chosen and format == "qcow2" else ""

    # ------------------------------------------------------------------------------ commands

    def create(self) -> str:
        format, name = self.rng.choice(("qcow2", "qcow2", "raw", "vdi", "vpc")), self.new()
        line = f"create -f {format} {self.options(format)} {name} {self.rng.choice(SIZES)}"
        return "" if self.run(line) else name

    def overlay(self) -> str:
        if not self.infos:
            return ""
        below, name = self.any(), self.new()
        size = self.rng.choice(("", self.rng.choice(SIZES)))
        backing = f"-b {below} -F {self.infos[below]['format']}"
        line = f"create -f qcow2 {self.options('qcow2')} {backing} {name} {size}"
        return "" if self.run(line) else name

    def write(self) -> str:
        name = self.any()
        words = [*self.rng.choice(([], ["-d", "unmap"])), "-f", self.infos[name]["format"]]
        for _ in range(self.rng.randrange(1, 6)):
            words += ["-c", self.request(name)]
        self.lines.append(f"io {words} {name}")
        self.same(self.io, [*words, name])
        return name

    def request(self, name: str) -> str:
        rng, size = self.rng, self.infos[name]["virtual-size"]
        offset = rng.randrange(size)
        offset = rng.choice((offset, offset // 512 * 512, offset // 65536 * 65536))
        length = min(rng.choice((1, 512, 1000, 4096, 65536, 100_000, 262_144)), size - offset)
        kinds = [f"write -P {rng.randrange(256)} {offset} {length}", f"read {offset} {length}"]
        if self.infos[name]["format"] in ("qcow2", "raw"):
            kinds += [f"write -z {offset} {length}", f"write -z -u {offset} {length}"]
            kinds += [f"discard {offset} {length}", "flush"]
        if self.is_qcow2(name) and self.infos[name]["cluster-size"] >= 65536:
            kinds.append(f"write -c -P 7 {offset // 65536 * 65536} 65536")
        return rng.choice(kinds)

    def snapshot(self) -> str:
        name = self.any()
        self.run(f"snapshot {self.rng.choice(SNAPSHOT)} {name}")
        return name

    def resize(self) -> str:
        rng, name = self.rng, self.any()
        words = rng.choice(("", "--shrink")), rng.choice(("", "--preallocation=metadata"))
        to = rng.choice((*SIZES, "+1M", "-512k", "+1000"))
        self.run(f"resize -f {self.infos[name]['format']} {' '.join(words)} {name} {to}")
        return name

    def convert(self) -> str:
        rng, name = self.rng, self.new()
        format = rng.choice(("qcow2", "qcow2", "raw", "vdi", "vpc"))
        sources = " ".join(self.any() for _ in range(rng.choice((1, 1, 2))))
        words = f"{rng.choice(('', '-c'))} {rng.choice(('', '-S 0', '-S 4k', '-S 64k'))}"
        line = f"convert {words} -O {format} {self.options(format)} {sources} {name}"
        return "" if self.run(line) else name

    def commit(self) -> str:
        name = self.any()
        self.run(f"commit {self.rng.choice(('', '-d'))} {name}")
        return name

    def rebase(self) -> str:
        name = self.any()
        older = [each for each in self.infos if int(each[1:]) < int(name[1:])]
        below = self.rng.choice(older) if older and self.rng.random() < 0.7 else ""
        format = f"-F {self.infos[below]['format']}" if below else ""
        self.run(f"rebase {self.rng.choice(('', '-c'))} -b '{below}' {format} {name}")
        return name

    def amend(self) -> str:
        name = self.any()
        self.run(f"amend -o {self.rng.choice(AMEND)} {name}")
        return name

    def bitmap(self) -> str:
        name = self.any()
        format = self.infos[name]["format"]
        self.run(f"bitmap -f {format} {self.rng.choice(BITMAP)} {name} {self.rng.choice('mn')}")
        return name

    def compare(self) -> str:
        self.run(f"compare {self.any()} {self.any()}")
        return ""

    def look(self) -> str:
        name, words = self.any(), self.rng.choice(LOOK)
        places = words == "map" or (words.startswith("check") and "json" in words)
        if words.startswith("measure") and not self.is_qcow2(name):
            return ""
        if not places:  # where clusters lie may differ
            self.run(f"{words} {name}")
        return name


def play(seed: int, real, ours, io, folder: Path) -> None:
    img = Pair(real["qemu-img"], ours, folder)
    commands = Pair.__new__(Pair)
    commands.programs, commands.folders = (real["qemu-io"], io), img.folders
    session = Session(img, commands, random.Random(seed))
    try:
        for _ in range(STEPS):
            session.step()
        for name in session.infos:
            session.see(name)
    except PeerFailed:
        return
    except AssertionError as error:
        raise AssertionError("\n".join([*session.lines[-15:], str(error)])) from None


@pytest.mark.parametrize("number", range(QUICK))
def test_sessions(number, real, ours, io, tmp_path):
    play(number, real, ours, io, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(QUICK, SLOW))
def test_many_sessions(number, real, ours, io, tmp_path):
    play(number, real, ours, io, tmp_path)
