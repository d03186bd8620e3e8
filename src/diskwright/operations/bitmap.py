"""Dirty bitmaps in images: list, add, remove, clear, enable, disable, merge."""

from __future__ import annotations

from diskwright.block.cancel import cancellable
from diskwright.block.record import Record
from diskwright.errors import DiskwrightError, OptionError
from diskwright.operations.opening import Image, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskwright.block.bitmap import BitmapInfo
    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name

ADD = "add"
REMOVE = "remove"
CLEAR = "clear"
ENABLE = "enable"
DISABLE = "disable"
MERGE = "merge"
ACTIONS = (ADD, REMOVE, CLEAR, ENABLE, DISABLE, MERGE)


class BitmapChange(Record):
    """One thing that is done to a bitmap: one of ACTIONS, and for MERGE whose bits it gets."""

    __slots__ = ("action", "source")

    def __init__(self, action: str, source: str = "") -> None:
        self.action = action
        self.source = source


def change_bitmap(
    image: Image,
    name: str,
    changes: Sequence[BitmapChange],
    *,
    granularity: int | None = None,
    source: Image | None = None,
    opened: Callable[[Node], None] | None = None,
) -> list[BitmapInfo]:
    """Open an image, do things to one of its bitmaps, one after the other, and list them all.

    Args:
        image: which.
        name: the bitmap's.
        changes: what; what was done before one of them failed stays done.
        granularity: of one that is added; None or 0: as the image's clusters.
        source: another image that has the bitmaps to merge.
        opened: gets the node before anything is changed (a command warns about guesses).

    Raises:
        NotFoundError: there is no such bitmap.
        UnsupportedError: the image can have none, or the bitmap is inconsistent.
        OptionError: the name is taken, or sizes or granularities do not fit.
    """
    with open_image(image, read_only=False, follow_backing=False) as node:
        if opened is not None:
            opened(node)
        # The image itself may be what lies below the other one.
        other = node if source is None else open_image(source, follow_backing=False)
        try:
            changing = _Changing(node, name, granularity=granularity, other=other)
            for change in changes:
                changing.do(change)
        finally:
            if other is not node:
                other.close()
        return node.dirty_bitmaps()


class _Changing:
    """Changes of one bitmap of an open image.

    Args:
        node, name: whose bitmap, and which.
        granularity: of one that is added.
        other: has the bitmaps to merge.
    """

    def __init__(self, node: Node, name: str, *, granularity: int | None, other: Node) -> None:
        self._node = node
        self._name = name
        self._granularity = granularity
        self._other = other

    def do(self, change: BitmapChange) -> None:
        """Do one of them; what fails says which it was."""
        try:
            self._do(change)
        except DiskwrightError as error:
            error.within(f"Operation {change.action} on bitmap {self._name} failed")
            raise

    def _do(self, change: BitmapChange) -> None:
        node, name = self._node, self._name
        if change.action == ADD:
            node.bitmap_add(name, granularity=self._granularity)
        elif change.action == REMOVE:
            node.bitmap_remove(name)
        elif change.action == CLEAR:
            node.bitmap_clear(name)
        elif change.action == MERGE:
            node.dirty_bitmap(name)  # what is wrong with it is said first
            node.bitmap_merge(name, self._other.dirty_bitmap(change.source))
        elif change.action in (ENABLE, DISABLE):
            node.bitmap_enable(name, change.action == ENABLE)
        else:
            raise OptionError(f"'{change.action}' is none of {', '.join(ACTIONS)}", field="changes")


def copy_bitmaps(source: Node, target: Node, *, skip_broken: bool = False) -> None:
    """Give `target` the bitmaps of `source`, of the same size, as they are.

    Args:
        source, target: both must be able to have bitmaps.
        skip_broken: inconsistent ones were to be left out; see `require_copyable`.

    Raises:
        DiskwrightError: one has a name that is taken, or cannot be had.
    """
    wanted = [one for one in source.dirty_bitmaps() if not (one.inconsistent and skip_broken)]
    taken = {one.name for one in target.dirty_bitmaps()}
    bad = max((at for at, one in enumerate(wanted) if one.name in taken), default=-1)
    # As QEMU, which begins with the last one, comes to a name that is taken.
    for kept in wanted[bad + 1 :] + wanted[max(bad, 0) : bad + 1]:
        try:
            target.bitmap_add(kept.name, granularity=kept.granularity, enabled=kept.enabled)
        except DiskwrightError as error:
            error.within(f"Failed to create bitmap {kept.name}")
            raise
        try:
            target.bitmap_merge(kept.name, source.dirty_bitmap(kept.name))
        except DiskwrightError as error:
            target.bitmap_remove(kept.name)
            error.within(f"Failed to populate bitmap {kept.name}")
            raise


def require_copyable(source: Node) -> None:
    """Refuse to copy bitmaps one of which is inconsistent.

    Raises:
        UnsupportedError: one is; the last of them is named, as QEMU does.
    """
    from diskwright.errors import UnsupportedError

    for kept in reversed(source.dirty_bitmaps()):
        if kept.inconsistent:
            sentence = f"Cannot copy inconsistent bitmap '{kept.name}'"
            advice = "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
            raise UnsupportedError(sentence, qemu=f"{sentence}\n{advice}", hint=advice)


def bitmap(
    name: Name,
    bitmap: str = "",
    *changes: str | tuple[str, str],
    granularity: int | str | None = None,
    source: Name | None = None,
    source_format: str | None = None,
    format: str | None = None,
    policy: Policy | None = None,
    cancel: Flag | None = None,
) -> list[BitmapInfo]:
    """List an image's dirty bitmaps, after things were done to one of them.

    Args:
        name, format, policy: as for `diskwright.info`.
        bitmap: the name of the bitmap that is changed.
        changes: in this order: "add", "remove", "clear", "enable", "disable", or
            ("merge", the name of the bitmap whose bits it gets).
        granularity: of one that is added, in bytes: a power of two, at least 512.
        source, source_format: another image that has the bitmaps to merge.
        cancel: a `threading.Event` or the like that ends it.

    Raises: as `change_bitmap`, and CancelledError if the flag was set.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("noted.qcow2", "1M", format="qcow2")
        >>> [kept.name for kept in diskwright.bitmap("noted.qcow2", "since-monday", "add")]
        ['since-monday']
        >>> with diskwright.open("noted.qcow2", read_only=False) as node:
        ...     node.write(70000, b"new")
        >>> with diskwright.open("noted.qcow2") as node:
        ...     list(node.dirty_bitmap("since-monday").runs())
        [(65536, 65536)]
    """
    from diskwright.operations.create import size_of

    wanted = [
        BitmapChange(change) if isinstance(change, str) else BitmapChange(*change)
        for change in changes
    ]
    image = Image(name, format=format, policy=policy)
    with cancellable(cancel):
        if not wanted:
            with open_image(image, follow_backing=False) as node:
                return node.dirty_bitmaps()
        other = None if source is None else Image(source, format=source_format, policy=policy)
        grain = None if granularity is None else size_of(granularity)
        return change_bitmap(image, bitmap, wanted, granularity=grain, source=other)
