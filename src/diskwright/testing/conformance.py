"""One suite for every driver: what a node of a disk's graph has to do, whatever stands behind it.

Standard library only, so that it runs from an installed wheel: ``python -m diskwright.testing``.
A :class:`Subject` says how to get a node; each function in :data:`CHECKS` is run on a fresh one.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from ..contract import FUA, MAY_UNMAP, NO_FALLBACK
from ..engine.futures import BaseDriver, gather
from ..engine.node import Node
from ..errors import DiskError
from ..extents import HOLE, ZERO, Data
from ..records import NamedTuple
from .model import pattern


class Subject(NamedTuple):
    """A driver in one configuration.

    ``open(driver, folder, fresh)`` gives a writable node, new or with what was left in ``folder``;
    ``close`` ends it.  ``first`` is what a new disk holds (padded with zeroes to ``size``).
    ``keeps``: reopening finds the bytes again.  ``stores``: reads give what was written (the null
    driver does not).  ``unit``: whole units of this many bytes read as zeroes when discarded; 0
    where discarding is only a hint.  ``portable`` asks for the file protocol with nothing but what
    every system has.
    """

    name: str
    open: Callable[[BaseDriver, Path, bool], Awaitable[Node]]
    close: Callable[[Node], Awaitable[None]]
    size: int
    first: bytes = b""
    keeps: bool = True
    stores: bool = True
    leaf: bool = False
    resizes: bool = True
    unit: int = 0
    portable: bool = False


class Failure(AssertionError):
    """The node did not do what every node has to."""


class Unavailable(Exception):
    """This machine (its system, or the file system of the folder) cannot do it."""


def expect(condition: object, text: str) -> None:
    """Raise Failure with ``text`` unless ``condition``."""
    if not condition:
        raise Failure(text)


class Session:
    """A node and the bytes that it must hold.  Each method asks the node and compares."""

    def __init__(self, driver: BaseDriver, subject: Subject, folder: Path) -> None:
        self.driver, self.subject, self.folder = driver, subject, folder
        self.node: Node
        self.bytes = bytearray(subject.first[: subject.size].ljust(subject.size, b"\0"))
        self._number = 0

    async def open(self, fresh: bool = True) -> Session:
        """Open the node (a new one with ``fresh``)."""
        self.node = await self.subject.open(self.driver, self.folder, fresh)
        expect(self.node.size == len(self.bytes), f"size {self.node.size}, not {len(self.bytes)}")
        return self

    async def close(self) -> None:
        await self.subject.close(self.node)

    async def reopen(self) -> None:
        """Close and open again, where the driver keeps anything."""
        if self.subject.keeps:
            await self.close()
            await self.open(fresh=False)

    # -- requests
    def fresh(self, offset: int, length: int) -> bytes:
        """Bytes that were not written before."""
        self._number += 1
        return pattern(self._number, offset, length)

    async def write(self, ranges: list[tuple[int, int]], flags: int = 0) -> None:
        """Write new bytes to all ranges in one batch."""
        buffers = [self.fresh(o, n) for o, n in ranges]
        await self.node.write([o for o, _ in ranges], buffers, flags)
        for (offset, length), buffer in zip(ranges, buffers, strict=True):
            self.bytes[offset : offset + length] = buffer

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Zero a range; with NO_FALLBACK it may be refused with ENOTSUP."""
        try:
            await self.node.zero([offset], [length], flags)
        except OSError as error:
            expect(flags & NO_FALLBACK and error.errno == errno.ENOTSUP, f"zero: {error!r}")
            await self._adopt(offset, length)
        else:
            self.bytes[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        """Discard a range: every byte of it stays or becomes zero; whole units become zero."""
        await self.node.discard([offset], [length])
        unit = self.subject.unit
        end = offset + length
        if unit:
            start = -(-offset // unit) * unit
            stop = end if end >= len(self.bytes) else end - end % unit
            if start < stop:
                self.bytes[start:stop] = bytes(stop - start)
        else:
            await self._adopt(offset, length)

    async def _adopt(self, offset: int, length: int) -> None:
        """Each byte of the range may have become zero."""
        if not self.subject.stores:
            return
        (found,) = await self.node.read([offset], [length])
        now = bytes(found)
        for i, (new, old) in enumerate(zip(now, self.bytes[offset : offset + length], strict=True)):
            expect(
                new in (0, old), f"byte {offset + i:#x} is {new:#04x}, neither zero nor {old:#x}"
            )
        self.bytes[offset : offset + length] = now

    async def read(self, ranges: list[tuple[int, int]], views: bool = False) -> None:
        """Read all ranges in one batch."""
        into = [memoryview(bytearray(b"\xee" * n)) for _, n in ranges] if views else None
        found = await self.node.read([o for o, _ in ranges], [n for _, n in ranges], into)
        expect(len(found) == len(ranges), "as many answers as requests")
        if into is not None and self.subject.stores:
            found = into
        for (offset, length), data in zip(ranges, found, strict=True):
            expect(len(data) == length, f"{len(data)} bytes of {length} at {offset:#x}")
            if self.subject.stores:
                self._same(bytes(data), offset)

    def _same(self, data: bytes, offset: int) -> None:
        wanted = self.bytes[offset : offset + len(data)]
        if data != wanted:
            at = next(i for i, (a, b) in enumerate(zip(data, wanted, strict=True)) if a != b)
            raise Failure(
                f"byte {offset + at:#x} is {data[at]:#04x}, not {wanted[at]:#04x} "
                f"(read of {len(data):#x} at {offset:#x})"
            )

    async def all(self) -> None:
        """Compare the whole disk, and what its map says about it."""
        size = len(self.bytes)
        step = 1 << 20
        for offset in range(0, size, step):
            await self.read([(offset, min(step, size - offset))])
        await self.map()

    async def map(self) -> None:
        """The map covers the disk, and what it calls zero reads as zeroes."""
        offset, size = 0, len(self.bytes)
        while offset < size:
            extents = await self.node.extents(offset, size - offset)
            expect(extents, f"no extent at {offset:#x}")
            for extent in extents:
                length = extent.length
                expect(length > 0, f"empty extent at {offset:#x}")
                hole = extent.kind == HOLE and self.node.child("backing") is None
                if (extent.kind == ZERO or hole) and self.subject.stores:
                    told = f"{offset:#x}+{length:#x} is said to be zero"
                    expect(not any(self.bytes[offset : offset + length]), told)
                if isinstance(extent, Data):
                    expect(extent.host >= 0, "data lie somewhere")
                offset += length
            expect(offset <= size, f"the map ends at {offset:#x}, the disk at {size:#x}")

    async def resize(self, size: int) -> None:
        """Change the size; what is new is zero."""
        await self.node.truncate(size)
        expect(self.node.size == size, f"size {self.node.size} after truncate to {size}")
        if size < len(self.bytes):
            del self.bytes[size:]
        else:
            self.bytes.extend(bytes(size - len(self.bytes)))


Check = Callable[[Session], Coroutine[Any, Any, None]]


async def new_disk(s: Session) -> None:
    """A new disk reads as what it was made of."""
    await s.all()


async def unaligned(s: Session) -> None:
    """Requests at any offset and of any length, alone and in batches."""
    size = s.subject.size
    await s.write([(1, 1)])
    await s.write([(511, 2), (4095, 3), (65535, 70000), (size - 1, 1)])
    await s.read([(0, 3), (510, 5), (4090, 10), (65000, 80000), (size - 10, 10)])
    await s.read([(0, 3), (510, 5), (4090, 10), (65000, 80000), (size - 10, 10)], views=True)
    await s.write([(70000, 0)])
    await s.read([(70000, 0), (0, 1)])
    await s.all()


async def batches(s: Session) -> None:
    """Many requests at once; of those that overlap, the later wins."""
    rng = random.Random(1)
    for _ in range(6):
        offsets = [rng.randrange(200_000) for _ in range(rng.choice([2, 5, 33]))]
        await s.write([(o, rng.choice([1, 512, 4096, 5000])) for o in offsets])
        await s.read([(o, 6000) for o in offsets], views=rng.random() < 0.5)
    await s.all()


async def zeroes(s: Session) -> None:
    """Zeroing leaves zeroes there and nowhere else, with every flag."""
    await s.write([(0, 300_000)])
    for offset, length, flags in (
        (0, 65536, MAY_UNMAP),
        (70_000, 1, 0),
        (70_100, 66_000, MAY_UNMAP),
        (140_000, 5_000, NO_FALLBACK),
        (150_000, 140_000, 0),
        (290_000, 9_999, FUA),
    ):
        await s.zero(offset, length, flags)
    await s.zero(200_000, 100_000, MAY_UNMAP | NO_FALLBACK)
    await s.write([(180_000, 40_000)])
    await s.zero(s.subject.size - 700, 700, MAY_UNMAP)
    await s.all()
    await s.reopen()
    await s.all()


async def discards(s: Session) -> None:
    """Discarding keeps all bytes outside, and what is written afterwards."""
    await s.write([(0, 400_000)])
    await s.discard(10_000, 200_000)
    await s.all()
    await s.write([(60_000, 10_000), (150_000, 1)])
    await s.discard(s.subject.size - 100_000, 100_000)
    await s.all()
    await s.reopen()
    await s.all()


async def flushed(s: Session) -> None:
    """What was flushed, or written with FUA, is there when the disk is opened again."""
    await s.write([(5_000, 100_000)])
    await s.node.flush()
    await s.write([(300_000, 10_000)], FUA)
    await s.reopen()
    await s.all()
    await s.write([(6_000, 10)])
    await s.reopen()
    await s.all()


async def resized(s: Session) -> None:
    """Growing adds zeroes; what was cut off does not come back."""
    if not s.subject.resizes:
        return
    size = s.subject.size
    await s.write([(size - 5_000, 5_000)])
    await s.resize(size - 4_608)
    await s.resize(size + 200_192)
    await s.all()
    await s.write([(size + 100_000, 100_192)])
    await s.reopen()
    await s.all()


async def together(s: Session) -> None:
    """Requests in flight at once do not disturb each other."""
    ranges = [(i * 7_001, 6_000) for i in range(40)]
    await gather(s.driver, [s.write([r]) for r in ranges])
    await gather(
        s.driver,
        [s.read([r]) for r in ranges] + [s.write([(300_000 + i * 999, 500)]) for i in range(20)],
    )
    await s.node.flush()
    await s.all()


async def beyond(s: Session) -> None:
    """A protocol reads as zeroes beyond its end."""
    if not s.subject.leaf:
        return
    size = s.subject.size
    (data,) = await s.node.read([size - 10], [100])
    expect(len(data) == 100, "a full answer")
    if s.subject.stores:
        expect(bytes(data[10:]) == bytes(90), "zeroes beyond the end")


async def ended(s: Session) -> None:
    """A closed node takes no writes; closing twice is the same as once."""
    await s.write([(0, 10)])
    await s.close()
    try:
        await s.node.write([0], [b"x"])
    except (DiskError, OSError):
        pass
    else:
        raise Failure("a closed node took a write")
    await s.node.close()
    if s.subject.keeps:
        await s.open(fresh=False)
        await s.all()


async def at_random(s: Session) -> None:
    """A long random sequence against plain bytes."""
    rng = random.Random(7)
    for _ in range(100):
        await random_step(s, rng)
    await s.all()
    await s.reopen()
    await s.all()


async def random_step(s: Session, rng: random.Random) -> None:
    """One random request."""
    size = len(s.bytes)
    length = rng.choice([1, 511, 512, 4096, 9_999, 65536, 150_000])
    offset = rng.randrange(max(1, size - length))
    if rng.random() < 0.4:
        offset -= offset % rng.choice([512, 4096, 65536])
    kind = rng.random()
    if kind < 0.4:
        ranges = [(offset, length)]
        ranges += [(rng.randrange(size - 600), 600) for _ in range(rng.choice([0, 0, 1, 4]))]
        await s.write(ranges, rng.choice([0, 0, 0, FUA]))
    elif kind < 0.7:
        await s.read([(offset, length)], views=rng.random() < 0.5)
    elif kind < 0.8:
        await s.zero(offset, length, rng.choice([0, MAY_UNMAP]))
    elif kind < 0.9:
        await s.discard(offset, length)
    elif kind < 0.95:
        await s.node.flush()
    elif s.subject.resizes and kind < 0.97:
        await s.resize(max(400_384, size + 512 * rng.randrange(-300, 300)))


CHECKS: tuple[Check, ...] = (
    new_disk,
    unaligned,
    batches,
    zeroes,
    discards,
    flushed,
    resized,
    together,
    beyond,
    ended,
    at_random,
)


async def run_check(check: Check, driver: BaseDriver, subject: Subject, folder: Path) -> None:
    """One check on a new disk in ``folder`` (empty, and its own)."""
    session = Session(driver, subject, folder)
    await session.open()
    try:
        await check(session)
    finally:
        await session.close()
