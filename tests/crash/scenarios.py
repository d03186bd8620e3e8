"""What is done to an image while the power fails, or its file gives errors.

A scenario is a format with options, what its image holds before (`prepare`), and what a guest
then does (`act`), with flushes in between. Actions are written once, in units of the format.
"""

from __future__ import annotations

import random
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from diskwright.block import registry
from diskwright.block.info import CheckResult
from diskwright.block.node import Node
from diskwright.block.opener import Opener
from diskwright.block.reopen import CommitTarget
from diskwright.operations.commit import _write_down as write_down
from diskwright.operations.workers import Steering
from tests import devices
from tests.contract import odd_format
from tests.crash.bitmap_actions import (
    bitmaps,
    filled_and_cleared,
    filled_and_idle,
    filled_and_noted,
    grown_over_a_table,
    handled,
)
from tests.crash.guest import SECTOR, Guest
from tests.crash.variants import (
    ODD,
    ODD_SCRAMBLED,
    Q4K,
    Q64K,
    Q512,
    Q_DATA,
    Q_DATA_RAW,
    Q_EXT,
    Q_EXT_META,
    Q_FULL,
    Q_KEEPS,
    Q_LAZY,
    Q_LAZY_64K,
    Q_META,
    Q_NARROW,
    Q_PUNCHES,
    Q_V2,
    Q_WIDE,
    Q_ZSTD,
    VDI,
    VDI_SMALL,
    VDI_STATIC,
    VDI_WIDE,
    VPC,
    VPC_2M,
    VPC_4K,
    VPC_FIXED,
    Variant,
    named,
)

devices.register()
registry.register("odd", odd_format.Odd)


#: Where qcow2 says that it was not closed: the lowest bit of its incompatible features.
_DIRTY_BYTE = 79


Action = Callable[["Scene"], None]


class Scene:
    """A guest at work, with what an action needs to know of the disk."""

    def __init__(self, scenario: Scenario, guest: Guest, take: int) -> None:
        self.guest = guest
        self.node = guest.node
        self.variant = scenario.variant
        self.unit = scenario.variant.unit
        self.units = scenario.variant.units
        self.chance = random.Random(zlib.crc32(f"{scenario} {take}".encode()))

    def at(self, number: int) -> int:
        """The first sector of unit `number` of those that the action uses."""
        return number * self.variant.spread

    def some(self, number: int) -> tuple[int, int]:
        """Sectors inside of unit `number`, perhaps all."""
        first = self.chance.randrange(self.unit) if self.unit > 1 else 0
        count = self.chance.randint(1, self.unit - first)
        return (self.at(number) + first, count) if self.chance.random() < 0.7 else self.all(number)

    def all(self, number: int) -> tuple[int, int]:
        """The sectors of unit `number`."""
        return self.at(number), self.unit

    def shuffled(self, first: int, stop: int) -> list[int]:
        """Units of a range in any order."""
        numbers = list(range(first, stop))
        self.chance.shuffle(numbers)
        return numbers


class Scenario:
    """One operation on one variant. The last unit is left free, for the look at what remained."""

    def __init__(
        self,
        operation: str,
        variant: Variant,
        act: Action,
        *,
        prepare: Action | None = None,
        backing: bool = False,
    ) -> None:
        self.operation = operation
        self.variant = variant
        self.driver = variant.driver
        self._act = act
        self._prepare = prepare
        self.backing = backing
        unit = variant.unit
        self.scribble = (variant.units - 1) * variant.spread
        self.below = [(at * variant.spread, unit) for at in range(1, variant.units - 1, 2)]
        self.windows = (
            [(0, variant.size // SECTOR * 2)]
            if variant.spread == unit
            else [(at * variant.spread, unit) for at in range(variant.units)]
        )

    def __str__(self) -> str:
        return f"{self.driver}-{self.operation}-{self.variant.name}"

    # ---------------------------------------------------------------------------------- files

    @property
    def files(self) -> list[str]:
        """The names of the recorded files."""
        names = ["base", "image"] if self.backing else ["image"]
        return [*names, *(f"{n}.data" for n in names)] if self.variant.has_data_file else names

    @property
    def judged(self) -> list[str]:
        """Which of them qemu-img can check."""
        if not self.variant.qemu:
            return []
        names = ["base", "image"] if self.backing else ["image"]
        return [name for name in names if self.driver == "qcow2" or not self._is_child(name)]

    def _is_child(self, name: str) -> bool:
        return self.backing and name == "image"

    def create(self, name: str) -> None:
        """Make the empty image, or the empty base."""
        cls = registry.driver_class(self.driver)
        given = dict(self.variant.options)
        if "data_file" in given:
            given["data_file"] = f"recorder:{name}.data"
        if self.backing and name == "image":
            given.update(_NAMES_BACKING.get(self.driver, {}))
            given.pop("subformat", None)
        has_own_size = self.driver in ("qcow2", "odd") or not self._is_child(name)
        size = self.variant.size if has_own_size else 0
        if self.driver == "vpc" and self._is_child(name):
            self._create_in_files(given)
            return
        options = {**cls.create_options.validate(given), "filename": f"recorder:{name}"}
        cls.create(Opener(read_only=False), size, options)

    def _create_in_files(self, given: dict[str, object]) -> None:
        """A VHD's parent must be a file as the image is made; then it may be anything."""
        cls = registry.driver_class(self.driver)
        with tempfile.TemporaryDirectory() as folder:
            base, image = Path(folder, "base"), Path(folder, "image")
            base.write_bytes(devices.STORES["base"].data)
            options = cls.create_options.validate({**given, "backing": str(base)})
            cls.create(Opener(read_only=False), 0, {**options, "filename": str(image)})
            devices.STORES["image"] = devices.Store(image.read_bytes())

    def base_spec(self) -> dict[str, object]:
        """What opens the backing file."""
        return self._spec("base")

    def _spec(self, name: str, file: dict[str, object] | None = None) -> dict[str, object]:
        spec: dict[str, object] = {
            "driver": self.driver,
            "file": file or {"driver": "recorder", "filename": name},
            **self.variant.opened,
        }
        if self.variant.has_data_file:
            spec["data-file"] = {"driver": "recorder", "filename": f"{name}.data"}
        return spec

    def spec(
        self,
        *,
        snapshot: str | None = None,
        filters: Callable[[dict[str, object]], dict[str, object]] | None = None,
    ) -> dict[str, object]:
        """What opens the image.

        Args:
            snapshot: name of the internal snapshot to be opened.
            filters: puts something around the node of its file.
        """
        below: dict[str, object] = {"driver": "recorder", "filename": "image"}
        spec = self._spec("image", filters(below) if filters else below)
        if snapshot is not None:
            spec["snapshot"] = snapshot
        if self.backing:
            spec["backing-file" if self.driver == "odd" else "backing"] = self.base_spec()
        return spec

    # ------------------------------------------------------------------------------- running

    def prepare(self, guest: Guest, take: int = 0) -> None:
        """What the image holds before, all of it flushed."""
        if self._prepare is not None:
            self._prepare(Scene(self, guest, take))
        guest.flush()

    def act(self, guest: Guest, take: int = 0) -> None:
        """What the guest does while things go wrong; other places and lengths in each take."""
        self._act(Scene(self, guest, take))

    # ------------------------------------------------------------------------------- judging

    def is_dirty(self, header: bytes) -> bool:
        """Whether the image says that its refcounts may be behind."""
        return self.variant.lazy and bool(header[_DIRTY_BYTE] & 1)

    def clean_at_once(self, node: Node) -> bool:
        """Whether a check must be fine without the repair that a writable opening does."""
        return not (self.variant.lazy and node.info().dirty)

    def corruptions(self, result: CheckResult, lines: list[str]) -> int:
        """What our check found, leaks apart.

        A VDI image's count of blocks and its map are written one after the other, so a crash
        between them leaves a count that is too high: a block is lost, nothing else is.
        """
        if self.driver == "vdi":
            return result.corruptions - sum(_only_too_high(line) for line in lines)
        return result.corruptions

    def accepts(self, code: int, text: str) -> bool:
        """Whether qemu-img check is content: nothing found (0), or leaks (3)."""
        if self.driver == "vdi" and code == 2:
            found = [line for line in text.splitlines() if line.startswith("ERROR")]
            return len(found) == 1 and _only_too_high(found[0])
        if self.driver == "vpc":  # QEMU opens it, and has no check for it
            return code == 63
        return code in (0, 3)


#: How a new image is told of its backing file; the odd format does not keep its name.
_NAMES_BACKING: dict[str, dict[str, object]] = {
    "qcow2": {"backing_file": "recorder:base", "backing_fmt": "qcow2"},
    "vdi": {"backing": "recorder:base"},
}


def _only_too_high(line: str) -> bool:
    words = line.replace(",", "").split()
    if "allocated blocks mismatch" not in line:
        return False
    return int(words[words.index("is") + 1]) < int(words[words.index("be") + 1])


# ------------------------------------------------------------------------------------- actions


def write_new(scene: Scene) -> None:
    """Writes to units that have no space yet, flushed every now and then."""
    for count, number in enumerate(scene.shuffled(0, scene.units - 1)):
        scene.guest.write(*scene.some(number))
        if count % 4 == 3:
            scene.guest.flush()


def fill(scene: Scene) -> None:
    """Whole units over the first two thirds of the disk."""
    for number in range(scene.units * 2 // 3):
        scene.guest.write(*scene.all(number))


def write_in_place(scene: Scene) -> None:
    """Writes to what has space, with a few new units between them."""
    guest = scene.guest
    for count in range(24):
        guest.write(*scene.some(scene.chance.randrange(scene.units * 2 // 3)))
        if count % 6 == 2:
            guest.write(*scene.some(min(scene.units * 2 // 3 + count // 6, scene.units - 2)))
        if count % 5 == 4:
            guest.flush()


def discard(scene: Scene) -> None:
    """Units go, others take their space, and come back."""
    guest = scene.guest
    for count in range(5):
        for number in scene.chance.sample(range(scene.units * 2 // 3), 3):
            guest.discard(*scene.all(number))
        if count % 2:
            guest.flush()
        for number in scene.chance.sample(range(scene.units - 1), 3):
            guest.write(*scene.some(number))
        guest.flush()


def zero(scene: Scene) -> None:
    """Zeroing of whole units and parts, keeping and giving back the space."""
    guest = scene.guest
    for count in range(6):
        for number in scene.chance.sample(range(scene.units - 1), 3):
            guest.zero(*scene.all(number), unmap=bool(count & 1))
        guest.zero(*scene.some(scene.chance.randrange(scene.units - 1)))
        if count % 3 == 1:
            guest.flush()
        for number in scene.chance.sample(range(scene.units - 1), 2):
            guest.write(*scene.some(number))
        guest.flush()


def compressed(scene: Scene) -> None:
    """Compressed units, written anew as plain ones and compressed once more."""
    guest = scene.guest
    for number in range(scene.units * 2 // 3):
        guest.write_encoded(*scene.all(number))
        if number % 5 == 4:
            guest.flush()
    for count in range(8):
        guest.write(*scene.some(scene.chance.randrange(scene.units * 2 // 3)))
        guest.flush()
        for number in scene.chance.sample(range(scene.units - 1), 4):
            guest.write_encoded(*scene.all(number))
        if count % 2:
            guest.discard(*scene.all(scene.chance.randrange(scene.units - 1)))
        guest.flush()


def populate(scene: Scene) -> None:
    """Copying up, between writes."""
    guest = scene.guest
    for count, number in enumerate(scene.shuffled(0, scene.units - 1)):
        if count % 3 == 2:
            guest.write(*scene.some(number))
        else:
            guest.populate(*scene.some(number))
        if count % 4 == 3:
            guest.flush()


def overlay(scene: Scene) -> None:
    """Some units over the backing file, and some zero ones."""
    for number in scene.shuffled(0, scene.units * 2 // 3):
        scene.guest.write(*scene.some(number))
    scene.guest.zero(*scene.all(scene.units * 2 // 3))


def commit(scene: Scene) -> None:
    """Down into the backing file, twice, with writes between."""
    guest, node = scene.guest, scene.node
    for _ in range(2):
        guest.empty(lambda: _commit(node))
        for number in scene.chance.sample(range(scene.units - 1), 3):
            guest.write(*scene.some(number))
        guest.flush()
    guest.empty(lambda: _commit(node))


def _commit(node: Node) -> None:
    """What the operation does with a node that is open: the data down, then this layer goes."""
    backing = node.backing
    assert backing is not None
    node.flush()
    with CommitTarget(backing.node, grows=False) as base:
        write_down(node, base, 1, Steering())
    node.make_empty()


def snapshots(scene: Scene) -> None:
    """Snapshots made, gone back to and deleted, with writes and discards between."""
    guest = scene.guest
    for count in range(3):
        guest.snapshot(f"s{count}")
        for number in scene.chance.sample(range(scene.units - 1), 3):
            guest.write(*scene.some(number))
        guest.discard(*scene.all(scene.chance.randrange(scene.units - 1)))
        guest.flush()
    guest.apply("s1")
    guest.write(*scene.some(1))
    guest.delete("s0")
    guest.write(*scene.some(2))
    guest.flush()
    guest.apply("s2")
    guest.delete("s1")
    guest.delete("s2")


def snapshot_only(scene: Scene) -> None:
    """Snapshots made and deleted, with writes between."""
    guest = scene.guest
    for count in range(2):
        guest.snapshot(f"s{count}")
        for number in scene.chance.sample(range(scene.units - 1), 3):
            guest.write(*scene.some(number))
        guest.flush()
    guest.delete("s0")


def grow(scene: Scene) -> None:
    """The disk becomes longer, and the new part is used."""
    guest, step = scene.guest, scene.variant.size
    for count in range(1, 5):
        guest.write(*scene.some(scene.chance.randrange(scene.units - 1)))
        size = step + step * count // 4
        guest.resize(size)
        guest.write(size // SECTOR - 1, 1)
        if count % 2:
            guest.flush()
        guest.write(size // SECTOR - 3, 2)


def shrink(scene: Scene) -> None:
    """The disk becomes shorter and longer again: what is gone is zero."""
    guest, unit = scene.guest, scene.unit * SECTOR
    whole = scene.variant.size
    for count in (6, 3, 4):
        guest.resize(whole - count * unit + 2 * SECTOR)
        guest.write(*scene.some(1 + count))
        guest.resize(whole)
        for number in range(scene.units - 1 - count, scene.units - 1, 2):
            guest.write(*scene.some(number))
        guest.flush()


def amend(scene: Scene) -> None:
    """The image becomes an old one and a new one again, with narrow and wide refcounts."""
    guest = scene.guest
    guest.zero(*scene.some(2))
    for number, options in enumerate(
        (
            {"refcount_bits": 64},
            {"refcount_bits": 16, "compat": "0.10"},
            {"compat": "1.1", "refcount_bits": 8},
        )
    ):
        guest.write(*scene.some(number))
        guest.amend(**options)
        guest.zero(*scene.some(number + 3))
        guest.write(*scene.some(number + 6))
        guest.flush()


def preallocated_growth(mode: str) -> Action:
    """The disk grows, with space for what is new."""

    def act(scene: Scene) -> None:
        guest, step = scene.guest, scene.variant.size
        for count in (1, 2):
            guest.write(*scene.some(count))
            guest.resize(step + step * count // 2, mode)
            guest.write(step // SECTOR + 1, scene.unit)
            guest.write(*scene.some(scene.units // 2 + count))
            guest.flush()

    return act


def close_only(scene: Scene) -> None:
    """Nothing is flushed but by closing."""
    for number in scene.shuffled(0, scene.units - 1):
        scene.guest.write(*scene.some(number))


# ----------------------------------------------------------------------------------- the table


def _all() -> list[Scenario]:
    found: list[Scenario] = []

    def add(operation: str, act: Action, *variants: Variant, **how: object) -> None:
        for variant in variants:
            found.append(Scenario(operation, variant, act, **how))  # type: ignore[arg-type]

    plain = (Q4K, Q64K, Q512, Q_V2, Q_META, Q_EXT, Q_EXT_META, Q_DATA, Q_DATA_RAW)
    vdi, vpc = (VDI, VDI_SMALL), (VPC, VPC_4K)
    add("write new", write_new, *plain, Q_NARROW, *vdi, VDI_WIDE, ODD, ODD_SCRAMBLED)
    add("write new", write_new, *vpc, VPC_2M)
    add(
        "write in place",
        write_in_place,
        Q4K,
        Q64K,
        Q_EXT,
        Q_DATA,
        VDI,
        VDI_STATIC,
        ODD,
        prepare=fill,
    )
    add("write in place", write_in_place, VPC, VPC_FIXED, prepare=fill)
    add("discard", discard, *plain, Q_NARROW, *vdi, VPC, VPC_FIXED, ODD, prepare=fill)
    add("discard in place", discard, Q_KEEPS, Q_PUNCHES, prepare=fill)
    add("discard in place", zero, named(Q_KEEPS, "keeps-space-zero"), prepare=fill)
    add("discard in place", compressed, named(Q_KEEPS, "keeps-space-compressed"), prepare=fill)
    add("discard in place", snapshots, named(Q_KEEPS, "keeps-space-snapshots"), prepare=fill)
    add("zero", zero, *plain, *vdi, *vpc, VPC_FIXED, ODD, prepare=fill)
    add("compressed", compressed, Q4K, Q64K, Q_ZSTD, Q_EXT, ODD)
    add("populate", populate, Q4K, Q64K, Q_V2, Q_EXT, *vdi, *vpc, ODD, backing=True)
    add("over a parent", write_new, *vdi, *vpc, backing=True)
    add("over a parent", discard, named(VPC, "discard"), backing=True, prepare=overlay)
    add("commit", commit, Q4K, Q_V2, Q_EXT, VDI, VPC, backing=True, prepare=overlay)
    add("snapshot", snapshots, Q4K, Q64K, Q512, Q_V2, Q_EXT, prepare=fill)
    add("grow", grow, *plain, prepare=fill)
    add("shrink", shrink, Q4K, Q512, Q_V2, Q_EXT, Q_DATA, prepare=fill)
    add("bitmaps", bitmaps, Q4K, Q64K, Q512, Q_LAZY, Q_EXT, Q_DATA)
    add("bitmaps", handled, *(named(v, "at-rest") for v in (Q4K, Q512)), prepare=filled_and_noted)
    for act in (write_in_place, discard, compressed, snapshot_only, grow, shrink):
        noted = named(Q4K, act.__name__)
        add("noted writes", act, noted, prepare=filled_and_noted)
    add("noted writes", write_in_place, named(Q4K, "cleared"), prepare=filled_and_cleared)
    add("noted writes", grown_over_a_table, named(Q512, "long"), prepare=filled_and_idle)
    add("noted writes", write_in_place, Q_LAZY, Q_EXT, prepare=filled_and_noted)
    add("amend", amend, Q4K, Q64K, Q512, prepare=fill)
    add("amend", amend, named(Q4K, "over-a-base"), backing=True)
    add("lazy refcounts", write_new, Q_LAZY, Q_LAZY_64K)
    add("lazy refcounts", discard, named(Q_LAZY, "lazy-discard"), prepare=fill)
    add("lazy refcounts", snapshots, named(Q_LAZY, "lazy-snapshots"), prepare=fill)
    add("refcount growth", write_new, Q_WIDE)
    for mode in ("metadata", "falloc", "full"):
        add("preallocation", preallocated_growth(mode), named(Q4K, mode), prepare=fill)
    add("preallocation", write_in_place, Q_FULL)
    add("close", close_only, Q4K, Q_LAZY, *vdi, *vpc, ODD)
    return found


SCENARIOS = _all()
OPERATIONS = sorted({(s.driver, s.operation) for s in SCENARIOS})


def of(driver: str, operation: str) -> list[Scenario]:
    """The scenarios of one operation of a format."""
    return [s for s in SCENARIOS if (s.driver, s.operation) == (driver, operation)]
