"""The built-in drivers as subjects of the conformance suite."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..contract import COMPRESSED
from ..engine.futures import BaseDriver
from ..engine.node import Node
from ..errors import NotSupported, UnsupportedFeature
from ..graph.gate import Gate
from ..graph.opener import close_disk, create_image, open_disk
from ..protocols.fileobject import FileObjectNode
from ..protocols.memory import MemoryNode
from ..protocols.null import NullNode
from .conformance import Subject, Unavailable
from .model import pattern

SIZE = (1 << 20) + 1536
_BASE_SIZE = 700_000


_ALIGNED = [("monolithicSparse", 327680), ("monolithicSparse", 65536), ("monolithicSparse", 0)]
_SECRETS = {"s0": b"of the suite"}
# No grid of grains fits these.
_RAGGED = [("monolithicSparse", 300544), ("monolithicFlat", 66048), ("vmfsSparse", 100352),
           ("monolithicSparse", 0)]  # fmt: skip


async def _close(node: Node) -> None:
    await node.close()


class _Opened:
    """A disk in a file, made once and opened again by the graph."""

    def __init__(self, format: str, portable: bool = False, **create: Any) -> None:
        self.format, self.create = format, create
        self.backing = "backing_file" in create
        self.debug = create.pop("blkdebug", False)
        self.compress = create.pop("compress", False)
        self.offset = create.pop("offset", 0)
        self.cache = create.pop("cache", "writeback")
        self.extents: list[tuple[str, int]] = create.pop("extents", [])
        self.size = create.pop("size", SIZE)
        # These have no parents of another format.
        self.below = format if format in ("vmdk", "vhdx") else "raw"
        self.encrypted = {n: v for n, v in create.items() if n.endswith("key-secret")}
        self.packed: dict[str, Any] = create.pop("packed_base", {})
        """Options of a compressed base."""
        if self.packed:
            self.below = format

    async def __call__(self, driver: BaseDriver, folder: Path, fresh: bool) -> Node:
        path = folder / "disk"
        base = folder / "base"
        if self.encrypted:
            _need_ciphers()
        if fresh and self.backing:
            if self.below != "raw":
                await _made(driver, base, self.below, self.packed)
            else:
                base.write_bytes(pattern(900, 0, _BASE_SIZE))
        if fresh and self.extents:
            await _composed(driver, path, self.extents)
        elif fresh and self.format == "file":
            path.write_bytes(bytes(SIZE))
        elif fresh:
            options = dict(self.create)
            if self.backing:
                options["backing_file"] = str(base)
            size = self.size + self.offset
            await create_image(
                driver, str(path), self.format, size, options, secrets=_SECRETS
            )
        reference = self._reference(path, base)
        try:
            node = await open_disk(
                driver,
                reference,
                writable=True,
                resize=True,
                cache=self.cache,
                gate=Gate("trusted"),  # the extents of an image are files that it names
                secrets=_SECRETS,
            )
        except (NotSupported, OSError) as error:
            if self.cache in ("none", "directsync") and fresh:
                raise Unavailable(f"cache={self.cache}: {error}") from error
            raise
        if fresh and self.format == "luks":  # what was never written reads as noise
            await node.write([0], [bytes(self.size)])
        return node

    def _reference(self, path: Path, base: Path) -> dict[str, Any]:
        file: dict[str, Any] = {"driver": "file", "filename": str(path)}
        if self.debug:
            file = {"driver": "blkdebug", "image": file}
        if self.format == "file":
            return file
        out: dict[str, Any] = {"driver": self.format, "file": file, **self.encrypted}
        if self.offset:
            out["offset"] = self.offset
        if self.backing:
            # The caller's own words, so nothing that the image names has to be opened.
            out["backing"] = {
                "driver": self.below,
                "file": {"driver": "file", "filename": str(base)},
            }
        return {"driver": "compress", "file": out} if self.compress else out


def _need_ciphers() -> None:
    from ..codecs.aes import library

    try:
        library()
    except UnsupportedFeature as error:
        raise Unavailable(str(error)) from error


async def _made(driver: BaseDriver, path: Path, format: str, packed: dict[str, Any]) -> None:
    """An image that holds the bytes of a base, compressed where there are options for that."""
    await create_image(driver, str(path), format, _BASE_SIZE, packed)
    disk = await open_disk(driver, {"driver": format, "file.filename": str(path)}, writable=True)
    try:
        if packed:
            whole = pattern(900, 0, _BASE_SIZE).ljust(disk.size, b"\0")
            await disk.write([0], [whole], COMPRESSED)
        else:
            await disk.write([0], [pattern(900, 0, _BASE_SIZE)])
    except UnsupportedFeature as error:
        raise Unavailable(str(error)) from error
    finally:
        await close_disk(disk)


async def _composed(driver: BaseDriver, path: Path, extents: list[tuple[str, int]]) -> None:
    """A VMDK image of several extents, each a (subformat, bytes); the last one takes what is left
    of the disk."""
    lines = []
    left = SIZE
    for number, (subformat, length) in enumerate(extents):
        length = min(length, left) if number + 1 < len(extents) else left
        left -= length
        whole = path.with_name(f"{path.name}.{number}")
        await create_image(driver, str(whole), "vmdk", length, {"subformat": subformat})
        (line,) = [
            line
            for line in whole.read_bytes().decode("utf-8", "replace").splitlines()
            if line.startswith("RW ")
        ]
        lines.append(line)
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        'createType="custom"\n\n' + "\n".join(lines) + "\n"
    )


def _filed(name: str, format: str, portable: bool = False, **more: Any) -> Subject:
    unit = more.pop("unit", 0)
    resizes = more.pop("resizes", not (more.get("offset") or more.get("extents")))
    opened = _Opened(format, **more)
    return Subject(
        name + (" (portable)" if portable else ""),
        opened,
        close_disk,
        opened.size,
        first=pattern(900, 0, _BASE_SIZE) if opened.backing else b"",
        leaf=format == "file",
        resizes=resizes,
        unit=unit,
        portable=portable,
    )


async def _memory(driver: BaseDriver, folder: Path, fresh: bool) -> Node:
    return MemoryNode(driver, bytes(SIZE))


async def _null(driver: BaseDriver, folder: Path, fresh: bool) -> Node:
    return NullNode(driver, SIZE, read_zeroes=True)


class _Held(FileObjectNode):
    """A file that the program has open, and closes behind the disk."""

    async def close(self) -> None:
        await super().close()
        self._file.close()


async def _object(driver: BaseDriver, folder: Path, fresh: bool) -> Node:
    node = _Held(driver, open(folder / "disk", "w+b" if fresh else "r+b"), "disk")
    if fresh:
        await node.truncate(SIZE)
    await node.begin(writable=True)
    return node


def subjects() -> list[Subject]:
    """Every driver, in the configurations that differ in what they do."""
    out = [
        Subject("memory", _memory, _close, SIZE, keeps=False, leaf=True),
        Subject("null", _null, _close, SIZE, keeps=False, stores=False, leaf=True, resizes=False),
        Subject("file object", _object, _close, SIZE, leaf=True),
    ]
    for portable in (False, True):
        out += [
            _filed("file", "file", portable),
            _filed("raw", "raw", portable),
            _filed("qcow2", "qcow2", portable, unit=65536),
            _filed("vmdk", "vmdk", portable, unit=65536),
            _filed("vhdx", "vhdx", portable, block_size=1 << 20, unit=1 << 20),
        ]
    out += [
        _filed("file, cache=none", "file", cache="none"),
        _filed("file, cache=directsync", "file", cache="directsync"),
        _filed("raw at an offset", "raw", offset=66048),
        _filed("qcow2, clusters of 512", "qcow2", cluster_size=512, unit=512),
        _filed("qcow2, clusters of 2 MiB", "qcow2", cluster_size=2 << 20, unit=2 << 20),
        _filed("qcow2 v2", "qcow2", compat="0.10", unit=65536),
        _filed("qcow2, lazy refcounts", "qcow2", lazy_refcounts=True, unit=65536),
        _filed("qcow2, refcounts of 1 bit", "qcow2", refcount_bits=1, unit=65536),
        _filed("qcow2, refcounts of 64 bits", "qcow2", refcount_bits=64, unit=65536),
        _filed(
            "qcow2 over a backing file", "qcow2", backing_file="", backing_fmt="raw", unit=65536
        ),
        _filed(
            # The bytes repeat themselves at a distance that needs such clusters.
            "qcow2 over a compressed one",
            "qcow2",
            backing_file="",
            backing_fmt="qcow2",
            unit=65536,
            packed_base={"cluster_size": 2 << 20, "compression_type": "zstd"},
        ),
        _filed("qcow2, metadata preallocated", "qcow2", preallocation="metadata", unit=65536),
        _filed("qcow2 with a data file", "qcow2", data_file="data", unit=65536),
        _filed(
            "qcow2 with a raw data file", "qcow2", data_file="data", data_file_raw=True, unit=65536
        ),
        _filed(
            "qcow2 with a data file over a backing file",
            "qcow2",
            backing_file="",
            backing_fmt="raw",
            data_file="data",
            cluster_size=4096,
            unit=4096,
        ),
        _filed(
            "qcow2 with subclusters", "qcow2", extended_l2=True, cluster_size=16384, unit=512
        ),
        _filed(
            "qcow2 with subclusters over a backing file",
            "qcow2",
            extended_l2=True,
            backing_file="",
            backing_fmt="raw",
            preallocation="metadata",
            cluster_size=65536,
            unit=2048,
        ),
        *_encrypted(),
        _filed("qcow2, cache=none", "qcow2", cache="none", cluster_size=4096, unit=4096),
        _filed("raw over blkdebug", "raw", blkdebug=True),
        _filed("qcow2 over blkdebug", "qcow2", blkdebug=True, cluster_size=4096, unit=4096),
        _filed("compress", "qcow2", compress=True, cluster_size=4096, unit=4096),
        _filed(
            "compress over a backing file",
            "qcow2",
            compress=True,
            backing_file="",
            backing_fmt="raw",
            unit=65536,
        ),
        _filed("vhdx, fixed", "vhdx", subformat="fixed", unit=8 << 20),
        _filed("vhdx, blocks of 256 MiB", "vhdx", block_size=256 << 20, unit=256 << 20),
        _filed(
            "vhdx, sectors of 4096",
            "vhdx",
            logical_sector_size=4096,
            block_size=1 << 20,
            unit=1 << 20,
            size=(2 << 20) + 4096,
            resizes=False,  # the suite's sizes are sectors of 512
        ),
        _filed(
            "vhdx over a parent",
            "vhdx",
            backing_file="",
            backing_fmt="vhdx",
            block_size=1 << 20,
            unit=1 << 20,
        ),
        _filed("vhdx over blkdebug", "vhdx", blkdebug=True, block_size=1 << 20, unit=1 << 20),
        _filed("vhdx, cache=none", "vhdx", cache="none", block_size=1 << 20, unit=1 << 20),
        _filed("vmdk with zeroed grains", "vmdk", zeroed_grain=True, unit=65536),
        _filed("vmdk over a parent", "vmdk", backing_file="", backing_fmt="vmdk"),
        _filed(
            "vmdk with zeroed grains over a parent",
            "vmdk",
            backing_file="",
            backing_fmt="vmdk",
            zeroed_grain=True,
            unit=65536,
        ),
        _filed("vmdk, monolithicFlat", "vmdk", subformat="monolithicFlat"),
        _filed("vmdk, twoGbMaxExtentSparse", "vmdk", subformat="twoGbMaxExtentSparse", unit=65536),
        _filed("vmdk, vmfsSparse", "vmdk", subformat="vmfsSparse", unit=512),
        _filed("vmdk, seSparse", "vmdk", subformat="seSparse", unit=4096),
        _filed("vmdk of three sparse extents", "vmdk", unit=65536, extents=_ALIGNED),
        _filed("vmdk of ragged extents", "vmdk", extents=_RAGGED),
        _filed("vmdk over blkdebug", "vmdk", blkdebug=True, unit=65536),
        _filed("vmdk, cache=none", "vmdk", cache="none", unit=65536),
    ]
    return out


def _encrypted() -> list[Subject]:
    """Where reading and writing have a cipher in between."""
    aes: dict[str, Any] = {"encrypt.format": "aes", "encrypt.key-secret": "s0"}
    luks: dict[str, Any] = {**aes, "encrypt.format": "luks", "encrypt.iter-time": 1}
    backing: dict[str, Any] = {"backing_file": "", "backing_fmt": "raw"}
    alone: dict[str, Any] = {"key-secret": "s0", "iter-time": 1}
    return [
        _filed("luks", "luks", resizes=False, **alone),
        _filed("qcow2, aes", "qcow2", cluster_size=4096, unit=4096, **aes),
        _filed("qcow2, luks over a backing file", "qcow2", unit=65536, **luks, **backing),
        _filed("qcow2, luks, with a data file", "qcow2", data_file="data", unit=65536, **luks),
        _filed(
            "qcow2, luks, with subclusters over a backing file", "qcow2", extended_l2=True,
            cluster_size=16384, unit=512, **luks, **backing,
        ),
    ]  # fmt: skip


@contextmanager
def portable_mode(wanted: bool) -> Iterator[None]:
    """The file protocol with nothing but what every system has."""
    before = os.environ.get("DISKWRIGHT_PORTABLE")
    if wanted:
        os.environ["DISKWRIGHT_PORTABLE"] = "1"
    try:
        yield
    finally:
        if wanted:
            if before is None:
                del os.environ["DISKWRIGHT_PORTABLE"]
            else:
                os.environ["DISKWRIGHT_PORTABLE"] = before


def run_plain(work: Any) -> None:
    """Run ``work(driver)`` on the plain driver."""
    from ..engine.kernel import Driver

    driver = Driver()
    try:
        driver.run(work(driver))
    finally:
        driver.close()


def run_asyncio(work: Any) -> None:
    """Run ``work(driver)`` on an asyncio loop."""
    from ..engine.aio_driver import AsyncioDriver

    async def main() -> None:
        driver = AsyncioDriver()
        coro: Coroutine[Any, Any, None] = work(driver)
        try:
            await driver.bridge(coro)
        finally:
            driver.stop_pool()

    asyncio.run(main())


RUNNERS = {"plain": run_plain, "asyncio": run_asyncio}
