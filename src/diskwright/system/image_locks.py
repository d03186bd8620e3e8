"""Locks on an image file that QEMU and Diskwright both respect.

Byte 100 + n of the file is read-locked by whoever holds permission n, byte 200 + n by whoever
does not let others hold it. Nobody ever takes a write lock: after taking its own bytes, a
program asks whether another open file holds the ones that speak against it.

Invariants: new locks are taken before old ones are given up, so there is no moment without
protection; a change that fails leaves the locks as they were.
"""

from __future__ import annotations

import os

from diskwright.errors import LockError
from diskwright.system import host

HELD = 100
NOT_SHARED = 200

#: permission number -> its name in error lines
PERMISSIONS = ("consistent read", "write", "write unchanged", "resize")
_ALL = 15


class ImageLocks:
    """The locks that one open file has; `used` and `shared` are sets of permission bits.

    Args:
        descriptor, path: the file.
        kept: what the open file uses already, and goes on to.
    """

    __slots__ = ("_descriptor", "_kept", "_path", "shared", "used")

    def __init__(self, descriptor: int, path: str, kept: int = 0) -> None:
        self._descriptor = descriptor
        self._path = path
        self._kept = kept
        self.used = kept
        self.shared = _ALL

    def change(self, used: int, shared: int) -> None:
        """Hold the locks of somebody who uses and shares these permissions.

        Raises:
            LockError: another open file is against it; nothing was changed.
        """
        used |= self._kept
        if (used, shared) == (self.used, self.shared):
            return
        try:
            self._take(used & ~self.used, self.shared & ~shared)
            conflict = self._probe(used, shared)
        except BaseException:
            self._give_up_all_but(self.used, self.shared)
            raise
        if conflict is not None:
            # Given up before the holder is looked for, which takes its time: two that try
            # again and again would else always find each other.
            self._give_up_all_but(self.used, self.shared)
            raise self._refusal(*conflict)
        self.used, self.shared = used, shared
        self._give_up_all_but(used, shared)

    def share_all(self) -> None:
        """Go on using what is used, and let others do the same: nothing can be against that."""
        self.shared = _ALL
        self._give_up_all_but(self.used, self.shared)

    def move_to(self, descriptor: int) -> None:
        """Have another descriptor of the same file hold the locks; the old one is closed next.

        Nothing is probed: what would be found are our own.
        """
        self._descriptor = descriptor
        self._take(self.used, _ALL & ~self.shared)

    def _take(self, used: int, not_shared: int) -> None:
        for first, bits in ((HELD, used), (NOT_SHARED, not_shared)):
            for n in range(len(PERMISSIONS)):
                if bits >> n & 1:
                    self._lock(first + n)

    def _lock(self, byte: int) -> None:
        try:
            host.lock_shared(self._descriptor, byte)
        except BlockingIOError as error:
            raise self._refusal(f"Failed to lock byte {byte}", byte) from error

    def _probe(self, used: int, shared: int) -> tuple[str, int] | None:
        """What speaks against it: a sentence and the byte; None if nothing does."""
        for n, name in enumerate(PERMISSIONS):
            if used >> n & 1 and host.is_locked(self._descriptor, NOT_SHARED + n):
                return f'Failed to get "{name}" lock', NOT_SHARED + n
            if not shared >> n & 1 and host.is_locked(self._descriptor, HELD + n):
                return f'Failed to get shared "{name}" lock', HELD + n
        return None

    def _give_up_all_but(self, used: int, shared: int) -> None:
        for n in range(len(PERMISSIONS)):
            if not used >> n & 1:
                host.unlock(self._descriptor, HELD + n)
            if shared >> n & 1:
                host.unlock(self._descriptor, NOT_SHARED + n)

    def _refusal(self, sentence: str, byte: int) -> LockError:
        holders = host.lock_holders(self._descriptor, (byte,))
        who = ", ".join(f"process {pid} ({command})" for pid, command in holders)
        hint = "wait until it ends, or stop it"
        if [pid for pid, _ in holders] == [os.getpid()]:
            who = "this process itself"
            hint = "open it once, and use that for both; or open it for reading only"
        return LockError(
            f"{sentence}: {who or 'another process'} uses '{self._path}'",
            qemu=f"{sentence}\nIs another process using the image [{self._path}]?",
            holders=holders,
            path=self._path,
            hint=hint,
        )
