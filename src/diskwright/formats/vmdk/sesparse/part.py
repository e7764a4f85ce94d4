"""seSparse extents: the way to the disk, and opening.

The order in which a change becomes durable: data, free bitmap, reverse map and new tables; then
the entries of existing tables and of the directory; and of what was freed the bits are cleared
once those are on disk.  At every moment the bitmap has at least the grains that tables refer to.
The journal that ESXi keeps for the same purpose is left empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ....contract import HostRange, Length, MetaWrite, Procedure, Read
from ....errors import CorruptImage, MalformedImage
from ....findings import CheckResult
from ....hints import Any
from ....ondisk import little_endian_array, little_endian_bytes
from ....units import SECTOR
from .header import (
    ENTRIES,
    FREE_TABLE_AT,
    GRAIN,
    TABLE_BYTES,
    new_sesparse,
    read_headers,
    why_not_written,
)
from .map import ALLOCATED, TABLE_LOAD, grain_of
from .plan import PART_BITS, SesparsePlan
from .space import agreement

TABLE_UPDATE, LINK_UPDATE, HEADER_UPDATE = "l2_update", "l1_update", "header_update"
_PART = 1 << PART_BITS
_SAMPLES = 64
_MOST_TABLES = 16
_PIECE = 1 << 20


class SesparsePart(SesparsePlan):
    """One seSparse extent (`Part`)."""

    # -- what precedes a write
    def before(self) -> list[MetaWrite]:
        """Nothing: an extent that is in use is not marked."""
        return []

    def announced(self) -> None:
        """Nothing was."""

    def closing(self) -> list[MetaWrite]:
        """Nothing says that an extent was closed."""
        return []

    # -- the way to the disk
    def freeze(self, tables: list[MetaWrite], links: list[MetaWrite]) -> Any:
        """See `Part.freeze`."""
        for table in self.image.tables.dirty():
            if table.slot != self.slot:
                continue
            if self.space.owns(table.offset):
                tables.append(self.space.encode(table))
            elif table.offset in self._new_tables:
                tables.append(self._write(table.offset, table.data, 0, ENTRIES, TABLE_UPDATE))
            else:
                for first, last in _spans(self._parts[table.offset]):
                    links.append(self._write(table.offset, table.data, first, last, TABLE_UPDATE))
            table.dirty = False
        if self._free_table_dirty:
            raw = self.free_table.to_bytes(8, "little")
            at = self.header.volatile.start + FREE_TABLE_AT
            tables.append(MetaWrite(self.slot, at, raw, HEADER_UPDATE))
        for first, last in _spans(self._directory_parts):
            start = self.header.directory.start
            links.append(self._write(start, self.directory, first, last, LINK_UPDATE))
        self._parts.clear()
        self._new_tables.clear()
        self._directory_parts.clear()
        self._free_table_dirty = False
        lost, self.space.lost = self.space.lost, []
        return lost or None

    def _write(self, at: int, data: Any, first: int, last: int, tag: str) -> MetaWrite:
        last = min(last, len(data))
        return MetaWrite(self.slot, at + 8 * first, little_endian_bytes(data, first, last), tag)

    def settle(self, token: Any) -> list[HostRange]:
        """See `Part.settle`."""
        return self.space.settle(token)

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None:
        """See `Part.release`."""
        self.space.release(ranges)

    # -- whole-image procedures
    def check_resize(self, sectors: int) -> None:
        """Raise NotSupported where the extent cannot become one of ``sectors``."""
        from .resize import check_resize

        check_resize(self, sectors)

    def resize(self, sectors: int) -> Procedure:
        """Change the size of the extent; see :mod:`.resize`."""
        from .resize import resize_sesparse

        return resize_sesparse(self, sectors)

    def empty(self) -> Procedure:
        """Drop all data; see :mod:`.resize`."""
        from .resize import empty_sesparse

        return empty_sesparse(self)

    # -- what is told of it
    def check(self, result: CheckResult, fix: str) -> Procedure:
        """See :mod:`.check`."""
        from .check import check_sesparse

        yield from check_sesparse(self, result, fix)

    def info(self) -> dict[str, Any]:
        """See `Part.info`."""
        return {"virtual-size": self.length, "cluster-size": GRAIN, "format": "SESPARSE"}

    # -- opening
    def read_directory(self) -> Procedure:
        """Read the grain directory."""
        header = self.header
        raw = bytearray()
        length = 8 * header.table_count
        if header.directory.start + length > self.file_end:
            raise MalformedImage(
                "the grain directory is behind the end of the file, which was cut off",
                field="directory extent",
                offset=120,
            )
        while len(raw) < length:
            at = header.directory.start + len(raw)
            (piece,) = yield Read(self.slot, [(at, min(_PIECE, length - len(raw)))], "l1_load")
            raw += piece
        self.directory = little_endian_array(64, raw)
        self.refuse_write = why_not_written(header)
        if self.image.writable and self.refuse_write is None:
            yield from self.compare()

    def compare(self) -> Procedure:
        """Refuse writing where the free maps do not say what the tables say, by a sample."""
        self.refuse_write = None
        samples: list[tuple[int, int]] = []
        looked = 0
        for number in range(len(self.directory)):
            if looked == _MOST_TABLES or len(samples) >= _SAMPLES:
                break
            try:
                place = self.table_at(number)
            except CorruptImage:
                continue
            if not place:
                continue
            looked += 1
            (raw,) = yield Read(self.slot, [(place, TABLE_BYTES)], TABLE_LOAD)
            samples += self._samples(number, little_endian_array(64, raw))
        samples = samples[:_SAMPLES]
        if samples and not (yield from agreement(self.slot, self.header, samples)):
            self.refuse_write = (
                "its free bitmap or reverse map does not say what its grain tables say "
                "(a check with repair makes them anew)"
            )
        if any(entry & 0xFFFFFFFF >= self.free_table for entry in self.directory if entry):
            self.refuse_write = "grain tables are in use that the header calls free"

    def _samples(self, number: int, entries: Iterable[int]) -> list[tuple[int, int]]:
        return [
            (number * ENTRIES + index, grain_of(entry))
            for index, entry in enumerate(entries)
            if entry >> 60 == ALLOCATED and grain_of(entry) < self.header.grain_count
        ]


def _spans(parts: set[int]) -> list[tuple[int, int]]:
    """Entries [first, last) of numbered parts, neighbours joined."""
    out: list[tuple[int, int]] = []
    for part in sorted(parts):
        if out and out[-1][1] == part * _PART:
            out[-1] = (out[-1][0], (part + 1) * _PART)
        else:
            out.append((part * _PART, (part + 1) * _PART))
    return out


def open_sesparse(image: Any, slot: str, start: int, length: int | None) -> Procedure:
    """Open the seSparse extent in ``slot``; returns the part, of ``length`` bytes (None: as long as
    its header says).

    Raises MalformedImage with the field, UnsupportedFeature for what is not known and for an
    extent whose journal must be replayed.
    """
    header = yield from read_headers(slot)
    capacity = header.capacity * SECTOR
    if length is not None and length > capacity:
        raise MalformedImage(
            f"the extent has {header.capacity} sectors, the descriptor says {length // SECTOR}",
            field="capacity",
            offset=16,
        )
    there = yield Length(slot)
    part = SesparsePart(image, slot, start, header, there)
    part.length = capacity if length is None else length
    yield from part.read_directory()
    return part


__all__ = ["SesparsePart", "new_sesparse", "open_sesparse"]
