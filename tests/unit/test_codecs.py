"""The codecs of single units: round trips, foreign streams, hostile ones, absent libraries."""

from __future__ import annotations

import builtins
import importlib
import random
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.codecs import deflate, zstd
from diskwright.errors import FormatError, MissingDependencyError

UNIT = 65536


def _sample(seed: int = 1) -> bytes:
    source = random.Random(seed)
    words = [source.randbytes(source.randint(3, 40)) for _ in range(200)]
    return b"".join(source.choice(words) for _ in range(6000))[:UNIT]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes packages impossible to import, for codecs not loaded yet."""
    monkeypatch.setattr(deflate, "_library", None)
    monkeypatch.setattr(deflate, "_level", -1)
    monkeypatch.setattr(zstd, "_library", None)
    real = builtins.__import__

    def hide(*names: str) -> None:
        def refuse(name: str, *rest: Any, **words: Any) -> Any:
            if name.partition(".")[0] in names:
                raise ImportError(name)
            return real(name, *rest, **words)

        monkeypatch.setattr(builtins, "__import__", refuse)

    return hide


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("library", ["isal", "zlib"])
def test_deflate_round_trip(without: Any, library: str, wrapped: bool) -> None:
    if library == "zlib":
        without("isal")
    else:
        pytest.importorskip("isal")
    plain = _sample()
    encoded = deflate.encode(plain, wrapped=wrapped)
    assert library in deflate.implementation()
    assert len(encoded) < len(plain)
    out = bytearray(UNIT)
    deflate.decode_into(memoryview(encoded), memoryview(out), wrapped=wrapped)
    assert out == plain


def test_deflate_keeps_to_the_window_qemu_reads_with() -> None:
    far = random.Random(2).randbytes(8192)
    encoded = deflate.encode(far + far)
    # zlib at 12 bits refuses distances above 4 KiB, as QEMU does.
    assert zlib.decompress(encoded, -12) == far + far


def test_deflate_ignores_what_follows() -> None:
    plain = _sample()
    out = bytearray(UNIT)
    deflate.decode_into(deflate.encode(plain) + b"\xff" * 700, memoryview(out))
    assert out == plain


def test_deflate_takes_a_stream_without_an_end() -> None:
    encoder = zlib.compressobj(6, zlib.DEFLATED, -12)
    plain = _sample()
    encoded = encoder.compress(plain) + encoder.flush(zlib.Z_SYNC_FLUSH)
    out = bytearray(UNIT)
    deflate.decode_into(encoded, memoryview(out))
    assert out == plain


def test_deflate_output_is_bounded() -> None:
    bomb = deflate.encode(bytes(1 << 24))
    assert len(deflate.decode(bomb, 4096)) == 4096
    assert deflate.decode(bomb, 0) == b""


@pytest.mark.parametrize(
    "hostile", [b"", b"\0\0\0\0", b"\xff" * 50, deflate.encode(_sample())[:-9]]
)
def test_deflate_refuses_what_does_not_fill_the_unit(hostile: bytes) -> None:
    with pytest.raises(FormatError):
        deflate.decode_into(hostile, memoryview(bytearray(UNIT)))


@given(st.binary(max_size=300))
def test_deflate_of_noise_raises_one_error(noise: bytes) -> None:
    try:
        deflate.decode_into(noise, memoryview(bytearray(4096)))
    except FormatError:
        pass


def test_zstd_round_trip() -> None:
    pytest.importorskip("zstandard")
    plain = _sample()
    encoded = zstd.encode(memoryview(plain))
    out = bytearray(UNIT)
    zstd.decode_into(memoryview(encoded + b"\xff" * 90), memoryview(out))
    assert out == plain


def test_zstd_reads_several_frames() -> None:
    pytest.importorskip("zstandard")
    plain = _sample()
    encoded = zstd.encode(plain[:1000]) + zstd.encode(plain[1000:])
    out = bytearray(UNIT)
    zstd.decode_into(encoded, memoryview(out))
    assert out == plain


@pytest.mark.parametrize("hostile", [b"", b"\0\0\0\0", b"\xff" * 50, b"short"])
def test_zstd_refuses_what_does_not_fill_the_unit(hostile: bytes) -> None:
    pytest.importorskip("zstandard")
    encoded = zstd.encode(_sample())[:-5] if hostile == b"short" else hostile
    with pytest.raises(FormatError):
        zstd.decode_into(encoded, memoryview(bytearray(UNIT)))


def test_zstd_output_is_bounded() -> None:
    pytest.importorskip("zstandard")
    out = bytearray(512)
    zstd.decode_into(zstd.encode(b"x" * (1 << 22)), memoryview(out))
    assert out == b"x" * 512


def test_zstd_absent_names_the_extra(without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_module(name: str, package: str | None = None) -> Any:
        raise ImportError(name)

    without("zstandard")
    monkeypatch.setattr(importlib, "import_module", no_module)
    assert not zstd.is_available()
    with pytest.raises(MissingDependencyError) as caught:
        zstd.encode(b"x")
    assert "diskwright[zstd]" in str(caught.value.hint)
