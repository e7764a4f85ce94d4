"""A check in bounded memory: several passes find what one pass finds."""

from __future__ import annotations

import random
import struct

import pytest

from diskwright.errors import UnsupportedFeature
from diskwright.findings import CheckResult
from diskwright.formats import qcow2
from diskwright.formats.qcow2.check import checking, counts, references, tablewalk
from diskwright.formats.qcow2.check.checking import Checker
from diskwright.formats.qcow2.check.counts import CHUNK, Counts
from diskwright.formats.qcow2.check.meter import Meter
from sansio.machine import Machine
from sansio.test_qcow2_cross import made
from scale.images import Layout

CLUSTER = 512
SMALL = 1 << 9


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 512 counts."""
    for module in (counts, checking, tablewalk):
        for name, value in (("CHUNK", SMALL), ("CHUNK_BITS", 9), ("MOST_CHUNKS", 1)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def spread() -> bytes:
    """An image of 512-byte clusters whose host clusters are far apart: five chunks of counts."""
    machine = made(4 << 20, cluster_size=CLUSTER)
    machine.write(0, b"a" * (200 * CLUSTER))
    file = bytearray(machine.close())
    (l1,) = struct.unpack_from(">Q", file, 40)
    (l2,) = struct.unpack_from(">Q", file, l1)
    l2 &= (1 << 56) - 512
    file.extend(bytes(5 * SMALL * CLUSTER - len(file)))
    for index in range(1, 50):
        place = ((index % 4 + 1) * SMALL + index) * CLUSTER
        struct.pack_into(">Q", file, l2 + 8 * index, place | 1 << 63)
    return bytes(file)


def checked(file: bytes, most: int | None) -> tuple[CheckResult, Checker]:
    machine = Machine(file)
    image = machine.open(qcow2.DRIVER, check=True)
    checker = Checker(image, Meter(), most)
    return machine.run(checker.meter.run(checker.run())), checker


@pytest.mark.usefixtures("small")
def test_passes_find_the_same() -> None:
    file = spread()
    once, checker = checked(file, None)
    assert checker.meter.passes == 1 and once.corruptions and once.leaks
    for most in (1, 2, 3):
        several, checker = checked(file, most)
        assert checker.meter.passes > 1
        assert several.report("", "").to_dict() == once.report("", "").to_dict()
        assert several.findings == once.findings


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("snapshots", [0, 2])
def test_a_pass_reads_what_it_counts(snapshots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many passes: each table in the first of them and in one more."""
    monkeypatch.setattr(references, "_READ_BYTES", 2 * CLUSTER)
    layout = Layout(4 << 20, cluster_bits=9, snapshots=snapshots)
    file = bytearray(layout.length)
    for offset, data in layout.parts():
        file[offset : offset + len(data)] = data
    found, _ = checked(bytes(file), 2)
    assert not (found.corruptions or found.leaks) and found.passes > 5
    again = bool(snapshots)  # for the flags
    structures = layout.blocks + (1 + snapshots) * layout.l1_clusters * found.passes
    read = (2 + again) * layout.tables + structures + 4 * found.passes
    assert (2 * layout.tables) * CLUSTER < found.bytes_read <= read * CLUSTER


def repaired() -> bytes:
    machine = Machine(spread())
    image = machine.open(qcow2.DRIVER, check=True)
    assert machine.run(image.check("all")).corruptions_fixed
    return machine.close()


def test_a_repair_packs_counts(request: pytest.FixtureRequest) -> None:
    wanted = repaired()
    request.getfixturevalue("small")
    assert repaired() == wanted


@pytest.mark.usefixtures("small")
def test_a_repair_keeps_no_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_MOST_PACKED", 30)
    with pytest.raises(UnsupportedFeature, match="clusters in use"):
        repaired()


@pytest.mark.usefixtures("small")
def test_packed_counts_are_those_that_were_given() -> None:
    some = Counts()
    plain: dict[int, int] = {}
    rng = random.Random(5)
    for _ in range(3000):
        first, times = rng.randrange(4 * SMALL), rng.choice((1, 1, 1, 2, 100))
        stop = first + rng.choice((1, 1, 300))
        some.add_run(first, stop, times)
        for cluster in range(first, stop):
            plain[cluster] = plain.get(cluster, 0) + times
        assert some.get(first) == plain[first]
    assert all(some.get(cluster) == plain.get(cluster, 0) for cluster in range(5 * SMALL))
    used = [c for start, stop in some.used(0, 5 * SMALL) for c in range(start, stop)]
    assert used == sorted(plain) and some.end == max(plain) + 1
    assert list(some.several()) == sorted(c for c, count in plain.items() if count > 1)
    assert some.blocks(8) == {cluster >> 8 for cluster in plain}


def test_counts_of_any_size() -> None:
    some = Counts()
    some.add_run(10, 20, 3)
    some.add_run(5, 15)
    some.add(12, 300)
    some.add_run(CHUNK - 2, CHUNK + 2, 254)
    some.add_run(CHUNK - 1, CHUNK + 1)
    assert [some.get(i) for i in (4, 5, 10, 12, 15, 19, 20)] == [0, 1, 4, 304, 3, 3, 0]
    assert [some.get(CHUNK + i) for i in (-3, -2, -1, 0, 1, 2)] == [0, 254, 255, 255, 254, 0]
    assert list(some.used(0, 2 * CHUNK)) == [(5, 20), (CHUNK - 2, CHUNK), (CHUNK, CHUNK + 2)]
    assert some.part(4, 8) == b"\0\1\1\1" and some.part(10, 14) is None
    assert some.end == CHUNK + 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_narrow_counts(bits: int) -> None:
    from diskwright.formats.qcow2.machine.refblock import empty, narrow

    block = empty(bits, 512)
    for index in range(0, block.entries, 3):
        block.set(index, min(index % 200, (1 << bits) - 1))
    wanted = bytes(block.get(index) for index in range(block.entries))
    assert narrow(bits, block.encode(0, 512)) == wanted
    if bits > 8:
        block.set(7, 256)
        assert narrow(bits, block.encode(0, 512)) is None
