"""From words of a command line to images that are open."""

from __future__ import annotations

from diskwright.cli import output
from diskwright.cli.flags import policy_of, warn_of_bare_words
from diskwright.errors import DiskwrightError, OptionError
from diskwright.operations.opening import Image, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node
    from diskwright.cli.grammar import Arguments

_PROBED = (
    "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n"
    "         Automatically detecting the format is dangerous for raw images, "
    "write operations on block 0 will be restricted.\n"
    "         Specify the 'raw' format explicitly to remove the restrictions."
)


def image_of(
    arguments: Arguments,
    name: str,
    *,
    format: str | None = None,
    cache: str | None = None,
    switch: str = "image-opts",
    refusal: str | None = None,
) -> Image:
    """The image that an operand names.

    Args:
        arguments: where -U, and whether it is options rather than a name, is said.
        name: the operand.
        format: the driver, where it was given.
        cache: the cache mode.
        switch: the key of the option that says that `name` is a list of options.
        refusal: what is said first where it cannot be opened; img's sentence by default.

    Raises:
        DiskwrightError: it is no list of options.
    """
    spec: str | dict[str, object] = name
    if arguments.flag(switch):
        from diskwright.block.filename import parse_image_options

        # A first word without a value names a node that there is already.
        warn_of_bare_words(name, begin=1)
        try:
            spec = parse_image_options(name)
        except DiskwrightError as error:
            sentence = f"Could not open '{name}'" if refusal is None else refusal
            error.qemu = f"{sentence}: {error.qemu_message}"
            raise
        if arguments.flag("force-share") and spec.get("force-share", "on") != "on":
            raise OptionError("--force-share/-U conflicts with image options", field="force-share")
    image = Image(
        spec,
        format=format,
        cache=cache,
        force_share=arguments.flag("force-share"),
        policy=policy_of(arguments),
        shown=name,
    )
    image.refusal = refusal
    return image


def open_to_write(image: Image, *, follow_backing: bool = True) -> Node:
    """Open an image that is going to be changed; a guess of raw is warned of."""
    node = open_image(image, read_only=False, follow_backing=follow_backing)
    warn_of_guess(node)
    return node


def warn_of_guess(node: Node) -> None:
    """Say what a wrong guess could do, where raw was guessed."""
    if node.probed and node.driver == "raw":
        output.complain(_PROBED.format(name=node.filename))
