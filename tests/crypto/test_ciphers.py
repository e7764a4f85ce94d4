"""AES over batches of sectors, beside the library's own modes and published vectors."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

from diskwright.codecs import aes, xts
from diskwright.codecs.aes import SECTOR, Cbc, Essiv, Plain
from diskwright.codecs.xts import Xts
from diskwright.errors import UnsupportedFeature
from diskwright.formats.ciphering import Spec

ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
AES, modes = ciphers.algorithms.AES, ciphers.modes


@pytest.fixture(params=["integers", "numpy"], autouse=True)
def arithmetic(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        pytest.importorskip("numpy")
        monkeypatch.setattr(xts, "_LONG", 0)
    else:
        monkeypatch.setattr(xts, "_numpy", lambda: None)


def expected(key: bytes, mode: Any, vectors: list[bytes], data: bytes) -> bytes:
    """The library, sector by sector."""
    out = []
    for i, vector in enumerate(vectors):
        machine = ciphers.Cipher(AES(key), mode(vector)).encryptor()
        out.append(machine.update(data[SECTOR * i : SECTOR * (i + 1)]))
    return b"".join(out)


def done(work: Any, runs: list[tuple[int, int]], data: bytes) -> bytes:
    """The result in other memory, which is that in the same memory."""
    other, same = memoryview(bytearray(len(data))), memoryview(bytearray(data))
    work(runs, data, other)
    work(runs, same, same)
    assert other == same
    return bytes(other)


RUNS = [
    [(0, 1)],
    [(5, 3), (1 << 40, 2)],
    [(7, 7)],
    [((1 << 32) - 3, 6), (9, 1), (9, 1)],
    [(1 << 54, 100)],
    [(100, 1), (50, 250), (0, 33)],
]


@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize("length", [32, 64])
@pytest.mark.parametrize("bits", [32, 64])
def test_xts_is_the_librarys(runs: list[tuple[int, int]], length: int, bits: int) -> None:
    rng = random.Random(length * bits)
    key = rng.randbytes(length)
    numbers = [n for first, count in runs for n in range(first, first + count)]
    data = rng.randbytes(SECTOR * len(numbers))
    vectors = [(n % (1 << bits)).to_bytes(16, "little") for n in numbers]
    cipher = Xts(key, Plain(bits))
    packed = done(cipher.encrypt, runs, data)
    assert packed == expected(key, modes.XTS, vectors, data)
    assert done(cipher.decrypt, runs, packed) == data


@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize("length", [16, 24, 32])
@pytest.mark.parametrize("essiv", [0, 16, 32])
def test_cbc_is_the_librarys(runs: list[tuple[int, int]], length: int, essiv: int) -> None:
    rng = random.Random(length + essiv)
    key, salt = rng.randbytes(length), rng.randbytes(essiv)
    numbers = [n for first, count in runs for n in range(first, first + count)]
    data = rng.randbytes(SECTOR * len(numbers))
    vectors = [n.to_bytes(16, "little") for n in numbers]
    if essiv:
        ecb = ciphers.Cipher(AES(salt), modes.ECB()).encryptor()
        vectors = [ecb.update(vector) for vector in vectors]
    cipher = Cbc(key, Essiv(salt) if essiv else Plain(64))
    packed = done(cipher.encrypt, runs, data)
    assert packed == expected(key, modes.CBC, vectors, data)
    assert done(cipher.decrypt, runs, packed) == data


def test_the_tweaks_are_multiplied_in_the_field() -> None:
    """Every bit of the first tweak, against the definition in IEEE 1619, 5.2."""
    firsts = [1 << bit for bit in range(128)] + [(1 << 128) - 1]
    first = b"".join(value.to_bytes(16, "little") for value in firsts)
    want = []
    for value in firsts:
        for _ in range(32):
            want.append(value.to_bytes(16, "little"))
            value = value << 1 & (1 << 128) - 1 ^ (0x87 if value >> 127 else 0)
    assert xts._tweaks(first).tobytes() == b"".join(want)
    numpy = xts._numpy()
    if numpy is not None:
        parts = [first[at : at + 1024] for at in range(0, len(first), 1024)]
        arrays = xts._Arrays(numpy)
        found = [xts._tweaks_by_numpy(numpy, part, arrays).tobytes() for part in parts]
        assert b"".join(found) == b"".join(want)


# IEEE 1619-2007, annex B: vectors 4 and 10 (data units of 512 bytes); the first block of each.
PLAIN = bytes(range(256)) * 2
KEY_4 = bytes.fromhex("2718281828459045235360287471352631415926535897932384626433832795")
KEY_10 = bytes.fromhex(
    "2718281828459045235360287471352662497757247093699959574966967627"
    "3141592653589793238462643383279502884197169399375105820974944592"
)


@pytest.mark.parametrize(
    "key, number, begins",
    [
        (KEY_4, 0, "27a7479befa1d476489f308cd4cfa6e2"),
        (KEY_10, 0xFF, "1c3b3a102f770386e4836c99e370cf9b"),
    ],
)
@pytest.mark.parametrize("times", [1, 20])
def test_published_vectors(key: bytes, number: int, begins: str, times: int) -> None:
    packed = done(Xts(key, Plain(64)).encrypt, [(number, 1)] * times, PLAIN * times)
    assert packed == packed[:SECTOR] * times
    assert packed[:16].hex() == begins


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    aes.library.cache_clear()
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(UnsupportedFeature, match=r"diskwright\[crypto\]"):
        Xts(bytes(32), Plain(64))
    aes.library.cache_clear()


@pytest.mark.parametrize("length", [15, 17, 31, 33, 65])
@pytest.mark.parametrize("mode", ["cbc", "xts"])
def test_keys_of_other_lengths(mode: str, length: int) -> None:
    with pytest.raises(UnsupportedFeature, match="bits of key"):
        Spec("aes", mode, "plain64").check(length)
