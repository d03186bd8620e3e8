"""What an image is: size, format, snapshots, what it refers to; and the same of its chain."""

from __future__ import annotations

from diskwright.block.record import Record
from diskwright.errors import FormatError, UnsupportedError
from diskwright.operations.opening import Image, disk_size, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.child import Child
    from diskwright.block.info import NodeInfo
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name


class ImageInfo(Record):
    """What is known of one node.

    Attributes:
        name: of the node, as QEMU's tools write it.
        format: its driver.
        virtual_size: what a guest sees, in bytes, whole sectors.
        disk_size: bytes it occupies where it is stored, or None where nobody can tell.
        is_protocol: it is the storage itself, not a format in it.
        details: what the driver says of itself (`diskwright.block.info.NodeInfo`).
        children: (name, ImageInfo) of the nodes it consists of, without its backing file.
        backing: the ImageInfo of the backing file, where the chain was asked for.
    """

    __slots__ = (
        "name",
        "format",
        "virtual_size",
        "disk_size",
        "is_protocol",
        "details",
        "children",
        "backing",
    )

    def __init__(
        self,
        name: str,
        format: str,
        *,
        virtual_size: int,
        disk_size: int | None,
        is_protocol: bool,
        details: NodeInfo,
        children: list[tuple[str, ImageInfo]],
    ) -> None:
        self.name = name
        self.format = format
        self.virtual_size = virtual_size
        self.disk_size = disk_size
        self.is_protocol = is_protocol
        self.details = details
        self.children = children
        self.backing: ImageInfo | None = None

    def chain(self) -> list[ImageInfo]:
        """This one, its backing file, that one's, and so on."""
        found: list[ImageInfo] = []
        image: ImageInfo | None = self
        while image is not None:
            found.append(image)
            image = image.backing
        return found


def describe(node: Node) -> ImageInfo:
    """The information about a node that is open."""
    return ImageInfo(
        node.filename,
        node.driver,
        virtual_size=disk_size(node),
        disk_size=node.allocated_size,
        is_protocol=node.is_protocol,
        details=node.info(),
        children=[
            (name, describe(child.node))
            for name, child in sorted(node.children.items(), key=_backing_first)
        ],
    )


def _backing_first(named: tuple[str, Child]) -> bool:
    """The order in which QEMU's tool lists children."""
    return named[0] != "backing"


def examine(image: Image, *, chain: bool = False) -> ImageInfo:
    """Open an image without its backing file and describe it; with `chain`, the others too.

    Raises:
        FormatError: the chain comes back to where it was.
        NotFoundError: a backing file is not there, or nobody knows where it is.
    """
    with open_image(image, follow_backing=False) as node:
        first = described = describe(node)
    seen = {image.title}
    while chain:
        details = described.details
        name = details.full_backing_filename
        if details.backing_error is not None:
            raise details.backing_error.within(f"Could not open '{described.name}'")
        if name is None and details.backing_filename is not None:
            raise UnsupportedError(
                "Could not determine absolute backing filename, "
                f"but backing filename '{details.backing_filename}' present"
            )
        if name is None:
            break
        if name in seen:
            raise FormatError(
                f"Backing file '{name}' creates an infinite loop.",
                field="backing file",
                value=name,
            )
        seen.add(name)
        _require_allowed(image, name, described.name)
        below = Image(
            name,
            format=details.backing_format,
            force_share=image.force_share,
            cache=image.cache,
            policy=image.policy,
        )
        with open_image(below, follow_backing=False) as node:
            described.backing = describe(node)
        described = described.backing
    return first


def _require_allowed(image: Image, reference: str, named_by: str) -> None:
    """The policy decides about each step down, here as everywhere."""
    from diskwright.block.policy import SameFolder

    (image.policy or SameFolder()).require("backing file", reference, named_by)


def info(
    name: Name,
    *,
    format: str | None = None,
    chain: bool = False,
    force_share: bool = False,
    policy: Policy | None = None,
) -> ImageInfo:
    """Describe an image.

    Args:
        name: a path, URI, "json:{…}", or a dict of options.
        format: the driver; None probes.
        chain: describe its backing files too (`ImageInfo.chain`).
        force_share: look although another process may write to it.
        policy: which backing files may be opened for `chain`.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("known.qcow2", "1M", format="qcow2")
        >>> found = diskwright.info("known.qcow2")
        >>> found.format, found.virtual_size, found.details.cluster_size
        ('qcow2', 1048576, 65536)
    """
    return examine(Image(name, format=format, force_share=force_share, policy=policy), chain=chain)
