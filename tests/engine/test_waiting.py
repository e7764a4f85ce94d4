"""What a stuck request waits for is named: each is made to hang on purpose, and the text must tell
the cause."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.engine import trace, waiting
from diskwright.engine.kernel import Driver, Task
from diskwright.engine.trace import Tracer
from diskwright.export.budget import Budget
from diskwright.filters.blkdebug import BlkdebugNode
from diskwright.graph.graph import primary
from diskwright.graph.opener import close_disk, open_disk
from diskwright.monitor import all_commands
from diskwright.protocols import fileio

UNIT = 65536


def stuck(driver: Driver) -> list[str]:
    """The lines about requests that wait."""
    lines = str(waiting.report(driver)).splitlines()
    return [re.sub(r", for [\d.]+ s$", "", line) for line in lines if not line.startswith("idle")]


def run(folder: Path, scenario: Callable[..., Coroutine[Any, Any, None]], traced: bool = False,
        ) -> None:  # fmt: skip
    """``scenario(driver, disk, filter)``: a qcow2 disk whose file is below a blkdebug filter, and
    whose first clusters are allocated."""
    path = folder / "disk.qcow2"
    diskwright.create(path, format="qcow2", size=1 << 20)
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(0, b"x" * 4 * UNIT)
    driver = Driver()
    if traced:
        driver.trace = Tracer(driver)

    async def main() -> None:
        name = f"blkdebug::{path}"
        disk = await open_disk(driver, name, format="qcow2", writable=True)
        debug = primary(disk)
        assert isinstance(debug, BlkdebugNode)
        try:
            await scenario(driver, disk, debug)
        finally:
            debug.release()
            await close_disk(disk)

    try:
        driver.run(main())
    finally:
        driver.close()


async def begun(driver: Driver, work: Coroutine[Any, Any, Any], name: str = "") -> Task[Any]:
    task = driver.spawn(work, name, io=True)
    for _ in range(5):
        await driver.turn()
    assert not task.done
    return task


@pytest.mark.parametrize("traced", [False, True])
def test_a_breakpoint_and_a_lease(tmp_path: Path, traced: bool) -> None:
    async def scenario(driver: Driver, disk: Any, debug: BlkdebugNode) -> None:
        debug.set_break("write_aio", "A")
        first = await begun(driver, disk.write([0], [b"a" * 512]), "first")
        text = stuck(driver)
        told = f"write on {disk.name} (qcow2): 512 bytes at 0"
        assert text[0] == "1 request waiting" and text[1] == "[1] first"
        assert text[2].strip() == told
        assert text[3].strip() == f"a breakpoint of {debug.name} (blkdebug) at write_aio"
        # Others wait for what it holds, and behind each other.
        second = await begun(driver, disk.zero([0], [UNIT]), "second")
        third = await begun(driver, disk.write([0], [b"c" * 512]), "third")
        text = [line.strip() for line in stuck(driver)]
        assert f"a lease on {UNIT} bytes at 0 (exclusive), held by [1]" in text, text
        assert "a lease on 512 bytes at 0 (shared), held by [1], behind [2]" in text, text
        if traced:
            found = waiting.report(driver).stuck
            began = [one.below[0].seconds or 0 for one in found]
            assert began == sorted(began, reverse=True) and began[2] > 0
            assert re.search(r"512 bytes at 0, for \d+\.\d+ s", str(waiting.report(driver)))
        debug.release()
        for task in (first, second, third):
            await task
        assert stuck(driver) == ["no requests waiting"]

    run(tmp_path, scenario, traced)


def test_a_procedure_that_runs_alone(tmp_path: Path) -> None:
    async def scenario(driver: Driver, disk: Any, debug: BlkdebugNode) -> None:
        debug.set_break("write_aio", "A")
        write = await begun(driver, disk.write([0], [b"a" * 512]), "write")
        resize = await begun(driver, disk.truncate(2 << 20), "resize")
        text = [line.strip() for line in stuck(driver)]
        assert "[1] resize" in text or "[2] resize" in text
        lease = next(line for line in text if line.startswith("a lease"))
        number = next(line for line in text if line.endswith("] write"))[:3]
        assert lease == f"a lease on the whole image (exclusive), held by {number}"
        debug.release()
        await write
        await resize
        # And while it runs, others wait for it.
        debug.set_break("l1_grow_write_table", "B")
        debug.set_break("flush_to_disk", "C")
        resize = await begun(driver, disk.truncate(1 << 42), "resize")
        read = await begun(driver, disk.read([0], [512]), "read")
        text = [line.strip() for line in stuck(driver)]
        number = next(line for line in text if line.endswith("] resize"))[:3]
        assert f"{number}, which runs alone" in text, text
        assert "procedure that runs alone" in text
        debug.release()
        await resize
        await read

    run(tmp_path, scenario)


def test_a_file_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    real = fileio.put_all

    def hanging_put(*arguments: Any) -> Any:
        go.wait(5)
        return real(*arguments)

    async def scenario(driver: Driver, disk: Any, debug: BlkdebugNode) -> None:
        monkeypatch.setattr(fileio, "put_all", hanging_put)
        monkeypatch.setattr(fileio.FileIO, "inline_write", 0)
        path = tmp_path / "disk.qcow2"
        write = await begun(driver, disk.write([0], [b"a" * 512]), "write")
        text = [line.strip() for line in stuck(driver)]
        assert f"I/O in a thread, on {path}" in text, text
        assert any(line.startswith("write on") and str(path) in line for line in text), text
        go.set()
        await write

    run(tmp_path, scenario)


def test_memory_and_tasks_that_are_idle(tmp_path: Path) -> None:
    async def scenario(driver: Driver, disk: Any, debug: BlkdebugNode) -> None:
        budget = Budget(100)
        assert budget.take(60)
        waiter = await begun(driver, budget.acquire(50), "client")
        sleeper = driver.spawn(driver.sleep(100), "sleeper")
        await driver.turn()
        report = waiting.report(driver)
        (one,) = report.stuck
        assert (one.what, one.below[0].what) == (
            "client", "50 bytes of memory for clients' requests, of which 60 of 100 are in use",
        )  # fmt: skip
        assert one.to_dict() == {"what": "client", "waits-for": [{"what": one.below[0].what}]}
        assert "sleeper (a pause of 100 s)" in report.idle
        budget.release(60)
        await waiter
        sleeper.cancel()

    run(tmp_path, scenario)


def test_the_coroutines_that_it_knows_exist() -> None:
    all_commands()
    known = {
        f"{owner.__name__}.{name}"
        for owner in classes()
        for name, function in vars(owner).items()
        if inspect.iscoroutinefunction(function)
    }
    for name in (*waiting._LABELS, *waiting._CAUSES, "Condition.wait", "Procedures._quiet"):
        assert name in known, f"{name} is gone: {waiting.__name__} must know what came instead"
    assert inspect.iscoroutinefunction(diskwright.engine.futures.wait_all)
    names = {code.co_qualname for code in inner(Tracer.wrapped.__code__)}
    assert "Tracer.wrapped.<locals>.traced" in names and trace


def classes() -> set[type]:
    import sys

    from diskwright.filters import blkdebug
    from diskwright.protocols import nbd_links

    assert blkdebug and nbd_links
    return {
        value
        for name, module in list(sys.modules.items())
        if name.startswith("diskwright.")
        for value in vars(module).values()
        if inspect.isclass(value)
    }


def inner(code: Any) -> list[Any]:
    return [one for one in code.co_consts if inspect.iscode(one)]
