"""``blockdev-reopen``: other options, and other children, for nodes that are in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from ..errors import UsageError
from ..graph import names
from ..graph.detect import detect_zeroes
from ..graph.graph import walk
from ..graph.node import Node
from ..graph.options import Mode, take_common
from ..graph.perms import WRITE
from ..graph.reopen import reopen
from .blockdev import OPTIONS
from .commands import command
from .daemon import Daemon
from .nodes import release
from .session import Monitor
from .types import Array

_CHILDREN = ("file", "image", "backing")


@command("blockdev-reopen")
async def blockdev_reopen(
    monitor: Monitor, options: Annotated[list[dict[str, Any]], Array(OPTIONS)]
) -> None:
    """Open nodes anew where they are in use: ``read-only``, ``cache``, ``discard`` and
    ``detect-zeroes`` may change, and by their names the nodes in ``file`` and ``backing``.

    What is not given gets its default, but for ``backing``, which must be given where there is one;
    what cannot be changed must be given as it is.  What is put into ``file`` is read anew.  Nodes
    are opened anew one after the other: those before one that fails stay as they are then.
    """
    daemon = monitor.daemon
    for wanted in options:
        _node(daemon, wanted)
    for wanted in options:
        await _reopen(daemon, wanted)


def _node(daemon: Daemon, wanted: Mapping[str, Any]) -> Node:
    name = wanted.get("node-name")
    if not name:
        raise UsageError("node-name not specified")
    node = daemon.graph.nodes.get(name)
    if node is None:
        raise UsageError(f"Failed to find node with node-name='{name}'")
    return node


async def _reopen(daemon: Daemon, wanted: Mapping[str, Any]) -> None:
    node = _node(daemon, wanted)
    daemon.check_free(node)
    own = dict(wanted)
    mode, _ = take_common(own, Mode(writable=True, exact=True))
    children = _children(daemon, node, own)
    _check_same(node, own)
    if mode.force_share != bool(node.options.get("force-share")):
        raise UsageError("Cannot change the option 'force-share'")
    if not mode.writable and WRITE in daemon.needs(node):
        raise UsageError(f"Read-only block node '{node.name}' cannot support read-write users")
    before = {slot: node.child(slot) for slot in children}
    drain = daemon.draining(node)
    await drain.begin()
    try:
        cache = "unsafe" if mode.no_flush else "none" if mode.direct else "writeback"
        given = node.options.get("backing")
        if "backing" in children:
            node.options["backing"] = "given"
        try:
            await reopen(node, writable=mode.writable, cache=cache, children=children)
        except BaseException:
            if given is None:
                node.options.pop("backing", None)
            raise
        format = getattr(node, "format", None)
        if node.child("backing") is None and not getattr(format, "backing_file", None):
            node.options.pop("backing", None)  # it names none
        node.mode = mode
        detect_zeroes(node, mode.detect_zeroes)
        if hasattr(node, "keeps_discarded"):
            node.keeps_discarded = mode.discard == "ignore"
        daemon.refresh(node)
    finally:
        drain.end()
    for child in before.values():
        if child is not None and child not in children.values():
            daemon.refresh(child)
            await release(daemon, child)


def _children(daemon: Daemon, node: Node, own: dict[str, Any]) -> dict[str, Node | None]:
    """The children that are to be others, taken out of the options ``own``."""
    found: dict[str, Node | None] = {}
    for slot in _CHILDREN:
        now = node.child(slot)
        if slot not in own:
            if slot == "backing" and now is not None:
                raise UsageError(f"backing is missing for '{node.name}'")
            continue
        if isinstance(own[slot], dict):
            first = next(iter(names.flatten(own[slot])))
            raise UsageError(f"Cannot change the option '{slot}.{first}'")
        name = own.pop(slot)
        child = None if name is None else daemon.find("", name)
        if child is not None and node in walk(child):
            raise UsageError(
                f"Making '{name}' a {slot} child of '{node.name}' would create a cycle"
            )
        if child is not now:
            found[slot] = child
    return found


def _check_same(node: Node, own: Mapping[str, Any]) -> None:
    """Raise UsageError for an option that is not what it is."""
    now = names.flatten(node.options)
    for key, value in names.flatten(own).items():
        child = node.child(key.partition(".")[0])
        same = value == child.name if child is not None else now.get(key) == value
        if not same:
            raise UsageError(f"Cannot change the option '{key}'")
