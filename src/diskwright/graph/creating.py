"""Files that a format makes beside its image: extents of a disk that is in many files."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence

from ..contract import Barrier, Create, GuestWrite, Procedure, Punch, Request, Truncate, Write
from ..errors import NotSupported, UsageError
from ..hints import Any
from . import registry
from .closing import discard_disk
from .display import base_of
from .graph import Graph, leaf_of
from .mapped import MappedNode
from .names import Options, check_path, directory_of, parse, resolve
from .node import Node
from .options import checked
from .perms import ALL, CONSISTENT_READ, RESIZE, WRITE, Use


async def create_file(
    graph: Graph, where: Options, beside: Mapping[str, Any] | None = None
) -> tuple[Node, str | None]:
    """Make (or empty) what ``where`` describes and open it for writing.

    Also returns the path to remove when the creation fails later; None when it was there before.
    """
    options = dict(where)
    protocol = registry.driver(str(options["driver"]))
    if protocol.create is None:
        raise NotSupported(f"Protocol driver '{protocol.name}' does not support image creation")
    path = str(options["filename"]) if protocol.name == "file" else None
    existed = path is None or os.path.lexists(path)
    given = checked(protocol, {k: v for k, v in options.items() if k != "driver"})
    node: Node = await protocol.create(
        graph.driver,
        {"driver": protocol.name, **given, **(beside or {}), "secrets": graph.secrets},
    )
    node.options = {"driver": protocol.name, **given}
    graph.add(node)
    made = None if existed else path
    try:
        graph.use(node, Use(frozenset({CONSISTENT_READ, WRITE, RESIZE}), ALL))
        graph.refresh(node)
        del graph.roots[node]
        if node.size:
            await node.truncate(0)
    except BaseException:
        await discard_disk(node)
        if made is not None:
            remove(made)
        raise
    return node, made


class Creations:
    """The creator of one node: ``await creations(slot, name)`` (see ``Engine.creator``).

    ``beside``: creation options of the protocol.  With ``fresh`` a file that is there already is
    an error: an image that grows must not empty what it did not make.  ``keep`` are files that are
    needed still, such as the backing file; ``typed`` are names that the caller chose, which may be
    paths, absolute or from the image's directory.
    """

    def __init__(
        self,
        node: MappedNode,
        beside: Mapping[str, Any] | None = None,
        fresh: bool = True,
        keep: Sequence[str] = (),
        typed: Sequence[str] = (),
    ) -> None:
        self.node = node
        self.beside = beside or {}
        self.fresh = fresh
        self.keep = keep
        self.typed = typed
        self.names: list[str] = []
        """All files that were made or emptied, as the image's own name is given."""
        self.new: dict[str, str] = {}
        """Those of them that were not there before, by slot."""

    async def __call__(self, slot: str, name: str) -> None:
        """Make ``name`` beside the image and put it into ``slot``.

        Raises UsageError for what is no bare file name, for a name that the image or another file
        of it has, and for a slot that is taken; FileExistsError; and what making it raises.
        """
        node = self.node
        if not bare(name) and name not in self.typed:
            raise UsageError(f"{name!r} cannot be the name of a file beside the image")
        if node.child(slot) is not None:
            raise UsageError(f"There is a file for '{slot}' already")
        leaf, own = leaf_of(node), base_of(node)
        path = check_path(directory_of(own) + name)
        if name in self.typed:
            found = parse(resolve(own, name))[0]
            if found.get("driver") != "file":
                raise NotSupported(f"'{name}' is no plain file, so it cannot be made")
            path = str(found["filename"])
        if leaf.driver_name != "file":
            raise NotSupported(f"Beside a {leaf.driver_name} node no '{name}' can be made")
        if any(_same_file(path, other) for other in (own, *self.names)):
            raise UsageError(f"'{path}' is a file of the image already")
        if any(_same_file(path, other) for other in self.keep):
            raise UsageError(f"'{path}' is needed, and cannot become a file of the image")
        if self.fresh and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        where: Options = {k: v for k, v in leaf.options.items() if k in ("locking", "aio")}
        handled = {
            "cache": getattr(leaf, "cache", "writeback"),
            "discard": "unmap" if getattr(leaf, "unmap", True) else "ignore",
        }
        child, made = await create_file(
            node.graph,
            {**where, "driver": leaf.driver_name, "filename": path},
            {**self.beside, **handled},
        )
        self.names.append(path)
        if made is not None:
            self.new[slot] = made
        node.attach(slot, child)
        node.graph.refresh_slot(node, slot)

    async def take_back(self, slot: str) -> None:
        """Close what was made for ``slot``, and remove it unless it was there before."""
        child = self.node.detach(slot)
        if child is not None:
            path = str(child.options.get("filename"))
            self.names = [name for name in self.names if name != path]
            await discard_disk(child)
        if slot in self.new:
            remove(self.new.pop(slot))

    def remove(self) -> None:
        """Remove all that was not there before."""
        for path in self.new.values():
            remove(path)
        self.new.clear()

    def attempt(self, procedure: Procedure) -> Attempt:
        """``procedure``, watched."""
        return Attempt(self, procedure)


class Attempt:
    """A procedure whose new files go again when it fails in time: before it wrote to another file
    since.  Later the image may refer to them, and a file too many does no harm."""

    def __init__(self, creations: Creations, procedure: Procedure) -> None:
        self.creations = creations
        self.procedure = self._watched(procedure)
        self._made: set[str] = set()
        self._changed = False
        """It wrote to a file that it did not make,"""
        self._referred = False
        """and did so when it had made one."""
        self._ended = False
        self._raised: OSError | None = None
        self._unflushed = False

    def _watched(self, procedure: Procedure) -> Procedure:
        answer: Any = None
        error: Exception | None = None
        while True:
            try:
                request = procedure.send(answer) if error is None else procedure.throw(error)
            except StopIteration as stop:
                self._ended = True
                return stop.value
            except OSError as raised:
                self._raised = raised
                raise
            answer = error = None
            if not _written(request) <= self._made:
                self._changed = True
                self._referred |= bool(self._made)
            try:
                answer = yield request
            except Exception as caught:
                error = caught
                self._unflushed |= isinstance(request, Barrier)
            else:
                if isinstance(request, Create):
                    self._made.add(request.slot)

    async def undo(self) -> None:
        """The procedure failed: take its files back if nothing can refer to them.

        An image that was not written to is what it was before, so its node has not failed, unless
        a flush did: that may have lost what others wrote.
        """
        if self._ended or self._referred:
            return
        for slot in self._made:
            await self.creations.take_back(slot)
        engine = self.creations.node.engine
        if engine.failure is self._raised and not (self._changed or self._unflushed):
            engine.failure = None


def _written(request: Request) -> set[str]:
    """The slots that a request writes to ("": any)."""
    if isinstance(request, Write):
        return {write.slot for write in request.writes}
    if isinstance(request, Punch):
        return {part.slot for part in request.ranges}
    if isinstance(request, Truncate):
        return {request.slot}
    return {""} if isinstance(request, GuestWrite) else set()


def equip(node: MappedNode) -> None:
    """Let the procedures of ``node`` make files, if it is writable."""
    if node.read_only:
        node.creations = node.engine.creator = None
    else:
        node.creations = node.engine.creator = Creations(node)


def bare(name: str) -> bool:
    """True for a file's name without any path, on this system and on Windows."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")


def remove(path: str) -> None:
    """Take away what a creation that failed has made."""
    try:
        os.unlink(path)
    except OSError:
        pass


def _same_file(one: str, other: str) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except (OSError, ValueError):
        return False
