"""``salvage``: what comes back out of images that were destroyed, measured against the disk before.

Asserted everywhere: the source is not written to, and no byte is wrong that the map does not name
as lost or guessed.  What must come back is said by each list of destructions: all of the disk, all
but what the destruction took, or what is left of it in an order that is guessed.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import ours
from diskwright.errors import DiskError, UnsupportedFeature, UsageError

CLUSTER = 4096
PER_TABLE = CLUSTER // 8
SIZE = 8 << 20
OFFSET = (1 << 56) - 512
COPIED, PACKED = 1 << 63, 1 << 62


class Made:
    """An image, the disk in it, and where its parts are."""

    def __init__(self, path: Path, disk: bytes) -> None:
        self.path, self.disk = path, disk
        self.file = bytearray(path.read_bytes())
        self.l1, self.reftable = self.get(40), self.get(48)
        (self.l1_size,) = struct.unpack_from(">I", self.file, 36)

    def get(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self.file, at)[0])

    def put(self, at: int, value: int) -> None:
        struct.pack_into(">Q", self.file, at, value)

    def zero(self, at: int, length: int) -> None:
        self.file[at : at + length] = bytes(length)

    def table(self, index: int) -> int:
        return self.get(self.l1 + 8 * index) & OFFSET

    @property
    def tables(self) -> list[int]:
        return [t for t in (self.table(i) for i in range(self.l1_size)) if t]


def make(folder: Path, seed: int = 1, in_order: bool = False, **options: Any) -> Made:
    """Random writes over half of the disk; in the order of the disk they are as a copy makes it."""
    path = folder / "a.qcow2"
    diskwright.create(path, format="qcow2", size=SIZE, options={"cluster_size": CLUSTER, **options})
    rng = random.Random(seed)
    places = sorted(rng.sample(range(SIZE // CLUSTER), 600))
    if not in_order:
        rng.shuffle(places)
    disk = bytearray(SIZE)
    with diskwright.open(path, format="qcow2", writable=True, policy="trusted") as image:
        for place in places:
            data = rng.randbytes(rng.choice((CLUSTER, CLUSTER, 700)))
            image.write_at(place * CLUSTER, data)
            disk[place * CLUSTER : place * CLUSTER + len(data)] = data
    return Made(path, bytes(disk))


def salvaged(made: Made, folder: Path, **named: Any) -> tuple[Any, bytes, list[int], list[int]]:
    """The result, the disk that came back, and the clusters that differ and those that differ in
    silence."""
    made.path.write_bytes(made.file)
    out = folder / "out"
    if "secrets" in named:
        keyed = {"driver": "qcow2", "file": {"driver": "file", "filename": str(made.path)}}
        source: Any = {**keyed, "encrypt": {"key-secret": "s"}}
        done = diskwright.salvage(source, out, target_format="raw", force=True, **named)
    else:
        done = diskwright.salvage(
            made.path, out, target_format="raw", format="qcow2", force=True, **named
        )
    assert made.path.read_bytes() == made.file
    with out.open("rb") as file:
        back = file.read(SIZE).ljust(SIZE, b"\0")
    told = bytearray(SIZE + CLUSTER)
    last = 0
    for part in done.map.parts:
        assert last <= part.start and part.length > 0 and part.start + part.length <= done.size
        last = part.start + part.length
        told[part.start : last] = (b"\1" if part.state == "lost" else b"\2") * part.length
        if part.state == "lost":
            assert not any(back[part.start : last])
    if done.size < SIZE:
        told[done.size : SIZE] = b"\1" * (SIZE - done.size)
    wrong = [i for i in range(0, SIZE, 512) if back[i : i + 512] != made.disk[i : i + 512]]
    return done, back, wrong, [i for i in wrong if not told[i]]


def header_zeroed(m: Made) -> None:
    m.zero(0, CLUSTER)


def header_sector(m: Made) -> None:
    m.file[:512] = random.Random(1).randbytes(512)


def header_magic(m: Made) -> None:
    m.file[:4] = b"XXXX"


def header_version(m: Made) -> None:
    m.file[4:8] = b"\xff" * 4


def l1_field(m: Made) -> None:
    m.zero(36, 12)


def l1_field_wild(m: Made) -> None:
    m.put(40, 0x123456789ABCD)


def l1_field_at_data(m: Made) -> None:
    m.put(40, len(m.file) - CLUSTER & -CLUSTER)


def size_field(m: Made) -> None:
    m.put(24, 1 << 63)


def reftable_field(m: Made) -> None:
    m.put(48, 513)


def counts_gone(m: Made) -> None:
    m.zero(m.get(m.reftable), CLUSTER)
    m.zero(m.reftable, CLUSTER)


def snapshot_field(m: Made) -> None:
    m.file[60:72] = b"\xff" * 12


def l1_zeroed(m: Made) -> None:
    m.zero(m.l1, CLUSTER)


def l1_random(m: Made) -> None:
    m.file[m.l1 : m.l1 + 8 * m.l1_size] = random.Random(2).randbytes(8 * m.l1_size)


def l1_and_header(m: Made) -> None:
    l1_zeroed(m)
    header_zeroed(m)


def l1_one_lost(m: Made) -> None:
    m.put(m.l1 + 8, 0)


def l1_one_wild(m: Made) -> None:
    m.put(m.l1 + 8, 0x8000_DEAD_BEEF_0000)


def l1_two_alike(m: Made) -> None:
    m.put(m.l1 + 8, m.get(m.l1))


def l2_half(m: Made) -> None:
    for table in m.tables:
        m.zero(table, CLUSTER // 2)


def l2_random(m: Made) -> None:
    rng = random.Random(3)
    for table in m.tables[::2]:
        m.file[table : table + 512] = rng.randbytes(512)


def l2_all_random(m: Made) -> None:
    for table in m.tables[::2]:
        m.file[table : table + CLUSTER] = random.Random(4).randbytes(CLUSTER)


def l2_alike(m: Made) -> None:
    """Entries that name what others do."""
    table = m.tables[1]
    for index in range(40, 80):
        m.put(table + 8 * index, m.get(m.tables[0] + 8 * index))


def truncated(m: Made) -> None:
    del m.file[len(m.file) * 2 // 3 :]


ALL = [
    header_magic, header_version, l1_field, l1_field_wild, l1_field_at_data, reftable_field,
    counts_gone, snapshot_field, size_field, header_zeroed, header_sector,
]  # fmt: skip
GUESS = [l1_zeroed, l1_random, l1_and_header]
REST = [
    l1_one_lost, l1_one_wild, l1_two_alike, l2_half, l2_random, l2_all_random, l2_alike, truncated,
]  # fmt: skip


@pytest.mark.parametrize("destroy", ALL, ids=lambda f: f.__name__)
def test_all_comes_back(tmp_path: Path, destroy: Callable[[Made], None]) -> None:
    """The tables are all there: every byte of the disk comes back, and nothing is lost."""
    made = make(tmp_path)
    destroy(made)
    done, _, wrong, _ = salvaged(made, tmp_path)
    assert not wrong and not done.lost, done.remarks
    if destroy not in (header_zeroed, header_sector, size_field):
        assert done.size == SIZE
        assert not done.guessed, {part.why for part in done.map.parts}


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("destroy", GUESS, ids=lambda f: f.__name__)
def test_the_order_is_guessed(
    tmp_path: Path, destroy: Callable[[Made], None], in_order: bool
) -> None:
    """Without L1 table: all of a disk that was written in order, the parts of another one in an
    order that may be wrong; all of it is said to be guessed."""
    made = make(tmp_path, in_order=in_order)
    destroy(made)
    done, back, wrong, silent = salvaged(made, tmp_path)
    assert not silent and done.guessed
    if in_order:
        assert not wrong
    span = PER_TABLE * CLUSTER
    parts = sorted(back[i : i + span] for i in range(0, SIZE, span))
    assert parts == sorted(made.disk[i : i + span] for i in range(0, SIZE, span))


@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("destroy", REST, ids=lambda f: f.__name__)
def test_the_rest_comes_back(tmp_path: Path, destroy: Callable[[Made], None], seed: int) -> None:
    """What is gone is told; all that the tables still tell of comes back."""
    made = make(tmp_path, seed)
    sound = Made(made.path, made.disk)
    destroy(made)
    _, back, _, silent = salvaged(made, tmp_path)
    assert not silent, [hex(i) for i in silent[:4]]
    # A cluster is attributable when its table's place, its entry and its bytes are as they were.
    for index in range(sound.l1_size):
        table = sound.table(index)
        if made.get(made.l1 + 8 * index) & OFFSET != table or table + CLUSTER > len(made.file):
            continue
        now = made.file[table : table + CLUSTER]
        if (
            sum(a != b for a, b in zip(now, sound.file[table : table + CLUSTER], strict=True))
            > 2048
        ):
            continue  # what is left is no table
        for entry in range(PER_TABLE):
            at = table + 8 * entry
            value = sound.get(at)
            if made.get(at) != value or not value & OFFSET:
                continue
            if (value & OFFSET) + CLUSTER <= len(made.file):
                guest = (index * PER_TABLE + entry) * CLUSTER
                assert back[guest : guest + CLUSTER] == made.disk[guest : guest + CLUSTER]


def test_a_healthy_image(tmp_path: Path) -> None:
    """Nothing is guessed of one, and every target format will do."""
    made = make(tmp_path)
    done, _, wrong, _ = salvaged(made, tmp_path)
    assert not wrong and not done.map.parts and not done.remarks
    for fmt in ("qcow2", "vhdx", "vmdk"):
        done = diskwright.salvage(made.path, tmp_path / fmt, target_format=fmt)
        assert not done.map.parts
        with diskwright.open(tmp_path / fmt) as image:
            assert image.read_at(0, SIZE) == made.disk


@pytest.mark.parametrize("cluster", [512, 65536])
def test_cluster_sizes_are_told_from_the_tables(tmp_path: Path, cluster: int) -> None:
    made = make(tmp_path, cluster_size=cluster, in_order=True)
    made.zero(0, max(512, min(cluster, 4096)))
    done, _, wrong, _ = salvaged(made, tmp_path)
    assert f"taken for {cluster} bytes" in done.remarks[0]
    assert not wrong


def test_random_damage(tmp_path: Path) -> None:
    """Whatever is overwritten: in metadata nothing wrong is passed off as right; in data nothing
    could tell."""
    made = make(tmp_path)
    good, rng = bytes(made.file), random.Random(9)
    places = [0, made.l1, made.reftable, *made.tables]
    for _ in range(6):
        made.file[:] = good
        for _ in range(rng.choice((1, 2, 6))):
            at = rng.choice(places) + rng.randrange(CLUSTER)
            length = rng.choice((1, 8, 64, 512))
            fill = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
            made.file[at : at + length] = fill
        try:
            _, _, wrong, silent = salvaged(made, tmp_path)
        except DiskError:
            continue  # features that it says are needed
        # A single entry that is changed into another sound one is beyond what can be told.
        assert len(silent) <= 8 * 2, (len(silent), len(wrong))


def test_a_bad_sector(tmp_path: Path) -> None:
    """Sectors that the medium does not give: of data, of a table, of the header."""
    made = make(tmp_path)
    made.path.write_bytes(made.file)
    table = made.tables[1]
    data = next(
        made.get(table + 8 * i) & OFFSET
        for i in range(64, PER_TABLE)
        if made.get(table + 8 * i) & OFFSET
    )
    for sectors, most in (([data // 512], 512), ([table // 512], 64 * CLUSTER), ([0], 0)):
        source = {
            "driver": "qcow2",
            "file": {
                "driver": "blkdebug",
                "image": {"driver": "file", "filename": str(made.path)},
                "inject-error": [
                    {"event": "none", "iotype": "read", "errno": 5, "sector": sector}
                    for sector in sectors
                ],
            },
        }
        done = diskwright.salvage(source, tmp_path / "out", force=True)
        assert done.lost <= most, done.map.parts
        lost = {
            at for part in done.map.parts for at in range(part.start, part.start + part.length, 512)
        }
        back = (tmp_path / "out").read_bytes()
        for at in range(0, min(SIZE, len(back)), 512):
            assert at in lost or back[at : at + 512] == made.disk[at : at + 512]
        assert done.lost == most or not done.lost


def test_compressed_clusters(tmp_path: Path) -> None:
    """One that does not unpack is lost as a whole, and no other one."""
    raw = tmp_path / "raw"
    disk = b"".join(bytes([i % 251]) * CLUSTER for i in range(SIZE // CLUSTER))
    raw.write_bytes(disk)
    path = tmp_path / "a.qcow2"
    done = ours(
        "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", f"cluster_size={CLUSTER}", "raw",
        "a.qcow2", cwd=tmp_path,
    )  # fmt: skip
    assert done.status == 0
    made = Made(path, disk)
    entry = made.get(made.tables[0] + 8 * 5)
    assert entry & PACKED
    at = entry & (1 << 62 - 4) - 1
    made.file[at : at + 4] = b"\xff" * 4
    result, _, _, silent = salvaged(made, tmp_path)
    assert not silent and result.lost == CLUSTER
    assert result.map.parts[0].start == 5 * CLUSTER
    with pytest.raises(zlib.error):
        zlib.decompress(bytes(made.file[at : at + 64]), -12)
    made = Made(path, disk)
    header_zeroed(made)
    result, _, _, silent = salvaged(made, tmp_path)
    assert not silent or "nothing speaks" in result.remarks[0]


def test_snapshots_tell_where_a_table_belongs(tmp_path: Path) -> None:
    """With the active L1 table gone, those of a snapshot name the tables that it shares."""
    made = make(tmp_path, in_order=False)
    done = ours("snapshot", "-c", "one", "a.qcow2", cwd=tmp_path)
    assert not done.status
    disk = bytearray(made.disk)
    with diskwright.open(made.path, format="qcow2", writable=True) as image:
        for table in range(SIZE // CLUSTER // PER_TABLE):
            image.write_at(table * PER_TABLE * CLUSTER, b"n" * CLUSTER)
            disk[table * PER_TABLE * CLUSTER : (table * PER_TABLE + 1) * CLUSTER] = b"n" * CLUSTER
    made = Made(made.path, bytes(disk))
    l1_zeroed(made)
    result, _, wrong, silent = salvaged(made, tmp_path)
    assert not wrong and not silent, len(wrong)
    assert any("snapshot" in part.why for part in result.map.parts)


def test_a_disk_in_the_disk(tmp_path: Path) -> None:
    """The tables of an image that the guest keeps are not taken for this image's."""
    inner = make(tmp_path)
    data = bytes(inner.file)
    path = tmp_path / "outer.qcow2"
    diskwright.create(path, format="qcow2", size=SIZE, options={"cluster_size": CLUSTER})
    with diskwright.open(path, format="qcow2", writable=True) as image:
        image.write_at(1 << 20, data)
    disk = bytearray(SIZE)
    disk[1 << 20 : (1 << 20) + len(data)] = data
    for destroy in (l1_zeroed, header_zeroed):
        made = Made(path, bytes(disk))
        good = bytes(made.file)
        destroy(made)
        _, _, _, silent = salvaged(made, tmp_path)
        assert not silent
        path.write_bytes(good)


def test_backing_files_pass_the_gate(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"B" * SIZE)
    made = make(tmp_path, backing_file=str(base), backing_fmt="raw")
    disk = bytearray(b"B" * SIZE)
    with diskwright.open(made.path, format="qcow2", policy="trusted") as image:
        disk[:] = image.read_at(0, SIZE)
    made = Made(made.path, bytes(disk))
    l2_random(made)
    with pytest.raises(DiskError, match="not opened"):
        salvaged(made, tmp_path, policy="untrusted")
    assert not (tmp_path / "out").exists()
    done, back, _, silent = salvaged(made, tmp_path, policy="trusted")
    assert not silent and done.lost
    for part in done.map.parts:
        if part.state == "lost":  # never the backing file's bytes in their place
            assert not any(back[part.start : part.start + part.length])


def test_the_command(tmp_path: Path) -> None:
    made = make(tmp_path)
    done = ours("salvage", "a.qcow2", "out", cwd=tmp_path, name="diskwright")
    assert done.status == 0 and f"All {SIZE} bytes" in done.out.decode()
    l2_half(made)
    made.path.write_bytes(made.file)
    done = ours("salvage", "a.qcow2", "out", cwd=tmp_path, name="diskwright")
    assert done.status == 1 and b"--force" in done.err
    done = ours(
        "salvage",
        "--force",
        "--map",
        "map",
        "-O",
        "qcow2",
        "a.qcow2",
        "out",
        cwd=tmp_path,
        name="diskwright",
    )
    assert done.status == 3 and b"guessed" in done.out
    rows = [
        line.split()
        for line in (tmp_path / "map").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert rows[0][1] == "+" and len(rows[0]) == 3
    at = 0
    for start, length, state in rows[1:]:
        assert int(start, 16) == at and state in "+-?"
        at += int(length, 16)
    assert at == SIZE
    done = ours(
        "salvage",
        "--force",
        "--map=map",
        "--map-format=json",
        "a.qcow2",
        "out",
        cwd=tmp_path,
        name="diskwright",
    )
    told = json.loads((tmp_path / "map").read_text())
    assert told["virtual-size"] == SIZE and told["guessed"] and told["ranges"][0]["why"]
    header_zeroed(made)
    made.path.write_bytes(made.file)
    done = ours("salvage", "--force", "a.qcow2", "out", cwd=tmp_path, name="diskwright")
    assert done.status == 1 and b"say it with -f" in done.err
    done = ours("salvage", "missing", "new", cwd=tmp_path, name="diskwright")
    assert done.status == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("fmt", ["vhdx", "vmdk"])
def test_other_formats(tmp_path: Path, fmt: str) -> None:
    """What their own second copies and their extents give; sectors that cannot be read are lost."""
    path = tmp_path / "a"
    diskwright.create(path, format=fmt, size=SIZE)
    disk = random.Random(4).randbytes(SIZE // 2) + bytes(SIZE // 2)
    with diskwright.open(path, format=fmt, writable=True) as image:
        image.write_at(0, disk[: SIZE // 2])
    place = path.read_bytes().find(disk[1 << 20 : (1 << 20) + 512]) // 512
    source = {
        "driver": fmt,
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": str(path)},
            "inject-error": [{"event": "none", "iotype": "read", "errno": 5, "sector": place}],
        },
    }
    done = diskwright.salvage(source, tmp_path / "out")
    assert [(p.start, p.length, p.state) for p in done.map.parts] == [(1 << 20, 512, "lost")]
    assert done.map.parts[0].why == os.strerror(5)
    back = (tmp_path / "out").read_bytes()
    assert back == disk[: 1 << 20] + bytes(512) + disk[(1 << 20) + 512 :]


@pytest.mark.parametrize(
    ("entry", "lost", "guessed"),
    [(0, [], [2, *range(8, 16)]), (1 << 50 | 6, [2], [*range(8, 16)]), (1 << 20 | 6, [2],
     [*range(8, 16)]), (None, [], [0, 2, *range(8, 16)])],
    ids=["gone", "outside", "metadata", "another's"],
)  # fmt: skip
def test_entries_of_vhdx(
    tmp_path: Path, entry: int | None, lost: list[int], guessed: list[int]
) -> None:
    """What a lost entry of the BAT named cannot be put back; the map says what it leaves open."""
    path, mib = tmp_path / "a", 1 << 20
    diskwright.create(path, format="vhdx", size=16 * mib, options={"block_size": mib})
    disk = random.Random(4).randbytes(8 * mib) + bytes(8 * mib)
    with diskwright.open(path, format="vhdx", writable=True) as image:
        image.write_at(0, disk[: 8 * mib])
    assert not diskwright.salvage(path, tmp_path / "out").map.parts
    raw = bytearray(path.read_bytes())
    first = raw.find(disk[:512])
    bat = raw.find(struct.pack("<QQ", first | 6, first + mib | 6))
    struct.pack_into("<Q", raw, bat + 16, first | 6 if entry is None else entry)
    path.write_bytes(raw)
    done = diskwright.salvage(path, tmp_path / "out", force=True)
    found = {
        state: [i for p in done.map.parts if p.state == state
                for i in range(p.start // mib, (p.start + p.length) // mib)]
        for state in ("lost", "guessed")
    }  # fmt: skip
    assert found == {"lost": lost, "guessed": guessed}
    back = (tmp_path / "out").read_bytes()
    for block in set(range(16)) - {*lost, *guessed}:
        assert back[block * mib :][:mib] == disk[block * mib :][:mib]


def test_vmdk_without_its_first_directory(tmp_path: Path) -> None:
    path = tmp_path / "a"
    diskwright.create(path, format="vmdk", size=SIZE)
    with diskwright.open(path, format="vmdk", writable=True) as image:
        image.write_at(0, b"v" * 300_000)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<Q", raw, 56, 1 << 40)  # gdOffset
    path.write_bytes(raw)
    done = diskwright.salvage(path, tmp_path / "out")
    assert not done.lost
    assert (tmp_path / "out").read_bytes()[:300_000] == b"v" * 300_000


def test_hostile_images(tmp_path: Path) -> None:
    """Any bytes: an answer or a clear error, in bounded time."""
    made = make(tmp_path, in_order=True)
    rng = random.Random(12)
    good = bytes(made.file[: 400 << 10])
    source, out = tmp_path / "h", tmp_path / "out"
    places = [0, 16, 20, 24, 36, 40, 48, 56, 60, 64, 72, 96, 100, 104]
    for _ in range(12):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 2, 5))):
            at = rng.choice(
                [*places, made.l1 + rng.randrange(64), made.tables[0] + rng.randrange(99)]
            )
            bad[at : at + 4] = rng.choice(
                (b"\xff" * 4, b"\0\0\0\1", b"\x7f\xff\xff\xff", b"\0\0\0\x40")
            )
        source.write_bytes(bad)
        try:
            done = diskwright.salvage(
                source, out, target_format="qcow2", format="qcow2", force=True
            )
        except (DiskError, OSError) as error:
            assert str(error) and not re.search("Traceback", str(error))
            continue
        assert done.size == 0 or done.map.size == done.size
    for length in (0, 1, 511, 512, 5000):
        source.write_bytes(rng.randbytes(length))
        try:
            diskwright.salvage(source, out, format="qcow2", force=True)
        except (DiskError, OSError):
            pass


KINDS = {
    "extended": {"extended_l2": True},
    "data-file": {"data_file": True},
    "both": {"extended_l2": True, "data_file": True},
    "luks": {"encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.iter-time": 10},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", ["nothing", "entry", "l1", "one-l1-entry"])
def test_images_with_features_are_searched(tmp_path: Path, kind: str, lost: str) -> None:
    """Extended entries, a data file, and by its key an encrypted one: as plain images are."""
    path = tmp_path / "a.qcow2"
    unit = 16384 if "extended_l2" in KINDS[kind] else 4096
    more: dict[str, Any] = {"cluster_size": unit, **KINDS[kind]}
    if "data_file" in more:
        more["data_file"] = str(tmp_path / "data")
    named: dict[str, Any] = {"policy": "trusted"}
    if kind == "luks":
        pytest.importorskip("cryptography")
        named["secrets"] = {"s": "abc"}
    diskwright.create(path, format="qcow2", size=SIZE, options=more, secrets=named.get("secrets"))
    opened = {"encrypt.key-secret": "s"} if kind == "luks" else {}
    rng = random.Random(6)
    disk = bytearray(SIZE)
    with diskwright.open(path, format="qcow2", writable=True, options=opened, **named) as image:
        for place in sorted(rng.sample(range(SIZE // unit), 300)):
            data = rng.randbytes(unit)
            image.write_at(place * unit, data)
            disk[place * unit : (place + 1) * unit] = data
    made = Made(path, bytes(disk))
    width = 16 if "extended_l2" in more else 8
    first = next(i for i in range(200) if made.get(made.tables[0] + i * width))
    if lost == "entry":
        made.put(made.tables[0] + first * width, COPIED | 0x200)
    elif lost == "l1":
        made.zero(made.l1, 8 * made.l1_size)
    elif lost == "one-l1-entry":
        made.put(made.l1 + 8 * (made.l1_size - 1), 0x4141)
    done, _, wrong, silent = salvaged(made, tmp_path, **named)
    assert not silent
    if lost == "nothing":
        assert not (wrong or done.lost or done.guessed)
    elif lost == "entry":
        (part,) = [part for part in done.map.parts if part.state == "lost"]
        assert (part.start, part.length) == (first * unit, unit)
        assert 0 < len(wrong) <= unit // 512
    else:  # the tables lie in the file as they do in the disk
        assert not wrong and not done.lost and done.guessed


def test_healthy_images_raise_no_doubt(tmp_path: Path) -> None:
    """What only snapshots, bitmaps or the encryption header name is no lost content."""
    made = make(tmp_path)
    with diskwright.open(made.path, format="qcow2", writable=True) as image:
        for name in ("one", "two"):
            image.bitmaps.add(name, granularity=4096, persistent=True)
        image.write_at(0, b"y" * SIZE)
        image.snapshots.create("s1")
    with diskwright.open(made.path, format="qcow2", writable=True) as image:
        image.discard(0, SIZE // 2)
    now = Made(made.path, bytes(SIZE // 2) + b"y" * (SIZE // 2))
    done, _, wrong, silent = salvaged(now, tmp_path)
    assert not (wrong or silent or done.lost or done.guessed), done.remarks
    # A directory of noise is said, and no more.
    (at,) = [i for i in range(104, 4096, 8) if now.get(i) >> 32 == 0x23852875]
    now.put(now.get(at + 24), 0xFFFF << 40)
    done, _, wrong, _ = salvaged(now, tmp_path)
    assert not wrong and not done.lost


def test_features_that_it_does_not_know(tmp_path: Path) -> None:
    made = make(tmp_path)
    made.put(72, made.get(72) | 1 << 40)
    with pytest.raises(UnsupportedFeature, match="Unknown incompatible feature"):
        salvaged(made, tmp_path)
    with pytest.raises(UsageError, match="one pass"):
        diskwright.salvage(
            make(tmp_path).path,
            tmp_path / "s",
            target_format="vmdk",
            options={"subformat": "streamOptimized"},
        )


def test_a_large_image_in_bounded_memory(tmp_path: Path) -> None:
    """16 TiB, nearly all of it a hole, with an L1 table of noise."""
    path = tmp_path / "a"
    diskwright.create(path, format="qcow2", size=16 << 40)
    with diskwright.open(path, format="qcow2", writable=True) as image:
        for at in (0, 1 << 40, (16 << 40) - 65536):
            image.write_at(at, b"x" * 65536)
    with path.open("r+b") as file:
        file.seek(40)
        (l1,) = struct.unpack(">Q", file.read(8))
        file.seek(l1 + 4096)
        file.write(random.Random(1).randbytes(512))
        file.truncate(1 << 43)
    script = (
        "import diskwright\n"
        "done = diskwright.salvage('a', 'out', target_format='qcow2')\n"
        "status = open('/proc/self/status').read()\n"
        "print(done.lost > 0, status.split('VmHWM:')[1].split()[0])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(diskwright.__file__).parents[1])}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    lost, kib = ran.stdout.split()
    assert lost == "True" and int(kib) < 256 << 10


@pytest.mark.parametrize("fmt", ["luks", "qcow2"])
def test_what_lies_below_is_read_by_its_key(tmp_path: Path, fmt: str) -> None:
    pytest.importorskip("cryptography")
    prefix = "" if fmt == "luks" else "encrypt."
    secrets = {"s": "abc"}
    key = {f"{prefix}key-secret": "s"}
    options = {**key, f"{prefix}iter-time": 10}
    if fmt == "qcow2":
        options["encrypt.format"] = "luks"
    base, path, out = tmp_path / "base", tmp_path / "a.qcow2", tmp_path / "out"
    diskwright.create(base, format=fmt, size=SIZE, options=options, secrets=secrets)
    named: dict[str, Any] = {"policy": "trusted", "secrets": secrets}
    with diskwright.open(base, format=fmt, writable=True, options=key, **named) as image:
        image.write_at(3 * CLUSTER, b"below" * CLUSTER)
    diskwright.create(path, format="qcow2", size=SIZE)
    below = {"driver": fmt, "file": {"driver": "file", "filename": str(base)}, **key}
    file = {"driver": "file", "filename": str(path)}
    with diskwright.open({"driver": "qcow2", "file": file}, writable=True) as image:
        image.write_at(0, b"above" * CLUSTER)
    for source in (below, {"driver": "qcow2", "file": file, "backing": below}):
        done = diskwright.salvage(source, out, target_format="raw", force=True, **named)
        assert not done.map.parts
        with diskwright.open(source, **named) as image:
            assert out.read_bytes() == image.read_at(0, SIZE)
