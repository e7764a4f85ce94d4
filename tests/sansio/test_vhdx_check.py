"""Checks of VHDX images, and repairs, by bytes alone."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from house.tinyvhdx import (
    BAT,
    DATA,
    FULL,
    HEADERS,
    MIB,
    PARTIAL,
    REGIONS,
    UNMAPPED,
    ZERO,
    TinyVhdx,
)

from . import oracle
from .vhdx import bat_entry, check, clean, content, created, header_of, image, opened

PARENT = [
    ("parent_linkage", "{11111111-2222-4333-8444-555555555555}"),
    ("relative_path", ".\\base.vhdx"),
]


def tiny_child(**more: object) -> TinyVhdx:
    options: dict[str, object] = {
        "blocks": {0: (PARTIAL, b"p" * 2048), 1: (FULL, b"f" * MIB), 2: (ZERO, b"")},
        "parent": PARENT,
        "bitmap": {0, 2, 3},
    }
    return TinyVhdx(**{**options, **more})  # type: ignore[arg-type]


def with_entry(tiny: TinyVhdx, index: int, entry: int) -> bytes:
    return tiny.with_field(BAT + 8 * index, 8, entry)


def mended(data: bytes, backing: bytes | None = None, fix: str = "all") -> tuple[bytes, list[str]]:
    """``data`` after a repair that leaves nothing to find, and what the repair said."""
    machine = opened(data, backing, check=True)
    found = check(machine, fix)
    assert not found.corruptions, found.findings
    out = machine.close()
    assert not clean(out, backing).leaks
    return out, found.findings


# -- what is good
@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("block", [1, 2, 32, 256])
def test_new_images_are_good(block: int, sector: int) -> None:
    for fixed in (False, True):
        if fixed and block > 2:
            continue
        data = created(
            size=5 * MIB + 4096,
            block_size=block * MIB,
            logical_sector_size=sector,
            subformat="fixed" if fixed else "dynamic",
        )
        found = clean(data)
        assert found.leaks == 0
        assert found.total_clusters == -(-(5 * MIB + 4096) // (block * MIB))
        assert found.image_end_offset == len(data)


def test_an_image_from_the_specification_is_good() -> None:
    for tiny in (TinyVhdx(), TinyVhdx(sector=4096), TinyVhdx(fixed=True), tiny_child()):
        found = clean(tiny.data, bytes(MIB))
        assert (found.leaks, found.allocated_clusters) == (0, len(tiny.places))


def test_a_log_that_can_be_replayed_is_no_finding() -> None:
    broken_without = TinyVhdx(log={BAT: struct.pack("<QQ", DATA | FULL, 0).ljust(4096, b"\0")})
    damaged = with_entry(broken_without, 1, DATA | FULL)
    found = clean(damaged)
    assert found.allocated_clusters == 1
    machine = opened(damaged)
    assert not check(machine).corruptions
    assert clean(machine.close()).leaks == 0


def test_space_between_blocks_is_no_leak_but_space_behind_them_is() -> None:
    tiny = TinyVhdx(blocks={0: (FULL, b"a"), 1: (FULL, b"b"), 2: (FULL, b"c")})
    data = with_entry(tiny, 1, 0)
    assert clean(data).leaks == 0
    found = clean(data + bytes(3 * MIB + 5))
    assert found.leaks == 4
    assert "Leaked 4 MiB at 0x700000" in found.findings
    for fix in ("leaks", "all"):
        machine = opened(data + bytes(3 * MIB + 5), check=True)
        found = check(machine, fix)
        assert (found.leaks, found.leaks_fixed) == (0, 4)
        out = machine.close()
        assert len(out) == len(data)
        assert out[DATA + MIB : DATA + 2 * MIB] == bytes(MIB)  # given back to the host
        assert content(out) == content(data)


def test_kept_space_of_blocks_without_content_is_theirs() -> None:
    tiny = TinyVhdx(blocks={0: (FULL, b"a"), 1: (FULL, b"b")})
    data = with_entry(tiny, 1, DATA + MIB | UNMAPPED)
    assert clean(data).leaks == 0
    # A place that is no place does no harm.
    for entry in (99 * MIB | UNMAPPED, DATA | UNMAPPED, MIB | ZERO, 5, DATA):
        clean(with_entry(tiny, 1, entry))


# -- what is not
@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (DATA | FULL, "overlap"),
        (0 | FULL, "overlap"),
        (1 * MIB | FULL, "overlap"),
        (2 * MIB | FULL, "overlap"),
        (3 * MIB | FULL, "overlap"),
        (90 * MIB | FULL, "behind the end of the file"),
        (1 << 63 | FULL, "behind the end of the file"),
        (DATA + 2 * MIB | FULL, "behind the end of the file"),
        (DATA + MIB | 4, "state 4"),
        (DATA + MIB | PARTIAL, "state 7"),
        (DATA + MIB | FULL | 1 << 3, "reserved"),
        (DATA + MIB | FULL | 1 << 19, "reserved"),
    ],
)
def test_every_damage_of_an_entry_is_found_and_mended(entry: int, says: str) -> None:
    tiny = TinyVhdx(blocks={0: (FULL, b"a" * MIB), 1: (FULL, b"b" * MIB)})
    data = with_entry(tiny, 1, entry)
    machine = opened(data, check=True, **{"read-only": True})
    found = check(machine)
    assert found.corruptions == 1
    assert says in found.findings[0] and "block 1" in found.findings[0]
    out, said = mended(data)
    assert content(out)[:MIB] == b"a" * MIB
    if says == "overlap" and entry >= DATA:
        assert content(out)[: 2 * MIB] == b"a" * 2 * MIB
        assert bat_entry(out, 0) != bat_entry(out, 1)
        assert any("copy of its own" in line for line in said)
    elif says == "overlap":  # what lies on the image's own structures was never the guest's
        assert content(out)[MIB : 2 * MIB] == bytes(MIB)
    elif says in ("reserved", "state 4", "state 7"):
        assert content(out)[MIB : 2 * MIB] == b"b" * MIB
    else:
        assert content(out)[MIB : 2 * MIB] == bytes(MIB)
        assert any("lost" in line for line in said)


def test_a_write_after_the_repair_of_an_overlap_goes_to_one_block() -> None:
    tiny = TinyVhdx(blocks={0: (FULL, b"a" * MIB), 1: (FULL, b"b" * MIB)})
    out, _ = mended(with_entry(tiny, 1, DATA | FULL))
    machine = opened(out)
    machine.write(5, b"new")
    out = machine.close()
    assert content(out)[: 2 * MIB] == b"a" * 5 + b"new" + b"a" * (2 * MIB - 8)


def test_a_file_that_was_cut_off_gets_its_zeroes_back() -> None:
    tiny = TinyVhdx(blocks={0: (FULL, b"a" * MIB), 1: (FULL, b"b" * MIB)})
    data = tiny.data[: -MIB // 2]
    machine = opened(data, check=True, **{"read-only": True})
    assert check(machine).corruptions == 1
    out, _ = mended(data)
    assert len(out) == len(tiny.data)
    assert content(out)[: 2 * MIB] == b"a" * MIB + b"b" * (MIB // 2) + bytes(MIB // 2)


def test_a_block_that_is_cut_off_and_has_no_valid_state() -> None:
    tiny = TinyVhdx(block=4 * MIB, blocks={0: (PARTIAL, b"a" * 4 * MIB)})
    out, _ = mended(tiny.data[: tiny.places[0] + 3 * MIB])
    assert len(out) == tiny.places[0] + 4 * MIB
    assert content(out) == b"a" * 3 * MIB + bytes(MIB)


def test_a_bitmap_in_an_image_without_parent() -> None:
    tiny = TinyVhdx(size=8 << 30, blocks={0: (FULL, b"a"), 5000: (FULL, b"b")})
    data = with_entry(tiny, tiny.ratio, DATA + MIB | FULL)
    machine = opened(data, check=True, **{"read-only": True})
    found = check(machine)
    assert found.corruptions == 1 and "bitmap" in found.findings[0]
    out, _ = mended(data)
    assert bat_entry(out, tiny.ratio) == 0


# -- region tables and headers
@pytest.mark.parametrize("copy", [0, 1])
def test_a_region_table_is_mended_from_the_other(copy: int) -> None:
    tiny = TinyVhdx()
    data = bytearray(tiny.data)
    data[REGIONS[copy] + 40] ^= 1
    machine = opened(bytes(data), check=True, **{"read-only": True})
    found = check(machine)
    assert found.corruptions == 1
    assert f"Region table {copy + 1}" in found.findings[0]
    out, _ = mended(bytes(data))
    assert out[REGIONS[copy] : REGIONS[copy] + 65536] == tiny.data[REGIONS[0] :][:65536]


@pytest.mark.parametrize("copy", [0, 1])
def test_a_header_that_a_crash_tore_is_no_damage(copy: int) -> None:
    tiny = TinyVhdx()
    data = bytearray(tiny.data)
    data[HEADERS[copy] + 20] ^= 1
    machine = opened(bytes(data), **{"read-only": True})
    found = check(machine)
    assert not found.corruptions
    assert f"Header {copy + 1}" in found.findings[0]
    out, _ = mended(bytes(data))
    assert not clean(out).findings


# -- differencing images
def test_a_missing_bitmap_is_made_of_what_the_block_holds() -> None:
    tiny = tiny_child()
    backing = b"B" * (4 * MIB)
    index = tiny.ratio
    before = content(tiny.data, backing)
    assert before[:2048] == b"p" * 512 + b"B" * 512 + b"p" * 1024
    for entry in (0, tiny.bitmaps[0] | 3, 77 * MIB | FULL):
        data = with_entry(tiny, index, entry)
        machine = opened(data, backing, check=True, **{"read-only": True})
        found = check(machine)
        assert found.corruptions == 1 and "sector bitmap 0" in found.findings[0]
        out, said = mended(data, backing)
        if entry & 7 == 3:  # its place was good: nothing is lost
            pass
        assert any("sector" in line for line in said)
        after = content(out, backing)
        # Sector 1 is not present; that the block holds something there cannot be told from data.
        assert after[2048:] == before[2048:]
        assert after[:512] == before[:512]


def test_a_bitmap_over_a_block_gets_a_place_of_its_own() -> None:
    tiny = tiny_child()
    backing = b"B" * (4 * MIB)
    data = with_entry(tiny, tiny.ratio, tiny.places[1] | FULL)
    out, said = mended(data, backing)
    assert any("copy of its own" in line for line in said)
    assert content(out, backing)[MIB : 2 * MIB] == b"f" * MIB


def test_an_overlapping_block_keeps_its_bitmap() -> None:
    tiny = tiny_child(blocks={0: (PARTIAL, b"p" * 2048), 1: (PARTIAL, b"q" * MIB)})
    backing = b"B" * (4 * MIB)
    data = with_entry(tiny, 1, tiny.places[0] | PARTIAL)
    before = content(data, backing)
    out, _ = mended(data, backing)
    assert content(out, backing) == before


def test_a_bitmap_that_no_block_needs_is_dropped() -> None:
    tiny = tiny_child(blocks={1: (FULL, b"f" * MIB)}, bitmap=set())
    data = with_entry(tiny, tiny.ratio, 50 * MIB | FULL)
    out, _ = mended(data, bytes(MIB))
    assert bat_entry(out, tiny.ratio) == 0


def test_entries_behind_the_disk_are_dropped() -> None:
    tiny = tiny_child()
    data = with_entry(tiny, 40, tiny.places[1] | FULL)
    machine = opened(data, bytes(MIB), check=True, **{"read-only": True})
    assert check(machine).corruptions == 1
    out, _ = mended(data, bytes(MIB))
    assert bat_entry(out, 40) == 0


# -- repairs and losses of power
def states(data: bytes, log: list[tuple[object, ...]]) -> list[bytes]:
    """The file after every prefix of what was written."""
    file = bytearray(data)
    out = [bytes(file)]
    for what, *rest in log:
        if what == "write":
            at, piece = rest
            assert isinstance(at, int) and isinstance(piece, bytes)
            file.extend(bytes(max(0, at + len(piece) - len(file))))
            file[at : at + len(piece)] = piece
        elif what == "truncate":
            assert isinstance(rest[0], int)
            size = rest[0]
            del file[size:]
            file.extend(bytes(size - len(file)))
        else:
            continue
        out.append(bytes(file))
    return out


def test_a_repair_that_is_cut_short_is_as_good_as_none() -> None:
    tiny = TinyVhdx(blocks={n: (FULL, bytes([n + 1]) * MIB) for n in range(3)})
    data = with_entry(tiny, 1, DATA | FULL)
    data = data[: BAT + 16] + struct.pack("<Q", DATA | FULL) + data[BAT + 24 :]
    before = content(data)
    machine = opened(data, check=True)
    machine.log.clear()
    check(machine, "all")
    machine.close()
    every = states(data, machine.log)
    assert len(every) > 5
    for state in every:
        assert content(state) == before
        again = opened(state, check=True)
        assert not check(again, "all").corruptions
        out = again.close()
        clean(out)
        assert content(out) == before


def test_a_repair_gives_the_image_new_identities() -> None:
    tiny = TinyVhdx(blocks={0: (FULL, b"a"), 1: (FULL, b"b")})
    data = with_entry(tiny, 1, DATA | FULL)
    out, _ = mended(data)
    before, after = header_of(data), header_of(out)
    assert after[0] > before[0] and after[1] != before[1] and after[2] != before[2]
    assert after[3] == bytes(16)


def test_a_check_of_a_good_image_changes_nothing() -> None:
    tiny = TinyVhdx()
    machine = opened(tiny, check=True)
    machine.log.clear()
    check(machine, "all")
    machine.close()
    assert not [entry for entry in machine.log if entry[0] != "barrier"]


def test_random_damage_is_mended_for_good() -> None:
    rng = random.Random(7)
    for _ in range(20):
        diff = rng.random() < 0.5
        blocks = {
            n: (rng.choice((FULL, PARTIAL)) if diff else FULL, bytes([n + 1]) * MIB)
            for n in rng.sample(range(12), 5)
        }
        tiny = TinyVhdx(
            size=12 * MIB,
            blocks=blocks,
            parent=PARENT if diff else None,
            bitmap={rng.randrange(24576) for _ in range(40)} if diff else None,
        )
        data = tiny.data
        for _ in range(rng.randrange(1, 4)):
            index = rng.choice([*range(12), tiny.ratio if diff else 3])
            entry = rng.randrange(len(data) // MIB + 2) * MIB | rng.randrange(8)
            data = data[: BAT + 8 * index] + struct.pack("<Q", entry) + data[BAT + 8 * index + 8 :]
        backing = b"B" * (12 * MIB) if diff else None
        out, _ = mended(data, backing)
        machine = opened(out, backing)
        for block in range(12):
            machine.write(block * MIB + 700, bytes([block + 100]) * 900)
        out = machine.close()
        clean(out, backing)
        after = content(out, backing)
        for block in range(12):
            assert after[block * MIB + 700 :][:900] == bytes([block + 100]) * 900


@oracle.needs_qemu
def test_qemu_img_agrees_about_what_it_looks_at(tmp_path: Path) -> None:
    tiny = TinyVhdx(blocks={0: (FULL, b"a" * MIB), 1: (FULL, b"b" * MIB)})
    path = tmp_path / "image.vhdx"
    # It sees what is behind the file or on a region, and no block that lies over another.
    for entry, bad, seen in (
        (DATA + MIB | FULL, 0, 0),
        (90 * MIB | FULL, 1, 1),
        (DATA + 2 * MIB | FULL, 1, 1),
        (MIB | FULL, 1, 1),
        (DATA | FULL, 1, 0),
    ):
        data = with_entry(tiny, 1, entry)
        path.write_bytes(data)
        theirs = oracle.run("qemu-img", "check", str(path))
        assert bool(theirs.returncode) == bool(seen), theirs
        machine = opened(data, check=True, **{"read-only": True})
        assert check(machine).corruptions == bad
        if bad:
            out, _ = mended(data)
            path.write_bytes(out)
            oracle.check(path)
            assert oracle.raw(path, tmp_path / "raw") == content(out)


def test_a_fixed_image_keeps_a_place_for_every_block() -> None:
    tiny = TinyVhdx(fixed=True, blocks={n: (FULL, bytes([n + 1]) * MIB) for n in range(4)})
    machine = opened(tiny)
    assert image(machine).fixed
    clean(machine.close())


def test_region_tables_that_differ_are_what_a_crash_leaves() -> None:
    tiny = TinyVhdx()
    other = TinyVhdx(required=0)
    data = tiny.data[: REGIONS[1]] + other.data[REGIONS[1] :][:65536]
    data += tiny.data[REGIONS[1] + 65536 :]
    assert "differ" in clean(data).findings[0]
    out, _ = mended(data)
    assert not clean(out).findings
    assert out[REGIONS[0] :][:65536] == tiny.data[REGIONS[0] :][:65536]
