"""DEFLATE by each of its libraries: what one packs all unpack, and windows are kept."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

import pytest

from diskwright.codecs import deflate
from diskwright.codecs.deflate import Deflate

UNIT = 65536


@pytest.fixture(params=["fast", "plain"], autouse=True)
def libraries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the extra `fast`, and with Python's zlib alone."""
    deflate._packer.cache_clear()
    if request.param == "plain":
        monkeypatch.setattr(deflate, "_library", lambda name: None)
    else:
        pytest.importorskip("isal")
        pytest.importorskip("zlib_ng")
    yield request.param
    deflate._packer.cache_clear()


def units() -> Iterator[bytes]:
    rng = random.Random(3)
    words = [rng.randbytes(rng.randrange(2, 12)) for _ in range(400)]
    for _ in range(4):
        yield b"".join(rng.choices(words, k=UNIT))[:UNIT]
    yield bytes(UNIT)
    yield rng.randbytes(UNIT)
    yield (rng.randbytes(5000) * 14)[:UNIT]


@pytest.mark.parametrize("bits", [-12, -15, 12, 15])
@pytest.mark.parametrize("level", [None, 1, 2, 3, 4, 6, 9])
def test_what_is_packed_is_unpacked(level: int | None, bits: int) -> None:
    codec = Deflate(level, bits)
    for data in units():
        packed = codec.pack(data)
        assert codec.unpack(packed + b"what follows", UNIT) == data
        assert codec.unpack(packed, 1000) == data[:1000]
        assert zlib.decompress(packed, bits) == data


@pytest.mark.parametrize("level", [None, 1, 3, 9])
def test_nothing_is_referred_to_beyond_the_window(level: int | None) -> None:
    data = random.Random(4).randbytes(5000) * 13
    assert len(Deflate(level, -12).pack(data)) > 0.99 * len(data)
    assert len(Deflate(9, -15).pack(data)) < 0.2 * len(data)


@pytest.mark.parametrize("bits", [-12, 15])
def test_damaged_and_short(bits: int) -> None:
    codec = Deflate(None, bits)
    data = next(units())
    packed = codec.pack(data)
    with pytest.raises(ValueError, match=r"hold .* bytes instead of 65537"):
        codec.unpack(packed, UNIT + 1)
    with pytest.raises(ValueError):
        codec.unpack(packed[: len(packed) // 2], UNIT)
    rng = random.Random(5)
    for _ in range(200):
        damaged = bytearray(packed)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert len(codec.unpack(damaged, UNIT)) == UNIT
        except ValueError:
            pass
