"""The NBD client with servers of others, on both drivers."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from diskwright.contract import FUA, MAY_UNMAP
from diskwright.engine.kernel import BaseDriver
from diskwright.extents import Zero
from diskwright.protocols.nbd import open_nbd
from diskwright.protocols.nbd_status import by_blocks
from diskwright.protocols.nbdnode import NbdNode

from .nbd_servers import Server, nbd_server, nbdkit, qemu_nbd

T = TypeVar("T")
PLAIN = pytest.mark.parametrize("driver", ["plain"], indirect=True)


def run(driver: BaseDriver, work: Coroutine[Any, Any, T]) -> T:
    """Either kind of driver runs it."""
    return driver.run(work)  # type: ignore[attr-defined, no-any-return]


def opened(driver: BaseDriver, server: Server, export: str = "", **more: object) -> NbdNode:
    return run(driver, open_nbd(driver, server.options(export, **more)))


def use(driver: BaseDriver, node: NbdNode) -> None:
    """Everything that a leaf can be asked, against a model."""
    size = node.size
    model = bytearray(b"".join(bytes(p) for p in run(driver, node.read([0], [size]))))
    rng = random.Random(3)

    async def work() -> None:
        for _ in range(3):
            places = [rng.randrange(size - 9000) for _ in range(16)]
            parts = [rng.randbytes(rng.choice([1, 512, 4096, 8191])) for _ in places]
            await node.write(places, parts, rng.choice([0, MAY_UNMAP, FUA]))
            for place, part in zip(places, parts, strict=True):
                model[place : place + len(part)] = part
            start, length = rng.randrange(size // 2), rng.randrange(size // 2)
            await node.zero([start], [length], rng.choice([0, MAY_UNMAP, FUA]))
            model[start : start + length] = bytes(length)
            await node.flush()
            offsets = [rng.randrange(size) for _ in range(16)]
            lengths = [rng.choice([0, 1, 4096, 30000]) for _ in offsets]
            found = await node.read(offsets, lengths)
            for offset, length, part in zip(offsets, lengths, found, strict=True):
                want = bytes(model[offset : offset + length]).ljust(length, b"\0")
                assert bytes(part) == want
        many = [rng.randrange(size - 64) for _ in range(4200)]
        found = await node.read(many, [64] * 4200)
        assert [bytes(part) for part in found] == [bytes(model[at : at + 64]) for at in many]
        at = 0
        for extent in await node.extents(0, size + 100):
            if isinstance(extent, Zero):
                assert not any(model[at : at + extent.length])
            at += extent.length  # type: ignore[union-attr]
        assert at == size + 100
        await node.discard([100], [size - 200])
        assert bytes((await node.read([0], [100]))[0]) == bytes(model[:100])

    run(driver, work())
    run(driver, node.close())


@pytest.mark.parametrize(
    "words",
    [
        ("memory", "1M"),
        ("--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=512",
         "blocksize-preferred=4096", "blocksize-maximum=64k", "blocksize-error-policy=error"),
        ("--filter=multi-conn", "--filter=delay", "memory", "1M", "multi-conn-mode=unsafe",
         "delay-read=1ms"),
    ],
    ids=["plain", "blocks", "several"],
)  # fmt: skip
def test_nbdkit(driver: BaseDriver, tmp_path: Path, words: tuple[str, ...]) -> None:
    with nbdkit(tmp_path, *words) as server:
        use(driver, opened(driver, server))


@PLAIN
@pytest.mark.parametrize(
    "words",
    [
        ("--no-sr",),
        ("--mask-handshake=0",),
        ("--filter=nozero", "--filter=noextents", "zeromode=none"),
    ],
    ids=["simple", "newstyle", "poor"],
)
def test_nbdkit_with_less(driver: BaseDriver, tmp_path: Path, words: tuple[str, ...]) -> None:
    with nbdkit(tmp_path, *words[:2], "memory", "1M", *words[2:]) as server:
        use(driver, opened(driver, server))


@PLAIN
def test_nbd_server(driver: BaseDriver, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with nbd_server(tmp_path, disk) as options:
        use(driver, run(driver, open_nbd(driver, options)))


def test_oldstyle(driver: BaseDriver, tmp_path: Path) -> None:
    """nbdkit 1.32 refuses there whatever it offers, but reads."""
    words = ("--oldstyle", "data", "1 2 3 @0x1000 4", "size=8K")
    with nbdkit(tmp_path, *words) as server:
        node = opened(driver, server, **{"read-only": True})
        assert node.agreed.style == "oldstyle"
        found = run(driver, node.read([0, 0x1000], [4, 1]))
        assert [bytes(part) for part in found] == [b"\1\2\3\0", b"\4"]
        run(driver, node.close())


@PLAIN
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_qemu_nbd(driver: BaseDriver, tmp_path: Path, format: str) -> None:
    image = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", format, image, "1M"], check=True)
    with qemu_nbd(tmp_path, "-f", format, str(image)) as server:
        node = opened(driver, server, "disk")
        assert node.agreed.extended and node.agreed.contexts
        use(driver, node)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([(1024, 3), (512, 0)], [(1024, 3), (512, 0)]),
        ([(1000, 3), (24, 1)], [(512, 3), (512, 0)]),
        ([(1000, 3), (10, 1), (526, 2)], [(512, 3), (512, 0), (512, 2)]),
        ([(7, 1)], [(512, 0)]),
    ],
)
def test_status_in_whole_blocks(rows: list[tuple[int, int]], told: list[tuple[int, int]]) -> None:
    assert list(by_blocks(rows, 512)) == told


@PLAIN
def test_more_connections(driver: BaseDriver, tmp_path: Path) -> None:
    """They are made when the first is busy, as many as were allowed, and all of them end."""
    with nbdkit(tmp_path, "--filter=delay", "memory", "1M", "delay-read=50ms") as server:
        node = opened(driver, server, connections=3)

        async def work() -> int:
            for _ in range(6):
                parts = [driver.start(node.read([at], [64])) for at in range(9)]
                for part in parts:
                    await part
            return len(node.links.links)

        assert run(driver, work()) == 3
        run(driver, node.close())
        assert not node.links.links
