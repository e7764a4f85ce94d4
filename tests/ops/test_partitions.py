"""Partition tables, as sfdisk writes them and as nobody should."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from functools import cache

import pytest

from diskwright.ops.partitions import MOST_LOGICAL, Partition, partitions

SIZE = 4 << 20
GPT = 'label: gpt\nstart=2048,size=512,name="boot ü"\nstart=4000,size=100,type=swap\n'
MBR = "label: dos\n64,512,c\n2048,4096,E\n7000,100,L\n2100,100,83\n5000,200,82\n"


def found(data: bytes) -> list[Partition]:
    def read(offset: int, length: int) -> bytes:
        assert offset >= 0 and offset + length <= len(data)
        return data[offset : offset + length]

    return partitions(read, len(data))


@pytest.fixture(scope="module")
def table(
    peer: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], bytearray]:
    """What sfdisk makes of a script; it agrees with us on what is there."""
    sfdisk, path = peer("sfdisk"), tmp_path_factory.mktemp("tables") / "disk"

    @cache
    def make(script: str) -> bytes:
        path.write_bytes(bytes(SIZE))
        subprocess.run([sfdisk, "-q", path], input=script.encode(), check=True)
        data = path.read_bytes()
        listed = json.loads(subprocess.check_output([sfdisk, "-J", path]))["partitiontable"]
        expected = {one["node"]: one for one in listed["partitions"] if one["type"] != "5"}
        assert [f"{path}{part.number}" for part in found(data)] == list(expected)
        for part, one in zip(found(data), expected.values(), strict=True):
            assert (part.start, part.size) == (one["start"] * 512, one["size"] * 512)
            assert part.type.lstrip("0") == one["type"].lower().lstrip("0")
            assert part.name == one.get("name", "")
        return data

    return lambda script: bytearray(make(script))


def test_as_sfdisk_says(table: Callable[[str], bytearray]) -> None:
    data = table(GPT)
    parts = found(data)
    assert parts[0].name == "boot ü"
    data[512:1024] = bytes(512)  # the backup tells the same
    assert found(data) == parts
    data[-512:] = bytes(512)  # and there is only the protective MBR
    assert found(data) == []
    assert len(found(table(MBR))) == 4


def test_what_does_not_lie_in_the_disk_is_left_out(table: Callable[[str], bytearray]) -> None:
    data = table(MBR)
    assert [part.number for part in found(data[: 2300 * 512])] == [1, 5]
    assert found(data[:700]) == found(b"") == []


def test_a_ring_of_logical_partitions_ends(table: Callable[[str], bytearray]) -> None:
    data = table(MBR)
    ring = 2048 * 512
    data[ring + 462 : ring + 478] = bytes(4) + b"\x05" + bytes(11)  # the next one: itself
    assert [part.number for part in found(data)] == [1, 3, 5]
    for number in range(300):  # one behind the other
        at = ring + 512 * number
        data[at : at + 512] = bytes(512)
        data[at + 446 : at + 462] = bytes([0, 0, 0, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0])
        following = (number + 1).to_bytes(4, "little")
        data[at + 462 : at + 478] = bytes([0, 0, 0, 0, 5, 0, 0, 0]) + following + bytes(4)
        data[at + 510 : at + 512] = b"\x55\xaa"
    assert len(found(data)) == 2 + MOST_LOGICAL


@pytest.mark.parametrize("script", [GPT, MBR])
def test_no_bytes_make_it_fail(table: Callable[[str], bytearray], script: str) -> None:
    whole = table(script)
    rng = random.Random(script)
    places = [*range(446, 604), *range(1024, 1088)]
    for _ in range(300):
        data = whole.copy()
        for _ in range(rng.randrange(1, 5)):
            data[rng.choice(places)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        for part in found(data):
            assert 0 < part.start < part.start + part.size <= len(data)
