"""Whole-image procedures of qcow2: resize, make-empty, another backing file, dirty images."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from diskwright.errors import CorruptImage, UnsupportedFeature, UsageError
from diskwright.formats import qcow2
from diskwright.formats.qcow2 import header as hd
from diskwright.formats.qcow2.creation import new_header
from diskwright.formats.qcow2.replacing import replace_header
from sansio import oracle
from sansio.machine import Machine
from sansio.test_qcow2_cross import made, own_check, verify, workload

GROWTH = [(512, 4096, 4 << 20), (512, 64 * 512 + 512, 3 << 20), (4096, 1 << 20, (1 << 20) + 512)]


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("backing", [0, 700_000, 4 << 20])
@pytest.mark.parametrize(("cluster_size", "small", "large"), GROWTH)
def test_grow(
    cluster_size: int, small: int, large: int, compat: str, backing: int, tmp_path: Path
) -> None:
    base = random.Random(1).randbytes(backing) if backing else None
    machine = made(small, base, cluster_size=cluster_size, compat=compat)
    model = bytearray((base or b"")[:small].ljust(small, b"\0"))
    workload(machine, model, 4, 20)
    machine.flush()
    machine.run(machine.format.resize(large))
    # What a longer backing file holds there must not show through.
    model.extend(bytes(large - small))
    assert machine.format.size == large
    assert machine.read(0, large) == bytes(model)
    workload(machine, model, 5, 20)
    verify(machine, model, tmp_path)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_grow_preallocated(mode: str, cluster_size: int, tmp_path: Path) -> None:
    small, large = (1 << 20) + 512, 3 << 20
    machine = made(small, cluster_size=cluster_size)
    model = bytearray(small)
    workload(machine, model, 4, 40)
    machine.flush()
    machine.run(machine.format.resize(large, mode))
    model.extend(bytes(large - small))
    assert machine.read(0, large) == bytes(model)
    first = -(-small // cluster_size) * cluster_size
    assert all(extent.kind == 0 for _, extent in machine.extents(first, large - first))
    verify(machine, model, tmp_path)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("small", [512, 100 * 512, 64 * 4096, 700_928])
def test_shrink_and_grow_again(small: int, compat: str, backing: bool, tmp_path: Path) -> None:
    large = 3 << 20
    base = random.Random(1).randbytes(small) if backing else None
    machine = made(large, base, cluster_size=4096, compat=compat)
    model = bytearray((base or b"").ljust(large, b"\0"))
    workload(machine, model, 6, 60)
    machine.flush()
    with pytest.raises(UsageError):
        machine.run(machine.format.resize(small))
    machine.run(machine.format.resize(small, shrink=True))
    assert own_check(bytes(machine.slots["file"])).findings == []
    machine.run(machine.format.resize(large))
    model[small:] = bytes(large - small)
    assert machine.read(0, large) == bytes(model)
    workload(machine, model, 7, 20)
    verify(machine, model, tmp_path)


def test_make_empty(tmp_path: Path) -> None:
    base = random.Random(1).randbytes(1 << 20)
    machine = made(1 << 20, base, cluster_size=512)
    model = bytearray(base)
    workload(machine, model, 6, 60)
    machine.flush()
    machine.run(machine.format.make_empty())
    assert machine.read(0, 1 << 20) == base
    assert all(extent.kind == 2 for _, extent in machine.extents(0, 1 << 20))
    verify(machine, bytearray(base), tmp_path)


@pytest.mark.parametrize("cluster_size", [512, 1024, 65536])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_change_backing(cluster_size: int, compat: str, tmp_path: Path) -> None:
    machine = made(1 << 20, bytes(1 << 20), cluster_size=cluster_size, compat=compat)
    h = machine.format.header
    h.extensions.append((0x12345678, b"kept" * 3))
    for name, fmt in [("another.img", "qcow2"), (None, None), ("third", "raw"), ("x" * 300, "raw")]:
        machine.run(machine.format.change_backing(name, fmt))
        again = Machine(bytes(machine.slots["file"]))
        image = again.open(qcow2.DRIVER)
        assert (image.backing_file, image.backing_format) == (name, fmt if name else None)
        assert again.opened == ([(name, fmt)] if name else [])
        assert image.header.extension(0x12345678) == b"kept" * 3
        assert (image.header.extension(hd.EXT_FEATURE_NAMES) is None) == (
            cluster_size < 8192 or compat == "0.10"
        )
    before = bytes(machine.slots["file"])
    for length, errno in [(1024, 22), (1000, 28)]:
        if length == 1000 and cluster_size > 1024:
            continue
        with pytest.raises(OSError) as caught:
            machine.run(machine.format.change_backing("y" * length, "raw"))
        assert caught.value.errno == errno
    assert bytes(machine.slots["file"]) == before
    assert machine.format.backing_file == "x" * 300


def test_torn_header_rewrite() -> None:
    """Every state between two headers opens with the one backing file or the other."""
    machine = made(1 << 20, bytes(1 << 20), compat="1.1")
    start = bytes(machine.slots["file"])
    machine.log.clear()
    machine.run(machine.format.change_backing("a-much-longer-name" * 40, "qcow2"))
    seen = set()
    file = bytearray(start)
    for entry in machine.log:
        if entry[0] != "write":
            continue
        _, offset, data = entry
        for cut in range(0, len(data), 512):
            torn = bytearray(file)
            torn[offset : offset + cut] = data[:cut]
            again = Machine(bytes(torn))
            image = again.open(qcow2.DRIVER)
            assert image.backing_format == ("raw" if image.backing_file == "base.raw" else "qcow2")
            seen.add(image.backing_file)
        file[offset : offset + len(data)] = data
    assert seen == {"base.raw", "a-much-longer-name" * 40}


# -- header bits


def bits_of(file: bytes) -> tuple[int, int, int]:
    return struct.unpack_from(">QQQ", file, 72)  # type: ignore[return-value]


def test_lazy_refcounts() -> None:
    machine = made(1 << 20, cluster_size=4096, lazy_refcounts=True)
    assert bits_of(machine.slots["file"])[:2] == (0, 1)
    machine.log.clear()
    machine.write(0, b"x" * 8192)
    assert bits_of(machine.slots["file"])[0] == 1
    # The dirty bit was durable before the first byte moved.
    assert machine.log[0][:2] == ("write", 72) and machine.log[1] == ("barrier",)
    machine.flush()
    file = machine.close()
    assert bits_of(file)[0] == 0
    assert own_check(file).findings == []
    # A program that dies leaves it set.
    machine = Machine(file)
    machine.open(qcow2.DRIVER)
    assert bits_of(machine.slots["file"])[0] == 0
    machine.write(400_000, b"y" * 8192)
    assert bits_of(machine.slots["file"])[0] == 1
    machine.run(machine.format.withdraw())
    machine.write(600_000, b"z")
    assert bits_of(machine.slots["file"])[0] == 1


@pytest.mark.parametrize("width", [1, 16, 64])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_dirty_image_is_rebuilt(width: int, cluster_size: int, tmp_path: Path) -> None:
    size = 3 << 20
    machine = made(size, cluster_size=cluster_size, refcount_bits=width, lazy_refcounts=True)
    model = bytearray(size)
    workload(machine, model, 8, 60)
    machine.flush()
    file = machine.slots["file"]
    # All counts are lost.
    for entry in machine.format.reftable:
        if entry:
            file[entry : entry + cluster_size] = bytes(cluster_size)
    reader = Machine(bytes(file))
    reader.open(qcow2.DRIVER, **{"read-only": True})
    assert reader.read(0, size) == bytes(model)
    assert bytes(reader.slots["file"]) == bytes(file)
    again = Machine(bytes(file))
    again.open(qcow2.DRIVER)
    assert bits_of(again.slots["file"])[0] == 0
    assert own_check(bytes(again.slots["file"])).findings == []
    workload(again, model, 9, 40)
    verify(again, model, tmp_path)


def test_dirty_image_with_broken_tables() -> None:
    machine = made(1 << 20, cluster_size=4096, lazy_refcounts=True)
    machine.write(0, b"x" * 8192)
    machine.flush()
    file = machine.slots["file"]
    table = machine.format.l1[0] & ((1 << 56) - 512)
    struct.pack_into(">Q", file, table, (1 << 63) | 0x123000000)
    before = bytes(file)
    with pytest.raises(CorruptImage, match="Could not repair dirty image"):
        Machine(before).open(qcow2.DRIVER)


def test_corrupt_bit() -> None:
    file = bytearray(made(1 << 20).close())
    file[79] |= 2
    with pytest.raises(CorruptImage, match="Image is corrupt; cannot be opened read/write"):
        Machine(bytes(file)).open(qcow2.DRIVER)
    assert Machine(bytes(file)).open(qcow2.DRIVER, **{"read-only": True}).info()["corrupt"]
    assert own_check(bytes(file)).findings == []


def test_unknown_autoclear_bits_are_dropped_first() -> None:
    machine = made(1 << 20)
    machine.write(0, b"x" * 65536)
    file = bytearray(machine.close())
    file[88] = 0x80
    machine = Machine(bytes(file))
    machine.open(qcow2.DRIVER)
    assert bits_of(machine.slots["file"])[2] == 1 << 63
    assert machine.read(0, 10) == b"x" * 10
    assert not next(machine.extents(0, 10))[1].writable
    machine.write(0, b"y")
    assert machine.log[0] == ("write", 72, bytes(24)) and machine.log[1] == ("barrier",)
    assert machine.format.ready
    assert bits_of(machine.close())[2] == 0


def test_unknown_incompatible_bits_by_name() -> None:
    machine = made(1 << 20)
    file = machine.slots["file"]
    # The first entry of the feature table gets another bit's number and name.
    at = bytes(file).index(b"dirty bit") - 2
    file[at : at + 48] = struct.pack(">BB46s", 0, 40, b"quantum clusters")
    struct.pack_into(">Q", file, 72, 1 << 40)
    with pytest.raises(UnsupportedFeature) as caught:
        Machine(bytes(file)).open(qcow2.DRIVER)
    assert str(caught.value) == "Unsupported qcow2 feature(s): quantum clusters"
    struct.pack_into(">Q", file, 72, 1 << 40 | 1 << 63)
    with pytest.raises(UnsupportedFeature) as caught:
        Machine(bytes(file)).open(qcow2.DRIVER)
    assert str(caught.value).endswith(
        "feature(s): quantum clusters, Unknown incompatible feature: 8000000000000000"
    )


def test_header_tail_survives() -> None:
    h = new_header({"size": 1 << 20})
    h.tail = bytes(8) + b"\0" * 7 + b"\7"
    machine = made(1 << 20)
    image = machine.format
    h.l1_offset, h.reftable_offset = image.header.l1_offset, image.header.reftable_offset
    h.reftable_clusters = 1
    machine.slots["file"][: len(h.encode())] = h.encode()
    machine.open(qcow2.DRIVER)
    machine.run(machine.format.change_backing("b" * 100, "raw"))
    image = Machine(bytes(machine.slots["file"])).open(qcow2.DRIVER)
    assert image.header.tail == h.tail
    assert image.backing_file == "b" * 100


# -- what comes later


@oracle.needs_qemu
@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ("extended_l2=on", None),
        ("compression_type=zstd", None),
    ],
)
def test_later_features_show_in_info(options: str, feature: str | None, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    options = options.replace("data.raw", str(tmp_path / "data.raw"))
    oracle.ok("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), "2M")
    oracle.ok("qemu-io", "-c", "write -P 7 4k 128k", str(path))
    file = path.read_bytes()
    machine = Machine(file)
    image = machine.open(qcow2.DRIVER)
    theirs = oracle.json.loads(oracle.ok("qemu-img", "info", "-U", "--output=json", str(path)))
    assert image.info() == theirs["format-specific"]["data"]
    assert not own_check(file).uncovered
    assert own_check(file).findings == []
    if feature is None:
        assert machine.read(4096, 10) == b"\7" * 10
        return
    for attempt in (lambda: machine.read(0, 512), lambda: machine.write(0, b"x")):
        with pytest.raises(UnsupportedFeature) as caught:
            attempt()
        assert caught.value.feature == feature
    assert bytes(machine.slots["file"]) == file


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_a_new_header_stays_in_its_cluster(compat: str) -> None:
    """Without a backing file the length of its name may be anything; extensions that fill the
    cluster have no end mark."""
    machine = made(1 << 20, cluster_size=512, compat=compat)
    machine.write(0, b"data" * 1000)
    file = bytearray(machine.close())
    struct.pack_into(">I", file, 16, 5000)
    length = 72 if compat == "0.10" else 112
    struct.pack_into(">II", file, length, 0x12345678, 512 - length - 8)
    machine = Machine(bytes(file))
    machine.open(qcow2.DRIVER)
    machine.log.clear()
    new = machine.format.header.copy()
    new.set_extension(0x12345678, None)
    machine.run(replace_header(machine.format, new))
    written = [(entry[1], len(entry[2])) for entry in machine.log if entry[0] == "write"]
    assert written == [(0, 512)]
    assert machine.read(0, 4000) == b"data" * 1000
