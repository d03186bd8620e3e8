"""Bitmaps of an image that cannot be saved at its end, though nothing in them has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

import diskwright
from diskwright.errors import IOFailure, NoSpaceError

KIB, MIB = 1 << 10, 1 << 20
EIO, ENOSPC = 5, 28


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """It has the bitmap "b", of whose first 64 KiB something was written."""
    path = tmp_path / "image"
    diskwright.create(path, MIB, format="qcow2")
    diskwright.bitmap(path, "b", "add")
    with diskwright.open(path, read_only=False) as node:
        node.write(0, b"one")
    return path


def flags_of(image: Path) -> list[str]:
    """What the image says of its bitmap."""
    (bitmap,) = diskwright.info(image).details.format_specific["bitmaps"]
    return bitmap["flags"]


def ended(image: Path, *, errno: int, once: bool) -> None:
    """Write what the bitmap has noted already, and have writes fail as it is saved."""
    error = {"event": "cluster_alloc", "iotype": "write", "errno": errno, "once": once}
    below = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(image)}}
    tree = {"driver": "qcow2", "file": {**below, "inject-error": [error]}}
    with diskwright.open(tree, read_only=False) as node:
        node.write(0, b"two")


def test_no_room_is_no_loss_where_the_image_has_all(image):
    ended(image, errno=ENOSPC, once=True)
    assert flags_of(image) == ["auto"]


def test_an_error_is_told_though_nothing_is_lost(image, caplog):
    with pytest.raises(IOFailure):
        ended(image, errno=EIO, once=True)
    assert flags_of(image) == ["auto"]
    assert "Lost" not in caplog.text


@pytest.mark.parametrize(("errno", "kind"), [(EIO, IOFailure), (ENOSPC, NoSpaceError)])
def test_what_stays_in_use_is_said_to_be_lost(image, caplog, errno, kind):
    with pytest.raises(kind):
        ended(image, errno=errno, once=False)
    assert flags_of(image) == ["in-use", "auto"]
    assert "Lost persistent bitmaps" in caplog.text
