"""Making an image where nothing can be made: what is there, a device or an export, is taken."""

from __future__ import annotations

from diskwright.block import filename, registry
from diskwright.block.graph import Graph
from diskwright.block.permission import RESIZE, WRITE
from diskwright.errors import DiskwrightError, OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node
    from diskwright.block.opener import Opener

_SECTOR = 512


def require_creation(cls: type[Node], title: str) -> None:
    """Refuse a driver that makes no images, and takes none as they are.

    Raises:
        UnsupportedError: it is one, which `title` names.
    """
    from diskwright.block.node import Node

    # mypy takes a class method for a function, which has no `__func__`
    if cls.create.__func__ is Node.create.__func__:  # type: ignore[attr-defined]
        raise UnsupportedError(f"{title} does not support image creation", kind="unsupported")


def parse_target(name: str) -> dict[str, object]:
    """The options that the name of a new file stands for.

    Raises:
        OptionError: it is no address of storage that would be taken as it is.
        UnsupportedError: its driver makes no files.
    """
    driver = filename.driver_of(filename.protocol_of(name) or "file")
    require_creation(registry.driver_class(driver), f"Driver '{driver}'")
    try:
        return filename.parse(name)
    except OptionError as error:
        _explain(error, driver)
        raise


def take_existing(opener: Opener, spec: dict[str, object], size: int, preallocation: str) -> None:
    """Clear the beginning of storage that keeps its size, under the locks of a writer.

    Args:
        opener: how to open it.
        spec: options of its driver, which name it.
        size: so much must be there.
        preallocation: what was asked for; there is nothing to reserve.

    Raises:
        UnsupportedError: it is shorter than `size`, or cannot be opened.
    """
    from diskwright.block.opener import open_node

    if preallocation != "off":
        raise UnsupportedError(f"Unsupported preallocation mode '{preallocation}'")
    writing = opener.derive(read_only=False, graph=Graph())
    try:
        opened = open_node(writing, spec, protocol=True)
    except DiskwrightError as error:
        _explain(error, str(spec["driver"]))
        raise
    with opened as node:
        node.acquire("create", WRITE | RESIZE)
        node.truncate(size, exact=False)
        # An old header must not be taken for the new image's.
        node.write(0, bytes(min(_SECTOR, node.size)))


def _explain(error: DiskwrightError, driver: str) -> None:
    """Say why it was opened at all."""
    error.within(
        f"Protocol driver '{driver}' does not support creating new images, so an existing image "
        "must be selected as the target; however, opening the given target as an existing image "
        "failed"
    )
