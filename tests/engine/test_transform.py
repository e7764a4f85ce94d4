"""Ciphers behind reads and before writes: in how many requests and jobs, and in which memory."""

from __future__ import annotations

from typing import Any

import pytest

from diskwright.engine.kernel import Driver
from diskwright.engine.transform import _MOST_SPARE, JOB
from diskwright.graph.mapped import MappedNode
from diskwright.protocols.memory import MemoryNode
from diskwright.testing.composed import Crypt
from diskwright.testing.model import pattern

SIZE = 2 * JOB + 4096


@pytest.fixture
def driver() -> Any:
    driver = Driver()
    yield driver
    driver.stop_pool()
    driver.close()


def test_requests_jobs_and_buffers(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pattern(1, 0, SIZE)
    file = MemoryNode(driver, bytearray(Crypt.image(plain)))
    node = MappedNode(driver, "crypt", Crypt(SIZE), {"file": file})
    asked: list[int] = []
    jobs: list[Any] = []
    read, compute = file.read, driver.compute

    def watched(offsets: Any, lengths: Any, into: Any = None) -> Any:
        asked.append(len(lengths))
        return read(offsets, lengths, into)

    def counted(*job: Any) -> Any:
        jobs.append(job)
        return compute(*job)

    monkeypatch.setattr(file, "read", watched)
    monkeypatch.setattr(driver, "compute", counted)
    spare = node.engine.transformer._spare

    # A long range: a request and a job for each piece, decoded where it is; the rest is short.
    target = memoryview(bytearray(SIZE))
    driver.run(node.read([0], [SIZE], [target]))
    assert target == plain
    assert (asked, len(jobs), spare) == ([1, 1, 1], 2, [])
    # Many short ones: one of each, by way of one buffer.
    asked.clear()
    jobs.clear()
    offsets = list(range(0, 64 << 10, 8192))
    found = driver.run(node.read(offsets, [4096] * 8))
    assert all(data == plain[at : at + 4096] for at, data in zip(offsets, found, strict=True))
    assert (asked, len(jobs), len(spare)) == ([8], 1, 1)
    # Writes leave the guest's buffer as it is, and theirs are used again.
    jobs.clear()
    data = pattern(2, 0, SIZE)
    for _ in range(2):
        driver.run(node.write([0], [data]))
    assert data == pattern(2, 0, SIZE)
    assert len(jobs) == 6 and len(spare) == 3 <= _MOST_SPARE
    assert bytes(driver.run(node.read([0], [SIZE]))[0]) == data
