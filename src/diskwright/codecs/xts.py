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

from ..abilities import Buffer
from ..hints import Any
from .aes import BLOCK, BLOCKS, SECTOR, Ecb, Runs, Vectors, library

# Below so many sectors one call of the library each is quicker than a batch.
_FEW = 6
# NumPy takes as long to import as it saves on so many bytes.
_LONG = 1 << 20
# What NumPy works on at once: each of its calls gives up the GIL, and shorter ones would spend more
# time on getting it back than on computing.
_STEP = 512 << 10
# And by integers: what comes in between stays in the cache of a processor.
_SHORT_STEP = 128 << 10
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

    def encrypt(self, runs: Runs, data: Buffer, into: memoryview) -> None:
        """``data`` (whole sectors) encrypted; ``into`` may be the same memory."""
        self._run(runs, data, into, True)

    def decrypt(self, runs: Runs, data: Buffer, into: memoryview) -> None:
        """``data`` (whole sectors) decrypted; ``into`` may be the same memory."""
        self._run(runs, data, into, False)

    def _run(self, runs: Runs, data: Buffer, into: memoryview, forward: bool) -> None:
        vectors = self._vectors(runs)
        self._done += len(data)
        numpy = _numpy() if self._done >= _LONG else None
        if numpy is not None:
            _run_numpy(numpy, self._data, forward, self._tweak.encrypt(vectors), data, into)
        elif len(data) <= _FEW * SECTOR and self._aes is not None:
            self._few(vectors, data, into, forward)
        else:
            self._by_integers(self._tweak.encrypt(vectors), data, into, forward)

    def _by_integers(
        self, first: memoryview, data: Buffer, into: memoryview, forward: bool
    ) -> None:
        view = memoryview(data)
        scratch = memoryview(bytearray(min(_SHORT_STEP, len(data)) + BLOCK - 1))
        for at in range(0, len(data), _SHORT_STEP):
            part = view[at : at + _SHORT_STEP]
            length = len(part)
            tweaks = _tweaks(first[at // BLOCKS : (at + length) // BLOCKS])
            number = int.from_bytes(tweaks, "little")
            mixed = (int.from_bytes(part, "little") ^ number).to_bytes(length, "little")
            self._data.run(forward, mixed, scratch)
            done = int.from_bytes(scratch[:length], "little") ^ number
            into[at : at + length] = done.to_bytes(length, "little")

    def _few(self, vectors: Buffer, data: Buffer, into: memoryview, forward: bool) -> None:
        """By the library's own."""
        view = memoryview(data)
        room = memoryview(bytearray(SECTOR + BLOCK - 1))
        for i in range(len(data) // SECTOR):
            cipher = self._new(self._aes, self._mode(bytes(vectors[BLOCK * i : BLOCK * (i + 1)])))
            machine = cipher.encryptor() if forward else cipher.decryptor()
            at = SECTOR * i
            machine.update_into(view[at : at + SECTOR], room)
            into[at : at + SECTOR] = room[:SECTOR]


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


_spare: list[_Arrays] = []
"""Those that no thread uses at the moment: fresh memory costs more than what is done in it."""


class _Arrays:
    """Memory for a step, and by how much the words of the blocks of each sector are shifted."""

    def __init__(self, numpy: Any) -> None:
        count = _STEP // SECTOR
        # As much as the library wants: a block more.
        self.mixed = numpy.empty(_STEP // 8 + 2, "<u8")
        self.tweaks = numpy.empty((count, BLOCKS, 2), "<u8")
        self.kept, self.moved = numpy.empty((2, 2, count, BLOCKS), "<u8")
        self.up = numpy.tile(numpy.arange(BLOCKS, dtype="<u8"), (count, 1))
        self.down = 64 - self.up


def _run_numpy(
    numpy: Any, ecb: Ecb, forward: bool, first: memoryview, data: Buffer, into: memoryview
) -> None:
    """``data`` through AES, between its tweaks."""
    words, out = numpy.frombuffer(data, "<u8"), numpy.frombuffer(into, "<u8")
    arrays = _spare.pop() if _spare else _Arrays(numpy)
    mixed = arrays.mixed
    room = memoryview(mixed).cast("B")
    step = _STEP // 8
    for at in range(0, len(words), step):
        part, done = words[at : at + step], out[at : at + step]
        # A sector of 64 words has a block of 16 bytes in `first`.
        tweaks = _tweaks_by_numpy(numpy, first[at // 4 : (at + len(part)) // 4], arrays)
        numpy.bitwise_xor(part, tweaks, out=done)
        ecb.run(forward, into[8 * at : 8 * (at + len(part))], room)
        numpy.bitwise_xor(mixed[: len(part)], tweaks, out=done)
    _spare.append(arrays)


def _tweaks_by_numpy(numpy: Any, first: Buffer, arrays: _Arrays) -> Any:
    """The same as an array of 64-bit words, of at most a step, in ``arrays``: ``x**n`` moves a
    block by n < 32 bits, and what falls out at the top comes in below, times 0x87.
    """
    count = len(first) // BLOCK
    tweaks, up, down = arrays.tweaks[:count], arrays.up[:count], arrays.down[:count]
    # Lower and upper words apart, and the other way round.
    kept, moved = arrays.kept[:, :count], arrays.moved[:, :count]
    kept[...] = numpy.frombuffer(first, "<u8").reshape(count, 2).T[:, :, None]
    numpy.right_shift(kept[::-1], down, out=moved)
    kept <<= up
    kept ^= moved
    low, carry = kept[0], moved[0]
    for shift in (1, 1, 5):  # by 1, 2 and 7 in all
        carry <<= numpy.uint64(shift)
        low ^= carry
    tweaks[:, :, 0], tweaks[:, :, 1] = kept
    return tweaks.reshape(-1)
