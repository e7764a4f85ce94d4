"""The metrics of a daemon."""

from __future__ import annotations

from collections.abc import Iterator

from ..export import metrics
from ..export.metrics import Family, Sample
from ..graph.node import Node
from .daemon import Daemon


def gather(daemon: Daemon) -> Iterator[Family]:
    """All of them, as they are now."""
    exports = daemon.exports.values()
    nodes = daemon.graph.nodes.values()
    asked = [({"export": one.id, "node": one.node.name}, one.disk.stats) for one in exports]
    yield from metrics.requests("export", asked)
    named = [(node, {"node": node.name, "driver": node.driver_name}) for node in nodes]
    counted = [(labels, daemon.asked(node)) for node, labels in named if _asked(daemon, node)]
    yield from metrics.requests("node", counted)
    sizes: list[Sample] = [(labels, node.size) for node, labels in named]
    yield Family("diskwright_node_size_bytes", "gauge", metrics.SIZE, sizes)
    if daemon.server is not None:
        served = {one.name: one.id for one in exports if one.mount is None}
        yield from metrics.nbd(daemon.server, served)
    done: list[Sample] = []
    end: list[Sample] = []
    for job in daemon.jobs:
        labels = {"job": job.id, "type": job.work.kind}
        done.append((labels, job.done))
        end.append((labels, job.total))
    help = "How far a job is; it has no unit."
    yield Family("diskwright_job_progress", "gauge", help, done)
    help = "Where the job's progress ends, as far as that is known."
    yield Family("diskwright_job_progress_end", "gauge", help, end)
    yield from metrics.metadata(daemon.graph.tables)
    yield from metrics.process()


def _asked(daemon: Daemon, node: Node) -> bool:
    """Whether users outside ask ``node``, or have asked it; other nodes serve those above them."""
    return node in daemon.past or any(disk.node is node for disk in daemon.backends())
