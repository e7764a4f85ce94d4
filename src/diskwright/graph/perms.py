"""Who may do what to a node: what each user needs, and what it lets others do meanwhile.

Needs and shares flow down from the users of a disk to the leaves, which hold them as locks.  What
each kind of node asks of its children was measured at the lock bytes that qemu 10.0 holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..errors import UsageError
from ..records import NamedTuple
from .node import Edge, Node

CONSISTENT_READ = "consistent-read"
WRITE = "write"
WRITE_UNCHANGED = "write-unchanged"
RESIZE = "resize"
_IN_ORDER = (CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE)
ALL = frozenset(_IN_ORDER)

# A format's metadata make sense only while nobody else changes its file.
_FORMAT_SHARES = frozenset({CONSISTENT_READ, WRITE_UNCHANGED})


class Use(NamedTuple):
    """What somebody needs of a node (``perms``) and lets others do (``shared``)."""

    perms: frozenset[str]
    shared: frozenset[str] = ALL


def root_use(writable: bool, shared: frozenset[str] = ALL, resize: bool = False) -> Use:
    """The use that a program makes of a disk that it opened."""
    perms = {CONSISTENT_READ}
    if writable:
        perms.add(WRITE)
    if resize:
        perms.add(RESIZE)
    return Use(frozenset(perms), shared)


def combined(node: Node, users: Iterable[Use]) -> Use:
    """All uses of ``node`` taken together: everything that anyone needs, and what all share.

    Raises UsageError when one needs what another does not share.  What one parent does through
    several slots is its own affair (two extents in one file).
    """
    root = f"an unnamed block device (uses node '{node.name}' as 'root' child)"
    uses = [(use, root) for use in users]
    uses.extend(_of_parents(node))
    perms: frozenset[str] = frozenset()
    shared = ALL
    for i, (use, who) in enumerate(uses):
        for other, whose in uses[:i] + uses[i + 1 :]:
            missing = use.perms - other.shared
            if missing:
                raise UsageError(conflict(node, missing, who, whose))
        perms |= use.perms
        shared &= use.shared
    return Use(perms, shared)


def _of_parents(node: Node) -> Iterator[tuple[Use, str]]:
    """What each parent makes of ``node``, and how to call it."""
    by: dict[tuple[Node, bool], list[Edge]] = {}
    for edge in node.parents:
        by.setdefault((edge.parent, edge.slot == "backing"), []).append(edge)
    for (parent, _), edges in by.items():
        perms = frozenset().union(*(edge.perms for edge in edges))
        shared = ALL.intersection(*(edge.shared for edge in edges))
        slot = edges[0].slot
        yield (
            Use(perms, shared),
            f"node '{parent.name}' (uses node '{node.name}' as '{slot}' child)",
        )


def conflict(node: Node, missing: frozenset[str], who: str, whose: str) -> str:
    """That ``who`` needs of ``node`` what ``whose`` does not share, in QEMU's words."""
    words = ", ".join(name for name in _IN_ORDER if name in missing)
    return (
        f"Permission conflict on node '{node.name}': permissions '{words}' are both required by "
        f"{who} and unshared by {whose}."
    )


def child_use(node: Node, kind: str, slot: str, use: Use, force_share: bool) -> Use:
    """What ``node`` (of driver kind ``kind``) makes of its child in ``slot`` while it is itself
    put to ``use``."""
    if slot == "backing":
        return Use(use.perms & {CONSISTENT_READ})
    if kind != "format":
        return use
    if node.driver_name == "raw":
        window = "offset" in node.options or "size" in node.options
        return use._replace(shared=use.shared - {RESIZE}) if window else use
    perms = {CONSISTENT_READ} if node.read_only else {CONSISTENT_READ, WRITE, RESIZE}
    if slot == "data-file":
        # It is no metadata: whoever shares the disk shares it, but for its length.
        return Use(frozenset(perms), ALL if force_share else use.shared - {RESIZE})
    return Use(frozenset(perms), ALL if force_share else _FORMAT_SHARES)
