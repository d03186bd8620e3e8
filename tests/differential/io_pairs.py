"""Sequences of commands, given to qemu-io and to ours on images that are alike, and compared.

What differs by nature is put into one form: how long a request took, and the phrase that says
what a command does, behind ` -- ` in the line of its usage, which is our own, as `--help` is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from tests.differential.img_pairs import Pair, copy_sparse
from tests.differential.programs import Program, Result

_TIMES = re.compile(r"ops; .*$", re.MULTILINE)
_MACHINE = re.compile(r"^(\d+,\d+),\d+:\d\d:\d\d\.\d\d,.*$", re.MULTILINE)
_NODE = re.compile(r"'#block\d+'")
_USAGE = re.compile(r"^Usage: .*?(?=^stderr:$)", re.MULTILINE | re.DOTALL)
_PHRASE = re.compile(r"^([a-z_]+(?: [^\n:]*)?) -- [^\n]*$", re.MULTILINE)

#: name -> how qemu-img makes the image "i", and how qemu-io is to open it
IMAGES = {
    "raw": ("create -q -f raw i 4M", "-f raw i"),
    "qcow2": ("create -q -f qcow2 i 4M", "-f qcow2 i"),
    "overlay": ("create -q -f qcow2 -b base -F raw i", "-f qcow2 i"),
    "vdi": ("create -q -f vdi i 4M", "-f vdi i"),
    "vpc": ("create -q -f vpc -o force_size=on i 4M", "-f vpc i"),
    "fixed": ("create -q -f vpc -o subformat=fixed,force_size=on i 4M", "-f vpc i"),
    "blkdebug": ("create -q -f qcow2 i 4M", "-f qcow2 blkdebug::i"),
}
#: Images of which every byte must be the same; of the others, what is in them.
WHOLE = ("raw", "vpc", "fixed")
#: Where a VDI image says which state of it this is.
VDI_MODIFIED = 408
FORMATS = {"overlay": "qcow2", "blkdebug": "qcow2", "fixed": "vpc"}


def timeless(text: str) -> str:
    """`text` without what differs by nature."""
    text = _USAGE.sub("USAGE\n", text)
    text = _PHRASE.sub(r"\1", _TIMES.sub("ops; TIME", text))
    return _NODE.sub("'NODE'", _MACHINE.sub(r"\1,TIME", text))


def commands(given: Iterable[str]) -> list[str]:
    """Words of a command line that has these commands done."""
    return [word for one in given for word in ("-c", one)]


class IoPair(Pair):
    """Two folders, each with an image "i", a raw image "base", and files to write from.

    Args:
        real: QEMU's programs.
        ours: the program under test.
        folder: an empty one.
        image: one of IMAGES.
    """

    def __init__(
        self, real: dict[str, Program], ours: Program, folder: Path, image: str = "raw"
    ) -> None:
        super().__init__(real["qemu-io"], ours, folder)
        self._img = real["qemu-img"]
        self.image = image
        make, opened = IMAGES[image]
        self.opened = opened.split()
        for place in self.folders:
            (place / "base").write_bytes(b"below" * (1 << 19))
            (place / "pattern").write_bytes(b"0123456789")
            (place / "empty").write_bytes(b"")
        self.img(self.folders[0], make)  # once: images have times and numbers of their own
        copy_sparse(self.folders[0] / "i", self.folders[1] / "i")

    def img(self, place: Path, line: str) -> None:
        """Run qemu-img in one of the folders."""
        done = self._img.run(*shlex.split(line), cwd=place)
        assert done.code == 0, f"{line}\n{done}"

    def agree(
        self, *given: str, options: str = "", stdin: str = "", expect: int | None = None
    ) -> Result:
        """Do commands on the image in both folders; words, codes and images must be the same."""
        words = [*shlex.split(options), *self.opened, *commands(given)]
        wanted = self.same(words, form=timeless, stdin=stdin, expect=expect)
        self.same_images()
        return wanted

    def same_images(self) -> None:
        """The images must be the same, by their bytes where a format lets no choice."""
        if self.image in WHOLE:
            self.same_files("i")
            return
        if self.image == "vdi":  # the UUID that VirtualBox changes with the image, we do too
            for folder in self.folders:
                with open(folder / "i", "r+b") as file:
                    file.seek(VDI_MODIFIED)
                    file.write(bytes(16))
            self.same_files("i")
            return
        wanted, got = (str(folder / "i") for folder in self.folders)
        form = FORMATS.get(self.image, self.image)
        for line in (
            ["compare", "-f", form, "-F", form, wanted, got],
            ["check", "-q", "-f", form, got],
        ):
            done = self._img.run(*line, cwd=self.folders[1])
            assert done.code == 0, f"{line}\n{done}"

    def same_places(self) -> str:
        """What qemu-img maps of both images, host offsets included, which must be the same."""
        maps = [self._img.run("map", "--output=json", "i", cwd=folder) for folder in self.folders]
        assert maps[1].out == maps[0].out
        return maps[0].out
