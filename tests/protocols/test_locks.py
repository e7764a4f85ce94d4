"""Locks: the bytes that QEMU's tools use, and what each refuses of the other."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time

import pytest

from diskwright.errors import ImageInUse
from diskwright.protocols.base import PERMISSIONS
from diskwright.protocols.file import FileNode
from diskwright.protocols.locks import ImageLocks

from .support import Watching, using

EVERYTHING = frozenset(PERMISSIONS)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


def locked_bytes(path) -> set[int]:
    """The bytes that anybody holds, from /proc/locks."""
    inode = os.stat(path).st_ino
    found: set[int] = set()
    with open("/proc/locks") as lines:
        for line in lines:
            words = line.split()
            if words[1] == "OFDLCK" and words[5].endswith(f":{inode}"):
                found.update(range(int(words[6]), int(words[7]) + 1))
    return found


@contextlib.contextmanager
def held_by(peer, path, *options, expect):
    """qemu-io with the image open, until the block ends."""
    holder = subprocess.Popen(
        [peer("qemu-io"), *options, "-c", "sleep 30000", str(path)], stdin=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 10
        while locked_bytes(path) != expect:
            assert time.monotonic() < deadline, locked_bytes(path)
            time.sleep(0.01)
        yield
    finally:
        holder.kill()
        holder.wait()


def test_the_bytes(driver, image):
    async def steps():
        node = await FileNode.open(driver, str(image), writable=True)
        assert locked_bytes(image) == {100, 101, 103, 201, 203}
        node.set_permissions({"consistent-read", "write"}, EVERYTHING)
        assert locked_bytes(image) == {100, 101}
        node.set_permissions(set(), {"consistent-read"})
        assert locked_bytes(image) == {201, 202, 203}
        await node.close()
        assert not locked_bytes(image)
        node = await FileNode.open(driver, str(image))
        assert locked_bytes(image) == {100, 201, 203}
        await node.close()
        node = await FileNode.open(driver, str(image), force_share=True)
        assert locked_bytes(image) == {100}
        node.set_permissions({"consistent-read"}, set())
        assert locked_bytes(image) == {100}
        await node.close()
        node = await FileNode.open(driver, str(image), create=True)
        assert locked_bytes(image) == {101, 103, 203}
        await node.close()
        node = await FileNode.open(driver, str(image), writable=True, locking="off")
        assert not locked_bytes(image)
        await node.close()

    driver.run(steps())


def test_two_of_ours(driver, image):
    async def steps():
        reader = await FileNode.open(driver, str(image))
        second = await FileNode.open(driver, str(image))
        with pytest.raises(ImageInUse) as refused:
            await FileNode.open(driver, str(image), writable=True)
        assert (refused.value.permission, refused.value.shared) == ("write", False)
        assert str(refused.value) == (
            f'Failed to get "write" lock\nIs another process using the image [{image}]?'
        )
        assert locked_bytes(image) == {100, 201, 203}  # the refused one left nothing
        await reader.close()
        await second.close()
        writer = await FileNode.open(driver, str(image), writable=True)
        with pytest.raises(ImageInUse) as refused:
            await FileNode.open(driver, str(image))
        assert (refused.value.permission, refused.value.shared) == ("write", True)
        assert 'shared "write"' in str(refused.value)
        with pytest.raises(ImageInUse):
            await FileNode.open(driver, str(image), create=True)
        assert image.stat().st_size == 1 << 20  # nothing is emptied before it is locked
        share = await FileNode.open(driver, str(image), force_share=True)
        await share.close()
        # A change that is refused changes nothing.
        before = locked_bytes(image)
        lax = await FileNode.open(driver, str(image), perms={"consistent-read"}, shared=EVERYTHING)
        with pytest.raises(ImageInUse):
            lax.set_permissions({"consistent-read"}, {"consistent-read"})
        assert lax.locks.held == {100}
        await lax.close()
        assert locked_bytes(image) == before
        await writer.close()

    driver.run(steps())


def test_reopen_keeps_the_lock(driver, image):
    async def steps():
        node = await FileNode.open(driver, str(image))
        node.set_permissions({"consistent-read", "write"}, {"consistent-read"})
        (await node.reopen(writable=True)).keep()
        assert locked_bytes(image) == {100, 101, 201, 202, 203}
        await node.write([0], [b"new"])
        os.rename(image, image.with_name("moved"))  # it is still this file
        (await node.reopen(writable=False, cache="none")).keep()
        assert node.read_only
        assert node.limits.alignment > 1
        assert bytes((await node.read([0], [3]))[0]) == b"new"
        node.set_permissions({"consistent-read"}, EVERYTHING)
        (await node.reopen(writable=True, cache="writeback")).keep()
        assert node.limits.alignment == 1
        await node.write([0], [b"two"])
        assert locked_bytes(image.with_name("moved")) == {100}
        await node.close()
        assert not locked_bytes(image.with_name("moved"))

    driver.run(steps())


def test_where_there_are_no_locks(driver, image):
    class None_(Watching):
        def lock(self, fd, byte, held):
            raise OSError(22, "no")

    async def steps():
        node = await FileNode.open(driver, str(image), writable=True)
        await node.close()
        with pytest.raises(OSError, match="cannot be locked"):
            await FileNode.open(driver, str(image), writable=True, locking="on")

    with using(None_()):
        driver.run(steps())


def test_dropping_gives_all_up(image):
    table = Watching()
    fd = os.open(image, os.O_RDWR)
    locks = ImageLocks(table, fd, "x")
    locks.set({"write"}, {"write"})
    assert locked_bytes(image) == {101, 200, 202, 203}
    locks.drop()
    assert not locked_bytes(image)
    os.close(fd)


class TestWithQemu:
    def test_we_refuse_what_qemu_io_has_open(self, peer, driver, image):
        async def steps():
            # A raw disk open for writing, which qemu-io shares with other writers.
            with held_by(peer, image, "-f", "raw", expect={100, 101}):
                with pytest.raises(ImageInUse) as refused:
                    await FileNode.open(driver, str(image))
                assert (refused.value.permission, refused.value.shared) == ("write", True)
                with pytest.raises(ImageInUse):
                    await FileNode.open(driver, str(image), writable=True)
                node = await FileNode.open(driver, str(image), force_share=True)
                await node.close()
                node = await FileNode.open(
                    driver,
                    str(image),
                    writable=True,
                    perms={"consistent-read", "write"},
                    shared=EVERYTHING,
                )
                await node.close()
            with held_by(peer, image, "-r", "-f", "raw", expect={100}):
                node = await FileNode.open(driver, str(image), writable=True)
                await node.close()

        driver.run(steps())

    def test_we_refuse_a_qcow2_that_qemu_io_has_open(self, peer, driver, image):
        subprocess.run(
            [peer("qemu-img"), "create", "-q", "-f", "qcow2", str(image), "1M"], check=True
        )

        async def steps():
            with held_by(peer, image, "-f", "qcow2", expect={100, 101, 103, 201, 203}):
                with pytest.raises(ImageInUse) as refused:
                    await FileNode.open(driver, str(image), writable=True)
                assert (refused.value.permission, refused.value.shared) == ("write", False)
                with pytest.raises(ImageInUse):
                    await FileNode.open(driver, str(image), create=True)
                node = await FileNode.open(driver, str(image), force_share=True)
                await node.close()

        driver.run(steps())

    def test_qemu_refuses_what_we_have_open(self, peer, driver, image):
        def tool(name, *arguments):
            return subprocess.run([peer(name), *arguments], capture_output=True, text=True)

        async def steps():
            node = await FileNode.open(driver, str(image), writable=True)
            for answer in (
                tool("qemu-io", "-f", "raw", "-c", "length", str(image)),
                tool("qemu-img", "resize", "-f", "raw", str(image), "2M"),
                tool("qemu-img", "create", "-f", "raw", str(image), "2M"),
            ):
                assert answer.returncode == 1
                assert 'Failed to get "write" lock' in answer.stderr
            answer = tool("qemu-img", "convert", "-f", "raw", "-O", "raw", str(image), f"{image}2")
            assert 'Failed to get shared "write" lock' in answer.stderr
            answer = tool("qemu-io", "-U", "-r", "-f", "raw", "-c", "length", str(image))
            assert (answer.returncode, answer.stdout) == (0, "1 MiB\n")
            await node.close()
            node = await FileNode.open(driver, str(image))
            answer = tool("qemu-io", "-f", "raw", "-c", "write 0 512", str(image))
            assert 'Failed to get "write" lock' in answer.stderr
            answer = tool("qemu-io", "-r", "-f", "raw", "-c", "length", str(image))
            assert answer.returncode == 0
            await node.close()
            node = await FileNode.open(driver, str(image), force_share=True)
            answer = tool("qemu-io", "-f", "raw", "-c", "write 0 512", str(image))
            assert answer.returncode == 0, answer.stderr
            await node.close()

        driver.run(steps())
