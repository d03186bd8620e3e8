"""Writing what an overlay has down into a backing file."""

from __future__ import annotations

from diskwright.block.record import Record
from diskwright.block.reopen import CommitTarget
from diskwright.errors import DiskwrightError, OptionError, UnsupportedError, strerror_of
from diskwright.operations.opening import Image, disk_size, open_image
from diskwright.operations.workers import Steering

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.copy import Copied
    from diskwright.operations.opening import Name


class Committed(Record):
    """What was done.

    Attributes:
        name: of the overlay.
        base: of the image that its content went into.
        emptied: the overlay has no content of its own any more.
        copied: `diskwright.operations.copy.Copied`.
    """

    __slots__ = ("base", "copied", "emptied", "name")

    def __init__(self, name: str, base: str, *, emptied: bool, copied: Copied) -> None:
        self.name = name
        self.base = base
        self.emptied = emptied
        self.copied = copied


def commit_image(
    image: Image,
    *,
    base: str | None = None,
    keep: bool = False,
    steering: Steering | None = None,
    opened: Callable[[Node], None] | None = None,
) -> Committed:
    """Open an overlay and write what it has, down to `base`, into that.

    Args:
        image: the overlay.
        base: a backing file of it, by a name relative to the image that names it; the first
            one, if None. If it is given the overlay keeps its content: images between it and
            the base would show the old one.
        keep: the overlay keeps its content (QEMU's `-d`).
        steering: who watches.
        opened: gets the overlay's node before anything is changed.

    Raises:
        OptionError: there is no backing file, or none of that name.
        CancelledError: the caller's flag was set; a part of the content was written, and the
            overlay has all of it.
    """
    with open_image(image, read_only=False) as top:
        if opened is not None:
            opened(top)
        chain = _chain(top)
        if not chain and base is None:
            raise OptionError(
                f"'{image.title}' has no backing file",
                qemu="Image does not have a backing file",
                field="base",
            )
        depth = 1 if base is None else _depth_of(top, base)
        below = chain[depth - 1]
        with CommitTarget(below, grows=disk_size(top) > below.size):
            copied = _write_down(top, below, depth, steering or Steering())
        empties = not keep and base is None
        if empties:
            top.keeps_content = True  # the same comes from below now
            try:
                top.make_empty()
            except DiskwrightError as error:
                error.qemu = f"Failed to empty {image.title}: {strerror_of(error)}"
                raise
        return Committed(image.title, below.filename, emptied=empties, copied=copied)


def _chain(top: Node) -> list[Node]:
    """The backing files of a node, the nearest first."""
    chain: list[Node] = []
    node = top
    while node.backing is not None:
        node = node.backing.node
        chain.append(node)
    return chain


def _depth_of(top: Node, base: str) -> int:
    """How many steps down the chain `base` is."""
    from os.path import realpath

    from diskwright.block import filename

    node = top
    for depth, below in enumerate(_chain(top), 1):
        if base == node.info().backing_filename:
            return depth
        try:
            full = filename.join_at(node, base)
        except DiskwrightError:
            full = base
        if realpath(full) == realpath(below.filename):
            return depth
        node = below
    raise OptionError(
        f"Did not find '{base}' in the backing chain of '{top.filename}'", field="base"
    )


def _write_down(top: Node, below: Node, depth: int, steering: Steering) -> Copied:
    from diskwright.operations.copy import Copying, copy
    from diskwright.operations.sinks import located
    from diskwright.operations.source import Source

    size = disk_size(top)
    if size > below.size and not below.can_resize:
        raise UnsupportedError(
            f"{below.describe()} is shorter than what is above it, and {below.driver} images "
            "cannot be resized",
            qemu="Block job failed: Operation not supported",
        )
    source = Source([top], depth=depth - 1)
    try:
        if size > below.size:
            below.truncate(size)
        copied = copy(source, below, Copying(looks=False, offload=False), steering)
        below.flush()
    except DiskwrightError as error:
        raise located(error, "Block job failed") from error
    return copied


def commit(
    name: Name,
    *,
    base: str | None = None,
    keep: bool = False,
    format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: Flag | None = None,
    rate: int | str = 0,
    policy: Policy | None = None,
) -> Committed:
    """Write what an overlay has into its backing file, and empty the overlay.

    Args:
        name, format, policy: as for `diskwright.info`.
        base: the backing file to write to, if it is not the first one; its name relative to
            the image that names it. The overlay keeps its content then.
        keep: leave the overlay's content where it is too.
        progress: called with (done, total) in bytes.
        cancel: a `threading.Event` or the like that ends it; the overlay is as it was then.
        rate: bytes a second at most.

    Raises: as `commit_image`.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("below.qcow2", "1M", format="qcow2")
        >>> made = diskwright.create(
        ...     "above.qcow2", format="qcow2", backing="below.qcow2", backing_format="qcow2"
        ... )
        >>> with diskwright.open("above.qcow2", read_only=False) as node:
        ...     node.write(0, b"new")
        >>> diskwright.commit("above.qcow2").base
        'below.qcow2'
        >>> with diskwright.open("below.qcow2") as node:
        ...     node.read(0, 3)
        b'new'
    """
    from diskwright.operations.create import size_of

    return commit_image(
        Image(name, format=format, policy=policy),
        base=base,
        keep=keep,
        steering=Steering(progress=progress, cancel=cancel, rate=size_of(rate)),
    )
