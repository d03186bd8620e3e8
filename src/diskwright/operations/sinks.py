"""How bytes get into the target of a copy: plainly, into placed host space, or encoded.

Each sink's `write(number, offset, view)` writes neighbouring bytes of one window, from any
thread; `number` is the window's place in the order of all.
"""

from __future__ import annotations

from diskwright.block.inflight import Condition
from diskwright.errors import CancelledError, DiskwrightError, UnsupportedError, errno_of
from diskwright.operations.zeroes import zero_runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.block.mapped import MappedNode
    from diskwright.block.mapping import Encoder, Place
    from diskwright.block.node import Node
    from diskwright.block.placing import Placing
    from diskwright.operations.copy import Copied, Copying


#: Longer clusters are not filled with what they read as already: a VHD's block has 2 MiB.
FILLED = 1 << 16


def located(error: DiskwrightError, sentence: str) -> DiskwrightError:
    """`error` with QEMU's sentence about it: `sentence: what the system said`."""
    from os import strerror

    if not isinstance(error, CancelledError):
        error.qemu = f"{sentence}: {strerror(errno_of(error))}"
    return error


class Sink:
    """Writes plainly.

    Args:
        target: the node, open for writing.
        copying: how.
        unit: zeroes are looked for in pieces of this length.
        copied: what was written is counted there, under `lock`.
        finest: the same where the target has space that reads as zero.
    """

    def __init__(
        self, target: Node, copying: Copying, unit: int, copied: Copied, *, finest: int
    ) -> None:
        self.target = target
        self.unit = unit
        self.copied = copied
        self._finest = finest
        self._shortest = 0 if copying.compress else copying.sparse_bytes
        self._looks = bool(copying.sparse_bytes) and copying.looks
        self._target_is_zero = copying.target_is_zero

    def write(self, number: int, offset: int, view: memoryview, *, last: bool = False) -> None:
        """Write `view`, zeroes and all.

        Args:
            number: of the window.
            offset, view: what and where.
            last: nothing more of the window is data.
        """
        for start, stop, empty in self._runs(offset, view, self.unit):
            if empty:
                self.write_zeroes(offset + start, stop - start)
            else:
                self._store(offset + start, view[start:stop])

    def _runs(self, offset: int, view: memoryview, unit: int) -> list[tuple[int, int, bool]]:
        """(start, stop, whether it is zero) of runs of units in `view`, which is at `offset`."""
        if not self._looks:
            return [(0, len(view), False)]
        runs = zero_runs(view, unit, -offset % unit)
        if self._shortest > unit and len(runs) > 1:
            runs = _without_short(runs, self._shortest)
        return runs

    def _store(self, offset: int, view: memoryview) -> None:
        """Bytes to the target, cut at its end: a disk's last sector may reach over it."""
        view = view[: max(self.target.size - offset, 0)]
        try:
            self.target.write(offset, view)
        except DiskwrightError as error:
            raise located(error, f"error while writing at byte {offset}") from error
        self.copied.count(data=len(view))

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make a range of the target zero, if it is not."""
        self.copied.count(zero=length)
        length = min(length, self.target.size - offset)
        if self._target_is_zero or length <= 0:
            return
        try:
            self.target.write_zeroes(offset, length, unmap=True)
        except DiskwrightError as error:
            raise located(error, f"error while writing at byte {offset}") from error

    def end(self, number: int) -> None:
        """Nothing more of window `number` comes."""

    def stop(self) -> None:
        """Let nobody wait for a window that will not be written."""


def _without_short(runs: list[tuple[int, int, bool]], shortest: int) -> list[tuple[int, int, bool]]:
    """Zeroes between data that are not worth a hole are data; at an end they may go on."""
    kept: list[tuple[int, int, bool]] = []
    for index, (start, stop, empty) in enumerate(runs):
        zero = empty and (stop - start >= shortest or index in (0, len(runs) - 1))
        if kept and kept[-1][2] == zero:
            kept[-1] = (kept[-1][0], stop, zero)
        else:
            kept.append((start, stop, zero))
    return kept


class PlacedSink(Sink):
    """Gets host space for whole clusters in runs and fills it directly.

    Space that is there already, as in a preallocated image, is written to where it lies.
    """

    target: MappedNode  # no other can place

    def __init__(
        self, target: Node, copying: Copying, unit: int, copied: Copied, *, finest: int
    ) -> None:
        super().__init__(target, copying, unit, copied, finest=finest)
        self._cluster = max(target.limits.cluster_size, 1)
        self._turn = Turn() if copying.in_order else None

    def write(self, number: int, offset: int, view: memoryview, *, last: bool = False) -> None:
        """See Sink. Space is taken in turn; then it is filled side by side with others'."""
        turn = self._turn
        if turn is None:
            super().write(number, offset, view)
            return
        runs = self._runs(offset, view, self.unit)
        turn.wait(number)
        with Taken(self.target) as taken:
            waiting: list[tuple[Place, memoryview]] = []
            for start, stop, empty in runs:
                if empty:
                    self.write_zeroes(offset + start, stop - start)
                else:
                    waiting += self._take(taken, offset + start, view[start:stop])
            if last:
                turn.end(number)
            self._fill(offset, waiting)
            self._publish(taken, offset)

    def end(self, number: int) -> None:
        """Nothing more of window `number` comes."""
        if self._turn is not None:
            self._turn.end(number)

    def stop(self) -> None:
        """Let nobody wait for a window that will not be written."""
        if self._turn is not None:
            self._turn.stop()

    def _store(self, offset: int, view: memoryview) -> None:
        with Taken(self.target) as taken:
            self._fill(offset, self._take(taken, offset, view))
            self._publish(taken, offset)

    def _take(self, taken: Taken, offset: int, view: memoryview) -> list[tuple[Place, memoryview]]:
        """Take space for `view`, until `taken` ends; what had space before is written at once."""
        waiting: list[tuple[Place, memoryview]] = []
        start = 0
        for stop, there in self.target.own_space(offset, len(view)):
            for first, last, whole in self._by_clusters(offset + start, offset + stop):
                part = view[first - offset : last - offset]
                if there or not whole:
                    self._store_there(first, part)
                else:
                    waiting += self._places(taken, first, part)
            start = stop
        return waiting

    def _store_there(self, offset: int, view: memoryview) -> None:
        """Bytes to where space is already, or is taken for less than a cluster."""
        if not self._target_is_zero or self._finest >= self.unit:
            super()._store(offset, view)
            return
        for start, stop, empty in self._runs(offset, view, self._finest):
            if empty:
                self.write_zeroes(offset + start, stop - start)
            else:
                super()._store(offset + start, view[start:stop])

    def _by_clusters(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether these are whole clusters) of a range's two edges and middle."""
        cluster = self._cluster
        first = min(-(-start // cluster) * cluster, stop)
        last = max(stop // cluster * cluster, first)
        for begin, end, whole in ((start, first, False), (first, last, True), (last, stop, False)):
            if begin < end:
                yield begin, end, whole

    def _places(
        self, taken: Taken, offset: int, view: memoryview
    ) -> list[tuple[Place, memoryview]]:
        try:
            places = taken.places(offset, len(view))
        except DiskwrightError as error:
            raise located(error, f"error while writing at byte {offset}") from error
        return [
            (place, view[place.offset - offset : place.offset - offset + place.length])
            for place in places
        ]

    def _publish(self, taken: Taken, offset: int) -> None:
        try:
            taken.publish()
        except DiskwrightError as error:
            raise located(error, f"error while writing at byte {offset}") from error

    def _fill(self, offset: int, waiting: list[tuple[Place, memoryview]]) -> None:
        from diskwright.block.around import write_place

        for place, part in waiting:
            runs = [(0, len(part))]
            if place.zeroed and self._cluster > FILLED:
                looked = self._runs(place.offset, part, self._finest)
                runs = [(start, stop) for start, stop, empty in looked if not empty]
            try:
                write_place(place, part, runs)
            except DiskwrightError as error:
                raise located(error, f"error while writing at byte {offset}") from error
            data = sum(stop - start for start, stop in runs)
            self.copied.count(data=data, zero=len(part) - data)


class Taken:
    """Host space taken in one request of the target's graph.

    An exception, also one of `publish`, gives up what is not published. It is an ExitStack of
    these alone: to load that takes 2 ms, of the 45 in which a conversion begins.
    """

    def __init__(self, target: MappedNode) -> None:
        self._target = target
        self._placings: list[Placing] = []

    def __enter__(self) -> Taken:
        self._request = self._target.graph.request()
        self._request.__enter__()
        return self

    def places(self, offset: int, length: int) -> list[Place]:
        """Take space for a range of whole fill units."""
        placing = self._target.place(offset, length)
        places = list(placing.__enter__())
        self._placings.append(placing)
        return places

    def publish(self) -> None:
        """Make all of it valid, the last one taken first."""
        while self._placings:
            self._placings.pop().__exit__(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        try:
            while self._placings:
                self._placings.pop().__exit__(kind, error, trace)
        finally:
            self._request.__exit__(None, None, None)


class EncodedSink(PlacedSink):
    """Writes encoded units, and plain ones where encoding does not make them shorter."""

    def __init__(
        self, target: Node, copying: Copying, unit: int, copied: Copied, *, finest: int
    ) -> None:
        super().__init__(target, copying, unit, copied, finest=finest)
        encoder = target.encoder()
        assert encoder is not None
        self._encoder: Encoder = encoder
        self._turn = Turn() if encoder.sequential or copying.in_order else None

    def write(self, number: int, offset: int, view: memoryview, *, last: bool = False) -> None:
        """Encode and write `view`."""
        made = self._encode(offset, view)
        if self._turn is not None:
            self._turn.wait(number)
        for start, stop, payload in made:
            if payload is None:
                self._store(offset + start, view[start:stop])
                continue
            try:
                self.target.write_encoded(offset + start, payload, self._encoder.unit)
            except DiskwrightError as error:
                raise located(error, f"error while writing at byte {offset + start}") from error
            self.copied.count(data=stop - start)

    def _encode(self, offset: int, view: memoryview) -> list[tuple[int, int, bytes | None]]:
        """(start, stop, payload or None) of what is to be stored."""
        unit, encode = self._encoder.unit, self._encoder.encode
        made: list[tuple[int, int, bytes | None]] = []
        whole = not offset % unit
        for start, stop, empty in self._runs(offset, view, self.unit):
            if empty:
                self.write_zeroes(offset + start, stop - start)
                continue
            for at in range(start, stop, unit):
                end = min(at + unit, stop)
                part = view[at:end]
                if not whole or (len(part) < unit and offset + end < self.target.size):
                    made.append((at, end, None))
                    continue
                if len(part) < unit:
                    part = memoryview(bytes(part).ljust(unit, b"\0"))
                made.append((at, end, encode(part)))
        return made


class NoEncodingSink(Sink):
    """For a target whose format has encoded units, but which can hold none itself.

    As with QEMU it is the first data that are refused: of zeroes alone there is a copy.
    """

    def _store(self, offset: int, view: memoryview) -> None:
        raise located(
            UnsupportedError(f"{self.target.describe()} stores nothing compressed"),
            f"error while writing at byte {offset}",
        )


def sink_kind(target: Node, *, compress: bool) -> type[Sink]:
    """Which sink a node takes, where what is stored shall or shall not be compressed."""
    if not compress:
        return PlacedSink if target.can_place else Sink
    return NoEncodingSink if target.encoder() is None else EncodedSink


class Turn:
    """Lets windows that were encoded side by side be written one after the other."""

    def __init__(self) -> None:
        self._next = 0
        self._stopped = False
        self._changed = Condition()

    def wait(self, number: int) -> None:
        """Wait until all windows before `number` are written."""
        with self._changed:
            while self._next < number and not self._stopped:
                self._changed.wait()

    def end(self, number: int) -> None:
        """Window `number` has had its turn, which may only be coming."""
        self.wait(number)
        with self._changed:
            self._next = max(self._next, number + 1)
            self._changed.notify_all()

    def stop(self) -> None:
        """There was an error; nobody waits any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
