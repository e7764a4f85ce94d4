"""Runs seeds in several processes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

CHUNK = 20


class Job(NamedTuple):
    """``count`` seeds of ``case`` from ``first``."""

    case: str
    first: int
    count: int
    crashes: int


class Result(NamedTuple):
    case: str
    stats: dict[str, int]
    failures: list[tuple[int, str]]


def work(job: Job) -> Result:
    """In a worker."""
    from .harness import run_seeds

    stats, failures = run_seeds(job.case, job.first, job.count, stop=3, crashes=job.crashes)
    return Result(job.case, dict(stats), failures)


def workers() -> int:
    if "PYTEST_XDIST_WORKER" in os.environ:  # as many of these run already as there are cores
        return 1
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


def executor() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers(), mp_context=get_context("spawn"))


def run(cases: Iterable[str], count: int, first: int = 0, crashes: int = 6) -> list[Result]:
    """``count`` seeds of each case."""
    jobs = [
        Job(case, start, min(CHUNK, first + count - start), crashes)
        for case in cases
        for start in range(first, first + count, CHUNK)
    ]
    with executor() as pool:
        return list(pool.map(work, jobs))


def totals(results: Iterable[Result]) -> Counter[str]:
    out: Counter[str] = Counter()
    for result in results:
        out.update(result.stats)
    return out


def report(results: Iterable[Result]) -> str:
    """The failures, each with the command that shows it again."""
    lines: list[str] = []
    for result in results:
        for seed, text in result.failures:
            again = f"cd tests; python -m races.harness {result.case} 1 {seed}"
            lines.append(f"{result.case} seed {seed}: {text}\n    {again}")
    return "\n".join(lines)


def show(capsys: Any, text: str) -> None:
    """Print past the capture: the counts belong into every log."""
    with capsys.disabled():
        print(f"\n{text}", flush=True)
