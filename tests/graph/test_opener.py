"""Descriptions become graphs: layering, common options, probing, and closing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.declare import Driver as Declared
from diskwright.engine.kernel import Driver
from diskwright.errors import DiskError, ImageError, NotSupported, UsageError
from diskwright.graph import registry
from diskwright.graph.graph import Graph, walk
from diskwright.graph.guard import GuardedNode
from diskwright.graph.node import Node
from diskwright.graph.opener import close_disk, open_disk
from diskwright.graph.probe import SIGNATURES, matches
from diskwright.protocols.memory import MemoryNode

from .tools import run, shell


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISKWRIGHT_POLICY", raising=False)
    return tmp_path


def shape(node: Node) -> str:
    inner = ", ".join(f"{slot}={shape(edge.child)}" for slot, edge in node.children.items())
    return f"{node.driver_name}({inner})" if inner else node.driver_name


def opened_shape(reference: Any, **named: Any) -> str:
    async def work(driver: Driver) -> str:
        node = await open_disk(driver, reference, **named)
        found = shape(node)
        await close_disk(node)
        return found

    return run(work)


# -- layering


def test_a_file_name_is_a_format_over_a_file() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    assert opened_shape("a") == "qcow2(file=file)"
    assert opened_shape("a", format="qcow2") == "qcow2(file=file)"
    assert opened_shape("a", format="raw") == "raw(file=file)"
    assert opened_shape("a", format="file") == "file"
    assert opened_shape("null-co://") == "raw(file=null-co)"
    assert opened_shape({"driver": "null-co"}) == "null-co"


def test_descriptions_of_any_depth() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    with diskwright.open({"driver": "raw", "file": {"driver": "qcow2", "file.filename": "a"}},
                         writable=True) as disk:  # fmt: skip
        disk.write_at(1000, b"through both")
    with diskwright.open({
        "driver": "raw", "offset": "512", "size": "1k",
        "file": {"driver": "raw", "offset": 256, "file": {
            "driver": "qcow2", "file": {"driver": "raw", "file": {
                "driver": "file", "filename": "a"}}}},
    }, writable=True) as disk:  # fmt: skip
        assert shape(disk.node) == "raw(file=raw(file=qcow2(file=raw(file=file))))"
        assert disk.size == 1024
        assert disk.read_at(1000 - 768, 12) == b"through both"
        disk.write_at(0, b"w" * 1024)
    with diskwright.open("a") as disk:
        assert disk.read_at(767, 1026) == b"\0" + b"w" * 1024 + b"\0"


def test_json_and_dotted_options_mean_the_same() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    for reference in (
        'json:{"driver":"qcow2","file.driver":"file","file":{"filename":"a"}}',
        {"driver": "qcow2", "file.driver": "file", "file.filename": "a"},
        {"driver": "qcow2", "file": {"filename": "a"}},
        {"file": {"filename": "a"}},
    ):
        assert opened_shape(reference) == "qcow2(file=file)"
    assert opened_shape("a", options={"driver": "raw", "offset": 512}) == "raw(file=file)"
    assert opened_shape('json:{"driver":"qcow2","file.filename":"a"}', format="raw") == (
        "raw(file=file)"
    )


def test_nodes_may_be_shared_by_name() -> None:
    diskwright.create("a", format="raw", size=1 << 20)

    async def work(driver: Driver) -> None:
        graph = Graph(driver)
        first = await open_disk(
            driver, {"driver": "raw", "node-name": "low", "file.filename": "a"}, graph=graph
        )
        second = await open_disk(
            driver, {"driver": "raw", "offset": 512, "file": "low"}, graph=graph
        )
        assert graph.find("low") is first
        assert second.child("file") is first
        with pytest.raises(UsageError, match="Duplicate nodes with node-name='low'"):
            await open_disk(driver, {"driver": "null-co", "node-name": "low"}, graph=graph)
        with pytest.raises(UsageError, match="Invalid node-name: '#x'"):
            await open_disk(driver, {"driver": "null-co", "node-name": "#x"}, graph=graph)
        await close_disk(first)
        assert graph.find("low") is first, "the other disk still uses it"
        assert (await second.read([0], [3]))[0] == bytes(3)
        await close_disk(second)
        assert graph.nodes == {} and graph.roots == {}

    run(work)


def test_users_of_one_node_must_agree() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)

    async def work(driver: Driver) -> None:
        graph = Graph(driver)
        low = {"driver": "file", "filename": "a", "node-name": "low"}
        top = await open_disk(driver, {"driver": "qcow2", "file": low}, writable=True, graph=graph)
        with pytest.raises(UsageError, match=r"Permission conflict on node 'low': permissions "
                           r"'write' are both required by node '#block101' \(uses node 'low' as "
                           r"'file' child\) and unshared by node '#block100'"):  # fmt: skip
            await open_disk(driver, {"driver": "raw", "file": "low"}, writable=True, graph=graph)
        # The one that was there first goes on.
        await top.write([0], [b"x"])
        await close_disk(top)
        assert graph.nodes == {}

    run(work)


# -- errors, worded as the real tool's


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("driver=foo", "Unknown driver 'foo'"),
        ("driver=qcow2", 'A block device must be specified for "file"'),
        ("filename=a", "Must specify either driver or file"),
        ("driver=qcow2,filename=a", 'A block device must be specified for "file"'),
        (
            "driver=qcow2,file.driver=file,file.filename=a,foo=bar",
            "Block format 'qcow2' does not support the option 'foo'",
        ),
        (
            "driver=qcow2,file.driver=file,file.filename=a,file.foo=bar",
            "Block protocol 'file' doesn't support the option 'foo'",
        ),
        ("driver=qcow2,file=xx", "Cannot find device='xx' nor node-name='xx'"),
        ("driver=raw,file.filename=a,read-only=maybe", "expects 'on' or 'off'"),
    ],
)
def test_bad_descriptions(options: str, text: str, here: Path, peer: Any) -> None:
    from diskwright.graph.names import parse_image_opts

    diskwright.create("a", format="qcow2", size=1 << 20)
    with pytest.raises(UsageError) as caught:
        opened_shape(parse_image_opts(options))
    assert text in str(caught.value)
    assert text in shell(here, peer("qemu-img"), "info", "--image-opts", options, ok=False)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        diskwright.open("nowhere")
    assert caught.value.filename == "nowhere"
    Path("tiny").write_bytes(b"not")
    with pytest.raises(ImageError) as wrong:
        diskwright.open("tiny", format="qcow2")
    assert wrong.value.file == "tiny"


def test_a_failed_open_leaves_nothing_open() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    before = set(os.listdir("/proc/self/fd"))
    for description in (
        {"driver": "qcow2", "file.filename": "a", "foo": 1},
        {"driver": "raw", "offset": 1 << 60, "file.filename": "a"},
        {"driver": "raw", "offset": 3, "file": {
            "driver": "raw", "offset": 1 << 50, "file.filename": "a"}},
        {"driver": "qcow2", "file.filename": "a", "backing": {"driver": "raw", "file": "no"}},
        {"driver": "qcow2", "file.filename": "a", "backing": {"driver": "qcow2",
                                                              "file.filename": "no"}},
    ):  # fmt: skip
        with pytest.raises((DiskError, OSError)):
            diskwright.open(description, writable=True)
    assert set(os.listdir("/proc/self/fd")) == before


def test_everything_is_closed_whatever_fails() -> None:
    async def work(driver: Driver) -> None:
        graph = Graph(driver)
        diskwright.create("a", format="qcow2", size=1 << 20)
        node = await open_disk(driver, "a", writable=True, graph=graph)
        leaf = list(walk(node))[-1]

        async def broken() -> None:
            raise OSError(errno.EIO, "no")

        node.close = broken  # type: ignore[method-assign]
        with pytest.raises(OSError, match="no"):
            await close_disk(node)
        assert leaf.closed  # type: ignore[attr-defined]
        assert graph.nodes == {}

    run(work)


# -- common options


def test_modes_flow_down_and_may_be_set_for_each_node() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)

    async def work(driver: Driver) -> None:
        node = await open_disk(driver, "a", writable=True, cache="unsafe", discard="ignore")
        low = node.child("file")
        assert low is not None
        assert (low.cache, low.unmap) == ("unsafe", False)  # type: ignore[attr-defined]
        await close_disk(node)
        node = await open_disk(
            driver,
            {"driver": "qcow2", "file": {"driver": "file", "filename": "a", "discard": "unmap",
                                         "cache": {"no-flush": "on"}}},
            writable=True,
            discard="ignore",
        )  # fmt: skip
        low = node.child("file")
        assert low is not None
        assert (low.cache, low.unmap) == ("unsafe", True)  # type: ignore[attr-defined]
        await close_disk(node)
        node = await open_disk(
            driver, {"driver": "qcow2", "file.filename": "a", "file.read-only": "on"}, writable=True
        )
        assert node.read_only
        with pytest.raises(PermissionError):
            await node.write([0], [b"x"])
        await close_disk(node)

    run(work)


def test_writethrough_flushes_each_write() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)

    async def work(driver: Driver) -> None:
        node = await open_disk(driver, "a", writable=True, cache="writethrough")
        low = node.child("file")
        assert low is not None
        syncs = 0
        flush = low.flush

        async def counted() -> None:
            nonlocal syncs
            syncs += 1
            await flush()

        low.flush = counted  # type: ignore[method-assign]
        await node.write([0], [b"x" * 512])
        assert syncs >= 1
        seen = syncs
        await node.zero([65536], [512])
        assert syncs > seen
        await close_disk(node)

    run(work)


@pytest.mark.parametrize("mode", ["on", "unmap"])
def test_detect_zeroes(mode: str) -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    with diskwright.open("a", writable=True, detect_zeroes=mode) as disk:
        disk.write_at(0, bytes(65536))
        disk.write_at(65536, bytes(65535) + b"x")
        kinds = [(part.length, part.zero, part.data) for part in disk.extents()]
    assert kinds[0] == (65536, True, False)
    assert kinds[1][2]
    with pytest.raises(UsageError, match="detect-zeroes"):
        diskwright.open("a", detect_zeroes="unmap", discard="ignore")


# -- probing


def test_signatures_do_not_shadow_each_other() -> None:
    for signature in SIGNATURES:
        if signature.offset >= 0:
            head, tail = bytes(signature.offset) + signature.magic + bytes(400), b""
        else:
            head, tail = b"", signature.magic.ljust(-signature.offset, b"\0")
        assert matches(head, tail).keys() == {signature.name}
    assert matches(b"") == matches(bytes(512), bytes(512)) == {}


def test_images_of_other_formats_are_never_taken_for_raw() -> None:
    Path("x.qed").write_bytes(b"QED\0" + bytes(2000))
    with pytest.raises(NotSupported, match="'qed' is not supported"):
        diskwright.open("x.qed")
    with diskwright.open("x.qed", format="raw") as disk:
        assert not disk.probed


def test_a_guessed_raw_image_refuses_a_signature(here: Path, peer: Any) -> None:
    diskwright.create("a", format="raw", size=1 << 20)
    qemu_io = peer("qemu-io")
    magic = b"QFI\xfb\0\0\0\3"
    Path("magic").write_bytes(magic.ljust(512, b"\0"))
    theirs = shell(here, qemu_io, "-c", "write -s magic 0 512", "a", ok=False)
    assert "Operation not permitted" in theirs
    with diskwright.open("a", writable=True) as disk:
        assert disk.probed
        for offset, data in ((0, magic), (0, magic + bytes(100000)), (0, b"conectix")):
            with pytest.raises(PermissionError) as caught:
                disk.write_at(offset, data)
            assert caught.value.errno == errno.EPERM
        # In pieces: the last one completes it.
        disk.write_at(1, magic[1:])
        with pytest.raises(PermissionError):
            disk.write_at(0, magic[:1])
        disk.write_at(0, b"QEDx")
        for method in (disk.zero, disk.discard):
            with pytest.raises(PermissionError):
                method(3, 10)
        disk.write_at(0, bytes(512))
        disk.write_at(512, magic)
        disk.flush()
    with diskwright.open("a", format="raw", writable=True) as disk:
        assert not disk.probed
        disk.write_at(0, magic)


def test_two_harmless_writes_at_once_make_no_signature() -> None:
    async def work(driver: Driver) -> None:
        memory = MemoryNode(driver, bytes(1 << 20))
        registry.register(Declared("mem-test", "protocol", open=lambda *_: _given(memory)))
        try:
            node = await open_disk(driver, {"file": {"driver": "mem-test"}}, writable=True)
            assert isinstance(node, GuardedNode) and node.probed
            tasks = [
                driver.spawn(node.write([0], [b"QF"])),
                driver.spawn(node.write([2], [b"I\xfb"])),
                driver.spawn(node.write([600], [b"else"])),
            ]
            failed = 0
            for task in tasks:
                try:
                    await task
                except PermissionError:
                    failed += 1
            assert failed == 1
            assert not matches(bytes(memory.data[:512]))
            assert memory.data[600:604] == b"else"
            await close_disk(node)
        finally:
            registry.forget("mem-test")

    run(work)


async def _given(node: Node) -> Node:
    return node
