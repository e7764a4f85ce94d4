"""What is told of ranges, in blocks of the export."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diskwright.engine.kernel import Driver
from diskwright.export.nbd_status import ALLOCATION_DEPTH, BASE_ALLOCATION, status_of
from diskwright.graph.opener import close_disk, open_disk

DATA, ZERO = 0, 3


@pytest.mark.skipif(sys.platform != "linux", reason="not every system tells holes of 4 KiB")
@pytest.mark.parametrize(
    ("offset", "length", "only_one", "rows"),
    [
        (0, 16384, False, [(8192, ZERO), (8192, DATA)]),
        (0, 16384, True, [(8192, ZERO)]),
        (8000, 300, False, [(192, ZERO), (108, DATA)]),
        (16000, 384, False, [(384, DATA)]),
    ],
)
def test_a_guessed_raw_disk_is_told_by_sectors(
    tmp_path: Path, offset: int, length: int, only_one: bool, rows: list[tuple[int, int]]
) -> None:
    """The file ends inside a sector, which is data to its end."""
    with (tmp_path / "a").open("wb") as file:
        file.seek(8192)
        file.write(b"x" * 7808)
    driver = Driver()
    node = driver.run(open_disk(driver, str(tmp_path / "a")))
    try:
        assert (node.probed, node.size) == (True, 16384)
        found = driver.run(status_of(node, BASE_ALLOCATION, {}, offset, length, only_one))
        assert found == rows
        depth = driver.run(status_of(node, ALLOCATION_DEPTH, {}, 0, 16384, False))
        assert depth == [(16384, 1)]
    finally:
        driver.run(close_disk(node))
        driver.close()
