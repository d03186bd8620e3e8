"""What the suites of formats share: two sides, and a folder for their images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.differential.formats_workbench import Side, room, sides
from tests.differential.programs import Program


@pytest.fixture
def both(real, ours) -> tuple[Side, Side]:
    """QEMU, and what is under test."""
    return sides(real, ours)


@pytest.fixture
def beyond_qemu(real, ours) -> None:
    """For what ours does otherwise on purpose, where QEMU's tool may be under test in its place."""
    if ours.name == real["qemu-img"].name:
        pytest.skip("QEMU's own tool does this differently")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder; see `room`."""
    with room(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def nbd() -> Program:
    """Ours beside qemu-nbd; no test has a process made in advance for it."""
    return Program("diskwright-nbd", [sys.executable, "-m", "diskwright.cli.nbd"])
