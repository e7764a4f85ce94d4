"""Filters in the graph: opened through the registry, named, and closed with it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.engine.kernel import Driver
from diskwright.errors import UsageError
from diskwright.graph.display import display_name
from diskwright.graph.gate import Gate
from diskwright.graph.graph import chain, leaf_of
from diskwright.graph.opener import close_disk, open_disk
from diskwright.graph.reopen import reopen

from .tools import run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    diskwright.create("a", format="qcow2", size=1 << 20)
    return tmp_path


DEBUGGED = {
    "driver": "qcow2",
    "file": {"driver": "blkdebug", "image": {"driver": "file", "filename": "a"}},
}


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("blkdebug::a", "blkdebug::a"),
        (DEBUGGED, "blkdebug::a"),
        ({"driver": "qcow2", "file": {"driver": "blkdebug", "align": 512,
                                      "image.filename": "a"}}, None),
    ],
)  # fmt: skip
def test_names_and_shapes(reference: Any, name: str | None) -> None:
    async def work(driver: Driver) -> None:
        node = await open_disk(driver, reference, writable=True)
        low = node.child("file")
        assert low is not None and low.driver_name == "blkdebug"
        assert leaf_of(node).driver_name == "file"
        found = display_name(node)
        assert found == name if name else found.startswith("json:")
        await node.write([100], [b"through"])
        await close_disk(node)
        again = await open_disk(driver, found, format="qcow2")
        assert (await again.read([100], [7]))[0] == b"through"
        await close_disk(again)

    run(work)


def test_errors_are_injected_below_the_format() -> None:
    description = {
        **DEBUGGED,
        "file.inject-error.0.event": "write_aio",
        "file.inject-error.0.errno": errno.ENOSPC,
        "file.inject-error.0.once": "on",
    }

    async def work(driver: Driver) -> None:
        node = await open_disk(driver, description, writable=True)
        with pytest.raises(OSError) as caught:
            await node.write([0], [b"x" * 512])
        assert caught.value.errno == errno.ENOSPC
        await node.write([0], [b"y" * 512])
        await close_disk(node)

    run(work)
    assert diskwright.check("a").corruptions == 0


def test_a_chain_goes_through_filters() -> None:
    diskwright.create("b", format="qcow2", options={"backing_file": "a", "backing_fmt": "qcow2"})

    async def work(driver: Driver) -> None:
        description = {"driver": "blkdebug", "image": {"driver": "qcow2", "file.filename": "b"}}
        node = await open_disk(driver, description, gate=Gate("trusted"))
        assert [layer.driver_name for layer in chain(node)] == ["qcow2", "qcow2"]
        await close_disk(node)

    run(work)


def test_reopening_through_a_filter() -> None:
    async def work(driver: Driver) -> None:
        node = await open_disk(driver, DEBUGGED)
        for _ in range(2):
            await reopen(node, writable=True)
            await node.write([0], [b"x"])
            await reopen(node, writable=False)
            with pytest.raises(PermissionError):
                await node.write([0], [b"y"])
        await close_disk(node)

    run(work)


def test_a_filter_that_cannot_be_opened_leaves_nothing() -> None:
    async def work(driver: Driver) -> None:
        for bad in ({"align": 3}, {"config": "nowhere"}, {"image": None}, {"nonsense": 1}):
            with pytest.raises((UsageError, OSError)):
                await open_disk(
                    driver, {"driver": "qcow2", "file": {**DEBUGGED["file"], **bad}},  # type: ignore[dict-item]
                    writable=True,
                )  # fmt: skip
        node = await open_disk(driver, "a", writable=True)
        await close_disk(node)

    run(work)
