"""How long the file of a new image would be: for a size, or for what another image shows."""

from __future__ import annotations

from diskwright.block.cancel import cancellable, check_cancelled
from diskwright.block.info import Content, Measured
from diskwright.block.registry import DEFAULT_FORMAT
from diskwright.errors import OptionError
from diskwright.operations.opening import SECTOR, Image, disk_size, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name


def measure_size(size: int, format: str, options: Mapping[str, object]) -> Measured:
    """How long the file of an image of `size` bytes is, with nothing in it and with everything.

    Args:
        size: of the disk.
        format: the driver of the new image.
        options: its create options, by name, as words or values.

    Raises:
        OptionError: an option or its value is none, or does not go with
            the others or the size.
        UnsupportedError: the format cannot say.
    """
    return _measure(Content(-(-size // SECTOR) * SECTOR), format, options)


def measure_image(
    image: Image,
    format: str,
    options: Mapping[str, object],
    *,
    snapshot: str | None = None,
) -> Measured:
    """How long the file of a new image with the content of `image` is.

    Args:
        image: what is going to be converted.
        format, options: as for `measure_size`.
        snapshot: measure this internal snapshot: an id or else name, or QEMU's words.

    Raises: as `measure_size`, and as opening the image does.
    """
    node = open_image(image)
    try:
        if snapshot is not None:
            from diskwright.operations.snapshot import open_at

            node = open_at(node, image, snapshot)
        content = Content(disk_size(node), _stored(node), bitmaps=_bitmaps_of(node))
        return _measure(content, format, options)
    finally:
        node.close()


def _measure(content: Content, format: str, words: Mapping[str, object]) -> Measured:
    from diskwright.operations.create import check_words, creatable, create_options

    cls = creatable(format)
    declared = create_options(format)
    try:
        given = check_words(declared, words)
    except OptionError as error:
        error.then = f"Invalid options for file format '{format}'"
        raise
    values = {option.name: option.default for option in declared}
    for name, value in given.items():
        option = declared.get(name)
        assert option is not None
        values[name] = option.convert(value) if option.type == "bool" else value
    return cls.measure(content, values)


def _stored(node: Node) -> Iterator[tuple[int, int]]:
    """Runs of what is not known to be zero, through all backing files."""
    from diskwright.operations.map import entries

    for entry in entries(node):
        check_cancelled()
        if entry.data and not entry.zero:
            yield entry.start, entry.length


def _bitmaps_of(node: Node) -> list[tuple[str, int]] | None:
    """The image's dirty bitmaps; None where it can have none."""
    if not node.can_keep_bitmaps:
        return None
    found = (node.info().format_specific or {}).get("bitmaps", [])
    assert isinstance(found, list)
    return [(one["name"], one["granularity"]) for one in found]


def measure(
    name: Name | None = None,
    *,
    size: int | str | None = None,
    format: str | None = None,
    target_format: str = DEFAULT_FORMAT,
    options: Mapping[str, object] | str | None = None,
    snapshot: str | None = None,
    force_share: bool = False,
    policy: Policy | None = None,
    cancel: Flag | None = None,
) -> Measured:
    """How many bytes the file of a new image would have.

    Args:
        name: an image that is going to be converted; or say `size`.
        size: of a new, empty disk, in bytes or QEMU's words ("10G").
        format: the driver of `name`; None probes.
        target_format: of the new image: "raw" or "qcow2"; others cannot say.
        options: its create options, a dict or QEMU's words ("cluster_size=1M").
        snapshot: an internal snapshot of `name` that is converted, its id or else its name.
        force_share: look although another process may write to `name`.
        policy: which backing files of `name` may be opened.
        cancel: a `threading.Event` or the like that ends it.

    Returns:
        `required` bytes for the content, `fully_allocated` bytes once all is written, and what
        dirty `bitmaps` take besides.

    Raises:
        OptionError, UnsupportedError: see their sentences.
        CancelledError: the flag was set.

    Example:
        >>> import diskwright
        >>> found = diskwright.measure(size="1G", target_format="qcow2")
        >>> found.required, found.fully_allocated
        (393216, 1074135040)
        >>> made = diskwright.create("short.qcow2", "1M", format="qcow2")
        >>> diskwright.measure("short.qcow2").required
        1048576
    """
    from diskwright.operations.create import options_of, size_of

    if (name is None) == (size is None):
        raise OptionError("Either an image or a size is measured", field="size")
    given = options_of(options)
    with cancellable(cancel):
        if name is None:
            assert size is not None
            return measure_size(size_of(size), target_format, given)
        image = Image(name, format=format, force_share=force_share, policy=policy)
        return measure_image(image, target_format, given, snapshot=snapshot)
