"""What the runtime options of qcow2 do: overlap protection, the corrupt bit, what is given back."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import CorruptImage, ImageError, UsageError
from diskwright.formats.qcow2.header import Header
from diskwright.formats.qcow2.opening import check_options
from interop.tools import OURS, run

Peer = Callable[[str], str]
KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB
CLUSTER = 64 * KIB
# Where a new image of this size has its structures.
REFTABLE, BLOCK, L1, L2, DATA = (n * CLUSTER for n in range(1, 6))
COPIED = 1 << 63
QEMU_IO = (
    "import sys; from diskwright.cli.main import main; sys.exit(main('qemu-io', sys.argv[1:]))"
)


def made(folder: Path, **options: object) -> Path:
    path = folder / "image"
    diskwright.create(str(path), format="qcow2", size=SIZE, options=options)
    with diskwright.open(str(path), writable=True) as disk:
        disk.write_at(0, b"\1" * (2 * CLUSTER))
    return path


def patched(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def at(path: Path, offset: int) -> int:
    (found,) = struct.unpack_from(">Q", path.read_bytes(), offset)
    return int(found)


def corrupt(path: Path) -> bool:
    return bool(path.read_bytes()[79] & 2)


# What is broken, and what a write of 4 KiB then meets.
ENTRIES = [
    ("L2 entry on the L1 table", L2, COPIED | L1, "active L1 table"),
    ("L2 entry on its own table", L2, COPIED | L2, "active L2 table"),
    ("L2 entry on the refcount table", L2, COPIED | REFTABLE, "refcount table"),
    ("L2 entry on a refcount block", L2, COPIED | BLOCK, "refcount block"),
    ("L1 entry on the refcount table", L1, COPIED | REFTABLE, "refcount table"),
]


@pytest.mark.parametrize(("place", "entry", "what"), [e[1:] for e in ENTRIES])
def test_no_write_over_metadata(
    place: int, entry: int, what: str, peer: Peer, tmp_path: Path
) -> None:
    path = made(tmp_path)
    patched(path, place, struct.pack(">Q", entry))
    before = path.read_bytes()
    with diskwright.open(str(path), writable=True) as disk:
        with pytest.raises(CorruptImage) as caught:
            disk.write_at(0, b"x" * 4096)
        theirs = (tmp_path / "theirs").write_bytes(before)
        assert theirs
        text = run([peer("qemu-io"), "-c", "write 0 4k", tmp_path / "theirs"], status=(0, 1))
        said = f"Preventing invalid write on metadata (overlaps with {what})"
        assert said in text
        assert caught.value.detail == (
            f"qcow2: Marking image as corrupt: {said}; further corruption events will be suppressed"
        )
        # It is durable, and nothing is written any more.
        assert corrupt(path)
        with pytest.raises(OSError, match="the image is corrupt"):
            disk.write_at(40 * MIB, b"x")
    after = bytearray(path.read_bytes())
    after[79] &= ~2
    assert bytes(after) == before
    with pytest.raises(CorruptImage, match="cannot be opened read/write"):
        diskwright.open(str(path), writable=True)


@pytest.mark.parametrize(
    ("cluster", "what"),
    [
        (0, "qcow2_header"),
        (1, "refcount table"),
        (2, "refcount block"),
        (3, "active L1 table"),
        (4, "active L2 table"),
    ],
)
def test_no_metadata_are_taken_for_free(cluster: int, what: str, tmp_path: Path) -> None:
    path = made(tmp_path)
    patched(path, BLOCK + 2 * cluster, b"\0\0")
    with (
        diskwright.open(str(path), writable=True) as disk,
        pytest.raises(CorruptImage, match=f"overlaps with {what}"),
    ):
        disk.write_at(MIB, b"x")
    assert corrupt(path)


@pytest.mark.parametrize(
    ("options", "stopped"),
    [
        ({}, True),
        ({"overlap-check": "none"}, False),
        ({"overlap-check": "constant"}, True),
        ({"overlap-check.template": "all"}, True),
        ({"overlap-check.template": "none", "overlap-check.refcount-table": "on"}, True),
        ({"overlap-check.refcount-table": "off"}, False),
        ({"overlap-check": "all", "overlap-check.refcount-table": "off"}, False),
        ({"overlap-check": "none", "overlap-check.template": "none"}, False),
    ],
)
def test_what_is_looked_after(options: dict[str, str], stopped: bool, tmp_path: Path) -> None:
    path = made(tmp_path)
    patched(path, L2, struct.pack(">Q", COPIED | REFTABLE))
    with diskwright.open(str(path), writable=True, options=options) as disk:
        if stopped:
            with pytest.raises(CorruptImage, match="refcount table"):
                disk.write_at(4096, b"x" * 4096)
        else:
            disk.write_at(4096, b"x" * 4096)
    assert corrupt(path) == stopped


def test_constant_leaves_tables_alone(tmp_path: Path) -> None:
    path = made(tmp_path)
    patched(path, L2, struct.pack(">Q", COPIED | BLOCK))
    options = {"overlap-check": "constant"}
    with diskwright.open(str(path), writable=True, options=options) as disk:
        disk.write_at(32 * KIB, b"x" * 4096)
    assert path.read_bytes()[BLOCK + 32 * KIB] == ord("x")


def test_snapshots_that_do_not_tell_their_tables(peer: Peer, tmp_path: Path) -> None:
    """Who wants these to be looked after does not write without it; qemu's tools fail to write."""
    path = made(tmp_path)
    run([peer("qemu-img"), "snapshot", "-c", "one", path])
    (table,) = struct.unpack_from(">Q", path.read_bytes(), 64)
    patched(path, table, struct.pack(">Q", 0x400200))
    options = {"overlap-check.inactive-l2": "on"}
    with (
        pytest.raises(ImageError, match="Snapshot L1 table offset invalid"),
        diskwright.open(str(path), writable=True, options=options),
    ):
        pass
    for given in ({"writable": True}, {"options": options}):
        with diskwright.open(str(path), **given) as disk:
            disk.read_at(0, 512)


@pytest.mark.parametrize("template", ["cached", "all"])
def test_tables_of_snapshots(template: str, peer: Peer, tmp_path: Path) -> None:
    path = made(tmp_path)
    run([peer("qemu-img"), "snapshot", "-c", "one", path])
    run([peer("qemu-io"), "-c", "write 0 64k", path])  # the L2 table is the snapshot's alone now
    (table,) = struct.unpack_from(">Q", path.read_bytes(), 64)
    (inactive,) = struct.unpack_from(">Q", path.read_bytes(), table)
    l2 = at(path, L1) & ~COPIED
    options = {"overlap-check": template}
    for place, what in (
        (table, "snapshot table"),
        (inactive, "inactive L1 table"),
        (at(path, inactive) & ~COPIED, "inactive L2 table"),
    ):
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
        patched(copy, l2, struct.pack(">Q", COPIED | place))
        with diskwright.open(str(copy), writable=True, options=options) as disk:
            if what == "inactive L2 table" and template == "cached":
                disk.write_at(0, b"x" * 512)
                continue
            with pytest.raises(CorruptImage, match=f"overlaps with {what}"):
                disk.write_at(0, b"x" * 512)


@pytest.mark.parametrize(
    ("place", "entry", "text"),
    [
        (L2, COPIED | DATA | 512, "Cluster allocation offset 0x50200 unaligned"),
        (L1, COPIED | L2 | 512, "L2 table offset 0x40200 unaligned"),
    ],
)
def test_a_read_marks_too(place: int, entry: int, text: str, tmp_path: Path) -> None:
    """Metadata that break the specification are no less broken when they are read."""
    path = made(tmp_path)
    patched(path, place, struct.pack(">Q", entry))
    with diskwright.open(str(path)) as disk, pytest.raises(CorruptImage, match=text):
        disk.read_at(0, 512)
    assert not corrupt(path)
    with diskwright.open(str(path), writable=True) as disk:
        with pytest.raises(CorruptImage, match=f"Marking image as corrupt: {text}"):
            disk.read_at(0, 512)
        with pytest.raises((OSError, CorruptImage)):
            disk.write_at(40 * MIB, b"x")
    assert corrupt(path)


def snapshot(path: Path) -> None:
    with diskwright.open(str(path), writable=True) as disk:
        disk.snapshots.create("one")


def bitmap(path: Path) -> None:
    """Its place is taken when the image is closed."""
    with diskwright.open(str(path), writable=True) as disk:
        disk.bitmaps.add("one", persistent=True)


def resize(path: Path) -> None:
    with diskwright.open(str(path), writable=True) as disk:
        disk.resize(SIZE // 2, shrink=True)


@pytest.mark.parametrize(
    ("change", "place", "value", "theirs"),
    [
        (snapshot, BLOCK, b"\0\0", ["snapshot", "-c", "one"]),
        (bitmap, BLOCK, b"\0\0", ["bitmap", "--add", "IMAGE", "one"]),
        (snapshot, BLOCK, bytes(12), ["snapshot", "-c", "one"]),
        (resize, L1, struct.pack(">Q", COPIED | BLOCK), None),
    ],
)
def test_what_changes_the_whole_image_marks_too(
    change: Callable[[Path], None],
    place: int,
    value: bytes,
    theirs: list[str] | None,
    peer: Peer,
    tmp_path: Path,
) -> None:
    path = made(tmp_path)
    patched(path, place, value)
    before = path.read_bytes()
    if theirs is not None:
        copy = tmp_path / "theirs"
        copy.write_bytes(before)
        words = [copy if word == "IMAGE" else word for word in theirs]
        words += [] if copy in words else [copy]
        run([peer("qemu-img"), *words], status=(1,))
        assert corrupt(copy)
    with pytest.raises(CorruptImage, match="Marking image as corrupt: Preventing invalid"):
        change(path)
    after = bytearray(path.read_bytes())
    assert after[79] & 2
    after[79] &= ~2
    assert bytes(after) == before


def test_what_is_wrong_with_a_snapshot_marks_nothing(tmp_path: Path) -> None:
    path = made(tmp_path)
    snapshot(path)
    table = at(path, 64)
    patched(path, table, struct.pack(">Q", 1 << 40))  # its L1 table is outside of the file
    with diskwright.open(str(path), writable=True) as disk:
        with pytest.raises(CorruptImage, match="outside of the file"):
            disk.snapshots.apply("one")
        disk.write_at(0, b"x")
    assert not corrupt(path)


def test_a_corrupt_backing_file_marks_nothing_above(tmp_path: Path) -> None:
    path = made(tmp_path)
    patched(path, L2, struct.pack(">Q", COPIED | DATA | 512))
    top = tmp_path / "top"
    options = {"backing_file": str(path), "backing_fmt": "qcow2"}
    diskwright.create(str(top), format="qcow2", size=SIZE, options=options)
    with diskwright.open(str(top), writable=True, policy="trusted") as disk:
        for _ in range(2):
            with pytest.raises(CorruptImage, match="unaligned"):
                disk.read_at(0, 512)
        with pytest.raises(CorruptImage, match="unaligned"):
            disk.write_at(4096, b"x")  # what is around it cannot be copied
        disk.write_at(MIB, b"y")
    assert not corrupt(top)
    assert not corrupt(path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"overlap-check": "foo"}, "Unsupported value 'foo' for qcow2 option 'overlap-check'"),
        ({"overlap-check": "none", "overlap-check.template": "all"}, "Conflicting values for"),
        ({"overlap-check.foo": "on"}, "does not support the option 'overlap-check.foo'"),
        ({"overlap-check.active-l1": "maybe"}, "expects 'on' or 'off'"),
        ({"cache-clean-interval": "-1"}, "Cache clean interval too big"),
        ({"l2-cache-entry-size": "300"}, "L2 cache entry size must be a power of two"),
        (
            {"cache-size": "1M", "l2-cache-size": "1M", "refcount-cache-size": "1M"},
            "may not be set at the same time",
        ),
        ({"refcount-cache-size": "128T"}, "Refcount cache size too big"),
        ({"cache-size": "129T"}, "Refcount cache size too big"),
    ],
)
def test_refused(options: dict[str, str], text: str, tmp_path: Path) -> None:
    path = made(tmp_path)
    with pytest.raises(UsageError, match=text):
        diskwright.open(str(path), options=options)


def held(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("pass_on", ["on", "off"])
def test_what_a_discard_gives_back(pass_on: str, tmp_path: Path) -> None:
    path = made(tmp_path)
    before = held(path)
    options = {"pass-discard-request": pass_on}
    with diskwright.open(str(path), writable=True, options=options) as disk:
        disk.discard(0, CLUSTER)
        assert disk.read_at(0, 1) == b"\0"
    given = before - held(path)
    assert given >= CLUSTER - 8192 if pass_on == "on" else given < 8192
    with diskwright.open(str(path), writable=True, options=options) as disk:
        disk.write_at(MIB, b"x")  # the space is used again, with nothing of what it held
        assert disk.read_at(MIB, CLUSTER) == b"x".ljust(CLUSTER, b"\0")
    run_check(path)


def test_discard_without_unref(peer: Peer, tmp_path: Path) -> None:
    path = made(tmp_path)
    before = held(path)
    options = {"discard-no-unref": True}
    with diskwright.open(str(path), writable=True, options=options) as disk:
        disk.discard(0, CLUSTER)
        disk.zero(CLUSTER, CLUSTER, unmap=True)
        assert disk.read_at(0, 2 * CLUSTER) == bytes(2 * CLUSTER)
    assert (at(path, L2), at(path, L2 + 8)) == (COPIED | DATA | 1, COPIED | DATA + CLUSTER | 1)
    assert before - held(path) >= 2 * CLUSTER - 8192
    with diskwright.open(str(path), writable=True, options=options) as disk:
        disk.write_at(100, b"x")
        assert disk.read_at(0, CLUSTER) == b"\0" * 100 + b"x" + b"\0" * (CLUSTER - 101)
    assert at(path, L2) == COPIED | DATA
    run([peer("qemu-img"), "check", "-q", path])
    old = tmp_path / "old"
    diskwright.create(str(old), format="qcow2", size=SIZE, options={"compat": "0.10"})
    with pytest.raises(UsageError, match="only supported since qcow2 version 3"):
        diskwright.open(str(old), options=options)


def run_check(path: Path) -> None:
    found = diskwright.check(str(path))
    assert not (found.corruptions or found.leaks)


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, 32 << 20),
        ({"cache-size": "1M"}, 1 << 20),
        ({"cache-size": "1M", "l2-cache-size": "512k"}, 1 << 20),
        ({"l2-cache-size": "2M", "refcount-cache-size": "1M"}, 3 << 20),
        ({"l2-cache-size": "1"}, 6 * CLUSTER),
    ],
)
def test_memory_for_tables(options: dict[str, str], budget: int, tmp_path: Path) -> None:
    path = made(tmp_path)
    with diskwright.open(str(path), options=options) as disk:
        assert disk.node.engine.tables.budget == budget  # type: ignore[attr-defined]


def test_layers_add_up(tmp_path: Path) -> None:
    """What the layers of a chain ask for is one budget; those that ask for nothing share."""
    for name in ("base", "middle", "top"):
        below = {"base": "", "middle": "base", "top": "middle"}[name]
        options = {"backing_file": str(tmp_path / below), "backing_fmt": "qcow2"} if below else {}
        diskwright.create(str(tmp_path / name), format="qcow2", size=SIZE, options=options)
    asked = {"l2-cache-size": "2M", "backing.refcount-cache-size": "1M", "backing.driver": "qcow2"}
    asked["backing.l2-cache-size"] = "1M"
    path = str(tmp_path / "top")
    with diskwright.open(path, options=asked, policy="trusted") as disk:
        assert disk.node.engine.tables.budget == (2 + 2 + 32) << 20  # type: ignore[attr-defined]


def test_unused_tables_are_forgotten(tmp_path: Path) -> None:
    path = made(tmp_path)
    options = {"cache-clean-interval": 1}
    with diskwright.open(str(path), options=options, writable=True) as disk:
        tables = disk.node.engine.tables  # type: ignore[attr-defined]
        for turn in range(3):
            disk.read_at(0, 512)
            assert tables.weight == CLUSTER
            time.sleep(1.05)  # the timer is due
            disk.flush()
            assert tables.weight == CLUSTER, turn  # it was used since the one before
        time.sleep(1.05)
        disk.flush()
        assert tables.weight == 0
        disk.write_at(0, b"again")
        assert disk.read_at(0, 5) == b"again"
    with diskwright.open(str(path), options={"cache-clean-interval": 0}) as disk:
        assert disk.node._cleaning is None  # type: ignore[attr-defined]


def test_reopen(peer: Peer, tmp_path: Path) -> None:
    """What belongs together is given anew as a whole; what is refused changes nothing."""
    path = made(tmp_path)
    words = [
        "reopen -o overlap-check=constant",
        "reopen -o overlap-check.template=all",
        "reopen -o cache-size=1M,l2-cache-size=64k",
        "reopen -o refcount-cache-size=64k,l2-cache-size=64k",
        "reopen -o overlap-check=blubb",
        "write -q 0 64k",
    ]
    arguments = [part for word in words for part in ("-c", word)]
    theirs = run([peer("qemu-io"), *arguments, path], status=(0, 1))
    ours = run([*OURS, "io", *arguments, path], status=(0, 1))
    assert "Unsupported value 'blubb' for qcow2 option 'overlap-check'" in theirs
    assert ours.partition(": ")[2] == theirs.partition(": ")[2]


def test_the_cache_of_a_huge_disk(tmp_path: Path) -> None:
    """More than all its L2 tables need counts for nothing; in their smallest parts they may be too
    many."""
    header = Header()
    header.cluster_bits, header.size = 18, 32 << 50
    for options, refused in (
        ({"l2-cache-size": 2 << 40}, False),
        ({"l2-cache-size": 1 << 40, "l2-cache-entry-size": 512}, True),
        ({"l2-cache-size": (1 << 40) - 1, "l2-cache-entry-size": 512}, False),
        ({"cache-size": 1 << 40, "l2-cache-entry-size": 512}, False),
        ({"cache-size": 2 << 40, "l2-cache-entry-size": 512}, True),
    ):
        with pytest.raises(UsageError, match="L2 cache size too big") if refused else nullcontext():
            check_options(header, options)


def test_what_the_first_write_says_when_the_header_counts_as_free(
    peer: Peer, tmp_path: Path
) -> None:
    """Line by line: what is about the image and no command stands without the program's name."""
    ours = [sys.executable, "-c", QEMU_IO]
    for name, filled in (("new", False), ("filled", True)):
        said = []
        for tool in ([peer("qemu-io")], ours):
            path = tmp_path / name
            diskwright.create(str(path), format="qcow2", size=SIZE)
            if filled:
                with diskwright.open(str(path), writable=True) as disk:
                    disk.write_at(0, b"x")
            patched(path, BLOCK, bytes(8))
            said.append(run([*tool, "-c", "write 64k 64k", path], status=1))
            assert corrupt(path)
            path.unlink()
        assert said[0] == said[1]
        assert said[0].startswith("qcow2: Marking image as corrupt: ")


def test_a_bitmap_for_which_there_is_no_sound_place(tmp_path: Path) -> None:
    path = tmp_path / "image"
    diskwright.create(str(path), format="qcow2", size=SIZE)
    patched(path, BLOCK, bytes(8))
    before = path.read_bytes()
    text = run([*OURS, "bitmap", "--add", path, "one"], status=1)
    assert "Marking image as corrupt" in text and "overlaps with qcow2_header" in text
    after = bytearray(path.read_bytes())
    after[79] &= ~2
    assert bytes(after) == before


def test_a_snapshot_that_points_behind_the_file_keeps_nobody_from_writing(tmp_path: Path) -> None:
    path = made(tmp_path)
    with diskwright.open(str(path), writable=True) as disk:
        disk.snapshots.create("one")
    table = at(path, 64)
    patched(path, table, struct.pack(">Q", 64 * CLUSTER + 512))
    with diskwright.open(str(path), writable=True) as disk:
        for offset in (0, *range(MIB, 6 * MIB, CLUSTER)):
            disk.write_at(offset, b"x" * CLUSTER)
    assert not corrupt(path)
    entries = at(path, L1) & ~COPIED
    hosts = {at(path, entries + 8 * n) & ~COPIED for n in range(SIZE // CLUSTER)}
    assert 66 * CLUSTER in hosts
    assert 64 * CLUSTER not in hosts
