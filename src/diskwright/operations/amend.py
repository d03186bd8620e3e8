"""Changing what an image was made with: its version, the width of its refcounts, and the like."""

from __future__ import annotations

from diskwright.block.cancel import cancellable
from diskwright.errors import OptionError, UnsupportedError
from diskwright.operations.create import check_words
from diskwright.operations.opening import Image, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.options import Options
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name


def amendable(node: Node | type[Node]) -> Options:
    """The options that can be amended in an image, or in those of a driver.

    Raises:
        UnsupportedError: the format has none.
    """
    if not len(node.amend_options):
        raise UnsupportedError(
            f"{node.driver} images have nothing to amend",
            qemu=f"Format driver '{node.driver}' does not support option amendment",
        )
    return node.amend_options


def amend_image(
    image: Image,
    words: Mapping[str, object],
    *,
    progress: Callable[[int, int], None] | None = None,
    opened: Callable[[Node], None] | None = None,
) -> dict[str, object]:
    """Open an image and amend it.

    Args:
        image: which.
        words: options as they were written.
        progress: called with (steps done, steps in all).
        opened: gets the node before anything is changed (a command warns about guesses).

    Returns:
        What was asked for, by the options' names.

    Raises:
        UnsupportedError: the format has nothing to amend, or the image something that would be
            lost; OptionError: an option or its value is impossible.
    """
    with open_image(image, read_only=False) as node:
        if opened is not None:
            opened(node)
        declared = amendable(node)
        for name in words:
            if name not in declared and name in type(node).create_options:
                refusal = f"Invalid parameter '{name}'"
                raise OptionError(
                    f"{refusal}: it is for making images",
                    qemu=f"{refusal}\nThis option is only supported for image creation",
                    field=name,
                )
        given = check_words(declared, words)
        if progress is not None:
            progress(0, 1)
        values = {name: value for name, value in declared.validate(given).items() if name in given}
        node.amend(values, progress)
    return values


def amend(
    name: Name,
    options: Mapping[str, object] | str,
    *,
    format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    policy: Policy | None = None,
    cancel: Flag | None = None,
) -> dict[str, object]:
    """Change what an image was made with; what it reads stays the same.

    Args:
        name, format, policy: as for `diskwright.info`.
        options: what is to change, as for `diskwright.create`: a dict, or the words of `-o`. For
            qcow2: compat, refcount_bits, lazy_refcounts, data_file, size.
        progress: called with (steps done, steps in all).
        cancel: a `threading.Event` or the like that ends it; the image is whole then, changed
            or not.

    Returns:
        What was asked for, by the options' names.

    Raises: as `amend_image`, and CancelledError if the flag was set.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("old.qcow2", "1M", format="qcow2", options="compat=0.10")
        >>> diskwright.amend("old.qcow2", {"compat": "1.1", "refcount_bits": 8})
        {'compat': '1.1', 'refcount_bits': 8}
        >>> diskwright.info("old.qcow2").details.format_specific["refcount-bits"]
        8
    """
    from diskwright.block.options import parse_words

    words = parse_words(options) if isinstance(options, str) else options
    image = Image(name, format=format, policy=policy)
    with cancellable(cancel):
        return amend_image(image, words, progress=progress)
