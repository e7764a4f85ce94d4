"""References per host cluster, counted in bounded memory."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator

from ....errors import UnsupportedFeature

CHUNK_BITS = 16
CHUNK = 1 << CHUNK_BITS
MOST_CHUNKS = 1024
"""Chunks that a check keeps at once: 64 MiB of counts, 64 Mi host clusters."""

_MOST_PACKED = 64 << 20
"""Bytes of packed chunks, where all counts are kept."""

_USED = re.compile(rb"[^\0]+")
_SEVERAL = re.compile(rb"[^\0\1]")
_ADDED: dict[int, bytes] = {}

Chunk = bytearray | array  # type: ignore[type-arg]


class Counts:
    """Counts of host clusters in chunks that are made when first needed, so that a long sparse
    file costs no more than what its tables name.

    A chunk is bytes until one of its counts is 255, then it is an array of 64-bit integers.
    ``most``: how many bytes' worth of chunks are kept.  When there would be more, the highest are
    given up: the counts are then those of the clusters before ``limit`` alone, and whoever counts
    begins anew at ``first`` = ``limit``, as often as there is something left.  None: all are kept,
    as a repair needs them; those that were opened first are packed where there are many, and
    UnsupportedFeature is raised where even that takes too much.
    """

    def __init__(self, most: int | None = None, first: int = 0) -> None:
        self.chunks: dict[int, Chunk] = {}
        self.shared = False
        """Some cluster has more than one reference."""
        self.first = first
        """The first chunk that is counted."""
        self.limit: int | None = None
        """The first chunk that is left out; None while there is none."""
        self.most = most
        self._weight = 0
        self._packed: dict[int, bytes] = {}
        self._packed_bytes = 0

    @property
    def start(self) -> int:
        """The first cluster that is counted."""
        return self.first << CHUNK_BITS

    @property
    def stop(self) -> int | None:
        """The first cluster that is not counted any more; None: all are."""
        return None if self.limit is None else self.limit << CHUNK_BITS

    # -- counting
    def _chunk(self, number: int) -> Chunk | None:
        """The chunk, made if need be; None when it is outside what is counted."""
        if number < self.first or (self.limit is not None and number >= self.limit):
            return None
        chunk = self._known(number)
        if chunk is not None:
            return chunk
        if self.most is not None and self._weight >= self.most and number > max(self.chunks):
            self.limit = number
            return None
        self._room(1)
        chunk = self.chunks[number] = bytearray(CHUNK)
        return chunk

    def _known(self, number: int) -> Chunk | None:
        """The chunk if there is one, unpacked if need be."""
        chunk = self.chunks.get(number)
        if chunk is None and number in self._packed:
            chunk = self._unpacked(number)
            self._packed_bytes -= len(self._packed.pop(number))
            self._room(1 if type(chunk) is bytearray else 8)
            self.chunks[number] = chunk
        return chunk

    def _unpacked(self, number: int) -> Chunk:
        from zlib import decompress

        raw = bytearray(decompress(self._packed[number]))
        return raw if len(raw) == CHUNK else array("Q", raw)

    def _room(self, weight: int) -> None:
        """Give up, or pack, chunks until there is room for one of this weight."""
        self._weight += weight
        while self._weight > (self.most or MOST_CHUNKS) and len(self.chunks) > 1:
            if self.most is None:
                number = next(iter(self.chunks))
            else:
                number = self.limit = max(self.chunks)
            chunk = self.chunks.pop(number)
            self._weight -= 1 if type(chunk) is bytearray else 8
            if self.most is None:
                self._pack(number, chunk)

    def _pack(self, number: int, chunk: Chunk) -> None:
        from zlib import compress  # images that need it are rare, and starting costs

        packed = self._packed[number] = compress(chunk, 1)
        self._packed_bytes += len(packed)
        if self._packed_bytes > _MOST_PACKED:
            raise UnsupportedFeature(
                f"repair of an image with {len(self._packed) * CHUNK} clusters in use whose "
                "reference counts have no pattern"
            )

    def _widen(self, number: int) -> Chunk:
        chunk = array("Q", list(self.chunks.pop(number)))
        self.chunks[number] = chunk  # behind all others, so that it is not packed now
        self._room(7)
        return chunk

    def add(self, cluster: int, times: int = 1) -> None:
        """``times`` more references."""
        number, at = cluster >> CHUNK_BITS, cluster & CHUNK - 1
        chunk = self.chunks.get(number)
        if chunk is None:
            chunk = self._chunk(number)
            if chunk is None:
                return
        value = chunk[at] + times
        if value > 1:
            self.shared = True
            if value > 254 and type(chunk) is bytearray:
                chunk = self._widen(number)
        chunk[at] = value

    def add_run(self, first: int, stop: int, times: int = 1) -> None:
        """``times`` more references to each cluster of [first, stop)."""
        while first < stop:
            number = first >> CHUNK_BITS
            end = min(stop, (number + 1) << CHUNK_BITS)
            chunk = self.chunks.get(number)
            if chunk is None:
                chunk = self._chunk(number)
            if chunk is not None:
                self._add_part(chunk, number, first & CHUNK - 1, end - first, times)
            elif self.limit is not None and number >= self.limit:
                return
            first = end

    def _add_part(self, chunk: Chunk, number: int, at: int, count: int, times: int) -> None:
        if count > 1 and type(chunk) is bytearray and times < 255:
            part = chunk[at : at + count]
            if part.count(0) == count:
                self.shared |= times > 1
                chunk[at : at + count] = bytes((times,)) * count
                return
            self.shared = True
            part = part.translate(_added(times))
            if 255 not in part:
                chunk[at : at + count] = part
                return
        for cluster in range((number << CHUNK_BITS) + at, (number << CHUNK_BITS) + at + count):
            self.add(cluster, times)

    # -- counts
    def get(self, cluster: int) -> int:
        """The references of one cluster."""
        chunk = self.chunks.get(cluster >> CHUNK_BITS) or self._known(cluster >> CHUNK_BITS)
        return chunk[cluster & CHUNK - 1] if chunk is not None else 0

    def part(self, start: int, stop: int) -> bytes | None:
        """The counts of [start, stop), all in one chunk, a byte each; None where one is too large
        for that."""
        chunk = self._known(start >> CHUNK_BITS)
        if chunk is None:
            return bytes(stop - start)
        at = start & CHUNK - 1
        part = chunk[at : at + stop - start]
        if type(part) is bytearray:
            return bytes(part)
        try:
            return bytes(list(part))
        except ValueError:
            return None

    def used(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Runs (start, end) of clusters of [start, stop) with references, ascending."""
        while start < stop:
            number = start >> CHUNK_BITS
            end = min(stop, (number + 1) << CHUNK_BITS)
            chunk = self._known(number)
            if chunk is not None:
                base = number << CHUNK_BITS
                for found in _USED.finditer(_flat(chunk), start - base, end - base):
                    yield base + found.start(), base + found.end()
            start = end

    def several(self) -> Iterator[int]:
        """All clusters with more than one reference, ascending."""
        if self.shared:
            for number in self._numbers():
                for found in _SEVERAL.finditer(self._peek(number)):
                    yield (number << CHUNK_BITS) + found.start()

    def blocks(self, shift: int) -> set[int]:
        """The numbers of all blocks of 2**``shift`` clusters with references."""
        if shift >= CHUNK_BITS:
            return {number >> shift - CHUNK_BITS for number in self._numbers()}
        found = set()
        for number in self._numbers():
            flat = self._peek(number)
            base = number << CHUNK_BITS - shift
            for i in range(CHUNK >> shift):
                if flat.count(0, i << shift, (i + 1) << shift) < 1 << shift:
                    found.add(base + i)
        return found

    @property
    def highest(self) -> int:
        """The largest count."""
        whole = (self.chunks.get(number) or self._unpacked(number) for number in self._numbers())
        return max(map(max, whole), default=0)

    def _numbers(self) -> list[int]:
        """Of all chunks, ascending."""
        return sorted({*self.chunks, *self._packed})

    def _peek(self, number: int) -> bytearray:
        """The counts of a chunk; a packed one stays so."""
        chunk = self.chunks.get(number)
        return _flat(chunk if chunk is not None else self._unpacked(number))

    @property
    def end(self) -> int:
        """One more than the highest cluster with references."""
        for number in reversed(self._numbers()):
            used = len(self._peek(number).rstrip(b"\0"))
            if used:
                return (number << CHUNK_BITS) + used
        return 0


def _flat(chunk: Chunk) -> bytearray:
    """The counts as bytes; what is larger is 255."""
    if type(chunk) is bytearray:
        return chunk
    return bytearray([min(value, 255) for value in chunk])


def _added(times: int) -> bytes:
    """For every count what it is with ``times`` more; 255 for what is no byte any more."""
    table = _ADDED.get(times)
    if table is None:
        table = _ADDED[times] = bytes([min(value + times, 255) for value in range(256)])
    return table
