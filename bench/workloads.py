"""The jobs that every server is given, and the images they run on."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import NamedTuple

from servers import Server

CLUSTER = 64 << 10


class Workload(NamedTuple):
    """``rw``, ``block`` and ``depth`` as fio takes them; ``jobs`` is the number of connections.
    ``image``: full (allocated and warm), empty or overlay (fresh for every run)."""

    key: str
    title: str
    rw: str
    block: int
    depth: int
    jobs: int = 1
    image: str = "full"


WORKLOADS = [
    Workload("read-32", "4 KiB random read, depth 32", "randread", 4096, 32),
    Workload("read-1", "4 KiB random read, depth 1", "randread", 4096, 1),
    Workload("read-4x8", "4 KiB random read, 4 × depth 8", "randread", 4096, 8, 4),
    Workload("write-32", "4 KiB random write in place, depth 32", "randwrite", 4096, 32),
    Workload("write-1", "4 KiB random write in place, depth 1", "randwrite", 4096, 1),
    Workload("write-4x8", "4 KiB random write in place, 4 × depth 8", "randwrite", 4096, 8, 4),
    Workload("read-1m", "1 MiB sequential read, depth 4", "read", 1 << 20, 4),
    Workload("write-1m", "1 MiB sequential write, depth 4", "write", 1 << 20, 4),
    Workload("alloc", "allocating 4 KiB write, empty qcow2, depth 32", "", 4096, 32, 1, "empty"),
    Workload("cow", "allocating 4 KiB write, overlay, depth 32", "", 4096, 32, 1, "overlay"),
]


class Result(NamedTuple):
    """Of one run."""

    rate: float
    """Requests a second."""
    p99_us: float
    cpu_us: float
    """Processor time of the server, microseconds a request."""
    peak_kib: int
    seconds: float
    """Allocating writes: until the last answer."""
    flush_seconds: float
    """Allocating writes: the flush behind them."""


class Images:
    """Made once in ``directory``; ``size`` bytes each."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory, self.size = directory, size
        self.raw = directory / "full.raw"
        self.qcow2 = directory / "full.qcow2"
        self.log = directory / "alloc.iolog"
        self.warmed: set[Path] = set()
        """What was read into the page cache; a direct server clears it."""

    def prepare(self) -> None:
        """Make what is missing, and bring everything into the page cache."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.raw.exists() or self.raw.stat().st_size != self.size:
            block = random.Random(1).randbytes(1 << 20)
            with self.raw.open("wb") as out:
                for _ in range(self.size >> 20):
                    out.write(block)
                os.fsync(out.fileno())
            self.qcow2.unlink(missing_ok=True)
        if not self.qcow2.exists():
            convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
            subprocess.run([*convert, str(self.raw), str(self.qcow2)], check=True)
        clusters = list(range(self.size // CLUSTER))
        random.Random(2).shuffle(clusters)
        with self.log.open("w") as log:
            log.write("fio version 2 iolog\nnbd add\nnbd open\n")
            log.writelines(f"nbd write {cluster * CLUSTER} 4096\n" for cluster in clusters)
            log.write("nbd close\n")
        os.sync()

    def warm(self, path: Path, write: bool) -> None:
        """Bring an image into the page cache (direct writes of another server drop pages).

        For a job that writes, each page is written anew before every run: on a virtual machine
        the write to a page that was left alone for a while may cost its host many times the write
        itself.  All of it is on disk then, so that no run pays for the write-back of another.
        """
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        known = path in self.warmed and not write
        self.warmed.add(path)
        with path.open("r+b", buffering=0) as file:
            while not known and (count := file.readinto(buffer)):
                if write:
                    file.seek(-count, os.SEEK_CUR)
                    file.write(view[:count])
            os.fsync(file.fileno())

    def _touch_memory(self) -> None:
        """Have as much free memory as a fresh image will fill, in use until a moment ago."""
        scratch = self.directory / "scratch"
        block = bytes(1 << 20)
        with scratch.open("wb", buffering=0) as file:
            for _ in range((self.size >> 20) + 128):
                file.write(block)
        scratch.unlink()
        os.sync()

    def get(self, work: Workload, fmt: str) -> Path:
        """The image of a workload; fresh ones are made again."""
        kind = work.image
        if kind == "full":
            path = self.raw if fmt == "raw" else self.qcow2
            self.warm(path, "write" in work.rw)
            return path
        path = self.directory / f"{kind}.qcow2"
        path.unlink(missing_ok=True)
        create = ["qemu-img", "create", "-q", "-f", "qcow2"]
        if kind == "overlay":
            self.warm(self.raw, False)
            create += ["-b", str(self.raw), "-F", "raw"]
        subprocess.run([*create, str(path), str(self.size)], check=True)
        self._touch_memory()
        return path


def run(server: Server, work: Workload, images: Images, seconds: float) -> Result:
    """One workload against a running server."""
    before = server.cpu_seconds()
    common = [
        "--name=bench",
        "--ioengine=nbd",  # the options of an engine follow its name
        f"--uri={server.uri}",
        f"--bs={work.block}",
        f"--iodepth={work.depth}",
        "--output-format=json",
        "--group_reporting",
    ]
    if work.rw:
        timing = ["--time_based", f"--runtime={seconds}", "--randrepeat=0", "--norandommap"]
        job = [f"--rw={work.rw}", f"--numjobs={work.jobs}", f"--size={images.size}", *timing]
    else:
        job = [f"--read_iolog={images.log}", "--replay_no_stall=1"]
    done = subprocess.run(
        ["fio", *common, *job], capture_output=True, text=True, check=False, cwd=images.directory
    )
    if done.returncode:
        raise SystemExit(f"fio failed against {server.name}:\n{done.stdout}\n{done.stderr}")
    flushed = server.flush() if not work.rw else 0.0
    cpu = server.cpu_seconds() - before
    report = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = report["read"] if "read" in work.rw else report["write"]
    if report["error"] or not side["total_ios"]:
        raise SystemExit(f"fio saw errors against {server.name}: {report['error']}")
    p99 = side["clat_ns"].get("percentile", {}).get("99.000000", 0)
    count = side["total_ios"]
    spent = side["runtime"] / 1000
    return Result(count / spent, p99 / 1000, cpu / count * 1e6, server.peak_kib(), spent, flushed)
