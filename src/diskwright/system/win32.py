"""The Win32 functions that `windows.py` needs, through ctypes.

Each method is one call: numbers and bytes in, numbers and bytes out, OSError where the
function failed. Tests hand `windows.Host` another object with the same methods.

Source: Microsoft's Win32 API reference, fileapi.h, ioapiset.h, winioctl.h.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ERROR_HANDLE_EOF = 38
ERROR_LOCK_VIOLATION = 33
ERROR_MORE_DATA = 234
ERROR_IO_PENDING = 997

#: GetLastError() -> errno; what is missing is EIO
_ERRNO = {
    1: errno.ENOTSUP,  # ERROR_INVALID_FUNCTION
    2: errno.ENOENT,
    3: errno.ENOENT,
    5: errno.EACCES,
    6: errno.EBADF,
    8: errno.ENOMEM,
    19: errno.EROFS,
    32: errno.EACCES,  # ERROR_SHARING_VIOLATION
    ERROR_LOCK_VIOLATION: errno.EAGAIN,
    39: errno.ENOSPC,
    50: errno.ENOTSUP,
    80: errno.EEXIST,
    87: errno.EINVAL,
    112: errno.ENOSPC,
    123: errno.ENOENT,  # ERROR_INVALID_NAME
    183: errno.EEXIST,
    223: errno.EFBIG,
    ERROR_IO_PENDING: errno.EAGAIN,
}


def windows_error(code: int, path: str | None = None) -> OSError:
    """The OSError (of the class that its errno has) for what GetLastError said."""
    number = _ERRNO.get(code, errno.EIO)
    return OSError(number, os.strerror(number), path)


class Win32:
    """Calls of kernel32.dll, loaded when the first is made."""

    _loaded: Any = None

    @property
    def _kernel(self) -> Any:
        if self._loaded is None:
            import ctypes

            loader: Any = vars(ctypes)["WinDLL"]  # only there on Windows
            self._loaded = loader("kernel32", use_last_error=True)
            self._loaded.CreateFileW.restype = ctypes.c_void_p
        return self._loaded

    def _check(self, result: object, path: str | None = None) -> None:
        if not result:
            raise windows_error(self._last_error(), path)

    def _last_error(self) -> int:
        import ctypes

        return int(vars(ctypes)["get_last_error"]())

    @staticmethod
    def _overlapped(offset: int) -> Any:
        """struct OVERLAPPED: two pointers of status, the offset, an event."""
        import ctypes

        pointer = ctypes.sizeof(ctypes.c_void_p)
        raw = bytes(2 * pointer) + offset.to_bytes(8, "little") + bytes(pointer)
        return ctypes.create_string_buffer(raw, len(raw))

    # ------------------------------------------------------------------------ descriptors

    def create_file(
        self, path: str, access: int, *, share: int, disposition: int, flags: int
    ) -> int:
        """CreateFileW; returns the handle."""
        import ctypes

        handle = self._kernel.CreateFileW(
            ctypes.c_wchar_p(path), access, share, None, disposition, flags, None
        )
        self._check(handle not in (None, ctypes.c_void_p(-1).value), path)
        return int(handle)

    def descriptor_of(self, handle: int, flags: int) -> int:
        """A C descriptor that owns the handle."""
        import msvcrt

        return int(vars(msvcrt)["open_osfhandle"](handle, flags))

    def handle_of(self, descriptor: int) -> int:
        """The handle below a C descriptor."""
        import msvcrt

        return int(vars(msvcrt)["get_osfhandle"](descriptor))

    # ------------------------------------------------------------------------ moving bytes

    def read_file(self, handle: int, offset: int, view: memoryview) -> int:
        """ReadFile at an offset; 0 at the end of the file."""
        import ctypes

        count = ctypes.c_ulong()
        buffer = (ctypes.c_char * len(view)).from_buffer(view)
        result = self._kernel.ReadFile(
            ctypes.c_void_p(handle),
            buffer,
            len(view),
            ctypes.byref(count),
            self._overlapped(offset),
        )
        if not result:
            code = self._last_error()
            if code != ERROR_HANDLE_EOF:
                raise windows_error(code)
        return count.value

    def write_file(self, handle: int, offset: int, view: memoryview) -> int:
        """WriteFile at an offset."""
        import ctypes

        count = ctypes.c_ulong()
        if view.readonly:
            buffer: Any = ctypes.c_char_p(view.tobytes())
        else:
            buffer = (ctypes.c_char * len(view)).from_buffer(view)
        result = self._kernel.WriteFile(
            ctypes.c_void_p(handle),
            buffer,
            len(view),
            ctypes.byref(count),
            self._overlapped(offset),
        )
        self._check(result)
        return count.value

    def flush_file_buffers(self, handle: int) -> None:
        """FlushFileBuffers."""
        import ctypes

        self._check(self._kernel.FlushFileBuffers(ctypes.c_void_p(handle)))

    # ------------------------------------------------------------------------ the rest

    def device_io_control(self, handle: int, code: int, given: bytes, room: int) -> bytes:
        """DeviceIoControl; what fits of the answer where there is more of it."""
        import ctypes

        count = ctypes.c_ulong()
        answer = ctypes.create_string_buffer(max(room, 1))
        result = self._kernel.DeviceIoControl(
            ctypes.c_void_p(handle),
            code,
            given if given else None,
            len(given),
            answer if room else None,
            room,
            ctypes.byref(count),
            None,
        )
        if not result and self._last_error() != ERROR_MORE_DATA:
            raise windows_error(self._last_error())
        return answer.raw[: count.value]

    def lock_file(self, handle: int, offset: int, flags: int) -> None:
        """LockFileEx of one byte."""
        import ctypes

        place = self._overlapped(offset)
        self._check(self._kernel.LockFileEx(ctypes.c_void_p(handle), flags, 0, 1, 0, place))

    def unlock_file(self, handle: int, offset: int) -> None:
        """UnlockFileEx of one byte."""
        import ctypes

        place = self._overlapped(offset)
        self._check(self._kernel.UnlockFileEx(ctypes.c_void_p(handle), 0, 1, 0, place))

    def file_information(self, handle: int, kind: int, room: int) -> bytes:
        """GetFileInformationByHandleEx."""
        import ctypes

        answer = ctypes.create_string_buffer(room)
        self._check(
            self._kernel.GetFileInformationByHandleEx(ctypes.c_void_p(handle), kind, answer, room)
        )
        return answer.raw

    def compressed_size(self, path: str) -> int:
        """GetCompressedFileSizeW: what the file occupies."""
        import ctypes

        high = ctypes.c_ulong()
        low = self._kernel.GetCompressedFileSizeW(ctypes.c_wchar_p(path), ctypes.byref(high))
        low &= 0xFFFFFFFF
        if low == 0xFFFFFFFF and self._last_error():
            raise windows_error(self._last_error(), path)
        return int(high.value << 32 | low)
