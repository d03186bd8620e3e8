"""Making, opening and comparing images of other virtual machine programs, for their tests."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from diskwright.block import registry
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from diskwright.block.policy import FollowAll
from diskwright.errors import DiskwrightError
from diskwright.operations import opening
from diskwright.operations.map import entries


def create(format: str, path: Path, size: int, **options: object) -> None:
    """A new image of ours."""
    cls = registry.driver_class(format)
    values = cls.create_options.validate(options)
    cls.create(Opener(read_only=False), size, {**values, "filename": str(path)})


def opened(format: str, path: Path | str, *, writable: bool = False, **options: object) -> Node:
    """An image, open with what it refers to."""
    spec: dict[str, object] = {"file": {"driver": "file", "filename": str(path)}, **options}
    return open_image(Opener(read_only=not writable), spec, format=format)


def content(format: str, path: Path) -> bytes:
    """All bytes of an image."""
    with opened(format, path) as node:
        return node.read(0, node.size)


def patched(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file; a negative offset counts from its end."""
    raw = bytearray(path.read_bytes())
    start = offset % len(raw)
    raw[start : start + len(data)] = data
    path.write_bytes(raw)


def scribble(node: Node, model: bytearray, rng: random.Random, count: int) -> None:
    """Random writes and zeroes, into a node and a model of it."""
    for _ in range(count):
        offset = rng.randrange(node.size)
        length = min(rng.randrange(1, rng.choice((700, 70_000, 3 << 20))), node.size - offset)
        if rng.random() < 0.25:
            node.write_zeroes(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            data = bytes([rng.randrange(1, 256)]) * length
            node.write(offset, data)
            model[offset : offset + length] = data


def qemu(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run one of QEMU's programs."""
    return subprocess.run(
        [program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def qemu_create(format: str, path: Path, size: int | str, **options: object) -> str:
    """A new image of qemu-img's; returns what it complained of."""
    words = ",".join(f"{name}={value}" for name, value in options.items())
    more = ["-o", words] if words else []
    done = qemu("qemu-img", "create", "-qf", format, *more, path.name, str(size), cwd=path.parent)
    return done.stderr


def qemu_scribble(
    format: str, path: Path, model: bytearray, rng: random.Random, count: int
) -> None:
    """As `scribble`, by qemu-io."""
    words: list[str] = []
    for _ in range(count):
        offset = rng.randrange(len(model))
        length = min(rng.randrange(1, rng.choice((700, 70_000, 3 << 20))), len(model) - offset)
        byte = rng.choice((0, rng.randrange(1, 256)))
        how = f"-P {byte}" if byte else "-z"
        words += ["-c", f"write {how} {offset} {length}"]
        model[offset : offset + length] = bytes([byte]) * length
    done = qemu("qemu-io", "-f", format, *words, path.name, cwd=path.parent)
    assert done.returncode == 0, done.stderr + done.stdout


def qemu_content(format: str, path: Path) -> bytes:
    """All bytes of an image as qemu-img reads them."""
    raw = path.with_suffix(".by-qemu")
    done = qemu(
        "qemu-img", "convert", "-f", format, "-O", "raw", path.name, raw.name, cwd=path.parent
    )
    assert done.returncode == 0, done.stderr
    data = raw.read_bytes()
    raw.unlink()
    return data


def qemu_map(format: str, path: Path) -> list[dict[str, object]]:
    """The runs of an image as qemu-img has them."""
    done = qemu("qemu-img", "map", "-f", format, "--output=json", path.name, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def our_map(format: str, path: Path) -> list[dict[str, object]]:
    """The same, as ours."""
    names = ("start", "length", "depth", "present", "zero", "data", "compressed", "offset")
    with opened(format, path) as node:
        runs = [{name: getattr(entry, name) for name in names} for entry in entries(node)]
    return [{k: v for k, v in run.items() if k != "offset" or v is not None} for run in runs]


def qemu_opens(format: str, path: Path, **options: str) -> tuple[object, ...]:
    """(virtual size, cluster size), or QEMU's error line, when qemu-img opens an image."""
    if options:
        words = "".join(f",{name}={value}" for name, value in options.items())
        name = ["--image-opts", f"driver={format},file.filename={path.name}{words}"]
    else:
        name = ["-f", format, path.name]
    done = qemu("qemu-img", "info", "--output=json", *name, cwd=path.parent)
    if done.returncode:
        return (done.stderr.strip().removeprefix("qemu-img: "),)
    found = json.loads(done.stdout)
    return found["virtual-size"], found.get("cluster-size")


def we_open(format: str, path: Path, **options: str) -> tuple[object, ...]:
    """As `qemu_opens`, by us, run in the folder of the image."""
    words = "".join(f",{name}={value}" for name, value in options.items())
    shown = f"driver={format},file.filename={path.name}{words}" if options else path.name
    image = opening.Image(
        path.name, format=format, options=dict(options), policy=FollowAll(), shown=shown
    )
    try:
        with opening.open_image(image, follow_backing=False) as node:
            return node.size, node.info().cluster_size
    except DiskwrightError as error:
        return (error.qemu_message,)


def we_open_here(format: str, path: Path, **options: str) -> tuple[object, ...]:
    """As `we_open`, with the name that QEMU was given in its own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        return we_open(format, path, **options)
