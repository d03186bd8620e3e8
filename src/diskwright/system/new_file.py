"""A file that is made to become an image: whose it is, and how it goes if nothing comes of it.

Several processes may make a file of one name at the same time. One of them gets the locks of a
writer, before anything is changed; the others fail, and must leave its file alone.
"""

from __future__ import annotations

import os

from diskwright.errors import LockError
from diskwright.system import host

_ALL = 15


class NewFile:
    """A file of this machine that was made, or is to be emptied.

    Attributes:
        descriptor: open for writing, with the locks of a writer; the caller closes it.
        fresh: there was none of that name before.
    """

    __slots__ = ("_against", "_identity", "_path", "descriptor", "fresh")

    def __init__(self, descriptor: int, path: str, *, fresh: bool, against: int) -> None:
        self.descriptor = descriptor
        self.fresh = fresh
        self._against = against  # what nobody else may do while it is removed
        # Links to it stay, and so does what another folder has of that name.
        self._path = os.path.realpath(path)
        self._identity = _identity(os.fstat(descriptor))

    def remove(self) -> None:
        """Remove the file, if it is still that one and nobody writes to it.

        Errors are not raised: what led here says more.
        """
        try:
            descriptor = host.open_file(self._path, read_only=True)
        except OSError:
            return
        try:
            if _identity(os.fstat(descriptor)) == self._identity:
                _lock(descriptor, self._path, 0, _ALL & ~self._against)
                # Under the locks: who opens it now finds, once it has its own, that it is gone.
                os.unlink(self._path)
        except (OSError, LockError):
            pass
        finally:
            os.close(descriptor)


def open_new(path: str, used: int, shared: int) -> NewFile:
    """Open the file, or make it, and lock it; it is not changed.

    Args:
        path: of the file.
        used, shared: the permissions of who makes it, as sets of bits.

    Raises:
        OSError: it cannot be opened.
        LockError: another open file is against it.
    """
    while True:
        descriptor, fresh = _open(path)
        try:
            _lock(descriptor, path, used, shared)
            if _is_named(descriptor, path):
                return NewFile(descriptor, path, fresh=fresh, against=used)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # somebody removed it, and here it is made anew


def _open(path: str) -> tuple[int, bool]:
    """(descriptor, whether the file was made)."""
    try:
        return host.open_file(path, read_only=False, create=True, exclusive=True), True
    except FileExistsError:
        return host.open_file(path, read_only=False, create=True), False


def _lock(descriptor: int, path: str, used: int, shared: int) -> None:
    if host.locks_supported(descriptor):
        from diskwright.system.image_locks import ImageLocks

        ImageLocks(descriptor, path).change(used, shared)


def _is_named(descriptor: int, path: str) -> bool:
    try:
        return _identity(os.stat(path)) == _identity(os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
