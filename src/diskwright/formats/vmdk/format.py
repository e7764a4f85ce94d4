"""The VMDK machine: a disk made of parts, behind one face."""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from ...contract import (
    DISCARD,
    Barrier,
    Groups,
    HostRange,
    MetaWrite,
    NeedMeta,
    Plan,
    Procedure,
    Range,
    TableStore,
    Write,
)
from ...errors import NoSpace
from ...extents import Data, Extent
from ...hints import TYPE_CHECKING, Any, ClassVar, Protocol
from .backing import Links
from .cid import new_cid
from .descriptor import NOACCESS, RW, Descriptor, parse
from .parts import Part

if TYPE_CHECKING:
    from .cid import Place

BEFORE = "before"
SLOT = "file"


class _Fast(Protocol):
    """The shortcuts of a part that is the whole image."""

    def map_one(self, offset: int, length: int, write: bool) -> int: ...

    def map_batch(
        self, offsets: Sequence[int], lengths: Sequence[int], write: bool
    ) -> Sequence[int]: ...


def _read_only(extent: Extent) -> Extent:
    return extent._replace(writable=False) if isinstance(extent, Data) else extent


class Vmdk(Links):
    """One open VMDK image (the `Format` of the contract).

    ``parts`` are sorted by their start and leave no gap.  ``unit`` is the largest grain of theirs,
    or a power of two beyond the image where parts do not begin on their grain: one lease for
    everything then.
    """

    name: ClassVar[str] = "vmdk"
    cipher_unit = 1
    tables: TableStore

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.writable = bool(options.get("writable", not options.get("read-only", False)))
        self.zero_beyond_end = bool(options.get("zero_beyond_end", True))
        self.has_backing = False
        self.size = 0
        self.unit = 1
        self.parts: list[Part] = []
        self.names: list[str | None] = []
        """The file names of the parts as the descriptor gives them."""
        self.access: list[str] = []
        """RW, RDONLY or NOACCESS, by part."""
        self.descriptor: Descriptor | None = None
        """None for an extent that was opened by itself."""
        self.place: Place | None = None
        self.refuse_write: str | None = None
        """Why this image cannot be written; None when nothing speaks against it."""
        self.ready = False
        self.content_changed = False
        """The new CID of this opening is on disk."""
        self.in_use = False
        """The extents say on disk that they are in use."""
        self._next: Descriptor | None = None
        self._starts: list[int] = []
        self._by_slot: dict[str, list[Part]] = {}
        self.sparse_slots: frozenset[str] = frozenset()
        """Flat extents: a hole of their files is one of the disk, and its status says so."""
        self.read_only_slots: frozenset[str] = frozenset()
        """Slots of which no extent may be written."""
        self._fast: _Fast | None = None

    def use_parts(
        self, parts: Sequence[Part], names: Sequence[str | None], access: Sequence[str]
    ) -> None:
        """Take the parts of the image, in guest order."""
        self.parts = list(parts)
        self.names = list(names)
        self.access = list(access)
        self._starts = [part.start for part in parts]
        self.size = parts[-1].start + parts[-1].length if parts else 0
        self.sparse_slots = frozenset(part.slot for part in parts if part.unit == 1)
        written = {part.slot for part, may in zip(parts, access, strict=True) if may == RW}
        self.read_only_slots = frozenset(part.slot for part in parts) - written
        self._by_slot = {}
        for part in parts:
            self._by_slot.setdefault(part.slot, []).append(part)
        self.unit = max((part.unit for part in parts), default=1)
        if any(part.start % part.unit for part in parts):
            self.unit = 1 << max(self.size - 1, 1).bit_length()
        alone: Any = parts[0] if len(parts) == 1 and parts[0].slot == SLOT else None
        self._fast = alone if hasattr(alone, "map_one") else None

    def check_write(self) -> None:
        """Raise PermissionError when the image cannot be written."""
        if not self.writable:
            raise PermissionError(1, "Operation not permitted: the image was opened read-only")
        if self.refuse_write is not None:
            raise PermissionError(1, f"Operation not permitted: {self.refuse_write}")

    # -- the map
    def map_one(self, offset: int, length: int, write: bool) -> int:
        """See `FastMap`: of an image in one file."""
        fast = self._fast
        return -1 if fast is None else fast.map_one(offset, length, write)

    def map_batch(
        self, offsets: Sequence[int], lengths: Sequence[int], write: bool
    ) -> Sequence[int]:
        """See `FastMap`: of an image in one file."""
        fast = self._fast
        if fast is None:
            return [-1] * len(offsets)
        return fast.map_batch(offsets, lengths, write)

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        """Extents of ``ranges``, up to what is not in memory.

        Raises ImageError at a broken entry and PermissionError in an extent that may not be read;
        what comes before it is answered first.
        """
        out: list[Extent] = []
        for offset, length in ranges:
            end = offset + length
            while offset < end:
                index = bisect_right(self._starts, offset) - 1
                part = self.parts[index]
                stop = min(end, part.start + part.length)
                known = len(out)
                try:
                    if self.access[index] == NOACCESS:
                        raise self._barred(index, "read")
                    miss = part.map(offset - part.start, stop - offset, out)
                except Exception:
                    if out:
                        return out, None
                    raise
                if self.access[index] != RW:
                    out[known:] = [_read_only(extent) for extent in out[known:]]
                for extent in out[known:]:
                    offset += extent.length
                if miss is not None or offset < stop:
                    return out, miss
        return out, None

    # -- plans
    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """Reserve what is needed in every part; see the contract.

        Raises NoSpace; PermissionError for images and extents that may not be written; ImageError.
        Nothing has changed then.
        """
        self.check_write()
        able: list[tuple[Part, list[Range]]] = []
        for index, cut in self._cut(ranges).items():
            part = self.parts[index]
            if self.access[index] != RW:
                if kind == DISCARD:
                    continue
                raise self._barred(index, "written")
            answer = part.gather(cut, kind)
            if isinstance(answer, NeedMeta):
                return answer
            if answer:
                able.append((part, cut))
            elif kind != DISCARD:
                return None
        if not able and kind == DISCARD:
            return None
        plan = Plan()
        taken: list[tuple[Part, Any]] = []
        try:
            if not self.ready:
                plan.before = self.before()
            for part, cut in able:
                taken.append((part, part.reserve(cut, kind, plan)))
        except NoSpace:
            for part, state in reversed(taken):
                part.abort(state)
            raise
        plan.state = taken
        return plan

    def _cut(self, ranges: Sequence[Range]) -> dict[int, list[Range]]:
        """``ranges`` by the numbers of the parts, relative to each one."""
        found: dict[int, list[Range]] = {}
        for offset, length in ranges:
            end = offset + length
            while offset < end:
                index = bisect_right(self._starts, offset) - 1
                part = self.parts[index]
                stop = min(end, part.start + part.length)
                found.setdefault(index, []).append((offset - part.start, stop - offset))
                offset = stop
        return found

    def _barred(self, index: int, what: str) -> PermissionError:
        name = self.names[index] or f"number {index}"
        return PermissionError(
            errno.EACCES, f"the extent {name} may not be {what} ({self.access[index]})"
        )

    def commit(self, plan: Plan) -> None:
        """Point to the data."""
        for part, state in plan.state:
            part.commit(state)

    def abort(self, plan: Plan) -> None:
        """Give back what was reserved."""
        for part, state in plan.state:
            part.abort(state)

    # -- what precedes a write
    def before(self) -> Groups:
        """What must be durable before the first byte changes: that the extents are in use, and
        for the first time since the image was opened a new CID."""
        writes = [write for part in self._ours() for write in part.before()]
        if not self.content_changed and self.descriptor is not None and self.place is not None:
            if self._next is None:
                self._next = parse(self.descriptor.encode())
                self._next.set_cid(new_cid(self._next.cid_digits))
            first, *others = self.place.change(self._next)
            return Groups([writes + first, *others], BEFORE)
        return Groups([writes] if writes else [], BEFORE)

    def _ours(self) -> list[Part]:
        """The parts that may be written."""
        return [p for p, access in zip(self.parts, self.access, strict=True) if access == RW]

    def _announced(self) -> None:
        for part in self._ours():
            part.announced()
        if self._next is not None and self.place is not None:
            self.place.took(self._next.encode())
            self.descriptor, self._next = self._next, None
        self.content_changed = self.in_use = True
        self.ready = True

    # -- the way to the disk
    def freeze(self) -> Groups:
        """All dirty metadata.  Tables to which nothing on disk points yet need no order against
        the data; the entries that point to them and to the data come behind both."""
        tables: list[MetaWrite] = []
        links: list[MetaWrite] = []
        tokens = []
        for part in self.parts:
            token = part.freeze(tables, links)
            if token is not None:
                tokens.append((part, token))
        return Groups([links] if links else [], tokens, tables)

    def settle(self, token: Any) -> list[HostRange]:
        """What the groups of ``token`` freed."""
        if token == BEFORE:
            self._announced()
            return []
        return [freed for part, mine in token for freed in part.settle(mine)]

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None:
        """Punched space goes back to the part whose file it is in."""
        for slot in {part.slot for part in ranges}:
            self._by_slot[slot][0].release([r for r in ranges if r.slot == slot], zeroed)

    def load(self, slot: str, offset: int, data: bytes) -> None:
        """Decode a table of one part."""
        self._by_slot[slot][0].load(offset, data)

    def close(self) -> Procedure | None:
        """The procedure that says that the extents were closed in order; None when nothing was
        written."""
        if not self.in_use:
            return None
        writes = [write for part in self._ours() for write in part.closing()]
        return self._close(writes) if writes else None

    def _close(self, writes: list[MetaWrite]) -> Procedure:
        self.ready = self.in_use = False
        yield Barrier()
        yield Write(writes)
        yield Barrier()

    # -- what is told of it
    @property
    def cluster_size(self) -> int:
        """The grain of the first extent (bytes); 0 of an image without grains."""
        unit = self.parts[0].unit if self.parts else 0
        return unit if unit > 1 else 0

    def info(self) -> dict[str, Any]:
        """The format-specific data, keyed as ``qemu-img info --output=json`` has them."""
        from .describe import info

        return info(self)

    # -- whole-image procedures, each imported when it is asked for
    def check(self, fix: str = "") -> Procedure:
        """Check every extent, and repair it: ``fix`` is "", "leaks" or "all"."""
        from .describe import check

        return check(self, fix)

    def resize(self, size: int, preallocation: str = "off", shrink: bool = False) -> Procedure:
        """Change the virtual size to ``size`` bytes; a smaller one only with ``shrink``."""
        from .resizing import resize

        return resize(self, size, preallocation, shrink)

    def make_empty(self) -> Procedure:
        """Drop all guest data, so that the backing file shows through everywhere."""
        from .resizing import make_empty

        return make_empty(self)
