"""A caller's wish for the end of an operation, heeded where long loops can stop.

Whoever begins an operation says `with cancellable(flag):`. Loops that may take long (over
tables, extents, space to be reserved) call `check_cancelled()` between two steps, where they
leave what an error would leave: a valid image, without what was to be added. So nothing is
raised at other moments, least of all while metadata is being written.

The flag counts for the calling thread; threads that help take it along (see operations/workers).
"""

from __future__ import annotations

from diskwright.block.per_thread import PerThread, holding
from diskwright.errors import CancelledError, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Flag(Protocol):
        """`threading.Event`, or whatever else has `is_set`."""

        def is_set(self) -> bool:
            """Whether the work shall end."""
            ...


#: The flag of each thread.
_heeded = PerThread()


class cancellable(holding):
    """`with cancellable(flag):` loops of this thread end when the flag is set.

    After the end was raised nothing more is heeded up to the outermost block: what cleans up
    must not be stopped. Without a flag, that of the block around it counts.

    Raises:
        OptionError: the flag cannot be asked whether it is set.
    """

    __slots__ = ()

    def __init__(self, flag: Flag | None) -> None:
        if flag is not None and not hasattr(flag, "is_set"):
            raise OptionError(
                "What cancels is a threading.Event or the like, "
                f"not an object of type {type(flag).__name__}",
                field="cancel",
            )
        super().__init__(_heeded, flag)

    def _after(self, error: BaseException | None) -> object:
        return None if isinstance(error, CancelledError) else self._before


def check_cancelled() -> None:
    """End the operation if its caller asked for that.

    Raises:
        CancelledError: once; what cleans up afterwards is not stopped.
    """
    flag = _heeded.value
    if flag is not None and flag.is_set():
        _heeded.value = None
        raise CancelledError("The operation was cancelled")
