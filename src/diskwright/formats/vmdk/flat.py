"""Extents without tables: flat files, devices, and those that hold nothing."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from ...contract import (
    DISCARD,
    OP_DATA,
    OP_DISCARD,
    OP_ZERO,
    WRITE,
    Length,
    NeedMeta,
    Plan,
    Procedure,
    Range,
    Step,
)
from ...extents import Data, Extent, Zero
from ...findings import CheckResult
from ...hints import TYPE_CHECKING, Any
from .parts import Plain

if TYPE_CHECKING:
    from .format import Vmdk


class Flat(Plain):
    """``length`` bytes at ``host`` of a file or device, as they are.  ``number`` is that of the
    extent, ``type`` what the descriptor calls it."""

    unit = 1

    def __init__(
        self,
        image: Vmdk,
        slot: str,
        start: int,
        length: int,
        host: int,
        type: str,
        number: int,
    ) -> None:
        self.image = image
        self.slot = slot
        self.start = start
        self.length = length
        self.host = host
        self.type = type
        self.number = number

    def map(self, offset: int, length: int, out: list[Extent]) -> NeedMeta | None:
        """An offset."""
        writable = self.image.writable and self.image.ready
        out.append(Data(self.slot, self.host + offset, length, writable))
        return None

    def gather(self, ranges: Sequence[Range], kind: str) -> NeedMeta | bool:
        """Always."""
        return True

    def reserve(self, ranges: Sequence[Range], kind: str, plan: Plan) -> Any:
        """The same operation on the file."""
        op = OP_DATA if kind == WRITE else OP_DISCARD if kind == DISCARD else OP_ZERO
        start, host, slot = self.start, self.host, self.slot
        plan.steps += [Step(op, start + o, n, slot, host + o) for o, n in ranges if n]

    def check(self, result: CheckResult, fix: str) -> Procedure:
        """The file is as long as the descriptor says."""
        length = yield Length(self.slot)
        if length < self.host + self.length:
            result.corruption(
                f"extent {self.number} ends at {self.host + self.length} of a file that has "
                f"{length} bytes"
            )
        result.image_end_offset = max(result.image_end_offset, length)

    def info(self) -> dict[str, Any]:
        """See `Part.info`."""
        return {"virtual-size": self.length, "format": self.type}


class Empty(Plain):
    """An extent of type ZERO, which reads as zeroes, or one that may not be accessed: of neither
    is a file opened."""

    unit = 1

    def __init__(self, image: Vmdk, slot: str, start: int, length: int, type: str) -> None:
        self.image = image
        self.slot = slot
        self.start = start
        self.length = length
        self.type = type

    def map(self, offset: int, length: int, out: list[Extent]) -> NeedMeta | None:
        """Zeroes, which hide a backing file."""
        out.append(Zero(length))
        return None

    def gather(self, ranges: Sequence[Range], kind: str) -> NeedMeta | bool:
        """Zeroes are there already; data have no place."""
        if kind == WRITE:
            raise PermissionError(errno.EACCES, "an extent of type ZERO has no place for data")
        return True

    def reserve(self, ranges: Sequence[Range], kind: str, plan: Plan) -> Any:
        """Nothing changes."""

    def check(self, result: CheckResult, fix: str) -> Procedure:
        """Nothing can be wrong."""
        yield from ()

    def info(self) -> dict[str, Any]:
        """See `Part.info`."""
        return {"virtual-size": self.length, "format": self.type}
