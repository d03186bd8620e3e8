"""NBD servers that go, and come back or stay away: what clients of ours make of it."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import IOFailure
from tests.differential.nbd_servers import qemu_nbd, serving

pytestmark = pytest.mark.peer

MIB = 1 << 20


def exported(folder: Path, **more: object) -> dict[str, object]:
    """What opens the export of the server in `folder`."""
    far = {"driver": "nbd", "path": str(folder / "s"), "export": "disk", **more}
    return {"driver": "raw", "file": far}


#: for how long requests wait for a server
PATIENT = {"reconnect-delay": 20}


def test_a_server_that_comes_back(real, tmp_path, rng: random.Random):
    """Requests wait for it; a flush does not lie about what the lost server had acknowledged."""
    folder = tmp_path
    assert real["qemu-img"].run("create", "-q", "-f", "raw", "i", "8M", cwd=folder).code == 0
    argv = qemu_nbd(real, "-f", "raw", "i")
    spec = exported(folder, **PATIENT)
    with serving(argv, folder) as first:
        node = diskwright.open(spec, read_only=False)
        node.write(0, b"kept")
        node.flush()
        node.write(4096, b"acknowledged")
        first.kill()
        first.wait()
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(node.read(0, 4)))
    reader.start()
    time.sleep(0.3)
    assert not found
    with serving(argv, folder):
        reader.join(20)
        assert found == [b"kept"]
        with pytest.raises(IOFailure, match="acknowledged"):
            node.flush()
        node.close()
    with serving(argv, folder):
        with diskwright.open(spec, read_only=False) as node:
            node.write(0, b"next")
            node.flush()


def test_who_asks_after_the_loss_waits_too(real, tmp_path):
    """One request sees the server go; what is asked while it rests waits as it does."""
    (tmp_path / "i").write_bytes(bytes(range(256)) * 4096)
    argv = qemu_nbd(real, "-f", "raw", "i")
    spec = exported(tmp_path, **PATIENT)
    found: list[bytes] = []
    with serving(argv, tmp_path):
        node = diskwright.open(spec)
        readers = [
            threading.Thread(target=lambda: found.append(node.read(0, 3))) for _ in range(30)
        ]
    for reader in readers:
        reader.start()
        time.sleep(0.005)  # the first one rests for 0.1 s before it looks for the server
    assert not found
    with serving(argv, tmp_path):
        for reader in readers:
            reader.join(20)
        assert found == [b"\0\1\2"] * len(readers)
        node.close()


def test_a_flush_is_the_first_to_notice_that_the_server_was_lost(real, tmp_path):
    assert real["qemu-img"].run("create", "-q", "-f", "raw", "i", "8M", cwd=tmp_path).code == 0
    argv = qemu_nbd(real, "-f", "raw", "i")
    spec = exported(tmp_path, **PATIENT)
    with serving(argv, tmp_path):
        forgotten = diskwright.open(spec, read_only=False)
        forgotten.write(0, b"acknowledged")
        flushed = diskwright.open(spec, read_only=False)
        flushed.write(4096, b"kept")
        flushed.flush()
    with serving(argv, tmp_path):
        with pytest.raises(IOFailure, match="acknowledged"):
            forgotten.flush()
        forgotten.close()
        flushed.flush()
        flushed.close()


def test_a_server_that_comes_back_longer(real, tmp_path):
    folder = tmp_path
    assert real["qemu-img"].run("create", "-q", "-f", "raw", "i", "1M", cwd=folder).code == 0
    argv = qemu_nbd(real, "-f", "raw", "i")
    spec = exported(folder, **PATIENT)
    with serving(argv, folder):
        node = diskwright.open(spec, read_only=False)
        node.write(0, b"kept")
        node.flush()
    assert real["qemu-img"].run("resize", "-f", "raw", "i", "3M", cwd=folder).code == 0
    with serving(argv, folder):
        assert node.read(0, 4) == b"kept"
        assert node.size == MIB
        node.refresh_size()
        assert node.size == 3 * MIB
        node.write(2 * MIB, b"beyond")
        assert node.read(2 * MIB, 6) == b"beyond"
        node.close()


def test_a_server_that_stays_away(real, tmp_path):
    folder = tmp_path
    assert real["qemu-img"].run("create", "-q", "-f", "raw", "i", "8M", cwd=folder).code == 0
    spec = exported(folder)
    with serving(qemu_nbd(real, "-f", "raw", "i"), folder) as process:
        node = diskwright.open(spec)
        assert node.read(0, 512) == bytes(512)
        process.kill()
        process.wait()
        with pytest.raises(IOFailure, match="lost"):
            node.read(0, 512)
        with pytest.raises(IOFailure):
            node.read(0, 512)
        node.close()
    began = time.monotonic()
    with pytest.raises(IOFailure, match="Failed to connect"):
        diskwright.open({"driver": "nbd", "path": str(folder / "s"), "open-timeout": 1})
    assert 1 <= time.monotonic() - began < 5


def test_a_server_is_waited_for_until_the_time_is_up(real, tmp_path):
    """As the last attempt but one fails the next pause would end too late; it is shortened."""
    assert real["qemu-img"].run("create", "-q", "-f", "raw", "i", "8M", cwd=tmp_path).code == 0
    found: list[int] = []
    spec = {"driver": "nbd", "path": str(tmp_path / "s"), "export": "disk", "open-timeout": 2}

    def opens() -> None:
        with diskwright.open(spec) as node:
            found.append(node.size)

    thread = threading.Thread(target=opens)
    thread.start()
    time.sleep(1.6)
    with serving(qemu_nbd(real, "-f", "raw", "i"), tmp_path):
        thread.join(20)
    assert found == [8 * MIB]
