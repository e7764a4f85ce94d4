"""Hostile qcow2 images by bytes alone: every field at its borders ends in an answer or in an error
of ours, quickly."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator

import pytest

from diskwright.errors import CorruptImage, DiskError, ImageError, MalformedImage
from diskwright.formats import qcow2
from sansio.machine import Machine
from sansio.test_qcow2_cross import made, own_check

FIELDS = [
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
    ("incompatible_features", 72, 8),
    ("compatible_features", 80, 8),
    ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
    ("extension type", 112, 4),
    ("extension length", 116, 4),
]


def borders(width: int, value: int) -> Iterator[int]:
    top = (1 << 8 * width) - 1
    powers = [1 << bit for bit in (3, 5, 8, 9, 12, 16, 21, 22, 24, 31, 32, 40, 55, 56, 62, 63)]
    found = {0, 1, top, top - 1, value - 1, value + 1, value * 2}
    found.update(p + d for p in powers for d in (-1, 0, 1))
    return iter(sorted(v for v in found if 0 <= v <= top))


def sample(compat: str, cluster_size: int) -> bytes:
    machine = made(1 << 20, bytes(1 << 20), cluster_size=cluster_size, compat=compat)
    machine.write(0, b"x" * 100_000)
    machine.change(65536, 65536, "zero")
    return machine.close()


def attack(file: bytes) -> None:
    """Open, map, check, read and write; only errors of ours may come out."""
    begin = time.thread_time()
    for options in ({"read-only": True}, {}, {"check": True}):
        machine = Machine(file, bytes(1 << 20))
        machine.limit = 64 << 20
        try:
            image = machine.open(qcow2.DRIVER, **options)
        except (DiskError, OSError):
            continue
        image.info()
        end = min(image.size, 1 << 20)
        actions = [
            lambda m=machine, n=end: m.read(0, n),
            lambda m=machine, n=image.size: list(m.extents(max(n - 4096, 0), min(n, 4096))),
        ]
        if "check" in options:
            actions = [lambda m=machine: m.run(m.format.check())]
        elif not options:
            actions += [
                lambda m=machine, n=end: m.write(n // 3, b"y" * min(70_000, n - n // 3)),
                lambda m=machine, u=image.unit, n=end: m.discard(0, min(u, n)),
                lambda m=machine: m.flush(),
                lambda m=machine: m.close(),
            ]
        for action in actions:
            try:
                if end:
                    action()
            except (DiskError, OSError):
                break
    assert time.thread_time() - begin < 20


@pytest.mark.parametrize(("field", "offset", "width"), FIELDS, ids=[f[0] for f in FIELDS])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_header_fields(field: str, offset: int, width: int, compat: str) -> None:
    if compat == "0.10" and 72 <= offset < 112:
        pytest.skip("not in version 2")
    file = sample(compat, 4096)
    value = int.from_bytes(file[offset : offset + width], "big")
    for new in borders(width, value):
        attack(file[:offset] + new.to_bytes(width, "big") + file[offset + width :])


@pytest.mark.parametrize("table", ["l1", "l2", "reftable", "refblock"])
def test_table_entries(table: str) -> None:
    machine = made(1 << 20, bytes(1 << 20), cluster_size=4096)
    machine.write(0, b"x" * 100_000)
    file = machine.close()
    h = machine.format.header
    mask = (1 << 56) - 512
    l1_entry, reftable_entry = (
        struct.unpack_from(">Q", file, at)[0] for at in (h.l1_offset, h.reftable_offset)
    )
    at, width = {
        "l1": (h.l1_offset, 8),
        "l2": (l1_entry & mask, 8),
        "reftable": (h.reftable_offset, 8),
        "refblock": (reftable_entry, 2),
    }[table]
    value = int.from_bytes(file[at : at + width], "big")
    places = [0, h.l1_offset, h.reftable_offset, reftable_entry, l1_entry & mask, len(file)]
    values = {*borders(width, value), *(v | flag for v in places for flag in (0, 1 << 63, 1 << 62))}
    for new in values:
        if new < 1 << 8 * width:
            attack(file[:at] + new.to_bytes(width, "big") + file[at + width :])


def test_all_entries_alike() -> None:
    """Every L1 entry names one L2 table, every L2 entry one cluster."""
    machine = made(64 << 20, cluster_size=512)
    machine.write(0, b"x" * 512)
    file = bytearray(machine.close())
    h = machine.format.header
    first = file[h.l1_offset : h.l1_offset + 8]
    file[h.l1_offset : h.l1_offset + 8 * h.l1_size] = first * h.l1_size
    attack(bytes(file))
    result = own_check(bytes(file))
    assert result.corruptions > 0 and len(result.findings) <= 10_000


@pytest.mark.parametrize("length", [0, 3, 4, 71, 72, 103, 104, 511, 512, 4096, 9000])
def test_cut_short(length: int) -> None:
    attack(sample("1.1", 4096)[:length])
    attack(sample("0.10", 4096)[:length])


def test_largest_tables_of_nothing() -> None:
    """L1 and refcount table of the largest sizes, in a file that does not hold them."""
    file = bytearray(sample("1.1", 65536))
    struct.pack_into(">I", file, 36, (32 << 20) // 8)
    struct.pack_into(">I", file, 56, (8 << 20) // 65536)
    attack(bytes(file))
    struct.pack_into(">I", file, 36, (32 << 20) // 8 + 1)
    with pytest.raises(MalformedImage) as caught:
        Machine(bytes(file)).open(qcow2.DRIVER)
    assert (caught.value.field, caught.value.offset) == ("l1_size", 36)


@pytest.mark.parametrize("seed", range(6))
def test_random_damage(seed: int) -> None:
    rng = random.Random(seed)
    file = sample(rng.choice(["0.10", "1.1"]), rng.choice([512, 4096]))
    head = len(file) if seed % 2 else 4096
    for _ in range(25):
        broken = bytearray(file)
        for _ in range(rng.choice([1, 3, 20])):
            value = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            broken[rng.randrange(0, head)] = value
        attack(bytes(broken))


def test_errors_name_field_and_offset() -> None:
    file = bytearray(sample("1.1", 4096))
    struct.pack_into(">I", file, 16, 1024)
    with pytest.raises(ImageError) as caught:
        Machine(bytes(file)).open(qcow2.DRIVER)
    assert (caught.value.field, caught.value.offset) == ("backing_file_size", 16)
    assert "field 'backing_file_size', offset 0x10" in str(caught.value)


@pytest.mark.parametrize("checked", [False, True])
def test_a_broken_image_keeps_its_tables(checked: bool) -> None:
    """Counts of zero for everything do not make the allocator hand out the tables."""
    machine = made(1 << 20, cluster_size=4096)
    machine.write(0, b"x" * 100_000)
    file = bytearray(machine.close())
    h = machine.format.header
    (block,) = struct.unpack_from(">Q", file, h.reftable_offset)
    file[block : block + 4096] = bytes(4096)
    machine = Machine(bytes(file))
    if checked:
        machine.open(qcow2.DRIVER)
        with pytest.raises(CorruptImage, match="overlaps with qcow2_header"):
            machine.write(500_000, b"y" * 300_000)
        assert machine.slots["file"] == file
        return
    image = machine.open(qcow2.DRIVER, **{"overlap-check": "none"})
    before = image.l1[0], image.header.l1_offset
    machine.write(500_000, b"y" * 300_000)
    machine.flush()
    again = Machine(bytes(machine.slots["file"])).open(qcow2.DRIVER)
    assert (again.l1[0], again.header.l1_offset) == before
    assert machine.read(500_000, 300_000) == b"y" * 300_000
