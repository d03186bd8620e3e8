"""Copies that move no bytes: blocks shared by the file system, or copied by the kernel."""

from __future__ import annotations

from diskwright.block.around import BLOCK, Spot, could_share, offload, plain_spot, share, spot_of
from diskwright.block.extent import DATA
from diskwright.operations.source import SKIP, Piece

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.mapped import MappedNode
    from diskwright.block.mapping import Place
    from diskwright.block.node import Node
    from diskwright.operations.copy import Copied

#: Shorter pieces are read and written faster.
SHORTEST = 1 << 16


class _NotSharedError(Exception):
    """Leaves `place` so that the host space is given back."""


class Sharing:
    """Tries to share pieces with one target, until the file system says that it does not.

    Args:
        target: the node, open for writing.
        kernel_copies: where blocks cannot be shared, let the kernel copy them.
        copied: what was shared is counted there.
    """

    def __init__(self, target: Node, *, kernel_copies: bool, copied: Copied) -> None:
        self._target = target
        self._copied = copied
        self._placed: MappedNode | None = None
        if target.can_place:
            from diskwright.block.mapped import MappedNode  # loaded: no other node can place

            assert isinstance(target, MappedNode)
            self._placed = target
        self._unit = max(target.limits.cluster_size if self._placed else 1, BLOCK)
        self._asked = False
        self._clones = True
        self._kernel_copies = kernel_copies
        self.works = False  # it did once

    @property
    def hopeless(self) -> bool:
        """Whether no more pieces need to be tried."""
        return not self._clones and not self._kernel_copies

    def rest(self, pieces: list[Piece]) -> list[Piece]:
        """Share what can be shared; in its place is SKIP, the others are as they were."""
        left: list[Piece] = []
        for piece in pieces:
            if piece.kind != DATA or piece.length < SHORTEST or self.hopeless:
                left.append(piece)
            else:
                left.extend(self._divided(piece))
        return left

    def _divided(self, piece: Piece) -> list[Piece]:
        """The aligned middle of the piece shared, if possible."""
        stop = piece.offset + piece.length
        start = -(-piece.offset // self._unit) * self._unit
        end = stop // self._unit * self._unit
        middle = piece.part(start, end - start) if end > start else None
        source = spot_of(middle.child, middle.host_offset) if middle is not None else None
        if middle is None or source is None or source.offset % BLOCK:
            return [piece]
        if not self._asked:  # before space is taken in vain
            self._clones = could_share(source, self._target)
            self._asked = True
            if self.hopeless:
                return [piece]
        if not self._share(source, middle):
            return [piece]
        self.works = True
        self._copied.count(shared=middle.length)
        middle.kind = SKIP
        parts = [middle]
        if start > piece.offset:
            parts.insert(0, piece.part(piece.offset, start - piece.offset))
        if end < stop:
            parts.append(piece.part(end, stop - end))
        return parts

    def _share(self, source: Spot, piece: Piece) -> bool:
        target, placed = self._target, self._placed
        if placed is None:
            with target.graph.request():
                spot = plain_spot(target, piece.offset, piece.length)
                return spot is not None and self._try(source, spot, piece.length)
        if any(there for _, there in placed.own_space(piece.offset, piece.length)):
            return False  # what was provided for is used
        try:
            with target.graph.request():
                with placed.place(piece.offset, piece.length) as places:
                    for place in places:
                        self._share_place(source, piece, place)
        except _NotSharedError:
            return False
        return True

    def _share_place(self, source: Spot, piece: Piece, place: Place) -> None:
        skip = place.offset - piece.offset
        begin = Spot(source.node, source.descriptor, source.offset + skip)
        spot = spot_of(place.child, place.host_offset)
        if spot is None or not self._try(begin, spot, place.length):
            raise _NotSharedError

    def _try(self, source: Spot, target: Spot, length: int) -> bool:
        if target.offset % BLOCK:
            self._clones = False  # as are all places of this format
        if self._clones:
            if share(source, target, length, known=self.works):
                return True
            self._clones = False
        if self._kernel_copies:
            if offload(source, target, length, known=self.works):
                return True
            self._kernel_copies = False
        return False
