"""What every suite may use: QEMU's programs, the command under test, folders, seeds, tables."""

from __future__ import annotations

import os
import random
import signal
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.differential import programs
from tests.differential.programs import Program
from tests.differential.zygote import Zygote

_TABLE = "table"

#: Files whose last test prints what the others saw.
TOGETHER = ("tests/differential/test_locks.py",)


# A shell may have begun the tests with SIGINT ignored, and programs that are started inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def in_ci() -> bool:
    """Whether a missing peer is a failure and not a reason to skip."""
    return os.environ.get("CI", "") not in ("", "0", "false")


def require(missing: str) -> None:
    """Skip, saying what is missing; fail where everything has to be there."""
    if in_ci():
        pytest.fail(f"needed here: {missing}")
    pytest.skip(f"not here: {missing}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Any test to any process, save those of the files in TOGETHER, of which one has all."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(TOGETHER) else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def forgotten_stores() -> Iterator[None]:
    """Let recorded disks that a test has made go with it: some have a copy of each write."""
    devices = sys.modules.get("tests.devices")
    before = set(devices.STORES) if devices is not None else set()
    yield
    devices = sys.modules.get("tests.devices")
    for name in devices.STORES.keys() - before if devices is not None else ():
        del devices.STORES[name]


@pytest.fixture(scope="session")
def real() -> dict[str, Program]:
    """QEMU's programs by name: qemu-img, qemu-io, qemu-nbd, qemu-system-x86_64."""
    found, missing = programs.find_real()
    if missing:
        require(", ".join(missing))
    return found


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote | None]:
    """The process that commands under test are forked from, where there is one."""
    if os.environ.get("DISKWRIGHT_TEST_TOOL", ""):
        yield None
        return
    started = Zygote(tmp_path_factory.mktemp("zygote"), programs.environment())
    yield started
    started.close()


@pytest.fixture(scope="session")
def ours(real: dict[str, Program], zygote: Zygote | None) -> Program:
    """The command under test."""
    return programs.under_test(real, zygote)


@pytest.fixture(scope="session")
def io(real: dict[str, Program], zygote: Zygote | None) -> Program:
    """As `ours`, for qemu-io."""
    return programs.under_test(real, zygote, "io")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own, printed; DISKWRIGHT_SEED repeats a run with another one."""
    given = os.environ.get("DISKWRIGHT_SEED")
    value = int(given) if given else zlib.crc32(request.node.nodeid.encode())
    print(f"seed {value} (repeat: DISKWRIGHT_SEED={value} pytest '{request.node.nodeid}')")
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A generator started from the test's seed."""
    return random.Random(seed)


@pytest.fixture
def ways_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what shows that they are used: they are open, whatever DISKWRIGHT_NO_BYPASS says."""
    from diskwright.block import around

    monkeypatch.setattr(around, "is_open", True)


@pytest.fixture
def table(request: pytest.FixtureRequest):
    """A function that keeps a text for the end of the run, where pytest prints it."""

    def keep(text: str) -> None:
        print(text)
        request.node.user_properties.append((_TABLE, text))  # reaches us from other processes too
        folder = os.environ.get("DISKWRIGHT_TEST_TABLES")
        if folder:
            name = f"{zlib.crc32(request.node.nodeid.encode()):08x}.txt"
            Path(folder, name).write_text(f"{request.node.nodeid}\n{text}\n")

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that tests kept."""
    for reports in list(terminalreporter.stats.values()):
        for report in reports:
            if getattr(report, "when", "") != "call":
                continue
            for name, text in report.user_properties:
                if name == _TABLE:
                    terminalreporter.write_line("")
                    terminalreporter.write_line(text)
