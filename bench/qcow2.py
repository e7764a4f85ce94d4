"""qcow2 beside ``qemu-img`` at its fastest flags (``-m 16 -W``): conversions, compressed clusters,
encryption, ``compare`` and ``check``, as whole programs from start-up to the final flush.

The disk is sparse, a quarter of it in use (``files`` of :mod:`disks`).  In each round every case
runs ours and theirs one after the other, in turn who is first; what is compared is the median of
the rounds' quotients.  Processor time and peak memory stand beside: with other programs on the
machine only they say anything.
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
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

from convert import HERE, SOURCE
from disks import MIB

THEIRS = "qemu-img"
OURS = "diskwright"
BARE = "diskwright without NumPy"
BEST = "diskwright, level 9"
FULL = 1 << 40
"""Bytes of the disk whose metadata ``check`` goes through."""
SECRET = "secret,id=s,file={folder}/secret"
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
_MODULE = ("-m", "diskwright")
_BARE = (
    "-c",
    "import runpy, sys; sys.modules['numpy'] = None; runpy.run_module('diskwright', None, "
    "'__main__')",
)


class Case(NamedTuple):
    """What is measured.  ``words`` are the arguments of both, ``flags`` further ones of theirs and
    ``ours`` those of each of our programs.  Names in braces are images; what is made is
    ``target``."""

    words: str
    wanted: str
    ours: dict[str, str]
    flags: str = ""
    encrypted: bool = False
    """Of the target."""


def cases() -> dict[str, Case]:
    """All of them by name."""
    fast = "-m 16 -W"
    convert = "convert -t writeback"
    key = f"--object {SECRET}"
    locked = f"{key} --image-opts driver=qcow2,file.filename={{luks}},encrypt.key-secret=s"
    packed = f"{convert} -c -f raw -O qcow2"
    either = {OURS: "", BARE: ""} if find_spec("numpy") else {BARE: ""}
    return {
        "raw:qcow2": Case(f"{convert} -f raw -O qcow2 {{raw}} {{target}}", "1.0", {OURS: ""}, fast),
        "qcow2:raw": Case(f"{convert} -f qcow2 -O raw {{qcow2}} {{target}}", "1.0", {OURS: ""},
                          fast),
        "zlib": Case(f"{packed} {{raw}} {{target}}", "0.4 (size 1.10); level 9: 1.0 (1.01)",
                     {OURS: "", BEST: "-o compression_level=9"}, fast),
        "zstd": Case(f"{packed} -o compression_type=zstd {{raw}} {{target}}", "1.0", {OURS: ""},
                     fast),
        "read-compressed": Case(f"{convert} -f qcow2 -O raw {{zlib}} {{target}}", "0.7",
                                {OURS: ""}, fast),
        "read-zstd": Case(f"{convert} -f qcow2 -O raw {{zstd}} {{target}}", "", {OURS: ""}, fast),
        "compare": Case("compare -f raw -F qcow2 {raw} {qcow2}", "1.0", {OURS: ""}),
        "luks-write": Case(f"{convert} {key} -f raw -O qcow2 -o {LUKS} {{raw}} {{target}}", "2.0",
                           either, fast, True),
        "luks-read": Case(f"{convert} {locked} -O raw {{target}}", "2.0", either, fast),
        "check": Case("check -f qcow2 {full}", "1.0", {OURS: ""}),
    }  # fmt: skip


class Run(NamedTuple):
    """One run: seconds of the clock and of processors, and bytes."""

    seconds: float
    cpu: float
    peak: int
    held: int
    """What the file system holds of the target."""


Results = dict[str, dict[str, list[Run]]]


class Bench:
    """Images in ``folder``, made when they are first asked for."""

    def __init__(self, folder: Path, size: int, full: int) -> None:
        self.folder, self.size, self.full = folder, size, full
        (folder / "secret").write_text("correct horse")
        bytecode = str(folder / "bytecode")
        self.environment = dict(
            os.environ, PYTHONPATH=str(SOURCE), PYTHONPYCACHEPREFIX=bytecode
        )  # modules are compiled once, as in an installation
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def image(self, name: str) -> Path:
        """The image that cases call so."""
        path = self.folder / name
        if name == "target" or path.exists():
            return path
        convert = f"convert -m 16 -W -f raw -O qcow2 %s {{raw}} {self.folder}/{name}"
        match name:
            case "raw":
                # In a process of its own: what this one ever held would be told as the peak of
                # those that it starts.
                writer = [sys.executable, str(HERE / "disks.py"), "files", str(self.size)]
                subprocess.run([*writer, str(path)], check=True)
                return path
            case "qcow2":
                words = convert % ""
            case "zlib":
                words = convert % "-c"
            case "zstd":
                words = convert % "-c -o compression_type=zstd"
            case "luks":
                words = convert % f"--object {SECRET} -o {LUKS}"
            case "full":
                words = f"create -q -f qcow2 -o preallocation=metadata {path} {self.full}"
            case _:
                raise SystemExit(f"unknown image: {name}")
        subprocess.run([THEIRS, *self.filled(words)], check=True)
        return path

    def filled(self, words: str) -> list[str]:
        """``words`` with the paths of the images."""
        names = ("raw", "qcow2", "zlib", "zstd", "luks", "full", "target")
        used = {name: self.image(name) for name in names if f"{{{name}}}" in words}
        return words.format(folder=self.folder, **used).split()

    def command(self, case: Case, program: str) -> list[str]:
        """How ``program`` does it."""
        verb, *rest = self.filled(case.words)
        if program == THEIRS:
            return [THEIRS, verb, *case.flags.split(), *rest]
        start = _BARE if program == BARE else _MODULE
        return [sys.executable, *start, verb, *case.ours[program].split(), *rest]

    def run(self, case: Case, program: str) -> Run:
        """Once.  What it made stays until the next run."""
        words = self.command(case, program)
        target = self.folder / "target"
        target.unlink(missing_ok=True)
        os.sync()  # or else this run pays for what the one before left in the cache
        began = time.perf_counter()
        process = subprocess.Popen(words, env=self.environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(words)} failed with status {process.returncode}")
        held = target.stat().st_blocks * 512 if target.exists() else 0
        return Run(took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10, held)

    def verify(self, case: Case) -> None:
        """The target holds the disk, as ``qemu-img compare`` sees it."""
        target = self.folder / "target"
        if not target.exists():
            return
        if case.encrypted:
            words = (
                f"compare -q --object {SECRET} --image-opts driver=raw,file.filename={{raw}} "
                "driver=qcow2,file.filename={target},encrypt.key-secret=s"
            )
        else:
            words = "compare -q {raw} {target} -f raw -F "
            words += "raw" if "-O raw" in case.words else "qcow2"
        if subprocess.run([THEIRS, *self.filled(words)], check=False).returncode:
            raise SystemExit(f"{case.words}: the copy differs from its source")


def render(results: Results, wanted: dict[str, Case], options: argparse.Namespace) -> str:
    """One table: a row for each case and program."""
    version = subprocess.run([THEIRS, "--version"], capture_output=True, text=True, check=False)
    lines = [
        f"{options.rounds} rounds in turn, a disk of {options.size // MIB} MiB on "
        f"{options.directory}, -t writeback, {os.cpu_count()} processors, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, "
        f"{version.stdout.splitlines()[0]}; load {os.getloadavg()[1]:.1f}. Medians "
        "(minimum–maximum); quotients are medians of pairs.",
        "",
        "| case | program | seconds | of qemu-img's | wanted | CPU s | of its CPU | peak MiB "
        "| result MiB | of its size |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, programs in results.items():
        theirs = programs[THEIRS]

        def quotient(
            runs: list[Run], value: Callable[[Run], float], theirs: list[Run] = theirs
        ) -> str:
            pairs = [(value(a), value(b)) for a, b in zip(runs, theirs, strict=True)]
            found = [a / b for a, b in pairs if b]
            return f"{median(found):.2f}×" if found else ""

        for program, runs in programs.items():
            seconds = [run.seconds for run in runs]
            held = median(run.held for run in runs) / MIB
            lines.append(
                f"| {name} | {program} "
                f"| {median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f}) "
                f"| {quotient(runs, lambda run: run.seconds)} "
                f"| {'' if program == THEIRS else wanted[name].wanted} "
                f"| {median(run.cpu for run in runs):.2f} "
                f"| {quotient(runs, lambda run: run.cpu)} "
                f"| {max(run.peak for run in runs) / MIB:.0f} "
                f"| {f'{held:.1f}' if held else ''} "
                f"| {quotient(runs, lambda run: run.held)} |"
            )
    return "\n".join([*lines, ""])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=4 << 30, help="bytes of the disk (4 GiB)")
    parser.add_argument("--full", type=int, default=FULL, help="bytes of the disk of check (1 TiB)")
    parser.add_argument("--cases", default=",".join(cases()), help="which, with commas")
    parser.add_argument("--directory", default="/dev/shm", help="where the images are")
    parser.add_argument("--output", type=Path, help="write the table there as well")
    return parser.parse_args()


def main() -> int:
    """Run everything and print the table."""
    options = arguments()
    if shutil.which(THEIRS) is None:
        print("qemu-img is not installed: nothing was measured", file=sys.stderr)
        return 77
    known = cases()
    results: Results = {}
    started = time.time()
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="diskwright-bench-") as name:
        bench = Bench(Path(name), options.size, options.full)
        for turn in range(options.rounds):
            for case_name in options.cases.split(","):
                measure(bench, case_name, known[case_name], turn, results)
    table = render(results, known, options)
    print(table)
    print(f"{(time.time() - started) / 60:.1f} minutes in all", file=sys.stderr)
    if options.output:
        options.output.write_text(table)
    return 0


def measure(bench: Bench, name: str, case: Case, turn: int, results: Results) -> None:
    """All programs on one case; what ours made is verified in the first round."""
    programs = [*case.ours, THEIRS]
    found = results.setdefault(name, {program: [] for program in programs})
    for program in programs if turn % 2 == 0 else reversed(programs):
        done = bench.run(case, program)
        found[program].append(done)
        print(
            f"round {turn + 1} {name:15} {program:25} {done.seconds:6.2f} s  cpu {done.cpu:6.2f} s"
            f"  {done.peak / MIB:4.0f} MiB",
            file=sys.stderr,
            flush=True,
        )
        if turn == 0 and program != THEIRS:
            bench.verify(case)
    (bench.folder / "target").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
