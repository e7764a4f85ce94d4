"""The Python API where it is used: under a running loop, beside other threads and processes, and
where a call or the program is broken off."""

from __future__ import annotations

import _thread
import asyncio
import gc
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright import aio
from diskwright.errors import NodeClosed, OperationCancelled, UsageError

ROOT = Path(__file__).resolve().parents[2]
SIZE = 1 << 20


@pytest.fixture(autouse=True)
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    diskwright.create("a", format="qcow2", size=SIZE)
    with diskwright.open("a", writable=True) as disk:
        disk.write_at(0, b"content" * 40_000)
    return tmp_path / "a"


def test_the_synchronous_api_under_a_running_loop() -> None:
    """As in a notebook."""

    async def cell() -> None:
        with diskwright.open("a", writable=True) as disk:
            disk.write_at(0, b"x" * 500_000)
            disk.flush()
            async with aio.open("b", writable=True) as other:
                await other.write_at(0, disk.read_at(0, 500_000))
                assert disk.read_at(499_999, 2) == await other.read_at(499_999, 2) == b"x\0"
        assert diskwright.check("a").ok and (await aio.compare("a", "b")).equal
        diskwright.convert("a", "c.raw")

    diskwright.create("b", format="qcow2", size=SIZE)
    asyncio.run(cell())


def test_both_apis_have_the_same_names() -> None:
    def public(thing: Any) -> set[str]:
        return {name for name in dir(thing) if not name.startswith("_")}

    assert public(diskwright.Disk) == public(aio.Disk)
    functions = {name for name in diskwright.__all__ if name.islower()}
    assert all(hasattr(aio, name) for name in functions - {"aio", "errors", "limited"})


def test_an_open_disk_is_not_pickled() -> None:
    with diskwright.open("a") as disk:
        with pytest.raises(TypeError, match="open it again by its name"):
            pickle.dumps(disk)
        process = multiprocessing.get_context("spawn").Process(target=print, args=(disk,))
        with pytest.raises(TypeError, match="open it again by its name"):
            process.start()


def in_a_child(disk: diskwright.Disk, held: io.BytesIO) -> None:
    """What was opened before is refused; what is opened now works, with threads of its own."""
    for call in (disk.flush, lambda: disk.read_at(0, 1), disk.raw, disk.snapshots.list):
        with pytest.raises(NodeClosed):
            call()
    disk.close()
    with diskwright.open("b", writable=True) as own:
        own.write_at(0, b"child" * 50_000)
    with diskwright.open(held) as own:
        assert own.read_at(0, 7) == b"content"


def test_a_child_opens_disks_of_its_own(image: Path) -> None:
    held = io.BytesIO(image.read_bytes())
    diskwright.create("b", format="qcow2", size=SIZE)
    with diskwright.open("a", writable=True) as disk, diskwright.open(held) as other:
        disk.write_at(300_000, b"p" * 300_000)
        assert other.read_at(0, 7) == b"content"
        child = multiprocessing.get_context("fork").Process(target=in_a_child, args=(disk, held))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it has threads
            child.start()
        child.join(60)
        assert child.exitcode == 0
        assert disk.read_at(300_000, 1) == b"p" and other.read_at(0, 7) == b"content"
    with diskwright.open("b") as disk:
        assert disk.read_at(0, 5) == b"child"


def test_a_dropped_disk_gives_up_its_locks_at_once() -> None:
    gc.disable()
    try:
        disk = diskwright.open("a", writable=True)
        disk.write_at(500_000, b"lost")
        with pytest.warns(ResourceWarning, match="Disk 'a' qcow2 1048576 bytes> was never closed"):
            del disk
        with diskwright.open("a", writable=True) as again:
            assert again.read_at(500_000, 4) == bytes(4)
    finally:
        gc.enable()

    async def drop() -> None:
        await aio.open("a", writable=True)

    with pytest.warns(ResourceWarning, match="never closed"):
        asyncio.run(drop())
        gc.collect()
    assert diskwright.check("a", repair="all").ok


def test_a_program_may_end_anywhere() -> None:
    code = """
import asyncio, threading, diskwright
from diskwright import aio

async def main():
    global left
    left = await aio.open("a", writable=True)
    await left.write_at(0, b"x" * 300_000)

diskwright.create("b", format="qcow2", size=1 << 20)
disk = diskwright.open("b", writable=True)
file = disk.raw()
file.write(b"raw")
asyncio.run(main())
threading.Thread(target=disk.write_at, args=(70_000, b"kept")).start()
raise SystemExit(3)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (3, "")
    with diskwright.open("b") as disk:
        assert disk.read_at(70_000, 4) == b"kept"
    assert not diskwright.check("a").corruptions


class Interrupting(io.BytesIO):
    """Ctrl-C comes while the n-th call is under way."""

    left = -1

    def _came(self) -> None:
        self.left -= 1
        if self.left == 0:
            _thread.interrupt_main()
            time.sleep(0.02)

    def read(self, *size: Any) -> bytes:
        self._came()
        return super().read(*size)

    def write(self, data: Any) -> int:
        self._came()
        return super().write(data)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell has what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_a_disk_that_works(image: Path) -> None:
    held = Interrupting(image.read_bytes())
    interrupted = 0
    with diskwright.open(held, writable=True) as disk:
        for turn in range(1, 6):
            for call in (
                lambda: disk.write_at(turn * 100_000, b"y" * 150_000),  # noqa: B023
                disk.flush,
                lambda: disk.read_at(0, SIZE),
            ):
                held.left = turn
                try:
                    call()
                except KeyboardInterrupt:
                    interrupted += 1
                held.left = -1
                disk.write_at(0, b"after")
                assert disk.read_at(0, 5) == b"after"
    assert interrupted >= 2 and not diskwright.check(held).corruptions
    for turn in range(1, 4):
        held.left = turn
        with pytest.raises(KeyboardInterrupt):
            diskwright.open(held)
        held.left = -1
    with diskwright.open(held) as disk:
        assert disk.read_at(0, 5) == b"after"
    for turn in range(1, 4):  # what was begun to be closed is closed, and loses nothing
        disk = diskwright.open(held, writable=True)
        disk.zero(0, SIZE, unmap=True)
        disk.write_at(0, bytes([turn]) * 300_000)
        held.left = turn
        try:
            disk.close()
        except KeyboardInterrupt:
            interrupted += 1
        held.left = -1
        assert disk.closed
        with diskwright.open(held) as again:
            assert again.read_at(299_999, 2) == bytes([turn, 0])
    assert interrupted >= 4 and diskwright.check(held).ok


@pytest.mark.parametrize("most", [1, 2])
def test_every_operation_that_tells_progress_can_be_stopped(most: int) -> None:
    diskwright.convert("a", "b.qcow2", target_format="qcow2")
    options = {"backing_file": "b.qcow2", "backing_fmt": "qcow2"}
    diskwright.create("top", format="qcow2", options=options)
    with diskwright.open("top", writable=True) as disk:
        disk.write_at(0, b"t" * 300_000)
    calls: dict[str, Callable[[Any], Any]] = {
        "check": lambda p: diskwright.check("a", progress=p),
        "plan_repair": lambda p: diskwright.plan_repair("a", progress=p),
        "convert": lambda p: diskwright.convert("a", "c", progress=p),
        "salvage": lambda p: diskwright.salvage("a", "d", progress=p),
        "compare": lambda p: diskwright.compare("a", "b.qcow2", progress=p),
        "digest": lambda p: diskwright.digest("a", progress=p),
        "amend": lambda p: diskwright.amend("a", {"compat": "0.10"}, progress=p),
        "rebase": lambda p: diskwright.rebase("top", None, progress=p),
        "commit": lambda p: diskwright.commit("top", progress=p),
    }
    for name, call in calls.items():
        told: list[diskwright.Progress] = []

        def stop(now: diskwright.Progress, told: Any = told) -> bool:
            told.append(now)
            return len(told) < most

        try:
            call(stop)
        except OperationCancelled:
            assert len(told) == most and not told[-1].finished, name
        else:  # there was nothing to tell in between
            assert most == 2 and [now.finished for now in told] == [False, True], name
    assert diskwright.check("a").ok and not diskwright.check("top").corruptions


def test_cancelling_any_call_leaves_a_disk_that_works() -> None:
    async def work() -> int:
        cancelled = 0
        async with aio.open("a", writable=True) as disk:
            await disk.snapshots.create("kept")
            buffer = bytearray(100_000)
            calls: list[Callable[[], Any]] = [
                lambda: disk.read_at(0, 300_000),
                lambda: disk.readinto_at(0, buffer),
                lambda: disk.write_at(200_000, b"z" * 300_000),
                lambda: disk.zero(0, 200_000, unmap=True),
                lambda: disk.discard(300_000, 300_000),
                disk.flush,
                lambda: disk.resize(disk.size + 65536),
                disk.extents,
                lambda: disk.snapshots.create("other"),
                lambda: disk.snapshots.apply("kept"),
                lambda: disk.snapshots.delete("other"),
                lambda: disk.bitmaps.add("bits", 65536),
                lambda: disk.bitmaps.remove("bits"),
                lambda: aio.convert("b", "c"),
                lambda: aio.check("b"),
                lambda: aio.info("b"),
            ]
            for turns in (0, 1, 2, 4, 7):
                for call in calls:
                    task = asyncio.ensure_future(call())
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    task.cancel()
                    (outcome,) = await asyncio.gather(task, return_exceptions=True)
                    cancelled += isinstance(outcome, asyncio.CancelledError)
                    await disk.write_at(0, b"after")
                    assert await disk.read_at(0, 5) == b"after"
        return cancelled

    diskwright.convert("a", "b", target_format="qcow2")
    assert asyncio.run(work()) > 40
    assert not diskwright.check("a").corruptions and diskwright.check("b").ok


def test_a_close_that_is_cancelled_loses_nothing() -> None:
    async def work(turns: int) -> None:
        disk = await aio.open("a", writable=True)
        await disk.write_at(turns * 100_000, b"kept" * 20_000)
        closing = asyncio.ensure_future(disk.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        if not turns:  # it had not begun
            await disk.close()
        assert disk.closed
        async with aio.open("a", writable=True) as again:
            assert await again.read_at(turns * 100_000, 4) == b"kept"

    for turns in range(8):
        asyncio.run(work(turns))
    assert diskwright.check("a").ok


def test_several_threads_may_close() -> None:
    disk = diskwright.open("a", writable=True)
    disk.write_at(0, b"x" * 500_000)
    problems: list[BaseException] = []

    def close() -> None:
        try:
            disk.close()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and disk.closed


def test_the_file_of_a_disk_on_a_loop_is_for_other_threads() -> None:
    def parse(file: Any) -> bytes:
        with io.BufferedRandom(file) as buffered:
            buffered.write(b"THREAD")
            buffered.seek(7)
            return buffered.read(7)

    async def work() -> None:
        async with aio.open("a", writable=True) as disk:
            file = disk.raw()
            assert file.seek(0, os.SEEK_END) == SIZE and file.seek(0) == 0
            with pytest.raises(UsageError, match="use another"):
                file.read(1)
            assert await asyncio.to_thread(parse, file) == b"content"
            assert await disk.read_at(0, 7) == b"THREADt"
            problems = await asyncio.gather(
                *[asyncio.to_thread(disk.raw().read, 70_000) for _ in range(4)]
            )
            assert {len(data) for data in problems} == {70_000}
        with pytest.raises(NodeClosed):
            disk.raw()

    asyncio.run(work())


def test_many_disks_in_many_threads_have_few_threads_of_ours() -> None:
    most = 0

    def use() -> None:
        nonlocal most
        for _ in range(3):
            with diskwright.open(io.BytesIO(bytes(SIZE)), format="raw", writable=True) as disk:
                disk.write_at(0, b"x" * 300_000)
                names = [thread.name for thread in threading.enumerate()]
                most = max(most, names.count("diskwright"))

    threads = [threading.Thread(target=use) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= 7
