"""Crashes that show a missing barrier: of what is pending one write is lost, or all but one.

The enumeration of tests/crash draws what is lost; this goes through all pairs, on short logs.
"""

from __future__ import annotations

from collections.abc import Iterator

from diskwright.errors import DiskwrightError
from tests import devices
from tests.crash.enumeration import Examiner, Recording, record
from tests.crash.guest import SECTOR, WrongError
from tests.crash.scenarios import SCENARIOS, Scenario
from tests.devices import Entry, State, Timeline, apply

Pending = list[tuple[str, Entry]]


def losses(timeline: Timeline) -> Iterator[State]:
    """For each entry of the log: each one pending write gone, and each alone there."""
    durable = {name: bytearray(data) for name, data in timeline.starts.items()}
    pending: Pending = []
    for index, (name, entry) in enumerate(timeline.log):
        if entry[0] == "barrier":
            for other, done in pending:
                if other == name:
                    apply(durable[name], done)
            pending = [(other, kept) for other, kept in pending if other != name]
            continue
        pending.append((name, entry))
        for lost in range(len(pending) - 1):
            if pending[lost][1][0] == "write":
                kept = pending[:lost] + pending[lost + 1 :]
                yield _state(durable, kept, index, f"without {lost} of {len(pending)} pending")
        sizes = [one for one in pending[:-1] if one[1][0] == "size"]
        yield _state(durable, [*sizes, pending[-1]], index, "the last alone")
        for torn in _torn(entry):
            yield _state(durable, [*sizes, (name, torn)], index, "a part of the last alone")
            yield _state(durable, [*pending[:-1], (name, torn)], index, "the last torn")
    yield _state(durable, [], len(timeline.log), "all that is pending is lost")


def _torn(entry: Entry) -> list[Entry]:
    """Head and tail of a write that is longer than a sector."""
    kind, offset, payload = entry
    cut = (offset // SECTOR + 1) * SECTOR - offset
    if kind != "write" or cut >= len(payload):
        return []
    return [(kind, offset, payload[:cut]), (kind, offset + cut, payload[cut:])]


def _state(durable: dict[str, bytearray], kept: Pending, index: int, how: str) -> State:
    files = {name: bytearray(data) for name, data in durable.items()}
    for name, entry in kept:
        apply(files[name], entry)
    return State(index, {name: bytes(data) for name, data in files.items()}, how)


def named(name: str) -> Scenario:
    """A scenario of tests/crash by its name."""
    return next(scenario for scenario in SCENARIOS if str(scenario) == name)


def examine_losses(scenario: Scenario, limit: int = 4000) -> int:
    """Run a scenario, then look at what crashes leave; returns how many states were fine.

    Raises:
        WrongError: one was not.
    """
    return look_at_losses(record(scenario), limit)


def look_at_losses(recording: Recording, limit: int) -> int:
    """See `examine_losses`."""
    examiner = Examiner(recording)
    seen: set[tuple[int, tuple[int, int]]] = set()
    drawn = devices.crash_states(recording.timeline, seed=1, limit=100)
    for states in (losses(recording.timeline), drawn):
        for state in states:
            key = (state.mark, recording.guest.epoch(state.index))
            if key in seen:
                continue
            seen.add(key)
            if len(seen) > limit:
                return len(seen)
            try:
                examiner.look(state)
            except (DiskwrightError, AssertionError) as error:
                raise WrongError(
                    f"{recording.scenario}: crash in entry {state.index}, {state.how}: {error}"
                ) from error
    return len(seen)
