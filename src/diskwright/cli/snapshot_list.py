"""Internal snapshots as ``snapshot -l`` and ``info`` show them (measured with qemu-img 10.0)."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ..abilities import SnapshotInfo
from ..units import human

_SECOND = 1_000_000_000


def snapshot_lines(snapshots: Iterable[SnapshotInfo]) -> list[str]:
    """The heading and one line for each, dates in local time."""
    lines = [
        "Snapshot list:",
        f"{'ID':<7} {'TAG':<16} {'VM_SIZE':>8} {'DATE':>19} {'VM_CLOCK':>15} {'ICOUNT':>10}",
    ]
    for found in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.date_sec))
        seconds = found.vm_clock_nsec // _SECOND
        clock = f"{seconds // 3600:04}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        clock += f".{found.vm_clock_nsec % _SECOND // 1_000_000:03}"
        count = "--" if found.icount is None else str(found.icount)
        lines.append(
            f"{found.id:<7} {found.name:<16} {human(found.vm_state_size):>8} {date:>19} "
            f"{clock:>15} {count:>10}"
        )
    return lines
