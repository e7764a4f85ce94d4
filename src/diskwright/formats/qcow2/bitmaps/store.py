"""Storing bitmaps: bits, tables, directory, header, in an order that every crash survives.

What is stored of a bitmap that changed is marked as in use before any of it is written over.  New
clusters are counted before a table names them, tables before the directory does; the mark goes when
all of that is durable, and what is not needed any more is freed last.
"""

from __future__ import annotations

from array import array

from ....bitmaps import DirtyBitmap
from ....contract import Barrier, Length, MetaWrite, Procedure, Progress, Read, Table, Write
from ....errors import CorruptImage, NoSpace
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array, big_endian_bytes, zeros
from ...editing import ask, flush, unpin
from ..edit import announce
from ..machine.core import SLOT
from ..machine.runs import Run
from .directory import (
    ALL_ONES,
    AUTO,
    ENTRY_OFFSET,
    IN_USE,
    Entry,
    table_entries,
)
from .use import bad_entry

if TYPE_CHECKING:
    from ..format import Qcow2

_BATCH = 1 << 20
_SLICE = 4096


class Stored:
    """What one bitmap's storing came to: its new entry, and what its old one had for itself."""

    def __init__(self, entry: Entry, freed: list[Run]) -> None:
        self.entry = entry
        self.freed = freed


class Storing:
    """Stores the bits of bitmaps; ``taken`` goes back when there is no space."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.bits = image.cluster_bits
        self.size = image.cluster_size
        self.taken: list[Run] = []
        self.pins: list[Table] = []

    # -- host space
    def take(self, count: int) -> Procedure:
        """``count`` clusters, as a list of their numbers."""
        image = self.image
        chosen = yield from ask(image, lambda: image.choose(count), self.pins)
        image.take(chosen)
        self.taken += [(start, end) for start, end, _ in chosen]
        return [cluster for start, end, _ in chosen for cluster in range(start, end)]

    def take_region(self, length: int) -> Procedure:
        """Where ``length`` bytes in one run are."""
        image = self.image
        count = -(-length >> self.bits)
        start = yield from ask(image, lambda: image.take_region(count), self.pins)
        self.taken.append((start, start + count))
        return start << self.bits

    def give_back(self) -> Procedure:
        """Undo what was taken: nothing on disk names it."""
        for start, end in self.taken:
            yield from _counts(self.image, start, end, self.pins)
            self.image.give_back(start, end)
        self.taken.clear()
        yield from flush(self.image)

    # -- bits
    def store(self, bitmap: DirtyBitmap, old: Entry | None) -> Procedure:
        """Store what changed; returns Stored.  The bitmap is in use on disk, if it is there."""
        bits = bitmap.granularity.bit_length() - 1
        entry = Entry(bitmap.name.encode("utf-8", "surrogateescape"), bits)
        entry.flags = AUTO if bitmap.enabled else 0
        entry.table_size = table_entries(bitmap.size, bits, self.bits)
        freed: list[Run] = []
        if old is not None:
            entry.extra, entry.flags = old.extra, entry.flags | old.flags & ~(AUTO | IN_USE)
        fresh = old is None or bitmap.touched is None or old.table_size != entry.table_size
        if not fresh:
            assert old is not None and bitmap.touched is not None
            entry.table_offset = old.table_offset
            yield from self._add(bitmap, old)
        else:
            assert bitmap.loaded
            entry.table_offset = yield from self._write_all(bitmap, entry.table_size)
            if old is not None:
                freed = yield from held(self.image, old)
        return Stored(entry, freed)

    def _write_all(self, bitmap: DirtyBitmap, count: int) -> Procedure:
        """All bits into new clusters and a new table; returns its offset."""
        table = zeros(64, count)
        shift = self.bits + 3
        whole = b"\xff" * self.size
        pending: list[tuple[int, bytes]] = []
        for index in bitmap.bits.groups(shift):
            data = bitmap.bits.data(index << self.bits, self.size)
            if data == whole:
                table[index] = ALL_ONES
            elif data.count(0) < len(data):
                pending.append((index, data))
                if len(pending) << self.bits >= _BATCH:
                    yield from self._write_new(table, pending)
                    yield Progress(index, count)
        if pending:
            yield from self._write_new(table, pending)
        offset: int = yield from self.take_region(8 * count)
        for start in range(0, count, _BATCH >> 3):
            data = big_endian_bytes(table, start, start + (_BATCH >> 3))
            if start + (_BATCH >> 3) >= count:
                data = data.ljust(-(-len(data) >> self.bits) << self.bits, b"\0")
            yield Write([MetaWrite(SLOT, offset + 8 * start, data)])
        yield from flush(self.image)
        return offset

    def _write_new(self, table: array[int], pending: list[tuple[int, bytes]]) -> Procedure:
        clusters = yield from self.take(len(pending))
        writes = []
        for (index, data), cluster in zip(pending, clusters, strict=True):
            table[index] = cluster << self.bits
            writes.append(MetaWrite(SLOT, cluster << self.bits, data))
        pending.clear()
        yield Write(writes)

    def _add(self, bitmap: DirtyBitmap, old: Entry) -> Procedure:
        """Add the bits that were set since to what is there, in its place."""
        assert bitmap.touched is not None
        shift = self.bits + 3
        groups = bitmap.GROUP.bit_length() - 1
        indexes: set[int] = set()
        for group in bitmap.touched:
            if shift >= groups:
                indexes.add(group >> shift - groups)
            else:
                first = group << groups - shift
                indexes.update(range(first, min(first + (1 << groups - shift), old.table_size)))
        by_slice: dict[int, list[int]] = {}
        for index in sorted(indexes):
            by_slice.setdefault(index // _SLICE, []).append(index)
        length = yield Length(SLOT)
        end = -(-length >> self.bits) << self.bits
        first, stop = old.table_offset, old.table_offset + 8 * old.table_size
        if stop > end or any(map(self.image.is_metadata, range(first, stop, self.size))):
            raise CorruptImage(
                f"Bitmap '{bitmap.name}': its table is where none can be",
                field="bitmap table",
                offset=first,
            )
        for number, members in by_slice.items():
            yield from self._add_slice(bitmap, old, number * _SLICE, members, length)

    def _add_slice(
        self, bitmap: DirtyBitmap, old: Entry, start: int, members: list[int], length: int
    ) -> Procedure:
        at = old.table_offset + 8 * start
        (raw,) = yield Read(SLOT, [(at, 8 * min(_SLICE, old.table_size - start))])
        table = big_endian_array(64, raw)
        new: list[int] = []
        step = max(1, _BATCH >> self.bits)
        there: list[tuple[int, int]] = []
        for index in members:
            value = table[index - start]
            host = value & ENTRY_OFFSET
            if value == ALL_ONES:
                continue
            if not value:
                new.append(index)
            elif value != host or host & self.size - 1 or host + self.size > -(
                -length >> self.bits
            ) << self.bits or self.image.is_metadata(host):
                raise bad_entry(bitmap, index, value)
            else:
                there.append((index, host))
        for i in range(0, len(there), step):
            parts = there[i : i + step]
            datas = yield Read(SLOT, [(host, self.size) for _, host in parts])
            writes = []
            for (index, host), data in zip(parts, datas, strict=True):
                more = bitmap.bits.data(index << self.bits, self.size)
                both = int.from_bytes(data, "little") | int.from_bytes(more, "little")
                writes.append(MetaWrite(SLOT, host, both.to_bytes(self.size, "little")))
            yield Write(writes)
            yield Progress(index, old.table_size)
        changed: dict[int, int] = {}
        for i in range(0, len(new), step):
            pairs = [(j, bitmap.bits.data(j << self.bits, self.size)) for j in new[i : i + step]]
            pairs = [pair for pair in pairs if pair[1].count(0) < self.size]
            if pairs:
                names = [index - start for index, _ in pairs]
                local = [(index - start, data) for index, data in pairs]
                yield from self._write_new(table, local)
                changed.update((name, table[name]) for name in names)
            yield Progress(new[i], old.table_size)
        if changed:
            yield from flush(self.image)  # counted before the table names them
            first, stop = min(changed), max(changed) + 1
            yield Write([MetaWrite(SLOT, at + 8 * first, big_endian_bytes(table, first, stop))])
            yield Barrier()
            self.taken.clear()


def held(image: Qcow2, entry: Entry) -> Procedure:
    """The clusters that a bitmap has for itself: those of its table and those that this names.
    What cannot be right is left out; a leak is better."""
    bits, length = image.cluster_bits, (yield Length(SLOT))
    end = -(-length >> bits)
    out: list[Run] = []

    def add(first: int, stop: int) -> None:
        if stop <= end and not any(image.is_metadata(c << bits) for c in range(first, stop)):
            if out and out[-1][1] == first:
                out[-1] = (out[-1][0], stop)
            else:
                out.append((first, stop))

    for start in range(0, entry.table_size, _SLICE):
        count = min(_SLICE, entry.table_size - start)
        (raw,) = yield Read(SLOT, [(entry.table_offset + 8 * start, 8 * count)])
        for value in big_endian_array(64, raw):
            host = value & ENTRY_OFFSET
            if host and value == host and not host & image.cluster_mask:
                add(host >> bits, (host >> bits) + 1)
        yield Progress(start, entry.table_size)
    first = entry.table_offset >> bits
    add(first, first + (-(-8 * entry.table_size >> bits)))
    return out


def _counts(image: Qcow2, start: int, end: int, pins: list[Table]) -> Procedure:
    """Have the counts of clusters [start, end) in memory."""
    return ask(image, lambda: image.missing_blocks([(start, end)]), pins)


def free(image: Qcow2, runs: list[Run], pins: list[Table]) -> Procedure:
    """Give clusters back that nothing on disk names any more."""
    for start, end in runs:
        try:
            yield from _counts(image, start, end, pins)
        except CorruptImage:
            continue  # counted nowhere, so there is nothing to give back
        image.free_later(start, end)
    yield from flush(image)


def store_bitmaps(image: Qcow2) -> Procedure:
    """Bring all persistent bitmaps to the disk, as they are now, with nothing else running.

    Afterwards no bitmap is marked as in use but those that were when the image was opened, and the
    next write marks them again.  Raises NoSpace, with all as it was (and in use); CorruptImage for
    a bitmap whose table is damaged, which stays in use, once all others are stored.
    """
    from .switch import Switch

    directory = image.directory
    if not image.writable or image.refuse_write or image.broken:
        return
    switch = Switch(image)
    if not switch.needed():
        return
    yield from announce(image)
    yield from switch.begin()
    storing = Storing(image)
    failed: CorruptImage | None = None
    freed: list[Run] = []
    try:
        for bitmap in image.bitmaps:
            old = directory.entries.get(bitmap.name) if directory is not None else None
            if not bitmap.persistent or bitmap.inconsistent or not switch.stale(bitmap, old):
                continue
            try:
                stored: Stored = yield from storing.store(bitmap, old)
            except CorruptImage as error:
                failed = failed or error
                bitmap.inconsistent = True
                image.bitmaps.refresh()
                continue
            switch.fresh[bitmap.name] = stored.entry
            freed += stored.freed
        freed += yield from switch.run(storing)
    except NoSpace:
        yield from storing.give_back()
        raise
    finally:
        unpin(storing.pins)
    pins: list[Table] = []
    yield from free(image, freed, pins)
    unpin(pins)
    if failed is not None:
        raise failed

