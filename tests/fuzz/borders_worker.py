"""Mutants of one format, inside limits; run by test_fields in its own process.

Arguments: the format, which part of how many of its mutants, and ``every`` for all borders.  Prints
one JSON object: how many executions there were, how many got behind opening, the slowest, the peak
of memory, seconds of processor time, and what went wrong.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
import traceback
from pathlib import Path

from diskwright.formats import luks1
from fuzz.attack import MODES, attack
from fuzz.machine import Hang, watched
from fuzz.mutants import mutants
from fuzz.samples import samples

ROUNDS = 1 << 14
"""What more hashing than that costs is known (tests/crypto)."""
MEMORY = 512 << 20
"""That an image may make us take, beyond what the interpreter and the samples have."""


def main(format: str, part: int, parts: int, every: bool) -> dict[str, object]:
    known: set[str] = set()
    all_mutants = [(sample, mutants(sample, known, every)) for sample in samples(format)]
    number = executions = opened = 0
    slowest = (0.0, "")
    wrong: list[str] = []
    others = itertools.cycle(MODES[format][1:])
    for sample, found in all_mutants:
        for mutant in found:
            number += 1
            if number % parts != part:
                continue
            for mode in MODES[format] if every else (MODES[format][0], next(others)):
                executions += 1
                start = time.process_time()
                said = f"{sample}, {mode}, {mutant.said}"
                try:
                    with watched():
                        opened += attack(sample, mutant.files(), mode) > 0
                except (Exception, Hang):
                    wrong.append(f"{said}:\n{traceback.format_exc(limit=-5)}")
                slowest = max(slowest, (time.process_time() - start, said))
    return {
        "executions": executions, "opened": opened, "slowest": slowest, "peak": peak(),
        "seconds": time.process_time(), "wrong": wrong,
    }  # fmt: skip


def limit() -> None:
    """No more memory than this from now on."""
    resource.setrlimit(resource.RLIMIT_AS, (held() + MEMORY,) * 2)


def held() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def peak() -> int:
    """The peak of this program's memory, in MiB.  What getrusage tells is at least the peak of
    whoever started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) >> 10


if __name__ == "__main__":
    format, part, parts, every = sys.argv[1:]
    samples(format)
    luks1.MOST_ROUNDS = ROUNDS
    limit()
    json.dump(main(format, int(part), int(parts), every == "every"), sys.stdout)
