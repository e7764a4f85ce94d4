"""raw: the bytes of the file are the bytes of the disk, or a window of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..contract import (
    DISCARD,
    OP_DATA,
    OP_DISCARD,
    OP_ZERO,
    WRITE,
    Length,
    MetaWrite,
    NeedMeta,
    Plan,
    Procedure,
    Range,
    Step,
    Truncate,
    Write,
)
from ..declare import Driver, Option
from ..errors import NotSupported, UsageError
from ..extents import Data, Extent
from ..hints import Any, ClassVar
from ..tableless import Tableless
from ..units import align_up

SLOT = "file"
PREALLOCATIONS = ("off", "falloc", "full")
_FIRST = 4096


class Raw(Tableless):
    """The format whose map is an offset.

    With ``offset`` or ``size`` the disk is a window of the file and keeps its size; without, it
    is as long as the file.
    """

    name: ClassVar[str] = "raw"
    unit = 1
    backing_file: str | None = None
    backing_format: str | None = None

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.offset = 0
        self.size = 0
        self.fixed = options.get("size") is not None or bool(options.get("offset"))
        self.writable = bool(options.get("writable", not options.get("read-only", False)))

    def follow(self, length: int) -> None:
        """The file has ``length`` bytes now; a disk that is no window changes with it."""
        if not self.fixed:
            self.size = align_up(length, 512)

    def info(self) -> dict[str, Any]:
        """Nothing beyond what every image has."""
        return {}

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        """Plain data everywhere."""
        shift, writable = self.offset, self.writable
        return [Data(SLOT, offset + shift, n, writable) for offset, n in ranges if n], None

    def map_batch(
        self, offsets: Sequence[int], lengths: Sequence[int], write: bool
    ) -> Sequence[int]:
        """The offsets moved into the window."""
        shift = self.offset
        return [offset + shift for offset in offsets] if shift else offsets

    def map_one(self, offset: int, length: int, write: bool) -> int:
        """One offset moved into the window."""
        return offset + self.offset

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """The same operation on the file."""
        op = OP_DATA if kind == WRITE else OP_DISCARD if kind == DISCARD else OP_ZERO
        plan = Plan()
        plan.steps = [
            Step(op, offset, length, SLOT, offset + self.offset)
            for offset, length in ranges
            if length
        ]
        return plan

    def resize(self, size: int, preallocation: str = "off", shrink: bool = False) -> Procedure:
        """Set the length of the file.  Raises NotSupported for a window."""
        if self.fixed:
            raise NotSupported("Cannot resize fixed-size raw disks")
        if size < self.size and not shrink:
            raise UsageError("Use the --shrink option to perform a shrink operation.")
        if preallocation not in PREALLOCATIONS:
            raise UsageError(f"Unsupported preallocation mode '{preallocation}'")
        yield Truncate(SLOT, size, preallocation)
        if size < (yield Length(SLOT)):
            raise NotSupported("Cannot resize device files")
        self.size = size


def open_format(options: Mapping[str, Any]) -> tuple[Raw, Procedure]:
    """A format and the procedure that measures the file."""
    raw = Raw(options)
    return raw, _open(raw)


def _open(raw: Raw) -> Procedure:
    # A file that ends within a sector is a disk that ends with it; the rest reads as zeroes.
    length = align_up((yield Length(SLOT)), 512)
    offset = int(raw.options.get("offset") or 0)
    size = raw.options.get("size")
    if offset > length:
        raise UsageError(
            f"Offset ({offset}) cannot be greater than size of the containing file ({length})"
        )
    if size is None:
        size = align_up(length - offset, 512)
    elif int(size) % 512:
        raise UsageError("Specified size is not multiple of 512")
    elif int(size) > length - offset:
        raise UsageError(
            f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  "
            f"actual size of the containing file ({length})"
        )
    raw.offset, raw.size = offset, int(size)
    raw.fixed = bool(offset) or raw.options.get("size") is not None
    return raw


def create(options: Mapping[str, Any]) -> Procedure:
    """Give the file its length, rounded up to 512 bytes."""
    size = options.get("size")
    if size is None or size < 0:
        raise UsageError("Image size must be specified")
    if options.get("backing_file"):
        raise UsageError("Backing file not supported for file format 'raw'")
    preallocation = options.get("preallocation") or "off"
    if preallocation not in PREALLOCATIONS:
        raise UsageError(f"Parameter 'preallocation' does not accept value '{preallocation}'")
    length = align_up(int(size), 512)
    new = not (yield Length(SLOT))
    yield Truncate(SLOT, length, preallocation)
    if new and length and preallocation == "off":
        # An allocated first block lets direct I/O find out what alignment the file needs.
        yield Write([MetaWrite(SLOT, 0, bytes(min(length, _FIRST)))])


def resize(format: Raw, size: int, preallocation: str = "off", shrink: bool = False) -> Procedure:
    """See :meth:`Raw.resize`."""
    return format.resize(size, preallocation, shrink)


DRIVER = Driver(
    name="raw",
    kind="format",
    options=(
        Option("offset", "size", "Where in the file the disk starts"),
        Option("size", "size", "How long the disk is"),
    ),
    create_options=(
        Option("size", "size", "Virtual disk size"),
        Option(
            "preallocation",
            "enum",
            "Preallocation mode (allowed values: off, falloc, full)",
            "off",
            PREALLOCATIONS,
            own=True,
        ),
    ),
    open=open_format,
    measure=lambda options: (0, 1),
    create=create,
    capabilities=frozenset({"discard", "resize", "zero"}),
)
