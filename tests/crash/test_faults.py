"""Every n-th request to the image's file fails: a consistent image, a clear error, no hang."""

from __future__ import annotations

import errno
import random
import time

import pytest

from diskwright.block.node import Node
from diskwright.errors import BrokenNodeError, DiskwrightError
from tests import devices
from tests.crash import scenarios
from tests.crash.enumeration import open_state, prepare
from tests.crash.faults import COUNTED, Fault, Run
from tests.crash.guest import SECTOR
from tests.crash.scenarios import Scenario

IDS = [f"{driver}-{operation.replace(' ', '-')}" for driver, operation in scenarios.OPERATIONS]

#: Faults of each scenario in `make test`; `make test-all` has them all, up to MANY.
SOME, MANY = 12, 400


def faults_of(run: Run) -> list[Fault]:
    """Every request once, and every write and flush as the first of a disk that is full or gone."""
    found = []
    for kind in [*COUNTED, "flush", "size"]:
        code = errno.ENOSPC if kind == "size" else errno.EIO
        for number in range(1, run.counts[kind] + 1):
            found.append(Fault(kind, number, code, once=True))
            if kind in ("write", "flush", "size"):
                found.append(Fault(kind, number, errno.ENOSPC, once=False))
    return found


def suffer(driver: str, operation: str, limit: int, rng: random.Random) -> str:
    total, began = 0, time.monotonic()
    chosen = scenarios.of(driver, operation)
    for scenario in chosen if limit == MANY else chosen[:2]:
        run = Run(scenario)
        faults = faults_of(run)
        for fault in rng.sample(faults, min(limit, len(faults))):
            total += bool(run.suffer(fault))
    seconds = time.monotonic() - began
    return f"faults        {driver:6} {operation:16} {total:6} injected  ({seconds:.1f} s)"


@pytest.mark.parametrize(("driver", "operation"), scenarios.OPERATIONS, ids=IDS)
def test_a_fault_leaves_a_consistent_image_and_an_error(driver, operation, rng, table):
    table(suffer(driver, operation, SOME, rng))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("driver", "operation"), scenarios.OPERATIONS, ids=IDS)
def test_every_fault(driver, operation, rng, table):
    table(suffer(driver, operation, MANY, rng))


# --------------------------------------------------------------------------- the broken state


def broken_by_a_table(scenario: Scenario) -> Node:
    """A node whose tables could not be written."""
    prepare(scenario)
    node = open_state(scenario, read_only=False)
    node.write(scenario.scribble * SECTOR, b"x" * SECTOR)
    store = devices.STORES["image"]

    def fail(kind: str) -> None:
        if kind == "write":
            raise OSError(errno.EIO, "I/O error")

    store.fail = fail
    with pytest.raises((DiskwrightError, OSError)):
        node.flush()
    store.fail = lambda kind: None
    return node


@pytest.mark.parametrize("driver", sorted({driver for driver, _ in scenarios.OPERATIONS}))
def test_after_a_table_could_not_be_written_there_are_reads_but_no_writes(driver):
    scenario = scenarios.of(driver, "write new")[0]
    node = broken_by_a_table(scenario)
    assert node.broken is not None
    node.read(0, SECTOR)
    with pytest.raises(BrokenNodeError, match="refuses writes since"):
        node.write(0, b"y" * SECTOR)
    with pytest.raises(BrokenNodeError):
        node.discard(0, SECTOR)
    node.close()
    with open_state(scenario, read_only=False) as again:
        again.write(0, b"z" * SECTOR)
        again.flush()
        assert again.read(0, SECTOR) == b"z" * SECTOR
        assert not again.check().corruptions or driver == "vdi"
