"""Rows whose images lie behind a real NBD server."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections import deque
from pathlib import Path

from diskwright.block.filename import parse
from tests.conftest import require
from tests.contract.rows import Row
from tests.differential.nbd_servers import PLACE, serving

#: A test has one image, rarely two: older servers are ended.
KEPT = 2


class _Server:
    """A qemu-nbd that serves one file, as it is, until it is ended."""

    def __init__(self, path: str) -> None:
        program = shutil.which("qemu-nbd")
        if program is None:
            require("qemu-nbd")
        self.folder = Path(tempfile.mkdtemp(prefix="served-"))
        words = ["-t", "-e", "8", "-k", PLACE, "-f", "raw", "--discard=unmap", path]
        self._context = serving([str(program), *words], self.folder)
        self.process: subprocess.Popen[bytes] = self._context.__enter__()
        self.uri = f"nbd+unix://?socket={self.folder / 's'}"

    def end(self) -> None:
        self._context.__exit__(None, None, None)
        shutil.rmtree(self.folder)


_servers: deque[_Server] = deque()
_uris: dict[str, str] = {}


def end_all() -> None:
    """End the servers that are left."""
    while _servers:
        _servers.popleft().end()


class ServedRow(Row):
    """As its driver's row, with the file behind a server, which keeps the file's size.

    Attributes:
        room: the file's size, where that is not the disk's.
    """

    room = 0

    def create(self, path: str, *, size: int | None = None, **more: object) -> None:
        """Make an empty image, and serve it."""
        super().create(path, size=size, **more)
        if self.room:
            os.truncate(path, self.room)
        while len(_servers) >= KEPT:
            _servers.popleft().end()
        _servers.append(_Server(path))
        _uris[path] = _servers[-1].uri

    def storage(self, path: str) -> dict[str, object]:
        """The server of an image, by its path or its URI."""
        return parse(_uris.get(path, path))


def _over_nbd() -> ServedRow:
    row = ServedRow("nbd-qcow2", "qcow2", {"cluster_size": 4096}, resizes=False, qemu="qcow2")
    row.room = 16 << 20
    return row


SERVED = [
    ServedRow("nbd", "raw", resizes=False, checks=False, qemu="raw"),
    _over_nbd(),
]
