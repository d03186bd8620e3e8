"""Where clusters lie after commands of `diskwright-io` and of qemu-io: `map` names the places."""

from __future__ import annotations

import pytest

from tests.differential.io_pairs import IoPair, commands

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("line", ["write -z 64k 1M", "write -z -u 0 2M", "write -z 1M 100k"])
def test_zeroes_over_a_backing_file_that_is_zero(line: str, real, io, tmp_path) -> None:
    """Version 2 has no zero clusters: they are written, whatever the backing file shows now."""
    pair = IoPair(real, io, tmp_path, "overlay")
    for folder in pair.folders:
        (folder / "base").write_bytes(bytes(3 << 20))
        pair.img(folder, "create -q -f qcow2 -o compat=0.10 -b base -F raw i 4M")
    pair.agree(line, "write -z 3584k 64k")
    assert '"depth": 0' in pair.same_places()


@pytest.mark.parametrize("options", ["cluster_size=1M", "compat=0.10", "extended_l2=on"])
def test_discarded_space_is_written_to_again(options: str, real, io, tmp_path) -> None:
    """Without a flush of the caller's; QEMU takes it at once, and so does who discards so much."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        pair.img(folder, f"create -q -f qcow2 -o {options},preallocation=metadata i 256M")
    pair.agree("discard 0 10M", "discard 200M 10M", "write 200M 10M", "write 0 10M")
    pair.same_places()


@pytest.mark.parametrize("options", ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512"])
def test_what_a_killed_writer_had_counted(options: str, real, io, tmp_path) -> None:
    """With lazy refcounts: its tables, and what was written before the last of them was made."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        pair.img(folder, f"create -q -f qcow2 -o {options} i 4M")
    written = ["write 0 512", "write 64k 1k", "write 1M 512", "sigraise 9"]
    pair.run("-t", "writethrough", *pair.opened, *commands(written))
    checked = [pair._img.run("check", "i", cwd=folder) for folder in pair.folders]
    assert "refcount=0" in checked[0].out + checked[0].err
    assert checked[1] == checked[0]


@pytest.mark.parametrize(
    "limits",
    [
        "align=512,opt-write-zero=15M,max-write-zero=15M",
        "align=512,opt-write-zero=15M",
        "align=4k,max-write-zero=1M",
        "align=512,opt-write-zero=1M,max-write-zero=3M",
    ],
)
@pytest.mark.parametrize(
    "line", ["write -z 32M 32M", "write -z -u 8003584 2093056", "write -z 9 9"]
)
def test_zeroes_below_the_unit_of_a_filter(limits: str, line: str, real, io, tmp_path) -> None:
    """They are written as data there."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        pair.img(folder, "create -q -f qcow2 -o preallocation=metadata i 128M")
    pair.opened = []
    pair.agree(f"open -o driver=blkdebug,image.driver=qcow2,{limits} blkdebug::i", line)
    pair.same_places()


@pytest.mark.parametrize(
    "limits",
    [
        "align=512,opt-discard=15M,max-discard=15M",
        "align=512,opt-discard=15M",
        "align=4k,max-discard=1M",
        "align=512,opt-discard=1M,max-discard=3M",
    ],
)
@pytest.mark.parametrize("line", ["discard 80000001 30M", "discard 100M 28M"])
def test_discards_below_the_unit_of_a_filter(limits: str, line: str, real, io, tmp_path) -> None:
    """What is below has smaller units, and they go."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        pair.img(folder, "create -q -f qcow2 -o preallocation=metadata i 128M")
    pair.opened = []
    pair.agree(f"open -o driver=blkdebug,image.driver=qcow2,{limits} blkdebug::i", line)
    pair.same_places()
