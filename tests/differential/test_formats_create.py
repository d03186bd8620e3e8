"""New images of every option: the same bytes as QEMU makes, but for names and times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.differential import option_matrix
from tests.differential.formats_workbench import Bench, create
from tests.differential.option_matrix import MIB, Combo, default

pytestmark = pytest.mark.peer

COMBOS = [combo for format in option_matrix.AXES for combo in option_matrix.pairs(format)]
FAST = {
    *option_matrix.singles("qcow2"),
    *(combo for combo in COMBOS if combo.format != "qcow2"),
    *COMBOS[::8],
}
ROWS = [
    pytest.param(combo, id=combo.name, marks=[] if combo in FAST else pytest.mark.slow)
    for combo in COMBOS
]

#: format -> what is made anew for each image, or names its maker: (offset, length) in each
#: header; a negative offset counts from the end
VDI_IDENTITY = ((0x188, 16), (0x198, 16), (0x1A8, 16), (0x1B8, 16), (0, 0x40))
VPC_FOOTER = ((24, 4), (64, 4), (68, 16))


def impersonal(format: str, content: bytes) -> bytes:
    """The bytes of an image without identities, times, and what they make of a checksum."""
    masked = bytearray(content)
    if format == "vdi":
        for offset, length in VDI_IDENTITY:
            masked[offset : offset + length] = bytes(length)
    if format == "vpc":
        starts = {len(content) - 512}
        if content[:8] == b"conectix":
            starts.add(0)
        for start in starts:
            for offset, length in VPC_FOOTER:
                masked[start + offset : start + offset + length] = bytes(length)
    return bytes(masked)


def same_bytes(bench: Bench, format: str) -> None:
    """The images of all lineages must have the same bytes."""
    wanted, *others = (impersonal(format, content) for content in bench.files("disk"))
    for got in others:
        assert len(got) == len(wanted)
        if got != wanted:
            first = next(at for at, byte in enumerate(wanted) if got[at] != byte)
            raise AssertionError(
                f"byte {first:#x}: {got[first : first + 32].hex()}, "
                f"wanted {wanted[first : first + 32].hex()}\n{bench.lineages[1].history()}"
            )


@pytest.mark.parametrize("combo", ROWS)
def test_created(combo: Combo, both, folder: Path, rng: random.Random) -> None:
    """A new image is the same to the byte, and both say the same of it."""
    bench = Bench(both, folder, crossed=False)
    create(bench, combo, rng)
    same_bytes(bench, combo.format)
    bench.look("disk", combo.format)


#: what neither tables nor geometry divide evenly, in bytes
SIZES = (0, 1, 511, 513, 1000, 65537, 3 * MIB + 1536, 1 << 30, (5 << 30) + 512, 3 << 40)
#: the largest that a VHD's geometry says, and what is above
CHS_SIZES = (65535 * 16 * 255 * 512, 65535 * 16 * 255 * 512 - 512, 1 << 41, 17 * 4 * 512, 130 * MIB)

LARGE = [
    *((default("raw"), size) for size in SIZES),
    *((default("qcow2", cluster_size=unit), size) for size in SIZES for unit in ("64k", "2M")),
    *((default("qcow2", refcount_bits="64", cluster_size="4k"), size) for size in SIZES[:-2]),
    *((default("qcow2", preallocation="metadata"), size) for size in SIZES[:-2]),
    *((default("vdi"), size) for size in SIZES),
    *((default("vpc", force_size=force), size) for size in SIZES[1:-1] for force in ("on", "off")),
    *((default("vpc", force_size=force), size) for size in CHS_SIZES for force in ("on", "off")),
    *((default("vpc", subformat="fixed"), size) for size in (512, 70000, 5 * MIB + 512)),
]


@pytest.mark.parametrize(
    ("combo", "size"), LARGE, ids=[f"{combo.name}-{size}" for combo, size in LARGE]
)
def test_created_of_size(combo: Combo, size: int, both, folder: Path) -> None:
    """The size that comes of the one that was asked for, and the tables for it."""
    bench = Bench(both, folder, crossed=False)
    words = ["create", "-q", "-f", combo.format, *(["-o", combo.words] if combo.words else [])]
    done = bench.img([*words, "disk", str(size)], by=0, code=None)
    if done.code:
        return
    sizes = bench.files_sizes("disk")
    assert len(set(sizes)) == 1, sizes
    if sizes[0] <= 64 * MIB:
        same_bytes(bench, combo.format)
    bench.same("info --output=json disk")
    bench.same("map --output=json disk")
