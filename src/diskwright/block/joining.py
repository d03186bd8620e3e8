"""A write over runs that lie one after the other in the file: one request, whatever their state.

Where data and room that is only reserved (a preallocated zero cluster) alternate, each is a run of
its own, but the bytes of the request go to one stretch of the file. A device, and whoever counts
requests, sees one write; then what was reserved becomes valid.

Invariants 1 to 7 of mapped.py hold: the whole range is locked, data is written before any of it is
published, and what is in place already is not touched beyond the request's own bytes.
"""

from __future__ import annotations

from diskwright.block.requests import PIECE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.mapped import MappedNode
    from diskwright.block.mapping import Allocation, Place, Run


def follows(before: Run, run: Run) -> bool:
    """Whether a run has its room in the file right behind another run's."""
    return run.child is before.child and run.host_offset == before.host_offset + before.length


def write_joined(node: MappedNode, offset: int, view: memoryview) -> int:
    """Write what of `view` goes to one stretch of the file; 0 where nothing is to be joined."""
    joined = _Joined(node, offset, view)
    with node.ranges.span(*node._cluster_around(offset, offset + len(view))):
        try:
            done = joined.collect()
            if done:
                joined.write(done)
        except BaseException as error:
            joined.give_up(error)
            raise
        joined.publish()
    return done


class _Joined:
    """One such write, under its range lock."""

    def __init__(self, node: MappedNode, offset: int, view: memoryview) -> None:
        self._node = node
        self._offset = offset
        self._view = view
        self._allocations: list[Allocation] = []
        self._first: Run | None = None
        self._head = b""
        self._tail = b""

    def collect(self) -> int:
        """Take the room of runs from the beginning on, as long as they lie together."""
        node, stop = self._node, self._offset + len(self._view)
        before: Run | None = None
        at = self._offset
        while at < stop:
            run = node.map(at, stop - at, write=True)
            if before is not None and not follows(before, run):
                break
            if not run.writable and not (run.reserved and self._take(run, at, stop)):
                break
            self._first = self._first or run
            before = run
            at = min(stop, at + run.length)
        return at - self._offset

    def _take(self, run: Run, start: int, stop: int) -> bool:
        """Have the room that a run reserves; False where it cannot be a part of this write."""
        node, fill = self._node, self._node.fill_size
        stop = min(stop, start + run.length)
        begin, end = start // fill * fill, -(-stop // fill) * fill
        allocation = node._allocate(begin, end - begin)
        self._allocations.append(allocation)
        place = allocation.places[0]
        last = place.offset + place.length
        fits = (
            place.child is run.child
            and place.host_offset - place.offset == run.host_offset - start
            and place.offset == begin
            and last >= stop
        )
        if not fits or ((begin < start or stop < last) and place.length > PIECE):
            node._abandon(self._allocations.pop())
            return False
        self._fill_edges(place, stop)
        return True

    def _fill_edges(self, place: Place, stop: int) -> None:
        """What a place has around the request: only its first and last one have anything."""
        node, end = self._node, place.offset + place.length
        if place.offset < self._offset:
            self._head = node._edge(place, place.offset, self._offset) or b""
        if stop < end:
            self._tail = node._edge(place, stop, end) or b""

    def write(self, done: int) -> None:
        """Write the first `done` bytes, and the edges with them."""
        run = self._first
        assert run is not None
        assert run.child is not None
        part = self._view[:done]
        run.child.event("write_aio")
        if self._head or self._tail:
            part = memoryview(b"".join((self._head, part, self._tail)))
            run.child.event("cow_write")
        skip = len(self._head)
        self._node._write_host(run.child, run.host_offset - skip, self._offset - skip, part)

    def publish(self) -> None:
        """What was reserved is valid now."""
        while self._allocations:
            allocation = self._allocations.pop(0)
            try:
                end = allocation.offset + allocation.length
                self._node._publish(allocation, allocation.offset, end)
            except BaseException as error:
                self.give_up(error)
                raise

    def give_up(self, error: BaseException) -> None:
        """Let go of what was taken and not published."""
        for allocation in self._allocations:
            self._node._give_up(allocation, error)
