"""AES over batches of 512-byte sectors: its keys, initialization vectors, and CBC.

The library that does the arithmetic (``cryptography``, an extra) takes ten microseconds to begin a
sector, as long as AES itself needs for 64 KiB.  So a batch goes through few calls: CBC decryption
of all sectors at once is right but for the first block of each, and CBC encryption, a chain inside
each sector, goes through all sectors block by block.  XTS is in :mod:`.xts`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from importlib import import_module

from ..abilities import Buffer
from ..errors import UnsupportedFeature
from ..hints import Any
from ..secrets import EXTRA

SECTOR = 512
BLOCK = 16
KEY_BYTES = (16, 24, 32)
Runs = Iterable[tuple[int, int]]
"""Numbers of sectors, as (first, count), in the order of the data."""

BLOCKS = SECTOR // BLOCK


@cache
def library() -> Any:
    """The library's ciphers.  Raises UnsupportedFeature when it is not there."""
    try:
        return import_module("cryptography.hazmat.primitives.ciphers")
    except ImportError as error:
        raise UnsupportedFeature(
            f"encryption with AES needs the library 'cryptography' (install {EXTRA})"
        ) from error


class Ecb:
    """AES on single blocks."""

    def __init__(self, key: bytes) -> None:
        ciphers = library()
        self._new = ciphers.Cipher
        self._ecb = ciphers.modes.ECB()
        self._cbc = ciphers.modes.CBC
        self._aes = ciphers.algorithms.AES(key)
        self._spare: tuple[list[Any], list[Any]] = ([], [])

    def run(self, forward: bool, data: Buffer, into: Buffer) -> None:
        """Encrypt (decrypt) each block.  The library wants ``into`` to be longer by a block but one
        byte, and not to be the memory of ``data``."""
        spare = self._spare[forward]
        try:
            machine = spare.pop()
        except IndexError:
            cipher = self._new(self._aes, self._ecb)
            machine = cipher.encryptor() if forward else cipher.decryptor()
        machine.update_into(data, into)
        spare.append(machine)

    def encrypt(self, data: Buffer) -> memoryview:
        """Each block encrypted."""
        out = memoryview(bytearray(len(data) + BLOCK - 1))
        self.run(True, data, out)
        return out[: len(data)]

    def unchain(self, data: Buffer) -> memoryview:
        """``D(Y[i]) ^ Y[i-1]`` for all blocks, with zeroes before the first."""
        out = memoryview(bytearray(len(data) + BLOCK - 1))
        self._new(self._aes, self._cbc(bytes(BLOCK))).decryptor().update_into(data, out)
        return out[: len(data)]


@lru_cache(maxsize=16)
def _ramp(count: int) -> tuple[int, int]:
    """Blocks of 1, 1, 1, ... and of 0, 1, 2, ... as numbers."""
    ones = b"\1".ljust(BLOCK, b"\0") * count
    ramp = b"".join([number.to_bytes(BLOCK, "little") for number in range(count)])
    return int.from_bytes(ones, "little"), int.from_bytes(ramp, "little")


class Plain:
    """The number of the sector in ``bits`` bits, little-endian: ``plain`` (32) and ``plain64``."""

    def __init__(self, bits: int) -> None:
        self.mask = (1 << bits) - 1

    def __call__(self, runs: Runs) -> Buffer:
        """A block for each sector."""
        out = []
        for first, count in runs:
            ones, ramp = _ramp(count)
            if first + count - 1 <= self.mask:
                out.append((first * ones + ramp).to_bytes(BLOCK * count, "little"))
            else:
                numbers = range(first, first + count)
                out += [(number & self.mask).to_bytes(BLOCK, "little") for number in numbers]
        return out[0] if len(out) == 1 else b"".join(out)


class Essiv:
    """``plain64`` encrypted with ``key``, a hash of the disk's key."""

    def __init__(self, key: bytes) -> None:
        self._plain = Plain(64)
        self._ecb = Ecb(key)

    def __call__(self, runs: Runs) -> Buffer:
        """A block for each sector."""
        return self._ecb.encrypt(self._plain(runs))


Vectors = Callable[[Runs], Buffer]


class Cbc:
    """AES-CBC, each sector a chain of its own."""

    def __init__(self, key: bytes, vectors: Vectors) -> None:
        self._ecb = Ecb(key)
        self._vectors = vectors

    def decrypt(self, runs: Runs, data: Buffer, into: memoryview) -> None:
        """``data`` (whole sectors) decrypted; ``into`` may be the same memory."""
        vectors = self._vectors(runs)
        out = self._ecb.unchain(data)
        # The first block of each sector took the block before it for its vector.
        before = bytes(BLOCK) + b"".join(
            [data[at - BLOCK : at] for at in range(SECTOR, len(data), SECTOR)]
        )
        first = b"".join([out[at : at + BLOCK] for at in range(0, len(data), SECTOR)])
        first = xor(xor(first, before), vectors)
        for i in range(len(data) // SECTOR):
            out[SECTOR * i : SECTOR * i + BLOCK] = first[BLOCK * i : BLOCK * (i + 1)]
        into[:] = out

    def encrypt(self, runs: Runs, data: Buffer, into: memoryview) -> None:
        """``data`` (whole sectors) encrypted; ``into`` may be the same memory."""
        words = array("Q")
        words.frombytes(data)
        out = array("Q", bytes(len(data)))
        count, stride = len(data) // SECTOR, 2 * BLOCKS
        column = array("Q", bytes(BLOCK * count))
        last = int.from_bytes(self._vectors(runs), "little")
        for block in range(BLOCKS):
            at = 2 * block
            column[0::2] = words[at::stride]
            column[1::2] = words[at + 1 :: stride]
            mixed = int.from_bytes(column.tobytes(), "little") ^ last
            packed = self._ecb.encrypt(mixed.to_bytes(BLOCK * count, "little"))
            last = int.from_bytes(packed, "little")
            done = packed.cast("Q")
            out[at::stride] = array("Q", done[0::2].tobytes())
            out[at + 1 :: stride] = array("Q", done[1::2].tobytes())
        into[:] = memoryview(out).cast("B")


def xor(a: Buffer, b: Buffer) -> bytes:
    """``a ^ b``, as long as ``a``."""
    value = int.from_bytes(a, "little") ^ int.from_bytes(b, "little")
    return value.to_bytes(len(a), "little")
