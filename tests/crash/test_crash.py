"""Every state that a crash may leave is consistent, and holds what was flushed.

`make test` looks at a tenth of the states that `make test-all` looks at. To repeat a failure:
its message has the seed, the entry of the log and the bytes' fate.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest

from tests.crash import scenarios
from tests.crash.enumeration import Judge, examine, record

#: Distinct states of each operation of each format.
ALL, SOME = 1000, 100

#: A scenario is recorded anew this often, if it has not enough states.
TAKES = 24

IDS = [f"{driver}-{operation.replace(' ', '-')}" for driver, operation in scenarios.OPERATIONS]


def shared_memory() -> str | None:
    """A folder that is no disk, for images that live for milliseconds."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def enumerate_states(driver: str, operation: str, *, seed: int, wanted: int, real) -> str:
    """Look at `wanted` states of an operation, or more; a line for the table."""
    chosen = scenarios.of(driver, operation)
    counted: set[int] = set()
    judged = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=shared_memory()) as folder:
        for take, scenario in ((take, each) for take in range(TAKES) for each in chosen):
            share = -(-wanted // len(chosen)) if not take else wanted
            limit = min(share, wanted - len(counted))
            if limit <= 0:
                break
            judge = None
            if scenario.judged:
                judge = Judge(scenario, real["qemu-img"].prefix[0], folder)
            recording = record(scenario, take)
            count = examine(recording, seed=seed, limit=limit, judge=judge, counted=counted)
            # of an image with a parent that QEMU does not read, only the parent is judged
            judged += count if "image" in scenario.judged else 0
    total = len(counted)
    assert total >= wanted, f"only {total} states have distinct bytes, {wanted} are wanted"
    seconds = time.monotonic() - began
    return (
        f"crash states  {driver:6} {operation:16} {total:6} distinct, "
        f"{judged:6} checked by qemu-img  ({seconds:.1f} s)"
    )


@pytest.mark.parametrize(("driver", "operation"), scenarios.OPERATIONS, ids=IDS)
def test_a_crash_loses_nothing_that_was_flushed(driver, operation, seed, real, table):
    table(enumerate_states(driver, operation, seed=seed, wanted=SOME, real=real))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("driver", "operation"), scenarios.OPERATIONS, ids=IDS)
def test_many_crashes(driver, operation, seed, real, table):
    table(enumerate_states(driver, operation, seed=seed, wanted=ALL, real=real))
