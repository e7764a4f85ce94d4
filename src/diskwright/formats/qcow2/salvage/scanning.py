"""Looking at every cluster of a file that nothing names."""

from __future__ import annotations

from array import array

from ....contract import DataRanges, Procedure, Progress
from ....hints import TYPE_CHECKING
from ..machine.core import SLOT
from .evidence import Seen, is_table, look, may_be_counts, may_be_table
from .marks import Marks
from .reading import read_some

if TYPE_CHECKING:
    from .opening import Salvage

_WINDOW = 1 << 20
_LOOK = 1 << 30
_MOST_ORPHANS = 1 << 22
_MOST_WORDS = 1 << 24
_LUKS = b"LUKS\xba\xbe\0\1"
_MOST_KEYS = 256


class Scan:
    """What was found, in the order of the file."""

    def __init__(self) -> None:
        self.tables: dict[int, Seen] = {}
        """Clusters that look like L2 tables."""
        self.roots: dict[int, Seen] = {}
        """Clusters that look like parts of L1 tables; the same ones where both look alike."""
        self.plain: dict[int, Seen] = {}
        """Clusters that have the looks of a refcount table, where none is known."""
        self.counts = Marks(16 << 20)
        """Clusters that look like blocks of reference counts, where no table tells which are."""
        self.orphans = array("Q")
        """Clusters with contents."""
        self.keys: list[int] = []
        """Clusters that begin with a LUKS header."""
        self._words = 0
        """What is kept of tables, in words: bounded."""

    @property
    def full(self) -> bool:
        """More was found than is kept."""
        return self._words >= _MOST_WORDS or len(self.orphans) >= _MOST_ORPHANS

    def run(self, salvage: Salvage) -> Procedure:
        """Go through the data of the file, in its order."""
        self.salvage = salvage
        bits, length = salvage.image.cluster_bits, salvage.length
        used = salvage.image.marks.used
        step = max(_WINDOW, 1 << bits)
        last = 0
        for offset in range(0, length, _LOOK):
            ranges = yield DataRanges(SLOT, offset, min(_LOOK, length - offset))
            for start, count in ranges:
                for at in range(max(start - start % step, last), start + count, step):
                    last = at + step
                    clusters = range(at >> bits, min(last, length) >> bits)
                    wanted = [cluster for cluster in clusters if not used(cluster)]
                    if wanted:
                        yield from self._read(wanted, bits)
                    yield Progress(at, length)
        del self.salvage

    def _read(self, clusters: list[int], bits: int) -> Procedure:
        first = clusters[0]
        length = clusters[-1] + 1 - first << bits
        data, _ = yield from read_some(SLOT, first << bits, length)
        for cluster in clusters:
            at = cluster - first << bits
            part = data[at : at + (1 << bits)]
            if part.count(0) < len(part):
                self._look(cluster, part)

    def _look(self, cluster: int, part: bytes) -> None:
        counted = self.salvage.has_counts
        if not counted and may_be_counts(part):
            self.counts.use(cluster)
            return
        if len(self.orphans) < _MOST_ORPHANS:
            self.orphans.append(cluster)
        if part.startswith(_LUKS) and len(self.keys) < _MOST_KEYS:
            self.keys.append(cluster)
        if self._words >= _MOST_WORDS:
            return
        geometry = self.salvage.image.geometry
        flagless = not counted and part[::8].count(0) << 3 == len(part)
        seen = None
        if flagless or may_be_table(part, geometry.stride):
            seen = look(part, geometry)
            if flagless and seen.named and not (seen.bad or seen.packed):
                self._keep(self.plain, cluster, seen)
                return
            if is_table(seen):
                self._keep(self.tables, cluster, seen)
        # What may be an L1 table, whatever L2 tables are like.
        if geometry == geometry.of_l1:
            self.roots = self.tables
        elif may_be_table(part):
            seen = look(part, geometry.of_l1)
            if is_table(seen):
                self._keep(self.roots, cluster, seen)

    def _keep(self, found: dict[int, Seen], cluster: int, seen: Seen) -> None:
        found[cluster] = seen
        self._words += len(seen.runs) + 64
