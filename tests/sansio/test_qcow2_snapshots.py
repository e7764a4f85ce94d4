"""Internal snapshots of qcow2: what they hold, what they share, what both tools make of them."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from diskwright.abilities import SnapshotInfo
from diskwright.errors import (
    CorruptImage,
    MalformedImage,
    NoSuchSnapshot,
    NotSupported,
    UsageError,
)
from diskwright.formats import qcow2
from sansio import oracle
from sansio.machine import Machine
from sansio.test_qcow2_cross import made, own_check, workload


def clean(machine: Machine) -> None:
    """Flush until nothing is dirty, as the engine does before a procedure runs."""
    for _ in range(9):
        machine.flush()
        if not machine.store.dirty():
            return
    raise AssertionError("it does not come to rest")


class Disk:
    """An image, what it must hold, and what its snapshots must hold by their ids."""

    def __init__(self, size: int, base: bytes | None = None, **options: Any) -> None:
        self.machine = made(size, base, **options)
        self.model = bytearray((base or b"")[:size].ljust(size, b"\0"))
        self.held: dict[str, bytes] = {}

    @property
    def file(self) -> bytes:
        return bytes(self.machine.slots["file"])

    def run(self, procedure: Any) -> Any:
        return self.machine.run(procedure)

    def create(self, name: str = "snap", **named: Any) -> str:
        clean(self.machine)
        made = self.run(self.machine.format.create_snapshot(SnapshotInfo("", name, **named)))
        self.held[made.id] = bytes(self.model)
        return str(made.id)

    def apply(self, snapshot_id: str) -> None:
        clean(self.machine)
        self.run(self.machine.format.apply_snapshot(snapshot_id, None))
        self.model = bytearray(self.held[snapshot_id])

    def delete(self, snapshot_id: str) -> None:
        clean(self.machine)
        self.run(self.machine.format.delete_snapshot(snapshot_id, None))
        del self.held[snapshot_id]

    def resize(self, size: int) -> None:
        clean(self.machine)
        self.run(self.machine.format.resize(size, shrink=True))
        self.model = bytearray(bytes(self.model)[:size].ljust(size, b"\0"))

    def step(self, rng: random.Random) -> None:
        what = rng.random()
        if what < 0.5:
            workload(self.machine, self.model, rng.randrange(1 << 30), rng.randrange(1, 8))
        elif what < 0.65 or not self.held:
            self.create(f"number {len(self.held)}")
        elif what < 0.8:
            self.apply(rng.choice(list(self.held)))
        elif what < 0.92:
            self.delete(rng.choice(list(self.held)))
        elif self.machine.format.header.version > 2:
            unit = self.machine.format.unit
            self.resize(rng.randrange(1, 100) * max(unit // 3 & -512, 512))

    def verify(self) -> None:
        """Everything is what it must be, for us."""
        clean(self.machine)
        assert self.machine.read(0, len(self.model)) == bytes(self.model)
        result = own_check(self.file)
        assert (result.corruptions, result.leaks, result.findings) == (0, 0, []), result.findings
        assert [info.id for info in self.machine.format.snapshots] == list(self.held)
        for snapshot_id, content in self.held.items():
            assert shown(self.file, snapshot_id, self.machine.slots.get("backing")) == content

    def verify_with_qemu(self, tmp_path: Path) -> None:
        """The same for qemu-img."""
        self.verify()
        path = tmp_path / "image.qcow2"
        path.write_bytes(self.machine.close())
        if "backing" in self.machine.slots:
            (tmp_path / "base.raw").write_bytes(self.machine.slots["backing"])
        report = oracle.check(path)
        mine = own_check(path.read_bytes()).report(str(path), "qcow2").to_dict()
        for key in mine:
            assert mine[key] == report[key], key
        out = tmp_path / "out.raw"
        assert oracle.raw(path, out) == bytes(self.model)
        for snapshot_id, content in self.held.items():
            name = f"snapshot.id={snapshot_id}"
            oracle.ok("qemu-img", "convert", "-O", "raw", "-l", name, str(path), str(out))
            # It shows a snapshot in the size that the disk has now.
            found = out.read_bytes()
            assert found[: len(content)] == content[: len(found)]


def shown(file: bytes, snapshot_id: str, backing: bytes | None = None) -> bytes:
    """What a snapshot holds."""
    machine = Machine(file, backing)
    image = machine.open(qcow2.DRIVER, **{"read-only": True})
    machine.run(image.show_snapshot(snapshot_id, None))
    return machine.read(0, image.size)


KINDS: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "refcount_bits": 8},
    {"cluster_size": 4096, "refcount_bits": 4, "lazy_refcounts": True},
    {"cluster_size": 512, "compat": "0.10"},
    {"cluster_size": 65536},
    {"cluster_size": 16384, "extended_l2": True},
]


@oracle.needs_qemu
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("backing", [False, True])
def test_random_steps(options: dict[str, Any], backing: bool, tmp_path: Path) -> None:
    for seed in range(1 + (not backing)):
        rng = random.Random(f"{options}{backing}{seed}")
        size = 64 * options["cluster_size"] + 512
        disk = Disk(size, rng.randbytes(size - 5120) if backing else None, **options)
        for _ in range(25):
            disk.step(rng)
            disk.verify()
        disk.verify_with_qemu(tmp_path)


# -- what is refused, before anything changes


def entry_of(disk: Disk) -> int:
    """Where the first entry of the snapshot table is."""
    return int(disk.machine.format.header.snapshots_offset)


def reopened(file: bytearray) -> Machine:
    machine = Machine(bytes(file))
    machine.open(qcow2.DRIVER)
    return machine


def full(width: int) -> Disk:
    disk = Disk(1 << 20, cluster_size=4096, refcount_bits=width)
    workload(disk.machine, disk.model, width, 10)
    disk.machine.write(0, b"x" * 4096)
    disk.model[:4096] = b"x" * 4096
    return disk


@pytest.mark.parametrize(("width", "most"), [(1, 0), (2, 2), (4, 14)])
def test_narrow_counts_have_no_room(width: int, most: int) -> None:
    disk = full(width)
    for _ in range(most):
        disk.create()
    clean(disk.machine)
    before = disk.file
    with pytest.raises(NotSupported, match=f"reference counts of {width} bit"):
        disk.create()
    assert disk.file == before
    # What the disk and the snapshot have in common needs no further count.
    for snapshot_id in list(disk.held):
        disk.apply(snapshot_id)
    disk.verify()


def test_names_and_their_limits() -> None:
    disk = Disk(1 << 20, cluster_size=4096)
    assert disk.create("a" * 65535) == "1"
    assert disk.create("ü\udcff") == "2"
    assert disk.machine.format.snapshots[1].name == "ü\udcff"
    before = disk.file
    with pytest.raises(UsageError):
        disk.create("a" * 65536)
    for action in ("apply_snapshot", "delete_snapshot", "show_snapshot"):
        with pytest.raises(NoSuchSnapshot):
            disk.run(getattr(disk.machine.format, action)("3", None))
    assert disk.file == before
    disk.delete("1")
    assert disk.create() == "3"
    disk.verify()


def test_unknown_extra_data_stay() -> None:
    disk = Disk(1 << 20, cluster_size=4096)
    disk.create("one")
    file = bytearray(disk.file)
    at = entry_of(disk)
    extra = struct.pack(">QQQ", 0, 1 << 20, 7) + b"unknown."
    entry = file[at : at + 36] + struct.pack(">I", len(extra)) + extra + b"1one"
    file[at : at + len(entry)] = entry
    machine = reopened(file)
    assert machine.format.snapshots[0].icount == 7
    machine.run(machine.format.create_snapshot(SnapshotInfo("", "two")))
    image = reopened(machine.slots["file"]).format
    assert image.snapshot_table[0].extra == extra
    assert [info.name for info in image.snapshots] == ["one", "two"]


@pytest.mark.parametrize("length", [0, 8, 16])
def test_short_extra_data(length: int) -> None:
    """Version 2 may have none: the size is then that of the disk."""
    disk = Disk(1 << 20, cluster_size=4096, compat="0.10")
    disk.machine.write(0, b"first")
    disk.model[:5] = b"first"
    disk.create("one")
    file = bytearray(disk.file)
    at = entry_of(disk)
    extra = struct.pack(">QQ", 0, 1 << 20)[:length]
    entry = file[at : at + 36] + struct.pack(">I", length) + extra + b"1one"
    file[at : at + 80] = entry.ljust(80, b"\0")
    machine = reopened(file)
    machine.write(0, b"other")
    clean(machine)
    machine.run(machine.format.apply_snapshot("1", None))
    assert machine.read(0, 1 << 20) == bytes(disk.model)
    machine.run(machine.format.delete_snapshot("1", None))
    clean(machine)
    assert own_check(bytes(machine.slots["file"])).findings == []


@pytest.mark.parametrize(
    ("offset", "data", "word"),
    [
        (36, struct.pack(">I", 1025), "extra"),
        (0, struct.pack(">Q", 512), "offset invalid"),
        (0, struct.pack(">Q", 1 << 40), "outside"),
        (8, struct.pack(">I", 5 << 20), "too large"),
        (48, struct.pack(">Q", 1 << 62), "disk is too large"),
    ],
)
def test_damaged_entries(offset: int, data: bytes, word: str) -> None:
    disk = Disk(1 << 20, cluster_size=4096)
    disk.machine.write(0, b"data")
    disk.create("one")
    file = bytearray(disk.file)
    at = entry_of(disk) + offset
    file[at : at + len(data)] = data
    found = own_check(bytes(file))
    assert found.corruptions
    if word == "outside":  # what such a table named is lost, and counts as leaked
        assert found.leaks and not found.uncovered
    else:
        assert found.uncovered and not found.leaks
    if offset == 36:
        with pytest.raises(MalformedImage, match=word):
            reopened(file)
        return
    machine = reopened(file)
    for action in ("apply_snapshot", "delete_snapshot", "show_snapshot"):
        with pytest.raises((MalformedImage, CorruptImage), match=word):
            machine.run(getattr(machine.format, action)("1", None))
    assert machine.slots["file"] == file
    assert machine.read(0, 4) == b"data"


def test_version_2_is_not_resized() -> None:
    disk = Disk(1 << 20, cluster_size=4096, compat="0.10")
    disk.create()
    with pytest.raises(NotSupported, match="Can't resize a v2 image which has snapshots"):
        disk.resize(2 << 20)


def test_compressed_clusters_are_shared(tmp_path: Path) -> None:
    disk = Disk(1 << 20, cluster_size=4096)
    data = b"".join(bytes([i]) * 4096 for i in range(40))
    assert disk.machine.write_packed(0, data)
    disk.model[: len(data)] = data
    disk.create("one")
    assert disk.machine.write_packed(len(data), data)
    disk.model[len(data) : 2 * len(data)] = data
    disk.create("two")
    workload(disk.machine, disk.model, 1, 30)
    disk.verify()
    disk.apply("1")
    workload(disk.machine, disk.model, 2, 10)
    disk.delete("1")
    if oracle.shutil.which("qemu-img"):
        disk.verify_with_qemu(tmp_path)
    disk.verify()
