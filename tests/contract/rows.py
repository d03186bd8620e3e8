"""One row a driver and variant: whoever adds a driver adds a row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contract import odd_format
from diskwright.block import registry
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image

registry.register("odd", odd_format.Odd)

SIZE = 3 << 20


class Row:
    """A driver with one set of create options, and what the suites may expect of it."""

    def __init__(
        self,
        name: str,
        driver: str,
        options: dict[str, object] | None = None,
        *,
        resizes: bool = True,
        checks: bool = True,
        backing: bool = False,
        qemu: str = "",
        size: int = SIZE,
    ) -> None:
        self.name = name
        self.driver = driver
        self.options = options or {}
        self.resizes = resizes
        self.checks = checks
        self.backing = backing
        self.qemu = qemu
        self.size = size

    def create(self, path: str, **more: object) -> None:
        """Make an empty image."""
        cls = registry.driver_class(self.driver)
        options = cls.create_options.validate({**self.options, **more})
        cls.create(Opener(read_only=False), self.size, {**options, "filename": path})

    def open(self, path: str, *, read_only: bool = False, **how: object) -> Node:
        """Open an image of this row."""
        opener = Opener(read_only=read_only, **how)  # type: ignore[arg-type]
        return open_image(opener, path, format=self.driver)


ROWS = [
    Row("raw", "raw", checks=False, qemu="raw"),
    Row("qcow2", "qcow2", backing=True, qemu="qcow2"),
    Row("qcow2-v2", "qcow2", {"compat": "0.10"}, backing=True, qemu="qcow2"),
    Row("qcow2-512", "qcow2", {"cluster_size": 512}, qemu="qcow2"),
    Row("qcow2-2M", "qcow2", {"cluster_size": "2M"}, qemu="qcow2"),
    Row("qcow2-4k-refcount1", "qcow2", {"cluster_size": 4096, "refcount_bits": 1}, qemu="qcow2"),
    Row("qcow2-refcount64", "qcow2", {"refcount_bits": 64}, qemu="qcow2"),
    Row("qcow2-lazy", "qcow2", {"lazy_refcounts": "on"}, qemu="qcow2"),
    Row("qcow2-zstd", "qcow2", {"compression_type": "zstd"}, qemu="qcow2"),
    Row("qcow2-metadata", "qcow2", {"preallocation": "metadata"}, qemu="qcow2"),
    Row("odd", "odd", resizes=False),
    Row("odd-scramble", "odd", {"scramble": "on"}, resizes=False),
]
BY_NAME = {row.name: row for row in ROWS}


@contextmanager
def opened(row: Row, folder: Path, name: str = "image") -> Iterator[Node]:
    """A fresh image of a row, open for writing."""
    path = os.path.join(folder, f"{name}.{row.driver}")
    row.create(path)
    with row.open(path) as node:
        yield node
