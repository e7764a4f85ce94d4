"""Serving in more than one way: 1 to 64 disks with and without workers, TLS on and off, and sparse
disks copied by nbdcopy; against qemu-nbd and nbdkit.

Every round runs every row once, so that a slow minute of the machine hits all of them; each run is
compared with the row of its table that is named there, of its own round.  Medians are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "nbd"))

from pki import make_certificates  # noqa: E402

MIB = 1 << 20
OURS = [sys.executable, "-m", "diskwright", "serve", "--policy", "trusted", "-t", "-e", "0"]
QEMU = ["qemu-nbd", "-t", "-e", "0", "--aio=io_uring"]
KIT = ["nbdkit", "-f"]


class Run(NamedTuple):
    """``rate``: how much a second, in the table's unit; ``peak``: the most memory in MiB that was
    resident, of all processes of the server together."""

    rate: float
    peak: float


Rows = dict[str, Callable[[], Run]]


@contextmanager
def server(command: list[str], *sockets: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running server that listens on ``sockets``."""
    for sock in sockets:
        sock.unlink(missing_ok=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "src"))
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not all(map(_answers, sockets)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"did not start: {command}")
            time.sleep(0.02)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def peak(processes: list[subprocess.Popen[bytes]]) -> float:
    """MiB, with the children."""
    total, left = 0, [process.pid for process in processes]
    while left:
        pid = left.pop()
        left += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                total += int(line.split()[1])
    return total / 1024


def fio(uris: list[str], size: int, seconds: float, folder: Path) -> float:
    """4 KiB random reads a second, in thousands, of all disks at once at depth 16 each."""
    words = ["--ioengine=nbd", "--rw=randread", "--bs=4096", "--iodepth=16", f"--size={size}"]
    words += ["--time_based", f"--runtime={seconds}", "--norandommap", "--output-format=json"]
    words += ["--group_reporting"]
    jobs = [word for i, uri in enumerate(uris) for word in (f"--name=j{i}", *words, f"--uri={uri}")]
    done = subprocess.run(["fio", *jobs], capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise SystemExit(f"fio failed:\n{done.stdout}\n{done.stderr}")
    report = json.loads(done.stdout[done.stdout.index("{") :])
    return sum(float(job["read"]["iops"]) for job in report["jobs"]) / 1000


def filled(path: Path, size: int, share: float = 1) -> Path:
    """A raw disk of which ``share`` holds data, in pieces of 1 MiB."""
    rng = random.Random(size)
    with path.open("wb") as file:
        for number in range(size // MIB):
            if rng.random() < share:
                file.seek(number * MIB)
                file.write(rng.randbytes(MIB))
        file.truncate(size)
        os.fsync(file.fileno())
    return path


def many(folder: Path, count: int, size: int, seconds: float) -> Rows:
    """``count`` disks at once: in one process of ours, in as many workers as there are processors,
    and one qemu-nbd for each disk."""
    disks = [folder / f"disk{i}.raw" for i in range(count)]
    for disk in disks:
        if not disk.exists():
            filled(disk, size)

    def ours(workers: int) -> Run:
        sock = folder / "s"
        words = ["-f", "raw", "-k", str(sock), "--workers", str(workers), *map(str, disks)]
        names = [disk.name if count > 1 else "" for disk in disks]
        with server([*OURS, *words], sock) as process:
            rate = fio([f"nbd+unix:///{n}?socket={sock}" for n in names], size, seconds, folder)
            return Run(rate, peak([process]))

    def theirs() -> Run:
        with ExitStack() as stack:
            started, uris = [], []
            for i, disk in enumerate(disks):
                sock = folder / f"s{i}"
                words = ["-f", "raw", "-k", str(sock), str(disk)]
                started.append(stack.enter_context(server([*QEMU, *words], sock)))
                uris.append(f"nbd+unix:///?socket={sock}")
            return Run(fio(uris, size, seconds, folder), peak(started))

    rows: Rows = {"one process": lambda: ours(1)}
    if count > 1:
        workers = min(count, os.cpu_count() or 1)
        rows[f"{workers} workers"] = lambda: ours(workers)
    rows[f"{count} qemu-nbd"] = theirs
    return rows


def nbdcopy(uri: str, target: str, size: int) -> float:
    """MiB/s of a disk of ``size`` bytes."""
    start = time.perf_counter()
    subprocess.run(["nbdcopy", uri, target], check=True)
    return size / MIB / (time.perf_counter() - start)


def secured(folder: Path, size: int) -> Rows:
    """A disk full of data read by nbdcopy over a unix socket, with and without TLS."""
    disk, sock = filled(folder / "tls.raw", size), folder / "tls.sock"
    make_certificates(folder)
    creds = ["--object", f"tls-creds-x509,id=t,dir={folder},endpoint=server", "--tls-creds=t"]
    plain = {
        "diskwright": [*OURS, "-f", "raw", "-k", str(sock), str(disk)],
        "qemu-nbd": [*QEMU, "-f", "raw", "-k", str(sock), str(disk)],
        "nbdkit": [*KIT, "-U", str(sock), "file", str(disk)],
    }
    tls = {"nbdkit": ["--tls=require", f"--tls-certificates={folder}", "--tls-verify-peer"]}

    def run(command: list[str], uri: str) -> Run:
        with server(command, sock) as process:
            return Run(nbdcopy(uri, "null:", size), peak([process]))

    rows: Rows = {}
    for name, command in plain.items():
        at = command.index("-U" if name == "nbdkit" else "-k")
        over = [*command[:at], *tls.get(name, creds), *command[at:]]
        uri = f"nbds+unix:///?socket={sock}&tls-certificates={folder}&tls-hostname=localhost"
        rows[name] = lambda c=command: run(c, f"nbd+unix:///?socket={sock}")  # type: ignore[misc]
        rows[f"{name}, TLS"] = lambda c=over, u=uri: run(c, u)  # type: ignore[misc]
    return rows


def sparse(folder: Path, size: int, fmt: str) -> Rows:
    """MiB/s of the disk's size, a tenth of which holds data, copied to a file by nbdcopy."""
    disk, sock = folder / f"sparse.{fmt}", folder / "sparse.sock"
    raw = filled(folder / "sparse.raw", size, 0.1)
    if fmt != "raw":
        convert = ["qemu-img", "convert", "-f", "raw", "-O", fmt, str(raw), str(disk)]
        subprocess.run(convert, check=True)
    commands = {
        "diskwright": [*OURS, "-f", fmt, "-k", str(sock), str(disk)],
        "qemu-nbd": [*QEMU, "-f", fmt, "-k", str(sock), str(disk)],
    }
    if fmt == "raw":
        commands["nbdkit"] = [*KIT, "-U", str(sock), "file", str(disk)]

    def run(command: list[str]) -> Run:
        target = folder / "copy.raw"
        target.unlink(missing_ok=True)
        with server(command, sock) as process:
            rate = nbdcopy(f"nbd+unix:///?socket={sock}", str(target), size)
            return Run(rate, peak([process]))

    return {name: lambda c=command: run(c) for name, command in commands.items()}  # type: ignore[misc]


def measured(rows: Rows, rounds: int) -> dict[str, list[Run]]:
    """All runs of each row; another one begins in each round."""
    found: dict[str, list[Run]] = {name: [] for name in rows}
    names = list(rows)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(rows[name]())
            print(f"  {name:16} {found[name][-1].rate:9.1f}", file=sys.stderr, flush=True)
    return found


def table(title: str, unit: str, found: dict[str, list[Run]], base: str) -> str:
    """Ratios are medians of those to the row ``base`` of the same round."""
    lines = [f"### {title}", "", f"| server | {unit} | of {base} | peak MiB |", "|---|---|---|---|"]
    for name, runs in found.items():
        rates = [run.rate for run in runs]
        ratio = median(a.rate / b.rate for a, b in zip(runs, found[base], strict=True))
        span = f"{median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})"
        lines.append(f"| {name} | {span} | {ratio:.2f}× | {median(r.peak for r in runs):.0f} |")
    return "\n".join([*lines, ""])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each run of fio")
    parser.add_argument("--disks", default="1,2,4,8,16,32,64", help="how many at once")
    parser.add_argument("--size", type=int, default=32, help="MiB of each of these disks")
    parser.add_argument("--tls", type=int, default=512, help="MiB of the disk that is read by TLS")
    parser.add_argument("--sparse", type=int, default=4096, help="MiB of the sparse disk")
    parser.add_argument("--only", default="disks,tls,sparse")
    parser.add_argument("--directory", type=Path, default=ROOT / "bench" / ".images" / "serve")
    return parser.parse_args()


def main() -> int:
    """Run everything and print the tables."""
    options = arguments()
    missing = [t for t in ("fio", "nbdcopy", "nbdkit", "qemu-nbd") if shutil.which(t) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 77
    folder = options.directory.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    size, seconds, rounds = options.size * MIB, options.seconds, options.rounds
    only = options.only.split(",")
    print(f"{rounds} rounds, {os.cpu_count()} processors, Python {sys.version.split()[0]}.\n")
    for count in map(int, options.disks.split(",") if "disks" in only else ()):
        found = measured(many(folder, count, size, seconds), rounds)
        title = f"{count} disk{'s' * (count > 1)}, 4 KiB random read, depth 16 each"
        print(table(title, "k/s", found, "one process"), flush=True)
    if "tls" in only:
        found = measured(secured(folder, options.tls * MIB), rounds)
        title = "nbdcopy of a full disk to nowhere, TLS"
        print(table(title, "MiB/s", found, "diskwright"), flush=True)
    for fmt in ("raw", "qcow2") if "sparse" in only else ():
        found = measured(sparse(folder, options.sparse * MIB, fmt), rounds)
        title = f"nbdcopy of a sparse disk, {fmt}"
        print(table(title, "MiB/s", found, "qemu-nbd"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
