"""Every request fails once, and nobody loses what was flushed.

For each request of workloads that grow, copy on write, discard, zero, shrink, commit and close
(for qcow2 also: that add and move every kind of table, take and apply snapshots, keep bitmaps and
amend): EIO, and ENOSPC unless it is a read.
Somebody is told, with the errno; nothing is left running; afterwards, and after a crash at that
moment, the images check clean (leaks allowed) and hold what was flushed.
"""

from __future__ import annotations

import os

import pytest

from races.pool import executor, show

from .workload import FEATURES, KINDS, LARGE, Job, jobs, sweep

STRIDE = int(os.environ.get("DISKWRIGHT_FAULT_STRIDE", "1"))


def some(chunk: list[Job]) -> tuple[int, int, list[str]]:
    """In a worker."""
    return sweep(chunk)


def fail(kinds: tuple[str, ...], stride: int, capsys: pytest.CaptureFixture[str]) -> None:
    every = [job for kind in kinds for job in jobs(kind)][::stride]
    chunks = [every[i : i + 25] for i in range(0, len(every), 25)]
    runs = told = 0
    problems: list[str] = []
    with executor() as pool:
        for count, heard, wrong in pool.map(some, chunks):
            runs += count
            told += heard
            problems += wrong
    show(capsys, f"faults: {runs} failures of one request, {told} told to the caller")
    assert not problems, "\n".join(problems)
    assert runs == len(every) > 80


@pytest.mark.timeout(600)
def test_every_request_fails_once(capsys: pytest.CaptureFixture[str]) -> None:
    fail(tuple(kind for kind in KINDS if kind not in LARGE), STRIDE, capsys)


@pytest.mark.timeout(600)
def test_requests_of_large_units_fail(capsys: pytest.CaptureFixture[str]) -> None:
    fail(LARGE, 3 * STRIDE, capsys)


@pytest.mark.timeout(600)
def test_requests_of_features_fail(capsys: pytest.CaptureFixture[str]) -> None:
    fail(FEATURES, 15, capsys)


@pytest.mark.long
@pytest.mark.timeout(0)
def test_every_request_of_features_fails_once(capsys: pytest.CaptureFixture[str]) -> None:
    fail(FEATURES + LARGE, 1, capsys)
