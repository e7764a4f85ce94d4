"""No write over metadata: which structures are looked after, and what tells that a place belongs
to one of them (option ``overlap-check`` and its parts)."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from ....contract import Procedure, Progress, Range, Table
from ....errors import CorruptImage, UsageError
from ....hints import Any
from ..header import EXT_ENCRYPTION, MAX_L1_BYTES, MAX_OFFSET
from .core import COPIED, OFFSET, ZERO_FLAG, Core
from .runs import Run

PARTS = {
    "main-header": "qcow2_header",
    "active-l1": "active L1 table",
    "active-l2": "active L2 table",
    "refcount-table": "refcount table",
    "refcount-block": "refcount block",
    "snapshot-table": "snapshot table",
    "inactive-l1": "inactive L1 table",
    "inactive-l2": "inactive L2 table",
    "bitmap-directory": "bitmap directory",
}
"""The structures by the options that switch them, and how messages call them."""
_CONSTANT = ("main-header", "active-l1", "refcount-table", "snapshot-table", "bitmap-directory")
_CACHED = (*_CONSTANT, "active-l2", "refcount-block", "inactive-l1")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": (),
    "constant": _CONSTANT,
    "cached": _CACHED,
    "all": tuple(PARTS),
}
# L1 and refcount table entries of an image whose tables are all known to `check_table`.
_MOST_LISTED = 1 << 17
# Entries of the L1 tables of all snapshots whose L2 tables are looked after.
_MOST_INACTIVE = 1 << 22


def protected(options: Mapping[str, Any]) -> frozenset[str]:
    """The parts that the options ask for, by default those of the template ``cached``.

    Raises UsageError with the words of qemu's tools.
    """
    given = options.get("overlap-check")
    parts = dict(given) if isinstance(given, dict) else {"": given or "cached"}
    plain, named = parts.pop("", None), parts.pop("template", None)
    if plain is not None and named is not None and plain != named:
        raise UsageError(
            f"Conflicting values for qcow2 options 'overlap-check' ('{plain}') and "
            f"'overlap-check.template' ('{named}')"
        )
    template = str(plain or named or "cached")
    if template not in TEMPLATES:
        raise UsageError(
            f"Unsupported value '{template}' for qcow2 option 'overlap-check'. Allowed are any of "
            "the following: none, constant, cached, all"
        )
    found = set(TEMPLATES[template])
    for name, value in parts.items():
        if name not in PARTS:
            raise UsageError(
                f"Block format 'qcow2' does not support the option 'overlap-check.{name}'"
            )
        if value in (True, "on", "yes", "true", "y"):
            found.add(name)
        elif value in (False, "off", "no", "false", "n"):
            found.discard(name)
        else:
            raise UsageError(f"Parameter 'overlap-check.{name}' expects 'on' or 'off'")
    return frozenset(found)


class Guard(Core):
    """Checks before something is written.

    Every L2 table and refcount block is looked at once, when the first write comes; clusters that
    the counts call free are looked at when they are found.  A write thus costs a set lookup.
    """

    _metadata: frozenset[int] | None = None
    _inactive_l2: frozenset[int] = frozenset()

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        # A repair finds out for itself what lies over what.
        self.protects = frozenset() if options.get("check") else protected(options)
        """The parts that nothing is written over."""
        self._checked_blocks: set[int] = set()

    def reserve_structures(self) -> None:
        """Know what the header points to, whatever the counts say."""
        h, bits = self.header, self.cluster_bits
        self._metadata = None
        self._inactive_l2 = frozenset()
        self.reserved.remove(0, 1 << 62)
        self.reserved.add(0, 1)
        l1_end = h.l1_offset + 8 * h.l1_size
        self.reserved.add(h.l1_offset >> bits, -(-l1_end >> bits))
        reftable = h.reftable_offset >> bits
        self.reserved.add(reftable, reftable + h.reftable_clusters)
        if self.snapshot_bytes:
            first = h.snapshots_offset >> bits
            self.reserved.add(first, first + -(-self.snapshot_bytes >> bits))
        if h.crypt_method == 2 and (field := h.extension(EXT_ENCRYPTION)) is not None:
            offset, length = int.from_bytes(field[:8], "big"), int.from_bytes(field[8:16], "big")
            self.reserved.add(offset >> bits, -(-(offset + length) >> bits))
        for snapshot in self.snapshot_table:
            if 8 * snapshot.l1_size > MAX_L1_BYTES:
                continue  # no snapshot can be read by such an entry
            first = snapshot.l1_offset >> bits
            self.reserved.add(first, first + -(-8 * snapshot.l1_size >> bits))
        if self.directory is not None:
            place = self.directory.place
            self.reserved.add(place.offset >> bits, -(-(place.offset + place.size) >> bits))

    # -- tables
    def check_table(self, table: Table) -> None:
        """Raise CorruptImage when an L2 table lies over other metadata, or has an entry that
        points at some: a write would destroy them.  It can still be read through.

        Looks once at every table that was loaded, when the first write comes; that is why the
        shortcuts and `map` let nothing be written through a table before.
        """
        if table.offset in self._checked:
            return
        self.check_place(table.offset, "active L2 table")
        metadata = self._places()
        entries = table.data[:: self.stride]
        if not metadata.isdisjoint(entries):
            for index, entry in enumerate(entries):
                # What was metadata when the image was opened need not be any more.
                if entry in metadata and (what := self.overlap(entry & OFFSET)):
                    raise CorruptImage(
                        f"Preventing invalid write on metadata (overlaps with {what})",
                        field="L2 entry",
                        offset=table.offset + (index << self.entry_bits),
                    )
        self._checked.add(table.offset)

    def check_place(self, offset: int, itself: str) -> None:
        """Raise CorruptImage when the table at ``offset``, which is ``itself`` such a structure,
        lies over another one."""
        if offset not in self._places():
            return
        what = self.overlap(offset, itself)
        if what is not None:
            raise CorruptImage(
                f"Preventing invalid write on metadata (overlaps with {what})", offset=offset
            )

    def is_metadata(self, host: int) -> bool:
        """The cluster at ``host`` holds metadata that no bitmap and no guest may name."""
        return not host or (host in self._places() and self.overlap(host) is not None)

    def packed_hosts(self, entry: int, table_offset: int, index: int) -> Run:
        """The host clusters that a compressed cluster lets go when it is replaced.

        Raises CorruptImage when they are metadata, which must not lose a reference.
        """
        metadata = self._places()
        run = self.hosts_of(entry)
        for cluster in range(*run):
            host = cluster << self.cluster_bits
            what = self.overlap(host) if host in metadata else None
            if what or not host:
                raise CorruptImage(
                    f"Preventing invalid free of metadata (overlaps with {what or 'header'})",
                    field="L2 entry",
                    offset=table_offset + (index << self.entry_bits),
                )
        return run

    # -- what is where
    def _places(self) -> frozenset[int]:
        """Every standard L2 entry that would point at metadata, as long as they are few enough to
        list.  The header cannot be pointed at: a place of 0 is none."""
        if self._metadata is None:
            self.check_structures()
            self._metadata = self._metadata_entries()
        return self._metadata

    def _metadata_entries(self) -> frozenset[int]:
        bits = self.cluster_bits
        hosts: set[int] = set()
        if self.reserved.total <= _MOST_LISTED:  # the L1 tables of hostile snapshots are long
            for start, end in self.reserved:
                hosts.update(range(start << bits, end << bits, self.cluster_size))
        if len(self.l1) + len(self.reftable) <= _MOST_LISTED:
            hosts.update(entry & OFFSET for entry in self.l1)
            hosts.update(self.reftable)
        hosts |= self._inactive_l2
        hosts.discard(0)
        flags = (0, COPIED, ZERO_FLAG, COPIED | ZERO_FLAG)
        return frozenset([host | flag for host in hosts for flag in flags])

    def regions(self) -> Iterator[tuple[str, Range]]:
        """The structures that the header and the snapshots name: (part, (offset, length))."""
        h = self.header
        yield "main-header", (0, self.cluster_size)
        yield "active-l1", (h.l1_offset, 8 * len(self.l1))
        yield "refcount-table", (h.reftable_offset, 8 * len(self.reftable))
        yield "snapshot-table", (h.snapshots_offset, self.snapshot_bytes)
        for snapshot in self.snapshot_table:
            yield "inactive-l1", (snapshot.l1_offset, 8 * snapshot.l1_size)
        if self.directory is not None:
            place = self.directory.place
            yield "bitmap-directory", (place.offset, place.size)

    def check_structures(self) -> None:
        """Raise CorruptImage when two of them that are looked after lie over each other."""
        found = sorted(
            (offset, offset + length, part)
            for part, (offset, length) in self.regions()
            if length and part in self.protects
        )
        end, before = 0, ""
        for start, stop, part in found:
            if start < end and (before, part) != ("inactive-l1", "inactive-l1"):
                what = PARTS[before if before == "main-header" else part]
                raise CorruptImage(
                    f"Preventing invalid write on metadata (overlaps with {what})", offset=start
                )
            if stop > end:
                end, before = stop, part

    def block_table(self, offset: int) -> Table | None:
        """See :meth:`.core.Core.block_table`.  Raises CorruptImage for a block that lies over
        other metadata."""
        table = super().block_table(offset)
        if table is not None and offset not in self._checked_blocks:
            self.check_place(offset, "refcount block")
            self._checked_blocks.add(offset)
        return table

    def overlap(
        self, host: int, itself: str = "", tables: Container[int] | None = None
    ) -> str | None:
        """The structure that the cluster at ``host`` belongs to now, of those that are looked
        after; ``itself`` is not told.  ``tables``: the places of the L2 tables, where known."""
        if not self.protects:
            return None
        end = host + self.cluster_size
        for part, (offset, length) in self.regions():
            if length and part in self.protects and offset < end and host < offset + length:
                return PARTS[part]
        for part, found in (
            ("refcount-block", host in self.reftable),
            ("active-l2", self._is_l2(host) if tables is None else host in tables),
            ("inactive-l2", host in self._inactive_l2),
        ):
            if found and part in self.protects and PARTS[part] != itself:
                return PARTS[part]
        return None

    def _is_l2(self, host: int) -> bool:
        return host in self.l1 or host | COPIED in self.l1

    def check_free(self, vacant: list[Run], start: int, end: int) -> None:
        """Clusters [start, end) are free by their counts, but only ``vacant`` are no known
        structures.  Raise CorruptImage when others are some that are looked after."""
        if not self.protects:
            return
        tables = {entry & OFFSET for entry in self.l1}
        at = start
        for a, b in [*vacant, (end, end)]:
            for cluster in range(at, min(a, end)):
                what = self.overlap(cluster << self.cluster_bits, tables=tables)
                if what is not None:
                    raise CorruptImage(
                        f"Preventing invalid write on metadata (overlaps with {what})",
                        offset=cluster << self.cluster_bits,
                    )
            at = b

    def load_inactive(self) -> Procedure:
        """Learn where the L2 tables of the snapshots are (part ``inactive-l2``, which is not
        asked for by default), as they are now; snapshots that change are not followed.

        Raises UsageError for an image that has too many, MalformedImage and CorruptImage where a
        snapshot does not tell: nobody would look after what was asked for.
        """
        if "inactive-l2" not in self.protects or not self.snapshot_table:
            return
        total = sum(snapshot.l1_size for snapshot in self.snapshot_table)
        if total > _MOST_INACTIVE:
            raise UsageError("The snapshots have too many tables for overlap-check.inactive-l2")
        from ..snapshots.procedures import read_l1

        found: set[int] = set()
        for done, snapshot in enumerate(self.snapshot_table):
            offsets = {entry & OFFSET for entry in (yield from read_l1(self, snapshot))}
            found |= {offset for offset in offsets if 0 < offset < MAX_OFFSET}
            yield Progress(done, len(self.snapshot_table))
        # A table that the disk shares is copied before it is written.
        found -= {entry & OFFSET for entry in self.l1}
        self._inactive_l2 = frozenset(found)
        self._metadata = None
