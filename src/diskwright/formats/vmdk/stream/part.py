"""Extents with compressed grains (streamOptimized), which are read and never changed.

Source: VMware's technical note "Virtual Disk Format" 5.0, chapter "Stream-Optimized Compressed".
A grain is stored as {u64 sector of the disk, u32 length, zlib data} and fills up its last sector;
grain directory and tables are those of other sparse extents, mostly at the end of the file.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

from ....abilities import Buffer
from ....contract import DISCARD, Length, NeedMeta, Plan, Procedure, Range, Read, Table
from ....errors import CorruptImage, MalformedImage, UnsupportedFeature
from ....extents import Extent, Hole, Packed, Zero
from ....findings import CheckResult
from ....hints import TYPE_CHECKING, Any
from ....ondisk import Fields, little_endian_array, zeros
from ....records import NamedTuple
from ....units import MIB, SECTOR
from ..parts import Plain
from ..sparse.header import DEFLATE, MARKERS, ZEROED_GRAIN, Hosted, read_header

if TYPE_CHECKING:
    from ..parts import Image

GRAIN_HEADER = Fields("<", "lba:Q size:I")
MAX_GRAIN = 16 * MIB
"""Of a compressed grain (bytes): it is unpacked in one piece."""
_PIECE = 1 << 20
_MOST_TABLES = 64  # asked for at once
ZERO_ENTRY = 1
REFUSED = (
    "writing to a VMDK extent with compressed grains, which has no order in which it could be "
    "rewritten (convert the image to another subformat)"
)


class GrainCodec(NamedTuple):
    """How one grain is stored.  ``sector`` of the disk is where it belongs, ``length`` the bytes of
    it that lie on the disk; ``marked``: a header of 12 bytes says both."""

    sector: int
    length: int
    marked: bool

    def pack(self, data: Buffer) -> bytes:
        """The grain as it is stored, without padding."""
        packed = zlib.compress(data)
        return GRAIN_HEADER.pack(self.sector, len(packed)) + packed if self.marked else packed

    def unpack(self, data: Buffer, unit: int) -> bytes:
        """The grain of ``unit`` bytes; what it lacks behind the end of the disk is zero.

        Raises ValueError with what is wrong: another grain's header, a length beyond ``data``,
        damaged or cut off data, too many or too few bytes.
        """
        packed = memoryview(data)
        if self.marked:
            if len(packed) < GRAIN_HEADER.size:
                raise ValueError("the file ends inside a grain's header")
            sector, size = GRAIN_HEADER.unpack_from(packed)
            check_grain_header(self.sector, sector, size)
            if size > len(packed) - GRAIN_HEADER.size:
                raise ValueError(
                    f"the grain's {size} bytes end behind the next grain, the file, or what a "
                    f"grain of {unit} bytes can take"
                )
            packed = packed[GRAIN_HEADER.size : GRAIN_HEADER.size + size]
        machine = zlib.decompressobj()
        try:
            # One byte more than there should be: so the end of the stream, and with it the
            # checksum, is reached, and a grain that is too long is noticed.
            out = machine.decompress(packed, unit + 1)
        except zlib.error as error:
            raise ValueError(f"the grain is damaged: {error}") from error
        if len(out) > unit:
            raise ValueError(f"the grain holds more than {unit} bytes")
        if not machine.eof:
            raise ValueError("the grain's compressed data are cut off")
        if len(out) < self.length:
            raise ValueError(f"the grain holds {len(out)} bytes instead of {self.length}")
        return out.ljust(unit, b"\0")


def check_grain_header(wanted: int, sector: int, size: int) -> None:
    """Raise ValueError unless the header is that of the grain at sector ``wanted``."""
    if not size:
        raise ValueError("there is a marker, or nothing, where a grain should be")
    if sector != wanted:
        raise ValueError(f"the grain says that it belongs to sector {sector}, not {wanted}")


def longest(unit: int) -> int:
    """Bytes that a stored grain of ``unit`` bytes can take, whatever wrote it: DEFLATE may store
    without compressing, in blocks as small as its writer likes, say 512 bytes."""
    return GRAIN_HEADER.size + unit + (unit >> 6) + 256


class StreamPart(Plain):
    """One compressed extent.  The grain directory stays in memory, grain tables are tables of the
    engine (``array('I')``)."""

    def __init__(
        self, image: Image, slot: str, start: int, length: int, header: Hosted, file_length: int
    ) -> None:
        self.image = image
        self.slot = slot
        self.start = start
        self.length = length
        self.header = header
        self.file_length = file_length
        self.unit = header.grain * SECTOR
        self.table_size = header.entries * 4
        self.marked = bool(header.flags & MARKERS)
        self.zeroed = bool(header.flags & ZEROED_GRAIN)
        self.directory: array[int] = zeros(32, 0)
        self.weight = 0

    def opening(self) -> Procedure:
        """Read the grain directory."""
        header = self.header
        count = -(-header.capacity // (header.grain * header.entries))
        at = header.directory * SECTOR
        if count and (not at or at + count * 4 > self.file_length):
            raise MalformedImage(
                f"the grain directory ({count} entries) is missing: the file has "
                f"{self.file_length} bytes, it was cut off or not completely copied",
                field="gdOffset",
                offset=at,
            )
        raw = bytearray()
        while len(raw) < count * 4:
            (piece,) = yield Read(
                self.slot, [(at + len(raw), min(_PIECE, count * 4 - len(raw)))], "l1_load"
            )
            raw += piece
        self.directory = little_endian_array(32, raw)
        self.weight = len(raw)
        return self

    # -- the map
    def map(self, offset: int, length: int, out: list[Extent]) -> NeedMeta | None:
        """Packed grains; see `Part.map`."""
        unit, entries = self.unit, self.header.entries
        span = unit * entries
        end = offset + length
        while offset < end:
            number = offset // span
            stop = min(end, (number + 1) * span)
            place = self.table_place(number)
            if not place:
                out.append(Hole(stop - offset))
            elif place == ZERO_ENTRY:
                out.append(Zero(stop - offset))
            else:
                table = self.image.tables.get(self.slot, place)
                if table is None:
                    return self._missing(number, end)
                self._map_table(table, number * entries, offset, stop, out)
            offset = stop
        return None

    def table_place(self, number: int) -> int:
        """Where grain table ``number`` is (bytes); 0 without one, 1 for a table of zeroes.  Raises
        CorruptImage when it is not in the file."""
        sector = self.directory[number]
        if sector <= self.zeroed:
            return sector
        if sector * SECTOR + self.table_size > self.file_length:
            raise CorruptImage(
                f"grain table {number} is at sector {sector}, behind the end of the file: it was "
                "cut off or not completely copied",
                field="grain directory entry",
                offset=self.header.directory * SECTOR + number * 4,
            )
        return sector * SECTOR

    def _missing(self, number: int, end: int) -> NeedMeta:
        """The tables that are not in memory, from ``number`` on."""
        last = min(-(-end // (self.unit * self.header.entries)), number + _MOST_TABLES)
        places = [self.table_place(number)]
        for other in range(number + 1, last):
            sector = self.directory[other]
            place = sector * SECTOR
            # One that is broken is told of when the map gets there.
            if (
                sector > self.zeroed
                and place + self.table_size <= self.file_length
                and self.image.tables.get(self.slot, place) is None
            ):
                places.append(place)
        return NeedMeta(self.slot, [(place, self.table_size) for place in places], "l2_load")

    def _map_table(
        self, table: Table, first: int, offset: int, stop: int, out: list[Extent]
    ) -> None:
        unit = self.unit
        while offset < stop:
            index = offset // unit
            length = min(stop, (index + 1) * unit) - offset
            entry = table.data[index - first]
            if not entry:
                extent: Extent = Hole(length)
            elif entry == ZERO_ENTRY and self.zeroed:
                extent = Zero(length)
            else:
                extent = self._packed(table, index, first, offset - index * unit, length)
            last = out[-1] if out else None
            if isinstance(extent, Hole) and isinstance(last, Hole):
                out[-1] = Hole(last.length + length)
            elif isinstance(extent, Zero) and isinstance(last, Zero):
                out[-1] = Zero(last.length + length)
            else:
                out.append(extent)
            offset += length

    def _packed(self, table: Table, index: int, first: int, skip: int, length: int) -> Extent:
        entries, slot = table.data, self.slot
        sector = entries[index - first]
        host = sector * SECTOR
        if host + GRAIN_HEADER.size > self.file_length:
            raise CorruptImage(
                f"grain {index} is at sector {sector}, behind the end of the file: it was cut off "
                "or not completely copied",
                field="grain table entry",
                offset=table.offset + (index - first) * 4,
            )
        most = min(longest(self.unit), self.file_length - host)
        for following in range(index - first + 1, len(entries)):
            after = entries[following]
            if after > self.zeroed:
                if after > sector:
                    most = min(most, (after - sector) * SECTOR)
                break
        codec = GrainCodec(index * self.header.grain, self.grain_length(index), self.marked)
        return Packed(slot, host, most, self.unit, codec, length, skip)

    def grain_length(self, index: int) -> int:
        """Bytes of a grain that lie on the disk."""
        return min(self.unit, self.header.capacity * SECTOR - index * self.unit)

    def load(self, offset: int, data: bytes) -> None:
        """Decode a grain table."""
        self.image.tables.put(self.slot, offset, little_endian_array(32, data), len(data))

    # -- what does not exist
    def gather(self, ranges: Sequence[Range], kind: str) -> NeedMeta | bool:
        """Discards do nothing; raises UnsupportedFeature for all else."""
        if kind == DISCARD:
            return False
        raise UnsupportedFeature(REFUSED)

    def reserve(self, ranges: Sequence[Range], kind: str, plan: Plan) -> Any:
        """Never reached."""
        raise UnsupportedFeature(REFUSED)

    # -- what is told of it
    def check(self, result: CheckResult, fix: str) -> Procedure:
        """See :mod:`.check`.  There is nothing that could be repaired."""
        from .check import check_stream

        yield from check_stream(self, result)

    def info(self) -> dict[str, Any]:
        """See `Part.info`."""
        return {
            "compressed": True,
            "virtual-size": self.length,
            "cluster-size": self.unit,
            "format": "SPARSE",
        }


def open_stream(image: Image, slot: str, start: int) -> Procedure:
    """Open the compressed extent in ``slot``; returns the part, as long as its header (or its
    footer) says.

    Raises MalformedImage for a footer or a grain directory that is not there, UnsupportedFeature
    for grains that are too large or compressed in another way.
    """
    header = yield from read_header(slot)
    if header.grain * SECTOR > MAX_GRAIN:
        raise UnsupportedFeature(f"compressed grains of {header.grain} sectors", offset=20)
    if header.compression != DEFLATE:
        raise UnsupportedFeature(f"VMDK compression algorithm {header.compression}", offset=77)
    length = header.capacity * SECTOR
    file_length = yield Length(slot)
    return (yield from StreamPart(image, slot, start, length, header, file_length).opening())
