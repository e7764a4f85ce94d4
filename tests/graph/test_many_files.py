"""VHDX and VMDK in the graph: several files, parents with identities, paths of other machines."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.engine.kernel import Driver
from diskwright.errors import DiskError, ImageError, ImageInUse, Refused
from diskwright.graph.create import create_image
from diskwright.graph.gate import Gate
from diskwright.graph.graph import own_leaves
from diskwright.graph.opener import close_disk, open_disk
from diskwright.graph.reopen import reopen
from diskwright.graph.status import all_status
from diskwright.protocols.file import FileNode

from .tools import descriptors, run, shell

M = 1 << 20
SPLIT = ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISKWRIGHT_POLICY", raising=False)
    return tmp_path


@pytest.mark.parametrize("subformat", SPLIT)
def test_extents_are_locked_as_qemu_locks_them(subformat: str, here: Path, peer: Any) -> None:
    diskwright.create("x.vmdk", format="vmdk", size=3 << 30, options={"subformat": subformat})
    extents = sorted(set(os.listdir(here)) - {"x.vmdk"})
    assert len(extents) == (1 if subformat == "monolithicFlat" else 2)
    with pytest.raises(Refused, match="no extent that only an image names"):
        diskwright.open("x.vmdk", policy="untrusted")
    qemu_io = peer("qemu-io")
    with diskwright.open("x.vmdk", writable=True, policy="trusted") as disk:
        disk.write_at(0, b"1" * M)
        disk.write_at((2 << 30) + M, b"2" * M)
        for name in ("x.vmdk", *extents):
            said = shell(here, qemu_io, "-f", "raw", "-c", "write 0 512", name, ok=False)
            assert "lock" in said
    pipe = subprocess.PIPE
    with subprocess.Popen([qemu_io, "x.vmdk"], stdin=pipe, stdout=pipe, stderr=pipe) as other:
        try:
            assert other.stdin and other.stdout
            assert other.stdout.read(7) == b"qemu-io"
            with pytest.raises(ImageInUse):
                diskwright.open("x.vmdk", writable=True, policy="trusted")
        finally:
            assert other.stdin
            other.stdin.close()
    with diskwright.open("x.vmdk", policy="trusted") as disk:
        assert disk.read_at((2 << 30) + M, M) == b"2" * M


@pytest.mark.parametrize("subformat", ["monolithicSparse", *SPLIT])
def test_the_status_is_that_of_qemu(subformat: str, here: Path, peer: Any) -> None:
    shell(here, peer("qemu-img"), "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}",
          "x.vmdk", "3G")  # fmt: skip
    shell(here, peer("qemu-io"), "-c", "write -q 1M 64k", "-c", "write -q 2200M 64k", "x.vmdk")
    theirs = shell(here, peer("qemu-img"), "map", "--output=json", "x.vmdk")
    assert theirs == shell_map()


def shell_map() -> str:
    """What our ``map`` says, in the same words."""

    async def work(driver: Driver) -> list[str]:
        node = await open_disk(driver, "x.vmdk", gate=Gate("trusted"))
        lines = []
        async for part in all_status(node):
            at = f', "offset": {part.offset}' if part.offset >= 0 else ""
            flags = ", ".join(
                f'"{key}": {str(value).lower()}'
                for key, value in (
                    ("present", part.present), ("zero", part.zero), ("data", part.data),
                    ("compressed", part.compressed),
                )
            )  # fmt: skip
            lines.append(
                f'{{ "start": {part.start}, "length": {part.length}, "depth": {part.depth}, '
                f"{flags}{at}}}"
            )
        await close_disk(node)
        return lines

    return "[" + ",\n".join(run(work)) + "]\n"


def test_a_delta_link_whose_parent_was_written_to(here: Path, peer: Any) -> None:
    qemu_img, qemu_io = peer("qemu-img"), peer("qemu-io")
    shell(here, qemu_img, "create", "-q", "-f", "vmdk", "p.vmdk", "1M")
    shell(here, qemu_io, "-c", "write -q -P 1 0 1M", "p.vmdk")
    diskwright.create(
        "c.vmdk", format="vmdk", options={"backing_file": "p.vmdk", "backing_fmt": "vmdk"}
    )
    with diskwright.open("c.vmdk", policy="trusted") as disk:
        assert disk.read_at(0, 512) == b"\1" * 512
    shell(here, qemu_io, "-c", "write -q -P 2 0 1M", "p.vmdk")
    with pytest.raises(ImageError, match="rebase -u") as caught:
        diskwright.open("c.vmdk", policy="trusted")
    assert "p.vmdk" in str(caught.value) and caught.value.file == "c.vmdk"
    diskwright.open("c.vmdk", backing=False).close()
    Path("raw").write_bytes(bytes(M))
    with pytest.raises(ImageError, match="opened as raw, which has none"):
        diskwright.open("c.vmdk", options={"backing": {"driver": "raw", "file.filename": "raw"}})


def test_a_differencing_vhdx_that_names_its_parent_by_a_windows_path() -> None:
    os.mkdir("vms")
    diskwright.create("vms/p.vhdx", format="vhdx", size=4 * M)
    with diskwright.open("vms/p.vhdx", writable=True) as disk:
        disk.write_at(0, b"p" * 4096)
    diskwright.create("c.vhdx", format="vhdx", options={"parent": "vms/p.vhdx"})

    async def work(driver: Driver) -> None:
        # Over a parent it opens in place, and goes on to write.
        node: Any = await open_disk(driver, "c.vhdx", gate=Gate("trusted"))
        below: Any = node.child("backing")
        assert node.format.parent_identity == below.format.identity
        await reopen(node, writable=True)
        await node.write([512], [b"c" * 512])
        (found,) = await node.read([0], [2048])
        assert bytes(found) == b"p" * 512 + b"c" * 512 + b"p" * 1024
        name = "D:\\Machines\\Base\\..\\p.vhdx"
        await node.run_procedure(node.format.change_backing(name, "vhdx"))
        await close_disk(node)
        with pytest.raises(ImageError, match="--map-path") as caught:
            await open_disk(driver, "c.vhdx", gate=Gate("trusted"))
        assert name in str(caught.value)
        paths = {"d:/machines": "vms", "D:": "/nowhere"}
        with pytest.raises(Refused):
            await open_disk(driver, "c.vhdx", gate=Gate(paths=paths))
        node = await open_disk(driver, "c.vhdx", gate=Gate("trusted", paths=paths))
        (found,) = await node.read([0], [2048])
        assert bytes(found) == b"p" * 512 + b"c" * 512 + b"p" * 1024
        await close_disk(node)

    run(work)


@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_a_split_image_grows_by_files_of_its_own(subformat: str, here: Path, peer: Any) -> None:
    async def grow(driver: Driver, size: int) -> list[str]:
        node: Any = await open_disk(driver, "x.vmdk", writable=True, gate=Gate("trusted"))
        try:
            await node.truncate(size)
            await node.write([node.size - M], [b"e" * M])
            return [str(leaf.options["filename"]) for leaf in own_leaves(node)]
        finally:
            await close_disk(node)

    run(lambda driver: create_image(driver, "x.vmdk", "vmdk", M, {"subformat": subformat}))
    assert len(run(lambda driver: grow(driver, 5 << 30))) == 4
    shell(here, peer("qemu-io"), "-r", "-c", f"read -P 0x65 {(5 << 30) - M} 1M", "x.vmdk")
    files = set(os.listdir(here))
    taken = "x-s004.vmdk" if subformat == "twoGbMaxExtentSparse" else "x-f004.vmdk"
    Path(taken).write_bytes(b"mine")
    grown = run(lambda driver: grow(driver, 7 << 30))
    assert Path(taken).read_bytes() == b"mine", "what is there is passed over"
    assert set(os.listdir(here)) == {*files, taken, taken.replace("4", "5")}
    assert taken.replace("4", "5") in grown and taken not in grown
    for end in (5 << 30, 7 << 30):
        shell(here, peer("qemu-io"), "-r", "-c", f"read -P 0x65 {end - M} 1M", "x.vmdk")


def test_a_thousand_extents_and_too_few_descriptors(here: Path) -> None:
    lines = ["# Disk DescriptorFile", "version=1", "CID=12345678", "parentCID=ffffffff",
             'createType="twoGbMaxExtentFlat"']  # fmt: skip
    for number in range(300):
        with open(f"f{number}", "wb") as file:
            file.truncate(65536)
        lines.append(f'RW 128 FLAT "f{number}" 0')
    Path("x.vmdk").write_text("\n".join([*lines, ""]))
    with diskwright.open("x.vmdk", writable=True, policy="trusted") as disk:
        disk.write_at(100 * 65536 - 512, b"n" * 1024)
        assert disk.read_at(100 * 65536 - 512, 1024) == b"n" * 1024
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            diskwright.open("x.vmdk", policy="trusted")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_source_is_not_emptied_as_an_extent_of_the_target() -> None:
    Path("x-flat.vmdk").write_bytes(b"s" * M)
    options = {"subformat": "monolithicFlat"}
    with pytest.raises(DiskError, match='"write" lock'):
        diskwright.convert(
            "x-flat.vmdk", "x.vmdk", target_format="vmdk", format="raw", options=options
        )
    assert Path("x-flat.vmdk").read_bytes() == b"s" * M
    assert os.listdir(".") == ["x-flat.vmdk"]


@pytest.mark.parametrize(
    ("format", "options"),
    [
        *(("vmdk", {"subformat": name}) for name in (*SPLIT, "monolithicSparse", "vmfsSparse")),
        ("vhdx", {}),
        ("vhdx", {"subformat": "fixed"}),
        ("vhdx", {"parent": "p.vhdx"}),
    ],
)
def test_a_creation_that_fails_at_any_request_leaves_nothing(
    format: str, options: dict[str, str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "parent" in options:
        diskwright.create("p.vhdx", format="vhdx", size=M)
    before = set(os.listdir(here))
    count = fail_at = 0

    def failing(name: str) -> None:
        real = getattr(FileNode, name)

        async def method(self: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return await real(self, *arguments, **named)

        monkeypatch.setattr(FileNode, name, method)

    for name in ("write", "zero", "truncate", "flush"):
        failing(name)
    while True:
        count, fail_at = 0, fail_at + 1
        try:
            run(lambda driver: create_image(driver, "x", format, (2 << 30) + M, options))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert set(os.listdir(here)) == before, f"request {fail_at}"
        else:
            break
    assert fail_at > 3 and count < fail_at
    assert set(os.listdir(here)) > before


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("subformat", SPLIT)
def test_an_opening_that_fails_at_any_read_closes_all(
    subformat: str, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    diskwright.create("x.vmdk", format="vmdk", size=3 << 30, options={"subformat": subformat})
    real = FileNode.read
    count = fail_at = 0

    async def read(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == fail_at:
            raise OSError(errno.EIO, "Input/output error")
        return await real(self, *arguments, **named)

    monkeypatch.setattr(FileNode, "read", read)
    held = descriptors()
    while True:
        count, fail_at = 0, fail_at + 1
        try:
            diskwright.open("x.vmdk", policy="trusted", writable=writable).close()
        except OSError as error:
            assert error.errno == errno.EIO and error.filename
            assert descriptors() == held
        else:
            break
    assert fail_at > 2 and count < fail_at


@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_growing_that_fails_at_any_request_leaves_a_whole_image(
    subformat: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = fail_at = 0

    def failing(name: str) -> None:
        real = getattr(FileNode, name)

        async def method(self: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return await real(self, *arguments, **named)

        monkeypatch.setattr(FileNode, name, method)

    async def grow(driver: Driver) -> None:
        nonlocal count
        node: Any = await open_disk(driver, "x.vmdk", writable=True, gate=Gate("trusted"))
        try:
            count = 0
            await node.truncate(5 << 30)
        finally:
            await close_disk(node)

    for name in ("write", "zero", "truncate", "flush"):
        failing(name)
    orphans = []
    while True:
        done, fail_at = fail_at + 1, 0
        for name in os.listdir(here):
            os.unlink(name)
        diskwright.create("x.vmdk", format="vmdk", size=M, options={"subformat": subformat})
        with diskwright.open("x.vmdk", writable=True, policy="trusted") as disk:
            disk.write_at(0, b"g" * 512)
        fail_at = done
        with suppress(OSError):
            run(grow)
        fail_at = 0
        with diskwright.open("x.vmdk", policy="trusted") as disk:
            size = disk.size
            assert size in (M, 5 << 30)
            assert disk.read_at(0, 1024) == b"g" * 512 + bytes(512)
        text = Path("x.vmdk").read_text()
        made = set(os.listdir(here)) - {"x.vmdk"}
        named = {name for name in made if f'"{name}"' in text}
        assert len(named) == (1 if size == M else 3)
        if made != named:
            orphans.append(done)
        if count < done:
            break
        fail_at = done
    assert size == 5 << 30 and made == named and done > 5
    # Only once the image itself was being changed.
    assert orphans == list(range(orphans[0], orphans[-1] + 1)) and orphans[0] > 5


def test_an_extent_that_is_only_read_is_opened_so(here: Path) -> None:
    """Of two images at once; what may be written stays writable, and a second opening as well."""
    Path("common").write_bytes(b"c" * M)
    for name in ("one", "two"):
        Path(f"{name}-own").write_bytes(bytes(M))
        Path(f"{name}.vmdk").write_text(
            f'version=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
            f'RDONLY 2048 FLAT "common" 0\nRW 2048 FLAT "{name}-own" 0\n'
        )

    async def work(driver: Driver) -> None:
        nodes = []
        for name in ("one", "two"):
            node = await open_disk(driver, f"{name}.vmdk", gate=Gate("trusted"))
            await reopen(node, writable=True)
            await node.write([M], [b"x" * 512])
            await close_disk(node)
            nodes.append(
                await open_disk(driver, f"{name}.vmdk", writable=True, gate=Gate("trusted"))
            )
        for node in nodes:
            common, own = node.child("extent.0"), node.child("extent.1")
            assert common and common.read_only and own and not own.read_only
        for node in nodes:
            with pytest.raises(PermissionError, match="RDONLY"):
                await node.write([M - 512], [b"x" * 1024])
            await node.write([2 * M - 512], [b"y" * 512])
            await node.flush()
            await close_disk(node)

    run(work)
    assert Path("common").read_bytes() == b"c" * M
    assert Path("two-own").read_bytes() == b"x" * 512 + bytes(M - 1024) + b"y" * 512
    # Under another name it is the same file.
    os.symlink("common", "other")
    text = Path("one.vmdk").read_text().replace('"one-own"', '"other"')
    Path("three.vmdk").write_text(text)
    with pytest.raises(ImageError, match="read-only"):
        diskwright.open("three.vmdk", writable=True, policy="trusted")


def test_zeroes_over_extents_beside_the_grid(here: Path) -> None:
    """Grains that begin on no grid make one unit of the disk; zeroes reach all of it."""
    diskwright.create("b", format="vmdk", size=8 << 30, options={})
    Path("a").write_bytes(b"a" * 512_000)
    Path("x.vmdk").write_text(
        'version=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="custom"\n'
        'RW 1000 FLAT "a" 0\nRW 16777216 SPARSE "b"\n'
    )
    with diskwright.open("x.vmdk", writable=True, policy="trusted") as disk:
        for at in (M, (5 << 30) - 7, (8 << 30) - M):
            disk.write_at(at, b"z" * 200_000)
        disk.zero(5000, 7 << 30)
        for at in (M, (5 << 30) - 7):
            assert disk.read_at(at, 200_000) == bytes(200_000)
        assert disk.read_at(4999, 2) == b"a\0"
        assert disk.read_at((8 << 30) - M, 200_000) == b"z" * 200_000
        disk.zero(0, disk.size)
        assert disk.read_at((8 << 30) - M, M) == bytes(M)
