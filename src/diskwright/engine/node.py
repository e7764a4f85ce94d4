"""Nodes and edges: what every element of a disk's graph can be asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from ..contract import Limits
from ..extents import HOLE, ZERO, Data, Extent
from ..hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernel import BaseDriver, Future

Buffer = bytes | bytearray | memoryview
ReadScattered = Callable[
    [Sequence[Any], Sequence[int], Sequence[int], Sequence[memoryview] | None],
    Awaitable[Sequence[Buffer] | None],
]


class Edge:
    """A parent's use of a child: which slot it fills and what the parent does with it.

    ``perms`` and ``shared`` are sets of ``consistent-read``, ``write``, ``write-unchanged``,
    ``resize``: what the parent needs, and what it lets others do meanwhile.
    """

    __slots__ = ("child", "parent", "perms", "shared", "slot")

    def __init__(
        self,
        parent: Node,
        slot: str,
        child: Node,
        perms: frozenset[str] = frozenset(),
        shared: frozenset[str] = frozenset(),
    ) -> None:
        self.parent, self.slot, self.child = parent, slot, child
        self.perms, self.shared = perms, shared


class Node:
    """One element of the graph.

    Requests are *columns*: ``offsets`` and ``lengths`` (or buffers) of equal count.  A batch
    either succeeds as a whole or raises the first error after all of its parts have ended.
    Requests need not be aligned; reads beyond the end give zeroes at a protocol, are refused
    (``EIO``) by whoever serves a guest.  None of these is called by two drivers.
    """

    driver: BaseDriver
    name: str
    driver_name: str
    """``qcow2``, ``file``, ...: the name in the registry."""
    size: int
    """Length in bytes as the users of this node see it."""
    limits: Limits
    read_only: bool
    children: dict[str, Edge]
    parents: list[Edge]
    options: dict[str, Any]
    """The options that it was opened with (what ``json:`` would need)."""
    graph: Any = None
    """The bookkeeping that it belongs to (:class:`diskwright.graph.graph.Graph`), if any."""
    probed = False
    """True when its format was guessed for want of a signature, so it is raw."""
    changing = False
    """True while it is opened anew: who is above asks it and does not look through it."""
    highest = 0
    """Where writes have ended at most, of those that somebody watches: users' and files'."""
    mode: Any = None
    """How it was opened: cache, discard and so on (:class:`diskwright.graph.options.Mode`)."""
    detect_zeroes = "off"
    """Whether writes are looked at for zeroes: ``off``, ``on`` or ``unmap``."""
    watch: Any = None
    """Who is told of each write before it is carried out (a threshold), if anybody is."""
    wants_events = False
    """True when :meth:`event` must be called (blkdebug)."""

    def __init__(self, driver: BaseDriver, driver_name: str, name: str = "") -> None:
        self.driver = driver
        self.driver_name = driver_name
        self.name = name
        self.size = 0
        self.limits = Limits()
        self.read_only = False
        self.children = {}
        self.parents = []
        self.options = {}

    @property
    def real(self) -> Node:
        """The node itself; of what only stands for a node, that one."""
        return self

    # -- requests
    read_scattered: ReadScattered | None = None
    """Reads a batch whose parts are in several nodes of one kind, the column ``nodes``; None (or
    answers None) where they have to be asked one by one."""

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        """Read; with ``into`` the given views (of the given lengths) are filled and returned."""
        raise NotImplementedError

    async def write(
        self,
        offsets: Sequence[int],
        buffers: Sequence[Buffer],
        flags: int = 0,
    ) -> None:
        """Write.  The buffers must not change until it returns.  Of overlapping requests in one
        batch the later wins."""
        raise NotImplementedError

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        """Make the ranges read as zeroes (flags FUA, MAY_UNMAP, NO_FALLBACK)."""
        raise NotImplementedError

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        """The bytes are not needed; advisory, so parts may be ignored."""
        raise NotImplementedError

    async def flush(self) -> None:
        """All writes that have been answered are durable when it returns."""
        raise NotImplementedError

    def will_flush(self, soon: bool) -> None:
        """Much will be written now and flushed then (``soon``), or that is over.  A medium that is
        slow is best begun with at once; told to all that hold the node's own data."""
        for slot, edge in self.children.items():
            if slot != "backing":
                edge.child.will_flush(soon)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """What ``length`` bytes at ``offset`` are, as this node alone knows it (``Data`` names one
        of its own slots; a leaf's ``Data`` has the slot ``""``)."""
        raise NotImplementedError

    async def reads_zero(self, offset: int, length: int) -> bool:
        """True when the maps of this node and those below say that the range reads as zeroes."""
        for extent in await self.extents(offset, length):
            if extent.kind == HOLE:
                backing = self.child("backing")
                if backing is not None and offset < backing.size:
                    covered = min(extent.length, backing.size - offset)
                    if not await backing.reads_zero(offset, covered):
                        return False
            elif isinstance(extent, Data) and extent.slot and not extent.xform:
                below = self.child(extent.slot)
                if below is None or not await below.reads_zero(extent.host, extent.length):
                    return False
            elif extent.kind != ZERO:
                return False
            offset += extent.length
        return True

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        """Change ``size``; new space reads as zeroes (bytes).  Preallocation: off, metadata,
        falloc, full."""
        raise NotImplementedError

    async def close(self) -> None:
        """Flush, give up locks, end.  Raises if the last flush failed; it is closed then, too."""

    def abandon(self) -> None:
        """Give up what the system holds for this node, without a flush or anything else."""

    # -- events of the metadata machines
    def event(self, tag: str) -> Future[None] | None:
        """Announce that the parent is about to do ``tag``; a future when the step must wait."""
        return None

    # -- structure
    def attach(
        self,
        slot: str,
        child: Node,
        perms: frozenset[str] = frozenset(),
        shared: frozenset[str] = frozenset(),
    ) -> Edge:
        """Make ``child`` the node in ``slot`` (replacing what was there)."""
        self.detach(slot)
        edge = Edge(self, slot, child, perms, shared)
        self.children[slot] = edge
        child.parents.append(edge)
        self.child_changed(slot)
        return edge

    def detach(self, slot: str) -> Node | None:
        """Take the node out of ``slot`` and return it (not closed)."""
        edge = self.children.pop(slot, None)
        if edge is None:
            return None
        edge.child.parents.remove(edge)
        self.child_changed(slot)
        return edge.child

    def child(self, slot: str) -> Node | None:
        """The node in ``slot``."""
        edge = self.children.get(slot)
        return edge.child if edge else None

    def child_changed(self, slot: str) -> None:
        """A child was attached, detached, resized or reopened: refresh what depends on it."""

    def changed(self) -> None:
        """Tell all parents that this node's size, limits or mode changed."""
        for edge in list(self.parents):
            edge.parent.child_changed(edge.slot)
