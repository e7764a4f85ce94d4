"""``blockdev-reopen``: other options, and other children, for nodes that are in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from ..errors import NotSupported, UsageError
from ..graph import names, registry
from ..graph.node import Node
from ..graph.options import COMMON, Mode, checked, take_common
from ..graph.perms import WRITE
from ..graph.reopen import Change, reopen_all
from .blockdev import OPTIONS
from .commands import command
from .daemon import Daemon
from .nodes import release
from .session import Monitor
from .types import Array

_CHILDREN = ("file", "backing")
_CHANGEABLE = {
    "qcow2": (
        "lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other",
        "discard-no-unref", "overlap-check", "cache-size", "l2-cache-size", "l2-cache-entry-size",
        "refcount-cache-size", "cache-clean-interval", "compression-level", "encrypt",
    ),
    "raw": ("offset", "size"),
    "file": ("drop-cache",),
    "host_device": ("drop-cache",),
}  # fmt: skip
"""Options of drivers that may change."""
_LASTING = ("drop-cache", "encrypt")
"""Those of them that, once given, must be given again."""


@command("blockdev-reopen")
async def blockdev_reopen(
    monitor: Monitor, options: Annotated[list[dict[str, Any]], Array(OPTIONS)]
) -> None:
    """Open nodes anew where they are in use, all of them or, where one cannot be, none.

    What may change are ``read-only``, ``auto-read-only``, ``cache``, ``discard`` and
    ``detect-zeroes``, the nodes in ``file`` and ``backing`` (by their names), ``offset`` and
    ``size`` of a raw node, and what a qcow2 node is told for as long as it is open (caches,
    ``lazy-refcounts``, ``overlap-check``, ``pass-discard-*``, ``discard-no-unref``).  What is not
    given gets its default, but for ``backing``, which must be given where there is one; what cannot
    be changed must be given as it is.  A child that was described when the node was opened may be
    described again.  What is put into ``file`` is read anew.
    """
    daemon = monitor.daemon
    asked: dict[Node, dict[str, Any]] = {}
    for wanted in options:
        asked.setdefault(_node(daemon, wanted), {}).update(wanted)
    changes: dict[Node, Change] = {}
    for node, own in asked.items():
        _plan(daemon, node, dict(own), Mode(writable=True, exact=True), changes)
    _check_writers(daemon, changes)
    before = [
        child for change in changes.values() for slot in change.children
        if (child := change.node.child(slot)) is not None
    ]  # fmt: skip
    drain = daemon.draining(changes)
    await drain.begin()
    try:
        await reopen_all(list(changes.values()))
    finally:
        drain.end()
    for child in before:
        await release(daemon, child)


def _node(daemon: Daemon, wanted: Mapping[str, Any]) -> Node:
    name = wanted.get("node-name")
    if not name:
        raise UsageError("node-name not specified")
    node = daemon.graph.nodes.get(name)
    if node is None:
        raise UsageError(f"Failed to find node with node-name='{name}'")
    return node


def _plan(
    daemon: Daemon,
    node: Node,
    own: dict[str, Any],
    mode: Mode,
    changes: dict[Node, Change],
) -> None:
    """What becomes of ``node`` with the options ``own``, where its parent hands down ``mode``."""
    daemon.check_free(node)
    mode, _ = take_common(own, mode)
    if node.driver_name == "compress":
        raise NotSupported(
            f"Block format 'compress' used by node '{node.name}' does not support reopening files"
        )
    described, children = _children(daemon, node, own)
    options = _options(node, own)
    shared = bool(node.options.get("force-share"))
    if mode.force_share != shared:
        raise _fixed("force-share") if mode.force_share else _lasting("force-share")
    if shared and mode.writable:
        raise UsageError("force-share=on can only be used with read-only images")
    changes[node] = Change(node, mode, children, options)
    for child, words in described.items():
        _plan(daemon, child, words, mode.below(), changes)


def _check_writers(daemon: Daemon, changes: Mapping[Node, Change]) -> None:
    """Raise UsageError where a node is to become read-only under those that write to it, unless
    these are opened anew as well."""
    for node, change in changes.items():
        above = [edge.perms for edge in node.parents if edge.parent not in changes]
        if not change.mode.writable and WRITE in daemon.asked_of(node).union(*above):
            raise UsageError(f"Read-only block node '{node.name}' cannot support read-write users")


def _children(
    daemon: Daemon, node: Node, own: dict[str, Any]
) -> tuple[dict[Node, dict[str, Any]], dict[str, Node | None]]:
    """The children in the options ``own``, which are taken out of there: those that are described,
    and what is put into slots where now is something else."""
    described: dict[Node, dict[str, Any]] = {}
    found: dict[str, Node | None] = {}
    for slot in _CHILDREN:
        now = node.child(slot)
        if slot not in own:
            if slot == "backing" and now is not None:
                raise UsageError(f"backing is missing for '{node.name}'")
            continue
        name = own.pop(slot)
        if isinstance(name, dict):
            if now is None or now in daemon.owned or len(now.parents) > 1:
                raise _fixed(f"{slot}.{next(iter(names.flatten(name)))}")
            described[now] = dict(name)
            continue
        child = None if name is None else daemon.find("", name)
        if child is not now:
            found[slot] = child
    return described, found


def _options(node: Node, own: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the driver, as it knows them.  Raises UsageError for one that would have to change,
    and cannot."""
    driver = registry.driver(node.driver_name)
    now = names.flatten(node.options)
    changeable = _CHANGEABLE.get(node.driver_name, ())
    plain: dict[str, Any] = {}
    for key, value in names.flatten(own).items():
        child = node.child(key.partition(".")[0])
        if child is not None:
            same = value == child.name
        elif _within(key, changeable):
            plain[key] = value
            continue
        else:
            same = now.get(key) == value
        if not same and key != "node-name":
            raise _fixed(key)
        if child is None and key not in ("driver", "node-name"):
            plain[key] = value
    for option in driver.options:
        key, outer = option.name, option.name.partition(".")[0]
        lost = key in now and key not in plain and node.child(outer) is None
        resets = outer in (*COMMON, *_CHILDREN) or _within(key, changeable)
        if lost and (not resets or outer in _LASTING):
            raise _lasting(key)
    return checked(driver, names.nest(plain))


def _within(key: str, options: tuple[str, ...]) -> bool:
    return key in options or key.partition(".")[0] in options


def _fixed(option: str) -> UsageError:
    return UsageError(f"Cannot change the option '{option}'")


def _lasting(option: str) -> UsageError:
    return UsageError(f"Option '{option}' cannot be reset to its default value")
