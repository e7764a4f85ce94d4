"""What the machine asks of one extent of a VMDK image.

The machine (``format.py``) has a sorted list of parts and only dispatches: it cuts ranges at the
borders of parts and joins the answers.  Every part knows its own file and nothing of the others.
Offsets and ranges given to a part are relative to its start; extents and steps that it makes carry
guest offsets of the image (``start`` added) and host offsets in ``slot``.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...contract import HostRange, MetaWrite, NeedMeta, Plan, Procedure, Range, TableStore
from ...extents import Extent
from ...findings import CheckResult
from ...hints import Any, Protocol


class Image(Protocol):
    """What a part may ask of the machine that it belongs to."""

    tables: TableStore
    writable: bool
    ready: bool
    """The `before` groups are durable: data may be overwritten in place, entries may change."""
    has_backing: bool
    """A hole shows the backing file; False: it reads as zeroes."""
    zero_beyond_end: bool
    """Bytes behind the end of a file read as zeroes once the file has grown over them."""


class Part(Protocol):
    """One extent.  ``start`` and ``length`` in guest bytes; ``unit``: its grain in bytes, 1 where
    bytes are mapped one by one; ``weight``: bytes of tables that it keeps in memory."""

    slot: str
    start: int
    length: int
    unit: int
    weight: int

    def map(self, offset: int, length: int, out: list[Extent]) -> NeedMeta | None:
        """Append extents for the range in guest order, as far as the tables in memory go.  May
        stop early: with what is missing, or with None when at least one extent was appended.
        Raises ImageError at an entry that breaks the specification."""

    def gather(self, ranges: Sequence[Range], kind: str) -> NeedMeta | bool:
        """Whether a plan of ``kind`` is possible, or which tables must be loaded to tell; changes
        nothing.  False: zeroes could be stored only as data (never for WRITE).  Ranges are those
        of `Format.plan`, cut to this part; for zeroes and discards they begin and end at ``unit``
        or at the part's end.  Raises ImageError."""

    def reserve(self, ranges: Sequence[Range], kind: str, plan: Plan) -> Any:
        """Take what is needed (`gather` has said True, nothing has changed since): add steps and
        pins to ``plan``, return what `commit` or `abort` need.  Raises NoSpace, and has taken
        nothing then; the machine aborts what other parts of the same plan have taken."""

    def commit(self, state: Any) -> None:
        """The data are written: point to them.  Cannot fail."""

    def abort(self, state: Any) -> None:
        """Give back what `reserve` took.  Cannot fail."""

    def load(self, offset: int, data: bytes) -> None:
        """Decode a table of this part's slot into the store."""

    def before(self) -> list[MetaWrite]:
        """What must be durable before the first change of this part's map; empty when it is.  The
        machine puts those of all parts into its one `before` group (plans share it)."""

    def announced(self) -> None:
        """What `before` gave is durable."""

    def freeze(self, tables: list[MetaWrite], links: list[MetaWrite]) -> Any:
        """Append all dirty metadata: to ``tables`` what nothing on disk points at yet, to
        ``links`` the entries that do (two groups of the machine, a barrier between them).  The
        dirty flags of its tables are taken back.  Returns a token for `settle`, or None."""

    def settle(self, token: Any) -> list[HostRange]:
        """The groups are on disk: which host space is free now."""

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None:
        """These ranges, all of this slot, are punched and may be used again."""

    def closing(self) -> list[MetaWrite]:
        """What says that the extent was closed in order; written when nothing is dirty."""

    def check(self, result: CheckResult, fix: str) -> Procedure:
        """Check this extent on disk with nothing dirty (and repair it: ``fix`` "", "leaks" or
        "all"), adding to ``result``.  Forgets what it kept in memory of what it changed."""

    def info(self) -> dict[str, Any]:
        """``format``, ``virtual-size``, ``cluster-size``, ``compressed`` where they apply, keyed
        as in the ``extents`` list of ``qemu-img info --output=json``."""


class Plain:
    """The answers of a part without metadata."""

    weight = 0

    def load(self, offset: int, data: bytes) -> None:
        """Never asked for."""
        raise AssertionError("an extent without tables asked for one")

    def abort(self, state: Any) -> None:
        """Nothing was reserved."""

    def commit(self, state: Any) -> None:
        """Nothing to point at."""

    def before(self) -> list[MetaWrite]:
        """Nothing to announce."""
        return []

    def announced(self) -> None:
        """Nothing was."""

    def freeze(self, tables: list[MetaWrite], links: list[MetaWrite]) -> Any:
        """Nothing is ever dirty."""
        return None

    def settle(self, token: Any) -> list[HostRange]:
        """Nothing is ever freed."""
        return []

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None:
        """Nothing is ever freed."""

    def closing(self) -> list[MetaWrite]:
        """Nothing to say."""
        return []
