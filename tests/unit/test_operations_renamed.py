"""Targets of conversions that get another name, or lose theirs, before they are finished."""

from __future__ import annotations

import os

import pytest

import diskwright
from diskwright.errors import IOFailure

FOREIGN = b"foreign" * 100_000


@pytest.fixture
def folder(tmp_path, monkeypatch, rng):
    """The test's folder, which is the current one too, with a raw disk and a foreign file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.raw").write_bytes(rng.randbytes(6 << 20))
    (tmp_path / "other").write_bytes(FOREIGN)
    return tmp_path


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vpc"])
@pytest.mark.parametrize("leads_on", [False, True])
def test_a_target_that_gets_another_name_meanwhile(folder, monkeypatch, format, leads_on):
    """What has the name then, also in another folder, is somebody else's."""
    os.mkdir("elsewhere")
    (folder / "elsewhere" / "to").write_bytes(FOREIGN)
    moved: list[None] = []

    def rename(done: int, total: int) -> None:
        if not moved:
            moved.append(None)
            os.rename("to", "image")
            os.symlink("other", "to") if leads_on else os.rename("other", "to")
            monkeypatch.chdir("elsewhere")

    diskwright.convert("disk.raw", "to", target_format=format, progress=rename)
    monkeypatch.chdir(folder)
    for place in ("to", "elsewhere/to"):
        assert (folder / place).read_bytes() == FOREIGN
    assert diskwright.compare("disk.raw", "image", second_format=format).identical


def test_a_target_that_is_gone_meanwhile(folder):
    gone: list[None] = []

    def remove(done: int, total: int) -> None:
        if not gone:
            gone.append(os.unlink("to"))

    diskwright.convert("disk.raw", "to", target_format="qcow2", progress=remove)
    assert not os.path.exists("to")


def test_a_renamed_target_is_not_taken_for_another_where_no_file_is_lent(folder, monkeypatch):
    """Then the name is all there is to open it by, so it is refused."""
    from diskwright.system import host

    monkeypatch.setattr(host, "duplicate", lambda descriptor, *, direct: -1)

    def rename(done: int, total: int) -> None:
        if os.path.exists("other"):
            os.rename("to", "image")
            os.rename("other", "to")

    with pytest.raises(IOFailure):
        diskwright.convert("disk.raw", "to", target_format="qcow2", progress=rename)
    assert (folder / "to").read_bytes() == FOREIGN
