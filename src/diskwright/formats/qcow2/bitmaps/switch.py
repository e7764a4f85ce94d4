"""The last step of storing bitmaps: the directory and the header that names it."""

from __future__ import annotations

from ....bitmaps import DirtyBitmap
from ....contract import Barrier, MetaWrite, Procedure, Write
from ....hints import TYPE_CHECKING
from ....units import align_up
from .. import header as hd
from ..machine.core import SLOT
from ..replacing import replace_header
from .directory import AUTO, IN_USE, Entry, Place, encode_directory, shown, table_entries
from .use import Directory, use_bitmap

if TYPE_CHECKING:
    from ..format import Qcow2
    from ..machine.runs import Run
    from .store import Storing

_SECTOR = 512
_DATA = 24


def extension_place(h: hd.Header) -> int | None:
    """Where in the file the data of the bitmaps extension are, if there is one and a write of them
    cannot be torn."""
    at, found = h.length, []
    for kind, data in h.extensions:
        if kind == hd.EXT_BITMAPS:
            found.append((at + 8, len(data)))
        at += 8 + align_up(len(data), 8)
    if len(found) != 1 or found[0][1] != _DATA:
        return None
    first = found[0][0]
    return first if first // _SECTOR == (first + _DATA - 1) // _SECTOR else None


class Switch:
    """From the directory on disk to the one that is to be there.  ``fresh``: entries of bitmaps
    whose bits were stored."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.directory: Directory | None = image.directory
        self.fresh: dict[str, Entry] = {}

    def _old(self, bitmap: DirtyBitmap) -> Entry | None:
        return self.directory.entries.get(bitmap.name) if self.directory is not None else None

    def stale(self, bitmap: DirtyBitmap, old: Entry | None) -> bool:
        """The bits on disk are not those of the bitmap."""
        if old is None or bitmap.changed:
            return True
        bits = bitmap.granularity.bit_length() - 1
        return old.table_size != table_entries(bitmap.size, bits, self.image.cluster_bits)

    def needed(self) -> bool:
        """Something on disk is not as it is to be."""
        if self.directory is not None and self._removed():
            return True
        for bitmap in self.image.bitmaps:
            if bitmap.persistent and not bitmap.inconsistent:
                old = self._old(bitmap)
                if old is None or self.stale(bitmap, old) or old.flags != _flags(bitmap, old):
                    return True
        return False

    def begin(self) -> Procedure:
        """Mark what is stored of bitmaps that will be written over."""
        for bitmap in self.image.bitmaps:
            old = self._old(bitmap)
            if bitmap.persistent and not bitmap.inconsistent and self.stale(bitmap, old):
                if bitmap.touched is None or old is None or not bitmap.changed:
                    # All of it is written to another place, for which it must be in memory.
                    yield from self.image.load_bitmap(bitmap)
                yield from use_bitmap(self.image, bitmap)

    def _removed(self) -> list[Entry]:
        if self.directory is None:
            return []
        kept = set(map(id, self.directory.entries.values()))
        return [entry for entry in self.directory.stored if id(entry) not in kept]

    def run(self, storing: Storing) -> Procedure:
        """Switch over; returns the clusters that nothing names any more."""
        from .store import held

        image = self.image
        wanted: list[Entry] = []
        for bitmap in image.bitmaps:
            if bitmap.persistent:
                old = self._old(bitmap)
                entry = self.fresh.get(bitmap.name)
                if entry is None:
                    if old is None:
                        continue  # it could not be stored
                    entry = _copy(old)
                    if not bitmap.inconsistent:
                        entry.flags = _flags(bitmap, old)
                wanted.append(entry)
        freed: list[Run] = []
        yield Barrier()
        if self.directory is not None and _same(wanted, self.directory.stored):
            yield from self._in_place(wanted)
        else:
            for entry in self._removed():
                freed += yield from held(image, entry)
            if self.directory is not None:
                place = self.directory.place
                first = place.offset >> image.cluster_bits
                freed.append((first, first + (-(-place.size >> image.cluster_bits))))
            if wanted:
                yield from self._new_directory(wanted, storing)
            elif self.directory is not None:
                yield from self._without()
        storing.taken.clear()
        image.reserve_structures()
        image.reannounce()
        for bitmap in image.bitmaps:
            if bitmap.persistent and not bitmap.inconsistent:
                bitmap.touched = set()
        return freed

    def _in_place(self, wanted: list[Entry]) -> Procedure:
        """Only flags are others."""
        assert self.directory is not None
        stored = self.directory.stored
        writes = [
            self.directory.flags_write(old, new.flags)
            for old, new in zip(stored, wanted, strict=True)
            if old.flags != new.flags
        ]
        yield Write(writes)
        yield Barrier()
        for old, new in zip(stored, wanted, strict=True):
            old.flags = new.flags

    def _new_directory(self, wanted: list[Entry], storing: Storing) -> Procedure:
        from ...editing import flush

        image = self.image
        raw = encode_directory(wanted)
        offset = yield from storing.take_region(len(raw))
        place = Place(len(wanted), len(raw), offset)
        padded = raw.ljust(align_up(len(raw), image.cluster_size), b"\0")
        yield Write([MetaWrite(SLOT, offset, padded)])
        yield from flush(image)
        yield from self._point_to(place)
        image.directory = Directory(place, wanted)

    def _point_to(self, place: Place) -> Procedure:
        h = self.image.header
        at = extension_place(h) if h.autoclear & hd.BITMAPS else None
        if at is not None:
            h.set_extension(hd.EXT_BITMAPS, place.encode())
            yield Write([MetaWrite(SLOT, at, place.encode())])
            yield Barrier()
            return
        new = h.copy()
        new.set_extension(hd.EXT_BITMAPS, place.encode())
        new.autoclear |= hd.BITMAPS
        yield from replace_header(self.image, new)

    def _without(self) -> Procedure:
        """The last bitmap is gone."""
        new = self.image.header.copy()
        new.set_extension(hd.EXT_BITMAPS, None)
        new.autoclear &= ~hd.BITMAPS
        yield from replace_header(self.image, new)
        self.image.directory = None


def _flags(bitmap: DirtyBitmap, old: Entry) -> int:
    return (AUTO if bitmap.enabled else 0) | old.flags & ~(AUTO | IN_USE)


def _copy(entry: Entry) -> Entry:
    out = Entry(entry.name, entry.granularity_bits, entry.flags)
    out.kind, out.extra = entry.kind, entry.extra
    out.table_offset, out.table_size, out.at = entry.table_offset, entry.table_size, entry.at
    return out


def _same(wanted: list[Entry], stored: list[Entry]) -> bool:
    """The same bitmaps, with their tables where they are."""
    return [(shown(e.name), e.table_offset, e.table_size) for e in wanted] == [
        (shown(e.name), e.table_offset, e.table_size) for e in stored
    ]
