"""Hostile qcow2 images by bytes alone, beyond what tests/fuzz does to all formats."""

from __future__ import annotations

import struct
import time

import pytest

from diskwright.errors import CorruptImage, DiskError, ImageError, MalformedImage
from diskwright.formats import qcow2
from sansio.machine import Machine
from sansio.test_qcow2_cross import made, own_check


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
