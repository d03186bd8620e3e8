"""Who may use an image beside whom: in one process, and in several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diskwright.block.child import Child
from diskwright.block.permission import ALL, CONSISTENT_READ, RESIZE, WRITE
from diskwright.errors import (
    DiskwrightError,
    LockError,
    PermissionConflict,
    RangeError,
    ReadOnlyError,
)
from tests.contract.rows import Row, rows

WRITER = CONSISTENT_READ | WRITE | RESIZE


@pytest.fixture
def path(row: Row, tmp_path: Path) -> str:
    name = str(tmp_path / "image")
    row.create(name)
    return name


@rows()
def test_one_writer_and_no_reader_beside_it(row: Row, path: str):
    with row.open(path, used=WRITER, shared=CONSISTENT_READ) as node:
        with pytest.raises(DiskwrightError) as caught:
            row.open(path)
        assert isinstance(caught.value, LockError)
        assert 'Failed to get "write" lock' in caught.value.qemu_message
        assert caught.value.hint
        node.write(0, b"still here")
        with row.open(path, read_only=True, force_share=True) as reader:
            assert reader.size == node.size
            reader.read(0, 512)
    with row.open(path) as node:
        assert node.read(0, 10) == b"still here"


@rows()
def test_readers_beside_readers(row: Row, path: str):
    with row.open(path, read_only=True) as one, row.open(path, read_only=True) as other:
        assert one.read(0, 512) == other.read(0, 512)
        if row.driver == "raw":  # shows what is there, also while it changes
            row.open(path, used=WRITER, shared=CONSISTENT_READ).close()
        else:
            with pytest.raises(LockError):
                row.open(path)
    row.open(path).close()


@rows()
def test_a_refused_opening_leaves_nothing_behind(row: Row, path: str):
    with row.open(path, used=WRITER, shared=CONSISTENT_READ) as node:
        before = _descriptors()
        for _ in range(3):
            with pytest.raises(LockError):
                row.open(path)
        assert _descriptors() == before
        node.write(0, b"x")


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@rows(lambda row: row.name in ("raw", "qcow2", "vdi", "vpc", "odd"))
def test_another_process_is_kept_out(row: Row, path: str):
    program = (
        "import sys; from tests.contract.rows import BY_NAME\n"
        "from diskwright.errors import LockError\n"
        "try: BY_NAME[sys.argv[1]].open(sys.argv[2]).close()\n"
        "except LockError as error: print(error.qemu_message); sys.exit(7)\n"
    )
    command = [sys.executable, "-c", program, row.name, path]
    root = Path(__file__).resolve().parents[2]
    environment = {"PYTHONPATH": f"{root / 'src'}:{root}:{root / 'tests'}"}
    with row.open(path, used=WRITER, shared=CONSISTENT_READ):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 7, done.stderr
        assert 'Failed to get "write" lock' in done.stdout
        assert "Is another process using the image" in done.stdout
    done = subprocess.run(command, env=environment, timeout=60, check=False)
    assert done.returncode == 0


@rows()
def test_users_of_one_node_agree(row: Row, path: str):
    with row.open(path, used=CONSISTENT_READ, shared=CONSISTENT_READ | WRITE) as node:
        second = node.acquire("second", CONSISTENT_READ, ALL)
        with pytest.raises(PermissionConflict) as caught:
            node.acquire("third", RESIZE, ALL)
        assert "user 'user'" in str(caught.value)
        assert caught.value.hint
        writer = node.acquire("writer", CONSISTENT_READ | WRITE, ALL)
        node.release_user(writer)
        node.release_user(second)
        assert [edge.name for edge in node.parents] == ["user"]


@rows(lambda row: row.backing)
def test_what_is_below_is_not_changed_under_its_overlay(row: Row, tmp_path: Path):
    base, path = str(tmp_path / "base"), str(tmp_path / "overlay")
    row.create_base(base, row.size)
    row.create_over(path, base, row.size)
    with row.open_over(path, base, used=WRITER, shared=CONSISTENT_READ) as node:
        assert node.backing is not None
        assert node.backing.node.read_only
        with pytest.raises(LockError):
            row.open_base_at(base)
        with pytest.raises(ReadOnlyError):
            node.backing.write(0, b"x")
    row.open_base_at(base).close()


@rows(lambda row: row.driver != "raw")
def test_an_edge_without_resize_does_not_grow_its_child(row: Row, path: str):
    with row.open(path) as node:
        file = node.children["file"]
        edge = Child(node, "extra", file.node, 0)
        edge.used = CONSISTENT_READ | WRITE
        with pytest.raises(RangeError):
            edge.write(file.size, b"beyond")
        edge.used |= RESIZE
        before = file.size
        edge.write(before, b"beyond")
        assert file.size == before + 6


@rows()
def test_what_an_option_makes_read_only_is_not_opened_for_writing(row: Row, path: str):
    before = Path(path).read_bytes()
    file = {**row.storage(path), "read-only": True}
    for options in ({"read-only": True}, {"file": file}):
        with pytest.raises(ReadOnlyError, match="was opened for reading only"):
            row.open(path, options=dict(options))
        with row.open(path, read_only=True, options=dict(options)) as node:
            assert node.read_only
    assert Path(path).read_bytes() == before
