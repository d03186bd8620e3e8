"""One row a driver and variant: whoever adds a driver adds a row."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diskwright.block import registry
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from tests import devices
from tests.contract import odd_format

registry.register("odd", odd_format.Odd)
devices.register()

SIZE = 3 << 20
SECTOR = 512


class Row:
    """A driver with one set of create options, and what the suites may expect of it.

    Attributes:
        resizes, checks, backing, snapshots, encodes: what the format can do.
        parent: the create option that names a base image, of the same driver unless
            `base_driver` is another; `differs` says that this row's images always have one.
        opens: options it is opened with.
        cache: the cache mode it is opened with.
        bitmaps: granularities of the dirty bitmaps that note what is done.
        table_bytes: memory for tables, so small that slices have to leave.
        exact_size: an image has the size that was asked for.
        qemu: the format as QEMU's tools call it, where they read it.
        slow: only `make test-all` runs it.
    """

    def __init__(
        self,
        name: str,
        driver: str,
        options: dict[str, object] | None = None,
        *,
        resizes: bool = True,
        checks: bool = True,
        backing: bool = False,
        snapshots: bool = False,
        encodes: bool = False,
        parent: str = "",
        base_driver: str = "",
        differs: bool = False,
        opens: dict[str, object] | None = None,
        cache: str = "writeback",
        bitmaps: tuple[int, ...] = (),
        table_bytes: int = 0,
        exact_size: bool = True,
        qemu: str = "",
        size: int = SIZE,
        slow: bool = False,
    ) -> None:
        self.name = name
        self.driver = driver
        self.options = options or {}
        self.resizes = resizes
        self.checks = checks
        self.backing = backing
        self.snapshots = snapshots
        self.encodes = encodes
        self.parent = parent
        self.base_driver = base_driver or driver
        self.differs = differs
        self.opens = opens or {}
        self.cache = cache
        self.bitmaps = bitmaps
        self.table_bytes = table_bytes
        self.exact_size = exact_size
        self.qemu = qemu
        self.size = size
        self.slow = slow

    # ------------------------------------------------------------------------------ making

    def create(self, path: str, *, size: int | None = None, **more: object) -> None:
        """Make an empty image; `path` may be a recorder's name."""
        size = self.size if size is None else size
        if self.differs and self.parent not in more:
            base = f"{path}.base"
            self.create_base(base, size)
            more = {**more, self.parent: base}
        if self.driver == "vpc" and self.parent in more and path.startswith("recorder:"):
            self._create_in_files(path, more)
            return
        given = {**self.options, **more}
        if "data_file" in given:
            given["data_file"] = f"{path}.data"
        _make(self.driver, path, size, given)
        if self.bitmaps:
            with self.open(path) as node:
                for grain in self.bitmaps:
                    node.bitmap_add(f"by {grain}", granularity=grain)

    def _create_in_files(self, path: str, more: dict[str, object]) -> None:
        """A VHD's parent must be a file as the image is made; then it may be anything."""
        base = str(more[self.parent]).removeprefix("recorder:")
        with tempfile.TemporaryDirectory() as folder:
            below, image = Path(folder, "base"), Path(folder, "image")
            below.write_bytes(devices.STORES[base].data)
            _make(self.driver, str(image), 0, {**self.options, **more, self.parent: str(below)})
            name = path.removeprefix("recorder:")
            devices.STORES[name] = devices.Store(image.read_bytes())

    def create_over(self, path: str, base: str, size: int) -> None:
        """Make an image over `base`, which is of `base_driver`."""
        options: dict[str, object] = {}
        if self.parent:
            options[self.parent] = base
        if self.parent == "backing_file" and self.driver == "qcow2":
            options["backing_fmt"] = self.base_driver
        self.create(path, size=size, **options)

    # ----------------------------------------------------------------------------- opening

    def storage(self, path: str) -> dict[str, object]:
        """What an image is opened in."""
        return _protocol(path)

    def open(
        self,
        path: str,
        *,
        read_only: bool = False,
        options: dict[str, object] | None = None,
        used: int | None = None,
        shared: int | None = None,
        **how: object,
    ) -> Node:
        """Open an image of this row."""
        how.setdefault("cache", self.cache)
        opener = Opener(read_only=read_only, **how)  # type: ignore[arg-type]
        spec: dict[str, object] = {"driver": self.driver, "file": self.storage(path)}
        if self.has_data_file:
            spec["data-file"] = _protocol(f"{path}.data")
        if self.differs and path.startswith("recorder:") and self.driver != "qcow2":
            # nobody finds a parent by its identity there
            spec["backing"] = {"driver": self.base_driver, "file": _protocol(f"{path}.base")}
        spec.update(self.opens)
        spec.update(options or {})
        node = open_image(opener, spec, used=used, shared=shared)
        cache = getattr(node, "cache", None)
        if self.table_bytes and cache is not None:
            cache.capacity_bytes = self.table_bytes
        return node

    def create_base(self, base: str, size: int) -> None:
        """Make an empty image that images of this row may stand over."""
        same = {"force_size": True} if self.base_driver == "vpc" else {}
        _make(self.base_driver, base, size, same)

    def open_base(self, path: str) -> Node:
        """Open the base of a `differs` image, for writing."""
        return self.open_base_at(f"{path}.base")

    def open_base_at(self, base: str) -> Node:
        """Open an image made by `create_base`, for writing."""
        spec = {"driver": self.base_driver, "file": _protocol(base)}
        return open_image(Opener(read_only=False), spec)

    def open_over(self, path: str, base: str, **how: object) -> Node:
        """Open an image made by `create_over`; the odd format keeps no name."""
        if self.driver == "odd":
            below = {"driver": self.base_driver, "file": _protocol(base)}
            how["options"] = {"backing-file": below}
        return self.open(path, **how)  # type: ignore[arg-type]

    def files(self, path: str) -> list[str]:
        """Every file that an image consists of, without its base."""
        return [path, f"{path}.data"] if self.has_data_file else [path]

    @property
    def shortest(self) -> int:
        """The size to which a disk can shrink; with bitmaps something must be left of it."""
        return SECTOR if self.bitmaps else 0

    @property
    def has_data_file(self) -> bool:
        """Whether the data lie in a file beside the image."""
        return self.driver == "odd" or "data_file" in self.options


def _protocol(path: str) -> dict[str, object]:
    if path.startswith("recorder:"):
        return {"driver": "recorder", "filename": path.removeprefix("recorder:")}
    return {"driver": "file", "filename": path}


def _make(driver: str, path: str, size: int, options: dict[str, object]) -> None:
    cls = registry.driver_class(driver)
    validated = cls.create_options.validate(options)
    cls.create(Opener(read_only=False), size, {**validated, "filename": path})


#: What a qcow2 row can do unless it says otherwise.
_QCOW2 = {
    "backing": True,
    "snapshots": True,
    "encodes": True,
    "parent": "backing_file",
    "base_driver": "raw",
    "qemu": "qcow2",
}


def _qcow2(name: str, options: dict[str, object] | None = None, **more: object) -> Row:
    return Row(name, "qcow2", options, **{**_QCOW2, **more})  # type: ignore[arg-type]


def _vpc(name: str, options: dict[str, object] | None = None, **more: object) -> Row:
    given = {"force_size": True, **(options or {})}
    known: dict[str, object] = {"resizes": False, "qemu": "vpc", **more}
    return Row(name, "vpc", given, **known)  # type: ignore[arg-type]


#: What a qcow2 image cannot do whose data lie in a file beside it.
_BESIDE: dict[str, object] = {"snapshots": False, "encodes": False}
_RAW: dict[str, object] = {**_BESIDE, "backing": False}

ROWS = [
    Row("raw", "raw", checks=False, qemu="raw"),
    Row("raw-direct", "raw", checks=False, qemu="raw", cache="none"),
    Row("raw-writethrough", "raw", checks=False, qemu="raw", cache="writethrough"),
    Row(
        "raw-detect",
        "raw",
        checks=False,
        qemu="raw",
        opens={"detect-zeroes": "unmap", "discard": "unmap"},
    ),
    _qcow2("qcow2"),
    _qcow2("qcow2-v2", {"compat": "0.10"}),
    _qcow2("qcow2-512", {"cluster_size": 512}, table_bytes=4096, opens={"cache-size": 4096}),
    _qcow2("qcow2-2M", {"cluster_size": 2 << 20}, size=9 << 20, slow=True),
    _qcow2("qcow2-4k-refcount1", {"cluster_size": 4096, "refcount_bits": 1}, snapshots=False),
    _qcow2("qcow2-refcount64", {"refcount_bits": 64}),
    _qcow2("qcow2-lazy", {"lazy_refcounts": True}),
    _qcow2("qcow2-zstd", {"compression_type": "zstd"}),
    _qcow2("qcow2-metadata", {"preallocation": "metadata"}, backing=False),
    _qcow2("qcow2-extended", {"extended_l2": True}),
    _qcow2("qcow2-extended-16k", {"extended_l2": True, "cluster_size": 16384}, table_bytes=512),
    _qcow2("qcow2-extended-metadata", {"extended_l2": True, "preallocation": "metadata"}),
    _qcow2("qcow2-extended-overlay", {"extended_l2": True}, differs=True),
    _qcow2("qcow2-data-file", {"data_file": True}, **_BESIDE),
    _qcow2("qcow2-data-file-raw", {"data_file": True, "data_file_raw": True}, **_RAW),
    _qcow2("qcow2-data-file-extended", {"data_file": True, "extended_l2": True}, **_BESIDE),
    _qcow2("qcow2-direct", {"cluster_size": 4096}, cache="none"),
    _qcow2(
        "qcow2-detect", {"cluster_size": 4096}, opens={"detect-zeroes": "unmap", "discard": "unmap"}
    ),
    _qcow2("qcow2-overlay", {"cluster_size": 4096}, differs=True),
    _qcow2("qcow2-bitmaps", {"cluster_size": 4096}, bitmaps=(512, 65536), snapshots=False),
    _qcow2(
        "qcow2-bitmaps-extended-overlay",
        {"extended_l2": True},
        bitmaps=(4096,),
        snapshots=False,
        differs=True,
    ),
    _qcow2("qcow2-bitmaps-data-file", {"data_file": True}, bitmaps=(2048,), **_BESIDE),
    Row("vdi", "vdi", resizes=False, qemu="vdi"),
    Row("vdi-static", "vdi", {"static": True}, resizes=False, qemu="vdi"),
    Row("vdi-512", "vdi", {"block_size": 512}, resizes=False, table_bytes=2048),
    Row(
        "vdi-diff",
        "vdi",
        {"block_size": 4096},
        resizes=False,
        backing=True,
        differs=True,
        parent="backing",
    ),
    _vpc("vpc"),
    _vpc("vpc-chs", {"force_size": None}, exact_size=False),
    _vpc("vpc-fixed", {"subformat": "fixed"}),
    _vpc("vpc-4k", {"block_size": 4096}, table_bytes=2048),
    _vpc("vpc-diff", {"block_size": 65536}, backing=True, differs=True, parent="backing"),
    Row("odd", "odd", resizes=False, encodes=True, backing=True, base_driver="raw"),
    Row("odd-scramble", "odd", {"scramble": True}, resizes=False, encodes=True),
]
BY_NAME = {row.name: row for row in ROWS}


def rows(wanted: Callable[[Row], object] = lambda row: True) -> pytest.MarkDecorator:
    """A test for each row that `wanted` likes."""
    chosen = [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else [])
        for row in ROWS
        if wanted(row)
    ]
    return pytest.mark.parametrize("row", chosen)


@contextmanager
def opened(row: Row, folder: Path, name: str = "image") -> Iterator[Node]:
    """A fresh image of a row, open for writing."""
    path = os.path.join(folder, f"{name}.{row.driver}")
    row.create(path)
    with row.open(path) as node:
        yield node
