"""Protocol drivers for tests: one that records writes and barriers, one that pauses.

The recorder keeps its bytes in memory. Its log can be replayed up to any point, with any
subset of the writes that no barrier had made durable: that is what a crash may leave.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator

from diskwright.block import registry
from diskwright.block.node import Node
from diskwright.block.opener import Opener
from diskwright.block.options import Option, Options

SECTOR = 512


class Store:
    """The bytes of one recorded file, and what was done to them."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.start = bytes(data)
        #: ("write", offset, bytes), ("size", bytes, b"") or ("barrier", 0, b"")
        self.log: list[tuple[str, int, bytes]] = []
        self.fail: Callable[[str], None] = lambda kind: None
        self.gate: Callable[[str, int, int], None] = lambda kind, offset, length: None

    def restart(self) -> None:
        """Take what is there as durable, and forget the log."""
        self.start, self.log = bytes(self.data), []


STORES: dict[str, Store] = {}


class Recorder(Node):
    """`filename` is a key of STORES."""

    driver = "recorder"
    is_protocol = True
    options = Options(Option("filename"))
    create_options = Options(Option("size", "size"), Option("preallocation"))

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        self.filename = str(options["filename"])
        self.store = STORES.setdefault(self.filename.removeprefix("recorder:"), Store())
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
        apply(self.store.data, ("write", offset, bytes(view)))
        self.store.log.append(("write", offset, bytes(view)))

    def _flush(self) -> None:
        self.store.gate("flush", 0, 0)
        self.store.fail("flush")
        self.store.log.append(("barrier", 0, b""))

    def _truncate(self, size: int, exact: bool, preallocation: str) -> None:
        self.store.fail("size")
        self.store.log.append(("size", size, b""))
        apply(self.store.data, ("size", size, b""))
        self.size = size

    @property
    def has_zero_init(self) -> bool:
        return True

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        name = str(options["filename"]).removeprefix("recorder:")
        STORES[name] = Store()


def apply(data: bytearray, entry: tuple[str, int, bytes]) -> None:
    """Do to `data` what a log entry says."""
    kind, offset, payload = entry
    if kind == "size":
        del data[offset:]
        data.extend(bytes(offset - len(data)))
    elif kind == "write":
        if len(data) < offset + len(payload):
            data.extend(bytes(offset + len(payload) - len(data)))
        data[offset : offset + len(payload)] = payload


def crash_states(store: Store, *, seed: int, limit: int) -> Iterator[tuple[int, bytes]]:
    """Distinct states that a crash may leave: (log entries begun by then, bytes).

    Every prefix; the last write torn at 512 bytes; random subsets, in random order, of what
    is pending since the last barrier.
    """
    chance = random.Random(seed)
    states = list(_all_states(store, chance))
    chance.shuffle(states)
    seen: set[bytes] = set()
    for index, make in states:
        if len(seen) >= limit:
            return
        data = make()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield index, data


def _all_states(store: Store, chance: random.Random) -> Iterator[tuple[int, Callable[[], bytes]]]:
    durable = 0
    for index, entry in enumerate(store.log):
        if entry[0] == "barrier":
            durable = index + 1
            continue
        pending = list(range(durable, index + 1))
        yield index, lambda stop=index + 1: _replay(store, range(stop))
        if entry[0] == "write" and len(entry[2]) > SECTOR:
            for _ in range(min(len(entry[2]) // SECTOR, 4)):
                cut = chance.randrange(1, -(-len(entry[2]) // SECTOR)) * SECTOR
                head = chance.random() < 0.5
                yield index, lambda stop=index, c=cut, h=head: _torn(store, stop, c, h)
        for _ in range(3 if len(pending) >= 3 else 0):
            keep = [at for at in pending if chance.random() < 0.6]
            chance.shuffle(keep)
            yield index, lambda d=durable, k=tuple(keep): _replay(store, (*range(d), *k))


def _replay(store: Store, entries: object) -> bytes:
    data = bytearray(store.start)
    for at in entries:  # type: ignore[attr-defined]
        apply(data, store.log[at])
    return bytes(data)


def _torn(store: Store, stop: int, cut: int, head: bool) -> bytes:
    data = bytearray(_replay(store, range(stop)))
    _, offset, payload = store.log[stop]
    if head:
        apply(data, ("write", offset, payload[:cut]))
    else:
        apply(data, ("write", offset + cut, payload[cut:]))
    return bytes(data)


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
