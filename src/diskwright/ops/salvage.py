"""Copying what can be read out of an image that is too broken to be repaired."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from ..engine.copy import CopyOptions, Segment, copy
from ..engine.kernel import BaseDriver
from ..errors import CorruptImage, DiskError, UsageError
from ..findings import GUESSED, LOST
from ..graph.creating import remove
from ..graph.graph import Graph
from ..graph.node import Node
from ..graph.opener import close_disk, discard_disk
from ..graph.options import convert
from ..graph.registry import driver as driver_of
from ..graph.status import block_status
from ..records import NamedTuple
from ..units import SECTOR, align_up
from .create import creatable, create
from .fresh import fresh_is_zero
from .images import ImageSpec
from .mapfile import DamageMap, Damages

_WINDOW = 1 << 40
_MOST_PARTS = 1 << 18
_Part = tuple[int, int, str, str]  # start, end, state, why
OnProgress = Callable[[int, int], None]


class Salvaged(NamedTuple):
    """What was read: ``size`` bytes of disk; ``map`` tells what of it is lost or guessed, and
    ``remarks`` what was found out about the image."""

    name: str
    format: str
    size: int
    map: DamageMap
    remarks: tuple[str, ...]

    @property
    def lost(self) -> int:
        """Bytes that are lost."""
        return self.map.total(LOST)

    @property
    def guessed(self) -> int:
        """Bytes that are guessed."""
        return self.map.total(GUESSED)

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``diskwright salvage --map-format=json``."""
        return {
            "filename": self.name,
            "format": self.format,
            "virtual-size": self.size,
            "lost": self.lost,
            "guessed": self.guessed,
            "remarks": list(self.remarks),
            "ranges": [part._asdict() for part in self.map.parts],
        }


async def salvage(
    driver: BaseDriver,
    source: ImageSpec,
    target: ImageSpec,
    options: Mapping[str, Any] | None = None,
    *,
    assume: Mapping[str, Any] | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Salvaged:
    """Copy what can be read of ``source`` into the new image ``target``.

    ``assume`` is what the image does not say any more (``salvage_options`` of its format).

    The source is never written to.  What cannot be read, or not be told, becomes zeroes.  Without
    ``force`` the target must not exist.  Raises UsageError when the source's format cannot be told
    from its bytes, OpenFailed and other DiskErrors when nothing could be done; a target that was
    not there before is taken back then.
    """
    assert target.format is not None and isinstance(target.reference, str)
    if creatable(target.format).stream is not None and (options or {}).get("subformat"):
        _refuse_one_pass(target.format, options or {})
    if os.path.lexists(target.reference) and not force:
        raise UsageError(f"'{target.reference}' exists already; --force lets it be replaced")
    graph = Graph(driver)
    graph.salvage, beside = _assumed(source, assume or {})
    node = await source.open(driver, check=True, graph=graph, options=beside)
    new: list[str] = []
    try:
        if node.probed and source.format is None:
            raise UsageError(
                f"the format of '{source.name}' cannot be told from its bytes; say it with -f"
            )
        others = await create(
            driver,
            target.reference,
            target.format,
            align_up(node.size, SECTOR),
            options or {},
            gate=target.gate,
            on_new=new.append,
            secrets=target.secrets,
        )
        target = target._replace(gate=target.gate.allowing(*others))
        # An encrypted target is opened by the secret that it was made with.
        keys = {k: v for k, v in (options or {}).items() if k.endswith("key-secret")}
        out = await target.open(driver, writable=True, options=keys or None)
        try:
            done = await _Job(driver, node, out, options or {}, on_progress).run(source.name)
            await out.flush()
        except BaseException:
            await discard_disk(out)
            raise
        await close_disk(out)
    except BaseException:
        for path in new:
            remove(path)
        raise
    finally:
        await discard_disk(node)
    return done


def _assumed(
    source: ImageSpec, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is known of the image itself, and options that open it."""
    if not given:
        return {}, None
    if source.format is None and not isinstance(source.reference, dict):
        raise UsageError("What is assumed of an image is assumed of a format; say it with -f")
    name = source.format or str(source.reference.get("driver"))  # type: ignore[union-attr]
    options = {option.name: option for option in driver_of(name).salvage_options}
    for key in given:
        if key not in options:
            raise UsageError(f"Of an image of format '{name}' '{key}' cannot be assumed")
    known = {key: convert(options[key], value) for key, value in given.items()}
    beside: dict[str, Any] = {}
    backing, format = known.pop("backing_file", None), known.pop("backing_fmt", None)
    if (backing is None) != (format is None):
        raise UsageError("backing_file and backing_fmt are assumed together")
    if backing is not None:
        beside["backing"] = {"driver": format, "file": {"driver": "file", "filename": backing}}
    if (path := known.pop("data_file", None)) is not None:
        beside["data-file"] = {"driver": "file", "filename": path}
    if (key := known.pop("encrypt.key-secret", None)) is not None:
        beside["encrypt.key-secret"] = key
    return known, beside or None


def _refuse_one_pass(fmt: str, options: Mapping[str, Any]) -> None:
    stream = creatable(fmt).stream
    if stream is not None and stream({"size": SECTOR, **options}) is not None:
        raise UsageError("a target that is written in one pass cannot be salvaged into")


class _Job:
    """One copy, from its beginning to its end: the map is in the order of the disk."""

    def __init__(
        self,
        driver: BaseDriver,
        node: Node,
        out: Node,
        created: Mapping[str, Any],
        on_progress: OnProgress | None,
    ) -> None:
        self.driver, self.node, self.out = driver, node, out
        self.created = created
        """The creation options of ``out``."""
        self.on_progress = on_progress
        self.format: Any = getattr(node, "format", None)
        self.unit = int(getattr(self.format, "unit", SECTOR)) or SECTOR
        self.damages = Damages()
        self._known: list[_Part] = []
        """What the tables say, in order (start, end, state, why)."""
        self._failed: list[_Part] = []
        """What could not be read, in order."""

    async def run(self, name: str) -> Salvaged:
        if not await fresh_is_zero(self.out, self.created):
            await self.out.zero([0], [self.out.size])
        options = CopyOptions(target_zero=True, salvage=True, damaged=min(self.unit, 2 << 20))
        await copy(self.driver, self.out, self._segments(), options, None, self._lost)
        self._settle(self.node.size)
        remarks = tuple(getattr(self.format, "remarks", ()))
        size = self.node.size
        damages = DamageMap(size, tuple(self.damages.parts))
        return Salvaged(name, self.node.driver_name, size, damages, remarks)

    async def _segments(self) -> AsyncIterator[Segment]:
        """What to read, without what is lost or reads as zeroes."""
        offset, size = 0, self.node.size
        while offset < size:
            parts, end = await self._window(offset, min(_WINDOW, size - offset))
            lost = self._noted(offset, end)
            for start, stop in _without(parts, lost):
                yield Segment(self.node, start, start, stop - start, False)
            if self.on_progress is not None:
                self.on_progress(end, size)
            offset = end

    async def _window(self, offset: int, length: int) -> tuple[list[tuple[int, int]], int]:
        """The data from ``offset`` as (start, end), and how far this tells.

        Where the map itself fails, smaller pieces are asked for, down to a unit, which is lost.
        """
        unmapped = getattr(self.format, "unmapped", None)
        if unmapped is not None and self.node.child("backing") is None:
            end = unmapped(offset)
            if end > offset:  # a disk may be much larger than what its tables hold
                return [], end
        count = length
        while True:
            try:
                parts = []
                at = offset
                for part in await block_status(self.node, offset, count):
                    at = part.start + part.length
                    if part.data and not part.zero:
                        parts.append((part.start, at))
                return parts, at
            except (OSError, DiskError) as error:
                least = self.unit - offset % self.unit
                if count <= least:
                    why = f"its place is not known: {_text(error)}"
                    _keep(self._failed, (offset, offset + count, LOST, why))
                    return [], offset + count
                count = max(align_up(count // 2, self.unit) - offset % self.unit, least)

    def _noted(self, start: int, end: int) -> list[tuple[int, int]]:
        """What the format says of a range: it is kept for the map; the lost parts are returned."""
        notes = getattr(self.format, "notes", None)
        if notes is None or end <= start:
            return []
        lost = []
        for note in notes(start, end - start):
            _keep(self._known, (note.start, note.start + note.length, note.state, note.why))
            if note.state == LOST:
                lost.append((note.start, note.start + note.length))
        return sorted(lost)

    def _lost(self, offset: int, length: int, error: OSError | CorruptImage) -> None:
        _keep(self._failed, (offset, offset + length, LOST, _text(error)))

    def _settle(self, size: int) -> None:
        """Write the map: of what is said of one place the worst counts."""
        every = sorted([*self._failed, *self._known], key=lambda part: part[0])
        lost = [part for part in every if part[2] == LOST]
        at = 0
        clean: list[_Part] = []
        for start, end, state, why in lost:
            start = max(start, at)
            if start < end:
                clean.append((start, end, state, why))
                at = end
        holes = [(start, end) for start, end, _, _ in clean]
        at = 0
        for start, end, state, why in every:
            if state == LOST:
                continue
            start = max(start, at)
            if start < end:
                clean += [(a, b, state, why) for a, b in _without([(start, end)], holes)]
                at = end
        for start, end, state, why in sorted(clean):
            end = min(end, size)
            if start < end:
                self.damages.add(start, end - start, state, why)


def _keep(parts: list[_Part], part: _Part) -> None:
    """Add a part; one that continues the last one, or is one too many, becomes a part of it."""
    if parts:
        start, end, state, why = parts[-1]
        if end == part[0] and (part[2:] == (state, why) or len(parts) >= _MOST_PARTS):
            worst = LOST if LOST in (state, part[2]) else state
            parts[-1] = (start, part[1], worst, why)
            return
        if len(parts) >= _MOST_PARTS and end < part[1]:
            parts[-1] = (start, part[1], LOST if LOST in (state, part[2]) else state, why)
            return
    parts.append(part)


def _without(parts: list[tuple[int, int]], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """``parts`` less ``holes``; both ascending."""
    from bisect import bisect_right

    ends = [end for _, end in holes]
    found = []
    for start, end in parts:
        index = bisect_right(ends, start)
        while index < len(holes) and holes[index][0] < end:
            first, last = holes[index]
            if first > start:
                found.append((start, first))
            start = max(start, last)
            index += 1
        if start < end:
            found.append((start, end))
    return found


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return getattr(error, "detail", None) or str(error)
