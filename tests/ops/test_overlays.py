"""``convert`` into an overlay: what the backing file holds does not show where it must not."""

from __future__ import annotations

from pathlib import Path

import pytest

import diskwright
from cli.support import ours

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A source with a hole where the base has data."""
    (tmp_path / "a").write_bytes(b"a" * MIB + bytes(3 * MIB))
    with open(tmp_path / "a", "r+b") as file:
        file.truncate(4 * MIB)
    (tmp_path / "raw").write_bytes(b"b" * 4 * MIB)
    for fmt in ("qcow2", "vhdx", "vmdk"):
        diskwright.convert(
            tmp_path / "raw", tmp_path / f"base.{fmt}", target_format=fmt, format="raw"
        )
    return tmp_path


@pytest.mark.parametrize("fmt", ["qcow2", "vhdx", "vmdk"])
def test_from_python(folder: Path, fmt: str) -> None:
    """The backing file that the caller names needs no policy, and zeroes hide it."""
    options = {"backing_file": f"base.{fmt}", "backing_fmt": fmt}
    diskwright.convert(
        folder / "a", folder / "out", target_format=fmt, format="raw", options=options
    )
    with diskwright.open(folder / "out", policy="trusted") as disk:
        assert disk.read_at(0, disk.size) == (folder / "a").read_bytes()


def test_by_its_other_name(folder: Path) -> None:
    words = ("-f", "raw", "-O", "vhdx", "-o", "parent=base.vhdx")
    done = ours("convert", *words, "a", "out", cwd=folder, policy="untrusted")
    assert (done.status, done.err) == (0, b"")
    done = ours("compare", "-f", "raw", "-F", "vhdx", "a", "out", cwd=folder)
    assert done.status == 0
    done = ours("convert", *words, "a", "a", "out", cwd=folder)
    assert done.status == 1 and b"concatenating multiple input images" in done.err
