"""Files of fsspec opened as disks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

import diskwright

SIZE = 1 << 20


class RemoteFile(AbstractBufferedFile):  # type: ignore[misc]
    """As of an object store: ranges are fetched, and cached as ``cache_type`` says."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        Remote.fetched.append((start, end))
        return Remote.files[self.path][start:end]


class Remote(AbstractFileSystem):  # type: ignore[misc]
    protocol = "remote"
    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[tuple[int, int]]] = []

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        return {"name": path, "type": "file", "size": len(self.files[path])}

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> RemoteFile:
        return RemoteFile(self, path, mode, **kwargs)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "a.qcow2"
    diskwright.create(path, format="qcow2", size=SIZE)
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(70_000, b"content")
        disk.write_at(500_000, bytes(range(256)) * 1000)
    fsspec.register_implementation("remote", Remote, clobber=True)
    Remote.files["a.qcow2"] = path.read_bytes()
    Remote.fetched.clear()
    yield path
    Remote.files.clear()


def test_local_files(image: Path) -> None:
    with fsspec.open(f"file://{image}") as file, diskwright.open(file) as disk:
        assert disk.name == str(image) and disk.read_at(70_000, 7) == b"content"
        with pytest.raises(PermissionError):
            disk.write_at(0, b"x")
    with fsspec.open(str(image), "r+b") as file, diskwright.open(file, writable=True) as disk:
        disk.write_at(0, b"local" * 20_000)
    with diskwright.open(image) as disk:
        assert disk.read_at(0, 5) == b"local"


def test_files_in_memory_grow(image: Path) -> None:
    memory = MemoryFileSystem()
    memory.pipe("/a.qcow2", image.read_bytes())
    try:
        with memory.open("/a.qcow2", "r+b") as file:
            with diskwright.open(file, writable=True) as disk:
                assert disk.name == "/a.qcow2"
                disk.write_at(0, b"memory" * 50_000)
            assert diskwright.check(file).ok
        assert memory.size("/a.qcow2") > image.stat().st_size
        with fsspec.open("filecache::memory://a.qcow2") as file, diskwright.open(file) as disk:
            assert disk.read_at(0, 6) == b"memory"
    finally:
        memory.rm("/a.qcow2")


@pytest.mark.parametrize("cache", ["readahead", "none", "bytes", "blockcache"])
def test_remote_files(cache: str, image: Path) -> None:
    with Remote().open("a.qcow2", cache_type=cache, block_size=4096) as file:
        with diskwright.open(file) as disk:
            assert disk.name == "remote://a.qcow2"
            assert disk.read_at(70_000, 7) == b"content"
            assert disk.read_at(500_003, 1000) == (bytes(range(256)) * 5)[3:1003]
            if cache == "none":  # nothing but the tables and the data
                assert sum(end - start for start, end in Remote.fetched) < 250_000
        assert diskwright.compare(file, image).equal


def test_cached_files(image: Path) -> None:
    with (
        fsspec.open("simplecache::remote://a.qcow2") as file,
        diskwright.open(file) as disk,
    ):
        assert disk.read_at(70_000, 7) == b"content"


def test_errors_name_the_file(image: Path) -> None:
    with Remote().open("a.qcow2", cache_type="none") as file, diskwright.open(file) as disk:
        Remote.files["a.qcow2"] = b""
        with pytest.raises(OSError, match="the file ends") as caught:
            disk.read_at(500_000, 1000)
        assert caught.value.filename == "remote://a.qcow2"
        del Remote.files["a.qcow2"]
        with pytest.raises(OSError) as caught:
            disk.read_at(600_000, 1000)
        assert caught.value.filename == "remote://a.qcow2"
        assert isinstance(caught.value.__cause__, KeyError)


def test_what_is_not_open_yet(image: Path) -> None:
    for url in (f"file://{image}", "remote://a.qcow2"):
        with pytest.raises(TypeError, match="open it"):
            diskwright.open(fsspec.open(url))
