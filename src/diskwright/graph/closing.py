"""Closing disks, and wording why one could not be opened."""

from __future__ import annotations

import os

from ..engine.kernel import Cancelled
from ..errors import DiskError
from .graph import Graph
from .node import Node


async def close_disk(node: Node) -> None:
    """Close a disk from its top downwards; what another disk of the graph uses stays open.

    Every node is closed, whatever happens; then the first error is raised.
    """
    first = await _close(node)
    if first is not None:
        raise first


async def discard_disk(node: Node) -> None:
    """Close after a failure that is about to be raised: errors of the closing add nothing."""
    await _close(node)


def abandon_disk(top: Node) -> None:
    """Give up the files of a disk that was dropped while it was open, and write nothing: others can
    lock them at once.  No request may be in flight."""
    nodes, seen = [top], set[Node]()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [edge.child for edge in node.children.values()]
            node.abandon()


async def _close(top: Node) -> BaseException | None:
    first: BaseException | None = None
    graph: Graph | None = top.graph
    if graph is not None:
        graph.roots.pop(top, None)
    closing = [top]
    closed: set[Node] = set()
    while closing:
        node = closing.pop()
        if node in closed:
            continue  # it was in two slots
        if node.parents or (graph is not None and node in graph.roots):
            _relax(graph, node)
            continue
        closed.add(node)
        try:
            await node.close()
        except (Exception, Cancelled) as error:
            first = first or error
        for slot in list(node.children):
            child = node.detach(slot)
            if child is not None:
                closing.append(child)
        if graph is not None:
            graph.remove(node)
    return first


def _relax(graph: Graph | None, node: Node) -> None:
    """A node that stays gives up what only the closed disk needed of it."""
    if graph is not None and graph.nodes.get(node.name) is node:
        try:
            graph.refresh(node)
        except (OSError, DiskError):
            pass  # it holds more than it needs


def explain(error: BaseException, *, top: str = "") -> str:
    """One line that says what could not be opened and why, as the tools word it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"Could not open '{os.fsdecode(error.filename)}': {error.strerror}"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    else:
        text = str(error)
    for note in getattr(error, "__notes__", ()):
        text = f"{note}: {text}"
    return f"Could not open '{top}': {text}" if top else text
