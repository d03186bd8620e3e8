"""Which outside references an image may have opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diskwright.block.opener import Opener, open_image
from diskwright.block.policy import Ask, FollowAll, FollowNothing, Policy, SameFolder
from diskwright.errors import DiskwrightError, PolicyError
from tests.contract.rows import BY_NAME


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "images"
    inner.mkdir()
    (inner / "base").write_bytes(bytes(65536))
    (tmp_path / "secret").write_bytes(b"secret" * 100)
    return inner


def _refused(policy: Policy, reference: str, folder: Path) -> bool:
    return policy.refusal("backing file", reference, str(folder / "image")) is not None


def test_the_simple_ones(folder: Path):
    for reference in ("base", "/etc/passwd", "nbd://host/x", 'json:{"driver":"file"}'):
        assert not _refused(FollowAll(), reference, folder)
        assert _refused(FollowNothing(), reference, folder)


def test_the_same_folder_and_below(folder: Path):
    (folder / "deeper").mkdir()
    (folder / "deeper" / "base").write_bytes(b"")
    for name in ("base", "deeper/base", "not-there"):
        assert not _refused(SameFolder(), str(folder / name), folder), name
    assert not _refused(SameFolder(), f"file:{folder / 'base'}", folder)


@pytest.mark.parametrize(
    "reference",
    [
        "/etc/passwd",
        "{folder}/../secret",
        "{folder}/deeper/../../secret",
        "nbd:localhost:10809",
        "nbd://localhost/export",
        "http://localhost/image",
        'json:{{"driver":"file","filename":"base"}}',
        "fat:rw:/etc",
        "blkdebug::base",
        "file:///etc/passwd",
        "{folder}",
        "/dev/null",
        "",
    ],
)
def test_everything_else_is_refused(folder: Path, reference: str):
    reference = reference.format(folder=folder)
    assert _refused(SameFolder(), reference, folder), reference


def test_links_are_followed_before_looking(folder: Path):
    os.symlink(folder.parent / "secret", folder / "link")
    os.symlink(folder.parent, folder / "up")
    os.symlink(folder / "base", folder / "inside")
    assert _refused(SameFolder(), str(folder / "link"), folder)
    assert _refused(SameFolder(), str(folder / "up" / "secret"), folder)
    assert not _refused(SameFolder(), str(folder / "inside"), folder)


def test_a_folder_with_a_longer_name_is_another(folder: Path):
    beside = folder.parent / "images-other"
    beside.mkdir()
    (beside / "base").write_bytes(b"")
    assert _refused(SameFolder(), str(beside / "base"), folder)


def test_asking(folder: Path):
    asked: list[tuple[str, str, str]] = []

    def question(role: str, reference: str, image: str) -> bool:
        asked.append((role, reference, image))
        return reference.endswith("base")

    assert not _refused(Ask(question), "base", folder)
    assert _refused(Ask(question), "other", folder)
    assert asked[0] == ("backing file", "base", str(folder / "image"))


def test_an_image_is_not_opened_with_what_is_refused(folder: Path):
    row = BY_NAME["qcow2"]
    path = str(folder / "overlay")
    row.create_over(path, str(folder / "base"), 65536)
    row.create_over(str(folder / "bad"), str(folder.parent / "secret"), 65536)
    for policy in (SameFolder(), FollowAll()):
        open_image(Opener(policy=policy), path).close()
    with pytest.raises(PolicyError) as caught:
        open_image(Opener(policy=SameFolder()), str(folder / "bad"))
    assert "secret" in str(caught.value)
    assert "outside of the image's folder" in str(caught.value)
    assert caught.value.hint
    assert "--allow-references" in caught.value.hint
    with pytest.raises(PolicyError):
        open_image(Opener(policy=FollowNothing()), path)
    with open_image(Opener(policy=FollowNothing(), follow_backing=False), path) as node:
        assert node.backing is None


def test_a_chain_that_bites_its_tail(folder: Path):
    row = BY_NAME["qcow2"]
    one, two = str(folder / "one"), str(folder / "two")
    row.create(one, size=65536)
    row.create_over(two, one, 65536)
    for path, below in ((one, two), (two, one)):
        with row.open(path, follow_backing=False) as node:
            node.change_backing(below, "qcow2")
    for path in (one, two):
        with pytest.raises(DiskwrightError) as caught:
            open_image(Opener(), path)
        assert caught.value.kind == "format"
    with row.open(two, follow_backing=False) as node:
        node.change_backing(two, "qcow2")
    with pytest.raises(DiskwrightError):
        open_image(Opener(), two)


def test_a_name_with_a_zero_byte(folder: Path):
    """A stored one ends there; the system's function would raise an error of another tree."""
    row = BY_NAME["qcow2"]
    path, base = folder / "overlay", folder / "base"
    base.write_bytes(bytes(65536))
    for name, found in ((b"", None), (b"base", "base")):
        row.create_over(str(path), str(base), 65536)
        stored = str(base).encode()
        path.write_bytes(path.read_bytes().replace(stored, name.ljust(len(stored), b"\0")))
        for policy in (FollowAll(), SameFolder()):
            with open_image(Opener(policy=policy), str(path)) as node:
                assert node.info().backing_filename == found
    with pytest.raises(DiskwrightError) as caught:
        open_image(Opener(policy=FollowNothing()), str(path))
    assert caught.value.kind == "policy"
    with pytest.raises(DiskwrightError) as caught:
        open_image(Opener(), {"driver": "file", "filename": "a\0b"})
    assert caught.value.kind == "option"
