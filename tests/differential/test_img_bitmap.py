"""`bitmap`, and bitmaps under everything else that changes an image: as qemu-img has them.

Both programs do the same in folders that begin alike; `io` lines are run by qemu-io in both, so
that bitmaps change hands. Then the bits of every bitmap are read by qemu-nbd and compared.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

import diskwright
from tests.differential.img_pairs import Pair
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

SCENARIOS = {
    "begin and end": """
        bitmap --add a.q one
        bitmap --add -g 4k a.q two
        bitmap --add -g 1M --disable a.q three
        info a.q
        bitmap --remove a.q two
        info a.q
        bitmap --remove a.q one
        bitmap --remove a.q three
        info a.q
    """,
    "taken names, wrong numbers": """
        bitmap --add a.q one
        bitmap --add a.q one
        bitmap --add -g 100 a.q two
        bitmap --add -g 256 a.q two
        bitmap --add -g 4G a.q two
        bitmap --add -g 2G a.q two
        bitmap --add -g 0 a.q zero
        bitmap --add a.q ''
        bitmap --clear a.q nope
        bitmap --merge nope a.q one
        bitmap --merge one a.q nope
        bitmap --disable --add a.q new
        bitmap --add --clear --clear --disable --remove a.q new
        info a.q
    """,
    "notes what is written": """
        bitmap --add a.q one
        bitmap --add -g 512 a.q fine
        bitmap --add --disable a.q off
        io a.q write 70000 100
        io a.q discard 1M 70000
        io a.q write -z 2M 1000
        io a.q write -c 3M 64k
        bitmap --disable a.q one
        io a.q write 4M 1M
        bitmap --enable a.q one
        bitmap --clear a.q fine
        io a.q write 6M 1k
        info a.q
    """,
    "merge": """
        bitmap --add -g 512 a.q fine
        io a.q write 70000 100
        bitmap --add -g 64k a.q coarse
        io a.q write 1M 100
        bitmap --add -g 1M a.q all
        bitmap --merge fine --merge coarse a.q all
        bitmap --merge all a.q fine
        bitmap --merge fine a.q fine
        io b.q write 5M 1M
        bitmap --merge other -b b.q -F qcow2 a.q coarse
        bitmap --merge other -b b.q a.q coarse
        bitmap --merge nope -b b.q a.q coarse
        bitmap --merge b -b long.q a.q coarse
        bitmap --add --merge other --disable -b b.q a.q copy
        info a.q
    """,
    "other sizes": """
        bitmap --add -g 512 a.q fine
        bitmap --add --disable a.q off
        io a.q write 0 100
        io a.q write 7M 1M
        resize a.q 20M
        io a.q write 15M 1M
        resize --shrink a.q 8000k
        resize a.q 8001k
        info a.q
    """,
    "snapshots": """
        bitmap --add a.q one
        io a.q write 0 1M
        snapshot -c s a.q
        io a.q write 2M 1M
        snapshot -a s a.q
        snapshot -a nope a.q
        snapshot -d s a.q
        bitmap --remove a.q one
        snapshot -c t a.q
        snapshot -a t a.q
    """,
    "commit and rebase": """
        create -q -f qcow2 -b a.q -F qcow2 over.q
        bitmap --add a.q below
        bitmap --add over.q above
        io over.q write 3M 1M
        commit over.q
        bitmap --add --merge above -b over.q -F qcow2 a.q got
        info a.q
        io over.q write 5M 64k
        rebase -b b.q -F qcow2 over.q
        info over.q
    """,
    "convert": """
        bitmap --add a.q one
        bitmap --add -g 512 a.q fine
        io a.q write 1M 100
        bitmap --disable a.q one
        io a.q write 2M 100
        convert --bitmaps -O qcow2 a.q t.q
        info t.q
        convert --bitmaps -n -O qcow2 a.q t.q
        convert --bitmaps -c -O qcow2 a.q c.q
        convert -n -O qcow2 b.q t.q
        convert --bitmaps --skip-broken-bitmaps -O qcow2 -o cluster_size=4k a.q u.q
        info u.q
        convert --bitmaps -O raw a.q r
        convert --bitmaps -O qcow2 -o compat=0.10 a.q r
        convert --bitmaps -O qcow2 r.raw r
    """,
    "convert to one beside others": """
        create -q -f qcow2 -b a.q -F qcow2 over.q
        bitmap --add over.q one
        bitmap --add -g 512 over.q fine
        io over.q write 1M 100
        convert --bitmaps -O qcow2 -B a.q -F qcow2 over.q t.q
        info t.q
        convert --bitmaps -c -O qcow2 -o backing_file=a.q,backing_fmt=qcow2 over.q u.q
        convert --bitmaps -O qcow2 -o data_file=v.raw over.q v
        info v
        convert --bitmaps -O qcow2 -o data_file=w.raw,data_file_raw=on over.q w
        info w
    """,
    "over a long name": """
        create -q -f qcow2 -b ./././././././././././././././././././././a.q -F qcow2 named.q
        bitmap --add named.q one
        info named.q
        bitmap --remove named.q one
        info named.q
    """,
    "convert over it": """
        bitmap --add a.q one
        bitmap --add -g 512 a.q fine
        convert -n -O qcow2 full.raw a.q
        bitmap --clear a.q fine
        bitmap --clear a.q one
        convert -n -C -O qcow2 part.raw a.q
        bitmap --clear a.q fine
        convert -n -c -O qcow2 part.raw b.q
        bitmap --add b.q inner
        io b.q write 0 1M
        bitmap --merge inner -b b.q a.q one
    """,
    "not saved": """
        bitmap --add a.q one
        bitmap --add --disable a.q off
        kill a.q write 0 100
        info a.q
        bitmap --clear a.q one
        bitmap --enable a.q one
        bitmap --disable a.q one
        bitmap --merge one a.q off
        bitmap --merge off a.q one
        bitmap --add a.q one
        bitmap --add --merge one a.q new
        resize a.q 20M
        snapshot -a s a.q
        convert --bitmaps -O qcow2 a.q t.q
        convert --bitmaps --skip-broken-bitmaps -O qcow2 a.q t.q
        info t.q
        io a.q write 1M 1M
        info a.q
        bitmap --remove --add a.q one
        bitmap --remove a.q off
        info a.q
    """,
    "small clusters": """
        create -q -f qcow2 -o cluster_size=512 s.q 8M
        bitmap --add -g 512 s.q fine
        io s.q write 0 5M
        io s.q write 6M 1
        bitmap --add s.q one
        bitmap --merge fine s.q one
        info s.q
    """,
    "as options": """
        bitmap --add --image-opts driver=qcow2,file.filename=a.q one
        bitmap --object secret,id=s,data=1 --add -f qcow2 a.q two
        info a.q
    """,
    "too much": """
        create -q -f qcow2 huge.q 16T
        bitmap --add -g 512 huge.q x
        bitmap --add -g 8k huge.q x
        io huge.q write 15T 1M
        info huge.q
    """,
    "check": """
        bitmap --add a.q one
        bitmap --add -g 512 a.q fine
        io a.q write 0 3M
        check -r leaks a.q
        check -r all a.q
        info a.q
    """,
}

_NODE = re.compile(r"#?block\d+")


def nodeless(text: str) -> str:
    """`text` without names that programs give to nodes, and one full line where QEMU has a cut."""
    text = text.replace("image file to PROGRAM:", "image file to fix.\nPROGRAM:")
    text = re.sub(r"image file to fix\.\n?", "image file to fix.\n", text)
    text = re.sub(r"Image end offset: \d+", "Image end offset", text)
    return _NODE.sub("#block", text)


def lengthless(text: str) -> str:
    """As `nodeless`, without the length of the file: places are chosen in another order."""
    return re.sub(r"(file length: ).*", r"\1", nodeless(text))


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    for line in (
        "create -q -f qcow2 a.q 10M",
        "create -q -f qcow2 b.q 10M",
        "create -q -f qcow2 long.q 20M",
        "create -q -f raw r.raw 1M",
        "bitmap --add b.q other",
        "bitmap --add long.q b",
    ):
        assert real["qemu-img"].run(*line.split(), cwd=folder).code == 0
    (folder / "full.raw").write_bytes(b"full" * (10 << 18))
    part = bytearray(10 << 20)
    for start, length in ((1 << 20, 1 << 20), (3 << 20, 700), (5_000_000, 100_000)):
        part[start : start + length] = b"\7" * length
    (folder / "part.raw").write_bytes(part)
    return folder


def names_of(real: dict[str, Program], image: Path) -> dict[str, list[str]]:
    """name -> flags, as qemu-img tells them."""
    done = real["qemu-img"].run("info", "-U", "--output=json", str(image), cwd=image.parent)
    data = json.loads(done.out)["format-specific"]["data"]
    return {one["name"]: one["flags"] for one in data.get("bitmaps", [])}


def bits_of(real: dict[str, Program], image: Path, name: str) -> list[tuple[int, int]]:
    """The dirty runs of a bitmap, as qemu-nbd exports them."""
    folder = image.parent
    socket = folder / "nbd.sock"
    words = ["-r", "-f", "qcow2", "-B", name, "-k", str(socket), "-x", "", str(image)]
    server = subprocess.Popen(
        real["qemu-nbd"].argv(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder
    )
    try:
        for _ in range(400):
            if socket.exists() or server.poll() is not None:
                break
            time.sleep(0.01)
        options = (
            f"driver=nbd,export=,server.type=unix,server.path={socket},"
            f"x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        )
        done = real["qemu-img"].run("map", "--output=json", "--image-opts", options, cwd=folder)
        assert done.code == 0, done
    finally:
        server.terminate()
        server.communicate()
        socket.unlink(missing_ok=True)
    found: list[tuple[int, int]] = []
    for entry in json.loads(done.out):
        if entry["present"]:
            continue
        start, length = entry["start"], entry["length"]
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def same_bitmaps(real: dict[str, Program], pair: Pair, name: str) -> None:
    """Both folders' images have bitmaps of the same names, flags and bits, and are sound."""
    images = [folder / name for folder in pair.folders]
    for image in images:
        checked = real["qemu-img"].run("check", str(image), cwd=image.parent)
        assert checked.code == 0, checked
    theirs, ours = (names_of(real, image) for image in images)
    assert list(theirs) == list(ours)
    for bitmap, flags in ours.items():
        # One that QEMU had not to save, though it set the flag, may be in order here.
        if "in-use" in flags or "in-use" in theirs[bitmap]:
            assert "in-use" in theirs[bitmap]
            continue
        assert flags == theirs[bitmap]
        bits = [bits_of(real, image, bitmap) for image in images]
        assert bits[0] == bits[1], bitmap
        with diskwright.open(images[0]) as node:  # and we read theirs alike
            assert list(node.dirty_bitmap(bitmap).runs()) == bits[0]


@pytest.mark.parametrize(("name", "lines"), SCENARIOS.items(), ids=SCENARIOS)
def test_scenario(name: str, lines: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    touched: set[str] = set()
    for line in lines.strip().splitlines():
        what, *rest = shlex.split(line)
        if what in ("io", "kill"):
            image, *command = rest
            end = ["-c", "sigraise 9"] if what == "kill" else []
            for folder in pair.folders:
                done = real["qemu-io"].run(
                    "-f", "qcow2", "-c", shlex.join(command), *end, image, cwd=folder
                )
                assert done.code == 0 or end, done
        else:
            pair.same(line.strip(), form=lengthless)
        touched.update(word for word in rest if word.endswith(".q"))
    for image in sorted(touched):
        if all((folder / image).exists() for folder in pair.folders):
            same_bitmaps(real, pair, image)


WRONG = """
bitmap
bitmap a.q
bitmap a.q b
bitmap --add a.q
bitmap --add
bitmap --add a.q b c
bitmap --add --image-opts -f qcow2 a.q b
bitmap --image-opts -f qcow2 a.q b
bitmap --add -g x a.q b
bitmap --add -g -1 a.q b
bitmap --clear -g 4k a.q b
bitmap -g 4k a.q b
bitmap --clear -g 0 a.q b
bitmap --merge x -F qcow2 a.q b
bitmap -F qcow2 a.q b
bitmap --clear -F qcow2 -b b.q a.q b
bitmap --clear -b b.q a.q b
bitmap --clear -b b.q a.q
bitmap -g 4k --clear -b b.q a.q
bitmap --merge
bitmap --merge x a.q b
bitmap --merge=x a.q b
bitmap --merge x -b nofile a.q b
bitmap --merge x -b a.q a.q b
bitmap --merge x -b r.raw -F qcow2 a.q b
bitmap --merge x -b r.raw -F raw a.q b
bitmap --merge x -b r.raw -F foo a.q b
bitmap --remove a.q b
bitmap --clear a.q b
bitmap --enable a.q b
bitmap --disable a.q b
bitmap --rem a.q b
bitmap --add=x a.q b
bitmap --x a.q b
bitmap -q --add a.q b
bitmap -U --add a.q b
bitmap --add nofile b
bitmap --add -f foo a.q b
bitmap --add -f raw a.q b
bitmap --remove -f raw a.q b
bitmap --add -f vdi a.q b
bitmap --add r.raw b
bitmap --remove r.raw b
bitmap --add old.q b
bitmap --remove old.q b
bitmap --add --object foo,id=x a.q b
bitmap --add a.vdi b
bitmap --add a.vpc b
""".strip().splitlines()


@pytest.fixture(scope="module")
def plain_images(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    for line in (
        "create -q -f qcow2 a.q 1M",
        "create -q -f qcow2 b.q 1M",
        "create -q -f qcow2 -o compat=0.10 old.q 1M",
        "create -q -f vdi a.vdi 1M",
        "create -q -f vpc a.vpc 1M",
        "create -q -f raw r.raw 1M",
    ):
        assert real["qemu-img"].run(*line.split(), cwd=folder).code == 0
    return folder


@pytest.mark.parametrize("line", WRONG)
def test_wrong_call(line: str, real, ours, plain_images: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, plain_images)
    assert pair.same(line, form=nodeless).code != 0


@pytest.mark.parametrize("length", [1023, 1024, 5000])
def test_long_names(length: int, real, ours, plain_images: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, plain_images)
    pair.same(["bitmap", "--add", "a.q", "n" * length], form=nodeless)
    same_bitmaps(real, pair, "a.q")


# ------------------------------------------------------------------------------------- the guest


def random_steps(rng: random.Random, size: int) -> list[str]:
    """Commands of qemu-io."""
    steps = []
    for _ in range(rng.randrange(1, 12)):
        offset = rng.randrange(size)
        length = min(rng.choice((1, 512, 4096, 65536, 300_000)), size - offset)
        what = rng.choice(("write", "write", "write -z", "write -z -u", "discard"))
        if what == "discard":  # QEMU notes even what is too short to be discarded
            offset, length = offset // 65536 * 65536, 65536 * rng.randrange(1, 4)
            length = min(length, size - offset)
        steps.append(f"{what} {offset} {length}")
    return steps


def act(image: Path, steps: list[str]) -> None:
    """The same, by the library."""
    with diskwright.open(image, read_only=False, options={"discard": "unmap"}) as node:
        for step in steps:
            *words, offset, length = step.split()
            at, count = int(offset), int(length)
            if words[0] == "discard":
                node.discard(at, count)
            elif "-z" in words:
                node.write_zeroes(at, count, unmap="-u" in words)
            else:
                node.write(at, b"\xcd" * count)


@pytest.mark.parametrize("options", ["", "-o cluster_size=4k", "-o extended_l2=on"])
def test_writes_are_noted_as_qemu_notes_them(options: str, real, ours, tmp_path: Path, rng) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare(
        f"create -q -f qcow2 {options} g.q 5M",
        "bitmap --add g.q one",
        "bitmap --add -g 512 g.q fine",
        "bitmap --add -g 1M --disable g.q off",
    )
    for _ in range(6):
        steps = random_steps(rng, 5 << 20)
        commands = [word for step in steps for word in ("-c", step)]
        done = real["qemu-io"].run(
            "-f", "qcow2", "-d", "unmap", *commands, "g.q", cwd=pair.folders[0]
        )
        assert done.code == 0, done
        act(pair.folders[1] / "g.q", steps)
        same_bitmaps(real, pair, "g.q")
        pair.same_disks("g.q")


def test_a_writer_that_is_killed_leaves_the_flag(real, tmp_path: Path) -> None:
    image = tmp_path / "k.q"
    diskwright.create(image, "1M", format="qcow2")
    diskwright.bitmap(image, "on", "add")
    diskwright.bitmap(image, "off", "add", "disable")
    code = (
        "import diskwright, os, sys\n"
        "node = diskwright.open(sys.argv[1], read_only=False)\n"
        "if sys.argv[2]: node.write(0, b'x')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    import sys

    subprocess.run([sys.executable, "-c", code, str(image), ""], check=False)
    assert names_of(real, image) == {"on": ["auto"], "off": []}  # nothing was missed
    subprocess.run([sys.executable, "-c", code, str(image), "write"], check=False)
    assert names_of(real, image) == {"on": ["in-use", "auto"], "off": []}
    assert real["qemu-img"].run("check", str(image), cwd=tmp_path).code == 0
    diskwright.bitmap(image, "on", "remove")
    assert names_of(real, image) == {"off": []}
    assert real["qemu-img"].run("check", str(image), cwd=tmp_path).code == 0


def test_a_disk_that_is_too_full_for_the_bitmaps(real, ours, tmp_path) -> None:
    """A device of a certain size, and a commit that fills it: the same line twice, the same code.

    Which bitmap is the first without room is not compared: ours fits more into the same space.
    """
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 base 64M")
    for number in range(24):
        pair.prepare(f"bitmap --add base stale-{number}")
    file = '{"driver":"raw","size":9437184,"file":{"driver":"file","filename":"base"}}'
    base = 'json:{"driver":"qcow2","file":' + file + "}"
    for folder in pair.folders:
        os.truncate(folder / "base", 9437184)
        made = real["qemu-img"].run(
            "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", "a", cwd=folder
        )
        assert made.code == 0, made
        real["qemu-io"].run("-c", "write -q 0 5M", "a", cwd=folder)

    def form(text: str) -> str:
        return re.sub(r"'(#block\d+|stale-\d+)'", "'NAME'", text)

    said = pair.same("commit -d a", form=form, expect=1)
    assert said.err.count("Lost persistent bitmaps") == 2


def test_bitmaps_over_a_backing_file_that_is_gone(real, ours, tmp_path: Path) -> None:
    """They are the image's own: what lies below is not opened."""
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f raw gone 1M", "create -q -f qcow2 -b gone -F raw image")
    for folder in pair.folders:
        (folder / "gone").unlink()
    for words in ("--add", "--disable", "--clear", "--enable"):
        pair.same(f"bitmap {words} image b", expect=0)
    for folder in pair.folders:
        assert real["qemu-img"].run("rebase", "-u", "-b", "", "image", cwd=folder).code == 0
    pair.same_disks("image")
