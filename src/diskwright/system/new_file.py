"""A file that is made to become an image: whose it is, and how it goes if nothing comes of it.

Several processes may make a file of one name at the same time. One of them gets the locks of a
writer, before anything is changed; the others fail, and must leave its file alone. It has them
until the image is finished, however often the file is opened for it meanwhile: all of these are
one open file.
"""

from __future__ import annotations

import errno
import os

from diskwright.errors import LockError
from diskwright.system import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.system.image_locks import ImageLocks

_ALL = 15


class NewFile:
    """A file of this machine that was made, or is to be emptied.

    Attributes:
        descriptor: open for writing, with the locks of a writer; −1 once it is closed.
        fresh: there was none of that name before.
    """

    __slots__ = ("_against", "_identity", "_locks", "_name", "_path", "descriptor", "fresh")

    def __init__(self, descriptor: int, path: str, *, fresh: bool, against: int) -> None:
        self.descriptor = descriptor
        self.fresh = fresh
        self._against = against  # what nobody else may do while it is removed
        self._locks = _locks_of(descriptor, path)
        self._name = path
        # Links to it stay, and so does what another folder has of that name.
        self._path = os.path.realpath(path)
        self._identity = _identity(os.fstat(descriptor))

    def is_named(self, path: str) -> bool:
        """Whether it is what `path` names now."""
        try:
            return _identity(os.stat(path)) == self._identity
        except FileNotFoundError:
            return False

    def was_emptied(self) -> None:
        """Open it once more and close it, while there is nothing in it.

        A file that was emptied is one that gets another content, and ext4 writes that out when
        the next open file of it is closed: it would be the one with all of the image in it.
        """
        try:
            os.close(host.open_file(self._path, read_only=True))
        except OSError:
            pass  # all of it is written out at the end then

    @property
    def used(self) -> int:
        """The permissions that its locks use."""
        return 0 if self._locks is None else self._locks.used

    def lock(self, used: int, shared: int) -> None:
        """Lock it, where that can be.

        Raises:
            LockError: another open file is against it.
        """
        if self._locks is not None:
            self._locks.change(used, shared)

    def share(self) -> None:
        """It has its length, and is written to from now on: that keeps away who would empty it."""
        if self._locks is not None:
            self._locks.share_all()

    def is_meant(self, path: str) -> bool:
        """Whether it was made under this name, whatever has it now, or has it now."""
        return path == self._name or self.is_named(path)

    def lend(self, path: str, *, direct: bool) -> int:
        """Another descriptor of the same open file, so that it has the locks too.

        Returns:
            −1 if another file is meant, or the system can do no such thing. Then the locks
            are given up, which would be against whoever opens it.

        Raises:
            OSError: what is meant can only be opened by its name, which another file has now.
        """
        if not self.is_meant(path):
            return -1
        if self.descriptor >= 0:
            lent = host.duplicate(self.descriptor, direct=direct)
            if lent >= 0:
                return lent
            self.close()
        if not self.is_named(path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return -1

    def close(self) -> None:
        """Give up the locks, unless who was lent the file has it open still."""
        descriptor, self.descriptor, self._locks = self.descriptor, -1, None
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close

    def remove(self) -> None:
        """Remove the file, if it is still that one and nobody else writes to it; close it.

        Errors are not raised: what led here says more.
        """
        try:
            if self.descriptor < 0:
                self.descriptor = host.open_file(self._path, read_only=False)
                self._locks = _locks_of(self.descriptor, self._path)
            if self.is_named(self._path):
                self.lock(0, _ALL & ~self._against)
                # Under the locks: who opens it now finds, once it has its own, that it is gone.
                os.unlink(self._path)
        except (OSError, LockError):
            pass
        finally:
            self.close()


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
        made = NewFile(descriptor, path, fresh=fresh, against=used)
        try:
            made.lock(used, shared)
            if made.is_named(path):
                return made
        except BaseException:
            made.close()
            raise
        made.close()  # somebody removed it, and here it is made anew


def _open(path: str) -> tuple[int, bool]:
    """(descriptor, whether the file was made)."""
    try:
        return host.open_file(path, read_only=False, create=True, exclusive=True), True
    except FileExistsError:
        return host.open_file(path, read_only=False, create=True), False


def _locks_of(descriptor: int, path: str) -> ImageLocks | None:
    if not host.locks_supported(descriptor):
        return None
    from diskwright.system.image_locks import ImageLocks

    return ImageLocks(descriptor, path)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
