"""Block and character devices as images and as targets, beside qemu-img, on a real loop device."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import diskwright
from diskwright.block.opener import Opener, open_image
from diskwright.errors import NoSpaceError
from tests.conftest import require
from tests.differential.img_pairs import plain
from tests.differential.programs import Program, Result

pytestmark = pytest.mark.peer

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A loop device of `SIZE` bytes."""
    backing = tmp_path_factory.mktemp("device") / "disk"
    backing.touch()
    with backing.open("wb") as file:
        file.truncate(SIZE)
    try:
        made = subprocess.run(
            ["losetup", "-f", "--show", str(backing)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        require("losetup")
        return
    if made.returncode:
        require("loop devices")
    name = made.stdout.strip()
    yield name
    subprocess.run(["losetup", "-d", name], check=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small").write_bytes(random.Random(1).randbytes(4 * MIB))
    (tmp_path / "large").write_bytes(random.Random(2).randbytes(20 * MIB))
    return tmp_path


def both(
    device: str, folder: Path, real: dict[str, Program], ours: Program, *lines: str
) -> tuple[Result, Result]:
    """Run the lines by each program on a device with the same old content.

    All but the last are by qemu-img; the last one's words must be the same.
    """
    results = []
    for program in (real["qemu-img"], ours):
        with open(device, "r+b") as file:
            file.write(random.Random(3).randbytes(SIZE))
        for line in lines[:-1]:
            done = real["qemu-img"].run(*line.replace("DEV", device).split(), cwd=folder)
            assert done.code == 0, done
        results.append(program.run(*lines[-1].replace("DEV", device).split(), cwd=folder))
    wanted, got = results
    assert plain(got.out) == plain(wanted.out)
    assert plain(got.err) == plain(wanted.err)
    assert got.code == wanted.code
    return wanted, got


@pytest.mark.parametrize(
    "line",
    [
        "create -f raw DEV 10M",
        "create -f raw DEV 20M",
        "create -f raw -o preallocation=full DEV 10M",
        "create -f host_device DEV 10M",
        "create -f host_device none 10M",
        "create -f host_device small 10M",
        "create -f qcow2 DEV 10M",
        "create -f qcow2 host_device:DEV 10M",
        "create -f qcow2 -o preallocation=metadata DEV 10M",
        "create -f qcow2 -o preallocation=metadata DEV 100M",
        "create -f qcow2 -o preallocation=full DEV 10M",
        "create -f qcow2 -o preallocation=falloc DEV 10M",
        "create -f qcow2 -o data_file=DEV t 10M",
        "create -f qcow2 -o data_file=DEV,data_file_raw=on t 10M",
        "create -f qcow2 -o data_file=DEV,preallocation=falloc t 10M",
        "create -f qcow2 -o data_file=DEV t 100M",
        "create -f qcow2 -o data_file=/dev/null t 1M",
        "create -f qcow2 -o data_file=DEV t 0",
        "create -f vdi DEV 10M",
        "create -f vdi -o static=on DEV 10M",
        "create -f vpc DEV 10M",
        "create -f vpc -o subformat=fixed DEV 100M",
        "create -f raw /dev/null 1M",
        "create -f raw /dev/null 0",
        "convert -O raw small DEV",
        "convert -O raw large DEV",
        "convert -n -O raw small DEV",
        "convert -n -O raw large DEV",
        "convert -O host_device small DEV",
        "convert -n -O host_device small DEV",
        "convert -O qcow2 small DEV",
        "convert -c -O qcow2 small DEV",
        "convert -O vdi small DEV",
        "convert -O vpc small DEV",
        "convert -O vpc -o subformat=fixed small DEV",
        "convert -f raw -O raw DEV copy",
        "convert -O raw /dev/null copy",
        "convert -O raw small /dev/null",
        "convert -n -O raw small /dev/null",
        "info DEV",
        "info --output=json -f raw DEV",
        "info -f host_device DEV",
        "info -f file DEV",
        "info host_device:DEV",
        "info --image-opts driver=host_device,filename=DEV",
        "info --image-opts driver=qcow2,file.driver=file,file.filename=DEV",
        "info -f host_device small",
        "info /dev/null",
        "info -f raw /dev/zero",
        "resize -f raw DEV 20M",
        "resize -f raw --shrink DEV 10M",
        "map --output=json -f raw DEV",
        "compare -f raw -F raw small DEV",
    ],
)
def test_a_command_on_a_device(line, device, folder, real, ours):
    both(device, folder, real, ours, line)


@pytest.mark.parametrize(
    "line",
    [
        "convert -n -O qcow2 small DEV",
        "resize DEV 12M",
        "resize --shrink DEV 1M",
        "snapshot -c name DEV",
        "info DEV",
        "check DEV",
        "map --output=json DEV",
    ],
)
def test_a_command_on_an_image_on_a_device(line, device, folder, real, ours):
    both(device, folder, real, ours, "create -f qcow2 DEV 10M", line)
    checked = real["qemu-img"].run("check", "-f", "qcow2", device, cwd=folder)
    assert checked.code == 0, checked


def stored(format: str, **window: int) -> str:
    """An image of that format on the device, with an explicit raw node between."""
    raw = {"driver": "raw", **window, "file": {"driver": "host_device", "filename": "DEV"}}
    spec = raw if format == "raw" else {"driver": format, "file": raw}
    return "json:" + json.dumps(spec, separators=(",", ":"))


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vpc"])
@pytest.mark.parametrize(
    "line",
    [
        "resize IMAGE 8M",
        "resize --preallocation=full IMAGE 8M",
        "resize --shrink IMAGE 1M",
        "convert -n -O FORMAT small IMAGE",
        "map --output=json IMAGE",
    ],
)
def test_an_image_over_raw_over_a_device(line, format, device, folder, real, ours):
    size = "-o force_size" if format == "vpc" else ""
    line = line.replace("IMAGE", stored(format)).replace("FORMAT", format)
    both(device, folder, real, ours, f"create -f {format} {size} DEV 4M", line)


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vpc"])
def test_an_image_over_raw_over_a_device_is_filled(format, device, folder, real, ours):
    size = "-o force_size" if format == "vpc" else ""
    written = []
    line = f"convert -n -O {format} small {stored(format)}"
    for program in (real["qemu-img"], ours):
        both(device, folder, real, real["qemu-img"], f"create -f {format} {size} DEV 4M")
        done = program.run(*line.replace("DEV", device).split(), cwd=folder)
        assert done.code == 0, done
        compared = real["qemu-img"].run("compare", "-F", format, "small", device, cwd=folder)
        written.append((compared.code, compared.out))
    assert written[0] == written[1] == (0, "Images are identical.\n")


@pytest.mark.parametrize(
    "line",
    [
        "resize RAW 20M",
        "resize RAW 16M",
        "resize --shrink RAW 8M",
        "resize --preallocation=full RAW 20M",
        "resize WINDOW 20M",
        "resize SHIFTED 20M",
        "resize --shrink SHIFTED 2M",
        "resize -f host_device DEV 20M",
        "resize --shrink -f host_device DEV 1M",
        "resize --preallocation=full -f host_device DEV 20M",
    ],
)
def test_a_device_is_not_resized(line, device, folder, real, ours):
    for word, spec in (
        ("RAW", stored("raw")),
        ("WINDOW", stored("raw", size=MIB)),
        ("SHIFTED", stored("raw", offset=MIB)),
    ):
        line = line.replace(word, spec)
    both(device, folder, real, ours, line)


@pytest.mark.parametrize(
    "spec",
    [stored("raw"), stored("raw", size=MIB), stored("vpc"), stored("vdi"), stored("qcow2")],
    ids=["raw", "window", "vpc", "vdi", "qcow2"],
)
def test_committed_into_what_is_too_short_on_a_device(spec, device, folder, real, ours):
    format = json.loads(spec.removeprefix("json:"))["driver"]
    for program, words in (
        ("qemu-img", ["create", "-f", "qcow2", "top", "20M"]),
        ("qemu-io", ["-c", "write -P 7 18M 64k", "top"]),
        ("qemu-img", ["rebase", "-u", "-b", spec.replace("DEV", device), "-F", format, "top"]),
    ):
        done = real[program].run(*words, cwd=folder)
        assert done.code == 0, done
    lines = [] if format == "raw" else [f"create -f {format} DEV 4M"]
    both(device, folder, real, ours, *lines, "commit -d top")


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vpc -o force_size"])
def test_what_is_converted_onto_a_device_is_the_disk(format, device, folder, real, ours):
    both(device, folder, real, ours, f"convert -O {format} small DEV")
    compared = real["qemu-img"].run("compare", "-F", format.split()[0], "small", device, cwd=folder)
    assert compared.code == 0, compared


IN_A_DATA_FILE = ["data_file=DEV", "data_file=DEV,data_file_raw=on"]
IN_A_DATA_FILE += [
    f"{words},{more}"
    for words in IN_A_DATA_FILE
    for more in ("preallocation=metadata", "preallocation=falloc", "extended_l2=on")
]


@pytest.mark.parametrize("options", IN_A_DATA_FILE)
def test_what_is_converted_into_a_device_of_data_is_the_disk(options, device, folder, real, ours):
    """What was on the device before shows nowhere."""
    (folder / "holes").write_bytes(bytes(MIB) + random.Random(4).randbytes(MIB) + bytes(3 * MIB))
    both(device, folder, real, ours, f"convert -f raw -O qcow2 -o {options} holes t")
    for line in ("compare -f raw -F qcow2 holes t", "check -q t"):
        done = real["qemu-img"].run(*line.split(), cwd=folder)
        assert done.code == 0, done
    if "data_file_raw" in options:
        with open(device, "rb") as file:
            assert file.read(5 * MIB) == (folder / "holes").read_bytes()


@pytest.mark.parametrize("raw", ["on", "off"])
def test_an_image_with_its_data_on_a_device_is_not_made_shorter(raw, device, folder, real, ours):
    made = f"create -f qcow2 -o data_file=DEV,data_file_raw={raw} t 10M"
    both(device, folder, real, ours, made, "resize --shrink t 5M")
    told = json.loads(real["qemu-img"].run("info", "--output=json", "t", cwd=folder).out)
    assert told["virtual-size"] == 10 * MIB


@pytest.fixture
def protected(device: str) -> Iterator[str]:
    subprocess.run(["blockdev", "--setro", device], check=True)
    yield device
    subprocess.run(["blockdev", "--setrw", device], check=True)


@pytest.mark.parametrize(
    "line",
    [
        "info -f raw DEV",
        "convert -f raw -O raw DEV copy",
        "resize -f raw DEV 16M",
        "convert -n -f raw -O raw /dev/null DEV",
        "convert -n -f raw -O raw small DEV",
        "create -f raw DEV 1M",
        "create -f qcow2 DEV 1M",
        "create -f qcow2 -o data_file=DEV t 1M",
        "bench -w -c 1 -f raw DEV",
        "check -r all -f qcow2 DEV",
        "commit overlay",
    ],
)
def test_a_device_that_is_write_protected(line, protected, folder, real, ours):
    """It is not opened for writing, though the system would."""
    made = ["create", "-q", "-f", "qcow2", "-b", protected, "-F", "raw", "overlay"]
    assert real["qemu-img"].run(*made, cwd=folder).code == 0
    wanted, got = (
        program.run(*line.replace("DEV", protected).split(), cwd=folder)
        for program in (real["qemu-img"], ours)
    )
    assert plain(got.err) == plain(wanted.err)
    assert got.code == wanted.code


@pytest.mark.parametrize(
    "commands",
    [
        ["truncate 4M", "length", "read 15M 1k", "write 15M 1k", "truncate 17M", "length"],
        ["reopen -r", "length", "reopen -w", "truncate 0", "write 1M 1k", "length"],
    ],
)
def test_a_device_keeps_its_size_for_who_goes_on(commands, device, folder, real, io):
    words = [word for command in commands for word in ("-c", command)]
    told = []
    for program in (real["qemu-io"], io):
        done = program.run("-f", "raw", *words, device, cwd=folder)
        told.append((done.code, [line for line in done.out.splitlines() if "ops; " not in line]))
        told[-1] += (plain(done.err),)
    assert told[0] == told[1]
    assert "16 MiB" in told[0][1]


def test_a_device_that_is_too_small(device, folder, real, ours):
    with open(device, "r+b") as file:
        file.write(bytes(SIZE))
    for program in (real["qemu-img"], ours):
        done = program.run("convert", "-O", "qcow2", "large", device, cwd=folder)
        assert done.code == 1
        assert done.err.startswith(f"{program.name}: error while writing at byte ")
        assert done.err.endswith(": No space left on device\n")


def test_a_device_ends_where_it_ends(device):
    """The system zeroes up to the end and calls that done."""
    diskwright.create(device, MIB, format="qcow2")
    with open_image(Opener(read_only=False), device, format="qcow2") as node:
        with node.graph.request(), pytest.raises(NoSpaceError):
            node.file.write_zeroes(SIZE - 4096, 8192)
