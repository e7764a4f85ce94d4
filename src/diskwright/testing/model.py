"""Which bytes may be seen at each place of a disk that several clients use at once.

The rules.  A request that succeeded replaces all that had *ended* before it *began*; of requests
that overlapped in time either may be on top.  One that failed or was cancelled may have applied, in
part or not at all, but never brings back bytes older than a success that followed it.  After a
crash everything that had ended when a later successful flush began is there, or something newer.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import pairwise

_RING_LENGTH = 1 << 16
_STRIDE = 4099


def _make_ring() -> bytes:
    # No zero and no poison in it: neither may pass for written data.
    rng = random.Random(0xD15C)
    values = [v for v in range(1, 256) if v != 0xDD]
    ring = bytes(rng.choices(values, k=_RING_LENGTH))
    return ring + ring


_RING = _make_ring()


class Mismatch(AssertionError):
    """Bytes that no admissible order of the requests can explain."""


def pattern(number: int, offset: int, length: int) -> bytes:
    """The bytes that request ``number`` writes at ``offset``: both can be told from any piece of
    some bytes, so misplaced data do not pass."""
    start = (offset + number * _STRIDE) % _RING_LENGTH
    if length <= _RING_LENGTH:
        return _RING[start : start + length]
    out = bytearray()
    while length:
        start = (offset + number * _STRIDE) % _RING_LENGTH
        part = min(length, _RING_LENGTH)
        out += _RING[start : start + part]
        offset += part
        length -= part
    return bytes(out)


class Request:
    """One write (``number`` > 0) or zeroing (0) of [start, end), in bytes; or (-1) what is
    ``given`` comes there."""

    __slots__ = ("begun", "durable", "end", "ended", "given", "number", "ok", "start")

    def __init__(self, begun: int, start: int, end: int, number: int, given: bytes = b"") -> None:
        self.begun, self.start, self.end, self.number = begun, start, end, number
        self.given = given
        self.ended: int | None = None
        self.ok = False
        self.durable = False

    def content(self, start: int, length: int) -> bytes:
        """What it puts at ``start``."""
        if self.number < 0:
            return self.given[start - self.start : start - self.start + length]
        return pattern(self.number, start, length) if self.number else bytes(length)

    def finish(self, moment: int, ok: bool, durable: bool = False) -> None:
        """It has ended; ``durable``: it was a success with FUA."""
        self.ended, self.ok, self.durable = moment, ok, durable


def _unexplained(part: bytes, start: int, choices: list[bytes]) -> Iterator[int]:
    """The bytes of ``part``, which lies at ``start``, that no choice has in their place."""
    at = 0
    while at < len(part):
        # What is torn is torn between sectors, mostly.
        end = min(len(part), at + 512 - (start + at) % 512)
        if not any(choice[at:end] == part[at:end] for choice in choices):
            for i in range(at, end):
                if not any(choice[i] == part[i] for choice in choices):
                    yield i
        at = end


class Model:
    """The history of one disk.  Moments come from one clock (``tick``)."""

    def __init__(self, base: bytes, tick: Callable[[], int]) -> None:
        self.base = base
        self.tick = tick
        self.requests: list[Request] = []
        self.flushes: list[tuple[int, int]] = []
        """(begun, ended) of each flush that succeeded."""
        self._last = 0

    def write(self, offset: int, length: int) -> tuple[Request, bytes]:
        """Begin a write: the record to finish, and the bytes to write."""
        self._last += 1
        request = Request(self.tick(), offset, offset + length, self._last)
        self.requests.append(request)
        return request, request.content(offset, length)

    def zero(self, offset: int, length: int) -> Request:
        """Begin a request that leaves zeroes."""
        request = Request(self.tick(), offset, offset + length, 0)
        self.requests.append(request)
        return request

    def put(self, content: bytes) -> Request:
        """Begin a request that makes the disk ``content``, from its first byte on."""
        request = Request(self.tick(), 0, len(content), -1, content)
        self.requests.append(request)
        return request

    def flushed(self, begun: int) -> None:
        """A flush that began at ``begun`` has succeeded."""
        self.flushes.append((begun, self.tick()))

    def since(self, moment: int) -> int:
        """When the last flush began that had ended at ``moment``; -1 without one."""
        return max((begun for begun, ended in self.flushes if ended <= moment), default=-1)

    def check(self, data: bytes, offset: int, begun: int, ended: int, what: str) -> None:
        """``data`` at ``offset`` was seen by a read from ``begun`` to ``ended``.

        Raises Mismatch with the first byte that cannot be.
        """
        self._check(data, offset, ended, lambda r: r.ended is not None and r.ended <= begun, what)

    def check_crash(self, data: bytes, moment: int, what: str) -> None:
        """``data`` is the whole disk after a loss of power at ``moment``."""
        since = self.since(moment)

        def counts(request: Request) -> bool:
            if request.ended is None:
                return False
            return request.ended <= since or (request.durable and request.ended <= moment)

        self._check(data, 0, moment, counts, what)

    def _check(
        self, data: bytes, offset: int, ended: int, counts: Callable[[Request], bool], what: str
    ) -> None:
        stop = offset + len(data)
        seen = [r for r in self.requests if r.begun <= ended and r.start < stop and r.end > offset]
        cuts = {offset, stop}
        for r in seen:
            cuts.update(x for x in (r.start, r.end) if offset < x < stop)
        ordered = sorted(cuts)
        covered: list[list[Request]] = [[] for _ in ordered]
        for r in seen:
            first = bisect_left(ordered, max(r.start, offset))
            for piece in covered[first : bisect_left(ordered, min(r.end, stop))]:
                piece.append(r)
        for (start, end), covering in zip(pairwise(ordered), covered, strict=False):
            # A success that surely counts hides everything that had ended before it began.
            surely = max((r.begun for r in covering if r.ok and counts(r)), default=-1)
            may = [r for r in covering if r.ended is None or r.ended >= surely]
            length = end - start
            part = data[start - offset : end - offset]
            # Mostly the newest one.
            if any(r.content(start, length) == part for r in reversed(may)):
                continue
            if surely < 0 and self.base[start:end] == part:
                continue
            choices = [r.content(start, length) for r in reversed(may)]
            if surely < 0:
                choices.append(self.base[start:end])
            self._compare(part, start, choices, [r.number for r in reversed(may)], what)

    def _compare(
        self, part: bytes, start: int, choices: list[bytes], numbers: list[int], what: str
    ) -> None:
        for i in _unexplained(part, start, choices):
            wanted = ", ".join(f"{choice[i]:#04x}" for choice in choices)
            raise Mismatch(
                f"{what}: byte {start + i:#x} is {part[i]:#04x}{self._guess(part, i, start)}; "
                f"admissible: {wanted} (requests {numbers}, 0 zeroes)"
            )

    def _guess(self, part: bytes, i: int, start: int) -> str:
        """Whose bytes these look like."""
        piece = part[i : i + 8]
        if len(piece) < 4:
            return ""
        if not any(piece):
            return " (zeroes)"
        if set(piece) == {0xDD}:
            return " (poison: given-back space)"
        for request in self.requests:
            if request.number and request.content(start + i, len(piece)) == piece:
                return f" (request {request.number}, [{request.start:#x}, {request.end:#x}))"
        for request in self.requests:
            at = request.content(request.start, request.end - request.start).find(piece)
            if request.number and at >= 0:
                return f" (foreign: request {request.number}'s bytes of {request.start + at:#x})"
        if piece == self.base[start + i : start + i + len(piece)]:
            return " (the disk as it was at first)"
        return ""
