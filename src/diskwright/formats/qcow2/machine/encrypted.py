"""Guest data that are encrypted, in whichever file they are: the same maps and plans, with a
transform on what they name."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ....abilities import Codec, Transform
from ....contract import (
    OP_DATA,
    OP_ZERO,
    WRITE,
    WRITE_PACKED,
    NeedMeta,
    Plan,
    Range,
    Table,
)
from ....extents import Data, Extent
from ....units import SECTOR, align_down, align_up
from .alloc import Choice
from .subexternal import SubExternal

if TYPE_CHECKING:
    from ...luks1 import Header as Luks


class Encrypted(SubExternal):
    """Map and plans of encrypted images; other images pass through.

    Compressed clusters are not encrypted (as in QEMU, which does not refuse to write them), and are
    read as they are.
    """

    luks: Luks | None = None
    """The LUKS header, of crypt method 2."""
    key = b""
    """The disk's key, once the image is unlocked."""
    xform: tuple[Transform, ...] = ()

    def use_cipher(self, transform: Transform, key: bytes) -> None:
        """Unlock the image."""
        self.xform = (transform,)
        self.key = key
        self.cipher_unit = SECTOR

    @property
    def pack_codec(self) -> Codec | None:
        """None: compressed clusters are not encrypted, so none is stored."""
        return None if self.encrypted else super().pack_codec

    @property
    def encrypted(self) -> bool:
        """True when guest data are encrypted."""
        return self.header.crypt_method != 0

    # -- mapping
    def _words(self, l1_index: int, write: bool) -> array[int] | None:
        # The shortcuts answer with places of plain data.
        return None if self.xform else super()._words(l1_index, write)

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        """Extents of ``ranges``; see the contract."""
        found, miss = super().map(ranges)
        if self.xform:
            xform: Any = self.xform
            found = [e._replace(xform=xform) if isinstance(e, Data) else e for e in found]
        return found, miss

    # -- planning
    def choose(self, count: int) -> list[Choice] | NeedMeta:
        """See :meth:`.alloc.Allocator.choose`.  What reads as zeroes in the file does not as an
        encrypted cluster, so every cluster is written as a whole."""
        found = super().choose(count)
        if self.xform and not isinstance(found, NeedMeta):
            return [(start, end, False) for start, end, _ in found]
        return found

    def take(self, chosen: Iterable[Choice]) -> list[Table]:
        """See :meth:`.alloc.Allocator.take`."""
        chosen = list(chosen)
        if self.xform:  # those of `choose` may be from either pool
            for start, end, _ in chosen:
                self.clean.remove(start, end)
        return super().take(chosen)

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """Reserve what is needed; see the contract."""
        if not self.xform or kind not in (WRITE, WRITE_PACKED):
            return super().plan(ranges, kind)
        self.check_write()
        if kind == WRITE_PACKED:
            return None
        plan = super().plan(_sectors(ranges), kind)
        if isinstance(plan, Plan):
            # Zeroes behind the end of the disk must be zeroes once it has grown.
            plan.steps = [
                step._replace(op=OP_DATA, xform=self.xform) if step.op in (OP_DATA, OP_ZERO)
                else step
                for step in plan.steps
            ]  # fmt: skip
        return plan

    def zeroes(self, guest: int, host: int, length: int) -> bytes:
        """What reads as zeroes at ``guest``, stored at ``host``."""
        data = bytearray(super().zeroes(guest, host, length))
        for transform in self.xform:
            transform.encode([(guest, host, length)], data, memoryview(data))
        return bytes(data)


def _sectors(ranges: Sequence[Range]) -> list[Range]:
    """Whole sectors, in order, each once."""
    out: list[Range] = []
    end = -1
    for offset, length in sorted(ranges):
        start, stop = align_down(offset, SECTOR), align_up(offset + length, SECTOR)
        if start <= end:
            if stop > end:
                first = out[-1][0]
                out[-1] = (first, stop - first)
                end = stop
        elif stop > start:
            out.append((start, stop - start))
            end = stop
    return out
