"""Zeroes and discards of whole blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ...contract import (
    DISCARD,
    OP_DISCARD,
    OP_ZERO,
    WRITE,
    WRITE_ZERO,
    NeedMeta,
    Plan,
    Range,
    Step,
)
from .core import ENTRIES, FULL, NOT_PRESENT, PARTIAL, STATE, ZERO
from .planning import Planner, State
from .structures import SLOT


class Zeroing(Planner):
    """`plan` for all kinds.

    A block that gives its space back becomes one of state ZERO: it reads as zeroes whatever the
    parent holds, and the file offset of such an entry must be zero.  That is why a zero that is
    to keep the space, and all of them in a fixed image, change the bytes and not the map.
    """

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """Reserve what is needed; see the contract.

        Raises NoSpace; CorruptImage.  Nothing has changed then.
        """
        self.check_write()
        return self._plan_write(ranges) if kind == WRITE else self._plan_zero(ranges, kind)

    def _plan_zero(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta:
        bits, size = self.block_bits, self.block_size
        blocks = dict.fromkeys(
            [
                block
                for offset, length in ranges
                for block in range(offset >> bits, -(-(offset + length) >> bits))
            ]
        )
        tables = self.slices([self.bat_index(block) for block in blocks])
        if isinstance(tables, NeedMeta):
            return tables
        keeps = kind == WRITE_ZERO or self.fixed
        plan = Plan()
        state = plan.state = State()
        hosts: list[list[int]] = []  # guest, length, host
        for block in blocks:
            index = self.bat_index(block)
            table = tables[index // ENTRIES]
            entry = table.data[index % ENTRIES]
            now = entry & STATE
            if now == FULL or (now == PARTIAL and self.differencing):
                host = self.host_of(entry, index, size)
                if not keeps:
                    state.changes.append((table, index, ZERO))
                    continue
                if now == PARTIAL:
                    state.changes.append((table, index, host | FULL))
                guest = block << bits
                if hosts and hosts[-1][0] + hosts[-1][1] == guest and (
                    hosts[-1][2] + hosts[-1][1] == host
                ):
                    hosts[-1][1] += size
                else:
                    hosts.append([guest, size, host])
            elif now == NOT_PRESENT:
                # Without a parent it reads as zeroes, too, but only until the image is given one.
                if self.differencing or kind != DISCARD:
                    state.changes.append((table, index, ZERO))
            elif now in (PARTIAL, 4):
                raise self.bad_state(entry, index)
            elif now != ZERO and kind != DISCARD:
                # It reads as zeroes here; the specification leaves it open.
                state.changes.append((table, index, ZERO))
        op = OP_DISCARD if kind == DISCARD else OP_ZERO
        plan.steps = [Step(op, guest, length, SLOT, host) for guest, length, host in hosts]
        if plan.steps or state.changes:
            plan.pins += {id(table): table for table, _, _ in state.changes}.values()
            plan.before = self.before()
        return plan
