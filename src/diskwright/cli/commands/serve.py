"""`serve`: offers images to NBD clients, each under a name."""

from __future__ import annotations

import sys

from diskwright.cli.flags import FORMAT, HELP, OBJECT, QUIET
from diskwright.cli.grammar import Arguments, Command, Misused
from diskwright.cli.nbd import SERVER_FLAGS, TLS_FLAGS, check_activation, check_tls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.node import Node
    from diskwright.cli.serving import Serving


def run(arguments: Arguments) -> int:
    """Serve until a signal ends it."""
    from diskwright.cli import output
    from diskwright.cli.serving import Serving
    from diskwright.exports.nbd.service import SWITCH_SECONDS

    if not arguments.operands:
        raise Misused("Expecting one image at least, as NAME=IMAGE or IMAGE")
    check_activation(arguments)
    check_tls(arguments)
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    nodes: list[Node] = []
    try:
        with Serving(arguments.program, arguments, clients=0, persistent=True) as serving:
            serving.listen()
            with serving.opening():
                for word in arguments.operands:
                    nodes.append(_offer(serving, arguments, *_named(word)))
            if not arguments.flag("quiet"):  # once it is known that they can be served
                serving.also(lambda server: output.say("".join(f"{x}\n" for x in serving.places())))
            serving.run()
    finally:
        for node in nodes:
            node.close()
        sys.setswitchinterval(before)
    return 0


def _named(word: str) -> tuple[str, str]:
    """(name, image) of NAME=IMAGE; a path may have such a sign, too."""
    name, sign, image = word.partition("=")
    if not sign or "/" in name or ":" in name:
        return "", word
    return name, image


def _offer(serving: Serving, arguments: Arguments, name: str, image: str) -> Node:
    from diskwright.cli.images import image_of, warn_of_guess
    from diskwright.operations.opening import open_image

    read_only = arguments.flag("read-only")
    node = open_image(
        image_of(arguments, image, format=arguments.text("format")), read_only=read_only
    )
    try:
        if not read_only:
            warn_of_guess(node)
        serving.offer(
            node,
            name,
            depth=arguments.flag("allocation-depth"),
            bitmaps=arguments.texts("bitmap"),
        )
    except BaseException:
        node.close()
        raise
    return node


COMMAND = Command(
    "serve",
    "Offer images to NBD clients",
    operands="[NAME=]IMAGE [NAME=IMAGE...]",
    flags=(*SERVER_FLAGS, *TLS_FLAGS, FORMAT, OBJECT, QUIET, HELP),
    run=run,
    notes="Any number of clients, unless -e says another one, until SIGINT or SIGTERM. An image "
    "without a name is the one that clients get who ask for none.",
)
