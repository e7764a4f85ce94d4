"""What keeps a broken or hostile image from being written to, by bytes alone."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from diskwright.engine.kernel import Driver
from diskwright.errors import CorruptImage, DiskError, MalformedImage, UsageError
from diskwright.filters.blkdebug_rules import EVENTS
from diskwright.formats import qcow2
from diskwright.formats.qcow2 import header as hd
from diskwright.graph.mapped import MappedNode
from diskwright.protocols.memory import MemoryNode
from sansio.machine import Machine
from sansio.test_qcow2_cross import made, own_check

CORRUPT = 2


def poked(file: bytes, at: int, data: bytes) -> bytes:
    return file[:at] + data + file[at + len(data) :]


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def field(file: bytes, at: int) -> int:
    value: int = struct.unpack_from(">Q", file, at)[0]
    return value


# -- header
def test_the_last_of_several_backing_formats_counts() -> None:
    machine = made(1 << 20, bytes(1 << 20))
    h = machine.format.header
    h.extensions.append((hd.EXT_BACKING_FORMAT, b"vmdk"))
    file = poked(machine.close(), 0, h.encode())
    again = Machine(file)
    assert again.open(qcow2.DRIVER).backing_format == "vmdk"
    again.run(again.format.change_backing("other", "qcow2"))
    kinds = [kind for kind, _ in Machine(again.close()).open(qcow2.DRIVER).header.extensions]
    assert kinds.count(hd.EXT_BACKING_FORMAT) == 1


@pytest.mark.parametrize(
    ("at", "data", "text"),
    [
        (8, struct.pack(">QI", 116, 0), "Header extension too large"),
        (112, struct.pack(">II", 0, 0xFFFF_FFFF), "Header extension too large"),
        (64, u64(0x1234_5678_90AB_CDEF), "Snapshot table offset invalid"),
        (64, u64(1 << 63), "Snapshot table offset invalid"),
    ],
)
def test_bad_headers(at: int, data: bytes, text: str) -> None:
    file = poked(made(1 << 20).close(), at, data)
    with pytest.raises(MalformedImage, match=text):
        Machine(file).open(qcow2.DRIVER)


def test_only_events_that_blkdebug_knows() -> None:
    tags = set()
    for module in Path(str(hd.__file__)).parent.glob("*.py"):
        source = module.read_text()
        tags |= set(re.findall(r'"((?:l1|l2|refblock|reftable|cluster|cow)_[a-z_]+)"', source))
    tags -= {"cluster_size", "cluster_bits", "l1_size", "l1_table_offset"}
    assert "l2_load" in tags
    assert tags <= set(EVENTS) | {"refcount_bits"}


# -- runtime options
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"l2-cache-entry-size": 100}, "L2 cache entry size must be a power of two between 512"),
        ({"l2-cache-entry-size": 131072}, "and the cluster size \\(65536\\)"),
        ({"cache-size": 1, "l2-cache-size": 2}, "l2-cache-size may not exceed cache-size"),
        ({"cache-size": 1, "refcount-cache-size": 2}, "refcount-cache-size may not exceed"),
        (
            {"cache-size": 9, "l2-cache-size": 2, "refcount-cache-size": 2},
            "may not be set at the same time",
        ),
        ({"cache-clean-interval": -1}, "Cache clean interval too big"),
        ({"cache-clean-interval": 1 << 32}, "Cache clean interval too big"),
    ],
)
def test_runtime_options_that_are_refused(options: dict[str, int], text: str) -> None:
    file = made(1 << 20).close()
    with pytest.raises(UsageError, match=text):
        Machine(file).open(qcow2.DRIVER, **options)


def test_lazy_refcounts_at_open() -> None:
    old = made(1 << 20, compat="0.10").close()
    with pytest.raises(UsageError, match="Lazy refcounts require a qcow2 image"):
        Machine(old).open(qcow2.DRIVER, **{"lazy-refcounts": True})
    for by_header in (False, True):
        file = made(1 << 20, lazy_refcounts=by_header).close()
        for wanted in (False, True):
            machine = Machine(file)
            image = machine.open(qcow2.DRIVER, **{"lazy-refcounts": wanted})
            assert image.info()["lazy-refcounts"] is by_header
            machine.write(0, b"x")
            assert field(bytes(machine.slots["file"]), 72) == wanted  # the dirty bit
            machine.flush()
            closed = machine.close()
            assert field(closed, 72) == 0
            assert own_check(closed).findings == []


# -- entries that point at metadata
def places(file: bytes) -> dict[str, int]:
    """Host offsets of the structures of a small image."""
    l1, reftable = field(file, 40), field(file, 48)
    return {
        "active L1 table": l1,
        "refcount table": reftable,
        "refcount block": field(file, reftable),
        "active L2 table": field(file, l1) & ~(1 << 63),
    }


WHATS = ["active L1 table", "refcount table", "refcount block", "active L2 table"]


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("flags", [1 << 63, 0, 1 << 63 | 1])
def test_no_write_through_entries_that_point_at_metadata(what: str, flags: int) -> None:
    machine = made(1 << 20)
    machine.write(0, b"x" * 200_000)
    file = machine.close()
    at = places(file)
    entry = at[what] | flags
    file = poked(file, at["active L2 table"], u64(entry))
    for change in ("write", "zero", "discard"):
        machine = Machine(file)
        machine.open(qcow2.DRIVER)
        if not flags & 1:
            assert machine.read(0, 512) == file[at[what] : at[what] + 512]
        with pytest.raises(CorruptImage, match=f"overlaps with {what}"):
            if change == "write":
                machine.write(0, b"y" * 512)
            elif change == "zero":
                machine.zero(0, 65536, unmap=True)
            else:
                machine.discard(0, 65536)
        assert bytes(machine.slots["file"]) == file
        with pytest.raises(CorruptImage):
            machine.run(machine.format.make_empty())
        assert bytes(machine.slots["file"]) == file


def test_an_entry_for_the_place_of_the_header_is_unallocated() -> None:
    machine = made(1 << 20)
    machine.write(0, b"x")
    file = machine.close()
    file = poked(file, places(file)["active L2 table"], u64(1 << 63))
    machine = Machine(file)
    machine.open(qcow2.DRIVER)
    machine.write(0, b"y" * 512)
    assert machine.close()[:65536] == file[:65536]


def test_a_place_that_was_metadata_once_is_no_overlap() -> None:
    machine = made(8 << 20, cluster_size=4096)
    for offset in range(0, 8 << 20, 1 << 20):
        machine.write(offset, b"x" * 4096)
    machine = Machine(machine.close())
    machine.open(qcow2.DRIVER)
    assert machine.read(0, 1) == b"x"
    machine.run(machine.format.make_empty())
    for offset in range(0, 4 << 20, 4096):
        machine.write(offset, b"y" * 4096)
        if offset % (1 << 18) == 0:
            machine.flush()
    for offset in range(0, 4 << 20, 4096):
        machine.write(offset, b"z" * 4096)
    assert own_check(machine.close()).findings == []


# -- the corrupt bit
def bad_refblock() -> tuple[bytes, int]:
    """An image whose second refcount block has an impossible place, and the guest offset of a
    cluster that only it could count."""
    machine = made(1 << 20, cluster_size=1024, refcount_bits=64)
    machine.write(0, b"x" * (124 << 10))
    file = machine.close()
    return poked(file, field(file, 48) + 8, u64(field(file, field(file, 48)) + 512)), 200 << 10


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_mark_corrupt(compat: str) -> None:
    machine = made(1 << 20, compat=compat)
    machine.write(0, b"x" * 1000)
    machine.flush()
    machine.run(machine.format.mark_corrupt())
    assert machine.format.mark_corrupt() is None
    assert machine.read(0, 1000) == b"x" * 1000
    for change in (lambda: machine.write(0, b"y"), lambda: machine.discard(0, 65536)):
        with pytest.raises(OSError, match="corrupt") as caught:
            change()
        assert caught.value.errno == errno.EIO
    file = bytes(machine.slots["file"])
    if compat == "1.1":
        assert field(file, 72) & CORRUPT
        with pytest.raises(CorruptImage):
            Machine(file).open(qcow2.DRIVER)


def test_a_node_marks_the_image_that_a_write_found_corrupt() -> None:
    file, beyond = bad_refblock()
    driver = Driver()

    async def work() -> bytes:
        memory = MemoryNode(driver, file)
        assert qcow2.DRIVER.open is not None
        format, opening = qcow2.DRIVER.open({})
        node = MappedNode(driver, "qcow2", format, {"file": memory})
        await node.run_procedure(opening, whole_image=False)
        await node.write([0], [b"a" * 512])
        with pytest.raises(CorruptImage) as caught:
            await node.write([beyond], [b"b" * 1024])
        assert str(caught.value).startswith("qcow2: Marking image as corrupt: Refblock offset 0x")
        for offset in (0, beyond):
            with pytest.raises(OSError, match="corrupt"):
                await node.write([offset], [b"c" * 512])
        (found,) = await node.read([0], [512])
        assert bytes(found) == b"a" * 512
        await node.flush()
        await node.close()
        (raw,) = await memory.read([0], [memory.size])
        return bytes(raw)

    after = driver.run(work())
    assert field(after, 72) == CORRUPT
    with pytest.raises(DiskError):
        Machine(after).open(qcow2.DRIVER)
    assert Machine(after).open(qcow2.DRIVER, **{"read-only": True}).corrupt


# -- old bytes
class Device(Machine):
    """Keeps its length and what it holds."""

    def _serve(self, request: object) -> object:
        if type(request).__name__ == "Truncate" and request.size == 0:  # type: ignore[attr-defined]
            raise OSError(errno.EINVAL, "Invalid argument")
        return super()._serve(request)


@pytest.mark.parametrize("cluster_size", [512, 65536, 2 << 20])
def test_nothing_old_is_left_inside_of_the_structures(cluster_size: int) -> None:
    machine = Device(b"\xa5" * (16 << 20))
    machine.run(qcow2.create_new({"size": 1 << 20, "cluster_size": cluster_size}))
    image = machine.open(qcow2.DRIVER, zero_beyond_end=False)
    end = (image.header.l1_offset // cluster_size + 1) * cluster_size
    if cluster_size == 512:
        end = image.header.l1_offset + 8 * image.header.l1_size
    assert b"\xa5" not in machine.slots["file"][:end]
    machine.run(image.resize(8 << 20))
    assert machine.read(0, 8 << 20) == bytes(8 << 20)


