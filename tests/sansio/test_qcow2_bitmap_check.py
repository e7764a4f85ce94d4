"""A check counts what persistent dirty bitmaps refer to."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from diskwright.formats import qcow2
from sansio import oracle
from sansio.machine import Machine

EXTENSION = struct.pack(">II", 0x23852875, 24)


@pytest.fixture
def image(tmp_path: Path) -> bytearray:
    """Two bitmaps, one of them with bits."""
    path = str(tmp_path / "image.qcow2")
    oracle.ok("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "64M")
    oracle.ok("qemu-img", "bitmap", "--add", "-g", "512", path, "one")
    oracle.ok("qemu-img", "bitmap", "--add", path, "other")
    oracle.ok("qemu-io", "-c", "write 3M 64k", "-c", "write 40M 1k", path)
    return bytearray(Path(path).read_bytes())


def directory(file: bytes) -> int:
    """Where the bitmap directory begins."""
    at = file.find(EXTENSION)
    found: int = struct.unpack_from(">Q", file, at + 24)[0]
    return found


def check(file: bytes, *uncovered: str) -> tuple[list[str], int, int]:
    machine = Machine(bytes(file))
    machine.open(qcow2.DRIVER, check=True)
    result = machine.run(machine.format.check())
    assert result.uncovered == list(uncovered)
    return result.findings, result.corruptions, result.leaks


def table(file: bytes) -> int:
    found: int = struct.unpack_from(">Q", file, directory(file))[0]
    return found


@oracle.needs_qemu
def test_bitmaps_are_covered(image: bytearray) -> None:
    assert check(image) == ([], 0, 0)


@oracle.needs_qemu
def test_without_the_autoclear_bit_their_clusters_are_leaked(image: bytearray) -> None:
    image[88:96] = bytes(8)
    findings, corruptions, leaks = check(image)
    assert corruptions == 0 and leaks == len(findings) >= 5


@oracle.needs_qemu
@pytest.mark.parametrize("entry", [2, 1 << 63, 512, (1 << 50) | 1])
def test_entries_that_mean_nothing_are_corruptions(image: bytearray, entry: int) -> None:
    struct.pack_into(">Q", image, table(image), entry)
    findings, corruptions, _ = check(image)
    assert corruptions == 1
    assert "bitmap 'one' table entry 0 is invalid" in findings[0]


@oracle.needs_qemu
def test_an_entry_outside_the_file(image: bytearray) -> None:
    struct.pack_into(">Q", image, table(image), 1 << 40)
    findings, corruptions, _ = check(image)
    assert corruptions == 1 and "exceeding the end of the file" in findings[0]


@oracle.needs_qemu
@pytest.mark.parametrize(("at", "value"), [(4, 1), (8, 1 << 24), (17, 200 << 24), (18, 0)])
def test_a_directory_that_means_nothing(image: bytearray, at: int, value: int) -> None:
    struct.pack_into(">I", image, directory(image) + at, value)
    # Of what such a directory names nothing may be freed.
    findings, corruptions, leaks = check(image, "persistent dirty bitmaps")
    assert corruptions >= 1 and leaks == 0
    assert findings[0].startswith("ERROR bitmap directory")


@oracle.needs_qemu
@pytest.mark.parametrize(
    ("at", "data"),
    [
        (8, struct.pack(">I", 0)),
        (8, struct.pack(">I", 70000)),
        (8, struct.pack(">I", 3)),
        (12, b"\1"),
        (16, struct.pack(">Q", 1 << 40)),
        (16, struct.pack(">Q", 24)),
        (24, struct.pack(">Q", 513)),
        (24, struct.pack(">Q", 1 << 60)),
        (24, bytes(8)),
    ],
)
def test_an_extension_that_means_nothing(image: bytearray, at: int, data: bytes) -> None:
    start = image.find(EXTENSION) + at
    image[start : start + len(data)] = data
    findings, corruptions, _ = check(image, "persistent dirty bitmaps")
    assert corruptions >= 1 and findings[0].startswith("ERROR bitmap directory")
