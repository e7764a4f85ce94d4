"""What ``top`` shows: two looks at the counters of a daemon, and the rates between them.

Everything is read over QMP, from whatever of ``query-blockstats``, ``query-named-block-nodes``,
``query-block-exports``, ``query-jobs`` and ``query-block-jobs`` the server has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from ..records import NamedTuple
from .connection import CommandFailed, Connection

KINDS = {"read": "rd", "write": "wr", "flush": "flush", "discard": "unmap"}
"""Of requests, and how the names of QMP's counters begin."""


class Rate(NamedTuple):
    """Requests of one kind in the time between two looks.  ``iops`` and ``bytes`` are per second,
    ``latency`` is in seconds: None when there were no requests."""

    iops: float
    bytes: float
    latency: float | None


class Disk(NamedTuple):
    """A device, an export or a node.  ``rates`` by kind, None when the server counts nothing for
    it; ``failed`` requests in all."""

    name: str
    node: str
    kind: str
    size: int | None
    read_only: bool | None
    rates: Mapping[str, Rate] | None
    failed: int


class JobRow(NamedTuple):
    """A job.  ``done`` of ``total`` have no unit that the server tells; ``per_second`` of them."""

    id: str
    type: str
    status: str
    done: int
    total: int
    per_second: float | None
    error: str


class View(NamedTuple):
    """What there is to show.  ``time``: seconds since 1970; ``interval``: seconds between the two
    looks, 0 for a first one."""

    time: float
    interval: float
    disks: list[Disk]
    nodes: list[Disk]
    jobs: list[JobRow]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "time": round(self.time, 3),
            "interval": round(self.interval, 3),
            "disks": [_disk_dict(one) for one in self.disks],
            "nodes": [_disk_dict(one) for one in self.nodes],
            "jobs": [
                {
                    "id": one.id,
                    "type": one.type,
                    "status": one.status,
                    "current-progress": one.done,
                    "total-progress": one.total,
                    "progress-per-second": one.per_second,
                    "error": one.error or None,
                }
                for one in self.jobs
            ],
        }


def _disk_dict(disk: Disk) -> dict[str, Any]:
    rates = {
        kind: {"iops": rate.iops, "bytes-per-second": rate.bytes, "latency-seconds": rate.latency}
        for kind, rate in (disk.rates or {}).items()
    }
    return {
        "name": disk.name,
        "node-name": disk.node,
        "type": disk.kind,
        "virtual-size": disk.size,
        "read-only": disk.read_only,
        "failed-operations": disk.failed,
        "rates": rates or None,
    }


class Look(NamedTuple):
    """One look: answers to queries by name, empty where there is none, and when it was."""

    answers: Mapping[str, list[dict[str, Any]]]
    wall: float
    clock: float


class Watcher:
    """Looks at the daemon behind ``connection``."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        listed = connection.execute("query-commands")
        self._known = {_text(one, "name") for one in _dicts(listed)}
        self._last: Look | None = None

    def view(self) -> View:
        """What there is now, with the rates since the last call."""
        now = self._look()
        before, self._last = self._last, now
        return _view(before, now)

    def _look(self) -> Look:
        return Look(
            {
                "disks": self._ask("query-blockstats"),
                "counts": self._ask("query-blockstats", {"query-nodes": True}),
                "nodes": self._ask("query-named-block-nodes", {"flat": True}),
                "exports": self._ask("query-block-exports"),
                "jobs": self._ask("query-jobs"),
                "block-jobs": self._ask("query-block-jobs"),
            },
            time.time(),
            time.monotonic(),
        )

    def _ask(self, name: str, arguments: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        if name not in self._known:
            return []
        try:
            return _dicts(self.connection.execute(name, arguments))
        except CommandFailed:
            return []


def _view(before: Look | None, now: Look) -> View:
    seconds = now.clock - before.clock if before is not None else 0.0
    then = before.answers if before is not None else {}
    nodes = {_text(one, "node-name"): one for one in now.answers["nodes"]}
    exports = {_text(one, "id"): _text(one, "type") for one in now.answers["exports"]}
    disks = []
    counted = _counted(then.get("disks", []))
    for key, entry in _counted(now.answers["disks"]).items():
        kind = exports.pop(key, "device")
        disks.append(_disk(key, kind, entry, counted.get(key), seconds, nodes))
    for one in now.answers["exports"]:
        if _text(one, "id") in exports:  # the server counts nothing for it
            disks.append(_disk(_text(one, "id"), _text(one, "type"), one, None, 0, nodes))
    counted = _by_node(then.get("counts", []))
    counts = _by_node(now.answers["counts"])
    listed = [
        _disk(name, _text(one, "drv"), counts.get(name, one), counted.get(name), seconds, nodes)
        for name, one in nodes.items()
    ]
    return View(
        now.wall, seconds, _busiest(disks), _busiest(listed), list(_jobs(then, now, seconds))
    )


def _counted(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Counters of devices and exports by a name that people know."""
    return {
        _text(one, "device") or _text(one, "qdev") or _text(one, "node-name"): one
        for one in entries
    }


def _by_node(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {_text(one, "node-name"): one for one in entries}


def _disk(
    name: str,
    kind: str,
    entry: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    seconds: float,
    nodes: Mapping[str, Mapping[str, Any]],
) -> Disk:
    stats = entry.get("stats")
    counts = stats if isinstance(stats, dict) else None
    old = (before or {}).get("stats")
    node = _text(entry, "node-name")
    about = nodes.get(node, {})
    image = about.get("image")
    size = _count(image, "virtual-size") if isinstance(image, dict) else None
    read_only = about.get("ro")
    return Disk(
        name,
        node,
        kind,
        size,
        read_only if isinstance(read_only, bool) else None,
        None if counts is None else _rates(old if isinstance(old, dict) else {}, counts, seconds),
        sum(_count(counts or {}, f"failed_{word}_operations") for word in KINDS.values()),
    )


def _rates(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> dict[str, Rate]:
    found = {}
    for kind, word in KINDS.items():
        # Less than before: it is another disk of this name.
        count, size, spent = (
            max(_count(now, f"{word}_{what}") - _count(before, f"{word}_{what}"), 0)
            if before
            else 0
            for what in ("operations", "bytes", "total_time_ns")
        )
        latency = spent / count / 1e9 if count else None
        found[kind] = Rate(count / seconds if seconds else 0.0, size / (seconds or 1), latency)
    return found


def _busiest(disks: list[Disk]) -> list[Disk]:
    """Those with most requests first; otherwise by name."""

    def rank(disk: Disk) -> tuple[float, str]:
        return -sum(rate.iops for rate in (disk.rates or {}).values()), disk.name

    return sorted(disks, key=rank)


def _jobs(then: Mapping[str, list[dict[str, Any]]], now: Look, seconds: float) -> Iterator[JobRow]:
    others = {_text(one, "device"): one for one in now.answers["block-jobs"]}
    before = {_text(one, "id"): one for one in then.get("jobs", [])}
    for one in now.answers["jobs"]:
        id = _text(one, "id")
        done, total = _count(one, "current-progress"), _count(one, "total-progress")
        speed = None
        if id in before and seconds:
            speed = (done - _count(before[id], "current-progress")) / seconds
        error = _text(one, "error") or _text(others.get(id, {}), "error")
        yield JobRow(id, _text(one, "type"), _text(one, "status"), done, total, speed, error)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _text(entry: Mapping[str, Any], key: str) -> str:
    found = entry.get(key)
    return found if isinstance(found, str) else ""


def _count(entry: Mapping[str, Any], key: str) -> int:
    found = entry.get(key)
    return found if isinstance(found, int) and 0 <= found < 1 << 64 else 0
