"""Images of many layouts, and what can be wrong with each of their fields."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.differential.programs import Program
from tests.differential.qcow2_places import COMPRESSED, COPIED, OFFSET, Places

#: What qemu-io does to most layouts, for a disk of 1 MiB with clusters of at most 16 KiB.
WRITES = (
    "write -P 1 0 48k",
    "write -P 2 96k 20k",
    "write -z 8k 8k",
    "write -z 160k 16k",
    "write -z -u 192k 16k",
    "write -P 3 500k 40k",
    "discard 112k 4k",
)
WRITES_V2 = tuple(line for line in WRITES if "-z" not in line)
PACKED = ("write -c -P 4 256k 16k", "write -c -P 5 272k 16k")


class Layout:
    """How an image is made.

    Args:
        options: for `create -o`.
        writes: commands for qemu-io.
        then: lines for qemu-img afterwards, on the image "x"; one that begins with "io" is for
            qemu-io, and with "killed" for a qemu-io that does not come to its end.
        size: of the disk.
    """

    def __init__(
        self,
        options: str,
        *writes: str,
        then: tuple[str, ...] = (),
        size: str = "1M",
    ) -> None:
        self.options = options
        self.writes = writes
        self.then = then
        self.size = size

    def make(self, real: dict[str, Program], folder: Path) -> None:
        """Make the image "x" in an empty folder, and the files that it refers to."""

        def run(program: str, *words: str) -> None:
            done = real[program].run(*words, cwd=folder)
            assert done.code == 0, f"{words}\n{done}"

        def io(*commands: str) -> None:
            words = [word for command in commands for word in ("-c", command)]
            run("qemu-io", "-f", "qcow2", "-d", "unmap", *words, "x")

        if "backing_file" in self.options:
            (folder / "base").write_bytes(bytes([9]) * (700 << 10))
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", self.options, "x", self.size)
        if self.writes:
            io(*self.writes)
        for line in self.then:
            words = shlex.split(line)
            if words[0] == "io":
                io(line[3:])
            elif words[0] == "killed":
                done = real["qemu-io"].run("-c", line[7:], "-c", "sigraise 9", "x", cwd=folder)
                assert done.code == -9
            else:
                run("qemu-img", *words)


SNAPSHOTS = (
    "snapshot -c one x",
    "io write -P 6 0 20k",
    "snapshot -c two x",
    "io write -P 7 64k 40k",
)
MARKED = (
    "bitmap --add x stale",
    "killed write 0 4k",
    "bitmap --add -g 512 x active",
    "bitmap --add x disabled",
    "io write -P 8 300k 30k",
    "bitmap --disable x disabled",
    "bitmap --add -g 64k x other",
)

LAYOUTS = {
    "v3": Layout("cluster_size=4k", *WRITES, *PACKED),
    "v2": Layout("compat=0.10,cluster_size=4k", *WRITES_V2, *PACKED),
    "clusters of 64k": Layout(
        "cluster_size=64k", "write -P 1 0 200k", "write -z -u 3M 64k", size="8M"
    ),
    "clusters of 512": Layout("cluster_size=512", *WRITES, *PACKED),
    "refcounts of 1 bit": Layout("refcount_bits=1,cluster_size=4k", *WRITES),
    "refcounts of 64 bits": Layout("refcount_bits=64,cluster_size=4k", *WRITES, *PACKED),
    "zstd": Layout("compression_type=zstd,cluster_size=4k", *WRITES, *PACKED),
    "lazy": Layout("lazy_refcounts=on,cluster_size=4k", *WRITES),
    "backing": Layout("backing_file=base,backing_fmt=raw,cluster_size=4k", *WRITES, *PACKED),
    "snapshots": Layout("cluster_size=4k", *WRITES, *PACKED, then=SNAPSHOTS),
    "snapshots of v2": Layout("compat=0.10,cluster_size=4k", *WRITES_V2, *PACKED, then=SNAPSHOTS),
    "bitmaps": Layout("cluster_size=4k", *WRITES, then=MARKED),
    "bitmaps and snapshots": Layout("cluster_size=4k", *WRITES, then=(*SNAPSHOTS, *MARKED)),
    "extended": Layout("extended_l2=on,cluster_size=16k", *WRITES, *PACKED),
    "extended with snapshots": Layout(
        "extended_l2=on,cluster_size=16k", *WRITES, *PACKED, then=SNAPSHOTS
    ),
    "data file": Layout("data_file=d,cluster_size=4k", *WRITES),
    "raw data file": Layout("data_file=d,data_file_raw=on,cluster_size=4k", *WRITES),
}

#: What no suite can wait for: QEMU takes memory or time by these fields.
_COUNTS = {"l1_size", "nb_snapshots", "refcount_table_clusters", "table_size", "nb_bitmaps"}
_OFFSETS = {
    "backing_file_offset",
    "l1_table_offset",
    "refcount_table_offset",
    "snapshots_offset",
    "table_offset",
    "directory_offset",
}
_FLAGS = {"incompatible_features", "compatible_features", "autoclear_features", "flags"}


def values(places: Places, name: str) -> Iterator[tuple[str, int]]:
    """(what is wrong, the value) for a field of an image; never the value that is there."""
    place = places.fields[name]
    now = place.get(places.data)
    mask = (1 << place.bits) - 1
    seen = {now}
    for text, value in _candidates(places, name, now):
        if value & mask not in seen:
            seen.add(value & mask)
            yield text, value & mask


def _candidates(places: Places, name: str, now: int) -> Iterator[tuple[str, int]]:
    table, _, field = name.partition(".")
    bits = places.fields[name].bits
    if field.endswith(" bitmap"):
        yield from _bitmap_words(now)
    elif field == "compressed":
        yield from _descriptors(places, now)
    elif field in _OFFSETS:
        yield from _offsets(places, now, flags=())
    elif table.endswith("l1") or "l2" in table.split() or table in ("refcount table",):
        yield from _offsets(places, now, flags=(63, 62, 56, 8, 1, 0))
    elif table.endswith(" table"):  # a bitmap's
        yield from _offsets(places, now, flags=(63, 56, 8, 1, 0))
    elif table == "refcount":
        yield from (("0", 0), ("one more", now + 1), ("one less", now - 1), ("highest", -1))
        yield from (("1", 1), ("7", 7))
    elif field in _FLAGS:
        for bit in (*range(8), 31, 63):
            if bit < bits:
                yield f"bit {bit}", now ^ 1 << bit
        yield "0", 0
    elif field == "size" or field == "extra disk_size":
        for text, value in (("0", 0), ("less", now - 512), ("odd", now - 1), ("half", now // 2)):
            yield text, value
        for text, value in (("more", now + 512), ("twice", now * 2), ("2^40", 1 << 40)):
            yield text, value
        for text, value in (("2^62", 1 << 62), ("2^63", 1 << 63), ("highest", -1)):
            yield text, value
    elif field in _COUNTS:
        yield from (("0", 0), ("one less", max(now - 1, 0)), ("one more", now + 1), ("9", 9))
        if field not in ("l1_size", "nb_snapshots"):  # with many tables of nonsense it takes long
            yield from (("2^22", 1 << 22), ("2^31", 1 << 31))
        if field != "nb_snapshots":  # QEMU makes 65536 of what lies there, which takes it long
            yield "highest", -1
    elif field in ("version", "cluster_bits", "refcount_order", "type", "compression_type"):
        for value in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 21, 22, 31, 63, 255):
            yield str(value), value
    else:
        for text, value in (("0", 0), ("1", 1), ("one less", now - 1), ("one more", now + 1)):
            yield text, value
        yield from (("8 more", now + 8), ("64", 64), ("1000", 1000), ("highest", -1))
        yield "half", 1 << bits - 1


def _offsets(places: Places, now: int, flags: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    size, end = places.size, -(-len(places.data) // places.size) * places.size
    kept = now & ~OFFSET
    if kept & COMPRESSED:
        kept = COPIED
    yield "0", 0
    for bit in flags:
        yield f"bit {bit}", now ^ 1 << bit
    yield "half a cluster off", now + size // 2
    yield "1 off", now + 1
    yield "where the file ends", kept | end
    yield "a cluster behind the end", kept | end + size
    yield "far behind the end", kept | 1 << 33
    yield "as far as can be", kept | OFFSET & -size
    for name, where in places.tables.items():
        yield f"the {name}", kept | where


def _descriptors(places: Places, now: int) -> Iterator[tuple[str, int]]:
    """A compressed cluster's: its place, below it the flags, above the sectors."""
    bits = 62 - (places.bits - 8)
    place, kept = now & (1 << bits) - 1, now >> bits << bits
    yield "0", 0
    yield "no flag", now & ~COMPRESSED
    yield "copied", now | COPIED
    yield "most sectors", now | (1 << 62) - (1 << bits)
    yield "one sector more", now + (1 << bits)
    yield "no more sectors", place | COMPRESSED
    yield "1 off", now + 1
    yield "a sector off", now + 512
    yield "far behind the end", kept | 1 << min(40, bits - 1)
    yield "as far as can be", now | (1 << bits) - 1
    yield "where the file ends", kept | len(places.data)
    for name, where in places.tables.items():
        yield f"the {name}", kept | where


def _bitmap_words(now: int) -> Iterator[tuple[str, int]]:
    yield from (("0", 0), ("all data", 0xFFFFFFFF), ("all zeroes", 0xFFFFFFFF << 32))
    yield from (("both", -1), ("first both", now | 1 << 32 | 1), ("other", ~now))
    yield from (("last", now ^ 1 << 31), ("last zero", now ^ 1 << 63))
