"""Headers of sparse extents: the hosted kind, ``KDMV``, and that of ESX 2 to 5, ``COWD``.

Source: VMware's technical note "Virtual Disk Format 5.0", "Hosted Sparse Extents" and "ESX Server
Sparse Extents".  All integers are little-endian; fields that count or place are in sectors.
"""

from __future__ import annotations

from ....contract import Length, Procedure, Range, Read
from ....errors import MalformedImage, UnsupportedFeature
from ....hints import Any
from ....ondisk import Fields
from ....records import NamedTuple
from ....units import is_power_of_two

SECTOR = 512
KDMV, COWD = b"KDMV", b"COWD"
COWD_LENGTH = 2048

NEWLINE_TEST, REDUNDANT, ZEROED_GRAIN = 1, 2, 4
COMPRESSED, MARKERS = 1 << 16, 1 << 17
_KNOWN = NEWLINE_TEST | REDUNDANT | ZEROED_GRAIN | COMPRESSED | MARKERS
_NEWLINES = b"\n \r\n"
GD_AT_END = (1 << 64) - 1
NONE, DEFLATE = 0, 1

MAX_SECTORS = 1 << 54  # capacity: its bytes fit into 63 bits
MAX_GRAIN = 1 << 21  # sectors, 1 GiB
MAX_ENTRIES = 512  # of a grain table
MAX_DIRECTORY = 8 << 20  # bytes: 64 TiB in grains of 64 KiB
COWD_ENTRIES = 4096
_MAX_COWD_DIRECTORY = 4 << 20

HOSTED = Fields(
    "<",
    "magicNumber:4s version:I flags:I capacity:Q grainSize:Q descriptorOffset:Q descriptorSize:Q "
    "numGTEsPerGT:I rgdOffset:Q gdOffset:Q overHead:Q uncleanShutdown:B lineEnds:4s "
    "compressAlgorithm:H",
)
_UNCLEAN = HOSTED.offset_of("uncleanShutdown")
ESX = Fields(
    "<",
    "magicNumber:4s version:I flags:I numSectors:I grainSize:I gdOffset:I numGDEntries:I "
    "freeSector:I",
)
_ESX_PARENT, _ESX_PARENT_LENGTH = ESX.size, 1024
_ESX_FREE = ESX.offset_of("freeSector")
_ESX_UNCLEAN = 1648


class Layout(NamedTuple):
    """What both kinds have in common, as their maps are used.  In sectors but for ``..._at``."""

    capacity: int
    grain: int
    entries: int
    """Of a grain table."""
    directory: int
    copy: int
    """The redundant directory, 0 without one."""
    zeroed: bool
    """An entry of 1 is a grain of zeroes."""
    unclean: bool
    unclean_at: int
    """Byte offset of the field that says so (its first byte)."""
    free_at: int
    """Byte offset of the field for the next free sector, 0 where there is none."""
    free: int
    """That sector."""
    fixed: tuple[Range, ...]
    """(start, length) of header and descriptor."""
    refuse_write: str | None
    """The feature that keeps the extent from being written."""

    @property
    def tables(self) -> int:
        """Entries of the directory."""
        return -(-self.capacity // (self.grain * self.entries))

    @property
    def table_sectors(self) -> int:
        """Sectors of one grain table."""
        return -(-self.entries * 4 // SECTOR)

    @property
    def structures(self) -> list[Range]:
        """(start, length) of all that is neither table nor grain."""
        length = -(-self.tables * 4 // SECTOR)
        directories = [(place, length) for place in (self.directory, self.copy) if place]
        return [*self.fixed, *directories] if length else list(self.fixed)


class Hosted(NamedTuple):
    """A checked ``KDMV`` header; with ``footer`` from the end of the file."""

    version: int
    flags: int
    capacity: int
    grain: int
    descriptor_offset: int
    descriptor_size: int
    entries: int
    redundant: int
    directory: int
    overhead: int
    unclean: bool
    compression: int
    footer: bool = False

    @property
    def compressed(self) -> bool:
        """Grains are compressed, each with a header of its own."""
        return bool(self.flags & COMPRESSED)

    def encode(self) -> bytes:
        """The header's sector."""
        return HOSTED.pack(
            KDMV,
            self.version,
            self.flags,
            self.capacity,
            self.grain,
            self.descriptor_offset,
            self.descriptor_size,
            self.entries,
            self.redundant,
            self.directory,
            self.overhead,
            self.unclean,
            _NEWLINES,
            self.compression,
        ).ljust(SECTOR, b"\0")

    def layout(self) -> Layout:
        """How an uncompressed extent is laid out."""
        refuse = None
        if self.footer:
            refuse = "writing to a VMDK extent with its grain directory at the end"
        elif self.version == 3:
            refuse = "writing to a VMDK extent of version 3 (changed blocks are tracked)"
        elif self.flags & ~_KNOWN:
            refuse = f"writing to a VMDK extent with unknown flags {self.flags & ~_KNOWN:#x}"
        descriptor = (self.descriptor_offset, self.descriptor_size)
        return Layout(
            self.capacity,
            self.grain,
            self.entries,
            self.directory,
            self.redundant if self.flags & REDUNDANT else 0,
            bool(self.flags & ZEROED_GRAIN),
            self.unclean,
            _UNCLEAN,
            0,
            0,
            ((0, 1), descriptor) if all(descriptor) else ((0, 1),),
            refuse,
        )


class Esx(NamedTuple):
    """A checked ``COWD`` header."""

    flags: int
    capacity: int
    grain: int
    directory: int
    tables: int
    free: int
    parent: bytes
    unclean: bool

    def encode(self) -> bytes:
        """The four sectors of the header (of one that was just made: no name, generation 0)."""
        out = bytearray(COWD_LENGTH)
        ESX.pack_into(out, 0, COWD, 1, self.flags, *self[1:6])
        out[_ESX_PARENT : _ESX_PARENT + len(self.parent)] = self.parent
        out[_ESX_UNCLEAN] = self.unclean
        return bytes(out)

    def layout(self) -> Layout:
        """How the extent is laid out."""
        return Layout(
            self.capacity,
            self.grain,
            COWD_ENTRIES,
            self.directory,
            0,
            False,
            self.unclean,
            _ESX_UNCLEAN,
            _ESX_FREE,
            self.free,
            ((0, COWD_LENGTH // SECTOR),),
            None,
        )


def _bad(text: str, field: str, offset: int) -> MalformedImage:
    return MalformedImage(text, field=field, offset=offset)


def parse_hosted(data: bytes, at: int = 0) -> Hosted:
    """Check a ``KDMV`` header that was read at ``at``.  Raises MalformedImage with the field,
    UnsupportedFeature for a version or a compression that is not known."""
    if len(data) < HOSTED.size or data[:4] != KDMV:
        raise _bad("not a sparse VMDK extent", "magicNumber", at)
    (_, version, flags, capacity, grain, d_offset, d_size, entries, redundant, directory, overhead,
     unclean, newlines, compression) = HOSTED.unpack_from(data)  # fmt: skip
    if not 1 <= version <= 3:
        raise UnsupportedFeature(f"VMDK extent version {version}", offset=at + 4)
    if flags & NEWLINE_TEST and newlines != _NEWLINES:
        raise _bad(
            "line ends were changed: the file was damaged by a transfer as text",
            "singleEndLineChar",
            at + 73,
        )
    if capacity > MAX_SECTORS:
        raise _bad(f"capacity of {capacity} sectors is too large", "capacity", at + 12)
    check_grain(grain, at + 20)
    if not 1 <= entries <= MAX_ENTRIES:
        raise _bad(f"{entries} entries in a grain table (1 to 512)", "numGTEsPerGT", at + 44)
    tables = -(-capacity // (grain * entries))
    if tables * 4 > MAX_DIRECTORY:
        raise _bad(f"a grain directory of {tables} entries is too large", "capacity", at + 12)
    if d_offset >= MAX_SECTORS or d_size >= MAX_SECTORS:
        raise _bad("the descriptor is beyond any file", "descriptorOffset", at + 28)
    if compression not in (NONE, DEFLATE):
        raise UnsupportedFeature(f"VMDK compression algorithm {compression}", offset=at + 77)
    if flags & COMPRESSED and compression == NONE:
        raise _bad("grains are compressed by no algorithm", "compressAlgorithm", at + 77)
    return Hosted(version, flags, capacity, grain, d_offset, d_size, entries, redundant, directory,
                  overhead, bool(unclean), compression)  # fmt: skip


def parse_esx(data: bytes) -> Esx:
    """Check a ``COWD`` header.  Raises MalformedImage with the field, UnsupportedFeature for
    another version."""
    if len(data) < COWD_LENGTH or data[:4] != COWD:
        raise _bad("not a COWD extent", "magicNumber", 0)
    _, version, flags, capacity, grain, directory, tables, free = ESX.unpack_from(data)
    if version != 1:
        raise UnsupportedFeature(f"COWD extent version {version}", offset=4)
    check_grain(grain, 16)
    needed = -(-capacity // (grain * COWD_ENTRIES))
    if tables < needed or tables * 4 > _MAX_COWD_DIRECTORY:
        raise _bad(
            f"a grain directory of {tables} entries ({needed} are needed)", "numGDEntries", 24
        )
    if directory < COWD_LENGTH // SECTOR:
        raise _bad("the grain directory is inside the header", "gdOffset", 20)
    parent = bytes(data[_ESX_PARENT : _ESX_PARENT + _ESX_PARENT_LENGTH]).split(b"\0", 1)[0]
    unclean = any(data[_ESX_UNCLEAN : _ESX_UNCLEAN + 4])
    return Esx(flags, capacity, grain, directory, tables, free, parent, unclean)


def check_grain(grain: int, at: int) -> None:
    """Raise MalformedImage unless a grain of so many sectors can be."""
    if not 1 <= grain <= MAX_GRAIN or not is_power_of_two(grain):
        raise _bad(f"grain size of {grain} sectors", "grainSize", at)


def read_header(slot: str) -> Procedure:
    """Read the header of a sparse extent; returns `Hosted` or `Esx`.

    Where the header puts the grain directory at the end, the values are those of the footer, the
    last sector but one.
    """
    (head,) = yield Read(slot, [(0, COWD_LENGTH)])
    if head[:4] == COWD:
        return parse_esx(head)
    header = parse_hosted(head)
    if header.directory != GD_AT_END:
        return header
    length = yield Length(slot)
    at = (length // SECTOR - 2) * SECTOR
    if at < SECTOR:
        raise _bad("the file ends before its footer", "gdOffset", 56)
    (tail,) = yield Read(slot, [(at, SECTOR)])
    if tail[:4] != KDMV:
        raise _bad("there is no footer at the end of the file", "magicNumber", at)
    footer = parse_hosted(tail, at)
    if footer.directory == GD_AT_END:
        raise _bad("the footer does not say where the grain directory is", "gdOffset", at + 56)
    same: Any = ("capacity", "grain", "entries", "compression")
    for field in same:
        if getattr(footer, field) != getattr(header, field):
            raise _bad("header and footer contradict each other", field, at)
    return footer._replace(
        descriptor_offset=header.descriptor_offset,
        descriptor_size=header.descriptor_size,
        footer=True,
    )
