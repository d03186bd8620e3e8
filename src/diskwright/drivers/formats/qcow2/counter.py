"""References to host clusters, counted as a check goes through the tables."""

from __future__ import annotations

from array import array

from diskwright.drivers.formats.qcow2.entries import add_to_counts

#: No width of refcounts counts further here; so many references no image has.
_MOST = (1 << 32) - 1


class Counter:
    """References counted so far, by host cluster.

    Args:
        chunk: counters are kept in pieces of so many clusters.
        maximum: as far as the image's refcounts can count.
    """

    def __init__(self, chunk: int, maximum: int) -> None:
        self.chunk = chunk
        self.maximum = maximum
        self.chunks: dict[int, array[int]] = {}
        self._beyond: dict[int, int] = {}  # references that the counters cannot say
        self.dangling: set[int] = set()  # clusters behind the file's end that something names

    def add(self, first: int, last: int) -> list[int]:
        """One more to the clusters `first` to `last`; those of them that have too many.

        A cluster never has more than `maximum`, as its refcount cannot say more.
        """
        over: list[int] = []
        while first <= last:
            number, at = divmod(first, self.chunk)
            counts = self.chunks.get(number)
            if counts is None:
                counts = self.chunks[number] = array("I", bytes(4)) * self.chunk
            stop = min(last - first + at + 1, self.chunk)
            add_to_counts(counts, at, stop, 1)
            if self.maximum < _MOST and max(counts[at:stop]) > self.maximum:
                for place in range(at, stop):
                    if counts[place] > self.maximum:
                        counts[place] = self.maximum
                        over.append(first - at + place)
            first += stop - at
        for cluster in over:
            self._beyond[cluster] = self._beyond.get(cluster, 0) + 1
        return over

    def drop(self, cluster: int) -> bool:
        """One less to a cluster that has some; whether it shows."""
        if self._beyond.get(cluster):
            self._beyond[cluster] -= 1
            return False
        self.chunks[cluster // self.chunk][cluster % self.chunk] -= 1
        return True

    def get(self, cluster: int) -> int:
        """How many references a cluster has."""
        counts = self.chunks.get(cluster // self.chunk)
        return counts[cluster % self.chunk] if counts is not None else 0
