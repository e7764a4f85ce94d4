"""Images of every kind in which several things at random are wrong: entries name tables, guest
clusters or what is behind the end, flags and counts are others, the file is cut off."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from diskwright.abilities import SnapshotInfo
from diskwright.errors import DiskError
from diskwright.formats import qcow2
from diskwright.secrets import Secrets
from sansio import feature_damages
from sansio.machine import Machine
from sansio.test_qcow2_bitmaps import Disk

COPIED, PACKED = 1 << 63, 1 << 62
OFFSET = (1 << 56) - 512
_BITMAPS = 0x23852875
_EXTENDED = 16
SECRETS = Secrets({"s": "abc"})

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"cluster_size": 1024},
    "small": {"cluster_size": 512},
    "large": {"cluster_size": 2 << 20},
    "v2": {"cluster_size": 1024, "compat": "0.10"},
    "v2-backing": {"cluster_size": 1024, "compat": "0.10"},
    "backing": {"cluster_size": 1024},
    "narrow": {"cluster_size": 1024, "refcount_bits": 1},
    "two-bits": {"cluster_size": 512, "refcount_bits": 2},
    "four-bits": {"cluster_size": 512, "refcount_bits": 4},
    "wide": {"cluster_size": 1024, "refcount_bits": 64},
    "packed": {"cluster_size": 1024, "refcount_bits": 8},
    "snapshots": {"cluster_size": 1024},
    "snapshots-v2": {"cluster_size": 1024, "compat": "0.10"},
    "snapshots-backing": {"cluster_size": 1024},
    "bitmaps": {"cluster_size": 1024},
    "snapshots-bitmaps": {"cluster_size": 1024},
    "extended": {"cluster_size": 16384, "extended_l2": True},
    "extended-backing": {"cluster_size": 16384, "extended_l2": True},
    "snapshots-extended": {"cluster_size": 16384, "extended_l2": True},
    "data-file": {},
    "luks": {},
}  # fmt: skip


class Sound(NamedTuple):
    """An image without a fault, its data file, what it lies over."""

    file: bytes
    data: bytes | None
    backing: bytes | None
    options: dict[str, Any]


def opened(sound: Sound, file: bytes, **options: Any) -> Machine:
    machine = Machine(file, sound.backing)
    if sound.data is not None:
        machine.slots["data-file"] = bytearray(sound.data)
    machine.open(qcow2.DRIVER, **sound.options, **options)
    return machine


@cache
def sound(kind: str) -> Sound:
    """Data in several tables, zeroes, holes, compressed clusters, snapshots, bitmaps."""
    rng = random.Random(kind)
    if not KINDS[kind]:
        files = feature_damages.base(kind)
        options: dict[str, Any] = {}
        if kind == "luks":
            options = {"encrypt.key-secret": "s", "secrets": SECRETS}
        else:
            options = {"data-file": "given"}
        return Sound(files["image.qcow2"], files.get("data.raw"), None, options)
    create = dict(KINDS[kind])
    cluster = create["cluster_size"]
    clusters = 20 if cluster > 1 << 20 else 40 if cluster > 4096 else 3 * (cluster // 8) + 3
    size = clusters * cluster
    backing = rng.randbytes(size - cluster) if kind.endswith("backing") else None
    if backing is not None:
        create |= {"backing_file": "base.raw", "backing_fmt": "raw"}
    machine = Machine(backing=backing)
    machine.run(qcow2.create_new({"size": size, **create}))
    machine.open(qcow2.DRIVER)
    disk = Disk(machine)
    bitmaps = "bitmaps" in kind
    for name in ("on", "off") if bitmaps else ():
        disk.add(name, enabled=name == "on")
    disk.store()
    _fill(disk, rng, clusters, cluster)
    for name in ("a", "b") if "snapshots" in kind else ():
        disk.run(machine.format.create_snapshot(SnapshotInfo("", name)))
        _fill(disk, rng, clusters // 3, cluster)
    disk.store()
    return Sound(machine.close(), None, backing, {})


def _fill(disk: Disk, rng: random.Random, clusters: int, cluster: int) -> None:
    machine = disk.machine
    version3 = machine.format.header.version > 2
    at = 0
    while at < clusters:
        count = min(rng.choice([1, 2, 8, 30]), clusters - at)
        first, length = at * cluster, min(count * cluster, machine.format.size - at * cluster)
        kind = rng.random()
        if kind < 0.6:
            disk.write(first, rng.randbytes(length))
        elif kind < 0.75:
            machine.write_packed(first, rng.randbytes(64) * (length // 64))
            disk.mark(first, length)
        elif kind < 0.85 and version3:
            disk.machine.zero(first, length)
            disk.mark(first, length)
        at += count


class Woven:
    """The bytes of an image, and what in it can be made wrong."""

    def __init__(self, sound: Sound, rng: random.Random) -> None:
        self.file = bytearray(sound.file)
        self.rng = rng
        (self.bits,) = struct.unpack_from(">I", self.file, 20)
        self.size = 1 << self.bits
        (features,) = struct.unpack_from(">Q", self.file, 72) if self.file[7] > 2 else (0,)
        self.stride = 2 if features & _EXTENDED else 1
        self.tables: list[int] = []
        """Where the entries of L1, L2, refcount and bitmaps' tables are, and what names tables in
        the snapshot table and the bitmap directory."""
        self.structures: list[int] = []
        self.data: list[int] = []
        self.block = self.get(self.get(48))
        self._survey()

    def get(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self.file, at)[0])

    def put(self, at: int, value: int) -> None:
        struct.pack_into(">Q", self.file, at, value & (1 << 64) - 1)

    def _survey(self) -> None:
        (l1_size,) = struct.unpack_from(">I", self.file, 36)
        l1s = [(self.get(40), l1_size)]
        at = self.get(64)
        (snapshots,) = struct.unpack_from(">I", self.file, 60)
        self.structures += [self.get(48)]
        if snapshots:
            self.structures.append(at)
        for _ in range(snapshots):
            sizes = struct.unpack_from(">HH", self.file, at + 12)
            (extra,) = struct.unpack_from(">I", self.file, at + 36)
            l1s.append((self.get(at), struct.unpack_from(">I", self.file, at + 8)[0]))
            self.tables.append(at)
            at += (40 + extra + sum(sizes) + 7) & ~7
        for offset, count in l1s:
            self.structures.append(offset)
            for index in range(count):
                self.tables += [offset + 8 * index] * 3
                self._l2(self.get(offset + 8 * index) & OFFSET)
        for index in range(self.size >> 3):
            block = self.get(self.get(48) + 8 * index)
            if block:
                self.tables.append(self.get(48) + 8 * index)
                self.structures.append(block)
        for at in self._directory():
            self.tables.append(at)
            (count,) = struct.unpack_from(">I", self.file, at + 8)
            self.structures.append(self.get(at))
            for index in range(count):
                self.tables.append(self.get(at) + 8 * index)

    def _l2(self, table: int) -> None:
        if not table or table in self.structures:
            return
        self.structures.append(table)
        for index in range(0, self.size >> 3, self.stride):
            entry = self.get(table + 8 * index)
            if entry or self.rng.random() < 0.1:
                self.tables.append(table + 8 * index)
            if entry and not entry & PACKED and entry & OFFSET:
                self.data.append(entry & OFFSET)

    def _directory(self) -> Iterator[int]:
        at = 72
        if self.file[7] > 2:
            (at,) = struct.unpack_from(">I", self.file, 100)
        while True:
            kind, length = struct.unpack_from(">II", self.file, at)
            if not kind:
                return
            if kind == _BITMAPS:
                count, _, _, place = struct.unpack_from(">IIQQ", self.file, at + 8)
                self.structures.append(place)
                for _ in range(count):
                    yield place
                    name, extra = struct.unpack_from(">HI", self.file, place + 18)
                    place += (24 + name + extra + 7) & ~7
            at += 8 + (length + 7 & ~7)

    def make(self) -> str:
        """Make one thing wrong."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.06:
            block = rng.choice(self.structures[1:]) if rng.random() < 0.2 else self.block
            at = block + rng.randrange(self.size)
            if at < len(self.file):
                self.file[at] = rng.choice([0, 0, 1, 2, rng.randrange(256)])
            return f"byte {at:#x} is {self.file[at] if at < len(self.file) else 0}"
        if kind < 0.08 and self.file[7] > 2:
            self.file[79] |= rng.choice([1, 2, 3])
            return "bits"
        if kind < 0.1:
            del self.file[-rng.randrange(1, 1 + len(self.file) // 4) :]
            return f"cut to {len(self.file):#x}"
        at = rng.choice(self.tables)
        if kind < 0.15:
            at = rng.choice([40, 48, 64])
        if at + 8 > len(self.file):
            return "nothing"
        value = self._value(self.get(at))
        if at == 64:
            value &= OFFSET & -self.size
        self.put(at, value)
        return f"{at:#x} is {value:#x}"

    def _value(self, old: int) -> int:
        rng = self.rng
        end = -(-len(self.file) // self.size) * self.size
        kind = rng.random()
        flags = rng.choice([old & COPIED, COPIED, COPIED, 0])
        if kind < 0.5:
            return flags | rng.choice(self.structures)
        if kind < 0.7 and self.data:
            return flags | rng.choice(self.data)
        if kind < 0.76:
            return flags | end + rng.choice([0, 1, 40, 1 << 20]) * self.size
        if kind < 0.82:
            return old ^ 1 << rng.choice([0, 1, 9, 10, 57, 60, 62, 63])
        if kind < 0.88 and self.data:
            return flags | 1 | rng.choice(self.data + self.structures)
        if kind < 0.95:
            shift = 62 - (self.bits - 8)
            place = rng.choice(self.structures + self.data) + rng.randrange(self.size)
            return PACKED | rng.randrange(3) << shift | place
        return 0


Content = list[tuple[bytes | None, ...]]


def contents(sound: Sound, file: bytes, names: tuple[str, ...] = ("",)) -> dict[str, list[Any]]:
    """What every unit of the disk and of the snapshots ``names`` reads as; None where that is an
    error.  Raises DiskError when the disk cannot be opened."""
    out = {}
    for name in names:
        try:
            machine = opened(sound, file, **{"read-only": True})
            if name:
                machine.run(machine.format.show_snapshot(None, name))
        except (DiskError, ValueError):
            if not name:
                raise
            continue
        out[name] = list(_units(machine) if sound.options == {} else _places(machine))
    return out


def _units(machine: Machine) -> Iterator[bytes | None]:
    image = machine.format
    unit = image.unit if image.extended else image.cluster_size
    step = 32 * unit
    for start in range(0, image.size, step):
        stop = min(start + step, image.size)
        try:
            data = machine.read(start, stop - start)
            yield from (data[at : at + unit] for at in range(0, len(data), unit))
        except (DiskError, ValueError):
            for at in range(start, stop, unit):
                try:
                    yield machine.read(at, min(unit, image.size - at))
                except (DiskError, ValueError):
                    yield None


def _places(machine: Machine) -> Iterator[tuple[Any, ...] | None]:
    """Of a disk whose data lie in another file, or are encrypted: where they are."""
    for at in range(0, machine.format.size, machine.format.cluster_size):
        try:
            found = machine.extents(at, machine.format.cluster_size)
            yield tuple((extent.kind, getattr(extent, "host", 0)) for _, extent in found)
        except DiskError:
            yield None
