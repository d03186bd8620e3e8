"""New qcow2 images: byte for byte QEMU's, refused in its words."""

from __future__ import annotations

import pytest

from diskwright.errors import DiskwrightError, UnsupportedError
from tests.unit.qcow2_images import MIB, Qemu, create, memory_folder, words

tmp_path = memory_folder


@pytest.fixture
def qemu(real, tmp_path) -> Qemu:
    return Qemu(real, tmp_path)


VARIANTS = [
    {},
    {"compat": "0.10"},
    {"cluster_size": 512},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": "2M"},
    {"cluster_size": 512, "refcount_bits": 64},
    {"lazy_refcounts": "on"},
    {"compression_type": "zstd"},
    {"backing_file": "base.raw", "backing_fmt": "raw"},
    {"backing_file": "base.raw", "backing_fmt": "raw", "compat": "v2"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_images_are_laid_out_as_qemu_does(qemu, tmp_path, options):
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    # With narrow blocks QEMU leaves holes between the blocks of a long L1 table.
    longest = 10 * MIB if options.get("refcount_bits") == 64 else 1 << 30
    for size in (0, 513, 10 * MIB, longest):
        create(ours, size, **options)
        qemu.img("create", "-q", "-u", "-f", "qcow2", *words(options), theirs, size)
        assert ours.read_bytes() == theirs.read_bytes(), size
        assert ours.stat().st_blocks == theirs.stat().st_blocks, size


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", VARIANTS[:6], ids=str)
def test_preallocated_images_are_laid_out_as_qemu_does(qemu, tmp_path, mode, options):
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    given = {**options, "preallocation": mode}
    for size in (0, MIB + 512):
        create(ours, size, **given)
        qemu.img("create", "-q", "-f", "qcow2", *words(given), theirs, size)
        assert ours.read_bytes() == theirs.read_bytes(), size
    qemu.clean(ours)


WRONG = [
    {"cluster_size": 1000},
    {"cluster_size": 0},
    {"cluster_size": "4M"},
    {"refcount_bits": 3},
    {"refcount_bits": 128},
    {"refcount_bits": 0},
    {"compat": "0.10", "refcount_bits": 8},
    {"compat": "0.10", "lazy_refcounts": "on"},
    {"compat": "0.10", "compression_type": "zstd"},
    {"compat": "0.10", "lazy_refcounts": "on", "refcount_bits": 3},
    {"compression_type": "lz4"},
    {"compat": "2"},
    {"compat": "foo", "cluster_size": 1, "refcount_bits": 3},
    {"preallocation": "some"},
    {"preallocation": "metadata", "backing_file": "x", "backing_fmt": "raw"},
    {"backing_fmt": "raw"},
    {"backing_file": "x", "backing_fmt": "no-such"},
    {"data_file_raw": "on"},
    {"extended_l2": "on", "compat": "0.10"},
    {"extended_l2": "on", "cluster_size": 4096},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_wrong_options_are_refused_in_qemus_words(qemu, tmp_path, options):
    _refused_alike(qemu, tmp_path, MIB, options)


@pytest.mark.parametrize("size", [(1 << 63) - 512, (1 << 63) - 1])
def test_too_long_disks_are_refused_in_qemus_words(qemu, tmp_path, size):
    _refused_alike(qemu, tmp_path, size, {})
    _refused_alike(qemu, tmp_path, size, {"cluster_size": 512})


def _refused_alike(qemu, tmp_path, size, options):
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    said = qemu.img("create", "-q", "-u", "-f", "qcow2", *words(options), theirs, size, fails=True)
    assert said.code == 1
    with pytest.raises(DiskwrightError) as caught:
        create(ours, size, **options)
    assert said.err == f"qemu-img: {theirs}: {caught.value.qemu_message}\n"


def test_what_is_not_built_is_refused_by_its_name(tmp_path):
    with pytest.raises(UnsupportedError, match="encrypt.format"):
        create(tmp_path / "later.qcow2", MIB, **{"encrypt.format": "luks"})
