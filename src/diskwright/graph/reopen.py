"""Opening a disk again in another mode, in place: its users and its name stay."""

from __future__ import annotations

from collections.abc import Mapping

from ..engine.engine import Engine
from ..errors import DiskError, NotSupported, Refused
from . import registry
from .creating import equip
from .display import display_name
from .guard import GuardedNode
from .mapped import MappedNode
from .node import Node
from .options import CACHE_MODES
from .perms import root_use


async def reopen(
    node: Node,
    *,
    writable: bool | None = None,
    cache: str | None = None,
    children: Mapping[str, Node | None] | None = None,
) -> None:
    """Open ``node`` and what its own bytes are in (not its backing file, and no node that others
    use for itself) again.

    ``writable`` and ``cache`` (a mode's name) default to what they are.  ``children`` are put into
    their slots between (None: nothing), so what is in ``file`` must be an image of the format.
    All data are flushed before; a flush that failed earlier is forgotten with what it covered, so
    reopening is how a disk goes on after that.  Nobody else may use the disk meanwhile.

    Raises OSError and DiskError; the disk then is what it was before where it still can be.
    """
    before = not node.read_only
    wanted = before if writable is None else writable
    layers = _layers(node)
    old = {slot: node.child(slot) for slot in children or {}}
    node.changing = True
    try:
        node.changed()
        for above in _above(node):
            await above.engine.epochs.passed()  # they may know where this node's bytes are
        for layer in layers:
            await _settle(layer)
        try:
            if children:
                _fill(node, children)
                layers = _layers(node)
            await _switch(node, layers, wanted, cache)
        except (OSError, DiskError):
            if old:
                _fill(node, old)
            if old or wanted != before:
                await _switch(node, _layers(node), before, None)
            raise
    finally:
        node.changing = False
        node.changed()


def _fill(node: Node, children: Mapping[str, Node | None]) -> None:
    for slot, child in children.items():
        if child is None:
            node.detach(slot)
        elif child is not node.child(slot):
            node.attach(slot, child)


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


def _only_read(layers: list[Node]) -> set[Node]:
    """Those that are never written: files that an image names for reading alone."""
    return {
        edge.child
        for layer in layers
        if isinstance(layer, MappedNode)
        for slot, edge in layer.children.items()
        if slot in getattr(layer.format, "read_only_slots", ())
    }


async def _settle(node: Node) -> None:
    """Bring everything that ``node`` holds down to its child."""
    if isinstance(node, MappedNode) and not node.read_only:
        if node.engine.failure is None:
            await node.engine.close()
        else:
            await node.engine.shared.drain()
            node.engine.view.clear()


async def _switch(node: Node, layers: list[Node], writable: bool, cache: str | None) -> None:
    low = None
    if cache is not None:
        direct, no_flush, writethrough = CACHE_MODES[cache]
        low = "unsafe" if no_flush else "none" if direct else "writeback"
        for layer in layers:
            if isinstance(layer, GuardedNode):
                layer.writethrough = writethrough and layer is node
        if writethrough and not isinstance(node, GuardedNode):
            raise NotSupported(f"cache mode '{cache}' can only be chosen when a disk is opened")
    only_read = _only_read(layers)
    for layer in reversed(layers):
        change = getattr(layer, "reopen", None)
        if change is not None:
            await change(writable=writable and layer not in only_read, cache=low)
        else:
            layer.read_only = not writable
    graph = node.graph
    if graph is not None:
        if node in graph.roots:
            graph.use(node, root_use(writable, graph.roots[node].shared))
        elif writable:
            graph.extra[node] = root_use(True)
        else:
            graph.extra.pop(node, None)
        graph.refresh(node)
    for layer in reversed(layers):
        if isinstance(layer, MappedNode):
            await _format_again(layer, writable)
    node.changed()


async def _format_again(node: MappedNode, writable: bool) -> None:
    """Read the image anew in the new mode, with an engine of its own."""
    driver = registry.driver(node.driver_name)
    assert driver.open is not None
    old = node.engine
    options = {
        **getattr(node.format, "options", {}),
        "read-only": not writable,
        "writable": writable,
    }
    if node.child("backing") is not None:
        options["backing"] = "given"
    elif "backing" in node.options:  # it is to have none, whatever it names
        options["backing"] = None
    format, procedure = driver.open(options)

    async def opener(slot: str, reference: str, inner: str | None, writable: bool = True) -> None:
        # Everything that was named when it was opened first is still open.
        if slot != "backing" and node.child(slot) is None:
            rule = "the image did not name it when it was opened"
            raise Refused(reference, rule, "opening the image anew", file=display_name(node))

    node.engine = Engine(node.driver, format, old.slots, old.tables, opener)
    old.view.clear()
    await node.run_procedure(procedure, whole_image=False)
    node.format = format  # not before: who asks for the size is told that of the old one
    node.engine.opener = None
    for bitmap in old.bitmaps:
        if not bitmap.persistent:
            node.engine.bitmaps.add(bitmap)
    equip(node)
