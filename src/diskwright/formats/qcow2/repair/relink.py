"""Mending the entries of L1 and L2 tables: every table and every guest cluster in a place of its
own.

What lies over a table or is one twice comes apart first, all at once (:mod:`.apart`).  Then each L2
table is mended where it is: what lies over other guest clusters gets a copy behind the end of the
file, durable and counted before an entry names it.  An entry that names a place outside the file
reads as zeroes, and so it does afterwards.
"""

from __future__ import annotations

from array import array

from ....contract import Procedure, Progress
from ..machine.core import OFFSET, PACKED
from ..machine.submapping import ALL
from .apart import ACTIVE, Apart, Link, Use
from .entrymending import FULL_ZEROES, ZEROES
from .mending import write_entries

_SLICE = 4096


class Relinker(Apart):
    """One pass over all tables, with counts that can be relied on; ``found``: the walk before.

    Without snapshots every guest cluster gets a host cluster of its own, which only compressed
    ones may share, if a count can say it.  With them a cluster may be shared, as its count and its
    flags will say, and only what lies over metadata is copied.

    What LUKS encrypts reads as something else elsewhere, so there no guest cluster is copied:
    clusters are shared, tables give way to guest clusters, and an entry that names metadata, which
    read as noise, becomes a zero cluster.
    """

    def run(self) -> Procedure:
        """Mend all entries."""
        uses: list[Use] = yield from self.part()
        for done, use in enumerate(uses):
            yield from self._mend_table(use)
            yield Progress(done, len(uses))

    def _mend_table(self, use: Use) -> Procedure:
        """Mend the entries of one L2 table, in its place."""
        place = use.place
        table = yield from self._read_table(place)
        changed: list[int] = []
        sources: list[Link] = []
        if self.external:
            base = use.l1_index * self.span
            for start in range(0, len(table), _SLICE):
                stop = min(start + _SLICE, len(table))
                self.changed_external(table, place, base, (start, stop), changed)
                yield Progress(start, len(table))
        else:
            for span in self.spans(table, self.claim_run):
                self._look(table, place, span, changed, sources)
                yield Progress(span.start, len(table))
        if changed and use.root == ACTIVE:
            yield from self._mark(use, changed)
        if sources:
            yield from self._give_places(table, sources, use.times)
            changed += (link.at for link in sources)
        yield from write_entries(place, table, changed, "l2_update")

    def _mark(self, use: Use, words: list[int]) -> Procedure:
        """What these words of its table map may read as something else."""
        base = use.l1_index * self.span
        indexes = sorted({word // self.stride for word in words})
        start = 0
        for at, index in enumerate(indexes, 1):
            if at == len(indexes) or indexes[at] != index + 1:
                first = base + (indexes[start] << self.bits)
                yield from self.marker.mark(first, base + (index + 1 << self.bits))
                start = at

    def _look(
        self,
        table: array[int],
        place: int,
        span: range,
        changed: list[int],
        sources: list[Link],
    ) -> None:
        claims = self.claims
        for index in span:
            entry = table[index]
            if self.stride == 2:
                self._mend_bitmap(table, index, changed)
            if not entry or self._first_host(entry) in self.fresh:
                continue
            kind, new = self._packed_entry(entry) if entry & PACKED else self._entry(entry)
            if kind == ZEROES:
                sources.append(Link(index, 0, 0))
                continue
            host, stop = self.image.hosts_of(new)
            stop = min(stop, self.end)
            taken = self._crowded(host, stop)
            if host and not new & PACKED:
                taken = (taken and not self.fixed) or bool(claims.get(host))
                if not taken and not self.sharing:
                    claims.add(host)
            if taken and (new & self.zero or self.fixed):
                new = self.zero
            elif taken:
                sources.append(Link(index, host, stop))
                continue
            if new != entry:
                self._say(f"L2 entry {index} at {place:#x}", entry, new)
                table[index] = new
                changed.append(index)
                if self.stride == 2 and not new & OFFSET:
                    # What was at a place that is none reads as zeroes.
                    bitmap = ALL if entry & PACKED else table[index + 1]
                    table[index + 1] = (bitmap | bitmap << 32) & FULL_ZEROES
                    changed.append(index + 1)

    def _first_host(self, entry: int) -> int:
        """The first host cluster that an entry names."""
        if entry & PACKED:
            return self.image.packed_range(entry)[0] >> self.bits
        return (entry & OFFSET) >> self.bits
