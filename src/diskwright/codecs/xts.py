"""AES-XTS (IEEE 1619) over batches of 512-byte sectors.

Each block is combined with a tweak before and after AES: that of its sector, times x for each block
behind the first.  The library's own XTS would have to begin anew with each sector; here AES runs
over the whole batch, and the tweaks of all sectors are multiplied at once, by NumPy where it is
installed and by long integers otherwise.
"""

from __future__ import annotations

from array import array
from functools import cache
from importlib import import_module
from typing import Any

from ..abilities import Buffer
from .aes import BLOCK, BLOCKS, SECTOR, Ecb, Runs, Vectors, library

# Below so many sectors one call of the library each is quicker than a batch.
_FEW = 6
# NumPy takes as long to import as it saves on so many bytes.
_LONG = 1 << 20
# What the top byte of a block, times x**8, adds to the lowest two: the reduction by
# x**128 + x**7 + x**2 + x + 1.
_LOW = bytes((b ^ b << 1 ^ b << 2 ^ b << 7) & 255 for b in range(256))
_HIGH = bytes((b ^ b << 1 ^ b << 2 ^ b << 7) >> 8 for b in range(256))


@cache
def _numpy() -> Any:
    """NumPy; None where it is not installed."""
    try:
        return import_module("numpy")
    except ImportError:
        return None


class Xts:
    """``key``: that of the data and that of the tweak, of the same length, as one."""

    def __init__(self, key: bytes, vectors: Vectors) -> None:
        half = len(key) // 2
        ciphers = library()
        self._new = ciphers.Cipher
        # IEEE 1619 has keys of 128 and of 256 bits; LUKS also has AES-192 in this mode.
        self._aes = ciphers.algorithms.AES(key) if half != 24 else None
        self._mode = ciphers.modes.XTS
        self._data = Ecb(key[:half])
        self._tweak = Ecb(key[half:])
        self._vectors = vectors
        self._done = 0

    def encrypt(self, runs: Runs, data: Buffer) -> Buffer:
        """``data`` (whole sectors) encrypted."""
        return self._run(runs, data, True)

    def decrypt(self, runs: Runs, data: Buffer) -> Buffer:
        """``data`` (whole sectors) decrypted."""
        return self._run(runs, data, False)

    def _run(self, runs: Runs, data: Buffer, forward: bool) -> Buffer:
        vectors = self._vectors(runs)
        if len(data) <= _FEW * SECTOR and self._aes is not None:
            return self._few(vectors, data, forward)
        cipher = self._data.encrypt if forward else self._data.decrypt
        first = self._tweak.encrypt(vectors)
        self._done += len(data)
        numpy = _numpy() if self._done >= _LONG else None
        if numpy is not None:
            tweak = _tweaks_by_numpy(numpy, first)
            mixed = numpy.frombuffer(data, "<u8") ^ tweak
            out = numpy.frombuffer(cipher(memoryview(mixed).cast("B")), "<u8") ^ tweak
            return memoryview(out).cast("B")
        number = int.from_bytes(_tweaks(first), "little")
        length = len(data)
        mixed = (int.from_bytes(data, "little") ^ number).to_bytes(length, "little")
        return (int.from_bytes(cipher(mixed), "little") ^ number).to_bytes(length, "little")

    def _few(self, vectors: Buffer, data: Buffer, forward: bool) -> Buffer:
        out = memoryview(bytearray(len(data) + BLOCK - 1))
        view = memoryview(data)
        for i in range(len(data) // SECTOR):
            cipher = self._new(self._aes, self._mode(bytes(vectors[BLOCK * i : BLOCK * (i + 1)])))
            machine = cipher.encryptor() if forward else cipher.decryptor()
            at = SECTOR * i
            machine.update_into(view[at : at + SECTOR], out[at:])
        return out[: len(data)]


def _tweaks(first: Buffer) -> array[int]:
    """The tweaks of all blocks in the order of the data: each block of ``first`` times x**0 to
    x**31."""
    count = len(first) // BLOCK
    out = array("Q", bytes(SECTOR * count))
    octave: Buffer = _octave(first, count)
    for power in range(0, BLOCKS, 8):
        if power:
            octave = _times_x8(octave)
        words = array("Q")
        words.frombytes(octave)
        low, high = words[0::2], words[1::2]
        for block in range(8):
            part = slice(block * count, (block + 1) * count)
            at = 2 * (power + block)
            out[at :: 2 * BLOCKS] = low[part]
            out[at + 1 :: 2 * BLOCKS] = high[part]
    return out


def _octave(first: Buffer, count: int) -> bytes:
    """All of ``first`` times x**0, all of it times x**1, and so on to x**7."""
    length = BLOCK * count
    ones = int.from_bytes(b"\1".ljust(BLOCK, b"\0") * count, "little")
    value = int.from_bytes(first, "little")
    out = [bytes(first)]
    for _ in range(7):
        carry = value >> 127 & ones
        value = (value ^ carry << 127) << 1 ^ carry * 0x87
        out.append(value.to_bytes(length, "little"))
    return b"".join(out)


def _times_x8(blocks: Buffer) -> bytearray:
    """Each block times x**8: a move by one byte; what falls out at the top comes in below."""
    top = bytes(blocks[BLOCK - 1 :: BLOCK])
    below = int.from_bytes(bytes(blocks[0::BLOCK]), "little")
    second = below ^ int.from_bytes(top.translate(_HIGH), "little")
    out = bytearray(1)
    out += blocks[:-1]
    out[0::BLOCK] = top.translate(_LOW)
    out[1::BLOCK] = second.to_bytes(len(top), "little")
    return out


def _tweaks_by_numpy(numpy: Any, first: Buffer) -> Any:
    """The same as an array of 64-bit words."""
    count = len(first) // BLOCK
    words = numpy.frombuffer(first, "<u8").reshape(count, 2)
    low = numpy.empty((BLOCKS, count), "<u8")
    high = numpy.empty((BLOCKS, count), "<u8")
    low[0], high[0] = words[:, 0], words[:, 1]
    power = 1
    while power < BLOCKS:  # what there is, times x**power, is as much again
        up, down = numpy.uint64(power), numpy.uint64(64 - power)
        carry = high[:power] >> down
        numpy.left_shift(high[:power], up, out=high[power : 2 * power])
        high[power : 2 * power] |= low[:power] >> down
        target = low[power : 2 * power]
        numpy.left_shift(low[:power], up, out=target)
        for shift in (0, 1, 2, 7):
            target ^= carry << numpy.uint64(shift)
        power *= 2
    out = numpy.empty((count, BLOCKS, 2), "<u8")
    out[:, :, 0], out[:, :, 1] = low.T, high.T
    return out.reshape(-1)
