"""qcow2 with extended L2 entries and a data file, or with discards that keep the space: the same
requests leave the same entries as with qemu-io, and each side reads what the other wrote."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import CorruptImage
from diskwright.findings import CheckReport
from interop.tools import OURS, run

Peer = Callable[[str], str]
CLUSTER, SUB, COUNT = 16384, 512, 20
SIZE = COUNT * CLUSTER
OFFSET = (1 << 56) - 512


def check(path: Path, repair: str | None = None) -> CheckReport:
    return diskwright.check(str(path), repair=repair, policy="trusted")


def entries(path: Path) -> list[tuple[int, int, int]]:
    """(flags and place of the descriptor, zero bits, allocation bits) of every guest cluster."""
    with path.open("rb") as file:
        head = file.read(CLUSTER)
        file.seek(struct.unpack_from(">Q", head, 40)[0])
        table = struct.unpack(">Q", file.read(8))[0] & OFFSET
        file.seek(table)
        raw = file.read(16 * COUNT)
    return [struct.unpack_from(">QII", raw, 16 * i) for i in range(COUNT)]


WORK: list[tuple[str, int, int]] = [
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
    ("discard", 10 * CLUSTER, CLUSTER),
    ("write", 20 * CLUSTER - 3 * SUB, 3 * SUB),
    ("discard", 15 * CLUSTER, CLUSTER),
]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["inside", "data-file", "raw-data-file", "over-a-base"])
def test_entries_are_those_of_qemu(kind: str, keep: bool, peer: Peer, tmp_path: Path) -> None:
    options: dict[str, object] = {"cluster_size": CLUSTER, "extended_l2": True}
    base = tmp_path / "base"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    paths = []
    for name in ("theirs", "ours"):
        given = dict(options)
        if kind == "over-a-base":
            given |= {"backing_file": str(base), "backing_fmt": "raw"}
        if kind in ("data-file", "raw-data-file", "over-a-base"):
            given["data_file"] = str(tmp_path / f"{name}.data")
            given["data_file_raw"] = kind == "raw-data-file"
        diskwright.create(str(tmp_path / name), format="qcow2", size=SIZE, options=given)
        paths.append(tmp_path / name)
    theirs, ours = paths
    more = ",discard-no-unref=on" if keep else ""
    image = f"driver=qcow2,discard=unmap,file.filename={theirs},file.driver=file{more}"
    commands = [
        part
        for what, offset, length in WORK
        for part in ("-c", f"{what} -q {'-P 7 ' if what == 'write' else ''}{offset} {length}")
    ]
    run([peer("qemu-io"), *commands, "--image-opts", image])
    with diskwright.open(
        str(ours), writable=True, policy="trusted", options={"discard-no-unref": keep}
    ) as disk:
        for what, offset, length in WORK:
            if what == "write":
                disk.write_at(offset, b"\7" * length)
            elif what == "discard":
                disk.discard(offset, length)
            else:
                disk.zero(offset, length, unmap=what.endswith("-u"))
    inside = kind == "inside"
    for index, (mine, other) in enumerate(zip(entries(ours), entries(theirs), strict=True)):
        if inside:  # the places are each one's own affair
            mine, other = ((w >> 63 << 63 | bool(w & OFFSET), z, a) for w, z, a in (mine, other))
        assert mine == other, index
    read = []
    for path in paths:
        run([peer("qemu-img"), "check", "-q", path])
        assert check(path).corruptions == 0
        run([peer("qemu-img"), "convert", "-O", "raw", path, tmp_path / "out"])
        read.append((tmp_path / "out").read_bytes())
        with diskwright.open(str(path), policy="trusted") as disk:
            assert disk.read_at(0, SIZE) == read[-1]
    assert read[0] == read[1]
    if kind == "raw-data-file":
        assert (tmp_path / "ours.data").read_bytes() == read[1]


def test_kept_space_is_given_back_to_the_host(tmp_path: Path) -> None:
    """Of what is discarded and stays reserved the blocks go, those around them stay."""
    path = tmp_path / "image"
    options: dict[str, object] = {"cluster_size": 1 << 20, "extended_l2": True}
    diskwright.create(str(path), format="qcow2", size=4 << 20, options=options)
    keep = {"discard-no-unref": True}
    with diskwright.open(str(path), writable=True, options=keep) as disk:
        disk.write_at(0, b"x" * (2 << 20))
    before = path.stat().st_blocks
    with diskwright.open(str(path), writable=True, options=keep) as disk:
        disk.discard(32768, 10 * 32768)
        disk.discard(1 << 20, 1 << 20)
        assert disk.read_at(0, 2 << 20) == b"x" * 32768 + bytes(10 * 32768) + b"x" * (
            21 * 32768
        ) + bytes(1 << 20)
    given = 512 * (before - path.stat().st_blocks)
    assert abs(given - 10 * 32768 - (1 << 20)) <= 32768


ENTRY_ERRORS = [
    (0x8000_0000_0000_8000, 1, "External data file host cluster offset 0x8000 does not match"),
    (0x4000_0000_0000_4000, 0, "Compressed cluster entry found in image with external data file"),
    (0x8000_0000_0000_4200, 1, "unaligned"),
    (0, 1, "Invalid cluster entry"),
    (0x8000_0000_0000_4000, 0x1_0000_0001, "Invalid cluster entry"),
]


@pytest.mark.parametrize(("entry", "bitmap", "text"), ENTRY_ERRORS)
def test_broken_entries(entry: int, bitmap: int, text: str, peer: Peer, tmp_path: Path) -> None:
    """None of them is gone by, all are found by a check and mended."""
    path = tmp_path / "image"
    options = {"cluster_size": CLUSTER, "extended_l2": True, "data_file": str(tmp_path / "data")}
    diskwright.create(str(path), format="qcow2", size=SIZE, options=options)
    with diskwright.open(str(path), writable=True, policy="trusted") as disk:
        disk.write_at(0, b"a" * 3 * CLUSTER)
    whole = bytearray(path.read_bytes())
    table = struct.unpack_from(">Q", whole, struct.unpack_from(">Q", whole, 40)[0])[0] & OFFSET
    assert struct.unpack_from(">QQ", whole, table) == (1 << 63, 0xFFFF_FFFF)
    struct.pack_into(">QQ", whole, table + 16, entry, bitmap)
    path.write_bytes(whole)
    with diskwright.open(str(path), policy="trusted") as disk:
        assert disk.read_at(0, CLUSTER) == b"a" * CLUSTER
        with pytest.raises(CorruptImage, match=text):
            disk.read_at(CLUSTER, SUB)
    assert check(path).corruptions == 1
    found = check(path, repair="all")
    assert (found.corruptions, found.corruptions_fixed) == (0, 1)
    assert not check(path).findings
    run([peer("qemu-img"), "check", "-q", path])
    with diskwright.open(str(path), policy="trusted") as disk:
        data = disk.read_at(0, 3 * CLUSTER)
    assert data[:CLUSTER] + data[2 * CLUSTER :] == b"a" * 2 * CLUSTER
    assert not data[CLUSTER + SUB : 2 * CLUSTER].strip(b"a\0")


@pytest.mark.parametrize("word", [0, 1])
def test_noise(word: int, tmp_path: Path) -> None:
    """Tables of noise: errors of ours alone, and a repair that a check has nothing to say of."""
    path = tmp_path / "image"
    options = {"cluster_size": CLUSTER, "extended_l2": True, "data_file": str(tmp_path / "data")}
    diskwright.create(str(path), format="qcow2", size=SIZE, options=options)
    with diskwright.open(str(path), writable=True, policy="trusted") as disk:
        disk.write_at(0, b"a" * SIZE)
    clean = path.read_bytes()
    table = struct.unpack_from(">Q", clean, struct.unpack_from(">Q", clean, 40)[0])[0] & OFFSET
    rng = random.Random(word)
    for _ in range(8):
        whole = bytearray(clean)
        for _ in range(6):
            value = rng.getrandbits(64) & rng.choice([-1, 0xFF << 56, 0xFFFFFF, 0xFFFFFFFF << 32])
            struct.pack_into(">Q", whole, table + 16 * rng.randrange(COUNT) + 8 * word, value)
        path.write_bytes(whole)
        with diskwright.open(str(path), policy="trusted") as disk:
            for at in range(0, SIZE, 3 * SUB):
                try:
                    assert not disk.read_at(at, SUB).strip(b"a\0")
                except CorruptImage:
                    pass
        check(path, repair="all")
        assert not check(path).findings
        with diskwright.open(str(path), policy="trusted") as disk:
            assert not disk.read_at(0, SIZE).strip(b"a\0")


@pytest.mark.parametrize("kind", ["extended", "plain"])
def test_rebase_compresses_what_it_can(kind: str, peer: Peer, tmp_path: Path) -> None:
    """A cluster of which some subclusters are stored is filled up, the others are compressed."""
    base, path = tmp_path / "base", tmp_path / "image"
    lines = b"".join(b"line %d of it\n" % n for n in range(SIZE // 8))[:SIZE]
    base.write_bytes(lines)
    options: dict[str, object] = {"cluster_size": CLUSTER, "extended_l2": kind == "extended"}
    options |= {"backing_file": str(base), "backing_fmt": "raw"}
    diskwright.create(str(path), format="qcow2", size=SIZE, options=options)
    model = bytearray(lines)
    with diskwright.open(str(path), writable=True, policy="trusted") as disk:
        for at, length in ((3 * SUB, SUB), (4 * CLUSTER - SUB, 2 * SUB), (9 * CLUSTER, CLUSTER)):
            disk.write_at(at, b"\7" * length)
            model[at : at + length] = b"\7" * length
        disk.zero(6 * CLUSTER, 5 * SUB)
        model[6 * CLUSTER : 6 * CLUSTER + 5 * SUB] = bytes(5 * SUB)
    run([*OURS, "rebase", "-c", "--policy", "trusted", "-b", "", path])
    with diskwright.open(str(path)) as disk:
        assert disk.read_at(0, SIZE) == model
    assert not check(path).findings
    run([peer("qemu-img"), "check", "-q", path])
    run([peer("qemu-img"), "convert", "-O", "raw", path, tmp_path / "out"])
    assert (tmp_path / "out").read_bytes() == model
    assert sum(word >> 62 == 1 for word, _, _ in entries(path)) >= 7
