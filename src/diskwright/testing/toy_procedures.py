"""The procedures of the toy format: open, snapshots, withdrawal of the modified flag, check."""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Generator
from typing import Any

from ..contract import Barrier, MetaWrite, Procedure, Quiesce, Read, Request, TableStore, Write
from ..errors import MalformedImage
from ..records import NamedTuple

CLUSTER = 256
ENTRIES = 8
COUNTS = 32
COPIED = 1 << 63
OFFSET = (1 << 62) - CLUSTER

_Map = dict[int, "array[int]"]
_Maps = Generator[Request, Any, _Map]


class ToyCheck(NamedTuple):
    """What `check` found: corruptions as text, leaked clusters."""

    corruptions: list[str]
    leaks: list[int]


def _u64(data: bytes) -> array[int]:
    return array("Q", data)


class ToyProcedures:
    """Mixed into :class:`~diskwright.testing.toy.Toy`."""

    size: int
    limit: int
    modified: bool
    ready: bool
    tables: TableStore
    snapshots: list[int]
    l1: array[int]
    directory: array[int]
    l1_dirty: bool
    directory_dirty: bool
    free: set[int]
    next: int
    dropped: list[int]
    owed: dict[int, int]

    def head(self, modified: bool) -> bytes:
        """The header's bytes with this flag."""
        return struct.pack("<4sxxxxQQ", b"TOYC", self.size, modified)

    def open(self) -> Procedure:
        """Read the roots; returns the format."""
        head, l1, directory = yield Read(
            "file", [(0, CLUSTER), (CLUSTER, CLUSTER), (2 * CLUSTER, CLUSTER)]
        )
        magic, self.size, flag = struct.unpack_from("<4sxxxxQQ", head)
        if magic != b"TOYC" or flag > 1:
            raise MalformedImage("not a toy image", field="magic", offset=0)
        self.modified = self.ready = bool(flag)
        self.snapshots = list(struct.unpack_from("<4Q", head, 64))
        self.l1, self.directory = _u64(l1), _u64(directory)
        self.l1_dirty = self.directory_dirty = False
        self.free, self.dropped, self.owed = set(), [], {}
        counts = yield from self._counts()
        used = [i * COUNTS + j for i, block in counts.items() for j, n in enumerate(block) if n]
        self.next = max(used, default=3) + 1
        return self

    def _counts(self) -> _Maps:
        """The refcount blocks on disk, less what is owed, by index."""
        blocks: _Map = {}
        for i, offset in enumerate(self.directory):
            if offset:
                (data,) = yield Read("file", [(offset, COUNTS * 2)])
                blocks[i] = array("H", data)
        return blocks

    def _maps(self, l1: array[int]) -> _Maps:
        """All L2 tables of an L1, by offset."""
        tables: _Map = {}
        for entry in l1:
            offset = entry & OFFSET
            if offset and offset not in tables:
                (data,) = yield Read("file", [(offset, ENTRIES * 8)])
                tables[offset] = _u64(data)
        return tables

    def _write_counts(self, blocks: _Map) -> Write:
        return Write(
            [
                MetaWrite("file", self.directory[i], block.tobytes(), "refblock")
                for i, block in blocks.items()
            ]
        )

    def _pay(self, blocks: _Map) -> list[int]:
        """Take off what is owed; the clusters that nobody uses now."""
        unused = []
        for cluster, number in self.owed.items():
            blocks[cluster // COUNTS][cluster % COUNTS] -= number
            if not blocks[cluster // COUNTS][cluster % COUNTS]:
                unused.append(cluster)
        return unused

    def _snapshot_table(self) -> Write:
        data = struct.pack("<4Q", *self.snapshots)
        return Write([MetaWrite("file", 64, data, "snapshot")])

    def snapshot(self) -> Procedure:
        """Keep the disk as it is now; the slot, or None when there is no room.

        Clear COPIED, barrier, raise the counts and write the L1 copy, barrier, snapshot table.
        """
        if all(self.snapshots):
            return None
        yield Quiesce()
        blocks = yield from self._counts()
        maps = yield from self._maps(self.l1)
        unused = self._pay(blocks)
        own = min(self.free, default=self.next)
        if own >= self.limit or not self.directory[own // COUNTS]:
            return None
        self.free.update(unused)
        self.owed.clear()
        self.free.discard(own)
        self.next = max(self.next, own + 1)
        clearing = []
        for offset, table in maps.items():
            blocks[offset // CLUSTER // COUNTS][offset // CLUSTER % COUNTS] += 1
            for i, entry in enumerate(table):
                host = (entry & OFFSET) // CLUSTER
                if host:
                    blocks[host // COUNTS][host % COUNTS] += 1
                table[i] = entry & ~COPIED
            clearing.append(MetaWrite("file", offset, table.tobytes(), "l2_update"))
        self.l1 = array("Q", [entry & ~COPIED for entry in self.l1])
        clearing.append(MetaWrite("file", CLUSTER, self.l1.tobytes(), "l1_update"))
        yield Write(clearing)
        yield Barrier()
        blocks[own // COUNTS][own % COUNTS] += 1
        raising = self._write_counts(blocks)
        copy = MetaWrite("file", own * CLUSTER, self.l1.tobytes(), "snapshot")
        yield Write([*raising.writes, copy])
        yield Barrier()
        slot = self.snapshots.index(0)
        self.snapshots[slot] = own * CLUSTER
        yield self._snapshot_table()
        yield Barrier()
        return slot

    def delete_snapshot(self, slot: int) -> Procedure:
        """The reverse: table, barrier, counts, barrier, COPIED where the count is one again."""
        yield Quiesce()
        blocks = yield from self._counts()
        place = self.snapshots[slot]
        (data,) = yield Read("file", [(place, CLUSTER)])
        maps = yield from self._maps(_u64(data))
        now = yield from self._maps(self.l1)
        unused = self._pay(blocks)
        self.owed.clear()
        self.snapshots[slot] = 0
        yield self._snapshot_table()
        yield Barrier()
        lost = [place // CLUSTER]
        for offset, table in maps.items():
            lost.append(offset // CLUSTER)
            lost += [(e & OFFSET) // CLUSTER for e in table if e & OFFSET]
        for cluster in lost:
            blocks[cluster // COUNTS][cluster % COUNTS] -= 1
            if not blocks[cluster // COUNTS][cluster % COUNTS]:
                unused.append(cluster)
        yield self._write_counts(blocks)
        yield Barrier()

        def once(offset: int) -> bool:
            return blocks[offset // CLUSTER // COUNTS][offset // CLUSTER % COUNTS] == 1

        writes = []
        for i, entry in enumerate(self.l1):
            offset = entry & OFFSET
            if offset and once(offset):
                self.l1[i] = offset | COPIED
                table = now[offset]
                for j, e in enumerate(table):
                    if e & OFFSET and once(e & OFFSET):
                        table[j] = e | COPIED
                writes.append(MetaWrite("file", offset, table.tobytes(), "l2_update"))
        writes.append(MetaWrite("file", CLUSTER, self.l1.tobytes(), "l1_update"))
        yield Write(writes)
        yield Barrier()
        self.free.update(unused)
        return slot

    def withdraw(self) -> Procedure:
        """Say on disk that the image is as it was left; whatever writes next must say otherwise
        first, so that is arranged before the header goes out."""
        self.ready = self.modified = False
        yield Write([MetaWrite("file", 0, self.head(modified=False), "header_update")])
        yield Barrier()
        return True

    def close(self) -> Procedure | None:
        """Pay what is owed, so that a clean end leaves no leaks."""
        return self._settle_up() if self.owed else None

    def _settle_up(self) -> Procedure:
        blocks = yield from self._counts()
        self._pay(blocks)
        self.owed.clear()
        yield self._write_counts(blocks)
        yield Barrier()

    def check(self) -> Procedure:
        """Recount everything on disk; returns a :class:`ToyCheck`."""
        yield from self.open()
        blocks = yield from self._counts()
        found: Counter[int] = Counter([0, 1, 2])
        found.update(offset // CLUSTER for offset in self.directory if offset)
        corruptions: list[str] = []
        copied: set[int] = set()
        roots = [self.l1]
        for place in self.snapshots:
            if place:
                found[place // CLUSTER] += 1
                (data,) = yield Read("file", [(place, CLUSTER)])
                roots.append(_u64(data))
        for number, root in enumerate(roots):
            maps = yield from self._maps(root)
            here: Counter[int] = Counter()
            for entry in root:
                if not entry & OFFSET:
                    continue
                entries = [entry, *maps[entry & OFFSET]]
                here.update((e & OFFSET) // CLUSTER for e in entries if e & OFFSET)
                if not number:
                    copied |= {(e & OFFSET) // CLUSTER for e in entries if e & COPIED}
            corruptions += [f"cluster {c} used {n} times" for c, n in here.items() if n > 1]
            found += here
        counted = {
            i * COUNTS + j: n for i, block in blocks.items() for j, n in enumerate(block) if n
        }
        for cluster, number in found.items():
            if counted.get(cluster, 0) < number:
                corruptions.append(
                    f"cluster {cluster}: {number} references, count {counted.get(cluster, 0)}"
                )
        for cluster in copied - {0}:
            if counted.get(cluster, 0) != 1:
                corruptions.append(f"cluster {cluster} is COPIED, count {counted.get(cluster, 0)}")
        leaks = [c for c, n in counted.items() if n > found.get(c, 0)]
        return ToyCheck(corruptions, leaks)
