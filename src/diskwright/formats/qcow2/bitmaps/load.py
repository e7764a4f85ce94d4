"""Reading the bits of stored bitmaps."""

from __future__ import annotations

from ....bitmaps import DirtyBitmap
from ....contract import Length, Procedure, Progress, Read
from ....errors import CorruptImage
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array
from ..machine.core import SLOT
from .directory import ALL_ONES, ENTRY_OFFSET, table_entries
from .use import bad_entry

if TYPE_CHECKING:
    from ..image import Image

_SLICE = 4096
"""Entries of a table that are read at once."""
_BATCH = 1 << 20
"""Bytes of bits that are read at once (at least a cluster)."""


def load_bitmap(image: Image, bitmap: DirtyBitmap) -> Procedure:
    """Bring all bits of a stored bitmap into memory, on top of those that were set since.

    Raises CorruptImage where the table names what is not in the file: bits that are not there must
    not be taken for clean.
    """
    if bitmap.loaded:
        return
    assert image.directory is not None
    entry = image.directory.entries[bitmap.name]
    size, length = image.cluster_size, (yield Length(SLOT))
    count = table_entries(bitmap.size, entry.granularity_bits, image.cluster_bits)
    if entry.table_offset + 8 * count > length:
        raise CorruptImage(f"Bitmap '{bitmap.name}': its table is outside the file",
                           field="bitmap table", offset=entry.table_offset)
    for start in range(0, count, _SLICE):
        at = entry.table_offset + 8 * start
        (raw,) = yield Read(SLOT, [(at, 8 * min(_SLICE, count - start))])
        wanted: list[tuple[int, int]] = []
        for index, value in enumerate(big_endian_array(64, raw), start):
            if value == ALL_ONES:
                first = index << image.cluster_bits + 3
                stop = min(first + (size << 3), bitmap.bits.length)
                bitmap.bits.set(first, stop)
            elif value:
                host = value & ENTRY_OFFSET
                needed = min(size, (bitmap.bits.length + 7 >> 3) - (index << image.cluster_bits))
                if value != host or host & size - 1 or host + needed > length:
                    raise bad_entry(bitmap, index, value)
                wanted.append((index, host))
        step = max(1, _BATCH // size)
        for i in range(0, len(wanted), step):
            parts = wanted[i : i + step]
            datas = yield Read(SLOT, [(host, size) for _, host in parts])
            for (index, _), data in zip(parts, datas, strict=True):
                bitmap.bits.add_data(index << image.cluster_bits, data)
            yield Progress(start, count)
    bitmap.loaded = True
