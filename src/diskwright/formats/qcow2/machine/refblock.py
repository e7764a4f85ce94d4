"""Refcount blocks of every width from 1 to 64 bits (qcow2 specification, "Host cluster
management")."""

from __future__ import annotations

import re
import sys
from array import array
from functools import cache

from ....hints import Protocol
from ....ondisk import big_endian_array, big_endian_bytes, zeros
from .runs import Run


class RefBlock(Protocol):
    """One decoded refcount block."""

    entries: int

    def get(self, index: int) -> int:
        """The count of one cluster."""

    def set(self, index: int, value: int) -> None:
        """Set the count of one cluster."""

    def fill(self, start: int, stop: int, value: int) -> None:
        """Set the counts of [start, stop)."""

    def small(self, start: int, stop: int) -> bytes | None:
        """The counts of [start, stop) as bytes; None where one is larger than 255."""

    def put(self, start: int, counts: bytes) -> None:
        """Set the counts from ``start`` on; the width has room for each."""

    def zero_run(self, start: int) -> tuple[int, int] | None:
        """The first run of zero counts at or behind ``start``, to its end; None without one."""

    def encode(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of the block on disk."""


_SCAN = 4096


class WideBlock:
    """Counts of 8, 16, 32 or 64 bits."""

    __slots__ = ("bits", "entries", "values")

    def __init__(self, bits: int, values: array[int]) -> None:
        self.bits = bits
        self.values = values
        self.entries = len(values)

    def get(self, index: int) -> int:
        return self.values[index]

    def set(self, index: int, value: int) -> None:
        self.values[index] = value

    def fill(self, start: int, stop: int, value: int) -> None:
        self.values[start:stop] = array(self.values.typecode, [value]) * (stop - start)

    def small(self, start: int, stop: int) -> bytes | None:
        part, size = self.values[start:stop].tobytes(), self.values.itemsize
        low = 0 if sys.byteorder == "little" else size - 1
        for column in range(size):
            if column != low and part[column::size].count(0) < stop - start:
                return None
        return part[low::size]

    def put(self, start: int, counts: bytes) -> None:
        size = self.values.itemsize
        raw = bytearray(len(counts) * size)
        raw[0 if sys.byteorder == "little" else size - 1 :: size] = counts
        part = array(self.values.typecode)
        part.frombytes(raw)
        self.values[start : start + len(counts)] = part

    def zero_run(self, start: int) -> tuple[int, int] | None:
        values = self.values
        try:
            start = values.index(0, start)
        except ValueError:
            return None
        stop = start + 1
        while stop < self.entries:
            raw = values[stop : stop + _SCAN].tobytes()
            zero = (len(raw) - len(raw.lstrip(b"\0"))) // values.itemsize
            stop += zero
            if zero * values.itemsize < len(raw):
                # A count whose low byte alone is set is stripped of its zero bytes too, but
                # division drops the partial entry again.
                break
        return start, stop

    def encode(self, start: int, stop: int) -> bytes:
        size = self.values.itemsize
        return big_endian_bytes(self.values, start // size, stop // size)


def _has_zero(bits: int) -> bytes:
    """For every byte value 1 if one of its entries is zero, else 0."""
    mask = (1 << bits) - 1
    return bytes(
        any(not value >> shift & mask for shift in range(0, 8, bits)) for value in range(256)
    )


class PackedBlock:
    """Counts of 1, 2 or 4 bits; the first entry is in the least significant bits of a byte."""

    __slots__ = ("_hits", "bits", "entries", "per_byte", "raw")

    def __init__(self, bits: int, raw: bytearray) -> None:
        self.bits = bits
        self.raw = raw
        self.per_byte = 8 // bits
        self.entries = len(raw) * self.per_byte
        self._hits = _has_zero(bits)

    def get(self, index: int) -> int:
        byte, i = divmod(index, self.per_byte)
        return self.raw[byte] >> i * self.bits & ((1 << self.bits) - 1)

    def set(self, index: int, value: int) -> None:
        byte, i = divmod(index, self.per_byte)
        shift = i * self.bits
        mask = (1 << self.bits) - 1
        self.raw[byte] = self.raw[byte] & ~(mask << shift) | value << shift

    def fill(self, start: int, stop: int, value: int) -> None:
        while start < stop and start % self.per_byte:
            self.set(start, value)
            start += 1
        whole = (stop - start) // self.per_byte
        if whole > 0:
            byte = 0
            for shift in range(0, 8, self.bits):
                byte |= value << shift
            at = start // self.per_byte
            self.raw[at : at + whole] = bytes([byte]) * whole
            start += whole * self.per_byte
        for index in range(start, stop):
            self.set(index, value)

    def small(self, start: int, stop: int) -> bytes:
        first = start // self.per_byte
        found = narrow(self.bits, self.raw[first : -(-stop // self.per_byte)])
        assert found is not None
        first *= self.per_byte
        return found[start - first : stop - first]

    def put(self, start: int, counts: bytes) -> None:
        per_byte, stop = self.per_byte, start + len(counts)
        first, last = start // per_byte, -(-stop // per_byte)
        whole = bytearray(self.small(first * per_byte, last * per_byte))
        whole[start - first * per_byte : stop - first * per_byte] = counts
        packed = 0
        for i in range(per_byte):
            lane = whole[i::per_byte].translate(_shifted(i * self.bits))
            packed |= int.from_bytes(lane, "big")
        self.raw[first:last] = packed.to_bytes(last - first, "big")

    def zero_run(self, start: int) -> tuple[int, int] | None:
        while start < self.entries and start % self.per_byte:
            if not self.get(start):
                return start, self._run_end(start)
            start += 1
        byte = start // self.per_byte
        while byte < len(self.raw):
            at = self.raw[byte : byte + _SCAN].translate(self._hits).find(1)
            if at >= 0:
                start = (byte + at) * self.per_byte
                while self.get(start):
                    start += 1
                return start, self._run_end(start)
            byte += _SCAN
        return None

    def _run_end(self, stop: int) -> int:
        while stop < self.entries and stop % self.per_byte:
            if self.get(stop):
                return stop
            stop += 1
        while stop < self.entries:
            at = stop // self.per_byte
            chunk = self.raw[at : at + _SCAN]
            zero = len(chunk) - len(chunk.lstrip(b"\0"))
            stop += zero * self.per_byte
            if zero < len(chunk):
                while not self.get(stop):
                    stop += 1
                break
        return stop

    def encode(self, start: int, stop: int) -> bytes:
        return bytes(self.raw[start:stop])


def narrow(bits: int, raw: bytes | bytearray) -> bytes | None:
    """The counts of a refcount block of ``bits`` bits as bytes; None where one is too large."""
    if bits == 8:
        return bytes(raw)
    if bits > 8:
        size = bits >> 3
        for column in range(size - 1):
            part = raw[column::size]
            if part.count(0) < len(part):
                return None
        return bytes(raw[size - 1 :: size])
    per_byte = 8 // bits
    out = bytearray(len(raw) * per_byte)
    for i, lane in enumerate(_lanes(bits)):
        out[i::per_byte] = raw.translate(lane)
    return bytes(out)


@cache
def _lanes(bits: int) -> list[bytes]:
    """For every place in a byte of counts what the count there is, by the byte's value."""
    mask = (1 << bits) - 1
    return [bytes([v >> at & mask for v in range(256)]) for at in range(0, 8, bits)]


@cache
def _shifted(by: int) -> bytes:
    """For every byte value what of it is left in a byte when it is shifted."""
    return bytes(value << by & 255 for value in range(256))


def decode(bits: int, data: bytes) -> RefBlock:
    """The refcount block in ``data``, with counts of ``bits`` bits."""
    if bits < 8:
        return PackedBlock(bits, bytearray(data))
    return WideBlock(bits, big_endian_array(bits, data))


def empty(bits: int, size: int) -> RefBlock:
    """A block of ``size`` bytes whose counts are all zero."""
    if bits < 8:
        return PackedBlock(bits, bytearray(size))
    return WideBlock(bits, zeros(bits, size * 8 // bits))


# -- one reference more or less for many clusters
_ONES = re.compile(rb"\x01+")
_LESS = bytes(max(value - 1, 0) for value in range(256))


@cache
def _more(times: int) -> bytes:
    return bytes(value + times & 255 for value in range(256))


def lower(block: RefBlock, start: int, stop: int) -> list[Run]:
    """Take one reference from each of the counts [start, stop), unless it is zero; the runs of
    those that have none left now."""
    counts = block.small(start, stop) if stop - start > 1 else None
    if counts is not None:
        block.put(start, counts.translate(_LESS))
        return [(start + one.start(), start + one.end()) for one in _ONES.finditer(counts)]
    out: list[Run] = []
    for index in range(start, stop):
        count = block.get(index)
        if count:
            block.set(index, count - 1)
        if count == 1:
            if out and out[-1][1] == index:
                out[-1] = (out[-1][0], index + 1)
            else:
                out.append((index, index + 1))
    return out


def lift(block: RefBlock, start: int, stop: int, times: int, most: int) -> int | None:
    """``times`` more references for each of the counts [start, stop); the index of the first one
    for which that is more than ``most``, and nothing has changed then.  None: none."""
    counts = block.small(start, stop) if stop - start > 1 and times < 256 else None
    if counts is not None:
        highest = max(counts)
        if highest + times <= min(most, 255):
            block.put(start, counts.translate(_more(times)))
            return None
    for index in range(start, stop):
        if block.get(index) + times > most:
            return index
    for index in range(start, stop):
        block.set(index, block.get(index) + times)
    return None
