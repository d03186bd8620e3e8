"""A guest that knows what it may find on its disk after a crash.

Every sector it writes is filled with a stamp: the number of the write and of the sector. A
`Promise` says which stamps each sector may hold: what was flushed, or something newer.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence

from diskwright.block.info import SnapshotInfo
from diskwright.block.node import Node
from diskwright.errors import DiskwrightError

SECTOR = 512
_WORDS = SECTOR // 8

#: Stamps of what the disk and its backing file held before are below this.
FIRST_STAMP = 1 << 32


class WrongError(AssertionError):
    """A crash or a fault left something that it must not leave."""


def stamped(number: int, sector: int, count: int) -> bytes:
    """The bytes of `count` sectors from `sector` on, as write `number` leaves them."""
    words = array("Q")
    for at in range(sector, sector + count):
        words.extend(array("Q", [(number << 32) + at]) * _WORDS)
    if sys.byteorder != "little":
        words.byteswap()
    return words.tobytes()


def stamps_of(data: bytes) -> array[int]:
    """One stamp a sector.

    Raises:
        WrongError: a sector holds more than one.
    """
    words = array("Q", data)
    if sys.byteorder != "little":
        words.byteswap()
    stamps = words[::_WORDS]
    for at in (1, 20, 41, 63):
        if words[at::_WORDS] != stamps:
            raise WrongError("a sector holds parts of two writes, or something else")
    return stamps


class Promise:
    """What each sector may hold: `base` where `loose` does not know the sector."""

    def __init__(self, base: dict[int, int], size: int) -> None:
        self.base = base
        self.loose: dict[int, set[int]] = {}  # everything it may be
        self.latest: dict[int, set[int]] = {}  # what it is if nothing is lost
        self.sizes = {size}
        self.size = size  # the latest
        self.size_unsure = False  # a change of it failed

    def copy(self) -> Promise:
        """One of its own."""
        made = Promise(dict(self.base), self.size)
        made.loose = {sector: set(stamps) for sector, stamps in self.loose.items()}
        made.latest = {sector: set(stamps) for sector, stamps in self.latest.items()}
        made.sizes, made.size_unsure = set(self.sizes), self.size_unsure
        return made

    def may(self, sector: int) -> set[int]:
        """What a sector may hold."""
        found = self.loose.get(sector)
        return {self.base.get(sector, 0)} if found is None else found

    def now(self, sector: int) -> set[int]:
        """What a sector holds if nothing is lost."""
        found = self.latest.get(sector)
        return self.may(sector) if found is None else found

    def change(self, sector: int, stamps: Iterable[int], *, sure: bool = True) -> None:
        """A write began; if not `sure` it may not even be finished later."""
        wanted = set(stamps)
        latest = wanted if sure else self.now(sector) | wanted
        self.loose[sector] = self.may(sector) | wanted
        self.latest[sector] = latest

    def settle(self) -> None:
        """A flush ended: the latest is what there is."""
        for sector, stamps in self.latest.items():
            if len(stamps) == 1:
                self.base[sector] = next(iter(stamps))
                self.loose.pop(sector, None)
            else:
                self.loose[sector] = set(stamps)
        self.latest = {}
        if not self.size_unsure:
            self.sizes = {self.size}

    def hold(self, first: int, stamps: array[int], what: str) -> None:
        """Compare with what was read from sector `first` on.

        Raises:
            WrongError: something else may be there only.
        """
        for at, stamp in enumerate(stamps, first):
            if stamp != self.base.get(at, 0) or at in self.loose:
                allowed = self.may(at)
                if stamp not in allowed:
                    raise WrongError(
                        f"{what}: sector {at} holds {stamp:#x}, "
                        f"but may hold {', '.join(f'{s:#x}' for s in sorted(allowed))}"
                    )


class Deed:
    """Something the guest had done between two lengths of the log; `end` -1: it failed."""

    def __init__(self, what: str, begin: int, settles: bool, effect: Effect) -> None:
        self.what = what
        self.begin = begin
        self.end = -1
        self.settles = settles
        self.effect = effect


#: Given the promise, the snapshots, whether it has ended, and whether it is sure to end.
Effect = Callable[["Story", bool, bool], None]


class Noting:
    """What a dirty bitmap must have: sectors written last by a write that it noted.

    Attributes:
        spans: (above, up to) numbers of writes; None: it notes still.
        enabled: whether it may note, so that a crash may leave it inconsistent.
    """

    def __init__(self, above: int) -> None:
        self.spans: list[tuple[int, int | None]] = [(above, None)]
        self.enabled = True

    def copy(self) -> Noting:
        """One of its own."""
        made = Noting(0)
        made.spans, made.enabled = list(self.spans), self.enabled
        return made

    def end(self, number: int) -> None:
        """Writes after this one are not noted."""
        self.spans = [(above, number if to is None else to) for above, to in self.spans]

    def wants(self, number: int) -> bool:
        """Whether it must have noted the write of this number."""
        return any(above < number and (to is None or number <= to) for above, to in self.spans)


class Story:
    """The disk's promise and its snapshots', at one point of the log."""

    def __init__(self, disk: Promise) -> None:
        self.disk = disk
        self.noted: dict[str, Noting] = {}
        self.unsure: set[str] = set()  # bitmaps being added or removed
        self.closed = False
        self.resizing = False
        self.snapshots: dict[str, Promise] = {}
        self.doubtful: set[str] = set()  # snapshots being made or deleted
        self.whole: list[dict[int, int]] = []  # while switching: the disk is all one of these


class Guest:
    """Uses a node, and remembers what it did.

    `log` is what the recorders write: its length is the guest's clock. With `brave` an error of
    ours is no end: the guest goes on, as one does whose disk gives errors.
    """

    def __init__(
        self,
        node: Node,
        log: Sequence[object],
        base: dict[int, int],
        *,
        snapshots: dict[str, Promise] | None = None,
        noted: dict[str, Noting] | None = None,
        brave: bool = False,
    ) -> None:
        self.noted = noted or {}
        self.node = node
        self.log = log
        self.below: dict[int, int] = {}  # what the backing file holds
        self.brave = brave
        self.start = Promise(dict(base), node.size)
        self.snapshots = snapshots or {}
        self.deeds: list[Deed] = []
        self.errors: list[DiskwrightError] = []
        self._number = max((stamp >> 32 for stamp in base.values()), default=0)

    # --------------------------------------------------------------------------------- doing

    def _do(self, what: str, effect: Effect, act: Callable[[], None], settles: bool) -> bool:
        deed = Deed(what, len(self.log), settles, effect)
        self.deeds.append(deed)
        try:
            act()
        except DiskwrightError as error:
            if not self.brave:
                raise
            self.errors.append(error)
            return False
        deed.end = len(self.log)
        return True

    def write(self, sector: int, count: int) -> bool:
        """Write stamped sectors."""
        data = self._stamp(sector, count)
        return self._do(
            f"write of {count} sectors at {sector}",
            self._put(sector, count),
            lambda: self.node.write(sector * SECTOR, data),
            False,
        )

    def _stamp(self, sector: int, count: int) -> bytes:
        self._number += 1
        return stamped(self._number, sector, count)

    def _put(self, sector: int, count: int) -> Effect:
        number = self._number

        def effect(story: Story, ended: bool, sure: bool) -> None:
            for at in range(sector, sector + count):
                story.disk.change(at, ((number << 32) + at,), sure=sure)

        return effect

    def write_encoded(self, sector: int, count: int) -> bool:
        """Write stamped sectors compressed, a unit at a time."""
        encoder = self.node.encoder()
        assert encoder is not None
        step = encoder.unit // SECTOR
        done = True
        for at in range(sector, sector + count, step):
            part = min(step, self.node.size // SECTOR - at)
            payload = encoder.encode(memoryview(self._stamp(at, part).ljust(encoder.unit, b"\0")))
            assert payload is not None
            done &= self._do(
                f"compressed write at {at}",
                self._put(at, part),
                lambda at=at, payload=payload: self.node.write_encoded(
                    at * SECTOR, payload, encoder.unit
                ),
                False,
            )
        return done

    def zero(self, sector: int, count: int, *, unmap: bool = False) -> bool:
        """Make sectors zero."""

        def effect(story: Story, ended: bool, sure: bool) -> None:
            for at in range(sector, sector + count):
                story.disk.change(at, (0,), sure=sure)

        return self._do(
            f"zeroing of {count} sectors at {sector}",
            effect,
            lambda: self.node.write_zeroes(sector * SECTOR, count * SECTOR, unmap=unmap),
            False,
        )

    def discard(self, sector: int, count: int) -> bool:
        """Discard sectors: they hold what they held, or nothing, or what is below."""

        def effect(story: Story, ended: bool, sure: bool) -> None:
            for at in range(sector, sector + count):
                kept = story.disk.now(at)
                story.disk.change(at, kept | {0, self.below.get(at, 0)}, sure=sure)

        return self._do(
            f"discard of {count} sectors at {sector}",
            effect,
            lambda: self.node.discard(sector * SECTOR, count * SECTOR),
            False,
        )

    def populate(self, sector: int, count: int) -> bool:
        """Copy up from the backing file; changes nothing that is read."""
        return self._do(
            f"populating {count} sectors at {sector}",
            lambda story, ended, sure: None,
            lambda: self.node.populate(sector * SECTOR, count * SECTOR),
            False,
        )

    def flush(self) -> bool:
        """What was done before is durable when it returns."""
        return self._do("flush", lambda story, ended, sure: None, self.node.flush, True)

    def resize(self, size: int, preallocation: str = "off") -> bool:
        """Change the size."""

        def effect(story: Story, ended: bool, sure: bool) -> None:
            disk = story.disk
            story.resizing |= not ended
            old = max(disk.sizes)  # one that was not sure may have come true
            disk.sizes.add(size)
            if sure:
                disk.size = size
            disk.size_unsure |= not sure
            gone = [at for at in {*disk.base, *disk.loose} if size <= at * SECTOR < old]
            for at in gone:
                disk.change(at, (0,), sure=sure)

        return self._do(
            f"resize to {size}",
            effect,
            lambda: self.node.truncate(size, preallocation=preallocation),
            True,
        )

    def empty(self, act: Callable[[], None]) -> bool:
        """Something that ends with the layer empty, yet changes nothing that is read."""
        return self._do("commit", lambda story, ended, sure: None, act, True)

    def amend(self, **options: object) -> bool:
        """Change what the image was made with, which changes nothing that is read."""
        words = ", ".join(f"{name}={value}" for name, value in options.items())
        return self._do(
            f"amend {words}",
            lambda story, ended, sure: None,
            lambda: self.node.amend(options),
            True,
        )

    def close(self) -> bool:
        """Close the node: a flush, unless it is broken and the guest knows that."""
        whole = self.node.broken is None

        def effect(story: Story, ended: bool, sure: bool) -> None:
            story.closed = ended and whole

        return self._do("close", effect, self.node.close, whole)

    # ------------------------------------------------------------------------------- bitmaps

    def bitmap_add(self, name: str, granularity: int, *, enabled: bool = True) -> bool:
        """Begin a dirty bitmap."""
        number = self._number

        def effect(story: Story, ended: bool, sure: bool) -> None:
            made = story.noted[name] = Noting(number)
            made.enabled = enabled
            if not enabled:
                made.end(number)
            story.unsure.discard(name) if ended else story.unsure.add(name)

        def act() -> None:
            self.node.bitmap_add(name, granularity=granularity, enabled=enabled)

        return self._do(f"bitmap {name}", effect, act, False)

    def bitmap_remove(self, name: str) -> bool:
        """Drop a dirty bitmap."""

        def effect(story: Story, ended: bool, sure: bool) -> None:
            if ended:
                del story.noted[name]
                story.unsure.discard(name)
            else:
                story.unsure.add(name)

        return self._do(f"no {name}", effect, lambda: self.node.bitmap_remove(name), False)

    def bitmap_clear(self, name: str) -> bool:
        """Let a dirty bitmap forget."""
        number = self._number

        def effect(story: Story, ended: bool, sure: bool) -> None:
            noting = story.noted[name]
            noting.spans = [(number, None if noting.enabled else number)]

        return self._do(f"clear {name}", effect, lambda: self.node.bitmap_clear(name), False)

    def bitmap_enable(self, name: str, enabled: bool) -> bool:
        """Let a dirty bitmap note, or stop."""
        number = self._number

        def effect(story: Story, ended: bool, sure: bool) -> None:
            noting = story.noted[name]
            if not enabled:
                noting.end(number)
                noting.enabled &= not ended
            else:
                noting.spans.append((number, None if ended else number))
                noting.enabled = True

        def act() -> None:
            self.node.bitmap_enable(name, enabled)

        return self._do(f"enable {name} {enabled}", effect, act, False)

    def bitmap_merge(self, name: str, source: str) -> bool:
        """Note in one what another one has."""
        number = self._number

        def effect(story: Story, ended: bool, sure: bool) -> None:
            if ended:
                got = story.noted[source].copy()
                got.end(number)
                story.noted[name].spans += got.spans

        def act() -> None:
            self.node.bitmap_merge(name, self.node.dirty_bitmap(source))

        return self._do(f"merge {source} into {name}", effect, act, False)

    # ----------------------------------------------------------------------------- snapshots

    def snapshot(self, name: str) -> bool:
        """Make a snapshot."""

        def effect(story: Story, ended: bool, sure: bool) -> None:
            kept = story.disk.copy()
            if ended:
                kept.settle()
            story.snapshots[name] = kept
            story.doubtful.discard(name) if ended else story.doubtful.add(name)

        return self._do(
            f"snapshot {name}",
            effect,
            lambda: _nothing(self.node.snapshot_create(SnapshotInfo("", name))),
            True,
        )

    def apply(self, name: str) -> bool:
        """Go back to a snapshot; what was done before must be flushed."""

        def effect(story: Story, ended: bool, sure: bool) -> None:
            kept, disk = story.snapshots[name], story.disk
            if not ended and not disk.loose and not kept.loose:
                story.whole = [dict(disk.base), dict(kept.base)]
            for at in {*kept.base, *kept.loose, *disk.base, *disk.loose}:
                disk.change(at, kept.may(at), sure=sure)
            disk.sizes |= kept.sizes
            disk.size = kept.size if sure else disk.size

        return self._do(f"apply {name}", effect, lambda: self.node.snapshot_apply(name), True)

    def delete(self, name: str) -> bool:
        """Delete a snapshot."""

        def effect(story: Story, ended: bool, sure: bool) -> None:
            if ended:
                del story.snapshots[name]
                story.doubtful.discard(name)
            else:
                story.doubtful.add(name)

        return self._do(f"delete {name}", effect, lambda: self.node.snapshot_delete(name), True)

    # ------------------------------------------------------------------------------- looking back

    def story(self, index: int | None) -> Story:
        """What a crash in entry `index` of the log may leave; None: there was no crash."""
        story = Story(self.start.copy())
        story.snapshots = {name: kept.copy() for name, kept in self.snapshots.items()}
        story.noted = {name: noting.copy() for name, noting in self.noted.items()}
        for deed in self.deeds:
            if index is not None and deed.begin > index:
                break
            failed = deed.end < 0
            ended = not failed and (index is None or deed.end <= index)
            story.whole = []
            deed.effect(story, ended, not failed)
            if deed.settles and ended:
                story.disk.settle()
        return story

    def epoch(self, index: int) -> tuple[int, int]:
        """Indices with the same answer have the same story."""
        begun = sum(deed.begin <= index for deed in self.deeds)
        return begun, sum(0 <= deed.end <= index for deed in self.deeds)


def _nothing(value: object) -> None:
    return
