"""The threads of all drivers of a process: how many there are, what they share, when they end."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
from pathlib import Path

import pytest

import diskwright
from diskwright.engine import pool
from diskwright.engine.aio_driver import AsyncioDriver
from diskwright.engine.kernel import BaseDriver, Driver, wait_all


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> pool.Threads:
    """Threads of this test alone: others may have left a disk open."""
    fresh = pool.Threads()
    monkeypatch.setattr(pool, "_shared", fresh)
    return fresh


def ours() -> int:
    return len(pool._shared._threads)


def test_a_hundred_disks_share_seven_threads(tmp_path: Path) -> None:
    before = ours()

    async def work() -> int:
        disks = []
        for i in range(100):
            path = tmp_path / str(i)
            await diskwright.aio.create(path, format="qcow2", size=1 << 20)
            disks.append(await diskwright.aio.open(path, writable=True))
        await asyncio.gather(*[disk.write_at(4096, b"x" * 300_000) for disk in disks])
        await asyncio.gather(*[disk.flush() for disk in disks])
        most = ours()
        assert await disks[-1].read_at(4096, 1) == b"x"
        await asyncio.gather(*[disk.close() for disk in disks])
        return most

    assert 1 <= asyncio.run(work()) <= pool.MOST_THREADS
    assert ours() == before


def test_jobs_of_several_drivers_run_at_the_same_time() -> None:
    meeting = threading.Barrier(pool.MOST_THREADS, timeout=20)

    def drive(count: int) -> None:
        driver = Driver()

        async def work() -> None:
            await wait_all([driver.call(meeting.wait) for _ in range(count)])

        driver.run(work())
        driver.close()

    threads = [threading.Thread(target=drive, args=(count,)) for count in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not meeting.broken


def test_no_more_computes_at_once_than_there_are_processors() -> None:
    driver = Driver()
    lock, most, running = threading.Lock(), 0, 0

    def compute() -> None:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    async def work() -> None:
        await wait_all([driver.compute(compute) for _ in range(20)])

    driver.run(work())
    driver.close()
    assert 1 <= most <= min(pool.processors(), pool.MOST_THREADS - 1)


def test_a_job_that_waits_for_jobs_does_not_wait_for_ever() -> None:
    driver = Driver()

    def inner(depth: int) -> int:
        below = Driver()

        async def work() -> int:
            return await below.call(inner, depth - 1) + 1 if depth else 0

        try:
            return below.run(work())
        finally:
            below.close()

    async def work() -> list[int]:
        return await wait_all([driver.call(inner, 3) for _ in range(20)])

    assert driver.run(work()) == [3] * 20
    driver.close()


def test_stopping_waits_for_every_job_and_errors_are_kept() -> None:
    driver, done = Driver(), []

    def slow(i: int) -> None:
        time.sleep(0.02)
        done.append(i)

    for i in range(12):
        driver.call(slow, i)
    driver.stop_pool()
    assert sorted(done) == list(range(12)) and not ours()

    def fails() -> None:
        raise ValueError("kept")

    async def work() -> None:
        await driver.call(fails)

    with pytest.raises(ValueError, match="kept"):
        driver.run(work())
    driver.close()


def test_without_threads_jobs_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    driver = Driver()

    async def work() -> int:
        return await driver.call(threading.get_ident)

    assert driver.run(work()) == threading.get_ident()
    driver.close()


def test_a_closed_loop_does_not_take_a_thread_along() -> None:
    release = threading.Event()

    async def begin(driver_of: list[BaseDriver]) -> None:
        driver_of.append(AsyncioDriver())
        driver_of[0].call(release.wait)

    drivers: list[BaseDriver] = []
    asyncio.run(begin(drivers))
    other = Driver()
    other.run(_ask(other))
    release.set()
    drivers[0].stop_pool()
    other.run(_ask(other))
    other.close()
    assert not ours()


async def _ask(driver: Driver) -> int:
    return await driver.call(os.getpid)


def test_a_forked_child_has_threads_of_its_own() -> None:
    driver = Driver()
    driver.run(_ask(driver))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that is what is tried here
        child = os.fork()
    if not child:
        code = 1
        try:
            fresh = Driver()
            code = 0 if fresh.run(_ask(fresh)) == os.getpid() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    driver.run(_ask(driver))
    driver.close()
