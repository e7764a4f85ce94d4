"""Other parents of VHDX images, and none, by bytes alone."""

from __future__ import annotations

import errno
import random
from itertools import pairwise
from pathlib import Path

import pytest

from diskwright.errors import NotSupported
from diskwright.formats.vhdx import metadata
from house.tinyvhdx import FULL, METADATA, MIB, PARTIAL, UNMAPPED, ZERO, TinyVhdx

from . import oracle
from .test_vhdx_check import PARENT, states, tiny_child
from .vhdx import clean, content, header_of, image, opened

ID = "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}"
BACKING = b"B" * (4 * MIB)


def rebased(
    data: bytes, name: str | None, backing: bytes | None = None, **more: str | None
) -> bytes:
    machine = opened(data, backing, **{"file-name": "/vm/child.vhdx"})
    machine.run(machine.format.change_backing(name, "vhdx" if name else None, **more))
    out = machine.close()
    again = opened(out, BACKING if name else None, **{"read-only": True})
    assert bool(image(again).differencing) == (name is not None)
    return out


def test_another_parent() -> None:
    tiny = tiny_child()
    out = rebased(tiny.data, "/vm/deep/down/other.vhdx", BACKING, identity=ID.upper())
    found = image(opened(out, BACKING))
    assert list(found.backing_names) == ["deep/down/other.vhdx", "/vm/deep/down/other.vhdx"]
    assert (found.backing_file, found.backing_format) == ("deep/down/other.vhdx", "vhdx")
    assert found.parent_identity == ID
    assert content(out, BACKING) == content(tiny.data, BACKING)
    clean(out, BACKING)
    # Another parent is no other content.
    before, after = header_of(tiny.data), header_of(out)
    assert after[1] != before[1] and after[2] == before[2]


def test_what_was_recorded_of_the_parent_stays_where_nothing_else_is_known() -> None:
    out = rebased(tiny_child().data, "other.vhdx", BACKING)
    found = image(opened(out, BACKING))
    assert found.parent_identity == PARENT[0][1]
    assert list(found.backing_names) == ["other.vhdx"]


def test_other_items_stay_and_names_may_grow_and_shrink() -> None:
    out = tiny_child().data
    rng = random.Random(1)
    kinds = {item.kind for item in image(opened(out, BACKING)).items}
    for length in (3, 200, 9, 30_000, 30_000, 1, 12_000):
        name = "".join(rng.choice("abcdefgh/") for _ in range(length)).strip("/") or "x"
        out = rebased(out, name.replace("//", "/x"), BACKING, identity=ID)
        machine = opened(out, BACKING)
        found = image(machine)
        assert found.backing_file == name.replace("//", "/x")
        assert {item.kind for item in found.items} == kinds
        assert found.size == 4 * MIB and found.parameters.disk_id == b"\x02" * 16
        places = sorted((i.offset, i.length) for i in found.items)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(places))
        clean(out, BACKING)


def test_a_region_that_is_full_is_said_before_anything_changes() -> None:
    tiny = tiny_child()
    # A user's item that takes nearly all of the region.
    data = bytearray(tiny.data)
    at = METADATA + 32 + 32 * 6
    data[METADATA + 10] = 7
    start = 65536 + 4096
    data[at : at + 16] = b"u" * 16
    data[at + 16 : at + 28] = b"".join(
        n.to_bytes(4, "little") for n in (start, MIB - start, metadata.IS_USER)
    )
    machine = opened(bytes(data), BACKING)
    before = bytes(machine.slots["file"])
    with pytest.raises(OSError) as caught:
        machine.run(machine.format.change_backing("x" * 30_000, "vhdx", ID))
    assert caught.value.errno == errno.ENOSPC
    assert bytes(machine.slots["file"]) == before
    machine.run(machine.format.change_backing("y" * 300, "vhdx", ID))
    assert image(opened(machine.close(), BACKING)).backing_file == "y" * 300


@pytest.mark.parametrize(
    ("name", "fmt", "number"),
    [
        ("a\0b", "vhdx", errno.EINVAL),
        ("x" * 40_000, "vhdx", errno.EINVAL),
        ("", None, errno.EINVAL),
    ],
)
def test_names_that_cannot_be_stored(name: str, fmt: str | None, number: int) -> None:
    machine = opened(tiny_child(), BACKING)
    before = bytes(machine.slots["file"])
    with pytest.raises(OSError) as caught:
        machine.run(machine.format.change_backing(name, None, ID))
    assert caught.value.errno == errno.EINVAL
    assert bytes(machine.slots["file"]) == before


def test_parents_that_cannot_be() -> None:
    machine = opened(tiny_child(), BACKING)
    with pytest.raises(NotSupported):
        machine.run(machine.format.change_backing("a.qcow2", "qcow2", ID))
    fixed = opened(TinyVhdx(fixed=True, blocks=dict.fromkeys(range(4), (FULL, b"f"))))
    with pytest.raises(NotSupported):
        fixed.run(fixed.format.change_backing("a.vhdx", "vhdx", ID))


# -- no parent any more
def child_of_many(rng: random.Random, size: int = 9 * MIB + 512) -> TinyVhdx:
    kinds = (PARTIAL, PARTIAL, FULL, ZERO, UNMAPPED)
    blocks = {n: (rng.choice(kinds), rng.randbytes(MIB)) for n in rng.sample(range(10), 6)}
    return TinyVhdx(
        size=size,
        blocks=blocks,
        parent=PARENT,
        bitmap={rng.randrange(10 * 2048) for _ in range(200)},
    )


@pytest.mark.parametrize("seed", range(4))
def test_without_a_parent_what_is_not_there_reads_as_zeroes(seed: int) -> None:
    tiny = child_of_many(random.Random(seed))
    out = rebased(tiny.data, None, bytes(9 * MIB))
    clean(out)
    assert content(out) == content(tiny.data, bytes(9 * MIB))
    found = image(opened(out))
    assert found.backing_file is None and found.parent_identity is None
    assert metadata.find(found.items, metadata.PARENT_LOCATOR) is None
    machine = opened(out)
    machine.write(5 * MIB - 3, b"across")
    assert content(machine.close())[5 * MIB - 3 :][:6] == b"across"


def test_what_a_rebase_writes_first_is_kept() -> None:
    """Nothing of the parent is lost when the caller writes it into the image before."""
    rng = random.Random(9)
    tiny = child_of_many(rng)
    backing = rng.randbytes(9 * MIB + 512)
    before = content(tiny.data, backing)
    machine = opened(tiny, backing)
    for at in range(0, len(before), MIB):
        machine.write(at, before[at : at + MIB])
    machine.flush()
    machine.run(machine.format.change_backing(None, None))
    out = machine.close()
    clean(out)
    assert content(out) == before


def test_every_state_between_reads_the_same() -> None:
    tiny = child_of_many(random.Random(5))
    zeroes = bytes(9 * MIB)
    before = content(tiny.data, zeroes)
    machine = opened(tiny, zeroes)
    machine.log.clear()
    machine.run(machine.format.change_backing(None, None))
    machine.close()
    ends = set()
    for state in states(tiny.data, machine.log)[::3]:
        child = bool(image(opened(state, zeroes, **{"read-only": True})).differencing)
        ends.add(child)
        clean(state, zeroes if child else None)
        assert content(state, zeroes if child else None) == before
    assert ends == {True, False}


def test_every_state_between_has_one_of_the_two_parents() -> None:
    tiny = tiny_child()
    machine = opened(tiny, BACKING)
    machine.log.clear()
    machine.run(machine.format.change_backing("n" * 9000, "vhdx", ID))
    machine.close()
    seen = set()
    for state in states(tiny.data, machine.log):
        found = image(opened(state, BACKING, **{"read-only": True}))
        seen.add((found.parent_identity, found.backing_file))
        assert content(state, BACKING) == content(tiny.data, BACKING)
    assert seen == {(PARENT[0][1], "base.vhdx"), (ID, "n" * 9000)}


# -- a parent for an image that has none
def test_an_image_gets_a_parent() -> None:
    tiny = TinyVhdx(size=9 << 30, blocks={0: (FULL, b"a" * MIB), 2: (ZERO, b"")})
    # QEMU before 8.0 left garbage in the entries of bitmaps, which nothing used.
    data = tiny.with_field(3 * MIB + 8 * tiny.ratio, 8, 0x12345)
    out = rebased(data, "base.vhdx", identity=ID)
    machine = opened(out, BACKING)
    clean(out, BACKING)
    assert machine.read(0, MIB) == b"a" * MIB
    assert machine.read(MIB, 4) == b"BBBB" and machine.read(2 * MIB, 4) == bytes(4)
    machine.write((9 << 30) - 5, b"x")
    machine.write(5000 * MIB, b"x")
    clean(machine.close(), BACKING)


def test_the_table_grows_where_the_last_bitmap_needs_it() -> None:
    # Without a parent this many blocks fill a table of 1 MiB.
    blocks = 131072 - 31
    assert blocks + (blocks - 1) // 4096 == 131072
    tiny = TinyVhdx(size=blocks * MIB, blocks={0: (FULL, b"a" * MIB)})
    out = rebased(tiny.data, "base.vhdx", identity=ID)
    machine = opened(out, BACKING)
    assert image(machine).bat.length >= 8 * image(machine).entries_for(image(machine).blocks)
    machine.write(blocks * MIB - 1, b"x")
    out = machine.close()
    clean(out, BACKING)
    machine = opened(out, BACKING)
    assert machine.read(blocks * MIB - 2, 2) == b"\0x"


@oracle.needs_qemu
def test_qemu_img_opens_what_has_no_parent_any_more(tmp_path: Path) -> None:
    tiny = child_of_many(random.Random(2), 9 * MIB)
    out = rebased(tiny.data, None, bytes(9 * MIB))
    path = tmp_path / "image.vhdx"
    path.write_bytes(out)
    oracle.check(path)
    assert oracle.raw(path, tmp_path / "raw") == content(out)
