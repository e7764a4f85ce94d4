"""Metrics in Prometheus' text format 0.0.4, and those of an NBD server and of the process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from .. import __version__
from ..engine.tables import Tables
from ..graph.stats import FLUSH, READ, UNMAP, WRITE, Stats
from ..records import NamedTuple

if TYPE_CHECKING:
    from .nbd_server import Server

TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of the format."""
SIZE = "Size of the disk."
_WITH_BYTES = {READ: "read", WRITE: "write", UNMAP: "discard"}
_ALL = {**_WITH_BYTES, FLUSH: "flush"}
_BEGAN = time.time()

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


class Family(NamedTuple):
    """All samples of one metric, whose names follow the conventions: base units, counters end in
    ``_total``."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    samples: list[Sample]


def text(families: Iterable[Family]) -> bytes:
    """The exposition of ``families``."""
    lines: list[str] = []
    for family in families:
        if not family.samples:
            continue
        told = family.help.replace("\\", "\\\\").replace("\n", "\\n")
        lines.append(f"# HELP {family.name} {told}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        lines += [f"{family.name}{_labels(labels)} {value}" for labels, value in family.samples]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = (
        (name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
        for name, value in labels.items()
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"


def requests(of: str, asked: Iterable[tuple[Labels, Stats]]) -> Iterator[Family]:
    """What was asked of each ``export`` or ``node``."""
    known = list(asked)
    for what, help, kinds, value in (
        ("operations", "Requests that succeeded.", _ALL, "operations"),
        ("bytes", "Bytes of requests that succeeded.", _WITH_BYTES, "bytes"),
        ("errors", "Requests that failed.", _ALL, "failed"),
        ("duration_seconds", "Time that requests took, of all together.", _ALL, "nanoseconds"),
    ):
        scale = 1e-9 if value == "nanoseconds" else 1
        samples: list[Sample] = [
            ({**labels, "operation": kinds[kind]}, getattr(stats.counters[kind], value) * scale)
            for labels, stats in known
            for kind in kinds
        ]
        yield Family(f"diskwright_{of}_{what}_total", "counter", help, samples)


def nbd(server: Server, exports: Mapping[bytes, str]) -> Iterator[Family]:
    """What an NBD server does; ``exports``: what each is called."""
    yield from clients(len(server.connections), server.admitted)
    yield from exported(server, exports)


def clients(connected: int, accepted: int) -> Iterator[Family]:
    """Who came to an NBD server."""
    help = "Clients that are connected."
    yield Family("diskwright_nbd_connections", "gauge", help, [({}, connected)])
    help = "Clients that have come."
    yield Family("diskwright_nbd_accepted_total", "counter", help, [({}, accepted)])


def exported(server: Server, exports: Mapping[bytes, str]) -> Iterator[Family]:
    """What an NBD server does for the clients of its exports."""

    def gauge(name: str, help: str, value: float) -> Family:
        return Family(f"diskwright_nbd_{name}", "gauge", help, [({}, value)])

    budget = server.budget
    yield Family(
        "diskwright_export_connections",
        "gauge",
        "Clients that have chosen an export.",
        [({"export": name}, len(server.users(key))) for key, name in exports.items()],
    )
    yield gauge("buffer_bytes", "Memory for requests of clients that is in use.", budget.used)
    yield gauge("buffer_peak_bytes", "The most of it that was ever in use.", budget.peak)
    yield gauge("buffer_limit_bytes", "The most of it that may be in use.", budget.limit)
    yield gauge("buffer_waiting", "Whether a client waits for such memory.", int(budget.contended))


def metadata(tables: Tables) -> Iterator[Family]:
    """The tables of images that are in memory."""
    for name, help, value in (
        ("bytes", "Metadata of images that are in memory.", tables.weight),
        ("limit_bytes", "How much of them is kept where it can be dropped.", tables.budget),
    ):
        yield Family(f"diskwright_metadata_cache_{name}", "gauge", help, [({}, value)])


def process() -> Iterator[Family]:
    """This process, by the names that all of Prometheus' clients use."""
    info = {"version": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    yield Family("diskwright_build_info", "gauge", "The program's version.", [(info, 1)])
    used = time.process_time()
    help = "Processor time that the process used."
    yield Family("process_cpu_seconds_total", "counter", help, [({}, used)])
    help = "When the process began, in seconds since 1970."
    yield Family("process_start_time_seconds", "gauge", help, [({}, _BEGAN)])
    if sys.platform == "linux":
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
        help = "Memory that the process has resident."
        size = pages * os.sysconf("SC_PAGE_SIZE")
        yield Family("process_resident_memory_bytes", "gauge", help, [({}, size)])
        count = len(os.listdir("/proc/self/fd")) - 1  # one is of the listing itself
        yield Family("process_open_fds", "gauge", "Descriptors that are open.", [({}, count)])
