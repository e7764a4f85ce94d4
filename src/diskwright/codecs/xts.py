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
# What is worked on at once: what comes in between stays in the cache of a processor.
_STEP = 64 << 10
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
        first = memoryview(self._tweak.encrypt(vectors))
        machine = self._data.machine(forward)
        self._done += len(data)
        numpy = _numpy() if self._done >= _LONG else None
        if numpy is not None:
            return _run_numpy(numpy, machine, first, data)
        out = []
        view = memoryview(data)
        scratch = memoryview(bytearray(min(_STEP, len(data)) + BLOCK - 1))
        for at in range(0, len(data), _STEP):
            part = view[at : at + _STEP]
            length = len(part)
            tweaks = _tweaks(first[at // BLOCKS : (at + length) // BLOCKS])
            number = int.from_bytes(tweaks, "little")
            mixed = (int.from_bytes(part, "little") ^ number).to_bytes(length, "little")
            machine.update_into(mixed, scratch)
            done = int.from_bytes(scratch[:length], "little") ^ number
            out.append(done.to_bytes(length, "little"))
        return out[0] if len(out) == 1 else b"".join(out)

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


_spare: list[Any] = []
"""Arrays that no thread uses at the moment: fresh memory costs more than what is done in it."""


def _arrays(numpy: Any) -> Any:
    """(words of a step and a block more, tweaks, their lower and upper words, carries)."""
    try:
        return _spare.pop()
    except IndexError:
        count = _STEP // SECTOR
        return (
            numpy.empty(_STEP // 8 + 2, "<u8"),  # as much as the library wants
            numpy.empty((count, BLOCKS, 2), "<u8"),
            *[numpy.empty((BLOCKS, count), "<u8") for _ in range(3)],
        )


def _run_numpy(numpy: Any, machine: Any, first: memoryview, data: Buffer) -> memoryview:
    """``data`` through the AES of ``machine``, between its tweaks."""
    words = numpy.frombuffer(data, "<u8")
    out = numpy.empty(len(words), "<u8")
    arrays = _arrays(numpy)
    mixed = arrays[0]
    room = memoryview(mixed).cast("B")
    step = _STEP // 8
    for at in range(0, len(words), step):
        part, done = words[at : at + step], out[at : at + step]
        # A sector of 64 words has a block of 16 bytes in `first`.
        tweaks = _tweaks_by_numpy(numpy, first[at // 4 : (at + len(part)) // 4], arrays)
        numpy.bitwise_xor(part, tweaks, out=done)
        machine.update_into(memoryview(done).cast("B"), room)
        numpy.bitwise_xor(mixed[: len(part)], tweaks, out=done)
    _spare.append(arrays)
    return memoryview(out).cast("B")


def _tweaks_by_numpy(numpy: Any, first: Buffer, arrays: Any) -> Any:
    """The same as an array of 64-bit words, of at most a step, in one of ``arrays``: ``x**n``
    moves a block by n < 32 bits, and what falls out at the top comes in below, times 0x87.
    """
    count = len(first) // BLOCK
    _, out, lower, upper, carry = arrays
    if count < out.shape[0]:
        out, lower, upper, carry = out[:count], lower[:, :count], upper[:, :count], carry[:, :count]
    words = numpy.frombuffer(first, "<u8").reshape(count, 2)
    low, high = words[:, 0].copy(), words[:, 1].copy()
    up = numpy.arange(BLOCKS, dtype="<u8")[:, None]
    down = numpy.uint64(64) - up[1:]
    carry = carry[1:]
    numpy.left_shift(high, up, out=upper)
    numpy.right_shift(low, down, out=carry)
    upper[1:] |= carry
    numpy.left_shift(low, up, out=lower)
    numpy.right_shift(high, down, out=carry)
    target = lower[1:]
    target ^= carry
    for shift in (1, 1, 5):  # by 1, 2 and 7 in all
        carry <<= numpy.uint64(shift)
        target ^= carry
    out[:, :, 0], out[:, :, 1] = lower.T, upper.T
    return out.reshape(-1)
