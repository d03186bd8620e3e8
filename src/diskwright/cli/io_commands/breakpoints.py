"""`break`, `resume`, `remove_break`, `wait_break`: stop requests in their course (blkdebug)."""

from __future__ import annotations

from diskwright.cli.grammar import Arguments
from diskwright.cli.io_commands.declaration import IoCommand, Refused
from diskwright.errors import DiskwrightError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.cli.io_commands.session import Session


def set_breakpoint(session: Session, arguments: Arguments) -> None:
    """Stop the next request that comes to an event."""
    event, tag = arguments.operands
    try:
        session.node.breakpoint(event, tag)
    except DiskwrightError as error:
        raise Refused(error.qemu_message) from error


def remove_breakpoint(session: Session, arguments: Arguments) -> None:
    """Forget a breakpoint, and let the requests go that it stopped."""
    (tag,) = arguments.operands
    try:
        session.node.remove_breakpoint(tag)
    except DiskwrightError as error:
        raise Refused(error.qemu_message) from error


def resume(session: Session, arguments: Arguments) -> None:
    """Let a stopped request go on."""
    (tag,) = arguments.operands
    try:
        session.outstanding.resuming(lambda: session.node.resume(tag))
    except DiskwrightError as error:
        raise Refused(error.qemu_message) from error


def wait_breakpoint(session: Session, arguments: Arguments) -> None:
    """Wait until a request has stopped.

    QEMU's tool waits for ever where none can come; this one says so.
    """
    (tag,) = arguments.operands
    node = session.node
    if not node.is_suspended(tag) and not session.outstanding.are_there:
        raise Refused(f"No request is under way that could stop at {tag}")
    try:
        node.wait_breakpoint(tag)
    except DiskwrightError as error:
        raise Refused(error.qemu_message) from error
    session.outstanding.report()


BREAK = IoCommand(
    "break",
    "stop the next request that comes to an event, and give it a tag",
    set_breakpoint,
    synopsis="event tag",
    words=(2, 2),
    notes="The image, or what it lies in, must be opened through the filter blkdebug.",
)
REMOVE_BREAK = IoCommand(
    "remove_break",
    "forget a breakpoint, and let go what it stopped",
    remove_breakpoint,
    synopsis="tag",
    words=(1, 1),
)
RESUME = IoCommand("resume", "let a stopped request go on", resume, synopsis="tag", words=(1, 1))
WAIT_BREAK = IoCommand(
    "wait_break",
    "wait until a request has stopped",
    wait_breakpoint,
    synopsis="tag",
    words=(1, 1),
)
