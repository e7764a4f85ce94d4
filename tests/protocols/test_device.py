"""Block devices, by a loop device over a file."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess

import pytest

from diskwright.contract import MAY_UNMAP, NO_FALLBACK
from diskwright.errors import NotSupported
from diskwright.protocols.file import FileNode

from .support import Watching, using

M = 1 << 20


@contextlib.contextmanager
def loop(path, *options):
    tool = shutil.which("losetup") or "/usr/sbin/losetup"
    try:
        made = subprocess.run(
            [tool, "--find", "--show", *options, str(path)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("losetup is not installed")
    if made.returncode:
        pytest.skip(f"no loop device can be had here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run([tool, "--detach", device], check=True)


@pytest.fixture
def backing(tmp_path):
    path = tmp_path / "backing"
    path.write_bytes(b"x" * (4 * M))
    return path


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_bytes_sizes_and_edges(cache, sector, driver, backing):
    watch = Watching()

    async def steps(device):
        node = await FileNode.open(driver, device, writable=True, cache=cache)
        assert node.driver_name == "host_device"
        assert node.size == 4 * M
        assert (node.device.kind, node.device.sector) == ("device", sector)
        assert node.limits.alignment == (sector if cache == "none" else 1)
        await node.write([4096, 100], [b"a" * 4096, b"b" * 50])
        await node.zero([20000, M + 10], [10000, 100])
        assert watch.calls["zero_device"] == 1  # 100 bytes are below a sector
        got = bytes((await node.read([0], [40000]))[0])
        assert got == (
            b"x" * 100 + b"b" * 50 + b"x" * 3946 + b"a" * 4096 + b"x" * 11808
            + bytes(10000) + b"x" * 10000
        )  # fmt: skip
        assert bytes((await node.read([M], [200]))[0]) == b"x" * 10 + bytes(100) + b"x" * 90
        await node.zero([2 * M], [65536], MAY_UNMAP)
        await node.zero([3 * M], [65536], MAY_UNMAP | NO_FALLBACK)
        assert not any((await node.read([2 * M], [65536]))[0])
        assert not any((await node.read([3 * M], [65536]))[0])
        before = backing.stat().st_blocks
        await node.discard([2 * M + 1, 3 * M], [M - 1, M])
        await node.flush()
        assert watch.calls["discard_device"] >= 1
        assert backing.stat().st_blocks < before
        # The end: reads give zeroes, writes have nowhere to go.
        assert bytes((await node.read([4 * M - 4], [10]))[0])[4:] == bytes(6)
        with pytest.raises(OSError) as error:
            await node.write([4 * M], [b"x" * sector])
        assert error.value.errno in (errno.ENOSPC, errno.EIO, errno.EINVAL)
        assert node.size == 4 * M
        assert [e.length for e in await node.extents(0, 5 * M)][-1] == M
        with pytest.raises(NotSupported, match="Cannot grow device files"):
            await node.truncate(5 * M)
        await node.truncate(3 * M)  # what formats do at their end
        assert node.size == 4 * M
        await node.close()

    with loop(backing, "--sector-size", str(sector)) as device, using(watch):
        driver.run(steps(device))


def test_where_the_device_cannot_zero(driver, backing):
    watch = Watching()
    watch.fail = {"zero_device": errno.EOPNOTSUPP, "discard_device": errno.EOPNOTSUPP}

    async def steps(device):
        node = await FileNode.open(driver, device, writable=True)
        with pytest.raises(OSError) as error:
            await node.zero([0], [65536], NO_FALLBACK)
        assert error.value.errno == errno.ENOTSUP
        await node.zero([10], [65536])
        await node.discard([0], [M])
        assert bytes((await node.read([0], [65556]))[0]) == b"x" * 10 + bytes(65536) + b"x" * 10
        await node.close()

    with loop(backing) as device, using(watch):
        driver.run(steps(device))


def test_a_read_only_device_is_not_written(driver, backing):
    async def steps(device):
        with pytest.raises(OSError) as error:
            await FileNode.open(driver, device, writable=True)
        assert error.value.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        node = await FileNode.open(driver, device, writable=True, auto_read_only=True, perms=())
        with pytest.raises(OSError) as error:
            node.set_permissions({"write"}, ())
        assert error.value.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        await node.close()

    with loop(backing, "--read-only") as device:
        driver.run(steps(device))


def test_a_device_in_use_is_not_written(driver, backing, tmp_path):
    where = tmp_path / "mounted"
    where.mkdir()
    maker = shutil.which("mkfs.ext4") or "/usr/sbin/mkfs.ext4"
    if not os.path.exists(maker):
        pytest.skip("mkfs.ext4 is not installed")
    subprocess.run([maker, "-q", "-F", str(backing)], check=True)

    async def steps(device):
        with pytest.raises(OSError) as error:
            await FileNode.open(driver, device, writable=True)
        assert error.value.errno == errno.EBUSY
        assert f"mounted at '{where}'" in str(error.value)
        node = await FileNode.open(driver, device)
        await node.read([0], [512])
        with pytest.raises(OSError):
            (await node.reopen(writable=True)).keep()
        assert node.read_only
        await node.read([0], [512])
        await node.close()

    async def claim(device):
        node = await FileNode.open(driver, device, writable=True)
        for writable, cache in ((True, "none"), (False, "writeback"), (True, "writeback")):
            (await node.reopen(writable=writable, cache=cache)).keep()
            # While it is ours, nobody mounts it.
            assert subprocess.run(["mount", device, str(where)], capture_output=True).returncode
        await node.write([0], [b"x"])
        await node.close()
        node = await FileNode.open(driver, device)
        (await node.reopen(writable=True)).keep()
        (await node.reopen(writable=True, cache="none")).keep()
        assert subprocess.run(["mount", device, str(where)], capture_output=True).returncode
        await node.close()

    with loop(backing) as device:
        if subprocess.run(["mount", device, str(where)], capture_output=True).returncode:
            pytest.skip("nothing can be mounted here")
        try:
            driver.run(steps(device))
        finally:
            subprocess.run(["umount", str(where)], check=True)
        driver.run(claim(device))
