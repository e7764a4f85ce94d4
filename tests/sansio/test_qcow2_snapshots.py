"""Internal snapshots of qcow2: what they hold, what they share, what both tools make of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import oracle
import pytest
from machine import Machine
from test_qcow2_cross import made, own_check, workload

from diskwright.abilities import SnapshotInfo
from diskwright.formats import qcow2


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
        report, mine = oracle.check(path), own_check(path.read_bytes()).as_dict()
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
]


@oracle.needs_qemu
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("backing", [False, True])
def test_random_steps(options: dict[str, Any], backing: bool, tmp_path: Path) -> None:
    for seed in range(2):
        rng = random.Random(f"{options}{backing}{seed}")
        size = 64 * options["cluster_size"] + 512
        disk = Disk(size, rng.randbytes(size - 5120) if backing else None, **options)
        for _ in range(25):
            disk.step(rng)
            disk.verify()
        disk.verify_with_qemu(tmp_path)
