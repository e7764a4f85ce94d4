"""Small formats to compose graphs from: a cipher, a disk of several extents, an offset window."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from ..abilities import Places
from ..contract import (
    DISCARD,
    OP_DATA,
    OP_DISCARD,
    OP_ZERO,
    WRITE,
    Groups,
    HostRange,
    MetaWrite,
    NeedMeta,
    Plan,
    Procedure,
    Range,
    Read,
    Step,
)
from ..extents import Data, Extent
from ..records import NamedTuple
from ..tableless import Tableless

SECTOR = 64
_BITS = SECTOR * 8
_MASK = (1 << _BITS) - 1


class Cipher:
    """A length-preserving transform of 64-byte sectors, tweaked by the host offset.

    No byte of a sector can be changed alone: each is rotated as one number, so that a rewrite of
    a part without the rest shows.
    """

    unit = SECTOR

    def __init__(self, key: int = 9) -> None:
        self.key = key

    def _tweak(self, sector: int) -> int:
        word = struct.pack("<Q", (sector * 0x9E3779B97F4A7C15 + self.key) & ((1 << 64) - 1))
        return int.from_bytes(word * 8, "little")

    def _sectors(
        self, places: Sequence[tuple[int, int, int]], data: Any
    ) -> Iterator[tuple[int, int]]:
        at = 0
        for _, host, length in places:
            if host % SECTOR or length % SECTOR:
                raise AssertionError(f"a part of a cipher sector at {host:#x}+{length:#x}")
            for sector in range(host // SECTOR, (host + length) // SECTOR):
                number = int.from_bytes(data[at : at + SECTOR], "little")
                yield number, self._tweak(sector)
                at += SECTOR

    def encode(self, places: Places, data: Any, into: memoryview) -> None:
        """The bytes for the disk."""
        into[:] = b"".join(
            ((((x << 13) | (x >> (_BITS - 13))) & _MASK) ^ t).to_bytes(SECTOR, "little")
            for x, t in self._sectors(places, data)
        )

    def decode(self, places: Places, data: Any, into: memoryview) -> None:
        """The guest's bytes."""
        into[:] = b"".join(
            ((((x ^ t) >> 13) | ((x ^ t) << (_BITS - 13))) & _MASK).to_bytes(SECTOR, "little")
            for x, t in self._sectors(places, data)
        )


class Crypt(Tableless):
    """A header of 64 bytes, then encrypted sectors; the size is a multiple of 64."""

    name: ClassVar[str] = "crypt"
    unit = cipher_unit = SECTOR
    ready = True

    def __init__(self, size: int, key: int = 9) -> None:
        self.size = size
        self.cipher = (Cipher(key),)

    @staticmethod
    def image(plain: bytes, key: int = 9) -> bytes:
        """The image whose guest bytes are ``plain``."""
        padded = plain + bytes(-len(plain) % SECTOR)
        out = bytearray(SECTOR + len(padded))
        Cipher(key).encode([(0, SECTOR, len(padded))], padded, memoryview(out)[SECTOR:])
        return bytes(out)

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        return [Data("file", o + SECTOR, n, True, self.cipher) for o, n in ranges], None

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | None:
        """Only a write below the sector comes here: the same place, in whole sectors."""
        if kind != WRITE:
            return None
        plan = Plan()
        units = {u for o, n in ranges for u in range(o // SECTOR, -(-(o + n) // SECTOR))}
        for unit in sorted(units):
            at = unit * SECTOR
            plan.steps.append(Step(OP_DATA, at, SECTOR, "file", at + SECTOR, self.cipher))
        return plan


class Part(NamedTuple):
    """``length`` guest bytes at ``start`` are those at ``host`` of the node in ``slot``."""

    start: int
    length: int
    slot: str
    host: int


class Concat(Tableless):
    """A disk of several extents.  With ``descriptor``, a slot, the change id in its first bytes is
    renewed (a `before` group) before the first write."""

    name: ClassVar[str] = "concat"

    def __init__(self, parts: Sequence[Part], unit: int = 1, descriptor: str = "") -> None:
        self.parts = parts
        self.unit = unit
        self.size = max(p.start + p.length for p in parts)
        self.descriptor = descriptor
        self.ready = self.modified = not descriptor

    def open(self) -> Procedure:
        """Read the descriptor; returns the format."""
        if self.descriptor:
            (data,) = yield Read(self.descriptor, [(0, 4)])
            self.ready = self.modified = data == b"CID1"
        return self

    def _pieces(self, ranges: Sequence[Range]) -> list[tuple[int, int, str, int]]:
        out = []
        for offset, length in ranges:
            end = offset + length
            for part in self.parts:
                start, stop = max(offset, part.start), min(end, part.start + part.length)
                if start < stop:
                    out.append((start, stop - start, part.slot, part.host + start - part.start))
        return out

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        return [Data(s, h, n, self.ready) for _, n, s, h in self._pieces(ranges)], None

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | None:
        plan = Plan()
        op = OP_DATA if kind == WRITE else OP_DISCARD if kind == DISCARD else OP_ZERO
        plan.steps = [Step(op, g, n, s, h) for g, n, s, h in self._pieces(ranges)]
        if not self.ready:
            head = MetaWrite(self.descriptor, 0, b"CID1", "descriptor")
            plan.before = Groups([[head]], "before")
        return plan

    def settle(self, token: Any) -> list[HostRange]:
        if token == "before":
            self.ready = self.modified = True
        return []
