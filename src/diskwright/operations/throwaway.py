"""An image that stays as it is: what is written goes into an overlay that nobody keeps."""

from __future__ import annotations

import os
from contextlib import contextmanager

from diskwright.operations.opening import Image, disk_size, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: Where overlays are made: a file system that is meant for large files that may vanish.
FOLDERS = ("/var/tmp", "/tmp")


@contextmanager
def overlay(image: Image, *, format: str) -> Iterator[Image]:
    """A fresh overlay of `image`, to be opened within; its file is gone afterwards.

    Args:
        image: what shows through; it is opened read-only.
        format: of the overlay; one that can have a backing file.

    Raises:
        DiskwrightError: the image cannot be opened, or the overlay not be made.
    """
    from diskwright.block import registry
    from diskwright.block.opener import Opener
    from diskwright.operations.create import close_files

    copies, image.copy_on_read = image.copy_on_read, False
    with open_image(image) as node:
        size, driver = disk_size(node), node.driver
    path = _empty_file()
    opener = Opener(read_only=False, cache="unsafe")
    try:
        maker = registry.driver_class(format)
        values = maker.create_options.validate({"size": size})
        values["filename"] = path
        maker.create(opener, size, values)
        close_files(opener.made)
        made = Image(
            {
                "driver": format,
                "file": {"driver": "file", "filename": path, "cache": {"no-flush": True}},
                "backing": image.as_child(image.format or driver),
            },
            cache=image.cache,
            policy=image.policy,
        )
        made.can_unmap = image.can_unmap
        made.copy_on_read = copies
        made.aio = image.aio
        made.refusal = image.refusal
        yield made
    finally:
        os.unlink(path)


def _empty_file() -> str:
    """A file of our own."""
    from tempfile import mkstemp

    folder = next((one for one in (os.environ.get("TMPDIR"), *FOLDERS) if one), None)
    descriptor, path = mkstemp(prefix="diskwright.", dir=folder)
    os.close(descriptor)
    return path
