"""Conversions that go on where they were stopped: what is believed of a journal, and what is put
into it (docs/resume.md)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..contract import MAY_UNMAP
from ..engine.kernel import BaseDriver, Cancelled, Task
from ..errors import DiskError, ImageInUse, NotSupported, UsageError
from ..extents import HOLE, ZERO
from ..graph import registry
from ..graph.graph import walk
from ..graph.names import parse
from ..graph.node import Node
from ..graph.opener import close_disk
from ..protocols.filenode import FileNode
from ..records import NamedTuple
from .check import check
from .create import JOURNAL
from .digest import Tree
from .images import ImageSpec, OpenFailed
from .itself import refuse_itself
from .journal import Covered, Journal, State
from .sources import SPARSE, Sources
from .streaming import one_pass

if TYPE_CHECKING:
    from .outputs import Settings
    from .pipes import Pipe

_BUFFER = 1 << 20
_CLEAR = 1 << 30
_SOONEST = 0.1
_LONGEST = 30.0
"""Seconds between two lines of the journal; in between it is twenty times what writing one took,
and a thousandth of the whole time, so that a long conversion has a short journal."""


class Resumed(NamedTuple):
    """What of an earlier run is used again: all below ``offset`` of the disk, in bytes, of which
    ``data`` are more than zeroes.  ``finished``: nothing was left to do."""

    offset: int
    data: int
    finished: bool = False


class Resumption:
    """A conversion that keeps a journal.

    ``made``: the target is there; ``again``: an earlier run made it, and has done ``start``.
    """

    def __init__(
        self, driver: BaseDriver, journal: Journal, content: Sources, verify: bool
    ) -> None:
        self.driver, self.journal = driver, journal
        self.start = Covered(0, 0)
        self.made = self.again = False
        self._content, self._verify = content, verify
        self._known = self._reached = self.start
        self._began = self._next = driver.now()
        self._taking: Task[None] | None = None
        self._error: OSError | DiskError | None = None

    async def clear(self, out: Node, settings: Settings) -> None:
        """Let the target be as it was when it was new, but for what is used again: what an earlier
        run wrote behind that may be in the way."""
        at = self.start.end
        keep = settings.options.get("preallocation") not in (None, "off")
        while self.again and at < out.size:
            for extent in await out.extents(at, min(_CLEAR, out.size - at)):
                if extent.kind not in (HOLE, ZERO):
                    await out.zero([at], [extent.length], 0 if keep else MAY_UNMAP)
                at += extent.length

    # -- while it goes on
    async def target_made(self) -> None:
        """The target is there, and durable."""
        await self.journal.made(os.stat(self.journal.path.removesuffix(JOURNAL)).st_ino)
        self.made = True

    def reached(self, out: Node, end: int, data: int) -> None:
        """All below ``end`` has been written to ``out``; ``data`` counts from where this run began.
        Now and then the target is flushed for it, and then the journal knows."""
        if self._error is not None:
            raise self._error
        self._reached = Covered(end, self.start.data + data)
        if self._taking is None and self.driver.now() >= self._next:
            self._taking = self.driver.spawn(self._take(out), "journal")

    async def _take(self, out: Node) -> None:
        began = self.driver.now()
        try:
            await self._line(out)
        except (OSError, DiskError) as error:
            self._error = error
        now = self.driver.now()
        pause = min(20 * (now - began), _LONGEST)
        self._next = now + max(pause, _SOONEST, (now - self._began) / 1000)
        self._taking = None

    async def _line(self, out: Node) -> None:
        reached = self._reached
        if reached.end <= self._known.end:
            return
        await out.flush()
        if self._verify:
            tree = await digest_of(self._content, self._known.end, reached.end)
            reached = reached._replace(tree=tree)
        await self.journal.covers(reached)
        self._known = reached

    async def stop(self, out: Node) -> None:
        """The copy has failed or was cancelled: keep what it has done."""
        with suppress(OSError, DiskError, Cancelled):
            if self._taking is not None:
                await self._taking
            if self._error is None:
                await self._line(out)

    async def ended(self) -> None:
        """The copy is done; raises what went wrong with the journal."""
        if self._taking is not None:
            await self._taking
        if self._error is not None:
            raise self._error


async def begin(
    driver: BaseDriver,
    nodes: Sequence[Node],
    target: ImageSpec,
    size: int,
    settings: Settings,
    options: Mapping[str, Any],
    on_resumed: Callable[[Resumed], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Resumption | None:
    """Begin a conversion of ``nodes`` (``size`` bytes in all), or go on with it; None when it is
    finished: the target holds all of it, and there is no journal.  ``options`` open the target.

    With ``settings.verify`` what the sources held is read and compared, not only the time of their
    last change.  ``on_resumed`` is told what is used again.  Raises UsageError when the journal or
    the target are of something else, when a source has changed, and for what cannot be resumed;
    and what opening them raises.
    """
    path = plain_path(target)
    await _refuse(driver, path, target, size, settings)
    refuse_itself(nodes, path, target.name)
    conversion = _conversion(target, size, settings)
    content = Sources(list(nodes), SPARSE, None, 0, False)
    sources = [] if settings.verify else [layer for node in nodes for layer in layers(node)]
    if os.path.lexists(path) and not os.path.lexists(path + JOURNAL):
        await _finished(driver, content, target, size, options)
        if on_resumed is not None:
            on_resumed(Resumed(size, 0, finished=True))
        return None
    try:
        journal, state = await Journal.open(driver, path + JOURNAL)
    except ImageInUse as error:
        raise UsageError(f"another program is converting to '{path}'") from error
    try:
        found = Resumption(driver, journal, content, settings.verify)
        there = os.path.lexists(path)
        if state is None and there:
            raise UsageError(f"'{path}' has been made by something else")
        if state is None or state.target is None or not there:
            await journal.begin(conversion, sources, there)
            return found
        _compare(state, conversion, sources, path)
        if settings.verify:
            await _verify(content, state, path, on_progress)
        with suppress(NotSupported):  # a format that cannot leak
            await check(driver, target, repair="leaks")
    except BaseException:
        await journal.close()
        raise
    found.made = found.again = True
    if state.covered:
        found.start = found._known = found._reached = state.covered[-1]
    if on_resumed is not None:
        on_resumed(Resumed(found.start.end, found.start.data))
    return found


async def _refuse(
    driver: BaseDriver, path: str, target: ImageSpec, size: int, settings: Settings
) -> None:
    """Raise UsageError for what could not be gone on with."""
    if not settings.create:
        raise UsageError("--resume makes its target: it cannot be used with -n")
    if target.cache == "unsafe":
        raise UsageError("--resume needs a target that is flushed: cache mode 'unsafe' does not")
    if settings.bitmaps:
        raise UsageError("--resume does not copy bitmaps")
    if settings.verify and (settings.overlay or settings.salvage):
        raise UsageError("--resume=verify cannot make overlays, or salvage: use --resume")
    assert target.format is not None
    if registry.driver(target.format).stream is not None:
        plan = await one_pass(
            driver, path, target.format, size, settings.options, target.gate, target.cache
        )
        if plan is not None:
            raise UsageError(
                "--resume cannot make an image that is written in one pass: half of it is none"
            )


def _conversion(target: ImageSpec, size: int, settings: Settings) -> dict[str, Any]:
    """What must be the same when it is gone on with."""
    return {
        "format": target.format,
        "size": size,
        "options": {key: str(value) for key, value in sorted(settings.options.items())},
        "compression": settings.compress,
        "sparse size": settings.sparse,
        "snapshot": None if settings.snapshot is None else str(settings.snapshot),
        "salvage": settings.salvage,
        "--resume": "digests" if settings.verify else "times",
    }


def only_target(
    target: ImageSpec | Pipe, also: Sequence[ImageSpec], digests: Sequence[str], pipe: bool
) -> ImageSpec:
    """``target``; raises UsageError unless it is an image, made alone of what can be read again."""
    if pipe or not isinstance(target, ImageSpec):
        raise UsageError("--resume is not possible with pipes")
    if also or digests:
        raise UsageError("--resume is possible neither with --also nor with --digest")
    return target


def plain_path(target: ImageSpec) -> str:
    """The path of a target beside which a journal can be.  Raises UsageError."""
    reference = target.reference
    where, plain = parse(reference)
    path = str(where.get("filename", ""))
    if not plain or where.get("driver") != "file" or not path:
        raise UsageError("--resume needs a target in a plain file")
    return path


def layers(top: Node) -> list[dict[str, Any]]:
    """What tells each file of a disk from a changed one.  Raises UsageError for what has no time of
    its last change."""
    found = []
    for node in walk(top):
        if node.children:
            continue
        plain = isinstance(node, FileNode) and node.device.kind == "file"
        facts = os.fstat(node.fileno()) if isinstance(node, FileNode) and plain else None
        if facts is None or facts.st_mtime_ns <= 0:
            name = node.options.get("filename") or node.driver_name
            raise UsageError(
                f"'{name}' does not tell when it was changed: use --resume=verify, which compares "
                "digests"
            )
        found.append(
            {
                "file": os.fsencode(str(node.options.get("filename"))).decode(errors="replace"),
                "size": facts.st_size,
                "mtime": facts.st_mtime_ns,
                "inode": facts.st_ino,
            }
        )
    return found


def _compare(state: State, conversion: Mapping[str, Any], sources: list[Any], path: str) -> None:
    """Raise UsageError unless the journal is that of this conversion of these sources."""
    anew = f"remove '{path}' and '{path}{JOURNAL}' to begin anew"
    for key in {**state.conversion, **conversion}:
        before, now = state.conversion.get(key), conversion.get(key)
        if before != now:
            raise UsageError(
                f"'{path}' was begun with another {key} ({before}, not {now}): use the same "
                f"command, or {anew}"
            )
    if os.stat(path).st_ino != state.target:
        raise UsageError(f"'{path}' is another file than the one that was begun: {anew}")
    if len(sources) != len(state.sources):
        raise UsageError(f"the source consists of other files than when '{path}' was begun: {anew}")
    for before, now in zip(state.sources, sources, strict=True):
        for key in ("size", "mtime", "inode"):
            if not isinstance(before, dict) or before.get(key) != now[key]:
                raise UsageError(
                    f"'{now['file']}' has changed since '{path}' was begun ({key}): {anew}"
                )


async def _verify(
    content: Sources,
    state: State,
    path: str,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Raise UsageError unless the sources hold what was copied."""
    start = 0
    for covered in state.covered:
        if await digest_of(content, start, covered.end) != covered.tree:
            raise UsageError(
                f"the source has changed since '{path}' was begun (between byte {start} and "
                f"{covered.end}): remove '{path}' and '{path}{JOURNAL}' to begin anew"
            )
        start = covered.end
        if on_progress is not None:
            on_progress(start, state.covered[-1].end)


async def digest_of(content: Sources, start: int, stop: int) -> str:
    """The digest (docs/digest.md) of the bytes from ``start`` to ``stop``."""
    tree, buffer, at = Tree(), memoryview(bytearray(_BUFFER)), start
    async for segment in content.segments(start):
        first = min(segment.target_offset, stop)
        tree.zeroes(first - at)  # behind a source whose last sector is not whole
        at, length = first, min(segment.length, stop - first)
        if segment.zero:
            tree.zeroes(length)
        else:
            for done in range(0, length, _BUFFER):
                view = buffer[: length - done]
                await segment.source.read([segment.source_offset + done], [len(view)], [view])
                tree.update(view)
        at += length
        if at >= stop:
            break
    tree.zeroes(stop - at)
    return tree.hexdigest()


async def _finished(
    driver: BaseDriver,
    content: Sources,
    target: ImageSpec,
    size: int,
    options: Mapping[str, Any],
) -> None:
    """Raise UsageError unless the target, of which no journal is left, holds what it shall."""
    wrong = "is another disk than the source"
    try:
        node = await target.open(driver, options=options or None)
    except OpenFailed as error:
        raise UsageError(
            f"'{target.name}' is there, and --resume does not overwrite it: {error.cause}"
        ) from error
    try:
        at = size if node.size != size else await _difference(content, node)
        if at >= 0 and node.size == size:
            wrong = f"differs from the source at byte {at}"
    finally:
        await close_disk(node)
    if at >= 0:
        raise UsageError(
            f"'{target.name}' is there, and --resume does not overwrite it: it {wrong}, and there "
            f"is no '{plain_path(target)}{JOURNAL}' to go on by"
        )


async def _difference(content: Sources, node: Node) -> int:
    """About where ``node`` holds something else; -1: nowhere."""
    async for segment in content.segments():
        at, end = segment.target_offset, segment.target_offset + segment.length
        if segment.zero and await node.reads_zero(at, segment.length):
            continue
        for start in range(at, end, _BUFFER):
            length = min(_BUFFER, end - start)
            wanted: Any = bytes(length)
            if not segment.zero:
                begin = segment.source_offset + start - at
                (wanted,) = await segment.source.read([begin], [length])
            (there,) = await node.read([start], [length])
            if bytes(wanted) != bytes(there):
                return start
    return -1
