"""qcow2 against qemu-img in both directions, over cluster sizes and refcount widths."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diskwright.findings import CheckResult
from diskwright.formats import qcow2
from sansio import oracle
from sansio.machine import Machine

SIZES = [512, 1024, 4096, 65536, 2 << 20]
WIDTHS = [1, 2, 4, 8, 16, 32, 64]


def made(size: int, backing: bytes | None = None, **options: object) -> Machine:
    """A fresh image, open for writing."""
    machine = Machine(backing=backing)
    if backing is not None:
        options |= {"backing_file": "base.raw", "backing_fmt": "raw"}
    machine.run(qcow2.create_new({"size": size, **options}))
    machine.open(qcow2.DRIVER)
    return machine


def workload(machine: Machine, model: bytearray, seed: int, steps: int) -> None:
    """Random requests, the same on the machine and on the model."""
    rng = random.Random(seed)
    unit, size = machine.format.unit, len(model)
    for _ in range(steps):
        what = rng.random()
        length = min(rng.choice([1, 512, unit, 3 * unit, unit + 700]), size)
        offset = rng.randrange(0, size - length + 1)
        if what < 0.6:
            data = rng.randbytes(length)
            machine.write(offset, data)
            model[offset : offset + length] = data
        elif what < 0.9:
            offset -= offset % unit
            length = min(size - offset, unit * rng.choice([1, 2, 5]))
            if what < 0.7:
                machine.zero(offset, length, unmap=what < 0.65)
            elif not machine.discard(offset, length):
                continue
            model[offset : offset + length] = bytes(length)
        else:
            machine.flush()
    assert machine.read(0, size) == bytes(model)


def own_check(file: bytes) -> CheckResult:
    machine = Machine(file)
    machine.open(qcow2.DRIVER, check=True)
    result: CheckResult = machine.run(machine.format.check())
    return result


def verify(machine: Machine, model: bytearray, tmp_path: Path) -> None:
    """The closed image is clean and has the model's bytes, for us and for qemu-img."""
    file = machine.close()
    result = own_check(file)
    assert (result.corruptions, result.leaks, result.findings) == (0, 0, [])
    if oracle.shutil.which("qemu-img") is None:
        return
    path = tmp_path / "image.qcow2"
    path.write_bytes(file)
    if "backing" in machine.slots:
        (tmp_path / "base.raw").write_bytes(machine.slots["backing"])
    report = oracle.check(path)
    mine = result.report(str(path), "qcow2").to_dict()
    for key in mine:
        assert mine[key] == report[key], key
    assert oracle.raw(path, tmp_path / "out.raw") == bytes(model)


@pytest.mark.parametrize("cluster_size", SIZES)
@pytest.mark.parametrize("backing", [False, True])
def test_cluster_sizes(cluster_size: int, backing: bool, tmp_path: Path) -> None:
    size = 40 * cluster_size + 512
    base = random.Random(1).randbytes(size) if backing else None
    machine = made(size, base, cluster_size=cluster_size)
    model = bytearray(base or bytes(size))
    workload(machine, model, cluster_size, 60)
    verify(machine, model, tmp_path)


@pytest.mark.parametrize("width", WIDTHS)
def test_refcount_widths(width: int, tmp_path: Path) -> None:
    size = 3 << 20
    machine = made(size, cluster_size=512, refcount_bits=width)
    model = bytearray(size)
    machine.write(0, b"\x5a" * (2 << 20))
    model[: 2 << 20] = b"\x5a" * (2 << 20)
    workload(machine, model, width, 100)
    verify(machine, model, tmp_path)


@pytest.mark.parametrize("options", [{"compat": "0.10"}, {"lazy_refcounts": True}])
@pytest.mark.parametrize("backing", [False, True])
def test_versions(options: dict[str, object], backing: bool, tmp_path: Path) -> None:
    size = (1 << 20) + 1024
    base = random.Random(2).randbytes(size // 2) if backing else None
    machine = made(size, base, cluster_size=4096, **options)
    model = bytearray((base or b"").ljust(size, b"\0"))
    workload(machine, model, 5, 150)
    verify(machine, model, tmp_path)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_preallocation(preallocation: str, cluster_size: int, tmp_path: Path) -> None:
    size = 5 << 20
    machine = made(size, cluster_size=cluster_size, preallocation=preallocation)
    before = len(machine.slots["file"])
    machine.write(12345, b"x" * 100_000)
    assert len(machine.slots["file"]) == before
    model = bytearray(size)
    model[12345:112345] = b"x" * 100_000
    verify(machine, model, tmp_path)


@oracle.needs_qemu
@pytest.mark.parametrize("cluster_size", SIZES)
@pytest.mark.parametrize("width", [1, 16, 64])
@pytest.mark.parametrize("backing", [False, True])
def test_theirs(cluster_size: int, width: int, backing: bool, tmp_path: Path) -> None:
    """An image that qemu-io wrote is read, written on and handed back."""
    size = 8 << 20
    path = tmp_path / "theirs.qcow2"
    more = []
    base = None
    if backing:
        base = random.Random(3).randbytes(size)
        (tmp_path / "base.raw").write_bytes(base)
        more = ["-b", str(tmp_path / "base.raw"), "-F", "raw"]
    option = f"cluster_size={cluster_size},refcount_bits={width}"
    oracle.ok("qemu-img", "create", "-q", "-f", "qcow2", "-o", option, *more, str(path), str(size))
    rng = random.Random(cluster_size + width)
    commands: list[str] = []
    for i in range(20):
        at, length = rng.randrange(0, size // 512 - 200) * 512, rng.randrange(1, 200) * 512
        verb = rng.choice([f"write -P {i + 1}", "write -z", "write -z -u", "discard"])
        commands += ["-c", f"{verb} {at} {length}"]
    oracle.ok("qemu-io", *commands, str(path))
    model = bytearray(oracle.raw(path, tmp_path / "out.raw"))
    machine = Machine(path.read_bytes(), base)
    machine.open(qcow2.DRIVER)
    assert machine.opened == ([(str(tmp_path / "base.raw"), "raw")] if backing else [])
    assert machine.read(0, size) == bytes(model)
    result = own_check(path.read_bytes())
    report = oracle.check(path)
    for key, value in result.report(str(path), "qcow2").to_dict().items():
        assert value == report[key], key
    workload(machine, model, 9, 40)
    verify(machine, model, tmp_path)
