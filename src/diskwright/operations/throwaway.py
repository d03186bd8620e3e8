"""An image that stays as it is: what is written goes into an overlay that nobody keeps."""

from __future__ import annotations

import os

from diskwright.operations.opening import Image, disk_size, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node

#: Where overlays are made: a file system that is meant for large files that may vanish.
FOLDERS = ("/var/tmp", "/tmp")


def open_overlay(image: Image, *, format: str, read_only: bool = False) -> Node:
    """Open a fresh overlay of `image`, which itself is opened read-only.

    Args:
        image: what shows through.
        format: of the overlay; one that can have a backing file.
        read_only: nothing will be written to the overlay either.

    Raises:
        DiskwrightError: the image cannot be opened, or the overlay not be made.
    """
    from diskwright.block import registry
    from diskwright.block.opener import Opener

    copies, image.copy_on_read = image.copy_on_read, False
    with open_image(image) as node:
        size, driver = disk_size(node), node.driver
    path = _empty_file()
    try:
        maker = registry.driver_class(format)
        values = maker.create_options.validate({"size": size})
        values["filename"] = path
        maker.create(Opener(read_only=False, cache="unsafe"), size, values)
        overlay = Image(
            {
                "driver": format,
                "file": {"driver": "file", "filename": path, "cache": {"no-flush": True}},
                "backing": image.as_child(image.format or driver),
            },
            cache=image.cache,
            policy=image.policy,
        )
        overlay.can_unmap = image.can_unmap
        overlay.copy_on_read = copies
        overlay.aio = image.aio
        overlay.refusal = image.refusal
        return open_image(overlay, read_only=read_only)
    finally:
        os.unlink(path)


def _empty_file() -> str:
    """A file of our own."""
    from tempfile import mkstemp

    folder = next((one for one in (os.environ.get("TMPDIR"), *FOLDERS) if one), None)
    descriptor, path = mkstemp(prefix="diskwright.", dir=folder)
    os.close(descriptor)
    return path
