"""Every create option of qcow2, in pairs, beside every subcommand, in both directions.

The rows of `option_matrix.pairs` have every two values of all options. Each row meets each
subcommand: one side makes the image and fills it, the other does the command's work on it, and the
words, exit codes, contents and what `check` finds are those of QEMU alone. What it says of an image
is compared in both of its forms, for people and as JSON.

`WORK` has one function a subcommand: a `Bench` with the image `disk` and what it lies upon.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from diskwright.cli import tools
from diskwright.drivers.formats.qcow2.create_options import CREATE, ENCRYPTION
from tests.differential import option_matrix
from tests.differential.formats_pattern import Pattern
from tests.differential.formats_workbench import (
    Bench,
    content_and_info,
    create,
    layout_free,
)
from tests.differential.option_matrix import AXES, KIB, MIB, NO_OPTIONS, SECTOR, Combo

pytestmark = pytest.mark.peer

Work = Callable[[Bench, Combo, random.Random], None]

WRITES = 6


def fill(
    bench: Bench,
    combo: Combo,
    rng: random.Random,
    *,
    name: str = "disk",
    count: int = WRITES,
    by: int = 0,
    encodes: bool = False,
) -> None:
    """Write to an image; QEMU compresses only what is not there yet, so in a new one alone."""
    pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
    bench.write(name, "qcow2", pattern.fill(count, encodes=encodes), by=by)


def look(bench: Bench, name: str = "disk", *, layered: bool = False) -> None:
    """An image is the same in all lineages, and QEMU finds nothing wrong with it.

    Before 1.1 there is no "zero" over a backing file: QEMU takes clusters for what ours sees to be
    zero already. Zeroes behind a backing file's end may be told in two ways: `layered`.
    """
    bench.look(name, "qcow2", alike=content_and_info if layered else layout_free)
    bench.sound(name)


def loose(combo: Combo) -> bool:
    """See `look`."""
    return combo.backing is not None and combo.row["compat"] == "0.10"


def say(bench: Bench, line: str) -> None:
    """What each side says of the images of all, for people and as JSON."""
    command, _, rest = line.partition(" ")
    bench.same(line)
    bench.same(f"{command} --output=json {rest}")


# ------------------------------------------------------------------------- one a subcommand


def amend(bench: Bench, combo: Combo, rng: random.Random) -> None:
    """What may be changed is; what may not is refused alike.

    QEMU takes minutes over other refcounts where clusters are large: test_img_amend has those.
    """
    bits = rng.choice(AXES["qcow2"]["refcount_bits"])
    if combo.unit > 64 * KIB:
        bits = combo.row["refcount_bits"]
    for words in (
        "lazy_refcounts=on",
        "lazy_refcounts=off",
        "data_file_raw=off",
        "data_file_raw=on",
        f"refcount_bits={bits}",
        "compat=0.10",
        f"compat=1.1,refcount_bits={bits}",
        f"size={combo.size + combo.unit}",
    ):
        bench.img(f"amend -q -o {words} disk", code=None)
    look(bench, layered=True)
    say(bench, "info disk")


def benchmark(bench: Bench, combo: Combo, rng: random.Random) -> None:
    length = min(rng.choice((512, 4096, combo.unit)), combo.size)
    step = rng.choice((length, length + 512))
    fitting = min((combo.size - length) // step + 1, 60)
    counts = ["-c", str(fitting), "-s", str(length), "-S", str(step)]
    bench.img(["bench", *counts, "disk"])
    bench.img(["bench", "-w", "--pattern=65", "--flush-interval=16", "-d", "8", *counts, "disk"])
    look(bench, layered=True)


def bitmap(bench: Bench, combo: Combo, rng: random.Random) -> None:
    """Added by one side, written under by the other, merged, cleared, removed."""
    bench.img(f"bitmap --add -g {rng.choice(('512', '64k', '1M'))} disk one", code=None)
    fill(bench, combo, rng, count=2)
    bench.img("bitmap --add --disable disk two", code=None)
    bench.img("bitmap --merge one disk two", code=None)
    bench.img("bitmap --disable --clear disk one", code=None)
    fill(bench, combo, rng, count=2, by=1)
    bench.img("bitmap --enable disk one", by=0, code=None)
    say(bench, "info disk")
    say(bench, "measure -O qcow2 disk")
    bench.img("bitmap --remove disk two", code=None)
    bench.img("bitmap --remove disk two", code=1)
    look(bench, layered=loose(combo))


def check(bench: Bench, combo: Combo, rng: random.Random) -> None:
    say(bench, "check disk")
    say(bench, "check -r leaks disk")
    say(bench, "check -q -r all disk")
    leak(bench)
    say(bench, "check disk")
    for lineage in bench.lineages:  # the leak is where each has the end of its file
        done = lineage.run(["check", "-r", "all", "disk"], by=1)
        assert done.code == 0, f"{done}\n{lineage.history()}"
    look(bench, layered=loose(combo))


def leak(bench: Bench) -> None:
    """Count a cluster behind the end of each image's file, which no table names."""
    for lineage in bench.lineages:
        with open(lineage.folder / "disk", "r+b") as file:
            header = file.read(104)
            version = int.from_bytes(header[4:8], "big")
            bits = 1 << int.from_bytes(header[96:100], "big") if version > 2 else 16
            unit = 1 << int.from_bytes(header[20:24], "big")
            file.seek(int.from_bytes(header[48:56], "big"))
            block = int.from_bytes(file.read(8), "big")
            end = -(-file.seek(0, 2) // unit)
            if end >= unit * 8 // bits:
                continue  # counted in another block
            file.truncate((end + 1) * unit)
            at = block + end * bits // 8
            file.seek(at)
            # less than a byte: counted from its lowest bit; more: the last byte is the lowest
            place = max(bits // 8 - 1, 0)
            old = file.read(max(bits // 8, 1))
            new = bytearray(old)
            new[place] |= 1 << (end * bits % 8 if bits < 8 else 0)
            file.seek(at)
            file.write(new)


def commit(bench: Bench, combo: Combo, rng: random.Random) -> None:
    """From an overlay into the image, and from that into what it lies upon."""
    bench.img("create -q -f qcow2 -b disk -F qcow2 over", by=0)
    fill(bench, combo, rng, name="over")
    bench.img("commit over")
    look(bench, layered=True)
    look(bench, "over", layered=True)
    keep = ["-d"] if rng.random() < 0.5 else []
    bench.img(["commit", *keep, "disk"], code=0 if combo.backing is not None else 1)
    look(bench, layered=True)
    if combo.backing is not None:
        bench.look("base", combo.backing.format, alike=content_and_info)


def compare(bench: Bench, combo: Combo, rng: random.Random) -> None:
    bench.img("convert -O raw disk flat", by=0)
    bench.img("compare disk flat")
    bench.same("compare -s disk flat")
    sector = rng.randrange(combo.size // SECTOR)
    bench.write("disk", "qcow2", [f"write -P 0x5b {sector * SECTOR} {SECTOR}"], by=1)
    bench.img("compare disk flat", code=1)
    bench.same("compare -s -p flat disk")
    bench.img("compare disk nofile", code=2)


def convert(bench: Bench, combo: Combo, rng: random.Random) -> None:
    """From it, into a new one of its options, and into one that is there."""
    bench.img("convert -O raw disk flat")
    bench.look("flat", "raw", alike=content_and_info)
    options = combo.words_for("made")
    words = ["-o", options] if options else []
    backing = ["-B", "base", "-F", combo.backing.format] if combo.backing is not None else []
    bench.img(["convert", "-O", "qcow2", *words, *backing, "disk", "made"])
    look(bench, "made", layered=True)
    if combo.encodes:
        bench.img(["convert", "-c", "-p", "-O", "qcow2", *words, "disk", "packed"])
        look(bench, "packed", layered=True)
    bench.img("convert -n -f raw -O qcow2 flat disk")
    look(bench, layered=True)


def make(bench: Bench, combo: Combo, rng: random.Random) -> None:
    """New in place of what was there, and over it."""
    if combo.data_file is not None:
        for lineage in bench.lineages:
            (lineage.folder / combo.data_file).unlink()
    words = ["-o", combo.words] if combo.words else []
    if combo.backing is not None:
        words += ["-b", "base", "-F", combo.backing.format]
    bench.img(["create", "-f", "qcow2", *words, "disk", str(combo.size)])
    look(bench)
    wanted, *others = bench.files("disk")
    assert all(other == wanted for other in others)
    bench.img("create -f qcow2 -b disk -F qcow2 over")
    look(bench, "over")
    bench.img("create -f qcow2 -o cluster_size=4k,backing_file=disk,backing_fmt=qcow2 over 3M")
    look(bench, "over")


def dd(bench: Bench, combo: Combo, rng: random.Random) -> None:
    words = [f"bs={rng.choice((combo.unit, 512, 3000))}", f"skip={rng.randrange(3)}"]
    if rng.random() < 0.5:
        words.append(f"count={rng.randrange(3, 2000)}")
    bench.img(["dd", "-f", "qcow2", "-O", "qcow2", "if=disk", "of=copy", *words])
    look(bench, "copy")
    bench.img(["dd", "if=disk", "of=flat", "bs=64k"])
    bench.look("flat", "raw", alike=content_and_info)


def info(bench: Bench, combo: Combo, rng: random.Random) -> None:
    for line in ("info disk", "info -U disk", "info --backing-chain disk", "info -f raw disk"):
        say(bench, line)
    bench.img("create -q -f qcow2 -b disk -F qcow2 over")
    say(bench, "info --backing-chain over")


def map_(bench: Bench, combo: Combo, rng: random.Random) -> None:
    say(bench, "map disk")
    start = rng.randrange(0, combo.size, SECTOR)
    say(bench, f"map -s {start} -l {rng.randrange(SECTOR, 2 * MIB, SECTOR)} disk")
    bench.img("create -q -f qcow2 -b disk -F qcow2 over")
    say(bench, "map over")


def measure(bench: Bench, combo: Combo, rng: random.Random) -> None:
    say(bench, "measure disk")
    say(bench, "measure -O qcow2 disk")
    words = combo.words_for("made")
    if words:
        say(bench, f"measure -O qcow2 -o {words} disk")
        say(bench, f"measure -O qcow2 -o {words} --size {combo.size}")


def rebase(bench: Bench, combo: Combo, rng: random.Random) -> None:
    """The image onto another file and onto none, and an overlay from it onto another.

    Without a backing file and before 1.1, QEMU's lets the new file show through where there was
    nothing; with ours the disk stays what it was.
    """
    bench.img("create -q -f qcow2 -b disk -F qcow2 over", by=0)
    bench.img(f"create -q -f raw other {combo.size}", by=0)
    bench.write("other", "raw", [f"write -P 5 0 {max(combo.size // 3 // SECTOR, 1) * SECTOR}"])
    bench.img("rebase -b other -F raw over")
    look(bench, "over", layered=True)
    bench.img("rebase -u -b disk -F qcow2 over")
    if combo.backing is not None or combo.row["compat"] != "0.10":
        bench.img("rebase -f qcow2 -b other -F raw disk", code=None)
        look(bench, layered=True)
    bench.img("rebase -u -b other -F raw disk", by=0, code=None)
    bench.img(["rebase", "-b", "", "disk"])
    look(bench, layered=True)
    bench.img(["rebase", "-b", "", "over"])
    look(bench, "over", layered=True)


def resize(bench: Bench, combo: Combo, rng: random.Random) -> None:
    """Longer, and back to what it was in whole clusters; see test_formats_resize for more."""
    grows = not loose(combo)
    mode = rng.choice(AXES["qcow2"]["preallocation"])
    longer = combo.size + rng.randrange(1, 3 * min(combo.unit, MIB) // SECTOR) * SECTOR
    if grows:
        bench.img(["resize", f"--preallocation={mode}", "disk", str(longer)], code=None)
    look(bench, layered=True)
    shorter = max(combo.size // 2 // combo.unit, 1) * combo.unit
    bench.img(["resize", "disk", str(shorter)], code=None)
    bench.img(["resize", "-q", "--shrink", "disk", str(shorter)], code=None)
    look(bench, layered=True)


def snapshot(bench: Bench, combo: Combo, rng: random.Random) -> None:
    """Where a refcount cannot be 2, or the data are in another file, it is refused."""
    done = bench.img("snapshot -c one disk", code=None)
    bench.same("snapshot -l disk")
    if not done.code:
        pattern = Pattern(combo.size, combo.unit, rng, stamps=bench.stamps)
        bench.write("disk", "qcow2", pattern.fill(3, encodes=False), by=1)
        look(bench, layered=loose(combo))
        bench.img("snapshot -a one disk", by=0)
        bench.img("convert -l one -O raw disk flat")
        bench.look("flat", "raw", alike=content_and_info)
        bench.img("snapshot -d one disk")
    bench.img("snapshot -d nosuch disk", code=1)
    look(bench, layered=loose(combo) or bool(done.code))


WORK: dict[str, Work] = {
    "amend": amend,
    "bench": benchmark,
    "bitmap": bitmap,
    "check": check,
    "commit": commit,
    "compare": compare,
    "convert": convert,
    "create": make,
    "dd": dd,
    "info": info,
    "map": map_,
    "measure": measure,
    "rebase": rebase,
    "resize": resize,
    "snapshot": snapshot,
}

# ------------------------------------------------------------------------------ the matrix

ALL = option_matrix.pairs("qcow2")
SINGLES = option_matrix.singles("qcow2")
#: each subcommand with two rows, in turn: together they have every value twice at the least
FAST = {
    (name, SINGLES[(2 * turn + step) % len(SINGLES)])
    for turn, name in enumerate(WORK)
    for step in range(2)
}
CASES = [
    pytest.param(
        name, combo, id=f"{name}-{combo.name}", marks=() if (name, combo) in FAST else fast_not
    )
    for fast_not in (pytest.mark.slow,)
    for name in WORK
    for combo in sorted({*ALL, *(row for one, row in FAST if one == name)})
]


def test_every_subcommand_is_in_the_matrix(real) -> None:
    """Ours, as they are declared, and those that QEMU's help lists."""
    assert WORK.keys() == tools.IMG.commands.keys()
    said = real["qemu-img"].run("--help", cwd=Path.cwd()).out
    listed = said.split("Recognized commands")[1].partition("Supported image formats")[0]
    assert set(WORK) == {line.split()[0] for line in listed.splitlines() if " - " in line}


def test_every_create_option_is_in_the_matrix(real) -> None:
    """Ours, as they are declared, and those that QEMU's help lists; save encryption."""
    axes = set(AXES["qcow2"]).difference(NO_OPTIONS).union(*NO_OPTIONS.values())
    encryption = {option.name for option in ENCRYPTION}
    assert axes == {option.name for option in CREATE} - encryption
    said = real["qemu-img"].run("create", "-f", "qcow2", "-o", "help", cwd=Path.cwd()).out
    listed = {line.split("=")[0].strip() for line in said.splitlines() if "=<" in line}
    assert axes == listed - encryption
    for option in CREATE:
        if option.name in axes and option.choices and option.name in AXES["qcow2"]:
            assert set(AXES["qcow2"][option.name]) == set(option.choices), option.name
    assert {name for name, _ in FAST} == set(WORK)
    values = {value for _, combo in FAST for value in combo.values}
    assert values == {(axis, value) for axis, all in AXES["qcow2"].items() for value in all}


@pytest.mark.parametrize(("name", "combo"), CASES)
def test_subcommand(name: str, combo: Combo, both, folder: Path, rng: random.Random) -> None:
    """One side makes and fills the image, the other works on it."""
    bench = Bench(both, folder)
    create(bench, combo, rng)
    fill(bench, combo, rng, encodes=combo.encodes)
    WORK[name](bench, combo, rng)
