"""Every error Diskwright raises, in one tree, and the one table from kind to code.

    DiskwrightError
    ├── UsageError               usage               a wrong call or command line
    │   └── OptionError          option              an unknown option or a bad value
    ├── FormatError              format              an image's bytes break its specification
    ├── UnsupportedError         unsupported         right, but not something this node does
    │   └── MissingDependencyError missing-dependency an optional library is absent
    ├── LockError                locked              another process uses the image
    ├── PermissionConflict       in-use              another node of this process uses it
    ├── PolicyError              policy              an outside reference was not allowed
    ├── IOFailure                io                  the system refused; see `errno`
    │   ├── NotFoundError        not-found
    │   ├── AccessError          access
    │   └── NoSpaceError         no-space
    ├── RangeError               range               outside of the node
    ├── ReadOnlyError            read-only
    ├── BrokenNodeError          broken              metadata could not be written; reopen
    └── CancelledError           cancelled           the caller's cancel flag was set

`kind` is what code matches on. `message` is a sentence for a person, `hint` what can be
done, `qemu` QEMU's sentence where QEMU has another one.
"""

from __future__ import annotations

import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

#: Kinds without a class of their own: what an error of a wider class means more precisely.
FINER_KINDS = {
    "closed": "an UnsupportedError: the node was closed, or a failure broke it",
    "fixed-size": "an UnsupportedError: a device keeps its size",
    "inconsistent": "an UnsupportedError: a dirty bitmap may have missed writes",
    "no-check": "an UnsupportedError: the format has nothing that could be checked or repaired",
    "shrink": "an OptionError: the image would become shorter, which has to be asked for",
    "too-large": "an OptionError or FormatError: the format has nothing of that size",
}


def without_controls(line: str) -> str:
    """A line that no name in it can end, move or colour: what does not print is escaped.

    Backslashes are doubled in a line in which there is anything to escape, so that no name can
    look like an escaped one.
    """
    return line if line.isprintable() else "".join(map(_printable, line))


def _printable(char: str) -> str:
    if char.isprintable():
        return "\\\\" if char == "\\" else char
    number = ord(char)
    if 0xDC80 <= number <= 0xDCFF:  # a byte that is no UTF-8, as Python keeps it
        number -= 0xDC00
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


class DiskwrightError(Exception):
    """Something a caller may want to know about.

    Args:
        message: one sentence for a person, without a full stop. Where a name in it has control
            characters, they are escaped, and `qemu` has it as it is.
        kind: overrides the class's kind.
        hint: what to do about it.
        qemu: QEMU's sentence, printed by the commands that are compatible with QEMU's.
        path: the file it is about.
        offset: the byte in that file.
        field: the name of the header field or option.
        node: the name of the node.
    """

    kind = "error"
    #: a second sentence of QEMU's tools, which they print after the error's in a line of its own
    then = ""
    #: QEMU knows no such error, so that its compatible commands print the hint too
    hint_always = False

    def __init__(
        self,
        message: str,
        *,
        kind: str | None = None,
        hint: str | None = None,
        qemu: str | None = None,
        path: str | None = None,
        offset: int | None = None,
        field: str | None = None,
        node: str | None = None,
    ) -> None:
        line = without_controls(message)
        if line != message:
            qemu, message = qemu or message, line
        super().__init__(message)
        if kind is not None:
            self.kind = kind
        self.message = message
        self.hint = hint
        self.qemu = qemu
        self.path = path
        self.offset = offset
        self.field = field
        self.node = node

    def __str__(self) -> str:
        return self.message

    @property
    def qemu_message(self) -> str:
        """The words QEMU's tools print, where they differ from `message`."""
        return self.qemu or self.message

    def beyond_qemu(self) -> Self:
        """It is about what only ours has: every program prints the hint; returns itself."""
        self.hint_always = True
        return self

    def within(self, sentence: str) -> Self:
        """Put `sentence: ` before the message, as QEMU nests them; returns itself."""
        line = without_controls(sentence)
        if self.qemu is not None or line != sentence:
            self.qemu = f"{sentence}: {self.qemu_message}"
        self.message = f"{line}: {self.message}"
        self.args = (self.message,)
        return self


class UsageError(DiskwrightError):
    """The call or command line is wrong, whatever the image holds."""

    kind = "usage"


class OptionError(UsageError):
    """An option is unknown, or its value is not one it takes."""

    kind = "option"


class FormatError(DiskwrightError):
    """Bytes of an image break its specification.

    `value` is what was found and `expected` what the specification asks for.
    """

    kind = "format"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: object = None,
        offset: int | None = None,
        expected: object = None,
        qemu: str | None = None,
        hint: str | None = None,
        path: str | None = None,
    ) -> None:
        super().__init__(message, field=field, offset=offset, qemu=qemu, hint=hint, path=path)
        self.value = value
        self.expected = expected


class UnsupportedError(DiskwrightError):
    """The request is right, but this node, format or platform does not do it."""

    kind = "unsupported"


class MissingDependencyError(UnsupportedError):
    """An optional library is not installed; the hint names the extra."""

    kind = "missing-dependency"


class LockError(DiskwrightError):
    """Another process uses the image in a way that conflicts with this one.

    `holders` are (process id, command) pairs, empty where the system does not tell.
    """

    kind = "locked"

    def __init__(
        self,
        message: str,
        *,
        holders: list[tuple[int, str]] | None = None,
        qemu: str | None = None,
        path: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, qemu=qemu, path=path, hint=hint)
        self.holders = holders or []


class PermissionConflict(DiskwrightError):
    """Two users of one node in this process want what the other does not share."""

    kind = "in-use"


class PolicyError(DiskwrightError):
    """An image refers to something outside that the policy does not allow."""

    kind = "policy"


class IOFailure(DiskwrightError):
    """The system refused an operation; `errno` says how."""

    kind = "io"

    def __init__(
        self,
        message: str,
        *,
        errno: int = _errno.EIO,
        path: str | None = None,
        hint: str | None = None,
        qemu: str | None = None,
        offset: int | None = None,
        node: str | None = None,
    ) -> None:
        super().__init__(message, path=path, hint=hint, qemu=qemu, offset=offset, node=node)
        self.errno = errno


class NotFoundError(IOFailure):
    """A file, snapshot or other named thing does not exist."""

    kind = "not-found"


class AccessError(IOFailure):
    """The system does not permit the access asked for."""

    kind = "access"


class NoSpaceError(IOFailure):
    """The file system, quota or image has no room left."""

    kind = "no-space"


class RangeError(DiskwrightError):
    """A request reaches outside of the node."""

    kind = "range"


class ReadOnlyError(DiskwrightError):
    """A write to a node that was opened read-only, or cannot be written at all."""

    kind = "read-only"


class BrokenNodeError(DiskwrightError):
    """Metadata could not be written; the node refuses writes until it is reopened."""

    kind = "broken"


class CancelledError(DiskwrightError):
    """The caller asked for the end of an operation."""

    kind = "cancelled"


#: kind -> (errno, exit code of a command)
_CODES: dict[str, tuple[int, int]] = {
    "usage": (_errno.EINVAL, 1),
    "option": (_errno.EINVAL, 1),
    "format": (_errno.EINVAL, 1),
    "unsupported": (_errno.ENOTSUP, 1),
    "fixed-size": (_errno.EINVAL, 1),
    "missing-dependency": (_errno.ENOTSUP, 1),
    "locked": (_errno.EAGAIN, 1),
    "in-use": (_errno.EPERM, 1),
    "policy": (_errno.EPERM, 1),
    "io": (_errno.EIO, 1),
    "not-found": (_errno.ENOENT, 1),
    "access": (_errno.EACCES, 1),
    "no-space": (_errno.ENOSPC, 1),
    "too-large": (_errno.EFBIG, 1),
    "range": (_errno.EIO, 1),
    "read-only": (_errno.EPERM, 1),
    "broken": (_errno.EIO, 1),
    "corrupt": (getattr(_errno, "ENOMEDIUM", _errno.EIO), 1),  # as if the disk had been taken out
    "cancelled": (_errno.ECANCELED, 1),
}


def errno_of(error: BaseException) -> int:
    """The errno that says best what happened (EIO when nothing better is known)."""
    if isinstance(error, IOFailure):
        return error.errno
    if isinstance(error, DiskwrightError):
        return _CODES.get(error.kind, (_errno.EIO, 1))[0]
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    return _errno.EIO


def strerror_of(error: BaseException) -> str:
    """The system's sentence for it, where only that is wanted."""
    return os.strerror(errno_of(error))


class Step:
    """`with Step("Could not write it"):` QEMU names the step that failed, not the request in it.

    With what the system says of it, unless `reason` is False.
    """

    __slots__ = ("_reason", "_sentence")

    def __init__(self, sentence: str, *, reason: bool = True) -> None:
        self._sentence = sentence
        self._reason = reason

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, IOFailure):
            reason = f": {strerror_of(error)}" if self._reason else ""
            error.qemu = self._sentence + reason


def exit_code_of(error: BaseException) -> int:
    """The exit code of a command that ends with this error."""
    if isinstance(error, DiskwrightError):
        return _CODES.get(error.kind, (_errno.EIO, 1))[1]
    return 1


_NOT_FOUND = (_errno.ENOENT, _errno.ENOTDIR, _errno.ENXIO, _errno.ENODEV)
_ACCESS = (_errno.EACCES, _errno.EPERM, _errno.EROFS)
_NO_SPACE = (_errno.ENOSPC, _errno.EDQUOT, _errno.EFBIG)


def from_oserror(error: OSError, sentence: str, *, path: str | None = None) -> IOFailure:
    """The error of this tree for a system call's: `sentence: strerror`."""
    number = error.errno if error.errno is not None else _errno.EIO
    message = f"{sentence}: {os.strerror(number)}" if sentence else os.strerror(number)
    cls: type[IOFailure] = IOFailure
    if number in _NOT_FOUND:
        cls = NotFoundError
    elif number in _ACCESS:
        cls = AccessError
    elif number in _NO_SPACE:
        cls = NoSpaceError
    raised = cls(message, errno=number, path=path)
    raised.__cause__ = error
    return raised
