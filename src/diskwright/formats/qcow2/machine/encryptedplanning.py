"""Plans of encrypted images: those of any other, with a transform on what they name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ....abilities import Codec
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
from ....units import SECTOR, align_down, align_up
from .alloc import Choice
from .subexternal import SubExternal


class EncryptedPlanner(SubExternal):
    """Plans of encrypted images; other images pass through."""

    @property
    def pack_codec(self) -> Codec | None:
        """None: compressed clusters are not encrypted, so none is stored."""
        return None if self.encrypted else super().pack_codec

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
