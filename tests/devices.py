"""Protocol drivers for tests: one that records writes and barriers, and a gate that pauses it.

The recorder keeps its bytes in memory. What several of them were told lies in one `Timeline`;
`crash_states` says what a crash at any of its points may leave in each file.

Which crashes are fair: a barrier (a flush) makes durable what was written to *that* file before
it. Of what came later each write may be there, be missing, or be torn at 512 bytes, whatever
became of the others. Sizes change in their order, as the journal of a file system has them; a
write beyond the end makes the file longer when it gets there.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

from diskwright.block import registry
from diskwright.block.node import Node
from diskwright.block.opener import Opener
from diskwright.block.options import Option, Options

SECTOR = 512

#: ("write", offset, bytes), ("size", bytes, b"") or ("barrier", 0, b"")
Entry = tuple[str, int, bytes]


class Timeline:
    """What was done to several files, in one order, and what they held before."""

    def __init__(self, starts: dict[str, bytes], log: list[tuple[str, Entry]]) -> None:
        self.starts = starts
        self.log = log

    def without(self, number: int) -> Timeline:
        """The same without entry `number`: a barrier that was forgotten."""
        return Timeline(self.starts, self.log[:number] + self.log[number + 1 :])


class Store:
    """The bytes of one recorded file, and what was done to them."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.start = bytes(data)
        self.log: list[Entry] = []
        self.name = ""
        self.joint: list[tuple[str, Entry]] | None = None  # a log shared with other files
        self.fail: Callable[[str], None] = lambda kind: None
        self.gate: Callable[[str, int, int], None] = lambda kind, offset, length: None

    def note(self, entry: Entry) -> None:
        """Do what an entry says, and remember it."""
        apply(self.data, entry)
        self.log.append(entry)
        if self.joint is not None:
            self.joint.append((self.name, entry))

    def restart(self) -> None:
        """Take what is there as durable, and forget the log."""
        self.start, self.log = bytes(self.data), []


STORES: dict[str, Store] = {}


def record_together(names: list[str]) -> Timeline:
    """From now on have the stores of these names write one log; what they hold is durable."""
    timeline = Timeline({}, [])
    for name in names:
        store = STORES[name]
        store.restart()
        store.name, store.joint = name, timeline.log
        timeline.starts[name] = store.start
    return timeline


class Recorder(Node):
    """`filename` is a key of STORES."""

    driver = "recorder"
    is_protocol = True
    options = Options(Option("filename"))
    create_options = Options(Option("size", "size"), Option("preallocation"))

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        name = str(options["filename"])
        self.filename = name if name.startswith("recorder:") else f"recorder:{name}"
        self.store = STORES.setdefault(name.removeprefix("recorder:"), Store())
        self.size = len(self.store.data)

    def refresh_size(self) -> None:
        self.size = max(self.size, len(self.store.data))

    def _read_into(self, offset: int, view: memoryview) -> None:
        self.store.gate("read", offset, len(view))
        self.store.fail("read")
        part = self.store.data[offset : offset + len(view)]
        view[:] = part.ljust(len(view), b"\0")

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        self.store.gate("write", offset, len(view))
        self.store.fail("write")
        self.store.note(("write", offset, bytes(view)))

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        self.store.gate("write", offset, length)
        self.store.fail("write")
        self.store.note(("write", offset, bytes(length)))

    def _discard(self, offset: int, length: int) -> None:
        """What is discarded reads as zero, as a hole punched into a file does."""
        self.store.gate("discard", offset, length)
        self.store.fail("discard")
        self.store.note(("write", offset, bytes(length)))

    def _flush(self) -> None:
        self.store.gate("flush", 0, 0)
        self.store.fail("flush")
        self.store.note(("barrier", 0, b""))

    def _truncate(self, size: int, exact: bool, preallocation: str) -> None:
        self.store.fail("size")
        self.store.note(("size", size, b""))
        self.size = size

    @property
    def has_zero_init(self) -> bool:
        return True

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        name = str(options["filename"]).removeprefix("recorder:")
        STORES[name] = Store(bytes(size))


def apply(data: bytearray, entry: Entry) -> None:
    """Do to `data` what a log entry says."""
    kind, offset, payload = entry
    if kind == "size":
        del data[offset:]
        data.extend(bytes(offset - len(data)))
    elif kind == "write":
        if len(data) < offset + len(payload):
            data.extend(bytes(offset + len(payload) - len(data)))
        data[offset : offset + len(payload)] = payload


class State:
    """What a crash left: the files' bytes, as the log's entry `index` was under way."""

    def __init__(self, index: int, files: dict[str, bytes], how: str) -> None:
        self.index = index
        self.files = files
        self.how = how  # for messages

    @property
    def mark(self) -> int:
        """A number that differs where the bytes do (within one run of Python)."""
        return hash(tuple(sorted(self.files.items())))


#: How many kinds of crash are looked at in each entry of the log, at most.
PASSES = 40


def crash_states(timeline: Timeline, *, seed: int, limit: int) -> Iterator[State]:
    """States a crash may leave, until `limit` of them had distinct bytes or no more are found.

    Every prefix of the log (a choice of them, where `limit` is small), then passes over the
    log with random subsets and tears of what is pending. The last one is the end of the log.
    Equal bytes come again where they are left by a crash at another point.
    """
    chance = random.Random(seed)
    points = [at for at, (_, entry) in enumerate(timeline.log) if entry[0] != "barrier"]
    seen: set[int] = set()
    yield State(len(timeline.log), _final(timeline), "the end")
    for number in range(PASSES):
        wanted = limit - len(seen)
        if wanted <= 0:
            return
        # a third more than needed, for some will be equal
        share = max(wanted * 4 // 3, 24) if number else max(wanted // 3, 1)
        chosen = set(points if share >= len(points) else chance.sample(points, share))
        before = len(seen)
        for state in _one_pass(timeline, chosen, chance, every=number == 0):
            seen.add(state.mark)
            yield state
            if len(seen) >= limit:
                return
        if number > 2 and len(seen) - before < max(len(chosen) // 200, 1):
            return


def _final(timeline: Timeline) -> dict[str, bytes]:
    files = {name: bytearray(data) for name, data in timeline.starts.items()}
    for name, entry in timeline.log:
        apply(files[name], entry)
    return {name: bytes(data) for name, data in files.items()}


def _one_pass(
    timeline: Timeline, chosen: set[int], chance: random.Random, *, every: bool
) -> Iterator[State]:
    durable = {name: bytearray(data) for name, data in timeline.starts.items()}
    pending: list[tuple[str, Entry]] = []
    for index, (name, entry) in enumerate(timeline.log):
        if entry[0] == "barrier":
            for other, done in pending:
                if other == name:
                    apply(durable[name], done)
            pending = [(other, kept) for other, kept in pending if other != name]
            continue
        pending.append((name, entry))
        if index in chosen:
            survived, how = (pending, "prefix") if every else _survivors(pending, chance)
            files = {other: bytearray(data) for other, data in durable.items()}
            for other, done in survived:
                apply(files[other], done)
            yield State(index, {other: bytes(data) for other, data in files.items()}, how)


def _survivors(
    pending: list[tuple[str, Entry]], chance: random.Random
) -> tuple[list[tuple[str, Entry]], str]:
    """What of the pending entries reached the disk, in log order, torn or whole."""
    kind = chance.randrange(4)
    if kind == 0 or len(pending) == 1:  # all but the last, which is torn
        torn = _torn(pending[-1], chance)
        return pending[:-1] + torn, "last torn"
    share = chance.choice((0.2, 0.5, 0.8))
    sizes_kept = {name: chance.random() for name, _ in pending}
    survived: list[tuple[str, Entry]] = []
    cut: set[str] = set()  # files whose later sizes are lost
    for name, entry in pending:
        if entry[0] == "size":
            if name in cut or chance.random() > sizes_kept[name]:
                cut.add(name)
            else:
                survived.append((name, entry))
        elif chance.random() < share:
            survived.append((name, entry))
        elif kind > 1:
            survived += _torn((name, entry), chance) if chance.random() < 0.5 else []
    return survived, f"{len(survived)} of {len(pending)} pending"


def _torn(named: tuple[str, Entry], chance: random.Random) -> list[tuple[str, Entry]]:
    """Some of the 512-byte sectors of a write: its head, its tail, or a choice."""
    name, (kind, offset, payload) = named
    first, last = offset // SECTOR, (offset + len(payload) - 1) // SECTOR
    if kind != "write" or first >= last:
        return [named] if chance.random() < 0.5 else []
    cut = chance.randrange(first + 1, last + 1) * SECTOR - offset
    how = chance.randrange(3)
    if how == 0:
        return [(name, (kind, offset, payload[:cut]))]
    if how == 1:
        return [(name, (kind, offset + cut, payload[cut:]))]
    kept = []
    for sector in range(first, last + 1):
        if chance.random() < 0.5:
            start = max(sector * SECTOR - offset, 0)
            part = payload[start : (sector + 1) * SECTOR - offset]
            kept.append((name, (kind, offset + start, part)))
    return kept


class Pauses:
    """A gate for a Store that holds one chosen request until told to go on."""

    def __init__(self, kind: str, wanted: Callable[[int, int], bool]) -> None:
        self.kind = kind
        self.wanted = wanted
        self.reached = threading.Event()
        self.go = threading.Event()
        self.used = False

    def __call__(self, kind: str, offset: int, length: int) -> None:
        if kind == self.kind and not self.used and self.wanted(offset, length):
            self.used = True
            self.reached.set()
            assert self.go.wait(20), "a paused request was never told to go on"


def register() -> None:
    """Make the drivers known."""
    registry.register("recorder", Recorder, kind="protocols")
    registry.SCHEMES["recorder"] = "recorder"
