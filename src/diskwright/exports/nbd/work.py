"""What sessions and the server's threads tell each other."""

from __future__ import annotations

from diskwright.exports.nbd.requests import PIECE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import TypeAlias

    from diskwright.exports.nbd.channel import AnyChannel
    from diskwright.exports.nbd.export import NodeExport
    from diskwright.exports.nbd.session import Session
    from diskwright.wire.nbd.server import ServerHandshake

    Steps: TypeAlias = Generator[int, "Workspace", None]
    Job: TypeAlias = Callable[["Workspace"], None]

#: What a session waits for: input, the client's taking of output, or its turn.
READ, WRITE, YIELD = 0, 1, 2

#: What of the input a thread can hold; a request and its payload that fit are done at once.
INPUT = 2 * PIECE


class Workspace:
    """The buffers of one thread of the server."""

    __slots__ = ("input", "scratch")

    def __init__(self) -> None:
        self.input = memoryview(bytearray(INPUT))
        self.scratch = memoryview(bytearray(PIECE))


class Surroundings:
    """What a session needs of its server.

    Args:
        others_wait: whether other clients wait for a thread.
        lone: whether no other client is served at this moment.
        hand_over: has a job done in another thread; False where there is none to spare.
        find: the export that a client has chosen.
        handshake: makes the handshake for a new client.
        secure: turns a channel into an encrypted one.
    """

    __slots__ = ("find", "hand_over", "handshake", "lone", "others_wait", "secure")

    def __init__(
        self,
        *,
        others_wait: Callable[[], bool],
        lone: Callable[[], bool],
        hand_over: Callable[[Session, Job], bool],
        find: Callable[[str], NodeExport | None],
        handshake: Callable[[], ServerHandshake],
        secure: Callable[[AnyChannel], AnyChannel] | None = None,
    ) -> None:
        self.others_wait = others_wait
        self.lone = lone
        self.hand_over = hand_over
        self.find = find
        self.handshake = handshake
        self.secure = secure
