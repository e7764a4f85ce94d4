"""Writing a streamOptimized image in one pass.

Layout: VMware's technical note "Virtual Disk Format" 5.0, chapter "Stream-Optimized Compressed":
header, descriptor, compressed grains with their tables behind them, grain directory, footer, end
of stream; everything but grains begins with a marker.  Header version 3 is what VMware's tools
write into such a file, and newer releases of ESXi refuse an older one ("sparse VMDK version too
old").  Grains begin behind 64 KiB of overhead, as in VMware's files.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from ....abilities import Codec
from ....codecs.deflate import Deflate
from ....errors import NoSpace, UsageError
from ....ondisk import Fields, little_endian_bytes, zeros
from ....units import SECTOR, align_up
from ..sparse.header import COMPRESSED, DEFLATE, GD_AT_END, MARKERS, NEWLINE_TEST, Hosted
from .part import GRAIN_HEADER

GRAIN = 64 << 10
ENTRIES = 512  # of a grain table
OVERHEAD = 128  # sectors before the first grain; more only for a larger descriptor
DESCRIPTOR_AT = 1
DESCRIPTOR_SECTORS = 20  # at least
VERSION = 3
END_OF_STREAM, TABLE, DIRECTORY, FOOTER = range(4)

MARKER = Fields("<", "numSectors:Q size:I type:I")
_MAX_SECTOR = 1 << 32  # entries of both kinds of tables have 32 bits
MAX_SIZE = 64 << 40
"""The largest disk (bytes) that is written: its grain directory has 8 MiB."""

DEFAULT_LEVEL = 4


class StreamOptimized:
    """The `StreamWriter` of streamOptimized.

    ``size``: of the disk in bytes, a multiple of 512; ``descriptor``: the text that goes into the
    file; ``level``: of zlib, 1 to 9.  The capacity in the header is the disk's size, also where
    that is no multiple of the grain: the last grain is filled up with zeroes.  Raises UsageError.
    """

    unit = GRAIN

    def __init__(self, size: int, descriptor: bytes, level: int = DEFAULT_LEVEL) -> None:
        if size < 0 or size % SECTOR:
            raise UsageError(f"The image size {size} is not a multiple of {SECTOR}")
        if size > MAX_SIZE:
            raise UsageError(f"A streamOptimized image has at most {MAX_SIZE >> 40} TiB")
        if not 1 <= level <= 9:
            raise UsageError(f"Compression level {level} is not between 1 and 9")
        self.size = size
        self.descriptor = descriptor
        self._sectors = max(-(-len(descriptor) // SECTOR), DESCRIPTOR_SECTORS)
        self._overhead = align_up(DESCRIPTOR_AT + self._sectors, OVERHEAD)
        self.codec: Codec = Deflate(level)
        tables = -(-size // (GRAIN * ENTRIES))
        self._directory: array[int] = zeros(32, tables)
        self._table: array[int] = zeros(32, ENTRIES)
        self._current = -1  # the table that is being filled
        self._last = -1
        self._sector = 0

    def head(self) -> Iterator[bytes]:
        """The header, the descriptor, and nothing up to the first grain."""
        self._sector = self._overhead
        yield self._header(GD_AT_END)
        yield self.descriptor.ljust((self._overhead - DESCRIPTOR_AT) * SECTOR, b"\0")

    def put(self, index: int, packed: bytes) -> Iterator[bytes]:
        """Grain ``index``, ascending; before the first one of a table, the table before it."""
        if not self._last < index < -(-self.size // GRAIN):
            raise ValueError(f"grain {index} behind grain {self._last}")
        self._last = index
        number, entry = divmod(index, ENTRIES)
        if number != self._current:
            yield from self._end_table()
            self._current = number
        self._table[entry] = self._sector
        length = GRAIN_HEADER.size + len(packed)
        yield GRAIN_HEADER.pack(index * (GRAIN // SECTOR), len(packed))
        yield packed
        yield bytes(-length % SECTOR)
        self._advance(length)

    def end(self) -> Iterator[bytes]:
        """The last table, the grain directory, the footer and the end of the stream."""
        yield from self._end_table()
        raw = little_endian_bytes(self._directory)
        raw = raw.ljust(max(align_up(len(raw), SECTOR), SECTOR), b"\0")
        at = self._sector + 1
        yield from self._metadata(DIRECTORY, raw)
        yield from self._metadata(FOOTER, self._header(at))
        yield bytes(SECTOR)

    def _header(self, directory: int) -> bytes:
        return Hosted(
            VERSION,
            NEWLINE_TEST | COMPRESSED | MARKERS,
            self.size // SECTOR,
            GRAIN // SECTOR,
            DESCRIPTOR_AT,
            self._sectors,
            ENTRIES,
            0,
            directory,
            self._overhead,
            False,
            DEFLATE,
        ).encode()

    def _end_table(self) -> Iterator[bytes]:
        if self._current < 0:
            return
        self._directory[self._current] = self._sector + 1
        yield from self._metadata(TABLE, little_endian_bytes(self._table))
        self._table = zeros(32, ENTRIES)

    def _metadata(self, kind: int, raw: bytes) -> Iterator[bytes]:
        yield MARKER.pack(len(raw) // SECTOR, 0, kind).ljust(SECTOR, b"\0")
        yield raw
        self._advance(SECTOR + len(raw))

    def _advance(self, length: int) -> None:
        self._sector += align_up(length, SECTOR) // SECTOR
        if self._sector >= _MAX_SECTOR:
            raise NoSpace("A streamOptimized image has at most 2 TiB of compressed data")
