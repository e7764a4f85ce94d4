"""Other sizes of VHDX images, by bytes alone."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from diskwright.errors import NotSupported, UsageError
from house.tinyvhdx import BAT, DATA, FULL, MIB, PARTIAL, ZERO, TinyVhdx

from . import oracle
from .test_vhdx_check import PARENT, states
from .vhdx import clean, content, created, header_of, image, opened

TIB = 1 << 40


def resized(data: bytes, size: int, backing: bytes | None = None, **options: object) -> bytes:
    options.setdefault("shrink", True)
    machine = opened(data, backing)
    machine.run(machine.format.resize(size, **options))
    assert machine.format.size == size
    out = machine.close()
    assert not clean(out, backing).leaks
    return out


def expected(before: bytes, size: int) -> bytes:
    return before[:size].ljust(size, b"\0")


@pytest.mark.parametrize("block", [1, 2, 8])
@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("fixed", [False, True])
def test_random_sizes(block: int, sector: int, fixed: bool) -> None:
    rng = random.Random(f"{block} {sector} {fixed}")
    data = created(
        size=6 * MIB,
        block_size=block * MIB,
        logical_sector_size=sector,
        subformat="fixed" if fixed else "dynamic",
        block_state_zero=rng.random() < 0.5,
    )
    model = bytes(6 * MIB)
    for turn in range(6):
        machine = opened(data)
        for _ in range(3):
            if machine.format.size == 0:
                break
            at = rng.randrange(machine.format.size)
            piece = bytes([turn + 1]) * min(rng.choice((1, 700, MIB)), machine.format.size - at)
            machine.write(at, piece)
            model = model[:at] + piece + model[at + len(piece) :]
        data = machine.close()
        size = rng.randrange(0, 20 * MIB // sector) * sector
        if rng.random() < 0.3:
            size -= size % (block * MIB)
        data = resized(data, size)
        model = expected(model, size)
        assert content(data) == model
        assert header_of(data)[3] == bytes(16)


def test_what_was_cut_off_never_comes_back() -> None:
    tiny = TinyVhdx(blocks={n: (FULL, bytes([n + 1]) * MIB) for n in range(4)})
    out = resized(tiny.data, MIB + 512)
    assert len(out) == DATA + 2 * MIB  # the end of the file is given back
    out = resized(out, 4 * MIB)
    assert content(out) == expected(bytes(tiny.model)[: MIB + 512], 4 * MIB)


def test_what_others_left_behind_the_end_is_not_shown() -> None:
    """Bytes behind the end in the last block, and entries behind those of the table."""
    tiny = TinyVhdx(size=MIB + 512, blocks={1: (FULL, b"x" * MIB)})
    data = bytearray(tiny.data)
    for index in (2, 3, 700, 4000):
        struct.pack_into("<Q", data, BAT + 8 * index, DATA | FULL)
    out = resized(bytes(data), 4 * MIB)
    assert content(out) == expected(bytes(MIB) + b"x" * 512, 4 * MIB)


def test_a_table_that_has_no_room_moves() -> None:
    tiny = TinyVhdx(blocks={0: (FULL, b"a" * MIB), 3: (FULL, b"d" * MIB)})
    size = 400 << 30
    machine = opened(tiny)
    machine.run(machine.format.resize(size))
    machine.write(size - 700, b"the end" * 100)
    machine.write(200 << 30, b"middle")
    out = machine.close()
    clean(out)
    machine = opened(out, **{"read-only": True})
    assert image(machine).bat.offset >= DATA + 2 * MIB
    assert image(machine).bat.length == 4 * MIB
    assert machine.read(0, 4 * MIB) == bytes(tiny.model)
    assert machine.read(size - 700, 700) == b"the end" * 100
    assert machine.read((200 << 30) - 3, 12) == b"\0\0\0middle\0\0\0"
    assert machine.read(MIB << 17, 9) == bytes(9)
    # The old table's place is free for small blocks.
    assert out[BAT : BAT + 8] != tiny.data[BAT : BAT + 8]


@pytest.mark.parametrize("size", [64 * TIB, 64 * TIB - 512, 2 * TIB, (1 << 32) + 512, 1 << 31])
def test_borders(size: int) -> None:
    data = created(size=MIB, block_size=32 * MIB)
    machine = opened(data)
    machine.run(machine.format.resize(size))
    machine.write(size - 5, b"hello")
    data = machine.close()
    machine = opened(data)
    assert machine.read(size - 10, 10) == b"\0\0\0\0\0hello"
    assert machine.read(size // 2, 10) == bytes(10)
    machine.run(machine.format.resize(MIB, shrink=True))
    assert content(machine.close()) == bytes(MIB)


def test_what_does_not_go_is_said_before_anything_changes() -> None:
    machine = opened(TinyVhdx(sector=4096))
    before = bytes(machine.slots["file"])
    for arguments, said in (
        ((64 * TIB + 4096,), "64TB"),
        ((512,), "multiple of 4096"),
        ((MIB,), "--shrink"),
        ((MIB, "full", True), "Preallocation"),
        ((8 * MIB, "metadata"), "Unsupported"),
    ):
        with pytest.raises(UsageError, match=said):
            machine.run(machine.format.resize(*arguments))
    child = TinyVhdx(parent=PARENT)
    with pytest.raises(NotSupported):
        other = opened(child, bytes(MIB))
        other.run(other.format.resize(8 * MIB, "full"))
    machine.run(machine.format.resize(4 * MIB))
    assert bytes(machine.slots["file"]) == before


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_new_space_can_be_had_at_once(preallocation: str) -> None:
    tiny = TinyVhdx(blocks={0: (FULL, b"a" * MIB)})
    machine = opened(tiny)
    machine.run(machine.format.resize(9 * MIB, preallocation))
    out = machine.close()
    found = clean(out)
    assert found.allocated_clusters == (1 if preallocation == "off" else 6)
    assert content(out) == expected(bytes(tiny.model), 9 * MIB)


# -- images with a parent
@pytest.mark.parametrize("old", [3 * MIB, 2 * MIB + 512, 3 * MIB - 4096, 512])
@pytest.mark.parametrize("state", [0, FULL, PARTIAL, ZERO])
def test_a_longer_parent_does_not_show_behind_the_old_end(old: int, state: int) -> None:
    backing = b"B" * (6 * MIB)
    last = (old - 1) // MIB
    tiny = TinyVhdx(
        size=old,
        blocks={last: (state, b"c" * MIB)} if state else {},
        parent=PARENT,
        bitmap={last * 2048} if state == PARTIAL else set(),
    )
    before = content(tiny.data, backing)
    for size in (8 * MIB, old + 512, 4 * MIB + 1024):
        out = resized(tiny.data, size, backing)
        assert content(out, backing) == expected(before, size)


def test_shrinking_and_growing_over_a_parent() -> None:
    rng = random.Random(3)
    backing = rng.randbytes(7 * MIB)
    tiny = TinyVhdx(
        size=6 * MIB,
        blocks={0: (PARTIAL, b"p" * MIB), 4: (PARTIAL, b"q" * MIB), 5: (FULL, b"f" * MIB)},
        parent=PARENT,
        bitmap={0, 5, 4 * 2048, 4 * 2048 + 9},
    )
    data, model = tiny.data, content(tiny.data, backing)
    for _ in range(8):
        size = rng.randrange(1, 9 * MIB // 512) * 512
        data = resized(data, size, backing)
        model = expected(model, size)
        assert content(data, backing) == model


# -- losses of power
@pytest.mark.parametrize("size", [MIB + 512, 7 * MIB, 300 << 30])
@pytest.mark.parametrize("over_parent", [False, True])
def test_every_state_between_is_one_of_the_two_sizes(size: int, over_parent: bool) -> None:
    backing = b"B" * (3 * MIB) if over_parent else None
    tiny = TinyVhdx(
        size=2 * MIB + 1024,
        blocks={n: (PARTIAL if over_parent else FULL, bytes([n + 1]) * MIB) for n in range(3)},
        parent=PARENT if over_parent else None,
        bitmap={0, 2048, 4096} if over_parent else None,
    )
    old = 2 * MIB + 1024
    before = content(tiny.data, backing)
    machine = opened(tiny, backing)
    machine.log.clear()
    machine.run(machine.format.resize(size, shrink=True))
    machine.close()
    kept = min(size, old)
    sizes = set()
    for state in states(tiny.data, machine.log):
        clean(state, backing)
        again = opened(state, backing)
        sizes.add(again.format.size)
        found = again.read(0, min(again.format.size, 8 * MIB))
        if again.format.size == old and size > old:
            assert found == before
        elif again.format.size == size:
            assert found == expected(before, min(size, 8 * MIB))
        else:
            assert found[:kept] == before[:kept]
        clean(again.close(), backing)
    assert sizes == {old, size}


@oracle.needs_qemu
def test_qemu_img_reads_a_moved_table(tmp_path: Path) -> None:
    tiny = TinyVhdx(blocks={0: (FULL, b"a" * MIB), 3: (FULL, b"d" * MIB)})
    machine = opened(tiny)
    machine.run(machine.format.resize(300 << 30))
    machine.write(250 << 30, b"there" * 100)
    path = tmp_path / "image.vhdx"
    path.write_bytes(machine.close())
    oracle.check(path)
    read = oracle.ok("qemu-io", "-r", "-f", "vhdx", "-c", f"read -v {250 << 30} 16", str(path))
    assert "there" in read
    theirs = oracle.ok("qemu-io", "-r", "-f", "vhdx", "-c", f"read -P 0x64 {3 * MIB} 1M", str(path))
    assert "failed" not in theirs


@oracle.needs_qemu
def test_qemu_img_reads_the_states_between(tmp_path: Path) -> None:
    tiny = TinyVhdx(blocks={n: (FULL, bytes([n + 1]) * MIB) for n in range(3)})
    before = bytes(tiny.model)
    path, raw = tmp_path / "image.vhdx", tmp_path / "raw"
    for size in (MIB, 200 << 30):
        machine = opened(tiny)
        machine.log.clear()
        machine.run(machine.format.resize(size, shrink=True))
        machine.close()
        for state in states(tiny.data, machine.log):
            path.write_bytes(state)
            oracle.run("qemu-img", "check", "-r", "all", str(path))
            oracle.check(path)
            raw.write_bytes(before[:MIB])
            oracle.ok("qemu-io", "-r", "-f", "vhdx", "-c", f"read -P 1 0 {MIB}", str(path))


@pytest.mark.parametrize("size", [MIB + 4096, 7 * MIB + 512])
def test_a_last_block_that_is_not_all_in_the_file(size: int) -> None:
    """QEMU's fixed images end where the disk does."""
    tiny = TinyVhdx(size=MIB + 512, fixed=True, blocks=dict.fromkeys((0, 1), (FULL, b"x" * MIB)))
    data = tiny.data[: 512 - MIB]
    assert not clean(data).leaks
    out = resized(data, size)
    assert content(out) == expected(bytes(tiny.model), size)
