"""The fsspec file system ``diskwright://``."""

from __future__ import annotations

import io
import json
import os
import pickle
import pkgutil
import subprocess
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import diskwright
from diskwright.errors import Refused
from diskwright.fs import DiskFileSystem

SIZE = 4 << 20
TABLE = b"name,number\nfirst,1\nsecond,2\n"


@pytest.fixture(autouse=True)
def registered() -> None:
    """As the entry point does where the package is installed."""
    fsspec.register_implementation("diskwright", DiskFileSystem, clobber=True)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.qcow2"
    diskwright.create(path, format="qcow2", size=SIZE)
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(0, TABLE)
    return path


@pytest.fixture
def memory(image: Path) -> Any:
    """The image on a file system of which we know nothing."""
    found = MemoryFileSystem()
    found.pipe("/images/disk.qcow2", image.read_bytes())
    yield found
    found.rm("/images", recursive=True)


def test_fsspec_finds_it() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"]["fsspec.specs"]
    for protocol, value in points.items():
        assert DiskFileSystem.protocol == protocol
        assert pkgutil.resolve_name(value) is DiskFileSystem


def test_an_image_is_its_disk(image: Path) -> None:
    with fsspec.open(f"diskwright://{image}") as file:
        assert file.read(len(TABLE)) == TABLE
        assert file.seek(0, os.SEEK_END) == file.size == SIZE
        assert file.full_name == f"diskwright://{image}"
    with fsspec.open(f"diskwright://{image}", "rt", newline="") as text:
        assert text.readline() == "name,number\n"
    fs = fsspec.filesystem("diskwright")
    assert fs.info("disk.qcow2") == {
        "name": str(image), "type": "file", "size": SIZE, "format": "qcow2"
    }  # fmt: skip
    image.with_name("other").mkdir()
    image.with_name("damaged.qcow2").write_bytes(b"QFI\xfb\0\0\0\x09")
    assert {Path(entry["name"]).name: entry["size"] for entry in fs.ls(image.parent)} == {
        "disk.qcow2": SIZE, "damaged.qcow2": None, "other": 0
    } | {"other": image.with_name("other").stat().st_size}  # fmt: skip
    assert fs.glob(f"{image.parent}/*.qcow2") == sorted(map(str, image.parent.glob("*.qcow2")))
    for path in ("none", "damaged.qcow2"):
        with pytest.raises((FileNotFoundError, diskwright.errors.DiskError)):
            fs.info(path)


def test_an_image_is_a_folder(image: Path) -> None:
    fs = fsspec.filesystem("diskwright", fo=str(image))
    assert fs.ls("") == [{"name": "disk.raw", "type": "file", "size": SIZE}] == fs.ls("disk.raw")
    assert (fs.size("disk.raw"), fs.isdir(""), fs.isfile("disk.raw")) == (SIZE, True, True)
    assert fs.cat_file("disk.raw", 5, 11) == TABLE[5:11]
    assert fs.cat_file("disk.raw", -4) == bytes(4) and fs.exists("/disk.raw")
    assert fs.cat_ranges(["disk.raw"] * 2, [0, 12], [4, 17]) == [TABLE[:4], TABLE[12:17]]
    assert fs.find("") == ["disk.raw"] and fs.head("disk.raw", 4) == TABLE[:4]
    fs.get("disk.raw", "copied")
    assert Path("copied").read_bytes() == TABLE.ljust(SIZE, b"\0")
    for path in ("part1", "snapshots", "disk.raw/x", "x/disk.raw", "snapshots/x/disk.raw"):
        assert not fs.exists(path), path
        with pytest.raises(FileNotFoundError):
            fs.open(path)
    with pytest.raises(IsADirectoryError, match=r"disk\.raw"):
        fs.open("")
    with fsspec.open(f"diskwright://disk.raw::file://{image}") as file:
        assert file.read(4) == TABLE[:4]
    key = fs.ukey("disk.raw")
    with diskwright.open(image, writable=True) as disk:
        disk.write_at(0, b"changed")
    assert fs.ukey("disk.raw") != key


def test_partitions(image: Path, peer: Callable[[str], str]) -> None:
    raw = image.with_name("parted.raw")
    with raw.open("wb") as file:
        file.truncate(SIZE)
    script = 'label: gpt\nstart=2048,size=1024,name="data"\n'
    subprocess.run([peer("sfdisk"), "-q", raw], input=script.encode(), check=True)
    with diskwright.open(raw, format="raw", writable=True) as disk:
        disk.write_at(2048 * 512, TABLE)
    diskwright.convert(raw, "parted.qcow2", format="raw", target_format="qcow2")
    with fsspec.open("diskwright://part1::parted.qcow2") as file:
        assert file.size == 1024 * 512 and file.readline() == b"name,number\n"
        assert file.seek(-3, os.SEEK_END) and file.read() == bytes(3)
    fs = fsspec.filesystem("diskwright", fo="parted.qcow2")
    assert fs.ls("", detail=False) == ["disk.raw", "part1"]
    assert fs.info("part1") == {
        "name": "part1", "type": "file", "size": 1024 * 512, "offset": 2048 * 512, "label": "data",
        "partition_type": "0fc63daf-8483-4772-8e79-3d69d8477de4",
    }  # fmt: skip
    with pytest.raises(OSError, match="ends here"), fs.open("part1", "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"longer")
    with fs.open("part1", "r+b") as file:
        file.write(b"NAME")
    with diskwright.open("parted.qcow2") as disk:
        assert disk.read_at(2048 * 512, 6) == b"NAME,n"
        assert disk.read_at(3072 * 512, 4) == bytes(4)


def test_snapshots(image: Path) -> None:
    with diskwright.open(image, writable=True) as disk:
        for name in ("before", "../up", "..", "before"):
            disk.snapshots.create(name)
        disk.write_at(0, b"after")
    fs = fsspec.filesystem("diskwright", fo=str(image))
    folders = ["snapshots/before", "snapshots/..%2Fup", "snapshots/%2E%2E", "snapshots/before~4"]
    assert fs.ls("snapshots", detail=False) == folders
    for folder in folders:
        assert fs.cat_file(f"{folder}/disk.raw", 0, 5) == TABLE[:5]
    assert fs.cat_file("disk.raw", 0, 5) == b"after" and len(fs.find("")) == 5
    fs.get("snapshots", "all", recursive=True)
    assert sorted(os.listdir("all")) == ["%2E%2E", "..%2Fup", "before", "before~4"]
    with pytest.raises(io.UnsupportedOperation, match="not written"):
        fs.open("snapshots/before/disk.raw", "r+b")


def test_images_on_other_file_systems(memory: Any, image: Path) -> None:
    url = "diskwright://disk.raw::memory://images/disk.qcow2"
    with fsspec.open(url) as file:
        assert file.read(4) == TABLE[:4] and "images/disk.qcow2" in file.name
    with fsspec.open(url, "r+b") as file:
        file.write(b"more")
    with fsspec.open(url.replace("::", "::simplecache::", 1)) as file:
        assert file.read(4) == b"more"
    assert fsspec.filesystem(
        "diskwright", fo="/images/disk.qcow2", target_protocol="memory"
    ).cat_file("disk.raw", 0, 4) == b"more"  # fmt: skip
    over = fsspec.filesystem("diskwright", target_protocol="memory")
    assert over.size("/images/disk.qcow2") == SIZE and over.cat_file("/images/disk.qcow2", 0, 4)
    held = fsspec.filesystem("diskwright", fo=io.BytesIO(image.read_bytes()))
    assert held.cat_file("disk.raw", 0, 4) == TABLE[:4] and held.ukey("disk.raw")
    # A disk in a disk.
    diskwright.convert(image, "outer.qcow2", format="raw", target_format="qcow2")
    inner = "diskwright://disk.raw::diskwright://disk.raw::outer.qcow2"
    with fsspec.open(inner) as file:
        assert file.read(4) == TABLE[:4]


def test_only_what_is_there_is_changed(image: Path) -> None:
    fs = fsspec.filesystem("diskwright")
    with fs.open(image, "r+b") as file:
        assert file.read(4) == TABLE[:4]
        file.seek(0)
        file.write(b"CHANGED")
        file.flush()
    with fs.open(image) as file, pytest.raises(io.UnsupportedOperation):
        file.write(b"x")
    for mode in ("wb", "ab", "xb", "w+b"):
        with pytest.raises(io.UnsupportedOperation, match=r"r\+b"):
            fs.open(image, mode)
    with diskwright.open(image) as disk:
        assert disk.read_at(0, 8) == b"CHANGEDm"
    assert diskwright.check(image).ok


def test_a_file_holds_its_disk_and_nothing_else_does(image: Path) -> None:
    fs = fsspec.filesystem("diskwright", fo=str(image))
    before = len(os.listdir("/proc/self/fd"))
    with fs.open("disk.raw") as file:
        with pytest.raises(diskwright.errors.ImageInUse):
            diskwright.open(image, writable=True)
        assert file.read(1)
    fs.ls("")
    with diskwright.open(image, writable=True):
        pass
    file = fs.open("disk.raw", "r+b")
    file.write(b"lost")  # what is dropped is not written
    with pytest.warns(ResourceWarning, match="never closed"):
        del file
    assert fs.cat_file("disk.raw", 0, 4) == TABLE[:4]
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_and_pickles(image: Path, memory: Any) -> None:
    for fs in (
        fsspec.filesystem("diskwright", fo=str(image), format="qcow2"),
        fsspec.filesystem("diskwright", fo="memory://images/disk.qcow2"),
    ):
        again = pickle.loads(pickle.dumps(fs))
        assert again == fs and again.cat_file("disk.raw", 0, 4) == TABLE[:4]
        assert fsspec.AbstractFileSystem.from_json(fs.to_json()) == fs
        problems: list[BaseException] = []
        whole = TABLE + bytes(2)

        def read(fs: Any = fs, whole: bytes = whole, problems: Any = problems) -> None:
            try:
                with fs.open("disk.raw") as file:
                    for offset in range(0, len(TABLE), 3):
                        file.seek(offset + SIZE // 2)
                        assert file.read(3) == bytes(3)
                        assert fs.cat_file("disk.raw", offset, offset + 3) == whole[offset:][:3]
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        with fs.open("disk.raw") as file:
            file.seek(5)
            with pickle.loads(pickle.dumps(file)) as other:
                assert other.read(6) == file.read(6) == TABLE[5:11]


def test_policies_hold(image: Path) -> None:
    diskwright.overlay(image, "top.qcow2")
    assert fsspec.filesystem("diskwright", fo="top.qcow2").cat_file("disk.raw", 0, 4) == TABLE[:4]
    strict = fsspec.filesystem("diskwright", fo="top.qcow2", policy="untrusted")
    with pytest.raises(Refused):
        strict.open("disk.raw")
    with fsspec.open("diskwright://disk.raw::top.qcow2", backing=False) as file:
        assert file.read(4) == bytes(4)
    assert json.loads(strict.to_json())["policy"] == "untrusted"
    with pytest.raises(TypeError, match="no option 'polcy'"):
        fsspec.filesystem("diskwright", fo="top.qcow2", polcy="untrusted")
