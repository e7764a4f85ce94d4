"""An export of an NBD server as a leaf of the graph."""

from __future__ import annotations

import errno
import os
import sys
from _weakrefset import WeakSet
from collections.abc import Iterator, Sequence

from ..contract import FUA, MAY_UNMAP, NO_FALLBACK, Limits
from ..engine.kernel import BaseDriver
from ..errors import FlushFailed, NotSupported, PeerError
from ..extents import Data, Extent, Zero, merge
from ..units import SECTOR
from ..wire import nbd_const as c
from ..wire.nbd_flight import MOST
from .base import Buffer, Leaf, clear
from .bounce import Bounce
from .nbd_link import Trip
from .nbd_links import Links, Settings
from .nbd_status import MOST_BYTES, claim_of, extent_of, rows
from .nbd_unflushed import LIMIT

_ZEROES = bytes(1 << 20)


class NbdNode(Leaf):
    """Made by :meth:`open`.  ``size`` is the export's and cannot change.

    ``context``: the metadata context that is asked for: ``base:allocation``, which tells what is
    where, unless the caller chose another one (``x-dirty-bitmap``), see :meth:`claims`.
    """

    def __init__(self, driver: BaseDriver, settings: Settings, context: str) -> None:
        super().__init__(driver, "nbd")
        self.context = context
        self.links = Links(driver, settings, lambda: self._written != self._flushed)
        self.fixed_end = False
        """An image is made in it: what would shorten it leaves it as it is."""
        self._bounce: Bounce | None = None
        self._written = self._flushed = 0
        """Changes that were answered, and of these what a flush has covered."""
        self._flush_error: OSError | None = None

    async def open(self, writable: bool, auto_read_only: bool = False) -> None:
        """Connect.  Raises PeerError; with ``auto_read_only`` not for an export that can only be
        read."""
        links = self.links
        await links.open()
        try:
            agreed = self.agreed = links.agreed
            if writable and agreed.flags & c.READ_ONLY:
                writable = False
                if not auto_read_only:
                    raise PeerError("the server offers this export for reading only", errno.EACCES)
            own = self.context.encode() if self.context != _ALLOCATION else b""
            if own and own not in agreed.contexts.values():
                raise PeerError(f"the server does not offer '{self.context}'", errno.EINVAL)
        except BaseException:
            await links.close()
            raise
        self.size, self.read_only = agreed.size, not writable
        self.limits = Limits(
            alignment=agreed.min_block,
            max_transfer=agreed.max_payload,
            zero_alignment=agreed.min_block,
            discard_alignment=agreed.min_block,
        )
        if agreed.min_block > 1:
            self._bounce = Bounce(agreed.min_block, self._read, self._write)
        _live.add(self)

    def _can(self, flag: int) -> bool:
        return bool(self.agreed.flags & flag)

    # -- moving requests
    async def _carry(self, trip: Trip) -> None:
        """Have ``trip`` answered.  Raises OSError."""
        await self.links.carry(trip)
        if trip.failure is not None:
            number = c.host_errno(trip.failure.number)
            text = os.strerror(number)
            if trip.failure.text and trip.failure.text != text:
                text += f" (the server says: {trip.failure.text})"
            raise OSError(number, text)
        unflushed = self.links.unflushed
        if unflushed is not None and trip.command in _CHANGES:
            unflushed.add(trip)

    async def _send(self, command: int, rows: Iterator[tuple[int, int, Buffer | None]],
                    flags: int = 0) -> None:  # fmt: skip
        """Requests of ``rows`` (offset, length, buffer), in flights that are all on their way."""
        trips: list[Trip] = []
        offsets: list[int] = []
        lengths: list[int] = []
        buffers: list[Buffer | None] = []
        for offset, length, buffer in rows:
            if len(offsets) == MOST:
                trips.append(Trip(command, offsets, lengths, buffers, flags))
                offsets, lengths, buffers = [], [], []
            offsets.append(offset)
            lengths.append(length)
            buffers.append(buffer)
        if offsets:
            trips.append(Trip(command, offsets, lengths, buffers, flags))
        if len(trips) == 1:
            await self._carry(trips[0])
        elif trips:
            from ..engine.kernel import gather

            await gather(self.driver, [self._carry(trip) for trip in trips])

    def _pieces(
        self, offsets: Sequence[int], buffers: Sequence[Buffer]
    ) -> Iterator[tuple[int, int, Buffer]]:
        """Requests that the server takes, of ranges that may be longer."""
        most = self.agreed.max_payload
        for offset, buffer in zip(offsets, buffers, strict=True):
            length = len(buffer)
            if 0 < length <= most:
                yield offset, length, buffer
                continue
            view = memoryview(buffer)
            for at in range(0, length, most):
                yield offset + at, min(most, length - at), view[at : at + most]

    def _spans(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, Buffer | None]]:
        """The same for requests without data."""
        for start, end in spans:
            most = end - start if self.agreed.extended else MOST_BYTES
            for at in range(start, end, most or 1):
                yield at, min(most, end - at), None

    # -- reading
    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
        tag: str = "read_aio",
    ) -> Sequence[Buffer]:
        self.check_open()
        views = [memoryview(bytearray(n)) for n in lengths] if into is None else into
        size, inside = self.size, views
        if any(o + n > size for o, n in zip(offsets, lengths, strict=True)):
            inside = []
            for offset, view in zip(offsets, views, strict=True):
                end = max(0, min(len(view), size - offset))
                clear(view, end, len(view))
                inside.append(view[:end])
        if self._bounce is None or self._bounce.aligned(offsets, list(map(len, inside))):
            await self._send(c.CMD_READ, self._pieces(offsets, inside))
        else:
            kept = [(o, v) for o, v in zip(offsets, inside, strict=True) if len(v)]
            places, parts = [o for o, _ in kept], [v for _, v in kept]
            await self._bounce.read(places, list(map(len, parts)), parts)
        return views

    async def _read(self, offsets: Sequence[int], lengths: Sequence[int]) -> Sequence[Buffer]:
        views = [memoryview(bytearray(n)) for n in lengths]
        await self._send(c.CMD_READ, self._pieces(offsets, views))
        return views

    # -- writing
    async def write(
        self,
        offsets: Sequence[int],
        buffers: Sequence[Buffer],
        flags: int = 0,
        tag: str = "write_aio",
    ) -> None:
        self.check_writable()
        size = self.size
        if any(o + len(b) > size for o, b in zip(offsets, buffers, strict=True)):
            buffers = [self._within(o, b) for o, b in zip(offsets, buffers, strict=True)]
        durable = bool(flags & FUA)
        if self._bounce is None:
            await self._write(offsets, buffers, durable)
        else:
            await self._bounce.write(offsets, buffers)
            durable = False
        if flags & FUA and not (durable and self._can(c.SEND_FUA)):
            await self.flush()

    def _within(self, offset: int, buffer: Buffer) -> Buffer:
        """``buffer`` up to the end of the export.  Behind it there may be zeroes, in the sector
        with which a disk of whole sectors ends."""
        rest = max(0, self.size - offset)
        over = memoryview(buffer)[rest:]
        if len(over) >= SECTOR or any(over):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return memoryview(buffer)[:rest]

    async def _write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], durable: bool = False
    ) -> None:
        durable = durable and self._can(c.SEND_FUA)
        flags = c.CMD_FLAG_FUA if durable else 0
        if len(offsets) > 1 and _overlapping(offsets, buffers):
            for offset, buffer in zip(offsets, buffers, strict=True):  # the later one wins
                await self._change(c.CMD_WRITE, self._pieces([offset], [buffer]), flags)
        else:
            await self._change(c.CMD_WRITE, self._pieces(offsets, buffers), flags)

    async def _change(self, command: int, rows: Iterator[tuple[int, int, Buffer | None]],
                      flags: int = 0) -> None:  # fmt: skip
        try:
            await self._send(command, rows, flags)
        finally:  # one of them may have happened
            if not flags & c.CMD_FLAG_FUA:
                self._written += 1
        unflushed = self.links.unflushed
        if unflushed is not None and unflushed.size > LIMIT:
            await self.flush()

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        self.check_writable()
        spans, edges = self._aligned(offsets, lengths)
        fast = bool(flags & NO_FALLBACK)
        able = self._can(c.SEND_WRITE_ZEROES)
        if fast and not (able and self._can(c.SEND_FAST_ZERO)):
            raise OSError(errno.ENOTSUP, "the server cannot tell whether zeroes are fast")
        durable = bool(flags & FUA)
        if able:
            how = 0 if flags & MAY_UNMAP else c.CMD_FLAG_NO_HOLE
            how |= c.CMD_FLAG_FAST_ZERO if fast else 0
            if durable and self._can(c.SEND_FUA):
                how |= c.CMD_FLAG_FUA
            await self._locked(c.CMD_WRITE_ZEROES, spans, how)
        else:
            durable = True
            edges = [*spans, *edges]
        for start, end in edges:
            for at in range(start, end, len(_ZEROES)):
                await NbdNode.write(self, [at], [_ZEROES[: end - at]])
        if flags & FUA and (edges or not self._can(c.SEND_FUA)):
            await self.flush()

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self.check_writable()
        if self._can(c.SEND_TRIM):
            await self._locked(c.CMD_TRIM, self._aligned(offsets, lengths)[0], 0)

    async def _locked(self, command: int, spans: list[tuple[int, int]], flags: int) -> None:
        """A change without data, so that it does not meet a write that reads first."""
        bounce = self._bounce
        if bounce is None:
            await self._change(command, self._spans(spans), flags)
            return
        lease = await bounce.lock([a for a, _ in spans], [b - a for a, b in spans])
        try:
            await self._change(command, self._spans(spans), flags)
        finally:
            bounce.leases.drop(lease)

    def _aligned(
        self, offsets: Sequence[int], lengths: Sequence[int]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The whole blocks of some ranges, and what is beside these."""
        mask = self.agreed.min_block - 1
        spans: list[tuple[int, int]] = []
        edges: list[tuple[int, int]] = []
        for offset, length in zip(offsets, lengths, strict=True):
            end = min(offset + length, self.size)
            if offset + length - self.size >= SECTOR:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            start, stop = (offset + mask) & ~mask, end & ~mask
            if start >= stop:
                edges.append((offset, end))
                continue
            spans.append((start, stop))
            edges += [(offset, start), (stop, end)]
        return spans, [edge for edge in edges if edge[0] < edge[1]]

    async def flush(self) -> None:
        """Also fails when all connections were lost since the last one, and writes with them that
        the server had answered and that were not sent again: a server that was started anew may
        not have them."""
        self.check_open()
        if self._flush_error is not None:
            raise FlushFailed(self._flush_error)
        written, unflushed = self._written, self.links.unflushed
        if written == self._flushed:
            return
        mark = 0 if unflushed is None else unflushed.mark()
        try:
            if self._can(c.SEND_FLUSH) and self.links.broken is None:
                await self._carry(Trip(c.CMD_FLUSH, [0], [0]))
            if self.links.broken is not None:
                raise self._lost_writes()
        except OSError as error:
            self._flush_error = error
            raise
        self._flushed = max(self._flushed, written)
        if unflushed is not None:
            unflushed.covered(mark)

    def _lost_writes(self) -> PeerError:
        return PeerError(
            "the connection was lost with writes that were not flushed, which the server may have "
            "lost",
            errno.EIO,
            peer=str(self.links.settings.address),
            export=self.agreed.name.decode("utf-8", "replace"),
        )

    # -- what is where
    async def extents(self, offset: int, length: int) -> list[Extent]:
        self.check_open()
        if not self.agreed.contexts or self.context != _ALLOCATION:
            return self.all_data(offset, length)
        found: list[Extent] = []
        at, end = offset, min(offset + length, self.size)
        for count, flags in await rows(self._carry, self.agreed, at, end):
            found.append(extent_of(at, count, flags, not self.read_only))
            at += count
        if at < end:
            found.append(Data("", at, end - at, not self.read_only))
        if max(at, end) < offset + length:
            start = max(offset, self.size)
            found.append(Zero(offset + length - start, explicit=False))
        return merge(found)

    async def claims(self, offset: int, length: int) -> list[tuple[int, bool, bool]] | None:
        """(length, data, zero) of the beginning of a range, as the context says that the caller
        chose; None without one.  To be shown: nothing that is read or copied relies on it."""
        self.check_open()
        if self.context == _ALLOCATION:
            return None
        told = await rows(self._carry, self.agreed, offset, min(offset + length, self.size))
        return [(count, *claim_of(self.context, value)) for count, value in told]

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        self.check_writable()
        if size == self.size or (self.fixed_end and size < self.size):
            return
        raise NotSupported(f"Cannot {'grow' if self.fixed_end else 'resize'} NBD nodes")

    async def reopen(
        self, *, writable: bool | None = None, auto_read_only: bool = False, **unused: object
    ) -> None:
        """Flush, and go on for reading or for writing; see :meth:`open`.  Raises OSError."""
        self.check_open()
        if writable and self._can(c.READ_ONLY):
            writable = False
            if not auto_read_only:
                raise OSError(errno.EACCES, "the server offers this export for reading only")
        if not self.read_only:
            await self.flush()
        if writable is not None:
            self.read_only = not writable

    async def close(self) -> None:
        if self.closed:
            return
        try:
            if not self.read_only:
                await self.flush()
        finally:
            self.closed = True
            _live.discard(self)
            await self.links.close()


_ALLOCATION = c.BASE_ALLOCATION.decode()
_CHANGES = frozenset((c.CMD_WRITE, c.CMD_WRITE_ZEROES, c.CMD_TRIM))


def _overlapping(offsets: Sequence[int], buffers: Sequence[Buffer]) -> bool:
    """Whether two of these ranges meet: a server may carry them out in any order."""
    end = -1
    for offset, length in sorted(zip(offsets, map(len, buffers), strict=True)):
        if offset < end:
            return True
        end = max(end, offset + length)
    return False


_live: WeakSet[NbdNode] = WeakSet()


def _forked() -> None:
    """In a forked child: its copies of the sockets would be heard twice."""
    for node in list(_live):
        node.closed = True
        node.links.drop()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forked)
