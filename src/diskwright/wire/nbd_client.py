"""The NBD client's transmission phase as a machine without I/O: flights of requests out, their
answers in.

A :class:`Flight` is what was asked together, in columns; its cookies carry its number and the place
in the columns.  Bytes of reads are received where they belong: :meth:`NbdClient.space` gives the
caller's own buffer as soon as a reply is known to be for it.  Nothing that the server says makes
memory grow beyond :data:`STATUS_LIMIT`.  Source: NetworkBlockDevice/nbd, doc/proto.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..errors import PeerError
from ..records import NamedTuple
from . import nbd_const as c
from .nbd_flight import Coverage, Flight
from .nbd_negotiation import Agreement, readable

Buffer = bytes | bytearray | memoryview

BUFFER_SIZE = 64 << 10
"""Receive buffer in bytes; what does not fit is received in place."""
STATUS_LIMIT = 16 << 20
"""Longest answer to one question about block status, in bytes."""
ERROR_LIMIT = 6 + c.MAX_STRING + 8
CHUNKS_LIMIT = 64
"""Most chunks of one reply that bring nothing."""

_SHIFT = 16  # of the flight's number in a cookie
_PLACE = (1 << _SHIFT) - 1

_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_EXTENDED = struct.Struct(">IHHQQQ")
_ERROR = struct.Struct(">IH")
_HOLE = struct.Struct(">QI")
_U64 = struct.Struct(">Q")
_HEADS = {
    c.SIMPLE_REPLY_MAGIC: _SIMPLE,
    c.STRUCTURED_REPLY_MAGIC: _CHUNK,
    c.EXTENDED_REPLY_MAGIC: _EXTENDED,
}
_ZEROES = bytes(64 << 10)

_rows: dict[str, struct.Struct] = {}


def _columns(row: str, count: int) -> struct.Struct:
    """``count`` rows at once; few counts repeat, and the others do not fill the memory."""
    key = f">{row * count}"
    found = _rows.get(key)
    if found is None:
        if len(_rows) >= 64:
            _rows.clear()
        found = _rows[key] = struct.Struct(key)
    return found


class _Payload(NamedTuple):
    """What the bytes that come next are: of which request, in which kind of chunk."""

    flight: Flight
    place: int
    kind: int
    done: bool
    sink: bytearray | None
    """Where they are collected, unless they belong to a read."""


class NbdClient:
    """One connection in transmission.  ``flights`` are those that wait for answers."""

    def __init__(self, agreed: Agreement) -> None:
        self.agreed = agreed
        self.flights: dict[int, Flight] = {}
        self._number = 0
        self._data = memoryview(bytearray(BUFFER_SIZE))
        self._start = self._end = 0
        self._target: memoryview | None = None
        self._payload: _Payload | None = None
        self._finished: list[Flight] = []

    # -- requests
    def request(self, flight: Flight) -> list[Buffer]:
        """Take ``flight``, whose lengths keep to the agreement; what must be sent, in order."""
        self._number += 1
        number = flight.number = self._number
        self.flights[number] = flight
        count, command, flags = len(flight.offsets), flight.command, flight.flags
        row, magic = "QQQI", c.REQUEST_MAGIC
        if self.agreed.extended:
            row, magic = "QQQQ", c.EXTENDED_REQUEST_MAGIC
            if command == c.CMD_WRITE:
                flags |= c.CMD_FLAG_PAYLOAD_LEN
        head, first = magic << 32 | flags << 16 | command, number << _SHIFT
        flat = [head] * (4 * count)
        flat[1::4] = range(first, first + count)
        flat[2::4] = flight.offsets
        flat[3::4] = flight.lengths
        packed = _columns(row, count).pack(*flat)
        if command != c.CMD_WRITE:
            return [packed]
        buffers, size = flight.buffers or (), len(packed) // count
        view = memoryview(packed)
        out: list[Buffer] = [b""] * (2 * count)
        out[0::2] = [view[at : at + size] for at in range(0, len(packed), size)]
        out[1::2] = buffers
        return out

    def leaving(self) -> bytes:
        """The last request, which is not answered."""
        if self.agreed.extended:
            head = c.EXTENDED_REQUEST_MAGIC << 32 | c.CMD_DISC
            return _columns("QQQQ", 1).pack(head, 0, 0, 0)
        return _columns("QQQI", 1).pack(c.REQUEST_MAGIC << 32 | c.CMD_DISC, 0, 0, 0)

    def detach(self, flight: Flight) -> None:
        """Nobody waits for ``flight`` any more: its buffers are not touched again."""
        flight.buffers = None
        payload = self._payload
        if payload is not None and payload.flight is flight and payload.sink is None:
            assert self._target is not None
            self._target = memoryview(bytearray(len(self._target)))

    # -- replies
    def space(self) -> list[memoryview]:
        """Where to receive next: one or two views, filled one after the other."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == BUFFER_SIZE or self._start > BUFFER_SIZE // 2:
            left = self._end - self._start
            self._data[:left] = bytes(self._data[self._start : self._end])
            self._start, self._end = 0, left
        rest = self._data[self._end :]
        return [rest] if self._target is None else [self._target, rest]

    def received(self, count: int) -> Sequence[Flight]:
        """``count`` bytes were put into :meth:`space`.  Returns the flights that are answered now.
        Raises PeerError for what breaks the protocol; nothing can be understood behind it."""
        target = self._target
        if target is not None:
            taken = min(count, len(target))
            count -= taken
            if taken < len(target):
                self._target = target[taken:]
                return ()
            self._arrived()
        self._end += count
        while self._target is None and self._take():
            pass
        finished, self._finished = self._finished, []
        return finished

    def _take(self) -> bool:
        """Take one reply or chunk out of the buffer; False when its head is not whole."""
        at, left = self._start, self._end - self._start
        if left < 4:
            return False
        magic = int.from_bytes(self._data[at : at + 4], "big")
        head = _HEADS.get(magic)
        if head is None:
            raise _broken(f"a reply begins with {magic:#x}")
        if left < head.size:
            return False
        if head is _SIMPLE:
            _, number, cookie = _SIMPLE.unpack_from(self._data, at)
            self._start += _SIMPLE.size
            self._simple(number, cookie)
            return True
        if (head is _EXTENDED) != self.agreed.extended or not self.agreed.structured:
            raise _broken("a reply has a form that was not agreed on")
        offset = 0
        if head is _CHUNK:
            _, flags, kind, cookie, length = _CHUNK.unpack_from(self._data, at)
        else:
            _, flags, kind, cookie, offset, length = _EXTENDED.unpack_from(self._data, at)
        flight, place = self._find(cookie)
        if head is _EXTENDED and offset != flight.offsets[place]:
            raise _broken("a reply names another offset than its request")
        if kind == c.REPLY_OFFSET_DATA and length > 8 and left < head.size + 8:
            return False
        self._start += head.size
        self._chunk(flight, place, kind, bool(flags & c.REPLY_FLAG_DONE), length)
        return True

    def _find(self, cookie: int) -> tuple[Flight, int]:
        flight, place = self.flights.get(cookie >> _SHIFT), cookie & _PLACE
        if flight is None or place >= len(flight.offsets) or flight.ended[place]:
            raise _broken("it answers what was not asked, or was answered before")
        return flight, place

    def _simple(self, number: int, cookie: int) -> None:
        flight, place = self._find(cookie)
        if self.agreed.extended or (
            self.agreed.structured and not number and flight.command in _CHUNKED
        ):
            raise _broken("a reply has a form that was not agreed on")
        if number:
            flight.fail(number, "")
        elif flight.command == c.CMD_READ:
            self._bytes_of(flight, place, flight.offsets[place], flight.lengths[place], True)
            return
        self._done(flight, place)

    def _chunk(self, flight: Flight, place: int, kind: int, done: bool, length: int) -> None:
        if kind == c.REPLY_OFFSET_DATA:
            if flight.command != c.CMD_READ or length <= 8:
                raise _broken("it sends data that nobody asked for")
            (offset,) = _U64.unpack_from(self._data, self._start)
            self._start += 8
            self._bytes_of(flight, place, offset, length - 8, done)
            return
        limit = 0
        if kind == c.REPLY_OFFSET_HOLE:
            limit = _HOLE.size
        elif kind in (c.REPLY_BLOCK_STATUS, c.REPLY_BLOCK_STATUS_EXT):
            limit = STATUS_LIMIT
        elif kind >> 15:
            limit = ERROR_LIMIT
        elif kind != c.REPLY_NONE:
            raise _broken(f"a reply is of the unknown kind {kind}")
        if length > limit:
            raise _broken(f"a reply of kind {kind:#x} is {length} bytes long")
        if not length:
            self._meant(flight, place, kind, done, b"")
            return
        here = self._data[self._start : min(self._start + length, self._end)]
        self._start += len(here)
        if len(here) == length:
            self._meant(flight, place, kind, done, bytes(here))
            return
        sink = bytearray(length)
        sink[: len(here)] = here
        self._target = memoryview(sink)[len(here) :]
        self._payload = _Payload(flight, place, kind, done, sink)

    def _bytes_of(
        self, flight: Flight, place: int, offset: int, length: int, done: bool
    ) -> None:
        """Bytes of a read begin: into their buffer, from here or as they come."""
        at = self._covered(flight, place, offset, length)
        payload = _Payload(flight, place, c.REPLY_OFFSET_DATA, done, None)
        here = self._data[self._start : min(self._start + length, self._end)]
        self._start += len(here)
        if flight.buffers is None:
            target = memoryview(bytearray(length))
        else:
            target = flight.buffers[place][at : at + length]
        if here:
            target[: len(here)] = here
        self._payload = payload
        if len(here) < length:
            self._target = target[len(here) :]
        else:
            self._arrived()

    def _covered(self, flight: Flight, place: int, offset: int, length: int) -> int:
        """Note which bytes of a read have come, each once; where they are in its buffer."""
        at, whole = offset - flight.offsets[place], flight.lengths[place]
        if at < 0 or not length or at + length > whole:
            raise _broken(f"it answers a read with {length} bytes that are outside of it")
        coverage = flight.coverage.get(place)
        if coverage is None:
            coverage = flight.coverage[place] = Coverage()
        if not coverage.add(at, at + length):
            raise _broken("it answers a read with the same bytes twice, or in too many parts")
        return at

    def _arrived(self) -> None:
        """The payload that was waited for is whole."""
        payload, self._payload, self._target = self._payload, None, None
        assert payload is not None
        flight, place, kind, done, sink = payload
        if sink is not None:
            self._meant(flight, place, kind, done, bytes(sink))
        elif done:
            self._done(flight, place)

    def _meant(self, flight: Flight, place: int, kind: int, done: bool, body: bytes) -> None:
        """A chunk that is no data."""
        if kind >> 15:
            if len(body) < _ERROR.size:
                raise _broken("an error has no number")
            number, length = _ERROR.unpack_from(body)
            if length > len(body) - _ERROR.size or not number:
                raise _broken("an error contradicts itself")
            flight.fail(number, readable(body[_ERROR.size : _ERROR.size + length]))
        elif kind == c.REPLY_OFFSET_HOLE:
            if flight.command != c.CMD_READ or len(body) != _HOLE.size:
                raise _broken("it tells of a hole where nothing was read")
            offset, length = _HOLE.unpack(body)
            at = self._covered(flight, place, offset, length)
            if flight.buffers is not None:
                _clear(flight.buffers[place], at, at + length)
        elif kind != c.REPLY_NONE:
            self._status(flight, kind == c.REPLY_BLOCK_STATUS_EXT, body)
        elif body or not done:
            raise _broken("an empty reply is not the last one, or not empty")
        if done:
            self._done(flight, place)
            return
        chunks = flight.chunks[place] = flight.chunks.get(place, 0) + 1
        if kind != c.REPLY_OFFSET_HOLE and chunks > CHUNKS_LIMIT:
            raise _broken("it answers one request again and again")

    def _status(self, flight: Flight, wide: bool, body: bytes) -> None:
        if flight.command != c.CMD_BLOCK_STATUS or wide != self.agreed.extended:
            raise _broken("it tells a block status that nobody asked for")
        start, size, letter = (8, 16, "Q") if wide else (4, 8, "I")
        rows, rest = divmod(len(body) - start, size)
        if rows < 1 or rest:
            raise _broken("a block status has no whole extents")
        context = int.from_bytes(body[:4], "big")
        if context not in self.agreed.contexts or context in flight.status:
            raise _broken("it tells a block status of a context that was not selected")
        if wide and int.from_bytes(body[4:8], "big") != rows:
            raise _broken("a block status miscounts its extents")
        values = struct.unpack_from(f">{2 * rows}{letter}", body, start)
        found: list[tuple[int, int]] = []
        for length, flags in zip(values[0::2], values[1::2], strict=True):
            if not length:
                raise _broken("a block status has an empty extent")
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + length, flags)
            else:
                found.append((length, flags))
        flight.status[context] = found

    def _done(self, flight: Flight, place: int) -> None:
        """The last of one request's reply."""
        if flight.failure is None:
            if flight.command == c.CMD_READ:
                coverage = flight.coverage.get(place)
                if coverage is None or not coverage.covers(flight.lengths[place]):
                    raise _broken("it ends the reply to a read before all bytes were sent")
            elif flight.command == c.CMD_BLOCK_STATUS and not flight.status:
                raise _broken("it answers a question about block status with nothing")
        flight.coverage.pop(place, None)
        flight.ended[place] = 1
        flight.left -= 1
        if not flight.left:
            del self.flights[flight.number]
            self._finished.append(flight)


_CHUNKED = frozenset((c.CMD_READ, c.CMD_BLOCK_STATUS))
"""Commands whose success is told by structured replies only, where these were agreed on."""


def _clear(view: memoryview, start: int, end: int) -> None:
    while start < end:
        step = min(end - start, len(_ZEROES))
        view[start : start + step] = _ZEROES[:step]
        start += step


def _broken(what: str) -> PeerError:
    return PeerError(f"the server breaks the protocol: {what}")
