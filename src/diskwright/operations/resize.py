"""Making an image longer or shorter."""

from __future__ import annotations

from diskwright.block.cancel import cancellable, check_cancelled
from diskwright.block.limits import MAX_LENGTH
from diskwright.block.options import SizeRangeError, parse_size
from diskwright.block.record import Record
from diskwright.errors import OptionError, UnsupportedError
from diskwright.operations.opening import Image, disk_size, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name

PREALLOCATIONS = ("off", "metadata", "falloc", "full")

_SIZE_HELP = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)


class Resized(Record):
    """What was done: sizes in bytes before and after, and what came out other than asked."""

    __slots__ = ("name", "new_size", "old_size", "wanted_size")

    def __init__(self, name: str, *, old_size: int, new_size: int, wanted_size: int) -> None:
        self.name = name
        self.old_size = old_size
        self.new_size = new_size
        self.wanted_size = wanted_size


class SizeChange(Record):
    """A size or a difference: `bytes`, and `sign` 1 or -1 for a difference, 0 for a size."""

    __slots__ = ("bytes", "sign")

    def __init__(self, bytes: int, sign: int = 0) -> None:
        self.bytes = bytes
        self.sign = sign

    @classmethod
    def parse(cls, text: int | str) -> SizeChange:
        """From a number, or words: "2M", "+1G", "-512".

        Raises:
            OptionError: it is neither.
        """
        sign = 0
        word: int | str = text
        if isinstance(text, str) and text[:1] in ("+", "-"):
            sign = 1 if text[0] == "+" else -1
            word = text[1:]
        try:
            return cls(parse_size(word), sign)
        except SizeRangeError:
            raise OptionError(
                f"Value '{word}' is out of range for parameter 'size'", field="size"
            ) from None
        except ValueError:
            message = "Parameter 'size' expects a non-negative number below 2^64"
            raise OptionError(message, qemu=f"{message}\n{_SIZE_HELP}", field="size") from None

    def applied_to(self, size: int) -> int:
        """The new size; whole sectors.

        Raises:
            OptionError: it is not positive, or more than can be counted.
        """
        total = self.bytes if not self.sign else size + self.sign * self.bytes
        if not 0 < total < 1 << 63:
            raise OptionError("New image size must be positive", field="size")
        if total > MAX_LENGTH:
            raise OptionError(f"offset({total}) exceeds maximum({MAX_LENGTH})", field="size")
        return total


def resize_image(
    image: Image,
    change: SizeChange,
    *,
    shrink: bool = False,
    preallocation: str = "off",
    opened: Callable[[Node], None] | None = None,
) -> Resized:
    """Open an image and change its size.

    Args:
        image: which.
        change: the size, or by how much.
        shrink: whether it may become shorter, which loses what lies behind the new end.
        preallocation: one of PREALLOCATIONS, for what is added.
        opened: gets the node before anything is changed (a command warns about guesses).

    Raises:
        UnsupportedError: the format cannot be resized, or not so.
        OptionError: the size is impossible, or shrinking was not confirmed (kind "shrink").
    """
    if preallocation not in PREALLOCATIONS:
        raise OptionError(f"Invalid preallocation mode '{preallocation}'", field="preallocation")
    with open_image(image, read_only=False, resizes=True) as node:
        if opened is not None:
            opened(node)
        old = disk_size(node)
        total = change.applied_to(old)
        if total <= old and preallocation != "off":
            raise OptionError(
                "Preallocation can only be used for growing images", field="preallocation"
            )
        if total < old and not shrink:
            raise OptionError(
                f"'{image.title}' has {old} bytes; with {total} the rest would be lost",
                kind="shrink",
                qemu="Use the --shrink option to perform a shrink operation.",
                field="size",
                hint="say shrink=True (--shrink) if nothing there is needed",
            )
        if not node.can_resize:
            raise UnsupportedError(
                f"{node.describe()}: {node.driver} images cannot be resized",
                qemu="Image format driver does not support resize",
            )
        node.truncate(total, preallocation=preallocation)
        new = disk_size(node)
    return Resized(image.title, old_size=old, new_size=new, wanted_size=total)


def resize(
    name: Name,
    size: int | str,
    *,
    format: str | None = None,
    shrink: bool = False,
    preallocation: str = "off",
    policy: Policy | None = None,
    cancel: Flag | None = None,
) -> Resized:
    """Make an image longer, or with `shrink` shorter; what is added reads as zero.

    Args:
        name, format, policy: as for `diskwright.info`.
        size: in bytes or QEMU's words: "2G", "+512M" longer, "-1M" shorter.
        shrink: allow making it shorter: what lies behind the new end is lost.
        preallocation: "off", "metadata", "falloc" or "full", for what is added.
        cancel: a `threading.Event` or the like that ends it; the image has
            its old size then.

    Raises: as `resize_image`, and CancelledError if the flag was set.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("grows.qcow2", "1M", format="qcow2")
        >>> diskwright.resize("grows.qcow2", "+1M").new_size
        2097152
    """
    image = Image(name, format=format, policy=policy)
    change = SizeChange.parse(size)
    with cancellable(cancel):
        check_cancelled()
        return resize_image(image, change, shrink=shrink, preallocation=preallocation)
