"""Extents without tables: flat files, devices, and those that hold nothing."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
from .descriptor import NOACCESS, RW
from .parts import Plain

if TYPE_CHECKING:
    from .format import Vmdk


class _Lines(Plain):
    """What flat and empty extents have in common.  ``number`` is that of the extent."""

    unit = 1

    def __init__(
        self, image: Vmdk, slot: str, start: int, length: int, access: str, number: int
    ) -> None:
        self.image = image
        self.slot = slot
        self.start = start
        self.length = length
        self.access = access
        self.number = number

    def check_write(self, kind: str) -> bool:
        """False when a discard has nothing to do.  Raises PermissionError where the descriptor
        forbids writing."""
        if self.access == RW:
            return True
        if kind == DISCARD:
            return False
        raise PermissionError(
            errno.EACCES, f"extent {self.number} of the image may not be written ({self.access})"
        )

    def check_read(self) -> None:
        """Raise PermissionError where the descriptor forbids reading."""
        if self.access == NOACCESS:
            raise PermissionError(
                errno.EACCES, f"extent {self.number} of the image may not be read (NOACCESS)"
            )


class Flat(_Lines):
    """``length`` bytes at ``host`` of a file or device, as they are."""

    def __init__(
        self,
        image: Vmdk,
        slot: str,
        start: int,
        length: int,
        access: str,
        number: int,
        host: int,
        type: str,
    ) -> None:
        super().__init__(image, slot, start, length, access, number)
        self.host = host
        self.type = type

    def map(self, offset: int, length: int, out: list[Extent]) -> NeedMeta | None:
        """An offset."""
        self.check_read()
        writable = self.access == RW and self.image.writable and self.image.ready
        out.append(Data(self.slot, self.host + offset, length, writable))
        return None

    def gather(self, ranges: Sequence[Range], kind: str) -> NeedMeta | bool:
        """Whether the extent may be written."""
        self.check_write(kind)
        return True

    def reserve(self, ranges: Sequence[Range], kind: str, plan: Plan) -> Any:
        """The same operation on the file."""
        if not self.check_write(kind):
            return
        op = OP_DATA if kind == WRITE else OP_DISCARD if kind == DISCARD else OP_ZERO
        start, host, slot = self.start, self.host, self.slot
        plan.steps += [Step(op, start + o, n, slot, host + o) for o, n in ranges if n]

    def check(self, result: CheckResult, fix: str) -> Procedure:
        """The file is as long as the descriptor says."""
        if self.access == NOACCESS:
            return
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


class Empty(_Lines):
    """An extent of type ZERO: reads as zeroes and holds nothing else."""

    def map(self, offset: int, length: int, out: list[Extent]) -> NeedMeta | None:
        """Zeroes, which hide a backing file."""
        self.check_read()
        out.append(Zero(length))
        return None

    def gather(self, ranges: Sequence[Range], kind: str) -> NeedMeta | bool:
        """Zeroes are there already; data have no place."""
        if kind == WRITE:
            raise PermissionError(
                errno.EACCES, f"extent {self.number} of the image has no place for data (ZERO)"
            )
        return True

    def reserve(self, ranges: Sequence[Range], kind: str, plan: Plan) -> Any:
        """Nothing changes."""

    def check(self, result: CheckResult, fix: str) -> Procedure:
        """Nothing can be wrong."""
        yield from ()

    def info(self) -> dict[str, Any]:
        """See `Part.info`."""
        return {"virtual-size": self.length, "format": "ZERO"}
