"""Zstandard, one unit at a time, by `zstandard` or by Python's own module from 3.14 on.

Source: RFC 8878; docs/interop/qcow2.txt, "compression type".
"""

from __future__ import annotations

from diskwright.errors import FormatError, MissingDependencyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Bytes = bytes | bytearray | memoryview

#: What QEMU writes with, so that sizes are alike.
LEVEL = 3


class _Zstandard:
    """The package `zstandard`; its contexts serve one thread at a time."""

    def __init__(self) -> None:
        from _thread import _local

        import zstandard

        self._library = zstandard
        self._contexts: Any = _local()
        self.error: type[Exception] = zstandard.ZstdError

    def encode(self, data: Bytes) -> bytes:
        encoder = getattr(self._contexts, "encoder", None)
        if encoder is None:
            encoder = self._contexts.encoder = self._library.ZstdCompressor(level=LEVEL)
        return bytes(encoder.compress(data))

    def decode(self, encoded: Bytes, out: memoryview) -> int:
        decoder = getattr(self._contexts, "decoder", None)
        if decoder is None:
            decoder = self._contexts.decoder = self._library.ZstdDecompressor()
        with decoder.stream_reader(encoded, read_across_frames=True) as reader:
            return int(reader.readinto(out))


class _Standard:
    """`compression.zstd` of Python 3.14 and later."""

    def __init__(self) -> None:
        from importlib import import_module

        self._library: Any = import_module("compression.zstd")
        self.error: type[Exception] = self._library.ZstdError

    def encode(self, data: Bytes) -> bytes:
        return bytes(self._library.compress(data, level=LEVEL))

    def decode(self, encoded: Bytes, out: memoryview) -> int:
        done, rest = 0, bytes(encoded)
        while done < len(out) and rest:
            decoder = self._library.ZstdDecompressor()
            plain = decoder.decompress(rest, max_length=len(out) - done)
            out[done : done + len(plain)] = plain
            done += len(plain)
            if not decoder.eof:
                break
            rest = decoder.unused_data
        return done


_library: _Zstandard | _Standard | None = None


def _load() -> _Zstandard | _Standard:
    global _library
    if _library is None:
        try:
            _library = _Zstandard()
        except ImportError:
            try:
                _library = _Standard()
            except ImportError:
                raise MissingDependencyError(
                    "zstd needs the package 'zstandard'",
                    hint="pip install 'diskwright[zstd]'",
                ) from None
    return _library


def is_available() -> bool:
    """Whether a library is there."""
    try:
        _load()
    except MissingDependencyError:
        return False
    return True


def encode(data: Bytes) -> bytes:
    """Encode `data` as one frame; thread-safe, and the GIL is released.

    Raises:
        MissingDependencyError: no library.
    """
    return _load().encode(data)


def decode_into(encoded: Bytes, out: memoryview) -> None:
    """Fill all of `out` from one frame or several; what follows is ignored.

    Raises:
        FormatError: a frame is corrupt, or the last ends before `out` is full.
        MissingDependencyError: no library.
    """
    library = _load()
    try:
        count = library.decode(encoded, out)
    except library.error as error:
        raise FormatError(f"A compressed unit is corrupt: {error}") from error
    if count != len(out):
        raise FormatError(
            f"A compressed unit holds {count} bytes instead of {len(out)}",
            value=count,
            expected=len(out),
        )
