"""Images of other programs: their content, or that they are refused, as the corpus's manifest says.

The corpus lies beside the repository, or where DISKWRIGHT_CORPUS says. Its README tells how the
hashes are made.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from pathlib import Path

import pytest

import diskwright
from diskwright.block.extent import DATA
from diskwright.block.node import Node
from diskwright.errors import DiskwrightError

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(os.environ.get("DISKWRIGHT_CORPUS") or ROOT.parent / "shared" / "corpus")
FORMATS = ("raw", "qcow2", "vdi", "vpc")
BLOCK = 65536


def manifest() -> list[dict[str, object]]:
    path = CORPUS / "manifest.json"
    if not path.is_file():
        return []
    images = json.loads(path.read_text())
    return [image for image in images if image["format"] in FORMATS]


IMAGES = manifest()

pytestmark = pytest.mark.skipif(
    not IMAGES, reason="the corpus is not here: DISKWRIGHT_CORPUS names its folder"
)


def unpacked(name: str, folder: Path) -> Path:
    """An image of the corpus as a sparse file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(CORPUS / "images" / f"{name}.xz") as packed, path.open("wb") as file:
        while part := packed.read(BLOCK):
            if part.count(0) == len(part):
                file.seek(len(part), os.SEEK_CUR)
            else:
                file.write(part)
        file.truncate()
    return path


def hash_of(node: Node) -> str:
    """Over each block that is not all zero: its number, and its bytes."""
    found = hashlib.sha256()
    done = 0  # blocks before this one were looked at
    for extent in node.extents(0, node.size):
        if extent.kind != DATA:
            continue
        first = max(extent.offset // BLOCK, done)
        done = max(-(-extent.end // BLOCK), done)
        for number in range(first, done):
            length = min(BLOCK, node.size - number * BLOCK)
            block = node.read(number * BLOCK, length)
            if block.count(0) != length:
                found.update(number.to_bytes(8, "big"))
                found.update(block.ljust(BLOCK, b"\0"))
    return found.hexdigest()


def ids(image: dict[str, object]) -> str:
    return f"{image['format']}:{image['file']}"


@pytest.mark.parametrize("image", IMAGES, ids=ids)
def test_an_image_of_others_is_read_right_or_refused(
    tmp_path: Path, image: dict[str, object]
) -> None:
    path = unpacked(str(image["file"]), tmp_path)
    chain = image["chain"]
    assert isinstance(chain, list)
    for name in chain:
        unpacked(name, tmp_path)
    before = path.stat().st_mtime_ns
    options = {"policy": diskwright.FollowAll()}
    if image["expect"] == "refused":
        with pytest.raises(DiskwrightError) as caught:
            read(path, str(image["format"]), options)
        assert str(caught.value)
    else:
        try:
            size, content = read(path, str(image["format"]), options)
        except DiskwrightError:
            if not image.get("refusal_allowed"):
                raise
        else:
            assert size in (image["virtual_size"], image.get("virtual_size_also"))
            assert content == image["sha256_nonzero"]
    assert path.stat().st_mtime_ns == before


def read(path: Path, format: str, options: dict[str, object]) -> tuple[int, str]:
    with diskwright.open(str(path), format=format, **options) as node:
        return node.size, hash_of(node)


@pytest.mark.parametrize("image", IMAGES, ids=ids)
def test_an_image_of_others_is_recognised(tmp_path: Path, image: dict[str, object]) -> None:
    """Without being told what it is; a fixed VHD has nothing at its head that would say so."""
    if image["expect"] == "refused":
        return
    path = unpacked(str(image["file"]), tmp_path)
    known = diskwright.info(str(path)).format
    assert known == ("raw" if image["variant"] == "fixed" else image["format"])
