"""A wish for the end: for which thread it counts, how often, and up to where."""

from __future__ import annotations

import threading

import pytest

import diskwright
from diskwright.block.cancel import cancellable, check_cancelled
from diskwright.errors import CancelledError
from diskwright.operations.workers import Steering, Workers


def wished() -> threading.Event:
    flag = threading.Event()
    flag.set()
    return flag


def test_nobody_is_stopped_who_has_no_flag_or_one_that_is_not_set():
    check_cancelled()
    with cancellable(None), cancellable(threading.Event()):
        check_cancelled()


def test_cleaning_up_is_not_stopped():
    with cancellable(wished()):
        with pytest.raises(CancelledError), cancellable(wished()):
            check_cancelled()
        check_cancelled()
    check_cancelled()


def test_the_next_operation_is_stopped_again():
    for _ in range(2):
        with pytest.raises(CancelledError), cancellable(wished()):
            check_cancelled()


def test_the_flag_around_counts_where_there_is_none():
    with pytest.raises(CancelledError), cancellable(wished()), cancellable(None):
        check_cancelled()


def test_other_threads_are_left_alone():
    ended = []

    def other() -> None:
        check_cancelled()
        ended.append(True)

    with cancellable(wished()):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert ended


def test_threads_that_help_are_stopped_inside_of_a_job():
    flag, stopped = threading.Event(), []

    def act(job: int) -> None:
        flag.set()
        try:
            check_cancelled()
        except CancelledError:
            stopped.append(job)
            raise

    with pytest.raises(CancelledError):
        Workers(Steering(cancel=flag, threads=2), 9).run(iter(range(9)), lambda: act)
    assert stopped


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_space_that_is_not_wanted_any_more_is_given_back(format, mode, tmp_path):
    path = tmp_path / "disk"
    diskwright.create(path, "1M", format=format)
    length = path.stat().st_size
    with pytest.raises(CancelledError), cancellable(wished()):
        diskwright.resize(path, "64M", format=format, preallocation=mode)
    assert diskwright.info(path, format=format).virtual_size == 1 << 20
    if format == "raw":
        assert path.stat().st_size == length
    else:
        assert diskwright.check(path).clean


@pytest.mark.parametrize(
    "operation",
    [
        lambda name, flag: diskwright.create(
            f"{name}.new", "8M", options="preallocation=full", cancel=flag
        ),
        lambda name, flag: diskwright.check(name, cancel=flag),
        lambda name, flag: diskwright.map(name, cancel=flag),
        lambda name, flag: diskwright.resize(name, "2G", preallocation="falloc", cancel=flag),
        lambda name, flag: diskwright.snapshot(name, create="one", cancel=flag),
    ],
    ids=["create", "check", "map", "resize", "snapshot"],
)
def test_the_library_takes_a_flag(operation, tmp_path):
    """Without one the operation goes on; with it the image is what it was."""
    name = tmp_path / "image.qcow2"
    diskwright.create(name, "8M", format="qcow2", options="preallocation=metadata")
    before = name.read_bytes()
    with pytest.raises(CancelledError):
        operation(name, wished())
    assert name.read_bytes() == before
    assert not (tmp_path / "image.qcow2.new").exists()
    operation(name, threading.Event())


class After:
    """A flag that is set from the n-th look on."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation_that_is_broken_off_leaks_nothing(tmp_path, mode):
    path = tmp_path / "disk.qcow2"
    for looks in (0, 1, 2, 3, 5, 17, 50):
        diskwright.create(path, "64k", format="qcow2", options="cluster_size=512")
        with pytest.raises(CancelledError):
            diskwright.resize(path, "4M", preallocation=mode, cancel=After(looks))
        report = diskwright.check(path)
        assert (report.result.leaks, report.result.corruptions) == (0, 0), looks
        assert diskwright.info(path).details.virtual_size == 65536


def test_what_is_cancelled_already_does_not_begin(tmp_path):
    flag = threading.Event()
    flag.set()
    name = tmp_path / "image"
    with pytest.raises(CancelledError):
        diskwright.create(name, "1M", format="qcow2", cancel=flag)
    assert not name.exists()
    diskwright.create(name, "1M", format="qcow2")
    before = name.read_bytes()
    with pytest.raises(CancelledError):
        diskwright.resize(name, "2M", cancel=flag)
    assert name.read_bytes() == before
