"""The two headers of a seSparse extent, ESXi's format of snapshots, and a new extent.

VMware does not publish this format.  What is known of it here comes from messages that ESXi logs
when it makes a snapshot (names, values and order of the headers' fields; where the regions of an
extent lie) and from measuring what QEMU 10 reads in files that were made for it (values that it
insists on, entries of directory and tables).  All fields are little-endian and of 64 bits;
places and lengths are in sectors.

What nothing public says, and no reader of ours needs: the journal (only whether it must be
replayed), and the encoding of free bitmap and reverse map.  Here a set bit, lowest first, is a
grain that is in use, and the reverse map has the number of the guest grain for each grain of the
file.  Nothing else could be true of a fresh extent, whose regions hold nothing but zeroes; all
the same an extent is written only if both agree with its tables (see :mod:`.space`).
"""

from __future__ import annotations

from ....contract import Barrier, MetaWrite, Procedure, Read, Truncate, Write
from ....errors import MalformedImage, UnsupportedFeature, UsageError
from ....ondisk import Fields
from ....records import NamedTuple
from ....units import SECTOR, align_up

MAGIC, VOLATILE_MAGIC = 0xCAFEBABE, 0xCAFECAFE
VERSION = 0x200000001  # 2.1
GRAIN_SECTORS = 8
GRAIN = GRAIN_SECTORS * SECTOR
TABLE_SECTORS = 64
TABLE_BYTES = TABLE_SECTORS * SECTOR
ENTRIES = TABLE_BYTES // 8
COVERAGE = GRAIN * ENTRIES
"""Bytes of the disk that a grain table describes (16 MiB)."""
MAX_CAPACITY = (64 << 40) // SECTOR
"""Sectors of the largest disk; ESXi's own limit is 62 TiB."""
_MAX_SECTOR = 1 << 48
_REGION = 2048  # sectors that regions are rounded to, as ESXi does

CONSTANT = Fields(
    "<",
    "constMagic:Q version:Q capacity:Q grainSize:Q grainTableSize:Q flags:Q reserved:4Q "
    "volatileOffset:Q volatileSize:Q journalHeaderOffset:Q journalHeaderSize:Q journalOffset:Q "
    "journalSize:Q directoryOffset:Q directorySize:Q tablesOffset:Q tablesSize:Q "
    "freeBitmapOffset:Q freeBitmapSize:Q backmapOffset:Q backmapSize:Q grainsOffset:Q grainsSize:Q",
)
VOLATILE = Fields("<", "volatileMagic:Q freeTable:Q nextJournalEntry:Q replayJournal:Q")
FREE_TABLE_AT = VOLATILE.offset_of("freeTable")
"""Where in the volatile header the number of the next free grain table is."""

REPLAY = (
    "seSparse extent whose journal must be replayed (it was not closed in order: open it on an "
    "ESXi host once, which replays it)"
)


class Region(NamedTuple):
    """A part of the file, in sectors."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        """The first sector behind it."""
        return self.offset + self.size

    @property
    def start(self) -> int:
        """Its first byte."""
        return self.offset * SECTOR


class Header(NamedTuple):
    """A checked constant header, and of the volatile one the number of the next free table."""

    capacity: int
    volatile: Region
    journal_header: Region
    journal: Region
    directory: Region
    tables: Region
    bitmap: Region
    backmap: Region
    grains: Region
    free_table: int = 0

    @property
    def table_count(self) -> int:
        """Entries of the grain directory that are in use."""
        return -(-self.capacity // (GRAIN_SECTORS * ENTRIES))

    @property
    def grain_count(self) -> int:
        """Grains that the file has room for, as far as region and free bitmap go."""
        return min(self.grains.size // GRAIN_SECTORS, self.bitmap.size * SECTOR * 8,
                   self.backmap.size * SECTOR // 8)  # fmt: skip

    def encode(self) -> bytes:
        """Both headers, from the start of the file (of a new extent)."""
        constant = CONSTANT.pack(
            MAGIC, VERSION, self.capacity, GRAIN_SECTORS, TABLE_SECTORS, 0, 0, 0, 0, 0,
            *(value for region in self[1:9] for value in region),
        )  # fmt: skip
        volatile = VOLATILE.pack(VOLATILE_MAGIC, self.free_table, 0, 0)
        return constant.ljust(SECTOR, b"\0") + volatile.ljust(SECTOR, b"\0")


def read_headers(slot: str) -> Procedure:
    """Read and check both headers; returns a `Header`.

    Raises MalformedImage with the field, UnsupportedFeature for what is not known and for an
    extent whose journal must be replayed.
    """
    (raw,) = yield Read(slot, [(0, SECTOR)])
    header = parse_constant(raw)
    (raw,) = yield Read(slot, [(header.volatile.start, SECTOR)])
    return parse_volatile(header, raw)


def parse_constant(data: bytes) -> Header:
    """Check a constant header."""
    fields = CONSTANT.unpack_from(data)
    if fields[0] != MAGIC:
        raise MalformedImage("not a seSparse extent", field="constMagic", offset=0)
    if fields[1] != VERSION:
        raise UnsupportedFeature(
            f"seSparse version {fields[1] >> 32}.{fields[1] & 0xFFFFFFFF}", offset=8
        )
    capacity, grain, table, flags = fields[2:6]
    if capacity > MAX_CAPACITY:
        raise MalformedImage(f"{capacity} sectors are too many", field="capacity", offset=16)
    if grain != GRAIN_SECTORS:
        raise UnsupportedFeature(f"seSparse grain size of {grain} sectors", offset=24)
    if table != TABLE_SECTORS:
        raise UnsupportedFeature(f"seSparse grain table size of {table} sectors", offset=32)
    if flags or any(fields[6:10]):
        raise UnsupportedFeature(f"seSparse flags {[hex(f) for f in fields[5:10]]}", offset=40)
    regions = []
    for index in range(10, 26, 2):
        region = Region(*fields[index : index + 2])
        if max(region) >= _MAX_SECTOR:
            raise MalformedImage(
                f"a region of {region.size} sectors at sector {region.offset}",
                field=f"{Header._fields[index // 2 - 4]} extent",
                offset=index * 8,
            )
        regions.append(region)
    header = Header._make([capacity, *regions, 0])
    if not header.volatile.offset or not header.volatile.size:
        raise MalformedImage("there is no volatile header", field="volatile extent", offset=80)
    count = header.table_count
    if header.directory.size * SECTOR < count * 8:
        raise MalformedImage(
            f"the grain directory has {header.directory.size} sectors, {count} entries of 8 bytes "
            "are needed",
            field="directory extent",
            offset=120,
        )
    return header


def parse_volatile(header: Header, data: bytes) -> Header:
    """Check a volatile header; returns ``header`` with what it says."""
    at = header.volatile.start
    magic, free_table, _, replay = VOLATILE.unpack_from(data)
    if magic != VOLATILE_MAGIC:
        raise MalformedImage("the volatile header is damaged", field="volatileMagic", offset=at)
    if replay:
        raise UnsupportedFeature(REPLAY, offset=at + 24)
    return header._replace(free_table=free_table)


def why_not_written(header: Header) -> str | None:
    """What speaks against changing an extent with these regions; None when nothing does."""
    named = dict(zip(Header._fields[1:9], header[1:9], strict=True))
    regions = sorted(
        ((region, name) for name, region in named.items() if region.size),
    )
    before, before_name = Region(0, 1), "header"
    for region, name in regions:
        if region.offset < before.end:
            return f"the regions '{before_name}' and '{name}' overlap"
        before, before_name = region, name
    if header.tables.size // TABLE_SECTORS < header.table_count:
        return "there is no room for all grain tables"
    if header.free_table > header.tables.size // TABLE_SECTORS:
        return f"the next free grain table is said to be number {header.free_table}"
    return None


def new_header(sectors: int) -> Header:
    """The header of a new extent for a disk of so many sectors.  Raises UsageError.

    Places and sizes are those that ESXi logs for its own: everything begins on a MiB, and there
    is room for all tables and all grains.
    """
    if sectors > MAX_CAPACITY:
        raise UsageError(f"A seSparse image has at most {MAX_CAPACITY * SECTOR >> 40} TiB")
    tables = -(-sectors // (GRAIN_SECTORS * ENTRIES))
    grains = -(-sectors // GRAIN_SECTORS)
    at = _REGION
    regions = [Region(1, 1), Region(2, 2)]
    for size in (
        _REGION * SECTOR,  # journal
        tables * 8,
        tables * TABLE_BYTES,
        -(-grains // 8),
        grains * 8,
    ):
        length = max(align_up(-(-size // SECTOR), _REGION), _REGION)
        regions.append(Region(at, length))
        at += length
    regions.append(Region(at, grains * GRAIN_SECTORS))
    return Header._make([sectors, *regions, 0])


def new_sesparse(slot: str, sectors: int) -> Procedure:
    """Write a new extent into an empty file: all of its regions are there, and hold nothing."""
    header = new_header(sectors)
    yield Truncate(slot, header.grains.start)
    yield Write([MetaWrite(slot, 0, header.encode(), "header_update")])
    yield Barrier()
