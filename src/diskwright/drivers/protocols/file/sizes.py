"""Changing the size of a regular file, and reserving what is added."""

from __future__ import annotations

import errno
import os

from diskwright.block.cancel import check_cancelled
from diskwright.block.requests import PIECE
from diskwright.errors import CancelledError, UnsupportedError, from_oserror
from diskwright.system import host

_PREALLOCATIONS = ("off", "falloc", "full")
_PAGE = 4096
_RESERVED_AT_ONCE = 1 << 30  # between two looks whether that is still wanted


def require_preallocation(mode: str) -> None:
    """Refuse what a file cannot be asked to do with its space.

    Raises:
        UnsupportedError: it is that.
    """
    if mode not in _PREALLOCATIONS:
        raise UnsupportedError(f"Unsupported preallocation mode: {mode}")


def refuse_size(preallocation: str) -> None:
    """Refuse a size that no system takes, in QEMU's words: it has them for a negative one."""
    if preallocation != "off":
        raise UnsupportedError("Cannot use preallocation for shrinking files")
    error = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    raise from_oserror(error, "Could not resize file")


def set_size(descriptor: int, old: int, size: int, preallocation: str) -> None:
    """Change a regular file's size; what is added is reserved or written as asked.

    Raises:
        IOFailure: in the words of the step that failed; the size is the old one.
        CancelledError: the caller asked for the end; the same.
    """
    sentence = "Could not resize file"
    try:
        if preallocation == "off" or size == old:
            os.ftruncate(descriptor, size)
        elif size < old:
            raise UnsupportedError("Cannot use preallocation for shrinking files")
        elif preallocation == "falloc":
            sentence = "Could not preallocate new data"
            os.ftruncate(descriptor, size)  # what is too long is so before space is taken
            for start in range(old, size, _RESERVED_AT_ONCE):
                check_cancelled()
                host.preallocate(descriptor, start, min(_RESERVED_AT_ONCE, size - start))
        else:
            os.ftruncate(descriptor, size)
            sentence = "Could not write zeros for preallocation"
            _write_zeroes_out(descriptor, old, size)
        if not old and size and preallocation != "full":
            _allocate_first_block(descriptor, size)
    except CancelledError:
        _go_back(descriptor, old)
        raise
    except (OSError, OverflowError) as error:
        _go_back(descriptor, old)
        if isinstance(error, OverflowError):
            error = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        raise from_oserror(error, sentence) from error


def _go_back(descriptor: int, size: int) -> None:
    """Give a file whose size could not be changed its old one."""
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        pass  # what led here says more


def _allocate_first_block(descriptor: int, size: int) -> None:
    """Give a new file its first block, as QEMU does.

    Which alignment direct I/O needs can be found out only where there is a block.
    """
    try:
        host.write_all(descriptor, 0, host.aligned_buffer(_PAGE)[: min(size, _PAGE)])
    except OSError:
        pass  # a convenience: the zeroes are there without it


def _write_zeroes_out(descriptor: int, start: int, stop: int) -> None:
    zeroes = host.aligned_buffer(PIECE)
    while start < stop:
        check_cancelled()
        part = min(PIECE - start % _PAGE, stop - start)
        host.write_all(descriptor, start, zeroes[:part])
        start += part
    host.sync_data(descriptor)
