"""Repairing a qcow2 image in the way that loses least.

Nothing that can be read is overwritten or given away: what lies over something else gets a copy,
and all new space is behind the end of the file.  A loss of power between two writes leaves an image
that reads as before and can be repaired again; in version 3 the dirty bit stands for the counts
until all is done.  The order is

1. counts that are too low are lifted; where the refcount structure itself is damaged, a new one is
   written first, and the header switches to it;
2. what lies over tables comes apart (:mod:`.apart`), then entries are mended (:mod:`.relink`);
3. counts that are too high are lowered, and flags;
4. the dirty and the corrupt bit are cleared.
"""

from __future__ import annotations

from ....contract import Barrier, MetaWrite, Procedure, Progress, Quiesce, Write
from ....findings import CheckResult
from ....hints import TYPE_CHECKING
from .. import header as hd
from ..bitmaps.mend import mend_bitmaps
from ..check.meter import Meter
from ..check.references import Structures, uncovered
from ..machine.core import SLOT
from .mending import Mender
from .rebuild import renew
from .relink import Relinker

if TYPE_CHECKING:
    from ..format import Qcow2

# How far behind the end of the file, in clusters, an entry may name a place that is kept free: it
# reads as zeroes until it is mended.
_NEAR = 1 << 16


class Surveyor(Mender):
    """A mender that knows what entries name behind the end of the file."""

    beyond = 0

    def add_region(self, offset: int, length: int, times: int = 1) -> bool:
        """See `Walker`."""
        inside = super().add_region(offset, length, times)
        last = (offset + length - 1) >> self.bits
        if not inside and last < self.file_clusters + _NEAR:
            self.beyond = max(self.beyond, last + 1)
        return inside

    def overlaid(self) -> Procedure:
        """Whether something else lies over metadata.  No count makes that right, for tables are
        written in place."""
        if not self.counts.shared:
            return False
        structures = Structures(self.image, self.meter)
        yield from structures.walk(refcounts=False)
        for start, stop in structures.counts.used(0, self.file_clusters):
            if any(self.counts.get(cluster) > 1 for cluster in range(start, stop)):
                return True
            yield Progress(start, self.file_clusters)
        return any(
            self.counts.get(table >> self.bits)
            > self.inactive.get(table, 0) + (table in self.active)
            for table in {**self.active, **self.inactive}
        )


class Repairer:
    """One repair; ``everything``: not only leaks."""

    def __init__(self, image: Qcow2, everything: bool) -> None:
        self.image = image
        self.header = image.header
        self.everything = everything
        self.covered = not uncovered(image)
        self.begun = False
        self.meter = Meter()

    def run(self) -> Procedure:
        """Returns the CheckResult."""
        return (yield from self.meter.run(self._whole()))

    def _whole(self) -> Procedure:
        dropped: list[str] = []
        if self.everything and not self.covered:
            dropped = yield from self._drop_snapshots()
        result: CheckResult = yield from self._run()
        for text in dropped:
            result.corruptions_fixed += 1
            result.say(f"Repairing snapshot table: {text}")
        return result

    def _drop_snapshots(self) -> Procedure:
        """Space behind a device's end is none that reads as zeroes: there it stays as it is."""
        if not self.image.options.get("zero_beyond_end", True):
            return []
        from .dropping import drop_snapshots

        survey = Surveyor(self.image, self.meter, self._begin)
        yield from survey.walk()
        yield from self._begin()
        start = max(survey.file_clusters, survey.beyond)
        del survey
        dropped: list[str] = yield from drop_snapshots(self.image, start)
        yield Quiesce()
        self.covered = not uncovered(self.image)
        self.begun = False
        return dropped

    def _run(self) -> Procedure:
        found = Surveyor(self.image, self.meter, self._begin)
        result = found.result
        result.uncovered = uncovered(self.image)
        yield from found.walk()
        pointers = bool(result.corruptions) or (yield from found.overlaid())
        renewed = self.everything and self.covered and (found.unsound or found.countless())
        found.lower = not (self.everything and (pointers or renewed))
        found.lift = self.everything and not (found.unsound or renewed)
        found.all_flags = self.everything
        yield from found.compare()
        if self.everything and self.covered and (renewed or pointers or found.crossed):
            yield from self._rework(found, renewed)
        elif found.uncopied or found.counts.shared or result.findings:
            yield from found.check_copied()
        if self.covered and not (result.corruptions or result.leaks):
            yield from self._finish()
        return result

    def _rework(self, found: Surveyor, renewed: bool) -> Procedure:
        """Mend what is more than counts and flags, then look once more."""
        yield from self._begin()
        image, result = self.image, found.result
        files = image.options.get("zero_beyond_end", True)
        start = max(found.file_clusters, found.beyond) if files else 0
        if renewed:
            result.say("Rebuilding refcount structure")
            counts = Surveyor(image, self.meter, self._begin)
            yield from counts.walk(refcounts=False)
            yield from renew(image, counts.counts, found.file_clusters, start)
            del counts
        bitmaps = yield from mend_bitmaps(image, found)
        yield Quiesce()
        image.reserve_structures()
        image.cursor = max(start, found.counts.end)
        image.fresh = max(image.fresh, image.cursor)
        relinker = Relinker(image, found)
        yield from relinker.run()
        yield Quiesce()
        last = Mender(image, self.meter, self._begin)
        last.lower = last.lift = last.all_flags = True
        yield from last.walk()
        yield from last.compare()
        yield from last.check_copied()
        remaining = last.result
        result.corruptions_fixed += max(result.corruptions - remaining.corruptions, 0)
        result.corruptions_fixed += last.flags_fixed
        result.corruptions_fixed = max(result.corruptions_fixed, min(relinker.mended + bitmaps, 1))
        result.leaks_fixed += max(result.leaks - remaining.leaks, 0)
        result.corruptions, result.leaks = remaining.corruptions, remaining.leaks
        for text in remaining.findings:
            result.say(text)

    # -- the header's bits
    def _begin(self) -> Procedure:
        """Before the first write: autoclear bits of others go, and version 3 says that the counts
        are not to be relied on."""
        if self.begun:
            return
        self.begun = True
        h = self.header
        if h.version < 3:
            return
        # Of extended entries some damage may stay, and the image has to open all the same.
        if self.everything and self.covered and not self.image.extended:
            h.incompatible |= hd.DIRTY
        h.autoclear &= hd.BITMAPS | hd.RAW_DATA_FILE
        yield Write([MetaWrite(SLOT, hd.FEATURES_OFFSET, h.features())])
        yield Barrier()

    def _finish(self) -> Procedure:
        h = self.header
        bits = hd.DIRTY | hd.CORRUPT
        if h.version > 2 and h.incompatible & bits:
            h.incompatible &= ~bits
            yield Barrier()
            yield Write([MetaWrite(SLOT, hd.FEATURES_OFFSET, h.features())])
            yield Barrier()


def repair(image: Qcow2, fix: str) -> Procedure:
    """Check the image and mend it; ``fix`` is ``leaks`` or ``all``.  Returns a CheckResult."""
    return (yield from Repairer(image, fix == "all").run())
