"""qcow2 with extended L2 entries: what each request does to the subclusters of a cluster."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from diskwright.errors import CorruptImage, DamagedData, UsageError
from diskwright.extents import DATA, HOLE, ZERO
from diskwright.formats import qcow2
from sansio import oracle
from sansio.machine import Machine, put
from sansio.test_qcow2_cross import made, own_check, verify

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
            done = oracle.run("qemu-img", "resize", "-q", "--shrink", str(path), str(wanted))
            if "Failed to zero out new clusters" in done.stderr:
                return  # it cannot grow behind a compressed cluster over a longer backing file
            assert done.returncode == 0, done.stderr
            del model[wanted:]
            model.extend(bytes(wanted - len(model)))
        machine = Machine(path.read_bytes(), base)
        machine.open(qcow2.DRIVER, **({} if base is None else {"backing": "given"}))
        assert machine.read(0, len(model)) == bytes(model)


# -- what becomes of entries


def fresh(backing: bool = False, **options: Any) -> Machine:
    base = random.Random(4).randbytes(20 * CLUSTER) if backing else None
    return made(20 * CLUSTER, base, cluster_size=CLUSTER, extended_l2=True, **options)


@oracle.needs_qemu
@pytest.mark.parametrize("backing", [False, True])
def test_entries_are_those_of_qemu(backing: bool, tmp_path: Path) -> None:
    """The same requests leave the same descriptors and bitmaps, places aside."""
    machine = fresh(backing)
    path = tmp_path / "theirs.qcow2"
    with_base: tuple[str, ...] = ()
    if backing:
        (tmp_path / "base.raw").write_bytes(machine.slots["backing"])
        with_base = ("-b", str(tmp_path / "base.raw"), "-F", "raw")
    options = "extended_l2=on,cluster_size=16k"
    create = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *with_base)
    oracle.ok(*create, str(path), str(20 * CLUSTER))
    work: list[tuple[str, int, int]] = [
        ("write", 0, 3 * CLUSTER),
        ("write", 3 * CLUSTER, SUB),
        ("write", 4 * CLUSTER + 5 * SUB, 100),
        ("write", 5 * CLUSTER - 100, 200),
        ("write -z", 6 * CLUSTER, 2 * SUB),
        ("write -z", 7 * CLUSTER, CLUSTER),
        ("write -z", 0, CLUSTER),
        ("write -z -u", CLUSTER, CLUSTER),
        ("discard", 2 * CLUSTER, CLUSTER),
        ("write -z", 4 * CLUSTER + 5 * SUB, SUB),
        ("write", 7 * CLUSTER + 3 * SUB, 1),
        ("write", 10 * CLUSTER - SUB, 2 * CLUSTER + 2 * SUB),
        ("write -z", 10 * CLUSTER + SUB, 3 * SUB),
        ("discard", 6 * CLUSTER, CLUSTER),
        ("write", 20 * CLUSTER - 3 * SUB, 3 * SUB),
    ]
    for kind, offset, length in work:
        pattern = "-P 7 " if kind == "write" else ""
        oracle.ok("qemu-io", "-c", f"{kind} -q {pattern}{offset} {length}", str(path))
        if kind == "write":
            machine.write(offset, b"\7" * length)
        elif kind == "discard":
            assert machine.discard(offset, length)
        else:
            machine.zero(offset, length, unmap=kind.endswith("-u"))
    theirs = path.read_bytes()
    for index in range(20):
        word, zero, allocated = struct.unpack_from(">QII", theirs, entry_place(theirs, index))
        mine = entry(machine, index)
        assert (bool(word & OFFSET), word >> 56) == (bool(mine[0] & OFFSET), mine[0] >> 56), index
        assert (zero, allocated) == mine[1:], index


def test_a_write_allocates_what_it_touches() -> None:
    machine = fresh(backing=True)
    machine.write(CLUSTER + 3 * SUB, b"a" * SUB)
    log = len(machine.log)
    machine.write(CLUSTER + 7 * SUB + 10, b"b")  # filled up from the backing file
    moved = [len(data) for kind, *rest in machine.log[log:] if kind == "write" for data in rest[1:]]
    assert moved == [SUB]
    assert entry(machine, 1)[1:] == (0, 1 << 3 | 1 << 7)
    host = entry(machine, 1)[0]
    plan = machine._plan([(CLUSTER + 9 * SUB, 5), (CLUSTER + 30 * SUB, SUB)], "write")
    assert [(s.guest, s.length) for s in plan.steps] == [
        (CLUSTER + 9 * SUB, SUB), (CLUSTER + 30 * SUB, SUB)
    ]  # fmt: skip
    machine.abort(plan)
    assert entry(machine, 1) == (host, 0, 1 << 3 | 1 << 7)


def test_zeroes_keep_or_free_the_space() -> None:
    machine = fresh()
    machine.write(0, b"a" * 2 * CLUSTER)
    machine.zero(0, 31 * SUB)
    machine.zero(CLUSTER, 31 * SUB, unmap=True)
    assert entry(machine, 0)[1:] == entry(machine, 1)[1:] == (ALL >> 1, 1 << 31)
    machine.zero(31 * SUB, SUB)
    machine.zero(CLUSTER + 31 * SUB, SUB, unmap=True)
    kept, freed = entry(machine, 0), entry(machine, 1)
    assert kept[0] & OFFSET and kept[1:] == (ALL, 0)
    assert freed == (0, ALL, 0)
    machine.write(5 * SUB, b"b")
    assert entry(machine, 0) == (kept[0], ALL & ~(1 << 5), 1 << 5)
    assert machine.read(0, CLUSTER) == bytes(5 * SUB) + b"b" + bytes(CLUSTER - 5 * SUB - 1)
    assert own_check(machine.close()).findings == []


def test_parts_of_compressed_clusters() -> None:
    machine = fresh()
    assert machine.write_packed(0, b"p" * CLUSTER)
    assert machine.format.plan([(0, SUB)], "zero") is None
    assert machine.discard(0, SUB) and machine.read(0, SUB) == b"p" * SUB
    machine.zero(0, SUB)  # as data
    word, zero, allocated = entry(machine, 0)
    assert word >> 62 == 2 and (zero, allocated) == (0, ALL)
    assert machine.read(0, CLUSTER) == bytes(SUB) + b"p" * (CLUSTER - SUB)
    assert own_check(machine.close()).findings == []


@oracle.needs_qemu
def test_what_a_snapshot_shares_moves_along(tmp_path: Path) -> None:
    machine = fresh(backing=True)
    (tmp_path / "base.raw").write_bytes(machine.slots["backing"])
    machine.write(2 * SUB, b"a" * 3 * SUB)
    machine.zero(10 * SUB, 2 * SUB)
    path = tmp_path / "image.qcow2"
    path.write_bytes(machine.close())
    before = machine.read(0, 20 * CLUSTER)
    oracle.ok("qemu-img", "snapshot", "-c", "one", str(path))
    machine = Machine(path.read_bytes(), (tmp_path / "base.raw").read_bytes())
    machine.open(qcow2.DRIVER, backing="given")
    old = entry(machine, 0)
    machine.zero(11 * SUB, SUB)  # says nothing of the place
    machine.write(3 * SUB + 7, b"b" * SUB)
    new = entry(machine, 0)
    assert new[0] & OFFSET != old[0] & OFFSET
    assert new[1:] == old[1:] == (0b11 << 10, 0b111 << 2)
    path.write_bytes(machine.close())
    oracle.check(path)
    out = tmp_path / "out.raw"
    after = bytearray(before)
    after[3 * SUB + 7 : 4 * SUB + 7] = b"b" * SUB
    assert oracle.raw(path, out) == bytes(after)
    oracle.ok("qemu-img", "convert", "-l", "one", "-O", "raw", str(path), str(out))
    assert out.read_bytes() == before


def test_map_tells_subclusters_apart() -> None:
    machine = fresh(backing=True)
    machine.write(CLUSTER - SUB, b"a" * 2 * SUB)
    machine.zero(CLUSTER + SUB, CLUSTER - SUB)
    machine.zero(2 * CLUSTER, CLUSTER + 2 * SUB)
    found = [(at, extent.kind, extent.length) for at, extent in machine.extents(0, 20 * CLUSTER)]
    assert found == [
        (0, HOLE, CLUSTER - SUB),
        (CLUSTER - SUB, DATA, 2 * SUB),
        (CLUSTER + SUB, ZERO, CLUSTER - SUB),
        (2 * CLUSTER, ZERO, CLUSTER + 2 * SUB),
        (3 * CLUSTER + 2 * SUB, HOLE, 17 * CLUSTER - 2 * SUB),
    ]


# -- images that break the rules


def broken(word: int, value: int, index: int = 0) -> Machine:
    """An image with one word (0 or 1) of an entry changed; cluster 0 is full, 1 is compressed."""
    machine = fresh()
    machine.write(0, b"d" * CLUSTER)
    machine.write_packed(CLUSTER, b"p" * CLUSTER)
    file = bytearray(machine.close())
    place = entry_place(file, index) + 8 * word
    (old,) = struct.unpack_from(">Q", file, place)
    struct.pack_into(">Q", file, place, old ^ value)
    machine = Machine(bytes(file))
    machine.open(qcow2.DRIVER)
    return machine


def found(machine: Machine) -> str:
    (text,) = own_check(bytes(machine.slots["file"])).findings
    return text


def test_both_bits_of_a_subcluster() -> None:
    machine = broken(1, 1 << 32 + 4)
    assert machine.read(0, 4 * SUB) == b"d" * 4 * SUB
    assert machine.read(5 * SUB, SUB) == b"d" * SUB
    for attempt in (
        lambda: machine.read(4 * SUB, 1),
        lambda: machine.write(4 * SUB, b"x"),
        lambda: machine.zero(0, SUB),
        lambda: machine.discard(0, SUB),
    ):
        with pytest.raises(CorruptImage, match="Invalid cluster entry") as caught:
            attempt()
        assert caught.value.field == "subcluster bitmap"
    assert "corrupted subcluster allocation bitmap" in found(machine)
    machine.zero(0, CLUSTER)  # as a whole it may be replaced
    assert machine.read(0, CLUSTER) == bytes(CLUSTER)
    assert own_check(machine.close()).findings == []


def test_subclusters_without_a_place() -> None:
    machine = broken(1, 1, index=3)
    with pytest.raises(CorruptImage):
        machine.read(3 * CLUSTER, 1)
    assert machine.read(3 * CLUSTER + SUB, 1) == b"\0"
    with pytest.raises(CorruptImage):
        machine.write(3 * CLUSTER + SUB, b"x")
    assert "Unallocated cluster 3 has non-zero subcluster" in found(machine)


def test_a_bitmap_of_a_compressed_cluster() -> None:
    machine = broken(1, 1, index=1)
    assert machine.read(CLUSTER, 2) == b"pp"
    assert "compressed cluster 1 with non-zero subcluster allocation bitmap" in found(machine)
    machine.write(CLUSTER, b"x")
    assert machine.read(CLUSTER, 2) == b"xp"
    assert own_check(machine.close()).findings == []


def test_the_zero_flag_means_nothing() -> None:
    machine = broken(0, 1)
    assert machine.read(0, CLUSTER) == b"d" * CLUSTER
    assert "reserved bits set" in found(machine)


@oracle.needs_qemu
@pytest.mark.parametrize(
    ("word", "value", "index", "reads"),
    [
        (1, 1 << 32 + 4, 0, b"d" * CLUSTER),
        (1, 1, 3, bytes(CLUSTER)),
        (1, 1, 1, b"p" * CLUSTER),
        (0, 1, 0, b"d" * CLUSTER),
        (0, 1 << 40, 0, bytes(CLUSTER)),
        (0, 512, 0, b"d" * CLUSTER),
        (0, 1 << 63, 0, b"d" * CLUSTER),
        (0, 1 << 63, 1, b"p" * CLUSTER),
    ],
)
def test_repair(word: int, value: int, index: int, reads: bytes, tmp_path: Path) -> None:
    machine = broken(word, value, index)
    file = bytes(machine.slots["file"])
    log = len(machine.log)
    result = machine.run(machine.format.check(fix="all"))
    assert (result.corruptions, result.leaks, result.corruptions_fixed > 0) == (0, 0, True)
    states = [bytearray(file)]
    for kind, *rest in machine.log[log:]:
        if kind == "write":
            states.append(states[-1][:])
            put(states[-1], *rest)
    for state in states:  # whenever it ends, it can be done again
        again = Machine(bytes(state))
        again.open(qcow2.DRIVER, check=True)
        again.run(again.format.check(fix="all"))
        machine = Machine(bytes(again.slots["file"]))
        machine.open(qcow2.DRIVER)
        assert machine.read(index * CLUSTER, CLUSTER) == reads
        assert machine.read((index != 1) * CLUSTER, 1) == (b"d" if index == 1 else b"p")
    path = tmp_path / "image.qcow2"
    path.write_bytes(machine.close())
    oracle.check(path)


@pytest.mark.parametrize("seed", range(20))
def test_noise_in_the_table(seed: int) -> None:
    """Whatever the bitmaps say: an answer or CorruptImage, and no write beside the clusters."""
    rng = random.Random(seed)
    machine = fresh()
    machine.write(0, b"d" * 5 * CLUSTER)
    file = bytearray(machine.close())
    for index in range(8):
        place = entry_place(file, index)
        if rng.random() < 0.3:
            struct.pack_into(">Q", file, place, rng.getrandbits(64))
        struct.pack_into(">Q", file, place + 8, rng.getrandbits(64) & rng.getrandbits(64))
    machine = Machine(bytes(file))
    machine.open(qcow2.DRIVER)
    head = bytes(machine.slots["file"][:CLUSTER])
    for _ in range(40):
        offset, length = rng.randrange(8 * CLUSTER), rng.choice([1, SUB, CLUSTER])
        aligned = offset - offset % SUB
        for attempt, *arguments in (
            (machine.read, offset, length),
            (machine.write, offset, b"w" * length),
            (machine.change, aligned, SUB, "zero"),
            (machine.discard, aligned, SUB),
        ):
            with contextlib.suppress(CorruptImage, DamagedData):
                attempt(*arguments)
    machine.flush()
    own_check(bytes(machine.slots["file"]))
    assert bytes(machine.slots["file"][:72]) == head[:72]


# -- creating and growing


def test_refused_options() -> None:
    for options, text in (
        ({"cluster_size": 8192}, "at least 16384 bytes"),
        ({"compat": "0.10"}, "compatibility level 1.1 and above"),
    ):
        with pytest.raises(UsageError, match=text):
            made(1 << 20, extended_l2=True, **options)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocated_over_a_backing_file(mode: str, tmp_path: Path) -> None:
    machine = fresh(backing=True, preallocation=mode)
    model = bytearray(machine.slots["backing"])
    assert machine.read(0, len(model)) == bytes(model)
    assert entry(machine, 7)[0] >> 63 and entry(machine, 7)[1:] == (0, 0)
    length = len(machine.slots["file"])
    machine.write(7 * CLUSTER + 100, b"x")
    model[7 * CLUSTER + 100] = ord("x")
    assert len(machine.slots["file"]) == length
    assert entry(machine, 7)[1:] == (0, 1)
    verify(machine, model, tmp_path)


@pytest.mark.parametrize("backing", [False, True])
def test_growth_with_preallocation(backing: bool, tmp_path: Path) -> None:
    machine = made(5 * CLUSTER + 3 * SUB, b"b" * 9 * CLUSTER if backing else None,
                   cluster_size=CLUSTER, extended_l2=True)  # fmt: skip
    machine.write(5 * CLUSTER + SUB, b"x")
    machine.run(machine.format.resize(12 * CLUSTER, "metadata"))
    model = bytearray(b"b" * (5 * CLUSTER + 3 * SUB) if backing else bytes(5 * CLUSTER + 3 * SUB))
    model[5 * CLUSTER + SUB] = ord("x")
    model.extend(bytes(12 * CLUSTER - len(model)))
    assert entry(machine, 10)[0] >> 63 and entry(machine, 10)[2] == 0
    verify(machine, model, tmp_path)
