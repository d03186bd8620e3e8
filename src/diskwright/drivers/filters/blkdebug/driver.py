"""blkdebug: errors, delays and stops at chosen moments, to test what is above it.

The drivers above tell what they are about to do (`Child.event`): "l2_update", "write_aio" and
so on, QEMU's names. Rules react, from a file of INI sections or as lists of objects:

- `inject-error`: after the event, every request that `sector` and `iotype` fit fails with
  `errno`, until a rule of another event takes over; with `once`, one request. The event
  "none" (the beginning) makes the rule effective at once.
- `set-state`: at the event in `state`, go to `new_state`. Rules with a state count only there;
  the first is 1, and 0 stands for any. All rules of an event see the state before it.
- `delay` (ours): at the event, wait `milliseconds`.

Events of this node are pwritev, pwritev_zero and pwritev_done; those of padding,
pwritev_rmw_*, and of a flush, flush_to_*, come from the engine. `immediately` is accepted: there
is no later moment in a synchronous call.

What a request does to tables happens in memory; a flush writes them. So there are two moments:

- within the request, before it writes anything: cluster_alloc, cluster_alloc_bytes,
  cluster_alloc_space, cluster_free (as the space may be used again), l2_alloc_cow_read,
  l2_alloc_write, l2_update_compressed, reftable_grow, and all of refblock_alloc*;
- as the flush writes the table, once for each piece of it: l1_update, l2_update,
  refblock_update_part, reftable_update. QEMU writes an L1 entry, and a new L2 table, at once.

refblock_load and l2_load come before a read only, not where the table is in memory; nothing is
told with refblock_update (nor by QEMU) and cor_write.

Source: QEMU's docs/devel/testing/blkdebug.rst and the QMP reference, BlockdevOptionsBlkdebug.
"""

from __future__ import annotations

import os

from diskwright.block import requests
from diskwright.block.filename import has_plain_name
from diskwright.block.filter import Filter
from diskwright.block.limits import Limits
from diskwright.block.options import Option, Options
from diskwright.block.permission import NAMES
from diskwright.drivers.filters.blkdebug.rules import (
    SECTIONS,
    Rules,
    as_list,
    number,
    read_config,
    rule_objects,
)
from diskwright.errors import OptionError, UnsupportedError, from_oserror

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from diskwright.block.child import Child
    from diskwright.block.extent import Extent
    from diskwright.block.graph import Graph
    from diskwright.block.opener import Opener


class Blkdebug(Filter):
    """Passes everything on, but for what its rules say; `image` is the child."""

    driver = "blkdebug"
    options = Options(
        Option("config", "any", None, "file with rules"),
        Option("align", "size", 0, "alignment that requests need", strong=True),
        Option("max-transfer", "size", 0, "longest request", strong=True),
        Option("opt-write-zero", "size", 0, "unit of zeroing", strong=True),
        Option("max-write-zero", "size", 0, "longest zeroing", strong=True),
        Option("opt-discard", "size", 0, "unit of discarding", strong=True),
        Option("max-discard", "size", 0, "longest discard", strong=True),
        *(Option(name, "any", None, "list of rules") for name in SECTIONS),
        *(Option(f"{name}.", "any", prefix=True, strong=True) for name in SECTIONS),
        Option("take-child-perms", "any", None, "permissions to use beside what is needed"),
        Option("unshare-child-perms", "any", None, "permissions not to share"),
    )

    _taken = 0
    _unshared = 0
    _max_zero = 0
    _zero_unit = 0
    _max_discard = 0

    def __init__(self, graph: Graph, node_name: str) -> None:
        super().__init__(graph, node_name)
        self.rules = self.debugger = Rules()

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        config = str(options["config"] or "")
        for section, given in read_config(config) if config else ():
            self.rules.add(section, given)
        for section in SECTIONS:
            for given in rule_objects(options.get(section), section):
                self.rules.add(section, given)
        self._taken = _permission_bits(options["take-child-perms"], "take-child-perms")
        self._unshared = _permission_bits(options["unshare-child-perms"], "unshare-child-perms")
        self._open_below(opener, options, "image")
        self._given = options
        self._constrain(options)
        below = self.below.node
        if has_plain_name(below):
            self.filename = f"blkdebug:{config}:{below.filename}"
        self.event_hook = self.rules.event
        self.rules.event("none")

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, object]:
        """`blkdebug:[config]:image`, or the image alone where the driver was said apart."""
        if not name.startswith("blkdebug:"):
            return {"image": name}
        config, colon, image = name.removeprefix("blkdebug:").partition(":")
        if not colon:
            raise OptionError(
                "blkdebug requires both config file and image path",
                field="filename",
                hint="blkdebug:CONFIG:IMAGE; CONFIG may be empty",
            )
        made: dict[str, object] = {"image": image}
        if config:
            made["config"] = config
        return made

    def _constrain(self, options: dict[str, object]) -> None:
        """Limits as the options say; each must be a multiple of the alignment."""
        align = number(options["align"])
        if align & (align - 1) or align >= 1 << 31:
            raise OptionError(f"Cannot meet constraints with align {align}", field="align")
        unit = max(align, self.limits.request_alignment)
        sizes = {}
        for name in (
            "max-transfer",
            "opt-write-zero",
            "max-write-zero",
            "opt-discard",
            "max-discard",
        ):
            sizes[name] = size = number(options[name])
            if size % unit or size >= 1 << 31:
                raise OptionError(f"Cannot meet constraints with {name} {size}", field=name)
        limits = self.limits
        self.limits = Limits(
            request_alignment=unit,
            memory_alignment=limits.memory_alignment,
            zero_alignment=sizes["opt-write-zero"] or limits.zero_alignment,
            discard_alignment=sizes["opt-discard"] or limits.discard_alignment,
            max_transfer=sizes["max-transfer"] or limits.max_transfer,
            cluster_size=limits.cluster_size,
        )
        self._max_zero = sizes["max-write-zero"]
        self._zero_unit = sizes["opt-write-zero"]
        self._max_discard = sizes["max-discard"]

    def _reopened(self) -> None:
        super()._reopened()
        self._constrain(self._given)

    def _child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        used, shared = super()._child_permissions(child, used, shared)
        return used | self._taken, shared & ~self._unshared

    # ------------------------------------------------------------------------- requests

    def _meet(self, io_type: str, offset: int, length: int) -> None:
        """Fail the request, if a rule says so."""
        code = self.rules.error_for(io_type, offset, length)
        if code:
            raise from_oserror(OSError(code, os.strerror(code)), "")

    def _read_into(self, offset: int, view: memoryview) -> None:
        self._meet("read", offset, len(view))
        self.below.read_into(offset, view)

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        self.rules.event("pwritev")
        self._meet("write", offset, len(view))
        self.below.write(offset, view, fua=fua)
        self.rules.event("pwritev_done")

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        self.rules.event("pwritev_zero")
        unit = max(self._zero_unit, self.limits.request_alignment)
        for start, part in _pieces(offset, length, self._max_zero, unit):
            if part < unit:  # as if the device could not
                self._write_zero_bytes(start, part, flags)
                continue
            self._meet("write-zeroes", start, part)
            super()._write_zeroes(start, part, flags)
        self.rules.event("pwritev_done")

    def _write_zero_bytes(self, offset: int, length: int, flags: int) -> None:
        if flags & requests.FAST:
            raise UnsupportedError(f"{self.describe()} cannot zero that range fast")
        zeroes = memoryview(bytes(min(length, requests.PIECE)))
        for start, part in _pieces(offset, length, len(zeroes)):
            self._meet("write", start, part)
            self.below.write(start, zeroes[:part], fua=bool(flags & requests.FUA))

    def _discard(self, offset: int, length: int) -> None:
        unit = self.limits.discard_alignment
        for start, part in _pieces(offset, length, self._max_discard, unit):
            self._meet("discard", start, part)
            self.below.discard(start, part)

    def _flush(self) -> None:
        if self.has_unflushed:  # else there is no request that could fail
            self._meet("flush", 0, 0)
        super()._flush()

    def _extents(self, offset: int, length: int) -> Iterable[Extent]:
        self._meet("block-status", offset, length)
        return super()._extents(offset, length)

    @property
    def allocated_size(self) -> None:
        """QEMU's has no answer, and its tools say so."""
        return None

    def _close(self) -> None:
        self.rules.release_all()


def _pieces(offset: int, length: int, longest: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Cut a range in (offset, length): none above `longest`, parts of a `unit` for themselves."""
    stop = offset + length
    step = max(longest // unit, 1) * unit if longest else length
    while offset < stop:
        end = offset - offset % unit + (unit if offset % unit else step)
        if stop < end:
            end = stop if offset % unit or stop - offset < unit else stop - stop % unit
        yield offset, end - offset
        offset = end


def _permission_bits(given: object, name: str) -> int:
    """The sum of permissions named in a list."""
    bits = 0
    for word in as_list(given, name):
        plain = str(word).replace("-", " ")
        if plain not in NAMES:
            raise OptionError(f"invalid parameter value: {word}", field=name)
        bits |= 1 << NAMES.index(plain)
    return bits
