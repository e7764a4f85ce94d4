"""What a format promises to the engine, and the engine to a format.

A format is a pure, synchronous machine: it says *where bytes live* and *what must change in
the metadata*, and never moves a byte.  Whatever is not in memory it asks for by *returning*
:class:`NeedMeta`; whatever must be written it hands out as :class:`Groups`.  Longer work (open,
create, check, resize, ...) is a *procedure*: a generator that yields the requests at the end of
this module and is sent their results; errors are thrown into it.

Offsets and lengths are bytes.  A *slot* names a child node: ``file``, ``backing``,
``data-file``, ``extent.3``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

from .extents import Extent
from .hints import Any, ClassVar, Protocol
from .records import NamedTuple

# What is asked of `plan`.
# WRITE_ZERO keeps the space that a range has, ZERO_UNMAP may give it back.
WRITE, WRITE_ZERO, ZERO_UNMAP, DISCARD = "write", "zero", "zero-unmap", "discard"
# Units that were compressed before: a range is the unit's offset and the length of the result.
WRITE_PACKED = "packed"
# Operations of a step.  OP_PUNCH gives host space back where that makes it read as zeroes, and does
# nothing elsewhere.
OP_DATA, OP_ZERO, OP_DISCARD, OP_PACKED, OP_PUNCH = range(5)

# Flags of a request (they combine).
# COMPRESSED is for whole units that are not stored yet (the last one of a disk may be short).
FUA = 1  # durable before it is answered
MAY_UNMAP = 2  # zeroes may drop the allocation
NO_FALLBACK = 4  # fail with ENOTSUP rather than write zeroes the slow way
COMPRESSED = 8

Range = tuple[int, int]  # (offset, length)


class MetaWrite(NamedTuple):
    """One metadata write; ``tag`` is the event announced before it is issued."""

    slot: str
    offset: int
    data: bytes
    tag: str = "none"


class HostRange(NamedTuple):
    """Host space that a format gives back; with ``told`` False the child is not told of it."""

    slot: str
    offset: int
    length: int
    told: bool = True


class NeedMeta(NamedTuple):
    """Tables that must be in memory before the question can be answered."""

    slot: str
    ranges: Sequence[Range]
    tag: str = "none"


class Step(NamedTuple):
    """One movement that a plan asks for.  It may cover more than was asked; the engine fills the
    rest by an ordinary read under the lease, and behind the end of the disk with zeroes (so it may
    cover less only where the rest of the host space is known to read as zeroes and the guest bytes
    there are zeroes too)."""

    op: int
    guest: int
    length: int
    slot: str
    host: int
    xform: tuple[Any, ...] = ()


class Groups:
    """Metadata writes in the order in which they must become durable.

    ``lead`` needs no order against guest data and goes out together with it (refcount
    increments: a crash between leaves a leak); each list in ``groups`` is durable before the
    next one is issued, and all of them after the data.  They may be made when they are asked for
    (the same each time), so that checksums do not hold everybody else up.  ``token`` goes back to
    ``settle``.
    """

    __slots__ = ("groups", "lead", "token")

    def __init__(
        self,
        groups: Sequence[Sequence[MetaWrite]],
        token: Any = None,
        lead: Sequence[MetaWrite] = (),
    ) -> None:
        self.groups = groups
        self.token = token
        self.lead = lead


class Table:
    """A decoded table in the engine's :class:`TableStore`.

    ``data`` is what the format put there; ``size`` its weight in bytes; ``dirty``: must go into
    the next freeze; ``pins`` and ``writeback``: may not be evicted.
    """

    __slots__ = ("data", "dirty", "offset", "owner", "pins", "size", "slot", "used", "writeback")

    def __init__(self, owner: int, slot: str, offset: int, data: Any, size: int) -> None:
        self.owner, self.slot, self.offset = owner, slot, offset
        self.data = data
        self.size = size
        self.dirty = False
        self.pins = 0
        self.writeback = 0
        self.used = 0


class TableStore(Protocol):
    """One format's view of the tables of the whole chain (the engine's ``Tables``)."""

    generation: int
    """Counts evictions: a format that keeps its own shortcuts drops them when it changes."""

    def get(self, slot: str, offset: int) -> Table | None:
        """The table, marked as used; None when it is not in memory."""

    def put(self, slot: str, offset: int, data: Any, size: int, dirty: bool = False) -> Table: ...

    def drop(self, slot: str, offset: int) -> None:
        """Forget a table whose host space was given back."""

    def dirty(self) -> list[Table]:
        """All dirty tables of this format.  ``freeze`` takes their bytes and sets ``dirty`` to
        False; the engine keeps them in write-back until the bytes are on disk."""

    def mark(self, table: Table) -> None:
        """Make ``table`` dirty."""

    def clear(self) -> None:
        """Forget all tables of this format (after a procedure rewrote them)."""


class Plan:
    """What a write needs: ``steps`` to move, ``before`` groups that must be durable before the
    first byte moves (their token goes to ``settle``, too), ``pins``: the tables that commit or
    abort will touch (the engine holds a pin on each until then), and the format's own ``state``."""

    __slots__ = ("before", "pins", "state", "steps")

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.before: Groups | None = None
        self.pins: list[Table] = []
        self.state: Any = None


class Format(Protocol):
    """The contract of a disk-image format.  Not async, no file handles."""

    name: ClassVar[str]
    size: int
    """Virtual size in bytes."""
    unit: int
    """Allocation unit in bytes (cluster, grain, block): leases of allocating writes have it."""
    cipher_unit: int
    """Smallest range that can be rewritten alone; 1 without encryption."""
    tables: TableStore
    """Set by the engine before the first call."""

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        """Where the bytes are.  May be a prefix: the next call starts behind it."""

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """Reserve all that a write, zero or discard of ``ranges`` needs.

        Gathers every miss without changing anything, then changes.  For WRITE the ranges are
        the exact bytes, in any order, and may overlap; for WRITE_PACKED see there (none is as long
        as a unit; one OP_PACKED step each); for the other kinds they are aligned to ``unit``, or to
        the smaller one of :class:`~diskwright.abilities.FineZeroes` (the last may end at ``size``),
        and no range holds both whole units and a part of one.  None: the format cannot store
        zeroes here but as data (a zero falls back to a write, a discard does nothing), or cannot
        store packed data here.  Raises only
        :class:`~diskwright.errors.NoSpace`.
        """

    def commit(self, plan: Plan) -> None:
        """The data of ``plan`` are written: point to them.  Cannot fail."""

    def abort(self, plan: Plan) -> None:
        """Give the reservations of ``plan`` back.  Cannot fail, loses nothing."""

    def freeze(self) -> Groups:
        """All dirty metadata as bytes, taken in one step."""

    def settle(self, token: Any) -> list[HostRange]:
        """The groups of ``token`` are on disk and older batches have ended: the host space that
        is now free (the engine punches it, then calls ``release``)."""

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None:
        """These ranges are punched (``zeroed``: they now read as zeroes) and may be used again."""

    def load(self, slot: str, offset: int, data: bytes) -> None:
        """A table asked for by NeedMeta was read: decode it into ``tables``."""


class FastMap(Protocol):
    """The column shortcuts that a format may offer."""

    def map_batch(
        self, offsets: Sequence[int], lengths: Sequence[int], write: bool
    ) -> Sequence[int]:
        """Host offsets in slot ``file`` for plain data (with ``write``: only where it may be
        overwritten in place); -1 where the general ``map`` must be asked."""

    def map_one(self, offset: int, length: int, write: bool) -> int:
        """The same for one request."""


# --- procedures: what a generator may yield ---------------------------------------------------


class Read(NamedTuple):
    """Read ``ranges`` of ``slot``; sent back: list of bytes (short only at the end of file when
    ``short``, otherwise padded with zeroes)."""

    slot: str
    ranges: Sequence[Range]
    tag: str = "none"


class Write(NamedTuple):
    """Write all of these (unordered among each other)."""

    writes: Sequence[MetaWrite]


class Barrier(NamedTuple):
    """All earlier writes of the procedure are durable before it goes on."""


class Quiesce(NamedTuple):
    """Forget the decoded tables of this format."""


class Length(NamedTuple):
    """Sent back: the length of the child in ``slot`` in bytes."""

    slot: str


class DataRanges(NamedTuple):
    """Sent back: list of the ranges of ``slot`` within these bytes that may hold more than zeroes,
    ascending; the others are holes of the file."""

    slot: str
    offset: int
    length: int


class Truncate(NamedTuple):
    """Set the length of the child in ``slot``; ``preallocation`` of growth: off, falloc or full."""

    slot: str
    size: int
    preallocation: str = "off"


class Punch(NamedTuple):
    """Give host space back; sent back: True when all of it reads as zeroes now."""

    ranges: Sequence[HostRange]


class Open(NamedTuple):
    """Open what the image names, by the opener that was handed in, and put it into ``slot``.
    Sent back: nothing; a refusal is thrown in.

    ``backing`` is a disk (in ``format``, None: to be found out) and is opened once the procedure
    has ended.  Every other slot is a plain file, which is there when the procedure goes on, and is
    opened for reading alone unless it is ``writable`` (and the image is opened for writing).
    """

    slot: str
    reference: str
    format: str | None = None
    writable: bool = True


class Create(NamedTuple):
    """Make the empty file ``name`` (a bare name) beside the image and put it into ``slot``.

    While an image is created, one that is there is emptied; later it is an error
    (FileExistsError).  What was made goes again when the creation fails, and later when a procedure
    fails before it wrote to another file since.
    """

    slot: str
    name: str


class Compute(NamedTuple):
    """Run a pure function in the pool; sent back: its result."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class GuestRead(NamedTuple):
    """Read guest bytes through this node; sent back: bytes."""

    offset: int
    length: int


class GuestWrite(NamedTuple):
    """Write guest bytes through this node."""

    offset: int
    data: bytes


class Timed(NamedTuple):
    """The same as Compute; sent back: the result, and the seconds of processor time it took."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class Progress(NamedTuple):
    """How far the procedure is; also gives way to other work."""

    done: int
    total: int


Request = (
    Read
    | Write
    | Barrier
    | Quiesce
    | Length
    | DataRanges
    | Truncate
    | Punch
    | Open
    | Create
    | Compute
    | Timed
    | GuestRead
    | GuestWrite
    | Progress
)
Procedure = Generator[Request, Any, Any]


class Limits(NamedTuple):
    """What a node asks of requests; limits merge upwards through the graph."""

    alignment: int = 1
    """Requests the node takes without bouncing (it still takes others)."""
    max_transfer: int = 0
    """Largest request in bytes, 0 for no limit."""
    zero_alignment: int = 1
    max_zero: int = 0
    discard_alignment: int = 1
    max_discard: int = 0

    def merged(self, other: Limits) -> Limits:
        """The stricter of both in every field."""

        def least(a: int, b: int) -> int:
            return min(a, b) if a and b else a or b

        return Limits(
            max(self.alignment, other.alignment),
            least(self.max_transfer, other.max_transfer),
            max(self.zero_alignment, other.zero_alignment),
            least(self.max_zero, other.max_zero),
            max(self.discard_alignment, other.discard_alignment),
            least(self.max_discard, other.max_discard),
        )


def total(ranges: Iterable[Range]) -> int:
    """Bytes covered by ``ranges``."""
    return sum(length for _, length in ranges)
