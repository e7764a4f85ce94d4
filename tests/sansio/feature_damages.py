"""Damages of qcow2 images with snapshots, bitmaps, extended L2 entries, an external data file or
encryption: the second table of docs/formats/qcow2.md.

The images are made by qemu-img: clusters of 4 KiB, a disk of 8 MiB (four L2 tables).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from sansio import oracle

CLUSTER = 4096
COPIED = 1 << 63
OFFSET = (1 << 56) - 512
SECRET = "secret,id=s,data=abc"


class File:
    """The bytes of an image and the places in it."""

    def __init__(self, data: bytes, stride: int = 1) -> None:
        self.data = bytearray(data)
        self.stride = stride
        self.l1 = self.get(40)
        self.reftable = self.get(48)
        self.snapshots = self.get(64)

    def get(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self.data, at)[0])

    def put(self, at: int, value: int) -> None:
        struct.pack_into(">Q", self.data, at, value)

    def table(self, index: int, l1: int = 0) -> int:
        return self.get((l1 or self.l1) + 8 * index) & OFFSET

    def entry(self, guest: int, l1: int = 0) -> int:
        per_table = CLUSTER // 8 // self.stride
        return self.table(guest // per_table, l1) + guest % per_table * 8 * self.stride

    def snapshot(self, number: int) -> int:
        """Where the entry of a snapshot is."""
        at = self.snapshots
        for _ in range(number):
            sizes, extra = struct.unpack_from(">HH", self.data, at + 12), self.extra(at)
            at += (40 + extra + sum(sizes) + 7) & ~7
        return at

    def extra(self, at: int) -> int:
        return int(struct.unpack_from(">I", self.data, at + 36)[0])

    def snapshot_l1(self, number: int) -> int:
        return self.get(self.snapshot(number))

    def count_at(self, place: int) -> int:
        cluster = place // CLUSTER
        return self.get(self.reftable + cluster // 2048 * 8) + cluster % 2048 * 2

    def set_count(self, place: int, count: int) -> None:
        struct.pack_into(">H", self.data, self.count_at(place & OFFSET), count)

    def extension(self, kind: int) -> int:
        """Where the data of a header extension begin."""
        at = int(struct.unpack_from(">I", self.data, 100)[0])
        while True:
            found, length = struct.unpack_from(">II", self.data, at)
            if found == kind:
                return at + 8
            at += 8 + (length + 7 & ~7)

    @property
    def directory(self) -> int:
        return self.get(self.extension(0x23852875) + 16)

    @property
    def bitmap_table(self) -> int:
        return self.get(self.directory)

    @property
    def luks(self) -> int:
        return self.get(self.extension(0x0537BE77))

    @property
    def beyond(self) -> int:
        return (len(self.data) + (256 << 10)) & -CLUSTER


def _write(path: Path, *commands: str, luks: bool = False) -> None:
    if luks:
        image = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
        where = ["--object", SECRET, "--image-opts", image]
    else:
        where = [str(path)]
    flags = [part for command in commands for part in ("-c", command)]
    oracle.ok("qemu-io", *flags, *where)


@cache
def base(kind: str) -> dict[str, bytes]:
    """The files of a sound image by their names."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "image.qcow2")
        options = "cluster_size=4096"
        more: list[str] = []
        if kind == "extended":
            options = "cluster_size=16384,extended_l2=on"
        elif kind == "data-file":
            options += f",data_file={folder}/data.raw"
        elif kind == "luks":
            options += ",encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
            more = ["--object", SECRET]
        oracle.ok("qemu-img", "create", "-q", "-f", "qcow2", *more, "-o", options, str(path), "8M")
        luks = kind == "luks"
        _write(path, "write -P 1 0 1M", "write -P 2 2M 256k", "write -P 3 4M 128k", luks=luks)
        if kind == "snapshots":
            oracle.ok("qemu-img", "snapshot", "-c", "one", str(path))
            _write(path, "write -P 4 64k 64k", "write -P 5 6M 64k")
            oracle.ok("qemu-img", "snapshot", "-c", "two", str(path))
            _write(path, "write -P 6 128k 64k", "discard 2M 64k")
        elif kind == "bitmaps":
            oracle.ok("qemu-img", "bitmap", "--add", "-g", "4k", str(path), "b1")
            oracle.ok("qemu-img", "bitmap", "--add", "-g", "64k", str(path), "b2")
            _write(path, "write -P 7 1M 64k", "write -P 8 5M 1M")
        return {item.name: item.read_bytes() for item in Path(folder).iterdir()}


class Damage(NamedTuple):
    name: str
    kind: str
    what: str
    make: Callable[[File], None]
    repaired: str


DAMAGES: list[Damage] = []


def damage(
    kind: str, what: str, repaired: str
) -> Callable[[Callable[[File], None]], Callable[[File], None]]:
    def add(make: Callable[[File], None]) -> Callable[[File], None]:
        DAMAGES.append(Damage(make.__name__.replace("_", "-"), kind, what, make, repaired))
        return make

    return add


NEW_L1 = "the L1 table gets a place of its own, and the snapshot table another that names it"
REBUILT = "a new refcount structure"


# -- snapshots
@damage("snapshots", "a snapshot's L1 table is outside the file", NEW_L1 + "; it is empty")
def snapshot_l1_outside(f: File) -> None:
    f.put(f.snapshot(0), f.beyond)


@damage("snapshots", "a snapshot's L1 table is the active one", NEW_L1)
def snapshot_l1_is_active(f: File) -> None:
    f.put(f.snapshot(0), f.l1)


@damage("snapshots", "two snapshots have one L1 table", NEW_L1)
def snapshots_share_l1(f: File) -> None:
    f.put(f.snapshot(1), f.snapshot_l1(0))


@damage("snapshots", "a snapshot's L1 table is a guest's cluster", "the guest's cluster is copied")
def snapshot_l1_over_guest(f: File) -> None:
    f.put(f.entry(40), f.snapshot_l1(1) | COPIED)


@damage("snapshots", "a snapshot's L1 entry points outside the file", "the entry is dropped")
def inactive_l1_outside(f: File) -> None:
    f.put(f.snapshot_l1(0) + 8, f.beyond)


@damage("snapshots", "a snapshot's L1 entry has reserved bits", "the bits are cleared")
def inactive_l1_reserved(f: File) -> None:
    f.put(f.snapshot_l1(0), f.get(f.snapshot_l1(0)) | 6)


@damage("snapshots", "a snapshot's L1 entry is not aligned", "the entry is dropped")
def inactive_l1_unaligned(f: File) -> None:
    f.put(f.snapshot_l1(1), f.get(f.snapshot_l1(1)) + 512)


@damage("snapshots", "a snapshot's L1 entry points at the L1 table", "the table gets a copy")
def inactive_l1_at_l1(f: File) -> None:
    f.put(f.snapshot_l1(0) + 8, f.l1)


@damage("snapshots", "an L2 entry of a snapshot points outside the file", "a zero cluster")
def inactive_l2_outside(f: File) -> None:
    f.put(f.entry(16, f.snapshot_l1(0)), f.beyond)


@damage("snapshots", "an L2 entry of a snapshot points at the L1 table", "the entry gets a copy")
def inactive_l2_at_l1(f: File) -> None:
    f.put(f.entry(16, f.snapshot_l1(0)), f.l1)


@damage("snapshots", "an L2 entry of a snapshot has reserved bits", "the bits are cleared")
def inactive_l2_reserved(f: File) -> None:
    at = f.entry(16, f.snapshot_l1(0))
    f.put(at, f.get(at) | 1 << 57)


@damage("snapshots", "the snapshot table is outside the file", "a table of empty snapshots")
def snapshot_table_outside(f: File) -> None:
    f.put(64, f.beyond)


@damage("snapshots", "an L2 entry points at the snapshot table", "the entry gets a copy")
def l2_at_snapshot_table(f: File) -> None:
    f.put(f.entry(40), f.snapshots | COPIED)


@damage("snapshots", "an entry of the snapshot table lacks what version 3 asks for", "a new table")
def snapshot_incomplete(f: File) -> None:
    out = b""
    for number in range(2):
        at = f.snapshot(number)
        head, sizes = f.data[at : at + 36], struct.unpack_from(">HH", f.data, at + 12)
        names = at + 40 + f.extra(at)
        entry = bytes(head) + bytes(4) + f.data[names : names + sum(sizes)]
        out += entry.ljust((len(entry) + 7) & ~7, b"\0")
    f.data[f.snapshots : f.snapshots + len(out)] = out


DROPPED = "the snapshot is dropped, with a message; the others stay"


@damage("snapshots", "a snapshot's L1 table is not aligned", DROPPED)
def snapshot_l1_unaligned(f: File) -> None:
    f.put(f.snapshot(0), f.snapshot_l1(0) + 512)


@damage("snapshots", "a snapshot's L1 table is too large", DROPPED)
def snapshot_l1_too_large(f: File) -> None:
    struct.pack_into(">I", f.data, f.snapshot(1) + 8, 1 << 28)


@damage("snapshots", "a snapshot has too much extra data", "they are cut off, with a message")
def snapshot_extra_long(f: File) -> None:
    at, extra = f.snapshot(1), f.extra(f.snapshot(1))
    names = bytes(f.data[at + 40 + extra : at + 48 + extra])
    struct.pack_into(">I", f.data, at + 36, 2000)
    f.data[at + 2040 : at + 2048] = names


@damage("snapshots", "the length of a snapshot's extra data is damaged", "its end is found again")
def snapshot_extra_damaged(f: File) -> None:
    struct.pack_into(">I", f.data, f.snapshot(0) + 36, 1 << 28)


@damage("snapshots", "a cluster of a snapshot is counted once too little", "the count is raised")
def shared_count_low(f: File) -> None:
    f.set_count(f.get(f.entry(0)), 2)


@damage("snapshots", "a cluster of a snapshot is not counted", "the count is raised")
def inactive_count_missing(f: File) -> None:
    f.set_count(f.get(f.entry(16, f.snapshot_l1(0))), 0)


@damage("snapshots", "a cluster of a snapshot is counted too often", "the count is lowered")
def inactive_count_high(f: File) -> None:
    f.set_count(f.get(f.entry(16, f.snapshot_l1(0))), 9)


@damage("snapshots", "the L1 table of a snapshot is not counted", "the count is raised")
def inactive_l1_uncounted(f: File) -> None:
    f.set_count(f.snapshot_l1(0), 0)


@damage("snapshots", "the snapshot table is not counted", "the count is raised")
def snapshot_table_uncounted(f: File) -> None:
    f.set_count(f.snapshots, 0)


@damage("snapshots", "a shared cluster has COPIED", "the flag is cleared")
def shared_copied(f: File) -> None:
    f.put(f.entry(0), f.get(f.entry(0)) | COPIED)


@damage("snapshots", "a shared L2 table has COPIED", "the flag is cleared")
def shared_l2_copied(f: File) -> None:
    f.put(f.l1 + 16, f.get(f.l1 + 16) | COPIED)


@damage("snapshots", "the refcount blocks under snapshots are gone", REBUILT)
def blocks_gone(f: File) -> None:
    f.put(f.reftable, 0)


@damage("snapshots", "the refcount table under snapshots is outside the file", REBUILT)
def reftable_gone(f: File) -> None:
    f.put(48, f.beyond)


# -- bitmaps
ALL_DIRTY = "the entry says that all bits are set"
DROPPED = "the bitmaps are marked as not to be relied on, and their space is freed"


@damage("bitmaps", "an entry of a bitmap's table points outside the file", ALL_DIRTY)
def bitmap_entry_outside(f: File) -> None:
    f.put(f.bitmap_table, f.beyond)


@damage("bitmaps", "an entry of a bitmap's table has reserved bits", ALL_DIRTY)
def bitmap_entry_reserved(f: File) -> None:
    f.put(f.bitmap_table, f.get(f.bitmap_table) | 1 << 60)


@damage("bitmaps", "a bitmap's cluster is a guest's too", ALL_DIRTY)
def bitmap_over_guest(f: File) -> None:
    f.put(f.bitmap_table, f.get(f.entry(0)) & OFFSET)


@damage("bitmaps", "a bitmap's cluster is the L1 table", ALL_DIRTY)
def bitmap_over_l1(f: File) -> None:
    f.put(f.bitmap_table, f.l1)


@damage("bitmaps", "a bitmap's cluster is not counted", "the count is raised")
def bitmap_uncounted(f: File) -> None:
    f.set_count(f.get(f.bitmap_table), 0)


@damage("bitmaps", "the bitmap directory is not counted", "the count is raised")
def directory_uncounted(f: File) -> None:
    f.set_count(f.directory, 0)


@damage("bitmaps", "a bitmap's table is outside the file", DROPPED)
def bitmap_table_outside(f: File) -> None:
    f.put(f.directory, f.beyond)


@damage("bitmaps", "the bitmap directory is outside the file", DROPPED)
def directory_outside(f: File) -> None:
    f.put(f.extension(0x23852875) + 16, f.beyond)


@damage("bitmaps", "a guest's cluster is the bitmap directory", DROPPED)
def guest_over_directory(f: File) -> None:
    f.put(f.entry(40), f.directory | COPIED)


@damage("bitmaps", "the bitmaps' autoclear bit is gone", "their space is freed")
def bitmaps_stale(f: File) -> None:
    f.put(88, 0)


# -- extended L2 entries
@damage("extended", "an extended entry points outside the file", "its subclusters read as zeroes")
def extended_outside(f: File) -> None:
    f.put(f.entry(3), f.beyond)


@damage("extended", "an extended entry has reserved bits", "the bits are cleared")
def extended_reserved(f: File) -> None:
    f.put(f.entry(3), f.get(f.entry(3)) | 1)


@damage("extended", "an extended entry lacks COPIED", "the flag is set")
def extended_uncopied(f: File) -> None:
    f.put(f.entry(3), f.get(f.entry(3)) & ~COPIED)


@damage("extended", "two extended entries share a cluster", "the later one gets a copy")
def extended_shared(f: File) -> None:
    f.put(f.entry(4), f.get(f.entry(3)))


@damage("extended", "an extended entry points at the L1 table", "the entry gets a copy")
def extended_at_l1(f: File) -> None:
    f.put(f.entry(3), f.l1 | COPIED)


@damage("extended", "subclusters are both data and zeroes", "the data stay")
def extended_both(f: File) -> None:
    f.put(f.entry(3) + 8, 1 << 35 | (1 << 32) - 1)


@damage("extended", "subclusters of no cluster hold data", "they are not allocated")
def extended_nowhere(f: File) -> None:
    f.put(f.entry(100) + 8, 0xFF)


# -- external data file
@damage("data-file", "an entry has reserved bits (data file)", "the bits are cleared")
def external_reserved(f: File) -> None:
    f.put(f.entry(3), f.get(f.entry(3)) | 1 << 57)


@damage("data-file", "an entry is not aligned (data file)", "the lower bits are dropped")
def external_unaligned(f: File) -> None:
    f.put(f.entry(3), f.get(f.entry(3)) + 512)


@damage("data-file", "an entry names another's place (data file)", "a zero cluster")
def external_elsewhere(f: File) -> None:
    f.put(f.entry(3), f.get(f.entry(3)) + CLUSTER)


@damage("data-file", "an entry lacks COPIED (data file)", "the flag is set")
def external_uncopied(f: File) -> None:
    f.put(f.entry(3), f.get(f.entry(3)) & ~(1 << 63))


@damage("data-file", "an entry is compressed (data file)", "a zero cluster")
def external_packed(f: File) -> None:
    f.put(f.entry(3), f.get(f.entry(3)) ^ 3 << 62)


@damage("data-file", "an L2 table is not counted (data file)", "the count is raised")
def external_table_uncounted(f: File) -> None:
    f.set_count(f.table(0), 0)


@damage("data-file", "an L1 entry points outside the file (data file)", "the entry is dropped")
def external_l1_outside(f: File) -> None:
    f.put(f.l1, f.beyond)


# -- encryption
@damage("luks", "the encryption header is not counted", "the counts are raised")
def luks_uncounted(f: File) -> None:
    for at in range(f.luks, f.luks + 8 * CLUSTER, CLUSTER):
        f.set_count(at, 0)


@damage("luks", "an L2 entry points at the encryption header", "the entry gets a copy")
def luks_over_guest(f: File) -> None:
    f.put(f.entry(3), f.luks | COPIED)


@damage("luks", "an L2 entry of an encrypted image points outside the file", "a zero cluster")
def luks_outside(f: File) -> None:
    f.put(f.entry(3), f.beyond)
