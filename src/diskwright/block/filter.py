"""Filter: a node that passes everything on to the one child below it.

A filter overrides the hooks that it changes something about and leaves the rest. Nobody goes
around it: it lends no descriptor, and its extents name no place in the child.
"""

from __future__ import annotations

from diskwright.block import requests
from diskwright.block.extent import Extent
from diskwright.block.limits import Limits
from diskwright.block.node import Node
from diskwright.block.permission import Role

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskwright.block.child import Child
    from diskwright.block.opener import Opener


class Filter(Node):
    """Base of the filters; `below` is the child."""

    is_filter = True
    changes_bytes = True
    below: Child

    def _open_below(self, opener: Opener, options: dict[str, object], name: str = "file") -> None:
        """Open the child and take over its size and limits; the first thing `_open` does."""
        spec = options.get(name)
        # A name is that of the storage: what is above the filter looks for a format in it.
        format_below = isinstance(spec, dict) and "driver" in spec and not self.protocol_level
        protocol = None if format_below else True
        self.below = opener.open_child(self, name, spec, Role.FILTERED, protocol=protocol)
        self.size = self.below.size
        self._take_limits()

    def _take_limits(self) -> None:
        limits = self.below.node.limits
        self.limits = Limits(**{name: getattr(limits, name) for name in limits.fields()})

    def _read_into(self, offset: int, view: memoryview) -> None:
        self.below.read_into(offset, view)

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        self.below.write(offset, view, fua=fua)

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        self.below.write_zeroes(
            offset,
            length,
            unmap=bool(flags & requests.UNMAP),
            fast=bool(flags & requests.FAST),
            fua=bool(flags & requests.FUA),
        )

    def _discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, length)

    def _extents(self, offset: int, length: int) -> Iterable[Extent]:
        for extent in self.below.extents(offset, length, depth=0):
            yield Extent(
                extent.offset,
                extent.length,
                extent.kind,
                allocated=extent.allocated,
                encoded=extent.encoded,
                stored=extent.stored,
            )

    def _truncate(self, size: int, exact: bool, preallocation: str) -> None:
        self.below.truncate(size, exact=exact, preallocation=preallocation)
        self.size = self.below.size

    def _reopened(self) -> None:
        self._take_limits()

    def _child_resized(self, child: Child) -> None:
        self.size = child.size

    def reserve_space(self, offset: int, length: int) -> None:
        """In the child."""
        self.below.node.reserve_space(offset, length)

    def refresh_size(self) -> None:
        """Follow the child."""
        self.below.node.refresh_size()
        self.size = self.below.size

    @property
    def vm_state_offset(self) -> int:
        """As the child."""
        return self.below.node.vm_state_offset

    @property
    def has_zero_init(self) -> bool:
        """As the child."""
        return self.below.node.has_zero_init

    @property
    def can_discard(self) -> bool:
        """As the child."""
        return not self.read_only and self.below.node.can_discard

    @property
    def unfiltered(self) -> Node:
        """What the child lies over."""
        return self.below.node.unfiltered

    @property
    def can_zero(self) -> bool:
        """As the child."""
        return not self.read_only and self.below.node.can_zero

    @property
    def can_resize(self) -> bool:
        """As the child."""
        return self.below.node.can_resize

    @property
    def can_grow(self) -> bool:
        """As the child."""
        return self.below.node.can_grow
