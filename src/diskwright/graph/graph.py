"""The bookkeeping of a set of nodes: names, roots, permissions, and the tables' common budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..engine.kernel import BaseDriver
from ..engine.tables import Tables
from ..errors import UsageError
from ..hints import Any
from .node import Node
from .perms import ALL, RESIZE, WRITE, Use, child_use, combined
from .registry import kind

TABLE_BUDGET = 32 << 20
"""Bytes of decoded metadata that all formats of a graph keep together."""


class Graph:
    """Nodes that are opened, used and closed together.

    ``tables`` is shared by all of them, so that a long chain keeps to one budget.
    """

    def __init__(self, driver: BaseDriver, budget: int = TABLE_BUDGET) -> None:
        self.driver = driver
        if driver.budget is not None and driver.budget.memory is not None:
            budget = min(budget, driver.budget.memory)
        self.tables = Tables(budget)
        self.secrets: Mapping[str, bytes] = {}
        """What options such as ``key-secret`` name."""
        self.nodes: dict[str, Node] = {}
        self.roots: dict[Node, Use] = {}
        """The nodes that somebody outside uses, and how."""
        self.extra: dict[Node, Use] = {}
        """Further uses, by operations inside (a commit writes to a backing file)."""
        self.sparse: dict[Node, bool] = {}
        """What :func:`.status.sparse_below` found out, once for each node."""
        self.salvage: Mapping[str, Any] | None = None
        """The first format that is opened is to make the best of a damaged image, of which this is
        known (creation options)."""
        self._salvaged = False
        self._serial = 100

    def told_next(self) -> dict[str, Any]:
        """Options for the next format: of a disk that is salvaged all layers are read, though they
        are opened as for a check, so they need their keys."""
        if self.salvage is None:
            return {}
        first, self._salvaged = not self._salvaged, True
        return {"unlock": True, **({"salvage": True, "assumed": self.salvage} if first else {})}

    # -- names
    def new_name(self) -> str:
        """A name for a node that was given none."""
        while True:
            name = f"#block{self._serial}"
            self._serial += 1
            if name not in self.nodes:
                return name

    def check_name(self, name: str) -> None:
        """Raise UsageError unless ``name`` may be given to a new node."""
        if name in self.nodes:
            raise UsageError(f"Duplicate nodes with node-name='{name}'")
        plain = name.replace("-", "").replace(".", "").replace("_", "")
        if not (name[:1].isalpha() and plain.isalnum() and name.isascii()) or len(name) > 31:
            raise UsageError(f"Invalid node-name: '{name}'")

    def add(self, node: Node, name: str = "") -> Node:
        """Take ``node`` in, under ``name`` or one that is made up."""
        if name:
            self.check_name(name)
        node.name = name or self.new_name()
        node.graph = self
        if self.driver.trace is not None:
            self.driver.trace.follow(node)
        self.nodes[node.name] = node
        return node

    def remove(self, node: Node) -> None:
        """Forget a node that was closed."""
        self.roots.pop(node, None)
        self.extra.pop(node, None)
        self.sparse.pop(node, None)
        if self.nodes.get(node.name) is node:
            del self.nodes[node.name]
        node.graph = None

    def find(self, name: str) -> Node:
        """The node called ``name``; raises UsageError when there is none."""
        node = self.nodes.get(name)
        if node is None:
            raise UsageError(f"Cannot find device='{name}' nor node-name='{name}'")
        return node

    # -- permissions
    def use(self, node: Node, use: Use) -> None:
        """Say what the outside does with ``node``; see :meth:`refresh`."""
        self.roots[node] = use

    def refresh(self, top: Node) -> None:
        """Derive what every node at and below ``top`` must be able to do, and have the leaves
        hold it.

        Raises UsageError when users of one node conflict, ImageInUse when another program does.
        """
        for node in walk(top):
            users = [uses[node] for uses in (self.roots, self.extra) if node in uses]
            use = combined(node, users)
            if node.options.get("force-share"):
                use = Use(use.perms, ALL)
            for slot in node.children:
                self._put_to_use(node, slot, use)
            setter = getattr(node, "set_permissions", None)
            if setter is not None:
                setter(use.perms, use.shared)

    def refresh_slot(self, node: Node, slot: str) -> None:
        """The same for the child in one slot of ``node``, whose own use stays what it is."""
        users = [uses[node] for uses in (self.roots, self.extra) if node in uses]
        self._put_to_use(node, slot, combined(node, users))
        self.refresh(node.children[slot].child)

    @staticmethod
    def _put_to_use(node: Node, slot: str, use: Use) -> None:
        force = bool(node.options.get("force-share"))
        edge = node.children[slot]
        need = child_use(node, kind(node.driver_name), slot, use, force)
        edge.perms, edge.shared = need.perms, need.shared
        if edge.child.read_only:  # an extent that the image calls so
            edge.perms -= {WRITE, RESIZE}


def walk(*tops: Node) -> Iterator[Node]:
    """``tops`` and everything below them, each once, every node before its children."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(top, False) for top in tops]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((edge.child, False) for edge in node.children.values())
    return reversed(order)


def leaf_of(node: Node) -> Node:
    """The leaf that holds the node's own data: down the first of its file, image or only child."""
    while True:
        below = primary(node)
        if below is None:
            return node
        node = below


def own_leaves(node: Node) -> list[Node]:
    """All leaves that hold the node's own data and metadata, each once: a disk may be in many
    files.  Those of its backing file are not among them."""
    found: dict[Node, None] = {}
    stack = [node]
    while stack:
        below = stack.pop()
        own = [edge.child for slot, edge in below.children.items() if slot != "backing"]
        if own:
            stack.extend(reversed(own))
        else:
            found[below] = None
    return list(found)


def primary(node: Node) -> Node | None:
    """The child that the node's own bytes are in; None for a leaf."""
    for slot in ("file", "image"):
        child = node.child(slot)
        if child is not None:
            return child
    others = [edge.child for slot, edge in node.children.items() if slot != "backing"]
    return others[0] if others else None


def chain(node: Node) -> Iterator[Node]:
    """``node`` (or the format below its filters), its backing file, that one's, and so on."""
    current: Node | None = node
    while current is not None:
        while "backing" not in current.children:
            if kind(current.driver_name) != "filter":
                break
            below = primary(current)
            if below is None:
                break
            current = below
        yield current
        current = current.child("backing")
