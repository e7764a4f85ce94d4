"""`inspect`: what a file is, from its bytes, at once or as a stream."""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import subprocess
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import diskwright
from cli.support import command, environment, ours
from diskwright.errors import OverBudget
from diskwright.graph.probe import SIGNATURES, Signature
from diskwright.ops.inspect import VERDICTS, Inspection
from house.tinyqcow2 import Tiny
from house.tinyvhdx import TinyVhdx
from house.tinyvmdk import hosted

MIB = 1 << 20


def fed(data: bytes, *, step: int = 65536) -> Inspection:
    inspector = diskwright.Inspector()
    for at in range(0, len(data), step):
        inspector.feed(data[at : at + step])
    return inspector.finish()


def both(data: bytes, step: int = 65536) -> Inspection:
    """Inspected by position and as a stream, which must say the same."""
    whole = diskwright.inspect(io.BytesIO(data))
    assert fed(data, step=step) == whole
    return whole


def names(found: Inspection) -> list[str]:
    return [reference.name for reference in found.references]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- formats with a driver
SHAPES: dict[str, tuple[str, dict[str, str]]] = {
    "qcow2": ("qcow2", {}),
    "qcow2 v2": ("qcow2", {"compat": "0.10", "cluster_size": "512"}),
    "qcow2 full": ("qcow2", {"preallocation": "metadata", "extended_l2": "on"}),
    "vhdx": ("vhdx", {}),
    "vmdk": ("vmdk", {}),
    "vmdk stream": ("vmdk", {"subformat": "streamOptimized"}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_whole_image_is_self_contained(shape: str, folder: Path) -> None:
    format, options = SHAPES[shape]
    Path("raw").write_bytes(b"disk" * (MIB // 2))
    diskwright.convert("raw", "image", target_format=format, format="raw", options=options)
    found = both(Path("image").read_bytes(), step=70001)
    assert (found.verdict, found.format, found.virtual_size) == ("self-contained", format, 2 * MIB)
    assert not (found.references or found.violations or found.not_seen)
    assert [match.name for match in found.matches] == [format]


@pytest.mark.parametrize(
    "data",
    [Tiny().data, TinyVhdx().data, hosted(MIB), bytes(5000), b"", b"x",
     random.Random(1).randbytes(99999)],
    ids=["qcow2", "vhdx", "vmdk", "zeroes", "empty", "one byte", "noise"],
)  # fmt: skip
@pytest.mark.parametrize("step", [1 << 14, 997])
def test_pieces_of_any_length_say_the_same(data: bytes, step: int) -> None:
    found = both(data, step)
    assert found.verdict in ("self-contained", "raw"), found
    assert found.length == len(data)


def test_all_names_are_told(folder: Path) -> None:
    diskwright.create("base.qcow2", format="qcow2", size=MIB)
    diskwright.create(
        "top", format="qcow2", options={"backing_file": "base.qcow2", "backing_fmt": "qcow2"}
    )
    (reference,) = both(Path("top").read_bytes()).references
    assert reference == ("backing file", "base.qcow2", "qcow2")
    diskwright.create("data", format="qcow2", size=MIB, options={"data_file": "d.raw"})
    assert names(both(Path("data").read_bytes())) == ["d.raw"]
    diskwright.create("parent.vhdx", format="vhdx", size=MIB)
    diskwright.create(
        "child", format="vhdx", options={"backing_file": "parent.vhdx", "backing_fmt": "vhdx"}
    )
    found = both(Path("child").read_bytes())
    assert (found.verdict, names(found)) == ("refers", ["parent.vhdx"])
    options = {"subformat": "twoGbMaxExtentSparse"}
    diskwright.create("split.vmdk", format="vmdk", size=5 << 30, options=options)
    found = both(Path("split.vmdk").read_bytes())
    assert names(found) == [f"split-s00{i}.vmdk" for i in (1, 2, 3)]
    text = Path("split.vmdk").read_text() + 'changeTrackPath="split-ctk.vmdk"\n'
    assert names(both(text.encode()))[-1] == "split-ctk.vmdk"


def test_an_encrypted_image_is_told_without_its_key(folder: Path) -> None:
    pytest.importorskip("cryptography")
    secrets = {"s": b"x"}
    for format, prefix in (("luks", ""), ("qcow2", "encrypt.")):
        options = {f"{prefix}key-secret": "s", f"{prefix}iter-time": "10"}
        if prefix:
            options["encrypt.format"] = "luks"
        diskwright.create("image", format=format, size=MIB, options=options, secrets=secrets)
        found = both(Path("image").read_bytes())
        assert (found.verdict, found.virtual_size) == ("self-contained", MIB)
        assert found.features["encrypted"] is True


# -- what is wrong
def test_violations_name_the_field_and_its_place() -> None:
    tiny = Tiny()
    found = both(tiny.with_field(20, 4, 40))
    (bad,) = found.violations
    assert (found.verdict, bad.field, bad.offset) == ("damaged", "cluster_bits", 20)
    cut = both(tiny.data[: tiny.cluster])
    assert cut.verdict == "damaged"
    assert any("behind the end of the file" in bad.detail for bad in cut.violations)


def test_a_marked_image_is_damaged_and_an_unknown_feature_is_not_known() -> None:
    tiny = Tiny()
    assert both(tiny.with_field(72, 8, 2)).verdict == "damaged"
    found = both(tiny.with_field(72, 8, 1 << 40))
    assert (found.verdict, found.violations) == ("unknown", ())
    assert "10000000000" in found.not_known[0]


def _iso(data: bytes) -> bytes:
    return data[: 32768 + 1] + b"CD001" + data[32768 + 6 :]


def _mbr(*kinds: int) -> bytes:
    entries = b"".join(struct.pack("<B3xB3xII", 0x80, kind, 1, 99) for kind in kinds)
    return bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa"


def test_what_can_be_read_in_two_ways_is_ambiguous(folder: Path) -> None:
    diskwright.create("image", format="qcow2", size=MIB)
    data = Path("image").read_bytes()
    iso = both(_iso(data))
    assert iso.verdict == "ambiguous"
    assert [match.name for match in iso.matches] == ["qcow2", "iso9660"]
    mbr = both(data[:446] + _mbr(7)[446:] + data[512:])
    assert (mbr.verdict, mbr.matches[1].name) == ("ambiguous", "mbr")
    two = both(data + b"conectix".ljust(512, b"\0"))
    assert (two.verdict, two.format, two.virtual_size) == ("ambiguous", None, None)


# -- what a disk begins with
def test_partition_tables_and_iso_9660_of_raw_disks() -> None:
    found = both(_mbr(0x83, 0x07) + bytes(MIB))
    assert (found.verdict, found.format) == ("raw", "raw")
    assert [(match.name, match.detail) for match in found.matches] == [("mbr", "2 partitions")]
    boot = bytearray(_mbr(0x83) + bytes(MIB))
    boot[446] = 0x33  # a boot sector's code, not the status of a partition
    assert both(bytes(boot)).matches == ()
    size = MIB
    head = bytearray(struct.pack("<8sIIIIQQ", b"EFI PART", 65536, 92, 0, 0, 1, size // 512 - 1))
    head = head.ljust(92, b"\0")
    head[16:20] = struct.pack("<I", zlib.crc32(head))
    for kinds, said in (((0xEE,), "protective"), ((0xEE, 0x83), "hybrid")):
        disk = (_mbr(*kinds) + bytes(head)).ljust(size - 512, b"\0") + head.ljust(512, b"\0")
        told = [(match.name, match.offset, match.detail) for match in both(disk).matches]
        assert told == [("mbr", 0, said), ("gpt", 512, "")]
        (cut,) = (match for match in both(disk[:-4096]).matches if match.name == "gpt")
        assert "behind the end" in cut.detail
    assert both(_iso(bytes(MIB))).matches[0].name == "iso9660"


# -- formats without a driver
FOREIGN = ("qcow", "qed", "vdi", "vpc", "vpc fixed", "parallels")


@pytest.mark.parametrize("shape", FOREIGN)
def test_other_formats_as_qemu_img_makes_them(
    shape: str, folder: Path, peer: Callable[[str], str]
) -> None:
    format, _, kind = shape.partition(" ")
    options = ["-o", f"subformat={kind},force_size=on"] if kind else []
    command = [peer("qemu-img"), "create", "-q", "-f", format, *options, "image", "8M"]
    subprocess.run(command, check=True)
    told = subprocess.run(
        [peer("qemu-img"), "info", "-f", format, "--output=json", "image"],
        check=True, capture_output=True,
    )  # fmt: skip
    found = both(Path("image").read_bytes())
    assert (found.verdict, found.format) == ("self-contained", format), found
    assert found.virtual_size == json.loads(told.stdout)["virtual-size"]
    if format in ("qcow", "qed"):
        subprocess.run([*command[:5], "-b", "image", "-F", format, "over", "8M"], check=True)
        assert both(Path("over").read_bytes()).references == (("backing file", "image", None),)


def test_a_vhd_names_its_parent_and_tells_what_is_wrong(folder: Path) -> None:
    def summed(raw: bytearray, at: int) -> bytes:
        raw[at : at + 4] = bytes(4)
        raw[at : at + 4] = struct.pack(">I", ~sum(raw) & 0xFFFFFFFF)
        return bytes(raw)

    footer = bytearray(512)
    struct.pack_into(">8sIIQ", footer, 0, b"conectix", 2, 0x10000, 512)
    struct.pack_into(">QQ4xI", footer, 40, MIB, MIB, 4)
    header = bytearray(1024)
    struct.pack_into(">8sQQIII", header, 0, b"cxsparse", 2**64 - 1, 1536, 0x10000, 1, 2 << 20)
    header[64 : 64 + 20] = "parent.vhd".encode("utf-16-be")
    path = ".\\parent.vhd".encode("utf-16-le")
    struct.pack_into(">4sIIIQ", header, 576, b"W2ru", 512, len(path), 0, 2048)
    end = summed(footer, 64)
    data = end + summed(header, 36) + b"\xff" * 512 + path.ljust(512, b"\0") + end
    found = both(data)
    assert (found.verdict, names(found)) == ("refers", ["parent.vhd", ".\\parent.vhd"])
    assert both(data[:600] + b"!" + data[601:]).verdict == "damaged"


def test_luks_2_is_told_from_luks_1() -> None:
    area = json.dumps({"keyslots": {"0": {}}, "segments": {"0": {"type": "crypt"}}}).encode()
    head = b"LUKS\xba\xbe\x00\x02" + struct.pack(">Q", 16384)
    found = both((head.ljust(4096, b"\0") + area).ljust(MIB, b"\0"))
    assert (found.verdict, found.features["version"]) == ("self-contained", 2)
    assert both(head.ljust(MIB, b"\0")).verdict == "damaged"


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda s: f"{s.name} {s.offset}")
def test_noise_behind_a_signature_ends_in_a_result(signature: Signature) -> None:
    rng = random.Random(signature.offset)
    for length in (*range(len(signature.magic) + 64, 600, 67), *[1024, 5000, 20000] * 20):
        data = bytearray(rng.randbytes(length))
        for _ in range(rng.randrange(40)):  # small numbers pass more of the bounds
            at = rng.randrange(length)
            data[at : at + 8] = bytes(8)[: length - at]
        start = signature.offset + (length if signature.offset < 0 else 0)
        if start < 0 or start + len(signature.magic) > length:
            continue
        data[start : start + len(signature.magic)] = signature.magic
        found = both(bytes(data), step=300)
        assert found.verdict != "raw"
        json.dumps(found.to_dict())


# -- streams
def test_tables_that_are_still_to_come_are_kept(folder: Path) -> None:
    """The L1 table is moved behind what is kept of the beginning, and far from the end."""
    diskwright.create(
        "image", format="qcow2", size=MIB, options={"backing_file": "", "cluster_size": "65536"}
    )
    data = bytearray(Path("image").read_bytes())
    (old,) = struct.unpack_from(">Q", data, 40)
    table = data[old : old + 65536].ljust(65536, b"\0")
    data += bytes((9 << 20) - len(data)) + table + bytes(5 << 20)
    struct.pack_into(">Q", data, 40, 9 << 20)
    assert both(bytes(data)).verdict == "self-contained"


def test_what_went_by_is_not_seen() -> None:
    """A fixed VHD with a dynamic disk's footer, which the end of the stream alone tells."""
    footer = bytearray(512)
    struct.pack_into(">8sIIQ", footer, 0, b"conectix", 2, 0x10000, 6 << 20)
    struct.pack_into(">QQ4xI", footer, 40, MIB, MIB, 3)
    struct.pack_into(">I", footer, 64, ~sum(footer) & 0xFFFFFFFF)
    found = fed(bytes(12 << 20) + footer)
    assert (found.verdict, found.not_seen) == ("unknown", ((6 << 20, 1024),))


def test_memory_is_bounded_whatever_goes_by() -> None:
    piece = bytes(MIB)
    tracemalloc.start()
    inspector = diskwright.Inspector()
    for _ in range(64):
        inspector.feed(piece)
    found = inspector.finish("upload")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.filename, found.length, found.verdict) == ("upload", 64 * MIB, "raw")
    assert peak < 16 * MIB


# -- the command
def test_the_command_as_a_gate(folder: Path) -> None:
    diskwright.create("image", format="qcow2", size=MIB)
    for words, status in (
        ((), 0),
        (("--require", "self-contained"), 0),
        (("--require", "raw,refers"), 2),
        (("-f", "qcow2"), 0),
        (("-f", "raw"), 2),
        (("--require", "good"), 1),
    ):
        assert ours("inspect", *words, "image", name="diskwright").status == status, words
    assert ours("inspect", "absent", name="diskwright").status == 1
    shown = ours("inspect", "--json", "image", name="diskwright")
    told = json.loads(shown.out)
    assert list(told) == [
        "filename", "length", "format", "virtual-size", "verdict", "matches", "references",
        "features", "violations", "not-known", "not-seen",
    ]  # fmt: skip
    assert told == diskwright.inspect("image").to_dict()
    assert told["verdict"] in VERDICTS


def test_standard_input(folder: Path) -> None:
    diskwright.create("image", format="qcow2", size=MIB)
    done = subprocess.run(
        [*command("diskwright"), "inspect", "--json", "-"],
        input=Path("image").read_bytes(), capture_output=True, env=environment(), check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["verdict"] == "self-contained"


def test_names_cannot_write_to_the_terminal(folder: Path) -> None:
    diskwright.create("image", format="qcow2", size=MIB)
    diskwright.rebase(
        "image", "a\x1b[2J\nverdict: raw", backing_format="raw", unsafe=True, policy="trusted"
    )
    shown = ours("inspect", "image", name="diskwright").out
    assert b"\x1b" not in shown and shown.count(b"\nverdict:") == 1


def test_asyncio(folder: Path) -> None:
    import asyncio

    from diskwright import aio

    diskwright.create("image", format="qcow2", size=MIB)
    assert asyncio.run(aio.inspect("image")).verdict == "self-contained"


# -- budgets
@contextlib.contextmanager
def stopped(what: str) -> Iterator[None]:
    with pytest.raises(OverBudget) as caught:
        yield
    assert caught.value.what == what


def test_budgets_of_an_inspection(folder: Path) -> None:
    diskwright.create("image", format="qcow2", size=MIB)
    with stopped("metadata"), diskwright.limited(diskwright.Budget(metadata=1000)):
        diskwright.inspect("image")
    with stopped("metadata"):
        inspector = diskwright.Inspector(diskwright.Budget(metadata=1000))
        inspector.feed(Path("image").read_bytes())
        inspector.finish()
    assert diskwright.inspect("image").verdict == "self-contained"
