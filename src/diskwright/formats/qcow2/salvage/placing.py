"""Where tables belong that nothing names any more."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ....contract import Procedure, Progress
from ....ondisk import big_endian_array, zeros
from .. import header as hd
from ..machine.core import COPIED, OFFSET, PACKED, SLOT, ZERO_FLAG
from .evidence import Geometry, Seen, is_table, look

if TYPE_CHECKING:
    from .opening import Salvage

_BY_SNAPSHOT = "its L2 table was found in the file; a snapshot had one with the same clusters here"
_BY_ORDER = "its L2 table was found in the file, and its place is guessed from the order there"
_BY_ENTRIES = "its L2 table was found in the file, and its entries say where it belongs"
_BY_L1 = "its L1 table was found in the file"
_SAMPLE = 256
_MOST_KNOWN = 1 << 20
_MOST_ENTRIES = hd.MAX_L1_BYTES // 8


class Placer:
    """Puts loose tables into the L1 table of one image."""

    def __init__(self, salvage: Salvage) -> None:
        self.salvage = salvage
        self.image = salvage.image

    def run(self) -> Procedure:
        """Step 3 of :mod:`.opening`: every loose table where it belongs."""
        image, loose = self.image, self.salvage.loose
        tables: dict[int, Seen] = {}
        flat: dict[int, Seen] = tables
        geometry = image.geometry
        if geometry != geometry.of_l1:
            flat = {}
        for cluster in loose:
            seen = yield from self._look(cluster, geometry)
            if flat is not tables:
                flat[cluster] = yield from self._look(cluster, geometry.of_l1)
            if flat is tables or is_table(seen):
                tables[cluster] = seen
            yield Progress(0, 1)
        missing = not self.salvage.has_header or not any(image.l1) or bool(image.l1_lost)
        roots = self._roots(tables, flat) if missing else []
        if roots:
            yield from self._by_l1(roots)
        rest = self._unknown(tables, {cluster for run in roots for cluster in run})
        if image.external:
            rest = yield from self._by_entries(rest)
        rest = yield from self._by_snapshots(rest)
        yield from self._by_order(rest)
        if not self.salvage.has_header:
            yield from self._size()

    def _look(self, cluster: int, geometry: Geometry) -> Procedure:
        from .opening import read_some

        image = self.image
        data, _ = yield from read_some(SLOT, cluster << image.cluster_bits, image.cluster_size)
        return look(data, geometry)

    # -- an L1 table
    def _roots(self, tables: dict[int, Seen], flat: dict[int, Seen]) -> list[list[int]]:
        """Runs of clusters whose entries all name ``tables``: the best first.  ``flat``: what they
        would be as L1 tables."""
        bits = self.image.cluster_bits
        known = self.image.tables_at.used

        def is_root(seen: Seen) -> bool:
            return (
                bool(seen.targets)
                and not seen.packed
                and seen.copied == len(seen.targets)
                and len(seen.targets) == seen.good
                and not (seen.beyond and flat is not tables)
                and all(host >> bits in tables or known(host >> bits) for host in seen.targets)
            )

        runs: list[list[int]] = []
        for cluster in sorted(cluster for cluster, seen in flat.items() if is_root(seen)):
            if runs and runs[-1][-1] + 1 == cluster:
                runs[-1].append(cluster)
            else:
                runs.append([cluster])
        runs.sort(key=lambda run: -sum(len(flat[cluster].targets) for cluster in run))
        return runs

    def _by_l1(self, roots: list[list[int]]) -> Procedure:
        """Fill what is missing from the best L1 table that was found."""
        from .opening import read_some

        image, salvage = self.image, self.salvage
        bits = image.cluster_bits
        best = roots[0]
        at = best[0] << bits
        wanted = len(image.l1) if salvage.has_header else 0
        length = max(8 * wanted, len(best) << bits)
        raw, _ = yield from read_some(SLOT, at, min(length, hd.MAX_L1_BYTES, salvage.length - at))
        entries = big_endian_array(64, raw[: len(raw) & ~7])
        if not salvage.has_header:
            # Its end is where its last cluster ends: behind it nothing is a table of this one.
            entries = entries[: (len(best) << bits) // 8]
        salvage.say(f"An L1 table was found at {at:#x}")
        if len(image.l1) < len(entries) and not salvage.has_header:
            image.l1 = image.l1 + zeros(64, len(entries) - len(image.l1))
        unsure = len(roots) > 1
        for index, entry in enumerate(entries[: len(image.l1)]):
            host = entry & OFFSET
            if not entry or image.l1[index] or entry & ~(COPIED | OFFSET):
                continue
            if host & image.cluster_mask or host >= salvage.length:
                continue
            if image.tables_at.used(host >> bits):
                continue
            why = yield from salvage.take(index, host)
            if not why:
                image.l1_lost.drop(index)
                if unsure:
                    image.l1_guessed[index] = _BY_L1
        for cluster in best:
            image.marks.use(cluster, alone=False)
            image.metadata.use(cluster)

    # -- L2 tables
    def _unknown(self, tables: dict[int, Seen], roots: set[int]) -> list[int]:
        """Loose tables that are neither a copy of one in use nor data of another one."""
        image = self.image
        bits = image.cluster_bits
        left = {
            cluster: seen
            for cluster, seen in tables.items()
            if cluster not in roots and not image.marks.used(cluster)
        }
        inner: set[int] = set()
        for seen in left.values():
            inner.update(host >> bits for host in seen.targets if host >> bits in left)
        kept = []
        stale = 0
        for cluster, seen in sorted(left.items()):
            if cluster in inner:
                continue
            taken = any(image.marks.used(host >> bits) for host in seen.targets)
            if taken and not self.salvage.snapshots:
                # What it names belongs to others: it was replaced, or is of a disk in this disk.
                stale += 1
                continue
            kept.append(cluster)
        if stale:
            self.salvage.say(f"{stale} tables in the file name what others do, and were left out")
        return kept

    def _by_entries(self, rest: list[int]) -> Procedure:
        """Of a data file each entry tells where it belongs."""
        from .opening import read_some

        image = self.image
        left = []
        for cluster in rest:
            data, _ = yield from read_some(SLOT, cluster << image.cluster_bits, image.cluster_size)
            votes: Counter[int] = Counter()
            for index, entry in enumerate(big_endian_array(64, data)[:: image.stride]):
                if entry & COPIED:
                    guest = entry & OFFSET
                    if guest >> image.cluster_bits & image.l2_mask == index:
                        votes[guest >> image.l1_shift] += 1
            best = votes.most_common(1)
            if best and best[0][0] < len(image.l1) and not image.l1[best[0][0]]:
                yield from self._put(best[0][0], cluster, _BY_ENTRIES)
            elif not best:
                left.append(cluster)
            yield Progress(0, 1)
        return left

    def _by_snapshots(self, rest: list[int]) -> Procedure:
        """A table that was copied from a snapshot's still shares clusters with it, entry by
        entry."""
        if not self.salvage.snapshots or not rest:
            return rest
        from .opening import read_some

        image = self.image
        size, bits = image.cluster_size, image.cluster_bits
        left = []
        known: dict[int, int] = {}
        for entries in self.salvage.snapshots:
            for index, entry in enumerate(entries[: len(image.l1)]):
                if not entry or image.l1[index] or len(known) > _MOST_KNOWN:
                    continue
                data, _ = yield from read_some(SLOT, entry & OFFSET, size)
                for found in big_endian_array(64, data)[:: image.stride][:_SAMPLE]:
                    if found & OFFSET and not found & (PACKED | ZERO_FLAG):
                        known[found & OFFSET] = index
                yield Progress(index, len(image.l1))
        for cluster in rest:
            data, _ = yield from read_some(SLOT, cluster << bits, size)
            places = {
                known[entry & OFFSET]
                for entry in big_endian_array(64, data)[:: image.stride]
                if not entry & PACKED and entry & OFFSET in known
            }
            if len(places) == 1 and not image.l1[index := places.pop()]:
                yield from self._put(index, cluster, _BY_SNAPSHOT)
            elif not places:
                left.append(cluster)
        return left

    def _by_order(self, rest: list[int]) -> Procedure:
        """The tables of the disk mostly follow each other in the file as they do in the disk."""
        image = self.image
        if not rest:
            return
        if not self.salvage.has_header:
            used = max((index for index, entry in enumerate(image.l1) if entry), default=-1) + 1
            more = max(min(used + len(rest), _MOST_ENTRIES) - len(image.l1), 0)
            image.l1 = image.l1 + zeros(64, more)
        broken = [i for i in image.l1_lost if i < len(image.l1) and not image.l1[i]]
        empty = [i for i, entry in enumerate(image.l1) if not entry]
        places = broken if len(broken) >= len(rest) else empty
        for cluster, index in zip(rest, places, strict=False):
            yield from self._put(index, cluster, _BY_ORDER)
        if len(rest) > len(places):
            self.salvage.say(f"{len(rest) - len(places)} L2 tables were found and have no place")

    def _put(self, index: int, cluster: int, why: str) -> Procedure:
        image = self.image
        problem = yield from self.salvage.take(index, cluster << image.cluster_bits)
        if not problem:
            image.l1_lost.drop(index)
            image.l1_guessed[index] = why

    def _size(self) -> Procedure:
        """Without a header the disk ends with the last cluster that its tables name."""
        from .opening import read_some

        image = self.image
        last = max((index for index, entry in enumerate(image.l1) if entry), default=-1)
        image.l1 = image.l1[: last + 1]
        image.size = 0
        if last >= 0:
            data, _ = yield from read_some(SLOT, image.l1[last] & OFFSET, image.cluster_size)
            table = big_endian_array(64, data)
            end = max((index + 1 for index, entry in enumerate(table) if entry), default=1)
            image.size = (last << image.l1_shift) + (end << image.cluster_bits)
        image.header.size = image.size
        self.salvage.say(f"The size of the disk is lost, and taken for {image.size} bytes")
