"""Images that lie: valid ones of every kind, with bytes changed by a seed.

Whatever the bytes are, opening, reading, listing and checking must end in bounded time with a
result or an error of ours, and must not change the file.
"""

from __future__ import annotations

import os
import random
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from diskwright.block import registry
from diskwright.block.info import Repair
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from diskwright.block.policy import FollowNothing
from diskwright.errors import DiskwrightError, UnsupportedError
from diskwright.operations.check import check

SIZE = 4 << 20
SECONDS_EACH = 20
READ_BYTES = 1 << 16

#: Granularities of the dirty bitmaps in an image whose variant has "bitmaps".
GRAINS = (512, 65536)

#: driver -> create options of the images that are changed; "bitmaps" is for `make`.
VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("qcow2", {}),
    ("qcow2", {"cluster_size": 512}),
    ("qcow2", {"compat": "0.10", "cluster_size": 4096}),
    ("qcow2", {"refcount_bits": 1, "cluster_size": 2 << 20}),
    ("qcow2", {"lazy_refcounts": True, "compression_type": "zstd"}),
    ("qcow2", {"extended_l2": True, "cluster_size": 16384}),
    ("qcow2", {"cluster_size": 4096, "bitmaps": True}),
    ("vdi", {}),
    ("vdi", {"static": True}),
    ("vdi", {"block_size": 4096, "backing": "base"}),
    ("vpc", {}),
    ("vpc", {"subformat": "fixed"}),
    ("vpc", {"block_size": 4096}),
    ("vpc", {"backing": "base"}),
]

_NUMBERS = (0, 1, 2, 3, 8, 9, 0x1FF, 0x200, 0xFFFF, 0x10000, 1 << 31, (1 << 31) - 1, (1 << 32) - 1)
_LONG = (1 << 32, 1 << 40, 1 << 62, (1 << 62) - 1, 1 << 63, (1 << 63) - 1, (1 << 64) - 1)


def make(path: str, driver: str, options: dict[str, object], seed: int) -> None:
    """A valid image with something in it."""
    rng = random.Random(seed)
    size = SIZE
    if "backing" in options:
        base = os.path.join(os.path.dirname(path), str(options["backing"]))
        make(base, driver, {}, seed)
        size = 0  # its parent's
    cls = registry.driver_class(driver)
    given = {name: value for name, value in options.items() if name != "bitmaps"}
    values = cls.create_options.validate(given)
    cls.create(Opener(read_only=False), size, {**values, "filename": path})
    with open_image(Opener(read_only=False), path, format=driver) as node:
        for grain in GRAINS if "bitmaps" in options else ():
            node.bitmap_add(f"by {grain}", granularity=grain, enabled=grain == GRAINS[0])
        for _ in range(12):
            length = rng.choice((1, 512, 4096, 70000))
            offset = rng.randrange(node.size - length)
            node.write(offset, rng.randbytes(length))
        node.write_zeroes(1 << 20, 1 << 18)
        if node.can_snapshot:
            _snapshot(node)
            node.write(0, b"after the snapshot")


def _snapshot(node: Node) -> None:
    from diskwright.block.info import SnapshotInfo

    try:
        node.snapshot_create(SnapshotInfo("", "one"))
    except UnsupportedError:
        pass  # one-bit reference counts have no room for a second reference


def change(image: bytes, rng: random.Random) -> bytes:
    """The image with one to four lies in it."""
    lied = bytearray(image)
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(6)
        # headers and tables lie at the beginning, footers at the end
        reach = rng.choice((64, 128, 512, 4096, 70000, 400000, len(lied)))
        place = rng.randrange(max(min(reach, len(lied)), 1))
        if rng.random() < 0.1:
            place = max(len(lied) - 1 - place, 0)
        if kind == 0 and lied:
            lied[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and lied:
            lied[place] = rng.randrange(256)
        elif kind == 2:
            _put(lied, place & ~3, struct.pack(rng.choice("<>") + "I", rng.choice(_NUMBERS)))
        elif kind == 3:
            number = rng.choice(_NUMBERS + _LONG)
            _put(lied, place & ~7, struct.pack(rng.choice("<>") + "Q", number))
        elif kind == 4:
            source = rng.randrange(max(len(lied), 1)) & ~7
            _put(lied, place & ~7, bytes(lied[source : source + rng.choice((8, 64, 512))]))
        elif rng.random() < 0.3:
            del lied[place:]
    return bytes(lied)


def _put(image: bytearray, place: int, piece: bytes) -> None:
    """Overwrite, never lengthen."""
    piece = piece[: max(len(image) - place, 0)]
    image[place : place + len(piece)] = piece


class TookTooLongError(Exception):
    """One image kept us busy for longer than `SECONDS_EACH`."""


@contextmanager
def bounded() -> Iterator[None]:
    """End what takes too long, where the system can (main thread of a Unix process)."""

    def late(number: int, frame: object) -> None:
        raise TookTooLongError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS_EACH)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def look(path: str, driver: str | None, rng: random.Random) -> str:
    """Do everything that only reads; returns how far it got."""
    reached = "nothing"
    try:
        opener = Opener(policy=FollowNothing(), follow_backing=rng.random() < 0.2)
        with open_image(opener, path, format=driver) as node:
            reached = "opened"
            node.info()
            _read_here_and_there(node, rng)
            _read_bitmaps(node)
            reached = "read"
            if node.can_check:
                node.check(Repair.NONE)
                reached = "checked"
    except DiskwrightError:
        pass
    return reached


def _read_here_and_there(node: Node, rng: random.Random) -> None:
    size = node.size
    for _ in range(8):
        length = min(rng.choice((1, 512, READ_BYTES)), size)
        if not length:
            return
        offset = rng.randrange(size - length + 1)
        try:
            data = node.read(offset, length)
            assert len(data) == length
        except DiskwrightError:
            continue
    for count, _ in enumerate(node.extents(0, min(size, 1 << 26))):
        if count > 5000:
            break


def _read_bitmaps(node: Node) -> None:
    for info in node.dirty_bitmaps():
        try:
            for _ in node.dirty_bitmap(info.name).runs():
                pass
        except DiskwrightError:
            continue


def _change_bitmaps(node: Node, rng: random.Random) -> None:
    for info in node.dirty_bitmaps()[:4]:
        node.bitmap_enable(info.name, rng.random() < 0.5)
        node.bitmap_merge(info.name, node.dirty_bitmap(info.name))
        rng.choice((node.bitmap_clear, node.bitmap_remove))(info.name)


def write_too(path: str, driver: str, rng: random.Random) -> None:
    """Open for writing and use it: it may refuse, but in our words."""
    try:
        opener = Opener(policy=FollowNothing(), read_only=False, follow_backing=False)
        with open_image(opener, path, format=driver) as node:
            if node.size >= 512:
                offset = rng.randrange(min(node.size, 1 << 40) - 511)
                node.write(offset, b"x" * 512)
            node.discard(0, min(node.size, 1 << 20))
            _change_bitmaps(node, rng)
            node.flush()
    except DiskwrightError:
        pass


def repair_too(path: str, driver: str) -> None:
    """Let `check` repair what it can; what it says is mended is mended."""
    try:
        done = check(path, format=driver, repair="all", policy=FollowNothing())
        again = check(path, format=driver, policy=FollowNothing())
    except DiskwrightError:
        return
    if done.clean:
        assert again.clean, f"repaired, and {again.corruptions} corruptions, {again.leaks} leaks"


def one(folder: str, variant: tuple[str, dict[str, object]], image: bytes, seed: int) -> str:
    """Change an image by `seed` and look at it; raises what should never be raised."""
    rng = random.Random(seed)
    path = os.path.join(folder, "hostile")
    lied = change(image, rng)
    with open(path, "wb") as file:
        file.write(lied)
    with bounded():
        reached = look(path, rng.choice((None, variant[0])), rng)
        with open(path, "rb") as file:
            assert file.read() == lied, "looking changed the file"
        if rng.random() < 0.3:
            repair_too(path, variant[0])
            write_too(path, variant[0], rng)
    return reached
