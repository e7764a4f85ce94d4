"""A node as a file, and the way from a binding's threads to it, without a binding."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from diskwright.engine.kernel import Driver, Future, gather
from diskwright.errors import CorruptImage, NotSupported, UsageError
from diskwright.export import fuse_mount
from diskwright.export.fuse import KEEP_SIZE, PUNCH_HOLE, SEEK_DATA, SEEK_HOLE, ZERO_RANGE, DiskFile
from diskwright.graph.opener import close_disk, create_image, open_disk

MIB = 1 << 20
Work = Callable[[DiskFile], Coroutine[Any, Any, None]]


def on_disk(path: Path, work: Work, writable: bool = True, growable: bool = False) -> None:
    """Do ``work`` with the file of a disk of 1 MiB in qcow2, made anew unless it is there."""
    driver = Driver()

    async def run() -> None:
        name = str(path / "disk.qcow2")
        if not (path / "disk.qcow2").exists():
            await create_image(driver, name, "qcow2", MIB)
        node = await open_disk(driver, name, writable=writable, resize=growable)
        try:
            await work(DiskFile(node, writable=writable, growable=growable))
        finally:
            await close_disk(node)

    try:
        driver.run(run())
    finally:
        driver.close()


async def fails(number: int, request: Coroutine[Any, Any, Any]) -> None:
    with pytest.raises(OSError) as caught:
        await request
    assert caught.value.errno == number


async def content(file: DiskFile, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: await file.read(offset, memoryview(buffer))])


def data(byte: int, length: int) -> memoryview:
    return memoryview(bytes([byte]) * length)


def test_a_fixed_length(tmp_path: Path) -> None:
    async def work(file: DiskFile) -> None:
        assert await file.write(MIB - 10, data(7, 100)) == 10
        assert await content(file, MIB - 12, 100) == bytes(2) + b"\7" * 10
        assert await content(file, MIB, 10) == b""
        await fails(errno.ENOSPC, file.write(MIB, data(7, 1)))
        assert await file.write(MIB, data(7, 0)) == 0
        await file.truncate(MIB)
        for size in (0, MIB + 1):
            await fails(errno.EPERM, file.truncate(size))
        await fails(errno.ENOSPC, file.allocate(0, 0, MIB + 1))
        await fails(errno.ENOSPC, file.allocate(ZERO_RANGE, 0, MIB + 1))
        assert (await file.attributes())["st_size"] == file.space()["f_blocks"] * 4096 == MIB

    on_disk(tmp_path, work)


def test_a_growable_one(tmp_path: Path) -> None:
    async def work(file: DiskFile) -> None:
        driver = file.node.driver
        await gather(driver, [file.write(i * MIB, data(i, MIB)) for i in (3, 1, 2)])
        assert file.node.size == 4 * MIB
        for i in (1, 2, 3):
            assert await content(file, i * MIB, MIB) == bytes([i]) * MIB
        await file.truncate(2 * MIB + 512)
        await file.allocate(0, 0, 3 * MIB)
        assert await content(file, 2 * MIB, MIB + 9) == b"\2" * 512 + bytes(MIB - 512)
        await file.allocate(ZERO_RANGE, 3 * MIB - 1, MIB)
        assert file.node.size == 4 * MIB  # qcow2 has whole sectors
        await fails(errno.EINVAL, file.truncate(MIB + 1))
        await fails(errno.EFBIG, file.truncate(1 << 63))

    on_disk(tmp_path, work, growable=True)


def test_only_for_reading(tmp_path: Path) -> None:
    on_disk(tmp_path, lambda file: file.flush())

    async def work(file: DiskFile) -> None:
        requests = [file.write(0, data(1, 1)), file.truncate(0), file.allocate(0, 0, 1)]
        for request in [*requests, file.permit(0o666)]:
            await fails(errno.EROFS, request)
        await file.flush()
        await file.permit(0o444)
        assert (await file.attributes())["st_mode"] == 0o100444

    on_disk(tmp_path, work, writable=False, growable=True)


def test_holes(tmp_path: Path) -> None:
    async def work(file: DiskFile) -> None:
        await fails(errno.ENXIO, file.seek(0, SEEK_DATA))
        await file.write(64 << 10, data(1, 256 << 10))
        assert await file.seek(0, SEEK_DATA) == 64 << 10
        assert await file.seek(0, SEEK_HOLE) == 0
        assert await file.seek(65 << 10, SEEK_DATA) == 65 << 10
        assert await file.seek(65 << 10, SEEK_HOLE) == 320 << 10
        for offset in (-1, MIB):
            await fails(errno.ENXIO, file.seek(offset, SEEK_HOLE))
        await fails(errno.EINVAL, file.seek(0, 0))
        # Not of whole clusters: all of it must read as zeroes nevertheless.
        await file.allocate(PUNCH_HOLE | KEEP_SIZE, 100 << 10, 100 << 10)
        await file.allocate(ZERO_RANGE | KEEP_SIZE, 319 << 10, MIB)
        expected = bytes(100 << 10) + b"\1" * (119 << 10) + bytes(1 << 10)
        assert await content(file, 100 << 10, 220 << 10) == expected
        assert await file.seek(100 << 10, SEEK_HOLE) == 128 << 10
        for mode in (PUNCH_HOLE, KEEP_SIZE, 0x08, 0x20, 0x40 | KEEP_SIZE):
            await fails(errno.EOPNOTSUPP, file.allocate(mode, 0, 4096))
        await fails(errno.EOPNOTSUPP, file.allocate(0, 0, 4096))

    on_disk(tmp_path, work)


def test_the_last_data_ends_with_the_disk(tmp_path: Path) -> None:
    async def work(file: DiskFile) -> None:
        await file.write(0, data(1, MIB))
        assert await file.seek(0, SEEK_HOLE) == MIB

    on_disk(tmp_path, work)


def test_closing_waits_for_what_was_begun(tmp_path: Path) -> None:
    async def work(file: DiskFile) -> None:
        driver = file.node.driver
        write = driver.spawn(file.write(0, data(1, 64 << 10)))
        await driver.turn()
        await file.close()
        assert write.done and write.value == 64 << 10
        await fails(errno.ENOTCONN, file.attributes())
        await fails(errno.ENOTCONN, file.flush())

    on_disk(tmp_path, work)


class Binding:
    """Calls the operations as mfusepy does, in its own thread, until it is unmounted."""

    unmounted = threading.Event()
    script: Callable[[Any], None]

    def __init__(self, operations: Any, mountpoint: str, **options: Any) -> None:
        if options.get("fsname") != "diskwright" or "nothing" in mountpoint:
            raise RuntimeError(1)
        operations.init("/")
        type(self).script(operations)
        assert self.unmounted.wait(10)


def test_requests_of_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    Binding.unmounted.clear()
    over: Future[None] = Future()

    def refused(request: Callable[..., Any], *arguments: Any) -> None:
        with pytest.raises(OSError) as caught:
            request(*arguments)
        found.append(caught.value.errno)

    damage = CorruptImage("it is")

    async def broken() -> None:
        raise damage

    async def work(file: DiskFile) -> None:
        driver = file.node.driver

        def script(operations: Any) -> None:
            found.append(operations.write(0, data(5, 4096)))
            buffer = bytearray(9)
            found.append(operations.read(4090, memoryview(buffer)))
            found.append(bytes(buffer))
            refused(operations.truncate, "/", 3)
            refused(operations.getattr, "/other")
            operations.fsync("/", 0, None)
            file.flush = broken  # type: ignore[method-assign]
            refused(operations.fsync, "/", 0, None)
            driver.from_thread(over.set)

        Binding.script = staticmethod(script)
        (tmp_path / "file").touch()
        mount = fuse_mount.Mount(driver, file, str(tmp_path / "file"))
        mount.on_error = found.append
        await mount.start()
        await over  # all that the driver waits for is the binding's thread
        await mount.stop()
        assert mount.ended.done and not driver.visitors

    monkeypatch.setattr(fuse_mount, "_binding", lambda: Binding)
    monkeypatch.setattr(fuse_mount, "_own_folder", lambda: None)
    monkeypatch.setattr(fuse_mount, "unmount", lambda path: Binding.unmounted.set())
    on_disk(tmp_path, work)
    refusals = [errno.EPERM, errno.ENOENT, damage, errno.EIO]
    assert found == [4096, 9, b"\5" * 6 + bytes(3), *refusals]


def test_what_cannot_be_mounted_over(tmp_path: Path) -> None:
    async def work(file: DiskFile) -> None:
        driver = file.node.driver
        for name, message in (
            ("missing", r"Failed to stat '.*missing': No such file"),
            ("", "is not a regular file"),
        ):
            with pytest.raises(UsageError, match=message):
                await fuse_mount.Mount(driver, file, str(tmp_path / name)).start()

    on_disk(tmp_path, work)


def test_the_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mfusepy", None)
    fuse_mount._binding.cache_clear()
    with pytest.raises(NotSupported, match=r"diskwright\[fuse\]"):
        fuse_mount._binding()
