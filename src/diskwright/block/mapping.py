"""The records that a mapped format's driver and the engine exchange (see mapped.py)."""

from __future__ import annotations

from diskwright.block.record import Record
from diskwright.errors import UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.child import Child
    from diskwright.block.table_cache import Slice

TO_ZERO = 0
TO_BACKING = 1
TO_ANY = 2


class Run(Record):
    """The longest uniform run from an offset, as `map` gives it.

    Attributes:
        kind: DATA, ZERO or UNALLOCATED.
        length: bytes.
        child, host_offset: where the bytes lie (a preallocated ZERO run has them too).
        writable: may be overwritten in place, and then reads as what was written.
        reserved: its place is for this run alone, though it reads as something else as yet.
        plain: the bytes lie there as they are.
        unit: the encoded piece they are in, or None.
    """

    __slots__ = ("child", "host_offset", "kind", "length", "plain", "reserved", "unit", "writable")

    def __init__(
        self,
        kind: int,
        length: int,
        *,
        child: Child | None = None,
        host_offset: int = -1,
        writable: bool = False,
        reserved: bool = False,
        plain: bool = True,
        unit: Unit | None = None,
    ) -> None:
        self.kind = kind
        self.length = length
        self.child = child
        self.host_offset = host_offset
        self.writable = writable
        self.reserved = reserved
        self.plain = plain
        self.unit = unit


class Unit(Record):
    """An encoded piece: `length` bytes at `offset` come out of `host_length` at `host_offset`."""

    __slots__ = ("child", "codec", "host_length", "host_offset", "length", "offset")

    def __init__(
        self,
        offset: int,
        length: int,
        child: Child,
        *,
        host_offset: int,
        host_length: int,
        codec: object = None,
    ) -> None:
        self.offset = offset
        self.length = length
        self.child = child
        self.host_offset = host_offset
        self.host_length = host_length
        self.codec = codec


class Place(Record):
    """Host space in one child for [offset, offset + length) of the node.

    Attributes:
        fresh: the space is new; where False the block existed and only validity is new.
        zeroed: the space reads as zero now.
    """

    __slots__ = ("child", "fresh", "host_offset", "length", "offset", "zeroed")

    def __init__(
        self,
        offset: int,
        length: int,
        child: Child,
        *,
        host_offset: int,
        fresh: bool = True,
        zeroed: bool = False,
    ) -> None:
        self.offset = offset
        self.length = length
        self.child = child
        self.host_offset = host_offset
        self.fresh = fresh
        self.zeroed = zeroed


class Allocation(Record):
    """Places for [offset, offset + length), whole fill units; may be a prefix of the asked.

    `token` is the driver's own; `pinned` the engine's.
    """

    __slots__ = ("length", "offset", "pinned", "places", "token")

    def __init__(
        self, offset: int, length: int, places: list[Place], *, token: object = None
    ) -> None:
        self.offset = offset
        self.length = length
        self.places = places
        self.token = token
        self.pinned: list[Slice] = []


class Freed(Record):
    """Host space that lost its name.

    Attributes:
        child, host_offset, length: the space.
        slice: the slice that named it; it must be durable before the space is reused.
        sole: nothing else names it, so it may be punched out of the file.
        kept: it stays allocated, and only its content is gone.
        token: the driver's own.
    """

    __slots__ = ("child", "generation", "host_offset", "kept", "length", "slice", "sole", "token")

    def __init__(
        self,
        child: Child,
        host_offset: int,
        length: int,
        *,
        slice: Slice | None,
        sole: bool = False,
        token: object = None,
    ) -> None:
        self.child = child
        self.host_offset = host_offset
        self.length = length
        self.slice = slice
        self.sole = sole
        self.token = token
        self.kept = False
        self.generation = 0  # of the slice; the engine notes it when the hook returns


class NeedWork(Exception):
    """Something must be done first, without the metadata lock; only ever seen by the engine.

    Args:
        work: does it; the hook is called again afterwards.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__()
        self.work = work


class NeedGrowth(NeedWork):
    """A child must be at least `size` bytes long first."""

    def __init__(self, child: Child, size: int) -> None:
        super().__init__(lambda: child.grow(size))


class Encoder:
    """Makes payloads for `write_encoded`; subclasses are pure and run in parallel.

    Attributes:
        unit: bytes that one payload stands for.
        sequential: payloads must be written in the order of their offsets.
    """

    unit = 0
    sequential = False

    def encode(self, view: memoryview) -> bytes | None:
        """The payload for one unit, or None where it would not be shorter."""
        raise UnsupportedError("no encoder")
