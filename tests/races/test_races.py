"""The engine, the graph, the toy and qcow2 under thousands of interleavings.

``DISKWRIGHT_SEEDS`` sets the seeds of each graph, ``--long`` makes it 2,000; both print how many
they ran.
"""

from __future__ import annotations

import os

import pytest

from . import pool
from .cases import CASES

SEEDS = int(os.environ.get("DISKWRIGHT_SEEDS", "40"))
FORMATS = ("qcow2", "vhdx", "vmdk")
LONG = int(os.environ.get("DISKWRIGHT_SEEDS", "2000"))


def _run(
    cases: list[str],
    count: int,
    first: int,
    capsys: pytest.CaptureFixture[str],
    slow: tuple[str, ...] = (),
) -> None:
    """``slow``: of these a quarter is enough."""
    results = pool.run([name for name in cases if name not in slow], count, first)
    results += pool.run(slow, count // 4, first)
    total = pool.totals(results)
    pool.show(
        capsys,
        f"races: {total['seeds']} interleavings of {len(cases)} graphs, "
        f"{total['requests']} requests, {total['cancelled']} cancelled, "
        f"{total['errors']} failed, {total['snapshots']} snapshots, "
        f"{total['evicted']} evictions, {total['crash states']} crash states",
    )
    failures = pool.report(results)
    assert not failures, failures
    # The seeds must meet what they are there for.
    for what in ("cancelled", "errors", "no space", "evicted", "crash states", "clean ends"):
        assert total[what] > 0, what


@pytest.mark.timeout(600)
def test_toy_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    _run([name for name in CASES if not name.startswith(FORMATS)], SEEDS, 0, capsys)


@pytest.mark.timeout(600)
def test_qcow2_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    # The cases of single features share what six plain graphs would get.
    cases = [name for name in CASES if name.startswith("qcow2")]
    _run(cases, max(SEEDS * 6 // len(cases), 1), 0, capsys, ("qcow2-aes", "qcow2-luks"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("format", ["vhdx", "vmdk"])
def test_graphs_of_large_units(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Units of a mebibyte take their time.
    seeds = SEEDS // (8 if format == "vhdx" else 4)
    _run([name for name in CASES if name.startswith(format)], seeds, 0, capsys)


@pytest.mark.long
@pytest.mark.timeout(0)
def test_long(capsys: pytest.CaptureFixture[str]) -> None:
    _run(list(CASES), LONG, 100_000, capsys)


def test_a_seed_gives_the_same_run_twice() -> None:
    from .harness import Run

    assert Run("toy-backing", 5).go() == Run("toy-backing", 5).go()


def test_a_deadlock_tells_who_waits_for_what() -> None:
    from diskwright.engine.futures import Deadlock, Future
    from diskwright.testing.scheduler import SeededDriver

    driver = SeededDriver(1)

    async def inner() -> None:
        await Future()

    async def outer() -> None:
        await inner()

    with pytest.raises(Deadlock, match=r"outer:\d+ > .*inner:\d+"):
        driver.run(outer())
