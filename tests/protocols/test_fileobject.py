"""Disks in what a program has open."""

from __future__ import annotations

import asyncio
import errno
import gzip
import io
import os
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.errors import FlushFailed, Refused, UsageError

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    diskwright.create(path, format="qcow2", size=SIZE)
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(70_000, b"content")
    return path


def test_bytes_in_memory(image: Path, tmp_path: Path) -> None:
    held = io.BytesIO(image.read_bytes())
    with diskwright.open(held, writable=True) as disk:
        assert (disk.format, disk.size, disk.name) == ("qcow2", SIZE, "<BytesIO>")
        assert disk.read_at(70_000, 7) == b"content"
        disk.write_at(500_000, b"more" * 100_000)
    assert not held.closed and diskwright.check(held).leaks == 0
    assert diskwright.info(held).virtual_size == SIZE
    (tmp_path / "b.qcow2").write_bytes(held.getvalue())
    assert diskwright.compare(held, tmp_path / "b.qcow2").equal
    diskwright.convert(held, tmp_path / "c.raw")
    with diskwright.open(tmp_path / "c.raw", format="raw") as disk:
        assert disk.read_at(500_000, 4) == b"more"
    with diskwright.open(io.BytesIO(b"x" * 1536), format="raw", writable=True) as disk:
        disk.resize(4096)
        assert disk.read_at(1000, 3096) == b"x" * 536 + bytes(2560)
        disk.resize(512, shrink=True)
        assert disk.size == 512


def test_an_open_file_and_a_member_of_an_archive(image: Path, tmp_path: Path) -> None:
    with open(image, "rb") as file, diskwright.open(file) as disk:
        assert disk.name == str(image) and disk.read_at(70_000, 7) == b"content"
        with pytest.raises(PermissionError):
            disk.write_at(0, b"x")
    with open(image, "rb") as file, pytest.raises(PermissionError, match="not writable"):
        diskwright.open(file, writable=True)
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(image, "inside.qcow2")
    with (
        zipfile.ZipFile(tmp_path / "z.zip") as archive,
        archive.open("inside.qcow2") as member,
        diskwright.open(member) as disk,
    ):
        assert disk.name == "inside.qcow2" and disk.read_at(70_000, 7) == b"content"


def test_on_asyncio(image: Path) -> None:
    async def work() -> None:
        async with diskwright.aio.open(io.BytesIO(image.read_bytes()), writable=True) as disk:
            await asyncio.gather(*[disk.write_at(i * 999, bytes([i]) * 999) for i in range(200)])
            found = await asyncio.gather(*[disk.read_at(i * 999, 999) for i in range(200)])
            assert found == [bytes([i]) * 999 for i in range(200)]

    asyncio.run(work())


def test_what_such_an_image_names_is_relative_to_nothing(image: Path, tmp_path: Path) -> None:
    options = {"backing_file": "a.qcow2", "backing_fmt": "qcow2"}
    diskwright.create(tmp_path / "top", format="qcow2", options=options)
    with open(tmp_path / "top", "rb") as file:
        with pytest.raises(UsageError, match="base directory"):
            diskwright.open(file, policy="trusted")
        with diskwright.open(file, backing=False) as disk:
            assert disk.size == SIZE
    diskwright.rebase(tmp_path / "top", str(image), backing_format="qcow2", unsafe=True)
    with open(tmp_path / "top", "rb") as file:
        with pytest.raises(Refused):
            diskwright.open(file)
        with diskwright.open(file, policy="trusted") as disk:
            assert disk.read_at(70_000, 7) == b"content"


class Failing(io.BytesIO):
    """Raises what it is told to, once a disk is in it."""

    error: Exception | None = None

    def read(self, *size: Any) -> bytes:
        if self.error is not None:
            raise self.error
        return super().read(*size)

    def flush(self) -> None:
        if self.error is not None:
            raise self.error


def test_errors_of_the_object_are_errors_of_input_and_output() -> None:
    held = Failing(bytes(SIZE))
    disk = diskwright.open(held, format="raw", writable=True)
    disk.write_at(0, b"x")
    held.error = LookupError("the cloud is gone")
    with pytest.raises(OSError, match="the cloud is gone") as caught:
        disk.read_at(0, 1)
    assert caught.value.errno == errno.EIO and caught.value.__cause__ is held.error
    with pytest.raises(OSError, match="gone"):
        disk.flush()
    held.error = None
    with pytest.raises(FlushFailed):
        disk.flush()
    with pytest.raises(FlushFailed):
        disk.close()
    short = io.BytesIO(bytes(SIZE))
    with diskwright.open(short, format="raw") as disk:
        short.truncate(1000)
        with pytest.raises(OSError, match="the file ends at 1000"):
            disk.read_at(0, 2000)


def test_what_is_no_file_of_bytes() -> None:
    with pytest.raises(UsageError, match="binary mode"):
        diskwright.open(io.StringIO("text"), format="raw")  # type: ignore[arg-type]
    for nothing in (None, 7, object()):
        with pytest.raises(TypeError, match="a path, a dict of options or an open file"):
            diskwright.open(nothing)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="which only a program has"):
        diskwright.open('json:{"driver": "raw", "file": {"driver": "file-object", "object": "a"}}')
    read, write = os.pipe()
    with (
        os.fdopen(write, "wb"),
        os.fdopen(read, "rb") as pipe,
        pytest.raises(PermissionError, match="not seekable"),
    ):
        diskwright.open(pipe, format="raw")


class Odd(io.RawIOBase):
    """A file that does no more than it must: short reads and writes, no end told by ``seek``, and
    one caller at a time."""

    def __init__(self, data: bytes) -> None:
        self.held, self.users = io.BytesIO(data), 0

    def _alone(self, call: Any, *arguments: Any) -> Any:
        self.users += 1
        try:
            assert self.users == 1, "two at a time"
            return call(*arguments)
        finally:
            self.users -= 1

    def seek(self, offset: int, whence: int = 0, /) -> Any:
        self._alone(self.held.seek, offset, whence)

    def tell(self) -> int:
        return int(self._alone(self.held.tell))

    def read(self, size: int = -1, /) -> Any:
        return self._alone(self.held.read, min(size, 1000))

    def write(self, data: Any, /) -> Any:
        return self._alone(self.held.write, bytes(data[:700]))

    def truncate(self, size: int | None = None, /) -> Any:
        return self._alone(self.held.truncate, size)

    def readable(self) -> bool:
        return True

    seekable = writable = readable


def test_a_file_that_does_no_more_than_it_must(image: Path) -> None:
    odd = Odd(image.read_bytes())
    with diskwright.open(odd, writable=True) as disk:
        assert disk.name == "<Odd>" and disk.read_at(70_000, 7) == b"content"
        disk.write_at(300_000, b"y" * 200_000)  # the file grows
        disk.zero(400_000, 1000)
        assert disk.read_at(300_000, 100_000) == b"y" * 100_000
    assert diskwright.check(odd).ok
    several = [diskwright.open(odd) for _ in range(3)]  # which take turns
    problems: list[BaseException] = []

    def read(disk: diskwright.Disk) -> None:
        try:
            for _ in range(30):
                assert disk.read_at(300_000, 5000) == b"y" * 5000
                assert disk.read_at(69_999, 8) == b"\0content"
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read, args=(disk,)) for disk in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for disk in several:
        disk.close()
    assert not problems


class Generous(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size) + b"more"


def test_a_file_that_gives_too_much() -> None:
    with pytest.raises(OSError, match="more bytes than were asked for") as caught:
        diskwright.open(Generous(bytes(SIZE)))
    assert caught.value.filename == "<Generous>"


def test_files_of_the_standard_library(image: Path, tmp_path: Path) -> None:
    content = image.read_bytes()
    for make in (tempfile.TemporaryFile, tempfile.SpooledTemporaryFile):
        with make() as file:
            file.write(content)
            with diskwright.open(file, writable=True) as disk:
                disk.write_at(0, b"more" * 50_000)
            assert diskwright.check(file).ok
    with gzip.open(tmp_path / "a.gz", "wb", compresslevel=1) as packed:
        packed.write(content)
    with gzip.open(tmp_path / "a.gz") as packed, diskwright.open(packed) as disk:
        assert disk.read_at(70_000, 7) == b"content"
        assert disk.read_at(0, 4) == bytes(4)
