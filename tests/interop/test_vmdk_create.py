"""VMDK images in both directions over random options, and what QEMU's tool gets wrong."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interop.tools import OURS, run

Peer = Callable[[str], str]
MIB = 1 << 20
SUBFORMATS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat",
              "streamOptimized"]  # fmt: skip
OURS_ONLY = ["vmfs", "vmfsSparse", "seSparse"]


def options(rng: random.Random, subformat: str) -> str:
    out = [f"subformat={subformat}"]
    if rng.random() < 0.7:
        out.append("adapter_type=" + rng.choice(["ide", "lsilogic", "buslogic", "legacyESX"]))
    if rng.random() < 0.3:
        out.append("compat6=on")
    elif rng.random() < 0.5:
        out.append("hwversion=" + rng.choice(["4", "9", "19"]))
    if rng.random() < 0.3:
        out.append(f"toolsversion={rng.randrange(1 << 31)}")
    if "Sparse" in subformat and rng.random() < 0.5:
        out.append("zeroed_grain=on")
    return ",".join(out)


def text_of(path: Path) -> str:
    raw = path.read_bytes()[: 64 << 10]
    if raw[:4] == b"KDMV":
        raw = raw[512 : 512 + 10240]
    return raw.split(b"\0", 1)[0].decode()


def specific(image: Path, peer: Peer) -> tuple[dict[str, object], dict[str, object]]:
    """What both tools say of the image: (ours, theirs)."""
    ours = json.loads(run([*OURS, "info", "--output=json", image]))
    theirs = json.loads(run([peer("qemu-img"), "info", "--output=json", image]))
    return ours, theirs


@pytest.mark.parametrize("seed", range(14))
def test_the_same_descriptor_and_layout(seed: int, peer: Peer, tmp_path: Path) -> None:
    rng = random.Random(seed)
    subformat = SUBFORMATS[seed % len(SUBFORMATS)]
    size = rng.choice([512, MIB, 100 * MIB + 1536, (2 << 30) - 512, 2 << 30, 5 << 30, 3 << 40])
    if "twoGb" in subformat:
        size = min(size, 9 << 30)
    given = options(rng, subformat)
    for who, tool in (("a", OURS), ("b", [peer("qemu-img")])):
        (tmp_path / who).mkdir()
        run([*tool, "create", "-q", "-f", "vmdk", "-o", given, tmp_path / who / "x.y.vmdk",
             str(size)])  # fmt: skip
    ours, theirs = tmp_path / "a", tmp_path / "b"
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())

    def plain(path: Path) -> str:
        return re.sub("(?m)^CID=[0-9a-f]{6,8}$", "CID=", text_of(path))

    assert plain(ours / "x.y.vmdk") == plain(theirs / "x.y.vmdk")
    if subformat != "streamOptimized":  # where ours is a true stream
        for path in ours.iterdir():
            one, other = path.stat(), (theirs / path.name).stat()
            if path.name == "x.y.vmdk" and path.read_bytes()[:4] != b"KDMV":
                continue  # QEMU's CID may be shorter
            assert one.st_size == other.st_size, path.name
            if one.st_size < 4 * MIB and path.name != "x.y.vmdk":
                assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name
    for image in (ours / "x.y.vmdk", theirs / "x.y.vmdk"):
        mine, other = specific(image, peer)
        for key in ("virtual-size", "cluster-size", "format-specific", "format"):
            assert mine.get(key) == other.get(key), key


@pytest.mark.parametrize("subformat", [*SUBFORMATS[:4], *OURS_ONLY])
def test_written_by_one_and_read_by_the_other(subformat: str, peer: Peer, tmp_path: Path) -> None:
    rng = random.Random(subformat)
    size = (2 << 30) + 3 * MIB + 512
    image = tmp_path / "disk.vmdk"
    run([*OURS, "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", image, str(size)])
    # QEMU overwrites the header of a COWD extent whose tables are not there, and does not write
    # seSparse at all.
    read_only = subformat in ("vmfsSparse", "seSparse")
    checks: list[str] = []
    for turn in range(6):
        offset = rng.choice([0, (2 << 30) - 70_000, size - 100_000, rng.randrange(size - 100_000)])
        offset = (offset + turn * 110_000 if offset < 1 << 30 else offset) // 512 * 512
        length = rng.randrange(1, 130) * 512
        if any(
            int(o) < offset + length and offset < int(o) + int(n)
            for _, _, _, o, n in (c.split() for c in checks)
        ):
            continue
        ours = turn % 2 == 0 or read_only
        tool = [*OURS, "io"] if ours else [peer("qemu-io")]
        run([*tool, "-c", f"write -q -P {turn + 1} {offset} {length}", image])
        checks.append(f"read -P {turn + 1} {offset} {length}")
        words = [word for check in checks for word in ("-c", check)]
        assert "failed" not in run([peer("qemu-io"), "-r", *words, image])
        assert "failed" not in run([*OURS, "io", "-r", *words, image])
    assert len(checks) > 2
    run([*OURS, "check", "-q", image])
    run([peer("qemu-img"), "check", "-q", image])
    mine, other = specific(image, peer)
    assert mine["format-specific"] == other["format-specific"]


@pytest.mark.parametrize("subformat", [*SUBFORMATS[:4], *OURS_ONLY])
def test_libvmdk_reads_ours(subformat: str, tmp_path: Path, libvmdk: Any) -> None:
    image = tmp_path / "disk.vmdk"
    run([*OURS, "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", image, "5M"])
    run([*OURS, "io", "-c", "write -q -P 7 1M 100k", "-c", "write -q -P 8 5242368 512", image])
    handle = libvmdk.handle()
    try:
        handle.open(str(image))
    except OSError as error:
        assert subformat == "seSparse", error  # which it does not know
        return
    handle.open_extent_data_files()
    assert handle.get_media_size() == 5 * MIB
    data = handle.read_buffer_at_offset(5 * MIB, 0)
    assert data == (bytes(MIB) + b"\7" * 102400 + bytes(4 * MIB - 102400 - 512) + b"\10" * 512)
    handle.close()


# -- delta links
def made_chain(folder: Path, tool: list[str]) -> tuple[Path, Path]:
    base, top = folder / "base.vmdk", folder / "top.vmdk"
    run([*OURS, "create", "-q", "-f", "vmdk", base, "4M"])
    run([*OURS, "io", "-c", "write -q -P 1 0 4M", base])
    run([*tool, "create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", top])
    return base, top


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_a_chain_of_either_is_read_by_both(who: str, peer: Peer, tmp_path: Path) -> None:
    _, top = made_chain(tmp_path, OURS if who == "ours" else [peer("qemu-img")])
    run([*OURS, "io", "-c", "write -q -P 2 1M 1000", top])
    run([peer("qemu-io"), "-c", "write -q -P 3 3M 5000", top])
    for tool in ([*OURS, "io"], [peer("qemu-io")]):
        said = run([*tool, "-r", "-c", "read -P 1 0 1M", "-c", "read -P 2 1M 1000",
                    "-c", "read -P 1 1049600 1k", "-c", "read -P 3 3M 5000", top])  # fmt: skip
        assert "failed" not in said, said


def test_a_parent_that_changed_is_found_at_once(peer: Peer, tmp_path: Path) -> None:
    base, top = made_chain(tmp_path, OURS)
    run([peer("qemu-io"), "-c", "write -q 0 512", base])
    # QEMU opens it, and fails at the first read of the parent.
    run([peer("qemu-img"), "info", top])
    said = run([*OURS, "io", "-r", "-c", "read 1M 512", top], status=1)
    assert "base.vmdk" in said or "top.vmdk" in said


# -- what QEMU gets wrong
def described(path: Path, lines: str, kind: str = "monolithicFlat", cid: str = "") -> Path:
    cid = cid or "CID=12345678\nparentCID=ffffffff\n"
    path.write_text(f'# Disk DescriptorFile\nversion=1\n{cid}createType="{kind}"\n{lines}')
    return path


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    (tmp_path / "one").write_bytes(b"\1" * MIB)
    (tmp_path / "two").write_bytes(b"\2" * MIB)
    return tmp_path


@pytest.mark.parametrize(
    "middle", ["RW 2048 ZERO", 'RDONLY 2048 FLAT "two" 0', "RW  2048  ZERO ", "rw 2048 zero"]
)
def test_no_extent_is_dropped(middle: str, parts: Path, peer: Peer) -> None:
    image = described(parts / "x.vmdk", f'RW 2048 FLAT "one" 0\n{middle}\nRW 2048 FLAT "two" 0\n')
    want = 2 if "two" in middle else 0
    said = run([*OURS, "io", "-r", "-c", "read -P 1 0 1M", "-c", f"read -P {want} 1M 1M",
                "-c", "read -P 2 2M 1M", image])  # fmt: skip
    assert "failed" not in said
    assert json.loads(run([*OURS, "info", "--output=json", image]))["virtual-size"] == 3 * MIB
    theirs = run([peer("qemu-img"), "info", "--output=json", image], status=(0, 1))
    assert '"virtual-size": 3145728' not in theirs


def test_an_image_that_may_only_be_read(parts: Path) -> None:
    image = described(parts / "x.vmdk", 'RDONLY 2048 FLAT "one" 0\n')
    assert "failed" not in run([*OURS, "io", "-r", "-c", "read -P 1 0 1M", image])
    said = run([*OURS, "io", "-c", "write 0 512", image], status=(0, 1))
    assert "Permission denied" in said
    assert (parts / "one").read_bytes() == b"\1" * MIB
    run([*OURS, "check", "-q", image])


def test_the_identifier_is_read_whatever_its_place(parts: Path, peer: Peer) -> None:
    cid = "# CID=11111111\nparentCID=ffffffff\nfoo=bar\nCID=1234abcd\n"
    image = described(parts / "x.vmdk", 'RW 2048 FLAT "one" 0\n', cid=cid)
    data = json.loads(run([*OURS, "info", "--output=json", image]))["format-specific"]["data"]
    assert (data["cid"], data["parent-cid"]) == (0x1234ABCD, 0xFFFFFFFF)
    run([*OURS, "io", "-c", "write -q 0 512", image])
    after = image.read_text()
    assert "1234abcd" not in after
    assert re.sub("(?m)^CID=.*$", "", after) == re.sub(
        "(?m)^CID=.*$", "", described(parts / "y.vmdk", 'RW 2048 FLAT "one" 0\n', cid=cid)
        .read_text(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["custom", "vmfsPreallocated", "2GbMaxExtentFlat", "fullDevice"])
def test_create_types_beyond_qemu(kind: str, parts: Path, peer: Peer) -> None:
    image = described(parts / "x.vmdk", 'RW 2048 FLAT "one" 0\nRW 2048 FLAT "two" 0\n', kind)
    run([peer("qemu-img"), "info", image], status=1)
    said = run([*OURS, "io", "-c", "read -P 1 0 1M", "-c", "read -P 2 1M 1M", image])
    assert "failed" not in said


def test_a_short_extent_is_an_error_and_no_zeroes(parts: Path, peer: Peer) -> None:
    image = described(parts / "x.vmdk", 'RW 4096 FLAT "one" 0\n')
    assert "failed" not in run([peer("qemu-io"), "-r", "-c", "read -P 0 1M 1M", image])
    assert "2097152" in run([*OURS, "io", "-r", "-c", "read 0 512", image], status=1)
    assert "ERROR" in run([*OURS, "check", image], status=2)


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_qemu_goes_on_writing_where_we_resized(subformat: str, peer: Peer, tmp_path: Path) -> None:
    image = tmp_path / "x.vmdk"
    run([peer("qemu-img"), "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", image,
         "100M"])  # fmt: skip
    run([peer("qemu-io"), "-c", "write -q -P 1 99M 1M", image])
    for size in ("5G", "9G"):
        run([*OURS, "resize", image, size])
        run([peer("qemu-io"), "-c", f"write -q -P 2 {int(size[0]) * 1024 - 1}M 1M", image])
    run([*OURS, "resize", "--shrink", image, "7G"])
    words = ["-c", "read -P 1 99M 1M", "-c", "read -P 2 5119M 1M", "-c", "read -P 0 100M 8M"]
    for tool in ([*OURS, "io"], [peer("qemu-io")]):
        assert "failed" not in run([*tool, "-r", *words, image])
    run([*OURS, "resize", image, "9G"])
    assert "failed" not in run([peer("qemu-io"), "-r", "-c", "read -P 0 9215M 1M", image])
    run([*OURS, "check", "-q", image], status=(0, 3))
