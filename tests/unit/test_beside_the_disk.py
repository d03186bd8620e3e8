"""What a node does beside reading and writing its disk: compressed units, states, copies."""

from __future__ import annotations

import pytest

import diskwright
from diskwright.errors import IOFailure, OptionError, UnsupportedError
from diskwright.operations.opening import Image, open_image

MIB = 1 << 20


@pytest.fixture
def overlay(tmp_path):
    (tmp_path / "base").write_bytes(b"base" * (MIB // 4))
    path = tmp_path / "o.qcow2"
    diskwright.create(path, MIB, format="qcow2", backing="base", backing_format="raw")
    return path


def held(node, offset=0, length=MIB):
    """(offset, length) of what this layer has."""
    return [
        (run.offset, run.length) for run in node.extents(offset, length, depth=0) if run.allocated
    ]


# ------------------------------------------------------------------------- compressed


def test_whole_units_are_written_compressed(overlay):
    with diskwright.open(overlay, read_only=False) as node:
        node.write_compressed(65536, b"7" * 131072)
        assert [run.encoded for run in node.extents(65536, 131072, depth=0)] == [True]
        assert node.read(65536, 131072) == b"7" * 131072
        assert node.read(0, 4) == b"base"


@pytest.mark.parametrize(("offset", "length"), [(1, 65536), (0, 512), (512, 65536)])
def test_parts_of_units_are_not(overlay, offset, length):
    with diskwright.open(overlay, read_only=False) as node:
        with pytest.raises(OptionError):
            node.write_compressed(offset, bytes(length))
        assert not held(node)


def test_what_is_compressed_replaces_nothing(overlay):
    with diskwright.open(overlay, read_only=False) as node:
        node.write(65536, b"x")
        with pytest.raises(IOFailure):
            node.write_compressed(65536, bytes(65536))
        node.write_compressed(0, bytes(65536))
        with pytest.raises(IOFailure):
            node.write_compressed(0, bytes(65536))
        assert node.read(65536, 1) == b"x"


def test_raw_stores_nothing_compressed(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(MIB))
    with diskwright.open(tmp_path / "raw", format="raw", read_only=False) as node:
        with pytest.raises(UnsupportedError):
            node.write_compressed(0, bytes(65536))


# ------------------------------------------------------------------------- a machine's state


def test_a_state_is_kept_beside_the_disk(overlay):
    with diskwright.open(overlay, read_only=False) as node:
        assert node.read_vm_state(0, 16) == bytes(16)
        node.write_vm_state(70000, b"state" * 40000)
        assert node.read_vm_state(69998, 7) == b"\0\0state"
        assert node.read_vm_state(0, 4) == bytes(4), "the backing file does not show through"
        assert node.read_vm_state(1 << 40, 4) == bytes(4)
        assert node.read(0, 4) == b"base"
        assert node.size == MIB
    with diskwright.open(overlay) as node:
        assert node.read_vm_state(70000, 5) == b"state"
    assert diskwright.check(overlay).clean


@pytest.mark.parametrize("options", [{"data_file": "ext"}, {"extended_l2": True}])
def test_a_state_is_kept_in_every_kind_of_image(tmp_path, options):
    if "data_file" in options:
        options = {"data_file": str(tmp_path / "ext")}
    path = tmp_path / "i.qcow2"
    diskwright.create(path, MIB + 512, format="qcow2", options=options)
    with diskwright.open(path, read_only=False) as node:
        node.write_vm_state(1000, b"state" * 40000)
        node.write(MIB, b"end")
        assert node.read_vm_state(998, 7) == b"\0\0state"
    with diskwright.open(path) as node:
        assert node.read_vm_state(200990, 12) == b"statestate\0\0"
        assert node.read(MIB, 4) == b"end\0"
    assert diskwright.check(path).clean


def test_raw_keeps_no_state(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(MIB))
    with diskwright.open(tmp_path / "raw", format="raw", read_only=False) as node:
        assert node.vm_state_offset == 0
        with pytest.raises(UnsupportedError):
            node.read_vm_state(0, 1)
        with pytest.raises(UnsupportedError):
            node.write_vm_state(0, b"x")


# ------------------------------------------------------------------------- copy on read


def copying(path):
    image = Image(path, format="qcow2")
    image.copy_on_read = True
    return open_image(image, read_only=False)


def test_what_is_read_is_kept(overlay):
    with copying(overlay) as node:
        node.write(200000, b"newer")
        assert node.read(65536, 4) == b"base"
        assert node.read(200000, 5) == b"newer"
        assert held(node) == [(65536, 65536), (196608, 65536)]
        assert node.backing is not None
        assert not node.backing.node.copy_on_read
    (overlay.parent / "base").write_bytes(bytes(MIB))
    with diskwright.open(overlay) as node:
        assert node.read(65536, 4) == b"base"
        assert node.read(200000, 5) == b"newer"
        assert node.read(0, 4) == bytes(4)


def test_a_copy_needs_an_image_that_is_writable(overlay):
    image = Image(overlay)
    image.copy_on_read = True
    with pytest.raises(OptionError):
        open_image(image)
