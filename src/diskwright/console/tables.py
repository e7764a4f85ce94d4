"""The lines of ``top``: as many columns as there is room for, those that matter least left out."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..records import NamedTuple
from .sample import Disk, JobRow, View
from .shell import shown

_NAME_LIMIT = 24
_GAP = 2


class Column(NamedTuple):
    """A column: its title and cells.  The higher ``rank``, the sooner it is left out; 0: never.
    ``left``: it is text."""

    title: str
    cells: list[str]
    rank: int = 0
    left: bool = False

    @property
    def width(self) -> int:
        return max(map(len, (self.title, *self.cells)))


def page(view: View, title: str, width: int, every_node: bool) -> list[str]:
    """All lines, none wider than ``width``."""
    clock = time.strftime("%H:%M:%S", time.localtime(view.time))
    gap = width - len(title) - len(clock)
    lines = [f"{title}{' ' * gap}{clock}" if gap > 0 else title[:width]]
    if view.disks:
        lines += ["", *_disks("DISK", view.disks, width)]
    nodes = [one for one in view.nodes if every_node or not one.name.startswith("#")]
    if nodes:
        lines += ["", *_disks("NODE", nodes, width)]
    if view.jobs:
        lines += ["", *_jobs(view.jobs, width)]
    if len(lines) == 1:
        lines += ["", "no nodes, no exports, no jobs"]
    return lines


def _disks(title: str, disks: Sequence[Disk], width: int) -> list[str]:
    columns = [_names(title, [_device(one.name) for one in disks])]
    if title == "DISK":
        columns.append(_names("NODE", [one.node for one in disks], 2))
    columns.append(Column("TYPE", [shown(one.kind) for one in disks], 3, True))
    columns.append(Column("SIZE", [_size(one.size) for one in disks], 4))
    for kind, word, rank in (("read", "RD", 0), ("write", "WR", 0), ("flush", "FL", 5),
                             ("discard", "UN", 8)):  # fmt: skip
        rates = [one.rates[kind] if one.rates else None for one in disks]
        columns.append(Column(f"{word}/s", [short(r and r.iops) for r in rates], rank))
        if kind != "flush":
            columns.append(Column(f"{word} B/s", [short(r and r.bytes) for r in rates], rank))
        latencies = [_latency(r and r.latency) for r in rates]
        columns.append(Column(f"{word} lat", latencies, rank + 1))
    columns.append(Column("ERR", [short(one.failed) for one in disks], 7))
    return _table(columns, width)


def _jobs(jobs: Sequence[JobRow], width: int) -> list[str]:
    return _table(
        [
            _names("JOB", [one.id for one in jobs]),
            Column("TYPE", [shown(one.type) for one in jobs], 2, True),
            Column("STATUS", [shown(one.status) for one in jobs], 0, True),
            Column("DONE", [_percent(one) for one in jobs]),
            Column("LEFT", [_left(one) for one in jobs], 1),
            Column("ERROR", [shown(one.error) for one in jobs], 3, True),
        ],
        width,
    )


def _device(name: str) -> str:
    """A device of QEMU's without what is the same in most paths."""
    return name.removeprefix("/machine/peripheral/").removesuffix("/virtio-backend")


def _names(title: str, names: Sequence[str], rank: int = 0) -> Column:
    cells = map(shown, names)
    return Column(title, [one if len(one) <= _NAME_LIMIT else f"{one[: _NAME_LIMIT - 1]}…"
                          for one in cells], rank, True)  # fmt: skip


def _table(columns: list[Column], width: int) -> list[str]:
    while sum(one.width + _GAP for one in columns) - _GAP > width:
        dearest = max(reversed(columns), key=lambda one: one.rank)
        if not dearest.rank:
            break
        columns.remove(dearest)
    rows = [[one.title for one in columns], *zip(*(one.cells for one in columns), strict=True)]
    return [
        (" " * _GAP)
        .join(
            f"{cell:<{one.width}}" if one.left else f"{cell:>{one.width}}"
            for one, cell in zip(columns, row, strict=True)
        )
        .rstrip()[:width]
        for row in rows
    ]


def short(number: float | None) -> str:
    """A number in at most five characters, with a decimal prefix; ``-`` for none."""
    return "-" if number is None else _scaled(number, 1000, " kMGTP")


def _size(size: int | None) -> str:
    return "-" if size is None else _scaled(size, 1024, " KMGTPE")


def _scaled(number: float, step: int, prefixes: str) -> str:
    at = 0
    while number >= step - 0.5 and at < len(prefixes) - 1:
        number /= step
        at += 1
    digits = 0 if number >= 99.95 or number == int(number) else 1
    return f"{number:.{digits}f}{prefixes[at].strip()}"


def _latency(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds >= 0.9995:
        return f"{seconds:.1f}s"
    if seconds >= 0.0009995:
        return f"{seconds * 1e3:.1f}ms"
    return f"{seconds * 1e6:.0f}µs"


def _percent(job: JobRow) -> str:
    return f"{100 * job.done / job.total:.0f}%" if job.total > 0 else "-"


def _left(job: JobRow) -> str:
    """How long it will take at this rate."""
    if not job.per_second or job.per_second < 0 or job.total < job.done:
        return ""
    seconds = int((job.total - job.done) / job.per_second)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
