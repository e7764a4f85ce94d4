"""What of a qcow2 file neither guest data nor their tables refer to: the encryption header, and the
persistent bitmaps.  Their contents are not lost data of the disk."""

from __future__ import annotations

from ....contract import Procedure, Progress
from ....errors import MalformedImage
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array
from .. import header as hd
from ..bitmaps.directory import ENTRY_OFFSET, parse_directory, parse_place
from ..machine.core import SLOT
from .reading import read_some

if TYPE_CHECKING:
    from .opening import Salvage

_SLICE = 64 << 10
_MOST_ENTRIES = 1 << 24
"""Of all bitmap tables together; a disk of 8 TiB has fewer in a bitmap of the finest grain."""


class Others:
    """Marks what they name."""

    def __init__(self, salvage: Salvage) -> None:
        self.salvage = salvage
        self.image = salvage.image
        self.room = _MOST_ENTRIES

    def run(self) -> Procedure:
        """What cannot be read is said, and names nothing."""
        h = self.image.header
        pointer = h.extension(hd.EXT_ENCRYPTION)
        if pointer is not None and len(pointer) == hd.POINTER.size:
            offset, length = hd.POINTER.unpack(pointer)
            self.salvage.use_region(offset, length)
        try:
            yield from self._bitmaps()
        except MalformedImage as error:
            self.salvage.say(f"The persistent bitmaps cannot be read: {error}")

    def _bitmaps(self) -> Procedure:
        h, length = self.image.header, self.salvage.length
        place = parse_place(h)
        if place is None or place.offset + place.size > length:
            return
        raw, _ = yield from read_some(SLOT, place.offset, place.size)
        entries = parse_directory(raw, place, h)
        self.salvage.use_region(place.offset, place.size)
        for entry in entries:
            size = 8 * entry.table_size
            if entry.table_offset + size > length or entry.table_size > self.room:
                continue
            self.room -= entry.table_size
            self.salvage.use_region(entry.table_offset, size)
            for start in range(0, size, _SLICE):
                raw, _ = yield from read_some(
                    SLOT, entry.table_offset + start, min(_SLICE, size - start)
                )
                self._use_clusters(raw)
                yield Progress(start, size)

    def _use_clusters(self, raw: bytes) -> None:
        image = self.image
        for value in big_endian_array(64, raw):
            host = value & ENTRY_OFFSET
            if value == host and 0 < host < self.salvage.length and not host & image.cluster_mask:
                image.marks.use(host >> image.cluster_bits, alone=False)
