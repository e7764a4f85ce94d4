"""``diskwright convert`` beside ``qemu-img convert``: whole programs, start-up and final flush
included.

Every round runs every program once on every pair of formats, in turn, so that a slow minute of the
machine hits all of them; medians are compared, minimum and maximum stand beside.  Wall-clock time
means little while other programs run; processor time tells what a copy costs.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from disks import MIB, write

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"

OURS = "diskwright"
QEMU = {
    "qemu-img": [],
    "qemu-img -m 16 -W": ["-m", "16", "-W"],
}
PAIRS = "raw:raw,raw:qcow2,qcow2:raw,qcow2:qcow2"
STREAM = "stream"
"""Target format ``vmdk`` with subformat ``streamOptimized`` (-c is implied)."""


class Run(NamedTuple):
    """One conversion."""

    seconds: float
    cpu: float
    """User and system time, in seconds."""
    peak_kib: int
    allocated: int
    """Bytes of the target that the file system holds."""


class Job(NamedTuple):
    """One cell of the table."""

    directory: str
    data: str
    pair: str
    program: str


Results = dict[Job, list[Run]]


def make_source(directory: Path, data: str, fmt: str, size: int) -> Path:
    """An image of ``size`` bytes; made once, by ``qemu-img`` where it is not raw."""
    path = directory / f"{data}.{fmt}"
    if path.exists():
        return path
    if fmt == "raw":
        write(data, size, path)
    else:
        raw = make_source(directory, data, "raw", size)
        command = ["qemu-img", "convert", "-f", "raw", "-O", real(fmt), *extra(fmt)]
        subprocess.run([*command, str(raw), str(path)], check=True)
    return path


def real(fmt: str) -> str:
    """The name of the format on the command line."""
    return "vmdk" if fmt == STREAM else fmt


def extra(fmt: str) -> list[str]:
    """Options of the target."""
    return ["-o", "subformat=streamOptimized"] if fmt == STREAM else []


def command(program: str, pair: str, cache: str) -> list[str]:
    """How it is called, but for the names of the files."""
    source, target = pair.split(":")
    formats = ["-t", cache, "-f", real(source), "-O", real(target), *extra(target)]
    if program == OURS:
        return [sys.executable, "-m", "diskwright", "convert", *formats]
    return ["qemu-img", "convert", *QEMU[program], *formats]


def environment(bytecode: str) -> dict[str, str]:
    """Modules are compiled once, as in an installation."""
    values = dict(os.environ, PYTHONPATH=str(SOURCE), PYTHONPYCACHEPREFIX=bytecode)
    values.pop("PYTHONDONTWRITEBYTECODE", None)
    return values


def run(words: list[str], source: Path, target: Path, env: dict[str, str]) -> Run:
    """One conversion, from the start of the program to its end."""
    target.unlink(missing_ok=True)
    began = time.perf_counter()
    process = subprocess.Popen([*words, str(source), str(target)], env=env)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed with status {process.returncode}")
    held = target.stat().st_blocks * 512
    target.unlink()
    return Run(took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, held)


def same(one: Path, other: Path, formats: tuple[str, str]) -> bool:
    """Whether two images hold the same disk, as ``qemu-img compare`` sees it."""
    names = [real(fmt) for fmt in formats]
    words = ["qemu-img", "compare", "-q", "-f", names[0], "-F", names[1], str(one), str(other)]
    return subprocess.run(words, check=False).returncode == 0


def check(words: list[str], source: Path, target: Path, pair: str, env: dict[str, str]) -> None:
    """The first result of ours is compared with the source."""
    source_format, target_format = pair.split(":")
    target.unlink(missing_ok=True)
    subprocess.run([*words, str(source), str(target)], env=env, check=True)
    if not same(source, target, (source_format, target_format)):
        raise SystemExit(f"{pair}: the copy differs from its source")
    target.unlink()


def render(results: Results, options: argparse.Namespace, took: float) -> str:
    """One table: a row for each job."""
    qemu = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=False)
    lines = [
        f"{options.rounds} alternating rounds, disks of {options.size // MIB} MiB, -t "
        f"{options.cache}, {os.cpu_count()} processors, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {qemu.stdout.splitlines()[0]}; load "
        f"{os.getloadavg()[1]:.1f}; {took / 60:.0f} minutes in all. Medians (minimum–maximum).",
        "",
        "| where | data | from:to | program | seconds | of qemu-img's fastest | CPU s | of its CPU "
        "| peak MiB | target MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for job, runs in results.items():
        rivals = [results[key] for key in results if key[:3] == job[:3] and key.program in QEMU]
        wall = median(run.seconds for run in runs)
        cpu = median(run.cpu for run in runs)
        ratio = cost = ""
        if rivals:
            best = min(rivals, key=lambda r: median(run.seconds for run in r))
            ratio = f"{wall / median(run.seconds for run in best):.2f}×"
            cost = f"{cpu / min(median(run.cpu for run in r) for r in rivals):.2f}×"
        lines.append(
            f"| {job.directory} | {job.data} | {job.pair} | {job.program} "
            f"| {wall:.2f} ({min(r.seconds for r in runs):.2f}–{max(r.seconds for r in runs):.2f}) "
            f"| {ratio} | {cpu:.2f} | {cost} "
            f"| {median(run.peak_kib for run in runs) / 1024:.0f} "
            f"| {median(run.allocated for run in runs) / MIB:.0f} |"
        )
    return "\n".join([*lines, ""])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of each disk (1 GiB)")
    parser.add_argument("--data", default="random,mixed", help="random, mixed, zero, text, files")
    parser.add_argument("--pairs", default=PAIRS, help="SOURCE:TARGET formats, with commas")
    parser.add_argument(
        "--directories", default="/dev/shm", help="where the images are, with commas"
    )
    parser.add_argument("--cache", default="writeback", help="cache mode of the target")
    parser.add_argument("--output", type=Path, help="write the table there as well")
    return parser.parse_args()


def main() -> int:
    """Run everything and print the table."""
    options = arguments()
    if shutil.which("qemu-img") is None:
        print("qemu-img is not installed: nothing was measured", file=sys.stderr)
        return 77
    results: Results = {}
    started = time.time()
    with tempfile.TemporaryDirectory() as bytecode:
        env = environment(bytecode)
        for place in options.directories.split(","):
            with tempfile.TemporaryDirectory(dir=place, prefix="diskwright-bench-") as name:
                for data in options.data.split(","):
                    measure(Path(name), place, data, options, env, results)
    table = render(results, options, time.time() - started)
    print(table)
    if options.output:
        options.output.write_text(table)
    return 0


def measure(
    directory: Path,
    place: str,
    data: str,
    options: argparse.Namespace,
    env: dict[str, str],
    results: Results,
) -> None:
    """All pairs and programs on one kind of data; the sources are removed again."""
    programs = [OURS, *QEMU]
    pairs = options.pairs.split(",")
    target = directory / "target"
    for pair in pairs:
        source = make_source(directory, data, pair.split(":")[0], options.size)
        check(command(OURS, pair, options.cache), source, target, pair, env)
    for turn in range(options.rounds):
        for pair in pairs:
            source = make_source(directory, data, pair.split(":")[0], options.size)
            for program in programs[turn % len(programs) :] + programs[: turn % len(programs)]:
                words = command(program, pair, options.cache)
                done = run(words, source, target, env)
                results.setdefault(Job(place, data, pair, program), []).append(done)
                print(
                    f"round {turn + 1} {place} {data:7} {pair:12} {program:18}"
                    f" {done.seconds:6.2f} s  cpu {done.cpu:5.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    for path in directory.iterdir():
        path.unlink()


if __name__ == "__main__":
    sys.exit(main())
