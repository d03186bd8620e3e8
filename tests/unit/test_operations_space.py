"""What a copy takes of the disk: room for data, and not for zeroes or attempts."""

from __future__ import annotations

import errno
import threading

import pytest

import diskwright
from diskwright.operations.sinks import Taken
from diskwright.system import host

MIB = 1 << 20


@pytest.mark.parametrize(("asked", "tables"), [(errno.EOPNOTSUPP, 0), (errno.EINVAL, 1)])
def test_room_that_was_tried_for_shared_blocks_is_not_kept(
    tmp_path, monkeypatch, ways_around, asked, tables
):
    """An L2 table is, where the file system seemed to share blocks."""
    refusals = iter([asked])

    def refuse(*_, **__):
        raise OSError(next(refusals, errno.EOPNOTSUPP), "not here")

    monkeypatch.setattr(host, "clone_range", refuse)
    (tmp_path / "zeroes").write_bytes(bytes(5 * MIB))
    diskwright.create(tmp_path / "empty", 5 * MIB, format="qcow2")
    names = tmp_path / "zeroes", tmp_path / "made"
    diskwright.convert(*names, source_format="raw", target_format="qcow2", threads=1)
    made, empty = ((tmp_path / name).stat().st_size for name in ("made", "empty"))
    assert (made + 65535) // 65536 == (empty + 65535) // 65536 + tables


@pytest.mark.parametrize(
    ("format", "options", "room"),
    [("vpc", None, 0), ("vdi", None, 0), ("qcow2", "cluster_size=2M", 9), ("raw", None, 0)]
    + [("qcow2", f"cluster_size={size},preallocation=metadata", 9) for size in ("64k", "2M")],
)
def test_zeroes_inside_of_clusters_take_no_space(tmp_path, rng, format, options, room, ways_around):
    """There is one block of 4 KiB in each 2 MiB; `room` MiB are for tables."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(64 * MIB)
        for place in range(MIB, 64 * MIB, 2 * MIB):
            file.seek(place)
            file.write(rng.randbytes(4096))
    names = tmp_path / "sparse", tmp_path / "made"
    diskwright.convert(*names, source_format="raw", target_format=format, options=options)
    assert diskwright.compare(*names, first_format="raw", second_format=format).identical
    assert (tmp_path / "made").stat().st_blocks * 512 <= (room + 1) * MIB


@pytest.mark.parametrize("discarded", [False, True])
@pytest.mark.parametrize("cluster", ["64k", "2M"])
def test_old_bytes_inside_of_clusters_do_not_show(tmp_path, cluster, discarded):
    """Neither of clusters that are there nor of freed ones that are taken again."""
    made = tmp_path / "made"
    diskwright.create(made, 16 * MIB, format="qcow2", options={"cluster_size": cluster})
    file = {"driver": "file", "filename": str(made)}
    options = {"driver": "qcow2", "file": file, "pass-discard-request": False}
    with diskwright.open(options, read_only=False) as node:
        node.write(0, b"\xff" * node.size)
        if discarded:
            node.discard(0, node.size)
    length = made.stat().st_size
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(16 * MIB)
        for place in range(MIB, 16 * MIB, 2 * MIB):
            file.seek(place)
            file.write(b"new!" * 1024)
    names = tmp_path / "sparse", made
    diskwright.convert(*names, source_format="raw", target_format="qcow2", existing=True)
    assert diskwright.compare(*names, first_format="raw", second_format="qcow2").identical
    assert made.stat().st_size == length


def leave_in_between(node):
    with Taken(node) as taken:
        assert taken.places(0, 65536)
        assert taken.places(131072, 65536)
        raise ValueError("in between")


def test_space_that_an_error_leaves_unfilled_is_given_back(tmp_path):
    name = tmp_path / "made"
    diskwright.create(name, MIB, format="qcow2")
    with diskwright.open(name, read_only=False) as node:
        with pytest.raises(ValueError, match="in between"):
            leave_in_between(node)
        for place in (0, 131072):  # which nobody holds any more
            writer = threading.Thread(target=node.write, args=(place, b"x" * 65536), daemon=True)
            writer.start()
            writer.join(10)
            assert not writer.is_alive()
    found = diskwright.check(name)
    assert (found.leaks, found.corruptions) == (0, 0)
