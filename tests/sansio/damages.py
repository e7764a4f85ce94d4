"""Damages of a qcow2 image, each made by hand: the rows of the table in docs/formats/qcow2.md.

Every image has clusters of 1 KiB (128 of them per L2 table, 512 counts of 16 bits per refcount
block) and a disk of 1280 KiB: ten L2 tables' worth.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from sansio.test_qcow2_cross import made

CLUSTER = 1024
SIZE = 1280 << 10
PER_TABLE = 128
COUNTS = 512
COPIED, PACKED, ZERO = 1 << 63, 1 << 62, 1
OFFSET = (1 << 56) - 512


class Image:
    """The bytes of an image and the places in it."""

    def __init__(self, file: bytes) -> None:
        self.file = bytearray(file)
        self.l1 = self.get(40)
        self.reftable = self.get(48)

    def get(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self.file, at)[0])

    def put(self, at: int, value: int) -> None:
        if at + 8 <= len(self.file):
            struct.pack_into(">Q", self.file, at, value)

    def table(self, index: int) -> int:
        """Where an L2 table is (of a sound entry)."""
        return self.get(self.l1 + 8 * index) & OFFSET

    def entry(self, guest: int) -> int:
        """Where the L2 entry of a guest cluster is."""
        return self.table(guest // PER_TABLE) + guest % PER_TABLE * 8

    def host(self, guest: int) -> int:
        return self.get(self.entry(guest)) & OFFSET

    def block(self, index: int) -> int:
        return self.get(self.reftable + 8 * index)

    def count_at(self, cluster: int) -> int:
        return self.block(cluster // COUNTS) + cluster % COUNTS * 2

    def count(self, cluster: int) -> int:
        return int(struct.unpack_from(">H", self.file, self.count_at(cluster))[0])

    def set_count(self, cluster: int, count: int) -> None:
        at = self.count_at(cluster)
        if 0 < at <= len(self.file) - 2:
            struct.pack_into(">H", self.file, at, count)

    def append(self, data: bytes) -> int:
        """A cluster that no count knows of."""
        self.file.extend(bytes(-len(self.file) % CLUSTER))
        at = len(self.file)
        self.file += data.ljust(CLUSTER, b"\0")
        return at

    @property
    def beyond(self) -> int:
        return (len(self.file) + (64 << 10)) & ~(CLUSTER - 1)


def base(compat: str = "1.1", backing: bool = False) -> bytes:
    """A sound image: data in tables 0 to 5, zeroes in 6, a compressed cluster in 7, none in 8."""
    rng = random.Random(7)
    machine = made(
        SIZE,
        random.Random(8).randbytes(SIZE) if backing else None,
        cluster_size=CLUSTER,
        compat=compat,
    )
    machine.write(0, rng.randbytes(6 * PER_TABLE * CLUSTER - 20 * CLUSTER))
    if compat != "0.10":
        machine.zero(2 * CLUSTER, 4 * CLUSTER)
        machine.zero(6 * PER_TABLE * CLUSTER, 8 * CLUSTER)
    machine.write(7 * PER_TABLE * CLUSTER, rng.randbytes(4 * CLUSTER))
    machine.write(9 * PER_TABLE * CLUSTER, rng.randbytes(4 * CLUSTER))
    image = Image(machine.close())
    pack(image, 7 * PER_TABLE + 2)
    return bytes(image.file)


def pack(image: Image, guest: int) -> None:
    """Make a data cluster a compressed one in the same place."""
    at = image.host(guest)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -12)
    image.file[at : at + CLUSTER] = (squeeze.compress(b"packed! " * 128) + squeeze.flush()).ljust(
        CLUSTER, b"\0"
    )
    image.put(image.entry(guest), PACKED | at)


class Damage(NamedTuple):
    name: str
    what: str
    make: Callable[[Image], None]
    check: str
    """What a check says: leaks, corruptions or both."""
    leaks: str
    """What ``-r leaks`` does."""
    all: str
    """What ``-r all`` does."""
    compat: str = "1.1"
    backing: bool = False

    def image(self) -> bytes:
        image = Image(base(self.compat, self.backing))
        self.make(image)
        return bytes(image.file)


DAMAGES: list[Damage] = []


def damage(
    what: str,
    check: str,
    leaks: str,
    repaired: str,
    *,
    compat: str = "1.1",
    backing: bool = False,
) -> Callable[[Callable[[Image], None]], Callable[[Image], None]]:
    def add(make: Callable[[Image], None]) -> Callable[[Image], None]:
        name = make.__name__.replace("_", "-")
        DAMAGES.append(Damage(name, what, make, check, leaks, repaired, compat, backing))
        return make

    return add


NOTHING = "nothing"
RAISED = "the count is raised"
COPY = "the later one gets a copy of its own"
REBUILT = "a new refcount structure is written behind the end, then the header switches to it"


# -- counts
@damage(
    "a data cluster is counted twice", "corruption and leak", "the count is lowered", "the same"
)
def count_too_high(i: Image) -> None:
    i.set_count(i.host(10) // CLUSTER, 2)


@damage("a cluster that nothing refers to is counted", "leak", "the count is lowered", "the same")
def leaked_cluster(i: Image) -> None:
    cluster = i.append(b"leaked") // CLUSTER
    i.set_count(cluster, 1)


@damage(
    "many such clusters, in the middle of the file", "leaks", "the counts are lowered", "the same"
)
def leaked_clusters(i: Image) -> None:
    for guest in range(100, 140):
        i.put(i.entry(guest), 0)


@damage("a data cluster is not counted", "corruptions", NOTHING, RAISED)
def count_missing(i: Image) -> None:
    i.set_count(i.host(10) // CLUSTER, 0)


@damage("an L2 table is not counted", "corruptions", NOTHING, RAISED)
def count_of_table_missing(i: Image) -> None:
    i.set_count(i.table(1) // CLUSTER, 0)


@damage("the header's cluster is not counted", "corruption", NOTHING, RAISED)
def count_of_header_missing(i: Image) -> None:
    i.set_count(0, 0)


@damage("the L1 table is not counted", "corruption", NOTHING, RAISED)
def count_of_l1_missing(i: Image) -> None:
    i.set_count(i.l1 // CLUSTER, 0)


@damage("the refcount table is not counted", "corruption", NOTHING, RAISED)
def count_of_reftable_missing(i: Image) -> None:
    i.set_count(i.reftable // CLUSTER, 0)


@damage("a refcount block is not counted", "corruption", NOTHING, RAISED)
def count_of_block_missing(i: Image) -> None:
    i.set_count(i.block(1) // CLUSTER, 0)


@damage("a compressed cluster's host is not counted", "corruption", NOTHING, RAISED)
def count_of_packed_missing(i: Image) -> None:
    i.set_count((i.get(i.entry(7 * PER_TABLE + 2)) & OFFSET) // CLUSTER, 0)


@damage("all counts of one block are zero", "corruptions", NOTHING, "the counts are raised")
def block_zeroed(i: Image) -> None:
    at = i.block(1)
    i.file[at : at + CLUSTER] = bytes(CLUSTER)


@damage(
    "a block is overwritten by noise",
    "corruptions and leaks",
    "leaks: lowered",
    "all counts are set",
)
def block_of_noise(i: Image) -> None:
    at = i.block(1)
    i.file[at : at + CLUSTER] = random.Random(3).randbytes(CLUSTER)


# -- the refcount structure
@damage("an entry of the refcount table is gone", "corruptions", NOTHING, REBUILT)
def block_lost(i: Image) -> None:
    i.put(i.reftable + 8, 0)


@damage("all entries of the refcount table are gone", "corruptions", NOTHING, REBUILT)
def blocks_lost(i: Image) -> None:
    i.file[i.reftable : i.reftable + CLUSTER] = bytes(CLUSTER)


@damage("a refcount block is not aligned", "corruptions", NOTHING, REBUILT)
def block_unaligned(i: Image) -> None:
    i.put(i.reftable + 8, i.block(1) + 512)


@damage("an entry of the refcount table has reserved bits", "corruption and leak", NOTHING, REBUILT)
def block_reserved(i: Image) -> None:
    i.put(i.reftable + 8, i.block(1) | 0x80)


@damage("a refcount block is outside the file", "corruptions", NOTHING, REBUILT)
def block_outside(i: Image) -> None:
    i.put(i.reftable + 8, i.beyond)


@damage("a refcount block is far outside the file", "corruptions", NOTHING, REBUILT)
def block_far_outside(i: Image) -> None:
    i.put(i.reftable + 8, 1 << 55)


@damage(
    "two entries of the refcount table name one block", "corruptions and leak", NOTHING, REBUILT
)
def block_twice(i: Image) -> None:
    i.put(i.reftable + 8, i.block(0))


@damage("a refcount block is the L1 table", "corruptions and leaks", NOTHING, REBUILT)
def block_at_l1(i: Image) -> None:
    i.put(i.reftable + 8, i.l1)


@damage("a refcount block is an L2 table", "corruptions and leaks", NOTHING, REBUILT)
def block_at_l2(i: Image) -> None:
    i.put(i.reftable + 8, i.table(1))


@damage("a refcount block is a guest's cluster", "corruptions and leaks", NOTHING, REBUILT)
def block_at_data(i: Image) -> None:
    i.put(i.reftable + 8, i.host(20))


@damage("a refcount block is the header", "corruptions", NOTHING, REBUILT)
def block_at_header(i: Image) -> None:
    i.put(i.reftable + 8, 0x40)


@damage("the refcount table is outside the file", "corruptions", NOTHING, REBUILT)
def reftable_outside(i: Image) -> None:
    i.put(48, i.beyond)


@damage("the refcount table is the L1 table", "corruptions", NOTHING, REBUILT)
def reftable_at_l1(i: Image) -> None:
    i.put(48, i.l1)


@damage("the refcount table is a guest's cluster", "corruptions", NOTHING, REBUILT)
def reftable_at_data(i: Image) -> None:
    i.put(48, i.host(30))


@damage(
    "data lie behind all that the refcount table can count",
    "corruptions and leak",
    NOTHING,
    REBUILT,
)
def reftable_too_small(i: Image) -> None:
    end = 128 * COUNTS * CLUSTER
    at = end + 3 * CLUSTER
    i.file.extend(bytes(at - len(i.file)))
    i.append(b"far away" * 128)
    i.put(i.entry(50), at | COPIED)


# -- L1
@damage(
    "an L1 entry points outside the file",
    "corruptions and leaks",
    "the lost table's leaks are freed",
    "the entry is dropped: the table read as zeroes",
)
def l1_outside(i: Image) -> None:
    i.put(i.l1 + 8, i.beyond | COPIED)


@damage(
    "an L1 entry points far outside the file",
    "corruptions and leaks",
    "leaks are freed",
    "the same",
)
def l1_far_outside(i: Image) -> None:
    i.put(i.l1 + 8, (1 << 55) | COPIED)


@damage("an L1 entry has reserved bits", "corruption", NOTHING, "the bits are cleared")
def l1_reserved(i: Image) -> None:
    i.put(i.l1 + 8, i.get(i.l1 + 8) | 1 << 60 | 4)


@damage("an L1 entry lacks COPIED", "corruption", "the flag is set", "the same")
def l1_not_copied(i: Image) -> None:
    i.put(i.l1 + 8, i.table(1))


@damage(
    "an L1 entry points at the L1 table",
    "corruptions and leaks",
    "leaks are freed",
    "the table gets a copy",
)
def l1_at_l1(i: Image) -> None:
    i.put(i.l1 + 8, i.l1 | COPIED)


@damage(
    "an L1 entry points at a refcount block", "corruptions and leaks", "leaks are freed", REBUILT
)
def l1_at_block(i: Image) -> None:
    i.put(i.l1 + 8, i.block(1) | COPIED)


@damage(
    "an L1 entry points at a guest's cluster",
    "corruptions and leaks",
    "leaks are freed",
    "the guest's cluster gets a copy; what the table then says is mended",
)
def l1_at_data(i: Image) -> None:
    i.put(i.l1 + 8, i.host(30) | COPIED)


@damage(
    "two L1 entries share an L2 table",
    "corruption and leaks",
    "leaks are freed",
    "the second one gets a copy, and of all its clusters, too",
)
def l2_shared(i: Image) -> None:
    i.put(i.l1 + 8, i.get(i.l1))


@damage(
    "the L1 table is outside the file",
    "corruption and leaks",
    "all is leaked, and freed",
    "an empty L1 table is written",
)
def l1_table_outside(i: Image) -> None:
    i.put(40, i.beyond)


# -- L2
@damage(
    "an L2 entry points outside the file",
    "corruptions and leak",
    "the leak is freed",
    "a zero cluster: that is what it read as",
)
def l2_outside(i: Image) -> None:
    i.put(i.entry(10), i.beyond | COPIED)


@damage(
    "the same in version 2",
    "corruptions and leak",
    "the leak is freed",
    "unallocated",
    compat="0.10",
)
def l2_outside_v2(i: Image) -> None:
    i.put(i.entry(10), i.beyond | COPIED)


@damage(
    "the same in version 2 over a backing file",
    "corruptions and leak",
    "the leak is freed",
    "a cluster of zeroes",
    compat="0.10",
    backing=True,
)
def l2_outside_v2_backed(i: Image) -> None:
    i.put(i.entry(10), i.beyond | COPIED)


@damage(
    "the same in version 3 over a backing file",
    "corruptions and leak",
    "the leak is freed",
    "a zero cluster",
    backing=True,
)
def l2_outside_backed(i: Image) -> None:
    i.put(i.entry(10), i.beyond | COPIED)


@damage("an L2 entry has reserved bits", "corruption", NOTHING, "the bits are cleared")
def l2_reserved(i: Image) -> None:
    i.put(i.entry(10), i.get(i.entry(10)) | 1 << 58 | 8)


@damage("an L2 entry lacks COPIED", "corruption", "the flag is set", "the same")
def l2_not_copied(i: Image) -> None:
    i.put(i.entry(10), i.host(10))


@damage(
    "a zero flag in version 2",
    "corruption",
    NOTHING,
    "the flag is cleared: the data come back",
    compat="0.10",
)
def zero_in_v2(i: Image) -> None:
    i.put(i.entry(10), i.get(i.entry(10)) | ZERO)


@damage("two guest clusters share a host cluster", "corruption and leak", "the leak is freed", COPY)
def data_shared(i: Image) -> None:
    i.put(i.entry(10), i.get(i.entry(20)))


@damage(
    "the same, counted twice and without COPIED",
    "leak",
    "the leak is freed",
    "nothing else: a cluster may be shared when it is so counted",
)
def data_shared_counted(i: Image) -> None:
    i.set_count(i.host(20) // CLUSTER, 2)
    i.put(i.entry(20), i.host(20))
    i.put(i.entry(10), i.host(20))


@damage("seven guest clusters share one", "corruption and leaks", "the leaks are freed", COPY)
def data_shared_often(i: Image) -> None:
    for guest in (11, 70, 130, 131, 200, 300):
        i.put(i.entry(guest), i.get(i.entry(20)))


@damage(
    "an L2 entry points at the L1 table",
    "corruption and leak",
    "the leak is freed",
    "the entry gets a copy of what it read",
)
def l2_at_l1(i: Image) -> None:
    i.put(i.entry(10), i.l1 | COPIED)


@damage(
    "an L2 entry points at its own table", "corruption and leak", "the leak is freed", "the same"
)
def l2_at_itself(i: Image) -> None:
    i.put(i.entry(10), i.table(0) | COPIED)


@damage(
    "an L2 entry points at another L2 table", "corruption and leak", "the leak is freed", "the same"
)
def l2_at_l2(i: Image) -> None:
    i.put(i.entry(10), i.table(2) | COPIED)


@damage(
    "entries of three L2 tables point at the next of these tables",
    "corruptions and leaks",
    "the leaks are freed",
    "the entries get copies of what they read, all at once",
)
def l2_around(i: Image) -> None:
    entries = [(i.entry(table * PER_TABLE + 10), i.table((table + 1) % 3)) for table in range(3)]
    for at, table in entries:
        i.put(at, table | COPIED)


@damage(
    "an L2 entry points at the refcount table",
    "corruption and leak",
    "the leak is freed",
    "the same",
)
def l2_at_reftable(i: Image) -> None:
    i.put(i.entry(10), i.reftable | COPIED)


@damage(
    "an L2 entry points at a refcount block",
    "corruptions and leak",
    "the leak is freed, but for counts in that block",
    REBUILT,
)
def l2_at_block(i: Image) -> None:
    i.put(i.entry(10), i.block(1) | COPIED)


@damage(
    "a zero cluster's place is outside the file",
    "corruptions and leak",
    "the leak is freed",
    "the place is dropped",
)
def zero_outside(i: Image) -> None:
    i.put(i.entry(3), i.beyond | COPIED | ZERO)


@damage(
    "a zero cluster's place is another's",
    "corruption and leak",
    "the leak is freed",
    "the place is dropped",
)
def zero_shared(i: Image) -> None:
    i.put(i.entry(3), i.get(i.entry(20)) | ZERO)


@damage(
    "a zero cluster's place is the L1 table",
    "corruption and leak",
    "the leak is freed",
    "the place is dropped",
)
def zero_at_l1(i: Image) -> None:
    i.put(i.entry(3), i.l1 | COPIED | ZERO)


@damage(
    "an L2 entry is not aligned, its cluster is nobody's",
    "corruption and leak",
    "the leak is freed",
    "the lower bits are dropped",
)
def l2_unaligned(i: Image) -> None:
    i.put(i.entry(10), i.get(i.entry(10)) + 512)


@damage(
    "an L2 entry is not aligned, its cluster is another's",
    "corruption and leak",
    "the leak is freed",
    "a zero cluster: it could not be read",
)
def l2_unaligned_elsewhere(i: Image) -> None:
    i.put(i.entry(10), i.get(i.entry(20)) + 512)


@damage(
    "an L1 entry is not aligned, its table is nobody's",
    "corruption and leaks",
    "the leaks are freed",
    "the lower bits are dropped: the table is found again",
)
def l1_unaligned(i: Image) -> None:
    i.put(i.l1 + 8, i.get(i.l1 + 8) + 512)


@damage(
    "an L1 entry is not aligned, its table is another's",
    "corruption and leaks",
    "the leaks are freed",
    "the entry is dropped: it could not be read",
)
def l1_unaligned_elsewhere(i: Image) -> None:
    i.put(i.l1 + 8, i.get(i.l1) + 512)


@damage(
    "a zero cluster's place is not aligned", "corruption and leak", NOTHING, "the place is dropped"
)
def zero_unaligned(i: Image) -> None:
    i.put(i.entry(3), i.get(i.entry(3)) | 512)


# -- compressed clusters
@damage("a compressed cluster has COPIED", "corruption", NOTHING, "the flag is cleared")
def packed_copied(i: Image) -> None:
    at = i.entry(7 * PER_TABLE + 2)
    i.put(at, i.get(at) | COPIED)


@damage(
    "a compressed cluster is outside the file",
    "corruption and leak",
    "the leak is freed",
    "a zero cluster: it could not be read",
)
def packed_outside(i: Image) -> None:
    i.put(i.entry(7 * PER_TABLE + 2), PACKED | i.beyond)


@damage(
    "a compressed cluster is too long for the file",
    "corruption and leaks",
    "the leak is freed",
    "its length ends with the file",
)
def packed_too_long(i: Image) -> None:
    tail = -(-len(i.file) // CLUSTER) * CLUSTER
    data = bytes(i.file[i.get(i.entry(7 * PER_TABLE + 2)) & OFFSET :][:CLUSTER])
    i.append(data)
    i.set_count(tail // CLUSTER, 1)
    i.put(i.entry(7 * PER_TABLE + 2), PACKED | 1 << 61 | (len(i.file) - CLUSTER))


@damage(
    "a compressed cluster lies over a guest's cluster",
    "corruption and leak",
    "the leak is freed",
    "counts, and the guest's flag: a cluster may be shared when it is so counted",
)
def packed_at_data(i: Image) -> None:
    i.put(i.entry(7 * PER_TABLE + 2), PACKED | i.host(40))


# -- header
@damage("the dirty bit is set", "nothing", NOTHING, "the bit is cleared")
def dirty(i: Image) -> None:
    i.file[79] |= 1


@damage("the corrupt bit is set", "nothing", NOTHING, "the bit is cleared")
def corrupt(i: Image) -> None:
    i.file[79] |= 2


@damage("both bits are set, and counts are lost", "corruptions", NOTHING, "counts, then bits")
def dirty_and_corrupt(i: Image) -> None:
    i.file[79] |= 3
    block_lost(i)


@damage(
    "the file is cut off within its data",
    "corruptions",
    NOTHING,
    "what is lost reads as zeroes, as it did",
)
def cut_off(i: Image) -> None:
    del i.file[len(i.file) // 2 & -CLUSTER :]
