"""One answer for the metrics of several processes."""

from __future__ import annotations

from collections.abc import Iterable

from .metrics import Family, Sample, clients, process
from .metrics_server import MetricsServer
from .nbd_front import Front

WORKER_SECONDS = 2.0
"""How long workers are waited for, all together."""


class WorkersMetrics(MetricsServer):
    """Tells of a front, and of its workers by the label ``worker``: 1 and on, in their order."""

    def __init__(self, front: Front) -> None:
        super().__init__(front.driver, process)
        self._front = front

    async def _gathered(self) -> Iterable[Family]:
        front = self._front
        told = await front.metrics(WORKER_SECONDS)
        families = {family.name: family for family in clients(front.connected, front.admitted)}
        up: list[Sample] = []
        help = "Whether a worker told its metrics."
        families["diskwright_worker_up"] = Family("diskwright_worker_up", "gauge", help, up)
        for number, theirs in enumerate(told, 1):
            label = {"worker": str(number)}
            up.append((label, int(theirs is not None)))
            for family in theirs or ():
                samples = [({**labels, **label}, value) for labels, value in family.samples]
                known = families.setdefault(family.name, family._replace(samples=[]))
                known.samples.extend(samples)
        for family in process():
            known = families.setdefault(family.name, family._replace(samples=[]))
            known.samples.extend(family.samples)
        return families.values()
