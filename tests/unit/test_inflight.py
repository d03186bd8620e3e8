"""The gate, range locks and joined actions, invariant by invariant (see inflight.py)."""

from __future__ import annotations

import random
import threading
import time

import pytest

from diskwright.block.graph import Graph
from diskwright.block.inflight import Condition, Gate, Joined, OwnedLock, RangeLocks
from tests.contract.races import LATER_S, Task


def test_requests_share_and_an_owner_is_alone():
    """1: nobody is inside while another thread owns the gate."""
    gate = Gate()
    count = [0]
    worst = [0]
    owned = [False]
    wrong: list[str] = []
    lock = threading.Lock()

    def request() -> None:
        for _ in range(300):
            with gate.request():
                with lock:
                    count[0] += 1
                    worst[0] = max(worst[0], count[0])
                if owned[0]:
                    wrong.append("inside beside an owner")
                with lock:
                    count[0] -= 1

    def own() -> None:
        for _ in range(60):
            gate.close()
            owned[0] = True
            if count[0]:
                wrong.append("an owner beside somebody")
            owned[0] = False
            gate.open()

    tasks = [Task(request) for _ in range(3)] + [Task(own) for _ in range(2)]
    for task in tasks:
        assert task.done(60)
        task.result()
    assert not wrong
    assert not gate.inside
    assert not gate.closed


def test_entering_again_is_nothing():
    """3: the inner one neither counts nor leaves."""
    gate = Gate()
    with gate.request():
        with gate.request():
            assert len(gate.inside) == 1
        assert len(gate.inside) == 1
    assert not gate.inside


def test_an_owner_enters_what_it_owns():
    gate = Gate()
    gate.close()
    gate.close()
    with gate.request():
        pass
    gate.open()
    task = Task(lambda: gate.request().__enter__())
    assert not task.done(LATER_S)
    gate.open()
    task.result()


def test_closing_inside_a_request_is_a_mistake():
    gate = Gate()
    with gate.request(), pytest.raises(RuntimeError, match="wait for itself"):
        gate.close()
    assert not gate.closed
    assert not gate.inside


def test_who_cannot_wait_is_told():
    gate = Gate()
    assert Task(lambda: gate.request(wait=False)).result() is not None
    gate.inside.clear()
    gate.close()
    assert Task(lambda: gate.request(wait=False)).result() is None
    gate.open()
    assert not gate.inside


def test_epochs_say_who_came_before():
    """4: what was freed in an epoch is free when all inside are of later ones."""
    gate = Gate()
    freed = gate.next_epoch()
    assert freed < gate.oldest(), "nobody is inside"
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with gate.request():
            entered.set()
            leave.wait(10)

    task = Task(stay)
    assert entered.wait(10)
    before = freed
    freed = gate.next_epoch()
    assert before < gate.oldest(), "freed before it came"
    assert freed >= gate.oldest(), "freed while it was inside"
    later = Task(lambda: gate.oldest())
    assert later.result() == freed
    leave.set()
    task.result()
    assert freed < gate.oldest()


def test_an_owner_is_its_own_past():
    """Whoever owns the gate may use what it just freed."""
    gate = Gate()
    gate.close()
    freed = gate.next_epoch()
    assert freed < gate.oldest()
    gate.open()


def test_epochs_are_given_once():
    gate = Gate()
    found: list[int] = []

    def take() -> None:
        found.extend([gate.next_epoch() for _ in range(500)])

    tasks = [Task(take) for _ in range(4)]
    for task in tasks:
        task.result()
    assert len(set(found)) == 2000


def test_joined_graphs_have_one_gate():
    one, two = Graph(), Graph()
    one.join(two)
    assert one.current() is two.current()
    low, high = sorted((one, two), key=lambda graph: graph.number)
    assert high.current() is low
    entered: list[str] = []

    def own() -> None:
        with high.exclusive():
            entered.append("owner")

    def ask() -> None:
        with high.request():
            entered.append("request")

    with low.exclusive():
        tasks = [Task(own), Task(ask)]
        assert not tasks[0].done(LATER_S)
        assert not tasks[1].done(0)
    for task in tasks:
        task.result()
    assert sorted(entered) == ["owner", "request"]
    assert not low.inside


def test_who_waits_while_graphs_are_joined_gets_in():
    """Neither a request nor an owner waits for ever at a gate that is gone."""
    for _ in range(20):
        one, two = Graph(), Graph()
        with one.exclusive():
            pass
        entered = []

        def enter(graph: Graph = two, into: list[int] = entered) -> None:
            with graph.request():
                into.append(1)

        def own(graph: Graph = two, into: list[int] = entered) -> None:
            with graph.exclusive():
                into.append(2)

        two.close()
        tasks = [Task(enter), Task(own), Task(enter)]
        time.sleep(0.001)
        joining = Task(lambda one=one, two=two: one.join(two))
        two.open()
        for task in (*tasks, joining):
            task.result()
        assert sorted(entered) == [1, 1, 2]


def test_many_graphs_become_one_at_once():
    graphs = [Graph() for _ in range(12)]
    tasks = [
        Task(lambda one=one, two=two: one.join(two))
        for one, two in zip(graphs, graphs[1:] + graphs[:1], strict=True)
    ]
    for task in tasks:
        task.result()
    assert len({graph.current().number for graph in graphs}) == 1


def test_overlapping_ranges_come_in_order():
    """5: of two that overlap the one that asked first goes first; others do not wait."""
    locks = RangeLocks()
    order: list[str] = []
    first = locks.span(0, 100)
    first.__enter__()

    def lock(name: str, start: int, stop: int) -> None:
        with locks.span(start, stop):
            order.append(name)

    second = Task(lambda: lock("second", 50, 150))
    assert not second.done(LATER_S)
    third = Task(lambda: lock("third", 120, 200))
    assert not third.done(LATER_S), "it overtook one that it overlaps"
    beside = Task(lambda: lock("beside", 200, 300))
    beside.result()
    first.__exit__(None, None, None)
    second.result()
    third.result()
    assert order == ["beside", "second", "third"]
    assert not locks._spans


def test_who_waits_can_be_overtaken():
    locks = RangeLocks(overtaking=True)
    order: list[str] = []
    first = locks.span(0, 100)
    first.__enter__()

    def lock(name: str, start: int, stop: int) -> None:
        with locks.span(start, stop):
            order.append(name)

    second = Task(lambda: lock("second", 50, 150))
    assert not second.done(LATER_S)
    Task(lambda: lock("third", 120, 200)).result()
    first.__exit__(None, None, None)
    second.result()
    assert order == ["third", "second"]
    assert not locks._spans


@pytest.mark.parametrize("overtaking", [False, True])
def test_ranges_exclude(overtaking):
    locks = RangeLocks(overtaking=overtaking)
    holding = [0] * 64
    wrong: list[int] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            start = chance.randrange(60)
            stop = start + chance.randrange(1, 5)
            with locks.span(start, stop):
                for at in range(start, min(stop, 64)):
                    holding[at] += 1
                    if holding[at] != 1:
                        wrong.append(at)
                for at in range(start, min(stop, 64)):
                    holding[at] -= 1

    tasks = [Task(lambda seed=seed: work(seed)) for seed in range(4)]
    for task in tasks:
        assert task.done(60)
        task.result()
    assert not wrong
    assert not locks._spans


def test_joined_callers_share_what_starts_after_they_came():
    """6: three callers during a run share the next one, and none shares the one under way."""
    runs: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def action() -> None:
        runs.append(len(runs))
        if len(runs) == 1:
            begun.set()
            go.wait(10)

    joined = Joined(action)
    first = Task(joined)
    assert begun.wait(10)
    others = [Task(joined) for _ in range(3)]
    assert not others[0].done(LATER_S)
    go.set()
    first.result()
    for task in others:
        task.result()
    assert runs == [0, 1]
    joined()
    assert runs == [0, 1, 2]


def test_joined_callers_share_the_error():
    begun, go = threading.Event(), threading.Event()
    runs: list[int] = []

    def action() -> None:
        runs.append(1)
        if len(runs) == 1:
            begun.set()
            go.wait(10)
        elif len(runs) == 2:
            raise ZeroDivisionError

    joined = Joined(action)
    first = Task(joined)
    assert begun.wait(10)
    others = [Task(joined) for _ in range(3)]
    assert not others[0].done(LATER_S)
    go.set()
    first.result()
    for task in others:
        with pytest.raises(ZeroDivisionError):
            task.result()
    joined()
    assert len(runs) == 3


def test_an_owned_lock_knows_its_owner():
    lock = OwnedLock()
    assert not lock.held()
    with lock:
        assert lock.held()
        assert Task(lock.held).result() is False
    assert not lock.held()


def test_a_condition_wakes_all():
    changed = Condition()
    state = [0]

    def wait() -> int:
        with changed:
            while not state[0]:
                changed.wait()
            return state[0]

    tasks = [Task(wait) for _ in range(5)]
    assert not tasks[0].done(LATER_S)
    with changed:
        state[0] = 7
        changed.notify_all()
    assert [task.result() for task in tasks] == [7] * 5


def test_waiting_for_a_condition_can_end_in_time():
    changed = Condition()
    with changed:
        begun = time.monotonic()
        changed.wait(0.02)
        assert time.monotonic() - begun >= 0.01
        changed.notify_all()  # nobody is left to be woken
        assert not changed._waiters


def test_after_a_fork_the_gate_is_open():
    gate = Gate()
    gate.inside[12345] = 0  # a thread that the child does not have
    gate.closed = True
    gate.owner = 999
    gate.after_fork()
    with gate.request():
        pass
    gate.close()
    gate.open()
