"""The Python API: synchronous and on asyncio."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diskwright
from diskwright import aio, api
from diskwright.errors import NodeClosed, OperationCancelled, Refused, UsageError

from .tools import shell

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISKWRIGHT_POLICY", raising=False)
    return tmp_path


def test_the_package_offers_the_api() -> None:
    assert diskwright.open is api.open and diskwright.Disk is api.Disk
    assert {"open", "create", "Disk", "__version__"} <= set(dir(diskwright))
    with pytest.raises(AttributeError):
        diskwright.nonsense  # noqa: B018
    for name in diskwright.__all__:
        assert getattr(diskwright, name)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_disk_from_beginning_to_end(format: str, here: Path, peer: Any) -> None:
    path = here / f"disk.{format}"
    assert diskwright.create(path, format=format, size=1 << 20) == 1 << 20
    with diskwright.open(path, format=format, writable=True) as disk:
        assert (disk.size, disk.format, disk.writable) == (1 << 20, format, True)
        assert disk.name == str(path) and repr(disk).startswith("<Disk ")
        disk.write_at(100, b"hello")
        disk.write_at(200, memoryview(bytearray(b"views")), fua=True)
        disk.write_at(300, b"")
        disk.zero(102, 2)
        disk.zero(65536, 65536, unmap=True)
        disk.discard(131072, 65536)
        disk.flush()
        assert disk.read_at(100, 5) == b"he\0\0o"
        assert disk.read_at(5, 0) == b""
        disk.resize(2 << 20)
        assert disk.size == 2 << 20
        with pytest.raises(UsageError, match="shrink"):
            disk.resize(1 << 20)
        disk.resize(1 << 20, shrink=True)
        parts = disk.extents()
        assert parts[0].offset == 0 and sum(part.length for part in parts) == disk.size
    assert disk.closed and repr(disk) == "<closed Disk>"
    disk.close()
    for call in (lambda: disk.read_at(0, 1), disk.flush, lambda: disk.size, disk.__enter__):
        with pytest.raises(NodeClosed):
            call()
    pattern = "read -P 0x68 100 1"
    assert "read 1/1" in shell(here, peer("qemu-io"), "-r", "-f", format, "-c", pattern, str(path))


@pytest.mark.parametrize("bad", [(-1, 1), (0, -1), (0, (1 << 20) + 1), (1 << 20, 1), (1 << 70, 1)])
def test_requests_outside_the_disk(bad: tuple[int, int]) -> None:
    diskwright.create("a", format="raw", size=1 << 20)
    with diskwright.open("a", format="raw", writable=True) as disk:
        for method in (disk.read_at, disk.zero, disk.discard):
            with pytest.raises(UsageError, match="do not lie inside a disk of 1048576 bytes"):
                method(*bad)
        with pytest.raises(UsageError):
            disk.write_at((1 << 20) - 1, b"xx")


def test_a_read_only_disk_takes_no_writes() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    with diskwright.open("a") as disk:
        for call in (
            lambda: disk.write_at(0, b"x"),
            lambda: disk.zero(0, 512),
            lambda: disk.discard(0, 65536),
            lambda: disk.resize(2 << 20),
        ):
            with pytest.raises(PermissionError):
                call()


def test_paths_of_every_kind(here: Path) -> None:
    name = b"\xff.raw"
    diskwright.create(name, format="raw", size=512)
    for source in (name, os.fsdecode(name), here / os.fsdecode(name),
                   {"driver": "raw", "file.filename": os.fsdecode(name)}):  # fmt: skip
        with diskwright.open(source) as disk:
            assert disk.size == 512


def test_threads_take_turns() -> None:
    diskwright.create("a", format="qcow2", size=4 << 20)
    errors: list[BaseException] = []
    with diskwright.open("a", writable=True) as disk:

        def work(i: int) -> None:
            try:
                for j in range(20):
                    at = (i * 20 + j) * 10_000
                    disk.write_at(at, bytes([i + 1]) * 10_000)
                    assert disk.read_at(at, 10_000) == bytes([i + 1]) * 10_000
                    if j % 7 == 0:
                        disk.flush()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_a_forked_child_has_no_disk() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    with diskwright.open("a", writable=True) as disk:
        disk.write_at(0, b"parent")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other tests left threads
            child = os.fork()
        if child == 0:
            code = 1
            try:
                disk.read_at(0, 1)
            except NodeClosed:
                disk.close()  # does nothing, touches nothing
                code = 0 if disk.closed else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        disk.write_at(6, b" lives")
        assert disk.read_at(0, 12) == b"parent lives"
    with diskwright.open("a") as disk:
        assert disk.read_at(0, 12) == b"parent lives"


def test_a_disk_that_was_forgotten_is_not_written_to_but_warned_of() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    disk = diskwright.open("a", writable=True)
    disk.write_at(0, b"kept")
    disk.flush()
    disk.write_at(70_000, b"lost")
    with pytest.warns(ResourceWarning, match="never closed"):
        del disk
    gc.collect()
    with diskwright.open("a", writable=True) as again:
        assert again.read_at(0, 4) == b"kept" and again.read_at(70_000, 4) == bytes(4)
    assert not diskwright.check("a").corruptions


def test_a_disk_as_a_file() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    with diskwright.open("a", writable=True) as disk, disk.raw() as raw:
        assert (raw.readable(), raw.writable(), raw.seekable(), raw.name) == (True,) * 3 + ("a",)
        assert raw.seek(-4, os.SEEK_END) == (1 << 20) - 4 and raw.write(b"the end") == 4
        with pytest.raises(OSError, match="ends here"):
            raw.write(b"x")
        assert raw.read(1) == b"" and raw.seek(-4, 1) and raw.read() == b"the "
        buffered = io.BufferedRandom(raw)
        buffered.seek(1000)
        buffered.write(b"by way of a buffer")
        buffered.flush()
        into = bytearray(6)
        assert disk.readinto_at(1000, into) == 6 and into == b"by way"
        with diskwright.open(disk.raw(), format="raw") as inside:
            assert inside.size == disk.size and inside.read_at(1000, 6) == b"by way"
        assert buffered.detach() is raw
    with diskwright.open("a") as disk, pytest.raises(io.UnsupportedOperation):
        disk.raw().write(b"x")
    with pytest.raises(ValueError, match="closed file"):
        raw.read(1)


def test_maps_and_measures() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    with diskwright.open("a", writable=True) as disk:
        disk.write_at(65536, b"x" * 65536)
        (layer,) = disk.chain
        assert layer == ("a", "qcow2", 1 << 20)
        parts = disk.extents()
    assert diskwright.map("a") == parts and [part.offset for part in parts] == [0, 65536, 131072]
    assert parts[1].host == "a" and parts[1].host_offset and parts[1].data
    done = subprocess.run(
        [sys.executable, "-m", "diskwright", "map", "--output=json", "a"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == [part.to_dict() for part in parts]
    assert diskwright.measure("a").to_dict() == {"required": 1 << 20, "fully-allocated": 1 << 20}
    assert diskwright.measure(size=1 << 30, target_format="qcow2").required < 1 << 20
    with pytest.raises(UsageError, match="a disk or a size"):
        diskwright.measure()
    assert diskwright.check("a").ok and diskwright.info("a").to_dict()["virtual-size"] == 1 << 20


def test_overlays_name_their_base_so_that_both_can_be_moved(here: Path) -> None:
    (here / "farm" / "deep").mkdir(parents=True)
    diskwright.create("farm/base", format="raw", size=1 << 20)
    assert diskwright.overlay("farm/base", "farm/one") == 1 << 20
    assert diskwright.overlay("farm/base", here / "farm/deep/two", size=2 << 20) == 2 << 20
    assert diskwright.info("farm/one").backing_name == "base"
    two = diskwright.info("farm/deep/two")
    assert (two.backing_name, two.backing_format) == (str(here / "farm" / "base"), "raw")
    (here / "farm").rename(here / "moved")
    with diskwright.open("moved/one") as disk:
        assert [layer.format for layer in disk.chain] == ["qcow2", "raw"]
    with pytest.raises(UsageError, match="the base itself"):
        diskwright.overlay("moved/base", "moved/base")


def test_progress_begins_ends_and_stops() -> None:
    diskwright.create("a", format="qcow2", size=4 << 20)
    with diskwright.open("a", writable=True) as disk:
        disk.write_at(0, b"x" * (4 << 20))
    seen: list[diskwright.Progress] = []
    diskwright.convert("a", "b", progress=seen.append)
    assert seen[0] == (0, 0, False) and seen[0].fraction == 0.0
    assert seen[-1] == (4 << 20, 4 << 20, True) and seen[-1].fraction == 1.0 and len(seen) > 2
    for most in (0, 1):
        calls: list[diskwright.Progress] = []

        def stop(now: diskwright.Progress, calls: Any = calls, most: int = most) -> bool:
            calls.append(now)
            return len(calls) <= most

        with pytest.raises(OperationCancelled):
            diskwright.convert("a", "c", progress=stop)
        assert not os.path.exists("c") and not calls[-1].finished


def test_a_program_that_ends_with_open_disks_loses_nothing() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    code = "import diskwright\nd = diskwright.open('a', writable=True)\nd.write_at(0, b'kept')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    with diskwright.open("a") as disk:
        assert disk.read_at(0, 4) == b"kept"


def test_nothing_is_left_open_after_an_error() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    before = (set(os.listdir("/proc/self/fd")), threading.active_count())
    for _ in range(3):
        with pytest.raises(UsageError):
            diskwright.open({"driver": "raw", "file.filename": "a", "nonsense": 1})
        with pytest.raises(OSError):
            diskwright.create("nodir/x", format="raw", size=512)
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


# -- asyncio


def test_asyncio_from_beginning_to_end() -> None:
    async def work() -> None:
        assert await aio.create("a", format="qcow2", size=1 << 20) == 1 << 20
        async with aio.open("a", writable=True) as disk:
            assert (disk.size, disk.format, disk.name) == (1 << 20, "qcow2", "a")
            await asyncio.gather(*[disk.write_at(i * 9000, bytes([i]) * 9000) for i in range(100)])
            found = await asyncio.gather(*[disk.read_at(i * 9000, 9000) for i in range(100)])
            assert found == [bytes([i]) * 9000 for i in range(100)]
            await disk.zero(0, 9000)
            await disk.discard(65536, 65536)
            await disk.flush()
            await disk.resize(2 << 20)
            assert sum(part.length for part in await disk.extents()) == 2 << 20
            with pytest.raises(UsageError):
                await disk.read_at(2 << 20, 1)
        assert disk.closed
        with pytest.raises(NodeClosed):
            await disk.read_at(0, 1)
        disk = await aio.open("a", format="qcow2")
        assert await disk.read_at(9000, 2) == b"\1\1"
        async with disk:
            pass
        assert disk.closed
        await aio.create("b", format="qcow2", options={"backing_file": "a", "backing_fmt": "qcow2"})
        with pytest.raises(Refused):
            await aio.open("b", policy="untrusted")
        async with aio.open("b", policy="trusted") as top:
            assert await top.read_at(9000, 2) == b"\1\1"

    asyncio.run(work())


def test_a_disk_belongs_to_its_loop() -> None:
    diskwright.create("a", format="raw", size=512)

    async def opened() -> aio.Disk:
        return await aio.open("a", format="raw")

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        disk = first.run_until_complete(opened())
        with pytest.raises(UsageError, match="another event loop"):
            second.run_until_complete(disk.flush())
        first.run_until_complete(disk.close())
    finally:
        first.close()
        second.close()


def test_cancelling_leaves_nothing_behind() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)

    async def work() -> None:
        for turns in range(6):
            task = asyncio.ensure_future(_open_only())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            try:
                disk = await task
            except asyncio.CancelledError:
                pass
            else:
                await disk.close()
            async with aio.open("a", writable=True) as again:
                writing = asyncio.ensure_future(again.write_at(0, b"x" * 300_000))
                for _ in range(turns):
                    await asyncio.sleep(0)
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
                await again.write_at(0, b"after")
                assert await again.read_at(0, 5) == b"after"

    async def _open_only() -> aio.Disk:
        return await aio.open("a", writable=True)

    asyncio.run(work())


# -- whole images


def test_operations_on_whole_images(here: Path, peer: Any) -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    with diskwright.open("a", writable=True) as disk:
        disk.write_at(70_000, b"content" * 1000)
    assert diskwright.convert("a", "b.raw") > 0
    shell(here, peer("qemu-img"), "compare", "a", "b.raw")
    assert diskwright.compare("a", "b.raw", other_format="raw").equal
    assert diskwright.check("a").leaks == 0
    found = diskwright.info("a")
    assert (found.format, found.virtual_size, found.filename) == ("qcow2", 1 << 20, "a")
    diskwright.create("top", format="qcow2", options={"backing_file": "a", "backing_fmt": "qcow2"})
    assert [one.filename for one in diskwright.info_chain("top", policy="trusted")] == ["top", "a"]
    with pytest.raises(Refused):
        diskwright.convert("top", "c.raw", policy="untrusted")
    with diskwright.open("top", writable=True, policy="trusted") as disk:
        disk.write_at(0, b"above")
    assert not diskwright.compare("top", "a", policy="trusted").equal
    diskwright.commit("top", policy="trusted")
    with diskwright.open("a") as disk:
        assert disk.read_at(0, 5) == b"above"
    diskwright.rebase("top", None, policy="trusted")
    diskwright.amend("top", {"compat": "0.10", "size": "2M"})
    assert diskwright.info("top").virtual_size == 2 << 20
    with pytest.raises(UsageError):
        diskwright.amend("top", {"cluster_size": 4096})
    with diskwright.open("top") as disk:
        assert disk.read_at(0, 5) == b"above"

    async def work() -> None:
        assert (await aio.info("top")).backing_name is None
        assert (await aio.compare("top", "a")).equal
        with pytest.raises(FileNotFoundError):
            await aio.info("nowhere")

    asyncio.run(work())
    with pytest.raises(FileNotFoundError):
        diskwright.info("nowhere")
    for module in (api, aio):
        with pytest.raises(AttributeError):
            module.nonsense  # noqa: B018


# -- both against a model

SIZE = 300_000
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "read", "flush", "reopen"]),
        st.integers(0, SIZE - 1),
        st.integers(1, 100_000),
        st.integers(1, 255),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(OPERATIONS, st.sampled_from([512, 4096, 65536]), st.booleans())
def test_against_a_model(operations: list[Any], cluster_size: int, overlay: bool) -> None:
    size = SIZE - SIZE % 512
    model = bytearray(size)
    diskwright.create("base", format="qcow2", size=size // 1024 * 512)
    with diskwright.open("base", writable=True) as disk:
        disk.write_at(1000, b"base" * 20_000)
    options: dict[str, Any] = {"cluster_size": cluster_size}
    if overlay:
        options |= {"backing_file": "base", "backing_fmt": "qcow2"}
        model[1000:81_000] = b"base" * 20_000
    diskwright.create("top", format="qcow2", size=size, options=options)
    disk = diskwright.open("top", writable=True, policy="trusted")
    try:
        for verb, offset, length, byte in operations:
            offset = min(offset, size - 1)
            length = min(length, size - offset)
            if verb == "write":
                disk.write_at(offset, bytes([byte]) * length)
                model[offset : offset + length] = bytes([byte]) * length
            elif verb == "zero":
                disk.zero(offset, length, unmap=byte % 2 == 0)
                model[offset : offset + length] = bytes(length)
            elif verb == "read":
                assert disk.read_at(offset, length) == model[offset : offset + length]
            elif verb == "flush":
                disk.flush()
            else:
                disk.close()
                disk = diskwright.open("top", writable=True, policy="trusted")
        assert disk.read_at(0, size) == model
        for part in disk.extents():
            if part.zero:
                assert not any(model[part.offset : part.offset + part.length])
    finally:
        disk.close()
