"""What a repair marks in stored bitmaps: bits are added, each state on the disk is good, and a mark
is durable before the repair goes on."""

from __future__ import annotations

import random
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from diskwright.formats import qcow2
from diskwright.formats.qcow2.bitmaps.mark import Marker
from sansio.machine import Machine
from sansio.test_qcow2_bitmaps import Disk
from sansio.test_qcow2_crash import crash
from sansio.test_qcow2_cross import made, own_check

CLUSTER, GRAIN = 512, 512
# A cluster of bits is 4096 bits here, which is 2 MiB of the disk.
PART = 8 * CLUSTER * GRAIN
SIZE = 3 * PART + 5 * GRAIN
AUTOCLEAR_AT = 88


def stored(*written: tuple[int, int], enabled: bool = True) -> bytes:
    """An image with the bitmap ``one``, in which these ranges are dirty."""
    machine = made(SIZE, cluster_size=CLUSTER)
    disk = Disk(machine)
    disk.add("one", GRAIN, enabled=enabled)
    for offset, length in written:
        disk.write(offset, b"\1" * length)
    disk.run(machine.format.close())
    return bytes(machine.slots["file"])


def marked(file: bytes, *ranges: tuple[int, int]) -> Machine:
    """The machine that marked these ranges, with all that it wrote in its log."""
    machine = Machine(file)
    image = machine.open(qcow2.DRIVER, check=True)

    def take(count: int) -> Any:
        start = len(machine.slots["file"]) // CLUSTER
        machine.slots["file"].extend(bytes(count * CLUSTER))
        taken.extend(range(start, start + count))
        yield from ()
        return list(range(start, start + count))

    taken: list[int] = []
    places: Any = SimpleNamespace(image=image, take=take)
    marker = Marker(places)
    machine.log.clear()
    for start, end in ranges:
        machine.run(marker.mark(start, end))
        assert not machine.log or machine.log[-1][0] == "barrier"
    return machine


def dirty(file: bytes) -> set[int]:
    machine = Machine(file)
    machine.open(qcow2.DRIVER)
    return Disk(machine).dirty("one")


def grains(*ranges: tuple[int, int]) -> set[int]:
    return {
        grain for start, end in ranges for grain in range(start // GRAIN, (end - 1) // GRAIN + 1)
    }


RANGES = [
    [(0, 1)],
    [(GRAIN - 1, GRAIN + 1)],
    [(100 * GRAIN, 3000 * GRAIN)],
    [(PART - GRAIN, PART + GRAIN)],  # the end of one cluster of bits and the start of the next
    [(PART, 2 * PART)],  # all of one: no cluster is needed
    [(10, 3 * PART)],
    [(SIZE - 1, SIZE + CLUSTER)],  # the last cluster of the disk may be longer than the disk
    [(0, GRAIN), (PART, PART + 1), (7 * GRAIN, 8 * GRAIN)],
    [(5, 5)],
]


@pytest.mark.parametrize("ranges", RANGES, ids=str)
@pytest.mark.parametrize("before", [[], [(3 * GRAIN, GRAIN), (PART + GRAIN, PART // 2)]])
def test_bits_are_added_and_every_crash_state_is_good(
    ranges: list[tuple[int, int]], before: list[tuple[int, int]]
) -> None:
    rng = random.Random(str((ranges, before)))
    file = stored(*before)
    old = grains(*((at, at + length) for at, length in before))
    assert dirty(file) == old
    machine = marked(file, *ranges)
    after = bytes(machine.slots["file"])
    new = old | grains(*((a, min(b, SIZE)) for a, b in ranges if a < min(b, SIZE)))
    assert dirty(after) == new
    start = file.ljust(len(after), b"\0")
    for cut in range(len(machine.log) + 1):
        state = crash(start, machine.log, cut, rng)
        assert old <= dirty(state) <= new


def test_a_whole_part_takes_no_space() -> None:
    file = stored()
    machine = marked(file, (PART, 2 * PART))
    assert len(machine.slots["file"]) == len(file)
    assert not own_check(bytes(machine.slots["file"])).findings


@pytest.mark.parametrize("how", ["in use", "disabled", "stale"])
def test_what_follows_no_writes_is_left_alone(how: str) -> None:
    """A bitmap in use is not to be relied on anyway, and one that is disabled shows a time that is
    over."""
    file = bytearray(stored((0, GRAIN), enabled=how != "disabled"))
    if how == "in use":
        image: Any = Machine(bytes(file)).open(qcow2.DRIVER)
        (entry,) = image.directory.stored
        write = image.directory.flags_write(entry, entry.flags | 1)
        file[write.offset : write.offset + len(write.data)] = write.data
    elif how == "stale":
        file[AUTOCLEAR_AT : AUTOCLEAR_AT + 8] = bytes(8)
    machine = marked(bytes(file), (0, SIZE))
    assert bytes(machine.slots["file"]) == bytes(file)


def test_a_bitmap_that_cannot_be_kept_true_is_given_up() -> None:
    """Its size is not that of the disk."""
    file = bytearray(stored((0, GRAIN)))
    struct.pack_into(">Q", file, 24, PART)
    machine = marked(bytes(file), (0, GRAIN))
    again = Machine(bytes(machine.slots["file"]))
    image: Any = again.open(qcow2.DRIVER)
    assert [entry.flags & 1 for entry in image.directory.stored] == [1]
