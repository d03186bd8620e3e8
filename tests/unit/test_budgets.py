"""What a small request may cost, counted in calls: the same on every machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from diskwright.block import node as node_module
from diskwright.block import registry
from diskwright.block.opener import Opener, open_image

#: Python frames of a 4 KiB read or in-place write, the public operation included.
MAX_CALLS = 6


def calls_of(action: Callable[[], object]) -> list[str]:
    """The Python functions that are entered while `action` runs, without its own frame."""
    entered: list[str] = []

    def watch(frame, event, argument):
        if event == "call":
            entered.append(frame.f_code.co_qualname)

    sys.setprofile(watch)
    try:
        action()
    finally:
        sys.setprofile(None)
    return entered[1:]


@pytest.fixture(params=["raw", "qcow2", "vdi"])
def node(request, tmp_path):
    """A node in use: everything that is done once has been done."""
    path = str(tmp_path / "disk")
    cls = registry.driver_class(request.param)
    options = cls.create_options.validate({})
    cls.create(Opener(read_only=False), 4 << 20, {**options, "filename": path})
    with open_image(Opener(read_only=False), path, format=request.param) as opened:
        opened.write(0, bytes(range(256)) * 4096)
        opened.flush()
        opened.write(8192, b"again")
        opened.read(0, 4096)
        yield opened


@pytest.mark.parametrize("offset", [65536, 3 << 20], ids=["data", "hole"])
def test_a_small_read_passes_few_calls(node, offset):
    entered = calls_of(lambda: node.read(offset, 4096))
    assert len(entered) <= MAX_CALLS, entered


def test_a_small_write_in_place_passes_few_calls(node):
    data = b"x" * 4096
    entered = calls_of(lambda: node.write(65536, data))
    assert len(entered) <= MAX_CALLS, entered


@pytest.mark.skipif(not hasattr(os, "pread"), reason="needs pread")
def test_a_small_read_is_one_system_call(node, monkeypatch):
    reads = []

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return os.pread(descriptor, length, offset)

    monkeypatch.setattr(node_module, "_pread", pread)
    node.read(65536, 4096)
    assert reads == [4096]


def test_a_request_enters_the_gate_once(node):
    class Counting(dict):
        entered = 0

        def __setitem__(self, key, value):
            Counting.entered += 1
            super().__setitem__(key, value)

    node.graph.inside = Counting(node.graph.inside)
    node.read(65536, 4096)
    assert Counting.entered == 1
    node.write(65536, b"x" * 4096)
    assert Counting.entered == 2
    node.write(3 << 20, b"allocates")
    assert Counting.entered == 3
