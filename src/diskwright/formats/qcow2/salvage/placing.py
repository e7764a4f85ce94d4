"""Where tables belong that nothing names any more."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from ....contract import Length, Procedure, Progress
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array, zeros
from .. import header as hd
from ..check.scan import Run, pieces
from ..machine.core import COPIED, DATA_SLOT, OFFSET, PACKED, SLOT, ZERO_FLAG
from .evidence import Seen
from .reading import read_some

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
        image, found = self.image, self.salvage.found
        missing = not self.salvage.has_header or not any(image.l1) or bool(image.l1_lost)
        roots = self._roots(found.tables, found.roots) if missing else []
        if roots:
            yield from self._by_l1(roots)
        rest = self._unknown(found.tables, {cluster for run in roots for cluster in run})
        if image.external:
            rest = yield from self._by_entries(rest)
        rest = yield from self._by_snapshots(rest)
        yield from self._by_order(rest)
        if not self.salvage.sized:
            yield from self._size()

    # -- an L1 table
    def _roots(self, tables: dict[int, Seen], flat: dict[int, Seen]) -> list[list[int]]:
        """Runs of clusters whose entries all name ``tables``: the best first.  ``flat``: what they
        would be as L1 tables."""
        known = self.image.tables_at.used

        def is_root(seen: Seen) -> bool:
            return (
                bool(seen.named)
                and not seen.packed
                and seen.copied == seen.named == seen.good
                and not (seen.beyond and flat is not tables)
                and all(cluster in tables or known(cluster) for cluster in seen.clusters())
            )

        runs: list[list[int]] = []
        for cluster in sorted(cluster for cluster, seen in flat.items() if is_root(seen)):
            if runs and runs[-1][-1] + 1 == cluster:
                runs[-1].append(cluster)
            else:
                runs.append([cluster])
        runs.sort(key=lambda run: -sum(flat[cluster].named for cluster in run))
        return runs

    def _by_l1(self, roots: list[list[int]]) -> Procedure:
        """Fill what is missing from the best L1 table that was found."""
        image, salvage = self.image, self.salvage
        bits = image.cluster_bits
        best = roots[0]
        at = best[0] << bits
        wanted = len(image.l1) if salvage.sized else 0
        length = max(8 * wanted, len(best) << bits)
        raw, _ = yield from read_some(SLOT, at, min(length, hd.MAX_L1_BYTES, salvage.length - at))
        entries = big_endian_array(64, raw[: len(raw) & ~7])
        if not salvage.sized:
            # Its end is where its last cluster ends: behind it nothing is a table of this one.
            entries = entries[: (len(best) << bits) // 8]
        salvage.say(f"An L1 table was found at {at:#x}")
        if len(image.l1) < len(entries) and not salvage.sized:
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
        left = {
            cluster: seen
            for cluster, seen in tables.items()
            if cluster not in roots and not image.marks.used(cluster)
        }
        order = sorted(left)
        inner: set[int] = set()
        for seen in left.values():
            for first, stop in seen.pairs():
                inner.update(order[bisect_left(order, first) : bisect_left(order, stop)])
        kept = []
        stale = 0
        for cluster in order:
            if cluster in inner:
                continue
            taken = any(image.marks.any(first, stop) for first, stop in left[cluster].pairs())
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
        image = self.image
        left = []
        for cluster in rest:
            data, _ = yield from read_some(SLOT, cluster << image.cluster_bits, image.cluster_size)
            votes = self._places(data)
            best = votes.most_common(1)
            if not best:
                left.append(cluster)
                continue
            index = best[0][0]
            if not self.salvage.sized and len(image.l1) <= index < _MOST_ENTRIES:
                image.l1 = image.l1 + zeros(64, index + 1 - len(image.l1))
            if index < len(image.l1) and not image.l1[index]:
                yield from self._put(index, cluster, _BY_ENTRIES)
            yield Progress(0, 1)
        return left

    def _places(self, data: bytes) -> Counter[int]:
        """For which L1 entries the entries of a table speak, each by its place in the data file."""
        image = self.image
        votes: Counter[int] = Counter()
        for piece in pieces(data, image.cluster_size, image.stride == 2):
            if isinstance(piece, Run):
                base = (piece.entry & OFFSET) - (piece.at << image.cluster_bits)
                if piece.entry & COPIED and not base & (1 << image.l1_shift) - 1:
                    votes[base >> image.l1_shift] += piece.length
                continue
            for index, entry in enumerate(piece.entries, piece.at):
                guest = entry & OFFSET
                if entry & COPIED and guest >> image.cluster_bits & image.l2_mask == index:
                    votes[guest >> image.l1_shift] += 1
        return votes

    def _by_snapshots(self, rest: list[int]) -> Procedure:
        """A table that was copied from a snapshot's still shares clusters with it, entry by
        entry."""
        if not self.salvage.snapshots or not rest:
            return rest
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
        if not self.salvage.sized:
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
        """Without a header the disk ends with the last cluster that its tables name, or with its
        data file."""
        image = self.image
        last = max((index for index, entry in enumerate(image.l1) if entry), default=-1)
        image.l1 = image.l1[: last + 1]
        image.size = 0
        if last >= 0:
            data, _ = yield from read_some(SLOT, image.l1[last] & OFFSET, image.cluster_size)
            used = [index for index, entry in enumerate(big_endian_array(64, data)) if entry]
            end = max(used, default=0) // image.stride + 1
            image.size = (last << image.l1_shift) + (end << image.cluster_bits)
        if image.external:
            length = yield Length(DATA_SLOT)
            if image.size < length <= hd.MAX_L1_BYTES // 8 << image.l1_shift:
                image.size = length
                image.l1 = image.l1 + zeros(64, -(-length >> image.l1_shift) - len(image.l1))
        image.header.size = image.size
        self.salvage.say(f"The size of the disk is lost, and taken for {image.size} bytes")
