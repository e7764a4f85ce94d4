"""Opening disks again in another mode or with other options, in place: their users and their names
stay.  Several are opened anew together, or none is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from ..engine.engine import Engine
from ..errors import NotSupported, Refused, UsageError
from ..hints import Any
from ..records import NamedTuple
from . import registry
from .creating import equip
from .detect import detect_zeroes
from .display import display_name
from .graph import walk
from .guard import GuardedNode
from .mapped import MappedNode
from .node import Node
from .options import Mode, take_common
from .perms import ALL, RESIZE, Use, combined, root_use


class Change(NamedTuple):
    """How ``node`` is to be opened anew."""

    node: Node
    mode: Mode
    children: Mapping[str, Node | None] = {}
    """What is put into its slots (None: nothing); in ``file`` an image of the format."""
    options: Mapping[str, Any] | None = None
    """Those of its driver that are not left to their defaults; None: as they are."""


async def reopen(node: Node, *, writable: bool | None = None) -> None:
    """Open ``node`` again, for reading or writing; see :func:`reopen_all`."""
    mode = node.mode or Mode(writable=not node.read_only)
    if writable is not None:
        mode = mode._replace(writable=writable)
    await reopen_all([Change(node, mode)])


async def reopen_all(changes: Sequence[Change]) -> None:
    """Open nodes again, each with what its own bytes are in (not its backing file, and no node that
    others use for itself, unless there is a change for it).

    All data are flushed before; a flush that failed earlier is forgotten with what it covered, so
    reopening is how a disk goes on after that.  Nobody else may use the disks meanwhile.

    Raises OSError and DiskError; all disks then are what they were before.
    """
    nodes = [change.node for change in changes]
    for node in nodes:
        node.changing = True
    try:
        for node in nodes:
            node.changed()
            for above in _above(node):
                await above.engine.epochs.passed()  # they may know where this node's bytes are
        for change in changes:
            for layer in _layers(change.node):
                await _settle(layer)
        await _Reopening(changes).run()
    finally:
        for node in nodes:
            node.changing = False
            node.changed()


def _above(node: Node) -> list[MappedNode]:
    """All that read through ``node``."""
    found = [node]
    for layer in found:
        found += [edge.parent for edge in layer.parents if edge.parent not in found]
    return [layer for layer in found[1:] if isinstance(layer, MappedNode)]


def _layers(node: Node) -> list[Node]:
    """``node`` and all below it that its own bytes are in, each before its children."""
    found = [node]
    for layer in found:
        for slot, edge in layer.children.items():
            child, graph = edge.child, node.graph
            shared = graph is not None and child in graph.roots
            if slot != "backing" and not shared and child not in found:
                found.append(child)
    return found


async def _settle(node: Node) -> None:
    """Bring everything that ``node`` holds down to its child.  It can be gone on with."""
    if isinstance(node, MappedNode) and not node.read_only:
        if node.engine.failure is None:
            await node.engine.close()
        else:
            await node.engine.shared.drain()


class _Reopening:
    """Every step says how it is taken back, and what is left to do when all have succeeded; neither
    can fail."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.changes = changes
        self.tops = [change.node for change in changes]
        self._used = list(self.tops)
        """What other uses are made of: they, and the children that come and go."""
        self._undo: list[Callable[[], None]] = []
        self._keep: list[Callable[[], None]] = []

    async def run(self) -> None:
        sizes = [node.size for node in self.tops]
        locked = list(self._hold_locks())
        try:
            self._fill()
            locked += self._hold_locks()
            modes = self._modes()
            order = [node for node in walk(*self.tops) if node in modes]
            for layer in reversed(order):
                await self._switch(layer, modes[layer])
            for change in self.changes:
                self._use(change)
            self._derive()
            for layer in reversed(order):
                if isinstance(layer, MappedNode):
                    await self._format_again(layer)
            for node, size in zip(self.tops, sizes, strict=True):
                if node.size != size:
                    _check_resize(node)
        except BaseException:
            for step in reversed(self._undo):
                step()
            raise
        else:
            for step in self._keep:
                step()
        finally:
            self._derive()
            for locks in locked:
                locks.settle()
            self._refresh()  # what nobody needs any more is given up

    def _hold_locks(self) -> Iterator[Any]:
        """Nothing that is locked below the nodes can be had by others until this has ended."""
        for node in walk(*self.tops):
            locks = getattr(node, "locks", None)
            if locks is not None:
                locks.keep()
                yield locks

    def _derive(self) -> None:
        """All permissions anew: what is left of those before would conflict with them."""
        for node in walk(*self._used):
            for edge in node.children.values():
                edge.perms, edge.shared = frozenset(), ALL
        self._refresh()

    def _refresh(self) -> None:
        for node in self._used:
            if node.graph is not None:
                node.graph.refresh(node)

    def _fill(self) -> None:
        for change in self.changes:
            self._check_cycles(change)
            self._undo.append(partial(_set_options, change.node, change.node.options))
            change.node.options = _with(change.node.options, change.node, change)
        after = {change.node: change.children for change in self.changes if change.children}
        before = {node: {slot: node.child(slot) for slot in found} for node, found in after.items()}
        for children in (*before.values(), *after.values()):
            self._used += [child for child in children.values() if child is not None]
        formats: list[Any] = [getattr(node, "format", None) for node in after]
        had = [getattr(format, "has_backing", None) for format in formats]

        def undo() -> None:
            _fill(before)
            for format, backed in zip(formats, had, strict=True):
                if backed is not None:
                    format.has_backing = backed

        self._undo.append(undo)
        _fill(after)

    def _check_cycles(self, change: Change) -> None:
        """Raise UsageError where a node would be below itself."""
        after = {one.node: one.children for one in self.changes}
        for slot, child in change.children.items():
            found = [] if child is None else [child]
            for node in found:
                if node is change.node:
                    name = "" if child is None else child.name
                    raise UsageError(
                        f"Making '{name}' a {slot} child of '{node.name}' would create a cycle"
                    )
                now = {slot: edge.child for slot, edge in node.children.items()}
                below = {**now, **after.get(node, {})}.values()
                found += [one for one in below if one is not None and one not in found]

    def _modes(self) -> dict[Node, Mode]:
        """The modes of the nodes and of all below them that their own bytes are in: these inherit
        what they were not given themselves."""
        found = {change.node: change.mode for change in self.changes}
        for node in walk(*self.tops):
            mode = found.get(node)
            layers = set(_layers(node)) if mode is not None else ()
            for slot, edge in node.children.items():
                child = edge.child
                if mode is None or slot == "backing" or child in found or child not in layers:
                    continue
                below = mode.below()
                if slot in getattr(getattr(node, "format", None), "read_only_slots", ()):
                    below = below._replace(writable=False)
                said = child.mode.said if child.mode is not None else {}
                found[child] = take_common(dict(said), below)[0]
        return found

    async def _switch(self, node: Node, mode: Mode) -> None:
        """Its mode, but for what the image in it says of itself."""
        file = node.child("file")
        if mode.writable and file is not None and file.read_only:
            if node.driver_name != "raw":
                raise UsageError("Block node is read-only")
            mode = mode._replace(writable=False)
        if mode.writethrough and not isinstance(node, GuardedNode):
            raise NotSupported("cache mode 'writethrough' can only be chosen when a disk is opened")
        was = node.read_only, node.mode
        change = getattr(node, "reopen", None)
        if change is None:
            node.read_only = not mode.writable
        else:
            how = {"cache": mode.cache, "auto_read_only": mode.auto_read_only}
            before = await change(writable=mode.writable, **how)
            if before is not None:
                self._undo.append(before.undo)
                self._keep.append(before.keep)

        def undo() -> None:
            node.read_only, node.mode = was

        self._undo.append(undo)
        node.mode = mode

        def keep() -> None:
            if isinstance(node, GuardedNode):
                node.writethrough = mode.writethrough
            if isinstance(node, MappedNode):
                node.keeps_discarded = mode.exact and mode.discard == "ignore"
            elif hasattr(node, "unmap"):
                node.unmap = mode.discard == "unmap"
            detect_zeroes(node, mode.detect_zeroes)

        self._keep.append(keep)

    def _use(self, change: Change) -> None:
        node, graph = change.node, change.node.graph
        if graph is None or change.mode.exact:
            return
        # Of a disk it was said as a whole whether it is written to.
        self._undo.append(partial(_put_back, graph.roots, node, graph.roots.get(node)))
        self._undo.append(partial(_put_back, graph.extra, node, graph.extra.get(node)))
        writable = not node.read_only
        if node in graph.roots:
            graph.use(node, root_use(writable, graph.roots[node].shared))
        else:
            _put_back(graph.extra, node, root_use(True) if writable else None)

    async def _format_again(self, node: MappedNode) -> None:
        """Read the image anew in the new mode, with an engine of its own."""
        driver = registry.driver(node.driver_name)
        assert driver.open is not None
        change = next((one for one in self.changes if one.node is node), None)
        old, before, creations = node.engine, node.format, node.creations
        options = _with(getattr(before, "options", {}), node, change)
        options.update({"read-only": node.read_only, "writable": not node.read_only})
        rebased = change is not None and "backing" in change.children
        if node.child("backing") is not None:
            options["backing"] = "given"
        elif rebased or "backing" in node.options:  # it is to have none, whatever it names
            options["backing"] = None
        format, procedure = driver.open(options)

        async def opener(
            slot: str, reference: str, inner: str | None, writable: bool = True
        ) -> None:
            # Everything that was named when it was opened first is still open.
            if slot != "backing" and node.child(slot) is None:
                rule = "the image did not name it when it was opened"
                raise Refused(reference, rule, "opening the image anew", file=display_name(node))

        def undo() -> None:
            node.engine.view.clear()
            node.engine, node.format, node.creations = old, before, creations

        self._undo.append(undo)
        node.engine = Engine(node.driver, format, old.slots, old.tables, opener)
        await node.run_procedure(procedure, whole_image=False)
        node.format = format  # not before: who asks for the size is told that of the old one
        node.engine.opener = None
        if rebased:
            backing = node.child("backing") is not None or getattr(format, "backing_file", None)
            _put_back(node.options, "backing", "given" if backing else None)

        def keep() -> None:
            _keep_bitmaps(old, node.engine, change is not None and "file" in change.children)
            old.view.clear()
            old.tables.withdraw(old.view.owner)
            node.keep_tables()
            equip(node)

        self._keep.append(keep)


def _fill(children: Mapping[Node, Mapping[str, Node | None]]) -> None:
    """All at once: what is below one may be above it afterwards."""
    for node, found in children.items():
        for slot, child in found.items():
            if child is not node.child(slot):
                node.detach(slot)
    for node, found in children.items():
        for slot, child in found.items():
            if child is not None and child is not node.child(slot):
                node.attach(slot, child)


def _set_options(node: Node, options: dict[str, Any]) -> None:
    node.options = options


def _keep_bitmaps(old: Engine, new: Engine, other_file: bool) -> None:
    """Those in memory stay what they were, for who uses them."""
    for bitmap in old.bitmaps:
        stored = new.bitmaps.find(bitmap.name)
        if not bitmap.persistent:
            new.bitmaps.add(bitmap)
        elif bitmap.loaded and stored is not None and not (stored.inconsistent or other_file):
            new.bitmaps.replace(bitmap)


def _with(options: Mapping[str, Any], node: Node, change: Change | None) -> dict[str, Any]:
    """``options`` with those of its driver that ``change`` gives to ``node``."""
    if change is None or change.options is None:
        return dict(options)
    declared = {option.name for option in registry.driver(node.driver_name).options}
    kept = {key: value for key, value in options.items() if key not in declared - {"backing"}}
    return {**kept, **change.options}


def _put_back(found: dict[Any, Any], key: Any, value: Any) -> None:
    """What was there under ``key``; None: nothing."""
    if value is None:
        found.pop(key, None)
    else:
        found[key] = value


def _check_resize(node: Node) -> None:
    """Raise UsageError where some user counts on the size."""
    graph = node.graph
    if graph is not None:
        users = [uses[node] for uses in (graph.roots, graph.extra) if node in uses]
        combined(node, [*users, Use(frozenset({RESIZE}))])
