"""A strict reader of streamOptimized images, written from the format's description."""

from __future__ import annotations

import struct
import zlib

GRAIN = 65536
HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")


def walk(file: bytes) -> tuple[int, dict[int, bytes]]:
    """Read a stream from its start to its end, as its description has it; returns the capacity in
    sectors and the grains.  Asserts everything that the description says."""
    assert len(file) % 512 == 0
    header = HEADER.unpack_from(file)
    (magic, version, flags, capacity, grain, d_offset, d_size, entries, rgd, gd, overhead,
     unclean, newlines, algorithm) = header  # fmt: skip
    assert (magic, version, flags) == (b"KDMV", 3, 0x30001)
    assert (grain, entries, rgd, gd) == (128, 512, 0, (1 << 64) - 1)
    assert (unclean, newlines, algorithm) == (0, b"\n \r\n", 1)
    assert not any(file[79:512])
    assert d_offset == 1 and d_offset + d_size <= overhead and overhead % 128 == 0
    text = file[512 : 512 + d_size * 512]
    assert not any(text[text.index(b"\0") :]) and not any(file[512 * (1 + d_size) : overhead * 512])
    at = overhead
    grains: dict[int, bytes] = {}
    places: dict[int, int] = {}
    tables: dict[int, int] = {}  # number: sector
    directory = None
    last = -1
    while True:
        value, size, kind = struct.unpack_from("<QII", file, at * 512)
        if size:
            assert directory is None
            assert value % grain == 0 and value > last and value < capacity
            end = at * 512 + 12 + size
            grains[value // grain] = zlib.decompress(file[at * 512 + 12 : end])
            assert len(grains[value // grain]) == GRAIN
            places[value // grain] = at
            last = value
            stop = -(-end // 512)
            assert not any(file[end : stop * 512])
            at = stop
            continue
        assert not any(file[at * 512 + 16 : at * 512 + 512])
        if kind == 0:
            raise AssertionError("the stream ends without a footer")
        data = at + 1
        at = data + value
        assert at * 512 <= len(file)
        if kind == 1:
            assert value == 4 and directory is None
            table = struct.unpack_from("<512I", file, data * 512)
            number = last // grain // entries
            assert number not in tables
            tables[number] = data
            for index, sector in enumerate(table):
                assert sector == places.pop(number * entries + index, 0)
            assert not places
        elif kind == 2:
            assert directory is None and not places
            directory = data
            count = -(-capacity // (grain * entries))
            assert value == max(-(-count * 4 // 512), 1)
            found = struct.unpack_from(f"<{value * 128}I", file, data * 512)
            assert found == tuple(tables.get(i, 0) for i in range(value * 128))
        else:
            assert kind == 3 and value == 1
            footer = HEADER.unpack_from(file, data * 512)
            assert footer == (*header[:9], directory, *header[10:])
            assert not any(file[data * 512 + 79 : at * 512])
            assert not any(file[at * 512 :]) and len(file) == (at + 1) * 512
            return capacity, grains
