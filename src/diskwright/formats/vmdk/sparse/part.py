"""Sparse extents, ``KDMV`` and ``COWD``, as parts: opening, and the way to the disk.

Both redundant copies of a table are written in the same group; until a flush has ended they may
differ, which is why the header says ``uncleanShutdown`` from the first change to the close.  An
extent whose header says so when it is opened for writing gets its copies made equal first.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

from ....contract import HostRange, Length, MetaWrite, Procedure, Read
from ....errors import MalformedImage, UnsupportedFeature
from ....findings import CheckResult
from ....hints import Any
from ....ondisk import little_endian_array, little_endian_bytes, zeros
from ..parts import Image
from .header import SECTOR, Esx, Hosted, Layout
from .plan import PER_SECTOR, SparsePlanner
from .space import Run


class SparsePart(SparsePlanner):
    """One sparse extent as a `Part`."""

    def __init__(self, image: Image, slot: str, start: int, length: int, layout: Layout) -> None:
        super().__init__(image, slot, start, length, layout)
        self.unclean = layout.unclean
        """The header on disk says that the extent is in use, or was not closed in order."""
        self.free_written = layout.free
        """The header's next free sector as it is on disk."""

    # -- to the disk
    def before(self) -> list[MetaWrite]:
        """The header's word that the extent is in use."""
        if self.unclean or self.layout.refuse_write is not None:
            return []
        return [MetaWrite(self.slot, self.layout.unclean_at, b"\1")]

    def announced(self) -> None:
        """It is on disk."""
        if self.before():
            self.unclean = True

    def closing(self) -> list[MetaWrite]:
        """The header's word that the extent is in order."""
        if not self.unclean or self.damage is not None:
            return []
        self.unclean = False
        return [MetaWrite(self.slot, self.layout.unclean_at, b"\0")]

    def freeze(self, tables: list[MetaWrite], links: list[MetaWrite]) -> Any:
        """See `Part.freeze`."""
        if not self._dirty and not self._dirty_links and not self._freed:
            return None
        for index, (first, stop) in self._dirty.items():
            table = self.table(self.directory[index])
            assert table is not None
            table.dirty = False
            new = index in self._new
            first, stop = first // PER_SECTOR * PER_SECTOR, -(-stop // PER_SECTOR) * PER_SECTOR
            raw = little_endian_bytes(table.data, first, stop)
            tag = "l2_alloc_write" if new else "l2_update"
            for entries in (self.directory, self.copy):
                if entries and self._is_place(entries[index]):
                    at = entries[index] * SECTOR + 4 * first
                    (tables if new else links).append(MetaWrite(self.slot, at, raw, tag))
        for sector in sorted(self._dirty_links):
            for place, entries in (
                (self.layout.directory, self.directory),
                (self.layout.copy, self.copy),
            ):
                if entries:
                    raw = little_endian_bytes(
                        entries, sector * PER_SECTOR, (sector + 1) * PER_SECTOR
                    )
                    links.append(MetaWrite(self.slot, (place + sector) * SECTOR, raw, "l1_update"))
        if self.layout.free_at and self.space.end > self.free_written:
            # Raised before anything refers to what is below it.
            self.free_written = self.space.end
            raw = struct.pack("<I", min(self.space.end, 0xFFFFFFFF))
            tables.append(MetaWrite(self.slot, self.layout.free_at, raw))
        freed, self._freed = self._freed, []
        self._dirty, self._new, self._dirty_links = {}, set(), set()
        return freed

    def settle(self, token: Any) -> list[HostRange]:
        """Nothing on disk refers to these grains any more."""
        freed: list[Run] = token
        return [HostRange(self.slot, a * SECTOR, (b - a) * SECTOR) for a, b in freed]

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None:
        """Punched grains may be used again."""
        for part in ranges:
            start = part.offset // SECTOR
            self.space.give(start, start + part.length // SECTOR, zeroed)

    # -- what is told of it
    def info(self) -> dict[str, Any]:
        """See `Part.info`."""
        return {
            "virtual-size": self.length,
            "format": "VMFSSPARSE" if self.layout.free_at else "SPARSE",
            "cluster-size": self.unit,
        }

    def check(self, result: CheckResult, fix: str = "") -> Procedure:
        """See `Part.check`; in units of grains."""
        from .check import check

        return check(self, result, fix)


def open_sparse(
    image: Image, slot: str, start: int, length: int, header: Hosted | Esx, writable: bool
) -> Procedure:
    """Read the directories of an uncompressed sparse extent of ``length`` bytes that begins at
    guest byte ``start``; returns a `SparsePart`.

    ``writable``: in an extent that was not closed in order the copies of the tables are made
    equal.  Raises MalformedImage where neither directory is inside the file, UnsupportedFeature
    for an extent that is to be written and is of a kind that is not.
    """
    layout = header.layout()
    if writable and layout.refuse_write is not None:
        raise UnsupportedFeature(layout.refuse_write)
    part = SparsePart(image, slot, start, length, layout)
    size = yield Length(slot)
    part.use_layout(layout, -(-size // SECTOR))
    yield from read_directories(part)
    if writable and layout.unclean and part.copy:
        from .repair import equalize

        yield from equalize(part)
    return part


def read_directories(part: SparsePart) -> Procedure:
    """Read both directories; one that is outside the file is that of the other's entries."""
    layout = part.layout
    length = layout.tables * 4
    found: list[array[int]] = []
    part.damage = None
    for sector, name in ((layout.directory, "gdOffset"), (layout.copy, "rgdOffset")):
        if name == "rgdOffset" and not sector:
            break
        if not length:
            found.append(zeros(32, 0))
        elif sector > 0 and sector + -(-length // SECTOR) <= part.space.end:
            (raw,) = yield Read(part.slot, [(sector * SECTOR, length)])
            found.append(little_endian_array(32, raw))
        else:
            part.damaged_field = name
            part.damage = f"the grain directory at sector {sector:#x} ({name}) is outside the file"
            found.append(zeros(32, 0))
    directory, copy = found[0], found[1] if len(found) > 1 else zeros(32, 0)
    if part.damage is not None and length:
        if not directory and not copy:
            raise MalformedImage(part.damage, field="gdOffset", offset=56)
        directory, copy = directory or copy, zeros(32, 0)
    part.use_directories(directory, copy)
