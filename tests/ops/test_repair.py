"""``check -r``: what it prints, how it ends, and who is refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import diskwright
from cli.support import Result, ours
from diskwright.contract import Procedure
from diskwright.errors import NotSupported, UsageError
from diskwright.formats.qcow2.check import checking
from diskwright.formats.qcow2.image import Image
from ops.tools import FLAWED, known

REPAIRED = """\
The following inconsistencies were found and repaired:

    {} leaked clusters
    {} corruptions

Double checking the fixed image now...
"""
CLEAN = "No errors were found on the image.\n"


@pytest.fixture(autouse=True)
def flawed() -> Iterator[None]:
    with known(FLAWED):
        yield


def made(folder: Path, leaks: int, wrong: int, lost: int = 0) -> Path:
    path = folder / "a"
    path.write_bytes(bytes([leaks, wrong, lost]).ljust(512, b"\0"))
    return path


def check(folder: Path, *words: str) -> Result:
    return ours("check", "-f", "flawed", *words, "a", cwd=folder)


def test_leaks(tmp_path: Path) -> None:
    path = made(tmp_path, 3, 0)
    assert check(tmp_path).status == 3
    assert path.read_bytes()[0] == 3
    done = check(tmp_path, "-r", "leaks")
    assert (done.status, done.out.decode()) == (0, REPAIRED.format(3, 0) + CLEAN)
    assert done.err == b"Repairing leaks\n"
    assert path.read_bytes()[0] == 0


def test_leaks_alone_leave_corruptions(tmp_path: Path) -> None:
    made(tmp_path, 3, 2)
    done = check(tmp_path, "-r", "leaks")
    assert done.status == 2
    assert done.out.decode().startswith(REPAIRED.format(3, 0) + "\n2 errors were found")


def test_all(tmp_path: Path) -> None:
    made(tmp_path, 3, 2)
    done = check(tmp_path, "--repair=all", "--output", "json")
    assert done.status == 0
    assert json.loads(done.out) == {
        "corruptions-fixed": 2,
        "check-errors": 0,
        "leaks-fixed": 3,
        "filename": "a",
        "format": "flawed",
    }


def test_nothing_to_repair(tmp_path: Path) -> None:
    made(tmp_path, 0, 0)
    done = check(tmp_path, "-r", "all")
    assert (done.status, done.out.decode(), done.err) == (0, CLEAN, b"")


def test_what_cannot_be_repaired(tmp_path: Path) -> None:
    made(tmp_path, 0, 1, 1)
    done = check(tmp_path, "-r", "all", "--output=json")
    assert done.status == 2
    told = json.loads(done.out)
    assert (told["corruptions"], told["corruptions-fixed"]) == (1, 1)


def test_quiet(tmp_path: Path) -> None:
    made(tmp_path, 1, 0)
    done = check(tmp_path, "-q", "-r", "all")
    assert (done.status, done.out) == (0, b"")


def only_check(image: Image) -> Procedure:
    """A check that does not take what to mend."""
    return checking.check(image)


def test_a_format_that_cannot_repair_is_not_opened_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "check", only_check)
    assert ours("create", "-f", "qcow2", "a", "1M", cwd=tmp_path).status == 0
    (tmp_path / "a").chmod(0o400)
    before = (tmp_path / "a").stat()
    done = ours("check", "-r", "all", "a", cwd=tmp_path)
    assert done.status == 1
    assert b"Repairing images (--repair) is not supported for the format 'qcow2'" in done.err
    assert (tmp_path / "a").stat().st_mtime_ns == before.st_mtime_ns
    (tmp_path / "b").write_bytes(bytes(512))
    done = ours("check", "-f", "raw", "-r", "all", "b", cwd=tmp_path)
    assert (done.status, done.err) == (63, b"qemu-img: This image format does not support checks\n")


def test_a_shared_image_is_not_repaired(tmp_path: Path) -> None:
    path = made(tmp_path, 1, 0)
    done = check(tmp_path, "-U", "-r", "all")
    assert done.status == 1
    assert b"force-share=on can only be used with read-only images" in done.err
    assert path.read_bytes()[0] == 1


def test_words(tmp_path: Path) -> None:
    made(tmp_path, 1, 0)
    done = check(tmp_path, "-r", "some")
    assert done.status == 1
    assert done.err.startswith(b"qemu-img: --repair (-r) expects 'leaks' or 'all' not 'some'\n")


def test_from_python(tmp_path: Path) -> None:
    path = made(tmp_path, 2, 1)
    with pytest.raises(UsageError):
        diskwright.check(path, format="flawed", repair="some")
    found = diskwright.check(path, format="flawed", repair="all")
    assert (found.leaks_fixed, found.corruptions_fixed, found.leaks) == (2, 1, 0)
    assert diskwright.check(path, format="flawed").leaks_fixed == 0
    with pytest.raises(NotSupported):
        diskwright.check(path, format="raw", repair="all")


def test_a_vhdx_with_space_that_nothing_uses(tmp_path: Path) -> None:
    path = tmp_path / "a"
    diskwright.create(path, format="vhdx", size=32 << 20)
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(0, b"data")
    whole = path.stat().st_size
    os.truncate(path, whole + (64 << 20))
    done = ours("check", "--output=json", "a", cwd=tmp_path)
    assert done.status == 3
    leaks = json.loads(done.out)["leaks"]
    assert leaks
    done = ours("check", "-r", "leaks", "a", cwd=tmp_path)
    assert done.status == 0 and done.out.decode().startswith(REPAIRED.format(leaks, 0) + CLEAN)
    assert path.stat().st_size <= whole
    with diskwright.open(path) as disk:
        assert disk.read_at(0, 4) == b"data"


def test_a_vmdk_whose_tables_differ(tmp_path: Path) -> None:
    path = tmp_path / "a"
    diskwright.create(path, format="vmdk", size=4 << 20)
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(0, b"data")
    image = bytearray(path.read_bytes())
    (copy,) = struct.unpack_from("<Q", image, 48)  # of the redundant grain directory
    (table,) = struct.unpack_from("<I", image, copy * 512)
    image[table * 512 : table * 512 + 4] = bytes(4)
    path.write_bytes(image)
    done = ours("check", "a", cwd=tmp_path)
    assert done.status == 2 and b"1 errors were found" in done.out
    done = ours("check", "-r", "all", "--output=json", "a", cwd=tmp_path)
    assert done.status == 0 and json.loads(done.out)["corruptions-fixed"] == 1
    with diskwright.open(path) as disk:
        assert disk.read_at(0, 4) == b"data"
