"""qcow2 with extended L2 entries: what each request does to the subclusters of a cluster."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import oracle
import pytest
from machine import Machine
from test_qcow2_cross import made, verify

from diskwright.formats import qcow2

CLUSTER, SUB = 16384, 512
ALL = (1 << 32) - 1
OFFSET = (1 << 56) - (1 << 9)


def entry_place(file: bytes | bytearray, index: int) -> int:
    """Where the extended L2 entry of a guest cluster is in the file."""
    bits, l1 = struct.unpack_from(">I", file, 20)[0], struct.unpack_from(">Q", file, 40)[0]
    per_table = (1 << bits) // 16
    (table,) = struct.unpack_from(">Q", file, l1 + 8 * (index // per_table))
    return (table & OFFSET) + 16 * (index % per_table)


def entry(machine: Machine, index: int) -> tuple[int, int, int]:
    """(descriptor, zero bits, allocation bits) once all is flushed."""
    machine.flush()
    file = machine.slots["file"]
    word, zero, allocated = struct.unpack_from(">QII", file, entry_place(file, index))
    return word, zero, allocated


def fine_workload(machine: Machine, model: bytearray, rng: random.Random, steps: int) -> None:
    """Random requests at all alignments, the same on the machine and on the model."""
    size = len(model)
    unit, sub = machine.format.unit, machine.format.zero_unit
    for _ in range(steps):
        what = rng.random()
        length = min(rng.choice([1, sub, sub + 3, 5 * sub, unit, 2 * unit + 700]), size)
        offset = rng.randrange(0, size - length + 1)
        if rng.random() < 0.5:
            offset -= offset % rng.choice([sub, unit])
        if what < 0.5:
            data = rng.randbytes(length)
            machine.write(offset, data)
            model[offset : offset + length] = data
        elif what < 0.6:
            offset -= offset % unit
            data = rng.randbytes(100) * (min(unit, size - offset) // 100 + 1)
            data = data[: min(unit, size - offset)]
            if machine.write_packed(offset, data):
                model[offset : offset + len(data)] = data
        elif what < 0.9:
            offset -= offset % sub
            end = min(offset + length, size)
            end -= 0 if end == size else end % sub
            for start, stop in parts(offset, end, unit):
                if what < 0.8:
                    machine.zero(start, stop - start, unmap=what < 0.7)
                    model[start:stop] = bytes(stop - start)
                else:
                    assert machine.discard(start, stop - start)
                    now = machine.read(start, stop - start)
                    # Of a compressed cluster a part stays.
                    assert now in (model[start:stop], bytes(stop - start))
                    model[start:stop] = now
        else:
            machine.flush()
    assert machine.read(0, size) == bytes(model)


def parts(start: int, end: int, unit: int) -> list[tuple[int, int]]:
    """[start, end) cut so that no part has both whole units and a piece of one."""
    out = []
    while start < end:
        stop = min(end, start - start % unit + unit)
        out.append((start, stop))
        start = stop
    return out


@pytest.mark.parametrize("backing", [None, 11, 40])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("poison", [False, True])
def test_random_requests(backing: int | None, seed: int, poison: bool, tmp_path: Path) -> None:
    rng = random.Random(seed)
    size = 20 * CLUSTER + rng.choice([0, 512, 700 // 512 * 512, CLUSTER // 2])
    base = None if backing is None else rng.randbytes(backing * CLUSTER // 2 + 100)
    machine = made(size, base, cluster_size=CLUSTER, extended_l2=True)
    machine.poison = poison
    model = bytearray((base or b"").ljust(size, b"\0")[:size])
    fine_workload(machine, model, rng, 150)
    verify(machine, model, tmp_path)


# -- taking turns with QEMU on one image


def their_turn(path: Path, model: bytearray, rng: random.Random) -> None:
    """Random commands of qemu-io, the same on the model."""
    size = len(model)
    for _ in range(8):
        kind = rng.choice(["write", "write", "write -c", "write -z", "write -z -u", "discard"])
        unit = CLUSTER if kind in ("write -c", "discard") else rng.choice([512, 3 * 512])
        offset = rng.randrange(size // unit + 1) * unit
        length = min(size - offset, (1 if kind == "write -c" else rng.choice([1, 2, 5])) * unit)
        if kind == "discard" and offset + length < size:
            length -= length % CLUSTER
        if length <= 0:
            continue
        byte = rng.randrange(1, 256) if kind in ("write", "write -c") else 0
        pattern = f"-P {byte} " if byte else ""
        command = f"{kind} -q {pattern}{offset} {length}"
        done = oracle.run("qemu-io", "-f", "qcow2", "-c", command, str(path))
        if done.returncode == 0:
            model[offset : offset + length] = bytes([byte]) * length
        else:  # what is stored is not compressed again
            assert kind == "write -c", (command, done.stdout, done.stderr)


@oracle.needs_qemu
@pytest.mark.parametrize("backing", [None, 7, 30])
@pytest.mark.parametrize("seed", range(2))
def test_turns_with_qemu(backing: int | None, seed: int, tmp_path: Path) -> None:
    rng = random.Random(100 + seed)
    size = 12 * CLUSTER + rng.choice([0, 512, 5 * 512])
    base = None if backing is None else rng.randbytes(backing * CLUSTER // 2 + 512)
    options = {"preallocation": rng.choice(["off", "metadata"])}
    machine = made(size, base, cluster_size=CLUSTER, extended_l2=True, **options)
    if base is not None:
        (tmp_path / "base.raw").write_bytes(base)
    model = bytearray((base or b"").ljust(size, b"\0")[:size])
    path = tmp_path / "image.qcow2"
    for turn in range(5):
        fine_workload(machine, model, rng, 25)
        if turn % 2:
            machine.flush()
            wanted = rng.choice([size, 9 * CLUSTER + 512, 14 * CLUSTER, 11 * CLUSTER + 7 * 512])
            machine.run(machine.format.resize(wanted, shrink=True))
            del model[wanted:]
            model.extend(bytes(wanted - len(model)))
            assert machine.read(0, wanted) == bytes(model)
        path.write_bytes(machine.close())
        report = oracle.check(path)
        assert (report.get("corruptions", 0), report.get("leaks", 0)) == (0, 0), report
        assert oracle.raw(path, tmp_path / "out.raw") == bytes(model)
        their_turn(path, model, rng)
        if turn % 2 == 0:
            wanted = rng.choice([8 * CLUSTER + 1024, 13 * CLUSTER + 512])
            oracle.ok("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", str(path), str(wanted))
            del model[wanted:]
            model.extend(bytes(wanted - len(model)))
        machine = Machine(path.read_bytes(), base)
        machine.open(qcow2.DRIVER, **({} if base is None else {"backing": "given"}))
        assert machine.read(0, len(model)) == bytes(model)
