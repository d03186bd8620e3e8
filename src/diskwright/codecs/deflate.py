"""Deflate, one unit at a time: raw streams (qcow2, qcow) and zlib-wrapped ones (vmdk, dmg).

`isal` does the work where it is installed (several times faster), else the standard zlib.
A reader takes any stream that fills the unit: writers round the stored length up, so what
follows the stream is to be ignored, and QEMU does not insist on a proper end either.
Source: RFC 1951; RFC 1950; docs/interop/qcow2.txt, "Compressed Clusters Descriptor".
"""

from __future__ import annotations

from diskwright.errors import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Bytes = bytes | bytearray | memoryview

#: QEMU reads compressed qcow2 clusters with a window of 4 KiB; larger distances fail there.
QCOW2_WINDOW_BITS = 12

#: Of isal's levels, the fastest to write; 3 saves another 1 % at two thirds of the speed.
ISAL_LEVEL = 2

_DEFLATED = 8

_library: Any = None  # isal.isal_zlib or zlib, which have the same names
_level = -1


def _load() -> Any:
    global _library, _level
    if _library is None:
        try:
            from isal import isal_zlib

            _level, _library = ISAL_LEVEL, isal_zlib
        except ImportError:
            import zlib

            _level, _library = -1, zlib
    return _library


def implementation() -> str:
    """The module in use: "isal.isal_zlib" or "zlib"."""
    return str(getattr(_load(), "__name__", "?"))


def encode(data: Bytes, *, window_bits: int = QCOW2_WINDOW_BITS, wrapped: bool = False) -> bytes:
    """Encode `data` as one whole stream; thread-safe, and the GIL is released.

    Args:
        data: the plain bytes.
        window_bits: log2 of the greatest distance a reader must look back.
        wrapped: with zlib's header and checksum instead of raw.
    """
    library = _load()
    encoder = library.compressobj(_level, _DEFLATED, window_bits if wrapped else -window_bits)
    return bytes(encoder.compress(data) + encoder.flush())


def decode(encoded: Bytes, size: int, *, wrapped: bool = False) -> bytes:
    """Decode at most `size` bytes; shorter where the stream ends earlier.

    Raises:
        FormatError: the stream is corrupt before `size` bytes were found.
    """
    library = _load()
    if not size:
        return b""
    decoder = library.decompressobj(15 if wrapped else -15)
    try:
        return bytes(decoder.decompress(encoded, size))
    except library.error as error:
        raise FormatError(f"A compressed unit is corrupt: {error}") from error


def decode_into(encoded: Bytes, out: memoryview, *, wrapped: bool = False) -> None:
    """Fill all of `out` from `encoded`.

    Raises:
        FormatError: the stream is corrupt, or ends before `out` is full.
    """
    plain = decode(encoded, len(out), wrapped=wrapped)
    if len(plain) != len(out):
        raise FormatError(
            f"A compressed unit holds {len(plain)} bytes instead of {len(out)}",
            value=len(plain),
            expected=len(out),
        )
    out[:] = plain
