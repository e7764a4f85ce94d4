"""Compressed clusters of qcow2: read, overwritten, dropped, and what a broken descriptor may do."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from diskwright.codecs import zstd
from diskwright.contract import DISCARD, WRITE_ZERO
from diskwright.errors import CorruptImage, DamagedData, UnsupportedFeature
from diskwright.formats import qcow2
from sansio import oracle
from sansio.machine import Machine
from sansio.test_qcow2_cross import made, own_check, workload

COPIED, PACKED = 1 << 63, 1 << 62


def content(seed: int, size: int) -> bytes:
    """Bytes of which some compress well, some not at all, and some are zero."""
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        count = rng.randrange(1, size // 4)
        kind = rng.random()
        if kind < 0.2:
            out += bytes(count)
        elif kind < 0.4:
            out += rng.randbytes(count)
        else:
            out += (b"%x " % rng.getrandbits(64) * (count // 8 + 1))[:count]
    return bytes(out[:size])


def compressed(tmp_path: Path, data: bytes, *options: str, packed: bool = True) -> bytes:
    """An image of ``data`` by qemu-img."""
    (tmp_path / "data.raw").write_bytes(data)
    path = tmp_path / "made.qcow2"
    given = [part for option in options for part in ("-o", option)]
    flags = ["-c"] if packed else []
    oracle.ok(
        "qemu-img", "convert", *flags, "-f", "raw", "-O", "qcow2", *given,
        str(tmp_path / "data.raw"), str(path),
    )  # fmt: skip
    return path.read_bytes()


def agrees(tmp_path: Path, file: bytes, model: bytes) -> None:
    """qemu-img finds nothing, counts the same and reads the same; so does our own check."""
    path = tmp_path / "result.qcow2"
    path.write_bytes(file)
    report = oracle.check(path)
    mine = own_check(file)
    assert (mine.corruptions, mine.leaks, mine.findings) == (0, 0, [])
    told = mine.report(str(path), "qcow2").to_dict()
    assert {key: report[key] for key in told} == told
    assert oracle.raw(path, tmp_path / "out.raw") == model


@oracle.needs_qemu
@pytest.mark.parametrize(
    ("cluster", "bits", "kind"),
    [(512, 1, "zlib"), (512, 64, "zstd"), (4096, 2, "zstd"), (65536, 4, "zlib")],
)
def test_what_qemu_img_compressed_is_read_and_rewritten(
    tmp_path: Path, cluster: int, bits: int, kind: str
) -> None:
    size = min(60 * cluster, 2 << 20) + 1536
    data = content(cluster + bits, size)
    options = f"cluster_size={cluster},refcount_bits={bits},compression_type={kind}"
    machine = Machine(compressed(tmp_path, data, options))
    machine.open(qcow2.DRIVER)
    assert machine.read(0, size) == data
    assert machine.read(cluster + 7, cluster) == data[cluster + 7 : 2 * cluster + 7]
    assert any(extent.kind == 3 for _, extent in machine.extents(0, size))
    model = bytearray(data)
    workload(machine, model, bits, 60)
    agrees(tmp_path, machine.close(), model)


@oracle.needs_qemu
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_dropping_compressed_clusters_frees_what_they_shared(tmp_path: Path, compat: str) -> None:
    cluster, size = 4096, 64 * 4096
    data = b"".join(b"%d " % i * 2000 for i in range(64))[:size].ljust(size, b"x")
    machine = Machine(compressed(tmp_path, data, f"cluster_size={cluster},compat={compat}"))
    image = machine.open(qcow2.DRIVER)
    model = bytearray(data)
    for first, count, kind in ((3, 2, WRITE_ZERO), (10, 30, DISCARD), (63, 1, DISCARD)):
        if not machine.change(first * cluster, count * cluster, kind):
            machine.write(first * cluster, bytes(count * cluster))
        model[first * cluster : (first + count) * cluster] = bytes(count * cluster)
        machine.flush()
    assert machine.read(0, size) == model
    machine.run(image.resize(20 * cluster + 512, shrink=True))
    machine.run(image.resize(40 * cluster))
    model[20 * cluster + 512 :] = bytes(20 * cluster - 512)
    assert machine.read(0, 40 * cluster) == model
    agrees(tmp_path, machine.close(), model)
    machine.run(image.make_empty())
    agrees(tmp_path, machine.close(), bytes(40 * cluster))


@oracle.needs_qemu
def test_growth_shows_nothing_behind_the_old_end(tmp_path: Path) -> None:
    """A writer may have packed anything behind the end of the disk."""
    data = b"ab" * 2048
    file = bytearray(compressed(tmp_path, data, "cluster_size=4096"))
    file[24:32] = (1024).to_bytes(8, "big")
    machine = Machine(bytes(file))
    image = machine.open(qcow2.DRIVER)
    machine.run(image.resize(4096))
    assert machine.read(0, 4096) == data[:1024] + bytes(3072)
    agrees(tmp_path, machine.close(), data[:1024] + bytes(3072))


@oracle.needs_qemu
def test_dirty_refcounts_are_rebuilt_with_shared_clusters(tmp_path: Path) -> None:
    data = content(5, 1 << 20)
    options = "cluster_size=4096,lazy_refcounts=on"
    file = bytearray(compressed(tmp_path, data, options))
    file[79] |= 1
    machine = Machine(bytes(file))
    machine.open(qcow2.DRIVER)
    machine.write(5000, b"new")
    model = bytearray(data)
    model[5000:5003] = b"new"
    agrees(tmp_path, machine.close(), model)


def entry_of(machine: Machine, index: int) -> int:
    table = machine.format.l2_offset(0)
    return int.from_bytes(machine.slots["file"][table + 8 * index :][:8], "big")


def by_hand(packed: bytes, bits: int = 12) -> tuple[Machine, int]:
    """An image whose first cluster is ``packed``, and the place of its descriptor."""
    machine = made(64 << bits, cluster_size=1 << bits)
    machine.write(0, b"placeholder")
    machine.write(5 << bits, b"kept")
    file = bytearray(machine.close())
    l2 = machine.format.l2_offset(0)
    host = int.from_bytes(file[l2 : l2 + 8], "big") & ~COPIED
    file[host : host + len(packed)] = packed
    sectors = max(len(packed) - 1, 0) >> 9
    descriptor = PACKED | sectors << 62 - (bits - 8) | host
    file[l2 : l2 + 8] = descriptor.to_bytes(8, "big")
    other = Machine(bytes(file))
    other.open(qcow2.DRIVER)
    return other, l2


def deflated(data: bytes, window: int = -12) -> bytes:
    codec = zlib.compressobj(9, zlib.DEFLATED, window)
    return codec.compress(data) + codec.flush()


def test_damaged_data_are_an_error_and_can_be_replaced() -> None:
    plain = random.Random(3).randbytes(64) * 64
    good = deflated(plain)
    machine, _ = by_hand(good)
    assert machine.read(0, 4096) == plain
    far = random.Random(3).randbytes(8192) * 2  # no such distance fits into a window of 4 KiB
    machine, _ = by_hand(deflated(far, -15), 14)
    assert machine.read(0, 16384) == far
    for wrong in (b"", good[:-40], b"\xff" + good[1:], deflated(plain[:4095])):
        machine, _ = by_hand(wrong)
        with pytest.raises(DamagedData):
            machine.read(0, 4096)
        with pytest.raises(DamagedData):  # what is not replaced would be lost
            machine.write(0, b"part")
        machine.write(0, b"whole".ljust(4096, b"!"))
        machine.flush()
        assert machine.read(0, 5) == b"whole"
        result = own_check(machine.close())
        assert (result.corruptions, result.leaks) == (0, 0)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_bomb_fills_a_cluster_and_no_more(kind: str) -> None:
    codec = zstd.Zstd() if kind == "zstd" else None
    bomb = codec.pack(bytes(1 << 26)) if codec else deflated(bytes(1 << 26))
    unpack = codec.unpack if codec else by_hand(b"")[0].format.codec.unpack
    assert unpack(bomb, 4096) == bytes(4096)


def test_zstd_frames_that_are_damaged_short_or_greedy_are_refused() -> None:
    codec = zstd.Zstd()
    plain = content(9, 65536)
    good = codec.pack(plain)
    assert codec.unpack(good + b"\xa5" * 700, 65536) == plain
    greedy = bytes.fromhex("28b52ffd00a8")  # a window of 2 GiB
    for wrong in (b"", bytes(512), good[:-9], good[:30] + b"\0\0" + good[32:], greedy + good[6:],
                  codec.pack(plain[:-1])):
        with pytest.raises(ValueError):
            codec.unpack(wrong, 65536)


def test_without_a_library_zstd_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise ImportError(name)

    zstd._library.cache_clear()
    monkeypatch.setattr(zstd, "import_module", nothing)
    with pytest.raises(UnsupportedFeature, match=r"diskwright\[zstd\]"):
        zstd.Zstd().unpack(b"", 512)
    monkeypatch.undo()
    zstd._library.cache_clear()


def test_a_descriptor_over_metadata_is_not_freed() -> None:
    shift = 62 - (12 - 8)
    for target in (0, 1, 2, 3, "l2"):
        machine, l2 = by_hand(deflated(b"a" * 4096))
        host = l2 if target == "l2" else int(target) << 12
        file = bytearray(machine.slots["file"])
        file[l2 : l2 + 8] = (PACKED | 1 << shift | host + 300).to_bytes(8, "big")
        machine = Machine(bytes(file))
        machine.open(qcow2.DRIVER)
        for attempt in (
            lambda m=machine: m.write(0, bytes(4096)),
            lambda m=machine: m.discard(0, 4096),
            lambda m=machine: m.zero(0, 4096),
            lambda m=machine: m.run(m.format.make_empty()),
        ):
            with pytest.raises(CorruptImage):
                attempt()
        machine.write(6 << 12, b"elsewhere")
        assert bytes(machine.slots["file"])[:l2] == bytes(file)[:l2]


@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_a_descriptor_outside_of_the_file_is_refused(bits: int) -> None:
    shift = 62 - (bits - 8)
    for host, sectors in (
        ((1 << shift) - 1, 0),
        ((1 << shift) - 1, (1 << 62 - shift) - 1),
        (1 << 50, 3 if bits > 9 else 1),
    ):
        machine, l2 = by_hand(b"", bits)
        file = bytearray(machine.slots["file"])
        entry = COPIED | PACKED | sectors << shift | host & (1 << shift) - 1
        file[l2 : l2 + 8] = entry.to_bytes(8, "big")
        machine = Machine(bytes(file))
        machine.open(qcow2.DRIVER)
        with pytest.raises(CorruptImage):
            machine.read(0, 512)
        with pytest.raises(CorruptImage):
            machine.write(0, bytes(1 << bits))
        with pytest.raises(CorruptImage):
            machine.discard(0, 1 << bits)
        assert machine.read(5 << bits, 4) == b"kept"


@oracle.needs_qemu
@pytest.mark.parametrize(
    ("cluster", "bits", "kind"),
    [(512, 1, "zlib"), (512, 2, "zstd"), (4096, 16, "zlib"), (65536, 64, "zstd")],
)
def test_what_is_packed_here_is_read_by_qemu_img(
    tmp_path: Path, cluster: int, bits: int, kind: str
) -> None:
    """Random compressed writes, some of which fail, between all others."""
    size = min(80 * cluster, 3 << 20) + 512
    machine = made(size, cluster_size=cluster, refcount_bits=bits, compression_type=kind)
    rng = random.Random(cluster * bits)
    model = bytearray(size)
    source = content(bits, size)
    for _ in range(50):
        what = rng.random()
        first = rng.randrange(0, -(-size // cluster)) * cluster
        length = min(cluster * rng.choice([1, 1, 2, 7]), size - first)
        data = source[first : first + length]
        if what < 0.5:
            fails = what < 0.1
            if machine.write_packed(first, data, fails) and not fails:
                model[first : first + length] = data
        elif what < 0.65:
            machine.write(first, b"!" * length)
            model[first : first + length] = b"!" * length
        elif what < 0.85 and machine.discard(first, length):
            model[first : first + length] = bytes(length)
        else:
            machine.flush()
        assert machine.read(first, length) == model[first : first + length]
    assert machine.read(0, size) == model
    agrees(tmp_path, machine.close(), model)


def test_packed_clusters_share_host_clusters_as_far_as_counts_reach() -> None:
    data = b"".join(bytes([65 + i]) * 4096 for i in range(26))
    used = {}
    for bits in (1, 2, 16):
        machine = made(26 * 4096, cluster_size=4096, refcount_bits=bits)
        before = -(-len(machine.close()) // 4096)
        assert machine.write_packed(0, data)
        file = machine.close()
        used[bits] = -(-len(file) // 4096) - before
        assert machine.read(0, len(data)) == data
        assert own_check(file).findings == []
    # One of them is the L2 table.
    assert used == {1: 27, 2: 10, 16: 2}


def test_what_is_allocated_is_not_packed() -> None:
    machine = made(8 * 4096, cluster_size=4096)
    plain = b"a" * 4096
    machine.write(0, b"data")
    assert machine.write_packed(4096, plain)
    machine.zero(2 * 4096, 4096)
    assert not machine.write_packed(0, plain)
    assert not machine.write_packed(4096, plain)
    assert machine.write_packed(2 * 4096, plain)
    assert not machine.write_packed(2 * 4096, plain * 2)
    assert machine.read(0, 4 * 4096) == b"data".ljust(4096, b"\0") + plain * 2 + bytes(4096)
    assert own_check(machine.close()).findings == []


def test_space_of_freed_units_is_not_filled_up_by_the_next() -> None:
    """The cluster that was filled last may be gone, and be another's."""
    machine = made(64 * 4096, cluster_size=4096)
    assert machine.write_packed(0, b"a" * 4096)
    machine.discard(0, 4096)
    machine.flush()
    machine.flush()
    machine.write(4096, b"z" * 4096)
    assert machine.write_packed(2 * 4096, b"b" * 4096)
    assert machine.read(4096, 2 * 4096) == b"z" * 4096 + b"b" * 4096
    assert own_check(machine.close()).findings == []
