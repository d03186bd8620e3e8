"""Host space handed out to whoever fills it around the node: the copy engine.

The places are valid, and seen by readers, once all of them are filled; on an error none is.
"""

from __future__ import annotations

from diskwright.block import requests
from diskwright.block.mapping import Place
from diskwright.errors import RangeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.block.mapped import MappedNode
    from diskwright.block.mapping import Allocation


class Placing:
    """Host space handed out by `MappedNode.place`."""

    def __init__(self, node: MappedNode, offset: int, length: int) -> None:
        requests.check_range(node, offset, length)
        if offset % node.fill_size or (
            (offset + length) % node.fill_size and offset + length != node.size
        ):
            raise RangeError(f"Places are whole units of {node.fill_size} bytes", offset=offset)
        self._node = node
        self._offset, self._length = offset, length
        self._span = node.ranges.span(*node._cluster_around(offset, offset + length))
        self._allocations: list[Allocation] = []

    def __enter__(self) -> Iterator[Place]:
        self._span.__enter__()
        node, fill = self._node, self._node.fill_size
        start, stop = self._offset, -(-(self._offset + self._length) // fill) * fill
        places: list[Place] = []
        try:
            requests.check_writable(node)
            node.before_write()
            while start < self._offset + self._length:  # an allocation may end with the disk
                allocation = node._allocate(start, stop - start)
                self._allocations.append(allocation)
                places += [self._inside(place, start, stop) for place in allocation.places]
                start = allocation.offset + allocation.length
        except BaseException as error:
            self._end_without(error)
            raise
        return iter(places)

    def _inside(self, place: Place, start: int, stop: int) -> Place:
        """The part of a place that was asked for; the rest is filled with what is there now."""
        first, last = max(place.offset, start), min(place.offset + place.length, stop)
        self._node._copy_edge(place, place.offset, first)
        self._node._copy_edge(place, last, place.offset + place.length)
        return Place(
            first,
            last - first,
            place.child,
            host_offset=place.host_offset + first - place.offset,
            fresh=place.fresh,
            zeroed=place.zeroed,
        )

    def _end_without(self, error: BaseException | None) -> None:
        for allocation in self._allocations:
            self._node._give_up(allocation, error)
        self._span.__exit__(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        if kind is not None:
            self._end_without(error)
            return
        try:
            for allocation in self._allocations:
                end = allocation.offset + allocation.length
                self._node._publish(allocation, allocation.offset, end)
        finally:
            requests.note(self._node, self._offset, self._length)
            self._span.__exit__(None, None, None)
