"""What the tests of the qcow2 driver share: making and opening images, and looking into them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskwright.block import registry
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from tests.differential.formats_workbench import room
from tests.differential.programs import Program, Result

OFFSET_MASK = 0x00FFFFFFFFFFFE00
MIB = 1 << 20


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where flushes cost nothing."""
    with room(tmp_path) as folder:
        yield folder


def create(path: Path, size: int, **options: object) -> None:
    """Make an image with the library."""
    cls = registry.driver_class("qcow2")
    given = {**cls.create_options.validate(options), "filename": str(path)}
    cls.create(Opener(read_only=False), size, given)


def opened(path: Path, *, read_only: bool = False, checks: bool = False, **how: object) -> Node:
    """Open an image with the library; `how` are options of the driver."""
    opener = Opener(read_only=read_only)
    opener.checks = checks
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **how}
    return open_image(opener, spec)


def words(options: dict[str, object]) -> list[str]:
    """`-o` and its words, or nothing."""
    text = ",".join(f"{name}={value}" for name, value in options.items())
    return ["-o", text] if text else []


class Qemu:
    """QEMU's programs in one folder."""

    def __init__(self, programs: dict[str, Program], folder: Path) -> None:
        self._programs = programs
        self._folder = folder

    def img(self, *arguments: object, fails: bool = False) -> Result:
        """Run qemu-img; it must succeed, unless `fails`."""
        done = self._programs["qemu-img"].run(*map(str, arguments), cwd=self._folder)
        assert fails or done.code == 0, done
        return done

    def io(self, path: Path, *commands: str, fails: bool = False) -> Result:
        """Run commands of qemu-io on an image."""
        given = [word for command in commands for word in ("-c", command)]
        done = self._programs["qemu-io"].run("-f", "qcow2", *given, str(path), cwd=self._folder)
        assert fails or done.code == 0, done
        return done

    def json(self, *arguments: object, fails: bool = False) -> object:
        """What a command says in JSON."""
        return json.loads(self.img(*arguments, fails=fails).out)

    def clean(self, path: Path) -> None:
        """`qemu-img check` finds nothing."""
        self.img("check", "-q", "-f", "qcow2", path)

    def same(self, path: Path, content: bytes) -> None:
        """The image has this content, says QEMU."""
        raw = self._folder / "content.raw"
        raw.write_bytes(content)
        self.img("compare", "-f", "qcow2", "-F", "raw", path, raw)


class Fields:
    """Numbers inside of an image file, for damaging it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, offset: int, form: str = ">Q") -> int:
        """A number at `offset`."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def put(self, offset: int, value: int, form: str = ">Q") -> None:
        """Write a number at `offset`."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack(form, value))

    @property
    def l1(self) -> int:
        """Where the active L1 table is."""
        return self.get(40)

    @property
    def table(self) -> int:
        """Where the refcount table is."""
        return self.get(48)

    @property
    def block(self) -> int:
        """Where the first refcount block is."""
        return self.get(self.table)

    @property
    def l2(self) -> int:
        """Where the first L2 table is."""
        return self.get(self.l1) & OFFSET_MASK

    @property
    def snapshots(self) -> int:
        """Where the snapshot table is."""
        return self.get(64)
