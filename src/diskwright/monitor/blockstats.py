"""What was asked of nodes and exports, and how long it took."""

from __future__ import annotations

from time import perf_counter_ns
from typing import Annotated, Any

from ..engine.node import Node
from ..graph.stats import FLUSH, READ, WRITE, Counter, Histogram, Stats
from ..records import NamedTuple
from .blockdev import DRIVERS
from .commands import QmpError, command
from .daemon import Daemon
from .session import Monitor
from .types import ANY, INT, SIZE, Array, Enum, Member, Struct, Union


class LatencyHistogram(NamedTuple):
    """``bins[i]``: requests that took less than ``boundaries[i]`` ns, and not less than the
    boundary before; the last bin has all others."""

    boundaries: list[int]
    bins: list[int]


class TimedStats(NamedTuple):
    """Latencies (ns) and queue depths of the last ``interval-length`` seconds."""

    interval_length: int
    min_rd_latency_ns: int
    max_rd_latency_ns: int
    avg_rd_latency_ns: int
    min_wr_latency_ns: int
    max_wr_latency_ns: int
    avg_wr_latency_ns: int
    min_zone_append_latency_ns: int
    max_zone_append_latency_ns: int
    avg_zone_append_latency_ns: int
    min_flush_latency_ns: int
    max_flush_latency_ns: int
    avg_flush_latency_ns: int
    avg_rd_queue_depth: float
    avg_wr_queue_depth: float
    avg_zone_append_queue_depth: float


class BlockDeviceStats(NamedTuple):
    """Counters.  Times in ns, of all requests together, each from when the disk got it until it was
    done.  Zeroes that are written are among the writes; nothing is zoned, merged or found invalid
    so late."""

    rd_bytes: int
    wr_bytes: int
    zone_append_bytes: int
    unmap_bytes: int
    rd_operations: int
    wr_operations: int
    zone_append_operations: int
    flush_operations: int
    unmap_operations: int
    rd_total_time_ns: int
    wr_total_time_ns: int
    zone_append_total_time_ns: int
    flush_total_time_ns: int
    unmap_total_time_ns: int
    wr_highest_offset: int
    rd_merged: int
    wr_merged: int
    zone_append_merged: int
    unmap_merged: int
    failed_rd_operations: int
    failed_wr_operations: int
    failed_zone_append_operations: int
    failed_flush_operations: int
    failed_unmap_operations: int
    invalid_rd_operations: int
    invalid_wr_operations: int
    invalid_zone_append_operations: int
    invalid_flush_operations: int
    invalid_unmap_operations: int
    account_invalid: bool
    account_failed: bool
    timed_stats: list[TimedStats]
    idle_time_ns: int | None = None
    rd_latency_histogram: LatencyHistogram | None = None
    wr_latency_histogram: LatencyHistogram | None = None
    zone_append_latency_histogram: LatencyHistogram | None = None
    flush_latency_histogram: LatencyHistogram | None = None


_FILE = Struct(
    tuple(Member(f"discard-{what}", INT) for what in ("nb-ok", "nb-failed", "bytes-ok"))
)


def _specific() -> tuple[str, tuple[Member, ...], dict[str, Struct]]:
    files = dict.fromkeys(("file", "host_device"), _FILE)
    others = dict.fromkeys(DRIVERS, Struct(()))
    return "driver", (Member("driver", Enum(*DRIVERS)),), others | files


class BlockStats(NamedTuple):
    """Of an export (``qdev`` is its id) or a node; ``parent`` is the node in which its bytes are,
    ``backing`` its backing file."""

    stats: BlockDeviceStats
    device: str | None = None
    qdev: str | None = None
    node_name: str | None = None
    driver_specific: Annotated[dict[str, Any], Union(_specific)] | None = None
    parent: Annotated[Any, ANY] | None = None
    backing: Annotated[Any, ANY] | None = None


@command("query-blockstats")
def query_blockstats(monitor: Monitor, query_nodes: bool = False) -> list[BlockStats]:
    """Tell what was asked of each export, or with ``query-nodes`` of each node by its users
    outside: by exports that it has, and that it had."""
    daemon = monitor.daemon
    if query_nodes:
        return [_of_node(daemon, node) for node in daemon.graph.nodes.values()]
    return [
        _of_node(daemon, export.node)._replace(
            device="", qdev=export.id, stats=_told(export.disk.stats, export.node)
        )
        for export in daemon.exports.values()
    ]


def _of_node(daemon: Daemon, node: Node) -> BlockStats:
    below, backing = node.child("file") or node.child("image"), node.child("backing")
    return BlockStats(
        _told(daemon.asked(node), node),
        node_name=node.name,
        driver_specific=_discards(node),
        parent=None if below is None else _of_node(daemon, below),
        backing=None if backing is None else _of_node(daemon, backing),
    )


def _discards(node: Any) -> dict[str, Any] | None:
    if node.driver_name not in ("file", "host_device"):
        return None
    return {
        "driver": node.driver_name,
        "discard-nb-ok": node.discards.done,
        "discard-nb-failed": node.discards.failed,
        "discard-bytes-ok": node.discards.bytes,
    }


def _told(stats: Stats, node: Node) -> BlockDeviceStats:
    known: dict[str, Any] = dict.fromkeys(_NUMBERS, 0)
    for kind, counter in stats.counters.items():
        known[f"{kind}_bytes"] = counter.bytes
        known[f"{kind}_operations"] = counter.operations
        known[f"{kind}_total_time_ns"] = counter.nanoseconds
        known[f"failed_{kind}_operations"] = counter.failed
        known[f"{kind}_latency_histogram"] = _histogram(counter)
    del known["flush_bytes"], known["unmap_latency_histogram"]
    return BlockDeviceStats(
        **known,
        wr_highest_offset=node.highest,
        account_invalid=False,
        account_failed=True,
        timed_stats=[],
        idle_time_ns=perf_counter_ns() - stats.last if stats.last is not None else None,
    )


_NUMBERS = [
    name for name, of in BlockDeviceStats.__annotations__.items()
    if of == "int" and name != "wr_highest_offset"
]  # fmt: skip


def _histogram(counter: Counter) -> LatencyHistogram | None:
    found = counter.histogram
    return None if found is None else LatencyHistogram(found.boundaries, found.bins)


_Boundaries = Annotated[list[int], Array(SIZE)]


@command("block-latency-histogram-set")
def block_latency_histogram_set(
    monitor: Monitor,
    id: str,
    boundaries: _Boundaries | None = None,
    boundaries_read: _Boundaries | None = None,
    boundaries_write: _Boundaries | None = None,
    boundaries_zap: _Boundaries | None = None,
    boundaries_flush: _Boundaries | None = None,
) -> None:
    """Begin histograms of the latencies of an export: for all kinds of requests with
    ``boundaries`` (ns, growing), or for those that are given; without any, end all.  What was
    counted before is forgotten.  ``boundaries-zap`` is of zoned devices, and counts nothing."""
    export = monitor.daemon.exports.get(id)
    if export is None:
        raise QmpError("DeviceNotFound", f"Device '{id}' not found")
    kinds = {READ: boundaries_read, WRITE: boundaries_write, FLUSH: boundaries_flush}
    given = (boundaries, boundaries_zap, *kinds.values())
    found = {
        kind: Histogram(own or boundaries or ())
        for kind, own in kinds.items()
        if own is not None or boundaries is not None
    }
    for kind in kinds:
        if kind in found or all(one is None for one in given):
            export.disk.stats.counters[kind].histogram = found.get(kind)
