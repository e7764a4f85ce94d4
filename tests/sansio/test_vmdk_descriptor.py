"""The text of VMDK images: what is read, what is refused, what a change leaves alone."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from diskwright.contract import MetaWrite
from diskwright.errors import ImageError, MalformedImage, UnsupportedFeature, UsageError
from diskwright.formats.vmdk import descriptor as d
from diskwright.formats.vmdk.cid import Place
from diskwright.formats.vmdk.descriptor import Descriptor, ExtentLine, is_descriptor, parse
from sansio.machine import put

PLAYER = b"""# Disk DescriptorFile
version=1
encoding="windows-1252"
CID=6ea734ed
parentCID=1155cbc5
isNativeSnapshot="no"
createType="twoGbMaxExtentSparse"
parentFileNameHint="C:\\VMs\\base.vmdk"
# Extent description
RW 4192256 SPARSE "Pl\xe4tte-s001.vmdk"
RDONLY 63 ZERO
RW 4192256 FLAT "\\\\.\\PhysicalDrive1" 63 partitionUUID \\\\?\\Volume{1}

# Change Tracking File
changeTrackPath="disk-ctk.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "522"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.longContentID = "ef8faaaac0db02a498a56e016ea734ed"
ddb.uuid = "60 00 C2 9d 4b 5e 49 b2-dd 9c 9f 2e 48 4b 7c f2"
"""


def test_everything_is_read() -> None:
    text = parse(PLAYER)
    assert (text.cid, text.parent_cid) == (0x6EA734ED, 0x1155CBC5)
    assert text.create_type == "twoGbMaxExtentSparse"
    assert text.parent_hint == "C:\\VMs\\base.vmdk"
    assert text.settings["isnativesnapshot"] == "no"
    assert text.ddb["uuid"].startswith("60 00")
    assert [e[:5] for e in text.extents] == [
        ("RW", 4192256, "SPARSE", "Plätte-s001.vmdk", None),
        ("RDONLY", 63, "ZERO", None, None),
        ("RW", 4192256, "FLAT", "\\\\.\\PhysicalDrive1", 63),
    ]
    assert text.extents[2].device == "partitionUUID \\\\?\\Volume{1}"
    assert text.extents[0].line == 10
    assert text.encode() == PLAYER


def test_a_new_content_changes_two_values_and_no_other_byte() -> None:
    text = parse(PLAYER)
    text.set_cid(0xA1B2C3)
    changed = PLAYER.replace(b"CID=6ea734ed", b"CID=00a1b2c3", 1).replace(
        b"6e016ea734ed", b"6e0100a1b2c3"
    )
    assert text.encode() == changed
    again = parse(changed)
    assert again.cid == 0xA1B2C3
    # A long identifier that has nothing to do with the short one stays.
    other = PLAYER.replace(b"6e016ea734ed", b"6e0100000000")
    text = parse(other)
    text.set_cid(7)
    assert text.encode() == other.replace(b"CID=6ea734ed", b"CID=00000007", 1)


def test_the_order_of_cid_and_parent_cid_does_not_matter() -> None:
    raw = b"version=1\n# CID=12345678\nparentCID=aaaaaaaa\n x = 1\nCID = bbbbbbbb\r\n"
    text = parse(raw)
    assert (text.cid, text.parent_cid) == (0xBBBBBBBB, 0xAAAAAAAA)
    text.set_cid(0xC)
    assert text.encode() == raw.replace(b"bbbbbbbb", b"0000000c")
    text.set_parent(0xD, None)
    assert text.encode() == raw.replace(b"bbbbbbbb", b"0000000c").replace(b"aaaaaaaa", b"0000000d")


def test_a_parent_comes_and_goes() -> None:
    raw = b'version=1\r\nCID=1\r\nparentCID=ffffffff\r\ncreateType="vmfs"\r\nRW 1 VMFS "a"\r\n'
    text = parse(raw)
    text.set_parent(0x12, "b a.vmdk")
    assert text.encode() == raw.replace(b"ffffffff", b"00000012").replace(
        b'"vmfs"\r\n', b'"vmfs"\r\nparentFileNameHint="b a.vmdk"\r\n'
    )
    assert text.extents[0].line == 6 == parse(text.encode()).extents[0].line
    text.set_parent(0x13, "c")
    assert b'parentFileNameHint="c"\r\n' in text.encode()
    text.set_parent(d.NO_CONTENT, None)
    assert text.encode() == raw


def test_extent_lines_are_replaced_where_they_were() -> None:
    text = parse(PLAYER)
    kept = text.extents[:2]
    text.set_extents([*kept, ExtentLine("RW", 5, "SPARSE", "Über.vmdk")])
    lines = text.encode().split(b"\n")
    assert lines[9] == PLAYER.split(b"\n")[9]
    assert lines[10] == b"RDONLY 63 ZERO"
    assert lines[11] == b'RW 5 SPARSE "\xdcber.vmdk"'
    assert text.encode().endswith(PLAYER[PLAYER.index(b"\n# Change") :])
    with pytest.raises(ImageError, match="windows-1252"):
        text.set_extents([ExtentLine("RW", 5, "SPARSE", "日本.vmdk")])
    with pytest.raises(UsageError):
        text.set_extents([ExtentLine("RW", 5, "SPARSE", 'a"b.vmdk')])


def test_a_geometry_follows_the_size_only_where_it_did_before() -> None:
    text = parse(PLAYER)
    text.set_geometry(522 * 255 * 63, 1000 * 255 * 63 + 5)
    assert text.ddb["geometry.cylinders"] == "1000"
    text = parse(PLAYER)
    text.set_geometry(1 << 40, 1 << 41)
    assert text.encode() == PLAYER


@pytest.mark.parametrize(
    "encoding, raw, name",
    [
        ("UTF-8", "日本.vmdk".encode(), "日本.vmdk"),
        ("GBK", "磁盘.vmdk".encode("gbk"), "磁盘.vmdk"),
        ("Shift_JIS", "表示.vmdk".encode("shift_jis"), "表示.vmdk"),  # second byte: a backslash
        ("Big5", "功能.vmdk".encode("big5"), "功能.vmdk"),
        ("windows-1251", "диск.vmdk".encode("cp1251"), "диск.vmdk"),
        ("UTF-8", b"\xff\xfe.vmdk", "\udcff\udcfe.vmdk"),
    ],
)
def test_encodings(encoding: str, raw: bytes, name: str) -> None:
    head = b'version=1\nencoding="' + encoding.encode() + b'"\nCID=1\n'
    text = parse(head + b'RW 8 FLAT "' + raw + b'" 0\n')
    assert text.extents[0].name == name
    text.set_extents([text.extents[0]._replace(sectors=9)])
    assert text.encode() == head + b'RW 9 FLAT "' + raw + b'" 0\n'


@pytest.mark.parametrize(
    "line, error, says",
    [
        (b'RW 8 NEWKIND "a"', UnsupportedFeature, "NEWKIND"),
        (b'RO 8 FLAT "a" 0', MalformedImage, "line 2"),
        (b'RW x FLAT "a" 0', MalformedImage, "line 2"),
        (b"RW 8 FLAT", MalformedImage, "line 2"),
        (b'RW 8 FLAT "a 0', MalformedImage, "line 2"),
        (b"RW", MalformedImage, "line 2"),
        (b'RW 99999999999999999999 FLAT "a" 0', MalformedImage, "line 2"),
        (b"CID=xyz", MalformedImage, "line 2"),
        (b"CID=123456789", MalformedImage, "line 2"),
        (b"version=4", UnsupportedFeature, "version"),
        (b'encoding="utf-16"', UnsupportedFeature, "utf-16"),
        (b'encoding="os.system"', UnsupportedFeature, "encoding"),
        (b"CID=1\nCID=2", MalformedImage, "line 3"),
        (b'encoding="ascii"\nRW 1 FLAT "\xff" 0', MalformedImage, "line 3"),
        (b"RW 1 ZERO\n" * 5000, MalformedImage, "4096 extents"),
        (b"\n" * 70000, MalformedImage, "lines"),
    ],
)
def test_what_is_refused(line: bytes, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse(b"# Disk DescriptorFile\n" + line + b"\n")


def test_other_lines_are_kept() -> None:
    raw = (
        b"# Disk DescriptorFile\nversion=1\nThe Disk Data Base\n\xff\xfe junk\nfoo.bar = baz\n"
        b'CID=1\nRW 1 FLAT "a=b" 0'
    )
    text = parse(raw)
    assert text.extents[0].name == "a=b"
    assert text.encode() == raw
    text.set_extents([*text.extents, ExtentLine("RW", 2, "ZERO")])
    assert text.encode() == raw + b"\nRW 2 ZERO\n"


def test_it_ends_at_the_first_nul() -> None:
    assert parse(b"version=1\nCID=5\n\0\0CID=6\n").cid == 5


def test_signatures() -> None:
    assert is_descriptor(b"\n# a comment\r\n  version = 1\n")
    assert is_descriptor(b"# Disk DescriptorFile\nCID=1")
    assert is_descriptor(b"\xef\xbb\xbf# Disk DescriptorFile\n")
    for other in (b"", b"KDMV", b"version=12\n", b"# x\nCID=1\nversion=1", b"\0version=1"):
        assert not is_descriptor(other)


def test_hostile_text_takes_no_time() -> None:
    begin = time.monotonic()
    for raw in (
        b"RW 1 FLAT " + b'"a" ' * 200_000,
        b'RW 1 FLAT "a" 0 ' + b" x" * 500_000,
        b" " * 1_000_000 + b"=",
        b"a" * 1_000_000,
        b"a =" + b" " * 1_000_000 + b"b",
        b"=\n" * 60_000,
    ):
        try:
            parse(raw)
        except ImageError:
            pass
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("seed", range(20))
def test_damaged_text_raises_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        raw = bytearray(PLAYER)
        for _ in range(rng.randrange(1, 8)):
            raw[rng.randrange(len(raw))] = rng.choice(b'\0\n\r" =#09RWZ\xff')
        try:
            text = parse(bytes(raw))
            assert sum(e.sectors for e in text.extents) < 1 << 55
            text.set_cid(5)
            assert parse(text.encode()).cid == 5
        except ImageError:
            pass


# -- a change of the text, torn at any sector
def long_text(extents: int, length: int = 9, hint: str = "") -> bytes:
    lines = [f'RW 4194304 SPARSE "{"x" * length}-s{n:03}.vmdk"' for n in range(1, extents + 1)]
    lines[-1] = lines[-1].replace("4194304", "2048")
    relation = f'parentCID=12345678\nparentFileNameHint="{hint}"' if hint else "parentCID=ffffffff"
    return (
        f"# Disk DescriptorFile\nversion=1\nCID=0badcafe\n{relation}\n"
        'createType="twoGbMaxExtentSparse"\n\n# Extent description\n'
        + "\n".join(lines)
        + '\n\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = "4"\n'
        'ddb.geometry.cylinders = "1000"\nddb.geometry.heads = "16"\n'
    ).encode()


def meaning(text: bytes) -> Any:
    found = parse(text)
    extents = [extent._replace(line=0) for extent in found.extents]
    return extents, found.cid, found.parent_cid, found.parent_hint, found.create_type


def torn(stored: bytes, groups: list[list[MetaWrite]], rng: random.Random) -> Iterator[bytes]:
    """States of a file while these groups are written, any sectors of the running one missing."""
    file = bytearray(stored)
    for group in groups:
        sectors = [
            (write.offset + at, write.data[at:end])
            for write in group
            for at, end in pieces_of(write)
        ]
        for _ in range(6):
            state = bytearray(file)
            for offset, data in rng.sample(sectors, rng.randrange(len(sectors) + 1)):
                put(state, offset, data)
            yield bytes(state)
        for offset, data in sectors:
            put(file, offset, data)
    yield bytes(file)


def pieces_of(write: MetaWrite) -> Iterator[tuple[int, int]]:
    at, size = 0, len(write.data)
    while at < size:
        end = min(size, at + 512 - (write.offset + at) % 512)
        yield at, end
        at = end


def grown(text: Descriptor, more: int) -> None:
    last = text.extents[-1]
    lines = [*text.extents[:-1], last._replace(sectors=4194304)]
    for number in range(len(lines) + 1, len(lines) + 1 + more):
        name = f"{(last.name or '')[:-9]}s{number:03}.vmdk"
        lines.append(last._replace(sectors=4194304, name=name, line=0))
    text.set_extents(lines)
    text.set_geometry(1000 * 16 * 63, 1 << 40)


def shrunk(text: Descriptor, keep: int) -> None:
    kept = text.extents[:keep]
    text.set_extents([*kept[:-1], kept[-1]._replace(sectors=7)])


CHANGES: dict[str, Any] = {
    "grown a little": lambda text, rng: grown(text, 0),
    "grown": lambda text, rng: grown(text, rng.randrange(1, 60)),
    "shrunk": lambda text, rng: shrunk(text, rng.randrange(1, len(text.extents) + 1)),
    "linked": lambda text, rng: text.set_parent(0x1234, "p" * rng.randrange(1, 120)),
    "unlinked": lambda text, rng: text.set_parent(0xFFFFFFFF, None),
    "written": lambda text, rng: text.set_cid(0x10203040),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_torn_descriptor_is_the_old_or_the_new_one(change: str) -> None:
    rng = random.Random(change)
    outside = 0
    for extents in (*range(1, 14), *range(17, 60, 7)):
        link = "linked" in change
        stored = long_text(3 if link else extents, rng.randrange(3, 30), "old.vmdk" if link else "")
        text = parse(stored)
        CHANGES[change](text, rng)
        for room in (None, 20480):
            held = stored if room is None else stored.ljust(room, b"\0")
            groups = Place(0, room, held).change(text)
            states = list(torn(held, groups, rng))
            assert meaning(states[-1]) == meaning(text.encode())
            assert states[-1].rstrip(b"\0") == text.encode()
            if len(groups) == 1 and len(list(pieces_of(groups[0][0]))) > 1:
                outside += 1  # the last extent's line lies over the border of two sectors
                continue
            for state in states:
                assert meaning(state) in (meaning(stored), meaning(text.encode()))
    assert outside <= 8, outside
