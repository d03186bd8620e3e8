"""Mapped formats: the engine writes, the driver maps.

A driver says where bytes lie (`map`, `locate`), finds room (`allocate`), and makes room valid
(`publish`) or invalid (`unmap`, `release`). Everything else is here, once: how requests are
cut, copy-on-write of the edges, range locks, retirement, encoded units, encryption in place.

A write's way, with the invariants that tests/contract, tests/crash and the mutants hold:

    in place    `locate`/`map` says the run is writable: bytes go there, no lock taken
    otherwise   range lock -> map again -> allocate -> edges and data written -> publish

1. Bytes of a place are written before it is published, so a reader that maps it finds them.
2. `allocate`, `publish`, `unmap`, `release` run under the metadata lock and do no I/O. A
   slice that is missing is loaded without the lock (TableMiss), a file that is too short is
   grown without it (NeedGrowth), and the hook is called again. Hooks fetch everything
   before they change anything.
3. Slices that `allocate` fetched stay pinned until `publish` or `abandon`.
4. Freed space is released only when every request that was inside the gate as it was freed
   has left (epoch), and when the slice that stopped naming it is durable.
5. Where a place is fresh its whole cluster is locked; where the block existed (`has_block`),
   only the units that are being made valid: two writers in one 32 MiB block proceed.
6. `first_write` has ended durably before the first changed byte.
7. After a table could not be written, the node is broken: reads go on, writes are refused.
"""

from __future__ import annotations

from diskwright.block import requests
from diskwright.block.cancel import check_cancelled
from diskwright.block.extent import DATA, UNALLOCATED, ZERO, Extent
from diskwright.block.mapped_base import RETIRED_BATCH, MappedBase
from diskwright.block.mapping import (
    TO_ANY,
    TO_BACKING,
    TO_ZERO,
    Allocation,
    Encoder,
    Freed,
    NeedGrowth,
    NeedWork,
    Place,
    Run,
    Unit,
)
from diskwright.errors import NoSpaceError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from diskwright.block.child import Child
    from diskwright.block.placing import Placing

__all__ = [
    "TO_ANY",
    "TO_BACKING",
    "TO_ZERO",
    "Allocation",
    "Encoder",
    "Freed",
    "MappedNode",
    "NeedGrowth",
    "NeedWork",
    "Place",
    "Run",
    "Unit",
]

#: Edges, encoded reads and populate work in pieces of this size.
PIECE = requests.PIECE

#: Decoded units kept for readers that come back.
DECODED_BYTES = 8 << 20


class MappedNode(MappedBase):
    """A format whose driver maps: the paths of its reads and writes."""

    # ------------------------------------------------------------------------------ reading

    def _read_into(self, offset: int, view: memoryview) -> None:
        done, length = 0, len(view)
        while done < length:
            run = self.map(offset + done, length - done)
            count = min(run.length, length - done)
            part = view[done : done + count]
            if run.kind == UNALLOCATED:
                self._read_backing(offset + done, part)
            elif run.kind == ZERO:
                requests.fill_zero(part)
            elif run.unit is not None:
                count = self._read_units(run.unit, offset + done, view[done:], count)
            else:
                self._read_run(run, offset + done, part)
            done += count

    def _read_run(self, run: Run, offset: int, part: memoryview) -> None:
        assert run.child is not None
        run.child.event("read_aio")
        run.child.read_into(run.host_offset, part)
        if self.has_transform:
            self.transform(offset, run.host_offset, part, False)

    def _read_backing(self, offset: int, part: memoryview) -> None:
        backing = self.backing
        if backing is None:
            requests.fill_zero(part)
        else:
            self.tell("read_backing_aio")
            backing.read_into(offset, part)

    def _read_units(self, unit: Unit, offset: int, view: memoryview, count: int) -> int:
        """Read one unit's `count` bytes, or several whole ones that lie one after the other.

        Returns how many bytes of `view` were filled.
        """
        if offset != unit.offset or len(view) < 2 * unit.length:
            self._read_unit(unit, offset, view[:count])
            return count
        units = [unit]
        first, last = unit.host_offset, unit.host_offset + unit.host_length
        end, stop = offset + unit.length, offset + len(view)
        while end < stop and last - first < PIECE:
            found = self.map(end, stop - end).unit
            if found is None or found.child is not unit.child or found.offset + found.length > stop:
                break
            if found.offset != end or not first <= found.host_offset <= last:
                break
            units.append(found)
            last = max(last, found.host_offset + found.host_length)
            end += found.length
        encoded = memoryview(unit.child.read(first, last - first))
        for one in units:
            start, at = one.host_offset - first, one.offset - offset
            piece = encoded[start : start + one.host_length]
            self.decode(one, piece, view[at : at + one.length])
        return end - offset

    def _read_unit(self, unit: Unit, offset: int, part: memoryview) -> None:
        if len(part) == unit.length and offset == unit.offset:
            encoded = memoryview(unit.child.read(unit.host_offset, unit.host_length))
            self.decode(unit, encoded, part)
            return
        skip = offset - unit.offset
        part[:] = self._decode_cached(unit)[skip : skip + len(part)]

    def _decode_cached(self, unit: Unit) -> bytes:
        """The unit's bytes; one decode of a unit at a time, the last ones kept."""
        key = (id(unit.child), unit.host_offset, unit.host_length)
        with self._decoded_changed:
            while key in self._decoding:
                self._decoded_changed.wait()
            kept = self._decoded.pop(key, None)
            if kept is not None:
                self._decoded[key] = kept  # youngest again
                return kept
            self._decoding.add(key)
        made: bytes | None = None
        try:
            out = bytearray(unit.length)
            encoded = memoryview(unit.child.read(unit.host_offset, unit.host_length))
            self.decode(unit, encoded, memoryview(out))
            made = bytes(out)
            return made
        finally:
            with self._decoded_changed:
                self._decoding.discard(key)
                if made is not None:
                    self._keep_decoded(key, made)
                self._decoded_changed.notify_all()

    def _keep_decoded(self, key: tuple[int, int, int], made: bytes) -> None:
        self._decoded[key] = made
        self._decoded_bytes += len(made)
        while self._decoded_bytes > DECODED_BYTES and len(self._decoded) > 1:
            oldest = next(iter(self._decoded))
            self._decoded_bytes -= len(self._decoded.pop(oldest))

    def _extents(self, offset: int, length: int) -> Iterable[Extent]:
        done = 0
        while done < length:
            check_cancelled()
            run = self.map(offset + done, length - done)
            count = min(run.length, length - done)
            encoded = run.unit is not None or (run.kind == DATA and self.has_transform)
            has_host = run.child is not None and run.host_offset >= 0
            yield Extent(
                offset + done,
                count,
                run.kind,
                allocated=run.kind != UNALLOCATED,
                encoded=encoded,
                child=run.child if has_host else None,
                host_offset=run.host_offset if has_host else None,
            )
            done += count

    # ------------------------------------------------------------------------------ writing

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        done, length = 0, len(view)
        while done < length:
            run = self.map(offset + done, length - done, write=True)
            part = view[done : done + min(run.length, length - done)]
            try:
                if done + len(part) < length and (run.writable or run.reserved):
                    joined = self._write_joined(run, offset + done, view[done:])
                    if joined:
                        done += joined
                        continue
                if run.writable:
                    assert run.child is not None
                    run.child.event("write_aio")
                    self._write_host(run.child, run.host_offset, offset + done, part)
                    done += len(part)
                else:
                    done += self._write_new(offset + done, part)
            except NoSpaceError:
                if not self._have_back():  # what was freed may be room enough
                    raise

    def _write_joined(self, run: Run, offset: int, view: memoryview) -> int:
        """Write a run and what lies behind it in the file, too; 0 where that is not to be."""
        following = self.map(offset + run.length, len(view) - run.length, write=True)
        if not following.reserved and (run.writable or not following.writable):
            return 0
        from diskwright.block import joining

        return joining.write_joined(self, offset, view) if joining.follows(run, following) else 0

    def _write_host(self, child: Child, host: int, offset: int, part: memoryview) -> None:
        """Bytes of the node at `offset` to their place, encrypted if the format does that."""
        if self.has_transform:
            scrambled = memoryview(bytearray(part))
            self.transform(offset, host, scrambled, True)
            part = scrambled
        child.write(host, part)

    def _write_new(self, offset: int, view: memoryview) -> int:
        """Write where nothing can be overwritten; returns how much of `view` was written."""
        fill, cluster = self.fill_size, self.cluster_size
        if fill < cluster and self.has_block(offset):
            view = view[: cluster - offset % cluster]
            done = self._write_locked(offset, view, fill)
            if done is not None:
                return done
        done = self._write_locked(offset, view, cluster)
        assert done is not None
        return done

    def _write_locked(self, offset: int, view: memoryview, unit: int) -> int | None:
        """`_write_new` with whole units locked; None where that is not enough (invariant 5)."""
        fill = self.fill_size
        stop = offset + len(view)
        with self.ranges.span(offset // unit * unit, -(-stop // unit) * unit) as span:
            run = self.map(offset, len(view), write=True)
            if run.writable:  # somebody was quicker
                return 0
            stop = min(stop, offset + run.length)
            start = offset // fill * fill
            allocation = self._allocate(start, -(-stop // fill) * fill - start)
            first, last = allocation.offset, allocation.offset + allocation.length
            try:
                if unit < self.cluster_size and (
                    any(place.fresh for place in allocation.places)
                    or not span.start <= first <= last <= span.stop
                ):
                    self._abandon(allocation)
                    return None
                stop = min(stop, last)
                for place in allocation.places:
                    self._fill_place(place, offset, view[: stop - offset])
            except BaseException as error:
                self._give_up(allocation, error)
                raise
            self._publish(allocation, first, last)
        return stop - offset

    def _fill_place(self, place: Place, offset: int, view: memoryview) -> None:
        """Write a place's part of `view`, and its edges with what they read as now."""
        first = max(place.offset, offset)
        last = min(place.offset + place.length, offset + len(view))
        if last <= first:
            first = last = place.offset
        part = view[first - offset : last - offset]
        head = self._edge(place, place.offset, first)
        tail = self._edge(place, last, place.offset + place.length)
        if self.reserves_space and len(head or b"") + len(part) + len(tail or b"") < place.length:
            self._reserve(place)
        if head is None and tail is None:
            self._write_place(place, first, part)
            return
        if place.length <= PIECE:
            whole = memoryview(b"".join((head or b"", part, tail or b"")))
            place.child.event("write_aio")  # both, in this order: as QEMU
            self._write_place(place, first - len(head or b""), whole, event="cow_write")
            return
        self._write_place(place, first, part)
        if head is not None:
            self._copy_edge(place, place.offset, first)
        if tail is not None:
            self._copy_edge(place, last, place.offset + place.length)

    def _reserve(self, place: Place) -> None:
        """Have the file system reserve a place of which only a part is going to be written."""
        place.child.event("cluster_alloc_space")
        try:
            place.child.write_zeroes(place.host_offset, place.length, fast=True)
        except UnsupportedError:
            pass  # the file stays sparse there, which reads the same

    def _write_place(
        self, place: Place, offset: int, part: memoryview, *, event: str = "write_aio"
    ) -> None:
        if len(part):
            place.child.event(event)
            host = place.host_offset + offset - place.offset
            self._write_host(place.child, host, offset, part)

    def _edge(self, place: Place, start: int, stop: int) -> bytes | None:
        """What [start, stop) reads as, or None where nothing has to be written for it.

        For a long edge it is empty bytes: `_copy_edge` does the work in pieces.
        """
        if start >= stop or (
            place.zeroed and not self.has_transform and self.reads_zero(start, stop)
        ):
            return None
        if place.length > PIECE:
            return b""
        place.child.event("cow_read")
        buffer = bytearray(stop - start)
        self._read_current(start, memoryview(buffer))
        return bytes(buffer)

    def _copy_edge(self, place: Place, start: int, stop: int) -> None:
        buffer = memoryview(bytearray(min(PIECE, stop - start)))
        while start < stop:
            part = buffer[: min(len(buffer), stop - start)]
            self._read_current(start, part)
            self._write_place(place, start, part)
            start += len(part)

    def _read_current(self, offset: int, part: memoryview) -> None:
        """Read whole units that may reach past the node's end: zeroes there."""
        inside = max(min(len(part), self.size - offset), 0)
        if inside < len(part):
            requests.fill_zero(part[inside:])
        if inside:
            self._read_into(offset, part[:inside])

    def reads_zero(self, start: int, stop: int) -> bool:
        """Whether [start, stop) is known to read as zero, without reading data."""
        stop = min(stop, self.size)
        while start < stop:
            run = self.map(start, stop - start)
            if run.kind == DATA:
                return False
            if run.kind == UNALLOCATED and not self._backing_zero(
                start, min(run.length, stop - start)
            ):
                return False
            start += run.length
        return True

    def _backing_zero(self, offset: int, length: int) -> bool:
        backing = self.backing
        if backing is None:
            return True
        length = min(length, backing.size - offset)
        if length <= 0:
            return True
        return all(extent.kind != DATA for extent in backing.extents(offset, length))

    # ---------------------------------------------------------------- zeroing and discarding

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Whole units by `unmap`; edges whole where the rest is zero too, else as bytes."""
        self._require_fast(offset, length, flags)
        stop = offset + length
        start, end = self._whole_units(offset, stop)
        if offset < start:
            self._zero_edge(offset, start, flags)
        while start < end:
            start = self._unmap(start, end, TO_ZERO, keep=not flags & requests.UNMAP)
            if start < end:
                start = self._zero_run(start, end, flags)
        if end < stop:
            self._zero_edge(end, stop, flags)

    def _whole_units(self, offset: int, stop: int) -> tuple[int, int]:
        """What of [offset, stop) is whole units, the node's end counting as a boundary."""
        fill = self.fill_size
        start = min(-(-offset // fill) * fill, stop)
        return start, max(stop if stop == self.size else stop // fill * fill, start)

    def _require_fast(self, offset: int, length: int, flags: int) -> None:
        """What would have to be written out at the edges is refused before anything is done."""
        if not flags & requests.FAST:
            return
        stop = offset + length
        start, end = self._whole_units(offset, stop)
        for first, last in ((offset, start), (end, stop)):
            if first < last and not self._rest_is_zero(first, last):
                raise UnsupportedError(f"{self.describe()} cannot zero that range fast")

    def _rest_is_zero(self, start: int, stop: int) -> bool:
        """Whether the unit that [start, stop) is a part of reads as zero around it."""
        first = start // self.fill_size * self.fill_size
        last = min(first + self.fill_size, self.size)
        return self.reads_zero(first, start) and self.reads_zero(stop, last)

    def _zero_edge(self, start: int, stop: int, flags: int) -> None:
        """Zero a part of one unit: all of it where the rest is zero, under its lock."""
        first = start // self.fill_size * self.fill_size
        last = min(first + self.fill_size, self.size)
        with self.ranges.span(*self._cluster_around(first, last)):
            if self._rest_is_zero(start, stop):
                keep = not flags & requests.UNMAP
                if first + self._unmap_step(first, last, TO_ZERO, keep) >= last:
                    return
        self._zero_as_bytes(start, stop, flags)

    def _zero_run(self, start: int, end: int, flags: int) -> int:
        """Zero what `unmap` does not; returns up to where, as a better unit may follow."""
        cluster = self.cluster_size
        run = self.map(start, end - start)
        stop = min(end, start + run.length)
        if start % cluster:
            stop = min(stop, -(-start // cluster) * cluster)
        shown = run.kind == UNALLOCATED and self.backing is not None
        if (shown and self.backing_may_change) or not self.reads_zero(start, stop):
            self._zero_as_bytes(start, stop, flags)
        return stop

    def _zero_as_bytes(self, start: int, stop: int, flags: int) -> None:
        if flags & requests.FAST:
            raise UnsupportedError(f"{self.describe()} cannot zero that range fast")
        requests.write_zero_bytes(self, start, stop - start)

    def _cluster_around(self, start: int, stop: int) -> tuple[int, int]:
        cluster = self.cluster_size
        return start // cluster * cluster, -(-stop // cluster) * cluster

    def _unmap(self, start: int, stop: int, to: int, *, keep: bool) -> int:
        """`unmap` under range locks; returns the offset up to which it was done."""
        while start < stop:
            check_cancelled()
            part = min(stop, start + max(self.cluster_size, 1 << 30))
            with self.ranges.span(*self._cluster_around(start, part)):
                done = self._unmap_step(start, part, to, keep)
            if not done:
                return start
            start += done
            if len(self._retired) >= RETIRED_BATCH:
                self.reap()
        return start

    def _unmap_step(self, start: int, stop: int, to: int, keep: bool) -> int:
        def hook() -> tuple[int, Sequence[Freed]]:
            done, freed = self.unmap(start, stop - start, to, keep=keep)
            self.retire([space for space in freed if not space.kept])
            return done, freed

        done, freed = self.under_lock(hook)
        if self.pass_discard:
            for space in freed:
                if space.kept:  # now, under the range lock: the next write goes there in place
                    space.child.discard(space.host_offset, space.length)
        return done

    def _discard(self, offset: int, length: int) -> None:
        self._unmap(offset, offset + length, TO_ANY, keep=False)

    def _prepare_resize(self, size: int) -> None:
        """Zero what lies behind the end in its last unit: it becomes a part of the node."""
        start = self.size
        stop = min(-(-start // self.fill_size) * self.fill_size, size)
        if start < stop and self.map(start - 1, 1).kind == DATA:
            behind = memoryview(bytearray(stop - start))
            self._read_into(start, behind)
            if not requests.is_zero(behind):
                requests.write_zero_bytes(self, start, stop - start)

    def hide_backing(self, start: int, stop: int, *, keep: bool = False) -> None:
        """Make [start, stop) read as zero although the backing file has more; under exclusive.

        For growing over a longer backing file: drivers call it when `size` is the new one, but
        before that is durable. `keep`: what has space keeps it.
        """
        fill = self.fill_size
        first = start // fill * fill
        if start % fill:
            boundary = min(-(-start // fill) * fill, stop)
            if not self.reads_zero(start, boundary):
                requests.write_zero_bytes(self, start, boundary - start)
            first = boundary
        done = (
            self._unmap(first, -(-stop // fill) * fill, TO_ZERO, keep=keep)
            if first < stop
            else stop
        )
        if done < stop:
            requests.write_zero_bytes(self, done, stop - done)

    # ---------------------------------------------------------- populate, place, encoded writes

    def _populate(self, offset: int, length: int, zeroes: bool) -> None:
        fill = self.fill_size
        start, stop = (
            offset // fill * fill,
            min(-(-(offset + length) // fill) * fill, self.size),
        )
        while start < stop:
            part = min(stop, start + max(PIECE, fill))
            with self.ranges.span(*self._cluster_around(start, part)):
                run = self.map(start, part - start)
                part = min(part, start + run.length)
                if run.kind == UNALLOCATED:
                    if not self._backing_zero(start, part - start):
                        part = self._copy_up(start, part)
                    elif zeroes:
                        done = self._unmap_step(start, part, TO_ZERO, False)
                        part = start + done if done else self._copy_up(start, part)
            start = part

    def _copy_up(self, start: int, stop: int) -> int:
        """Under the range lock: allocate and fill from below; returns where it ended."""
        fill = self.fill_size
        begin = start // fill * fill
        allocation = self._allocate(begin, -(-stop // fill) * fill - begin)
        try:
            for place in allocation.places:
                self._copy_edge(place, place.offset, place.offset + place.length)
        except BaseException as error:
            self._give_up(allocation, error)
            raise
        end = allocation.offset + allocation.length
        self._publish(allocation, allocation.offset, end)
        return min(end, stop)

    @property
    def can_place(self) -> bool:
        """Whether `place` hands out host space whose bytes are the node's own."""
        return (
            not self.read_only
            and not self.has_transform
            and self.fill_size > 0  # an image of one fixed piece has no units
            and (type(self).allocate is not MappedNode.allocate)
        )

    def own_space(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """(end, whether there is space that can be filled) of runs of a range, counted from 0 on.

        The range is cut at the node's end; what is encoded, or a parent's, has none.
        """
        runs: list[tuple[int, bool]] = []
        done, length = 0, min(length, self.size - offset)
        with self.graph.request():
            while done < length:
                run = self.map(offset + done, length - done)
                there = run.child is not None and run.unit is None and run.host_offset >= 0
                done = min(done + run.length, length)
                if runs and runs[-1][1] == there:
                    runs.pop()
                runs.append((done, there))
        return runs

    def place(self, offset: int, length: int) -> Placing:
        """`with node.place(offset, length) as places:` fills host space from outside.

        The range must be whole fill units (but for the node's end). The places hold the
        range lock; leaving publishes them, an exception abandons them. Only inside a request.
        """
        from diskwright.block.placing import Placing

        return Placing(self, offset, length)

    def _write_encoded(self, offset: int, payload: memoryview, length: int) -> None:
        with self.ranges.span(*self._cluster_around(offset, offset + length)):
            allocation = self._pinned(lambda: self.allocate_encoded(offset, length, len(payload)))
            try:
                done = 0
                for place in allocation.places:
                    count = min(place.length, len(payload) - done)
                    place.child.event("write_compressed")
                    place.child.write(place.host_offset, payload[done : done + count])
                    done += count
            except BaseException as error:
                self._give_up(allocation, error)
                raise
            self._publish(allocation, offset, offset + length)
