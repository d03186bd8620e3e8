"""From a scenario to a recording, and from a recording to the states a crash leaves.

Each state is opened for reading (check, size, content, snapshots), then for writing (something
is written and flushed), then checked and read again; where QEMU reads the format it is
checked by qemu-img too. Used by test_crash.py, test_faults.py and the tests of mutants.
"""

from __future__ import annotations

import json
import os
import subprocess
from array import array
from concurrent.futures import Future, ThreadPoolExecutor

from diskwright.block.info import CheckResult, Repair
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from diskwright.errors import DiskwrightError
from tests import devices
from tests.crash.guest import SECTOR, Guest, Promise, Story, WrongError, stamped, stamps_of
from tests.crash.scenarios import Scenario
from tests.devices import State, Store, Timeline

devices.register()

#: (first sector, stamps) of each window.
Content = list[tuple[int, "array[int]"]]


class Recording:
    """What a scenario did to its files, and what its guest may rely on."""

    def __init__(self, scenario: Scenario, timeline: Timeline, guest: Guest) -> None:
        self.scenario = scenario
        self.timeline = timeline
        self.guest = guest
        self.barriers = [at for at, (_, entry) in enumerate(timeline.log) if entry[0] == "barrier"]

    def without(self, number: int) -> Recording:
        """The same with barrier `number` of `barriers` missing from the log.

        It becomes an entry without effect, so that the guest's clock stays right.
        """
        log = list(self.timeline.log)
        name, _ = log[self.barriers[number]]
        log[self.barriers[number]] = (name, ("write", 0, b""))
        return Recording(self.scenario, Timeline(self.timeline.starts, log), self.guest)


def open_state(scenario: Scenario, *, read_only: bool, **how: object) -> Node:
    """Open the image whose files are in the stores."""
    opener = Opener(read_only=read_only)
    return open_image(opener, scenario.spec(**how))


def prepare(scenario: Scenario, take: int = 0) -> Story:
    """Make the image and what is in it before the crash; returns what that is."""
    for name in scenario.files:
        devices.STORES.pop(name, None)
    base: dict[int, int] = {}
    if scenario.backing:
        scenario.create("base")
        with open_image(Opener(read_only=False), scenario.base_spec()) as node:
            below = Guest(node, [], {})
            for first, count in scenario.below:
                below.write(first, count)
        base = _settled(below).disk.base
    scenario.create("image")
    with open_state(scenario, read_only=False) as node:
        guest = Guest(node, [], base)
        scenario.prepare(guest, take)
    return _settled(guest)


def _settled(guest: Guest) -> Story:
    story = guest.story(None)
    story.disk.settle()
    assert not story.disk.loose, "a scenario's preparation must leave no doubt"
    return story


def record(scenario: Scenario, take: int = 0) -> Recording:
    """Run a scenario and record it."""
    before = prepare(scenario, take)
    timeline = devices.record_together(scenario.files)
    node = open_state(scenario, read_only=False)
    guest = Guest(
        node, timeline.log, before.disk.base, snapshots=before.snapshots, noted=before.noted
    )
    if scenario.backing:
        guest.below = dict(before.disk.base)
    try:
        scenario.act(guest, take)
        if not node.closed:
            guest.close()
    finally:
        node.close()
    for name in scenario.files:
        devices.STORES[name].joint = None
    return Recording(scenario, timeline, guest)


# ------------------------------------------------------------------------------ looking at a state


class Judge:
    """qemu-img check over states, in the background; `trouble` is what it found."""

    def __init__(self, scenario: Scenario, program: str, folder: str) -> None:
        self.scenario = scenario
        self.program = program
        self.folder = folder
        self.pool = ThreadPoolExecutor(1)
        self.waiting: list[tuple[State, Future[str]]] = []
        self.count = 0

    def look(self, state: State, content: Content) -> None:
        """Have a state checked; QEMU must read `content`, too, where the format has no check."""
        while len(self.waiting) >= 2:
            self._collect()
        paths: dict[str, str] = {}
        for name, data in state.files.items():
            paths[name] = os.path.join(self.folder, f"{name}-{self.count % 4}")
            with open(paths[name], "wb") as file:
                file.write(data)
        self.count += 1
        self.waiting.append((state, self.pool.submit(self._check, paths, content)))

    def _collect(self) -> None:
        state, future = self.waiting.pop(0)
        trouble = future.result()
        if trouble:
            raise WrongError(
                f"qemu-img check, crash in entry {state.index} ({state.how}): {trouble}"
            )

    def _check(self, paths: dict[str, str], content: Content) -> str:
        for name in self.scenario.judged:
            command = [self.program, "check", *self._repair(paths[name])]
            spec = {
                "driver": self.scenario.driver,
                "file": {"driver": "file", "filename": paths[name]},
            }
            if self.scenario.backing and name == "image":
                spec["backing"] = None
            done = subprocess.run(
                [*command, f"json:{json.dumps(spec)}"], capture_output=True, check=False, timeout=60
            )
            text = (done.stdout + done.stderr).decode("utf-8", "replace")
            if not self.scenario.accepts(done.returncode, text):
                return f"{name}: exit {done.returncode}: {text[-600:]}"
        if self.scenario.driver == "vpc" and "image" in self.scenario.judged:
            return self._compare(paths["image"], content)
        return ""

    def _compare(self, path: str, content: Content) -> str:
        raw = f"{path}.raw"
        command = [self.program, "convert", "-f", self.scenario.driver, "-O", "raw", path, raw]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
        if done.returncode:
            return done.stderr.decode("utf-8", "replace")
        with open(raw, "rb") as file:
            for first, stamps in content:
                file.seek(first * SECTOR)
                if stamps_of(file.read(len(stamps) * SECTOR)) != stamps:
                    return "QEMU reads something else"
        return ""

    def _repair(self, path: str) -> list[str]:
        """An image whose refcounts may be behind has them mended, as opening it does."""
        with open(path, "rb") as file:
            return ["-r", "all"] if self.scenario.is_dirty(file.read(512)) else []

    def finish(self) -> None:
        """Wait for the rest."""
        try:
            while self.waiting:
                self._collect()
        finally:
            self.pool.shutdown()


class Examiner:
    """Looks at states of one recording; raises WrongError with all that is needed to repeat."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.scenario = recording.scenario
        self._stories: dict[tuple[int, int], Story] = {}

    def story(self, index: int) -> Story:
        """The promise for a crash in an entry."""
        guest = self.recording.guest
        key = guest.epoch(index)
        if key not in self._stories:
            self._stories[key] = guest.story(index)
        return self._stories[key]

    def look(self, state: State) -> Content:
        """Open a state in every way; what the disk holds."""
        return look_at(self.scenario, state.files, self.story(state.index))


def look_at(scenario: Scenario, files: dict[str, bytes], story: Story) -> Content:
    """Open files in every way, and hold them against what they may be.

    Returns:
        What the disk holds.

    Raises:
        WrongError: they are corrupt, or hold something that they must not.
    """
    for name, data in files.items():
        devices.STORES[name] = Store(data)
    with open_state(scenario, read_only=True) as node:
        if scenario.clean_at_once(node):
            _checked(scenario, node, "opened for reading")
        before = _content(scenario, node)
        _hold(scenario, node, before, story)
        _hold_bitmaps(node, before, story)
    with open_state(scenario, read_only=False) as node:
        _hold_snapshots(scenario, node, story)
        place = min(scenario.scribble, node.size // SECTOR - 1)
        node.write(place * SECTOR, stamped(1, place, 1))
        node.flush()
        _checked(scenario, node, "opened for writing")
    with open_state(scenario, read_only=True) as node:
        _checked(scenario, node, "after a write")
        after = _content(scenario, node)
        if after != before:
            _tell_difference(place, before, after)
        for info in node.dirty_bitmaps():
            if info.enabled and not info.inconsistent:
                found = node.dirty_bitmap(info.name).runs(place * SECTOR, SECTOR)
                if not list(found):
                    raise WrongError(f"the bitmap {info.name} missed a write after the crash")
    return before


def _hold_bitmaps(node: Node, content: Content, story: Story) -> None:
    """Each bitmap is inconsistent, if it may be, or misses no write that is on the disk."""
    there = {info.name: info for info in node.dirty_bitmaps()}
    missing = story.noted.keys() - there.keys() - story.unsure
    if missing or there.keys() - story.noted.keys():
        raise WrongError(f"bitmaps are {sorted(there)}, not {sorted(story.noted)}")
    for name, info in there.items():
        noting = story.noted[name]
        if info.inconsistent:
            if story.closed or not (noting.enabled or story.resizing):
                raise WrongError(f"the bitmap {name} is inconsistent, and need not be")
            continue
        noted: set[int] = set()
        for offset, length in node.dirty_bitmap(name).runs():
            noted.update(range(offset // SECTOR, -(-(offset + length) // SECTOR)))
        for first, stamps in content:
            for at, stamp in enumerate(stamps, first):
                if noting.wants(stamp >> 32) and at not in noted:
                    raise WrongError(f"the bitmap {name} missed the write {stamp:#x} of {at}")


def _checked(scenario: Scenario, node: Node, when: str) -> CheckResult:
    lines: list[str] = []
    result = node.check(Repair.NONE, lines.append)
    if scenario.corruptions(result, lines) or result.check_errors:
        raise WrongError(f"corrupt, {when}: {lines[:5]}")
    return result


def _content(scenario: Scenario, node: Node) -> Content:
    found = []
    for first, count in scenario.windows:
        count = min(count, node.size // SECTOR - first)
        if count > 0:
            found.append((first, stamps_of(node.read(first * SECTOR, count * SECTOR))))
    return found


def _hold(scenario: Scenario, node: Node, content: Content, story: Story) -> None:
    if node.size not in story.disk.sizes:
        raise WrongError(f"the size is {node.size}, but may be {sorted(story.disk.sizes)}")
    for first, stamps in content:
        story.disk.hold(first, stamps, "the disk")
    if story.whole:
        for base in story.whole:
            wanted = Promise(base, node.size)
            try:
                for first, stamps in content:
                    wanted.hold(first, stamps, "the disk as a whole")
                return
            except WrongError as error:
                last = error
        raise last


def _hold_snapshots(scenario: Scenario, node: Node, story: Story) -> None:
    if not node.can_snapshot:
        return
    there = {info.name for info in node.snapshots()}
    missing = story.snapshots.keys() - there - story.doubtful
    if missing or there - story.snapshots.keys():
        raise WrongError(f"snapshots are {sorted(there)}, not {sorted(story.snapshots)}")
    for name in there:
        with open_state(scenario, read_only=True, snapshot=name) as kept:
            promise = story.snapshots[name]
            if kept.size not in promise.sizes:
                raise WrongError(f"snapshot {name} has {kept.size} bytes")
            for first, stamps in _content(scenario, kept):
                promise.hold(first, stamps, f"snapshot {name}")


def _tell_difference(
    written: int,
    before: Content,
    after: Content,
) -> None:
    for (first, old), (_, new) in zip(before, after, strict=True):
        for at, (was, is_) in enumerate(zip(old, new, strict=True), first):
            if was != is_ and at != written:
                raise WrongError(
                    f"sector {at} changed from {was:#x} to {is_:#x} by a write to another one"
                )


def examine(
    recording: Recording,
    *,
    seed: int,
    limit: int,
    judge: Judge | None = None,
    counted: set[int] | None = None,
) -> int:
    """Look at crash states until `limit` distinct ones were fine; returns how many there were.

    Args:
        recording: of a scenario.
        seed, limit: see `devices.crash_states`.
        judge: looks at each distinct state too.
        counted: marks of states that count no more; gets those of this run.

    Raises:
        WrongError: one was not.
    """
    examiner = Examiner(recording)
    done: set[tuple[int, tuple[int, int]]] = set()
    fresh = set() if counted is None else counted
    before = len(fresh)
    guest = recording.guest
    try:
        for state in devices.crash_states(recording.timeline, seed=seed, limit=limit):
            mark = state.mark
            key = (mark, guest.epoch(state.index))
            if key in done:
                continue
            done.add(key)
            content = _look(examiner, state, seed)
            if mark not in fresh:
                fresh.add(mark)
                if judge is not None:
                    judge.look(state, content)
    finally:
        if judge is not None:
            judge.finish()
    return len(fresh) - before


def _look(examiner: Examiner, state: State, seed: int) -> Content:
    try:
        return examiner.look(state)
    except (DiskwrightError, AssertionError) as error:
        at = state.index
        log = examiner.recording.timeline.log
        last = log[at] if at < len(log) else ("", ("end", 0, b""))
        deed = [d.what for d in examiner.recording.guest.deeds if d.begin <= at][-1:]
        raise WrongError(
            f"{examiner.scenario}: seed {seed}, crash in entry {at} of {len(log)} "
            f"({last[0]} {last[1][0]} at {last[1][1]}, {len(last[1][2])} bytes; {state.how}) "
            f"during {deed}: {type(error).__name__}: {error}"
        ) from error


__all__ = ["Examiner", "Judge", "Recording", "examine", "look_at", "open_state", "record"]
