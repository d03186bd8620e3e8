"""What races are played on: an image whose requests can be held, and threads that act on it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diskwright.block.node import Node
from tests import devices
from tests.contract.rows import Row
from tests.crash.guest import SECTOR, stamped, stamps_of

#: How long what may not wait is waited for, and how long what must wait is watched.
SOON_S, LATER_S = 10.0, 0.15

_numbers = itertools.count(1)


class Task:
    """Something done in a thread of its own."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self._value: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._action()
        except BaseException as error:
            self._error = error

    def done(self, seconds: float = 0.0) -> bool:
        """Whether it ended within that time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self, what: str = "a request") -> object:
        """What it returned; it may not take long."""
        assert self.done(SOON_S), f"{what} waits for somebody whom it has nothing to do with"
        if self._error is not None:
            raise self._error
        return self._value


class Image:
    """An image in memory, of a few clusters, whose requests can be held."""

    def __init__(self, row: Row, base: bytes = b"") -> None:
        self.row = row
        self.name = f"recorder:race-{next(_numbers)}"
        row.create(self.name, size=max(row.size, 9 << 20))
        if base:
            with row.open_base(self.name) as below:
                below.write(0, base)
        self.node: Node = row.open(self.name)
        self.unit = max(self.node.limits.cluster_size, 4096)
        files = [*row.files(self.name), f"{self.name}.base"]
        names = [name.removeprefix("recorder:") for name in files]
        self.stores = [devices.STORES[name] for name in names if name in devices.STORES]
        self.sectors = self.unit // SECTOR

    def put(self, number: int, sector: int, count: int) -> None:
        """Write stamped sectors."""
        self.node.write(sector * SECTOR, stamped(number, sector, count))

    def found(self, sector: int, count: int) -> list[int]:
        """Numbers of the writes that sectors are from, 0 where they are zero.

        Foreign data is an error.
        """
        return numbers_of(self.node.read(sector * SECTOR, count * SECTOR), sector)

    def hold(self, kind: str, wanted: Callable[[int, int], bool] | None = None) -> devices.Pauses:
        """Pause the next request of a kind in the file node."""
        pause = devices.Pauses(kind, wanted or (lambda offset, length: True))
        for store in self.stores:
            store.gate = pause
        return pause


def numbers_of(data: object, sector: int) -> list[int]:
    """The write each sector is from; each must carry its own number."""
    assert isinstance(data, bytes)
    numbers = []
    for at, stamp in enumerate(stamps_of(data), sector):
        assert stamp == 0 or stamp & 0xFFFFFFFF == at, (
            f"sector {at} has the bytes of sector {stamp & 0xFFFFFFFF}"
        )
        numbers.append(stamp >> 32)
    return numbers


@contextmanager
def image(row: Row, base: bytes = b"") -> Iterator[Image]:
    """A fresh image; what was held is let go at the end."""
    made = Image(row, base)
    held: list[devices.Pauses] = []
    hold = made.hold

    def remember(*args: object) -> devices.Pauses:
        held.append(hold(*args))  # type: ignore[arg-type]
        return held[-1]

    made.hold = remember  # type: ignore[method-assign,assignment]
    try:
        yield made
    finally:
        for pause in held:
            pause.go.set()
    made.node.close()


@contextmanager
def while_held(pause: devices.Pauses, action: Callable[[], object]) -> Iterator[Task]:
    """Do `action`, which is held; it ends after the block."""
    task = Task(action)
    reached = pause.reached.wait(SOON_S)
    assert reached, "nothing came to the point where it was to be held"
    yield task
    pause.go.set()
    task.result("what was held")
