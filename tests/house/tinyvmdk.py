"""Small VMDK extents written from the specification ("Virtual Disk Format 5.0"), with every knob of
their headers, and a reader of them that shares nothing with the product."""

from __future__ import annotations

import struct

SECTOR = 512
TEXT = """# Disk DescriptorFile
version=1
CID={cid}
parentCID={parent}
createType="monolithicSparse"
{hint}
# Extent description
RW {sectors} SPARSE "disk.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "ide"
"""
# Byte offsets of header fields.
CAPACITY, GRAIN, ENTRIES, RGD, GD, UNCLEAN = 12, 20, 44, 48, 56, 72


def hosted(
    size: int,
    grain: int = 8,
    entries: int = 16,
    *,
    zeroed: bool = False,
    copy: bool = True,
    tables: bool = True,
    parent: str | None = None,
    version: int = 0,
) -> bytes:
    """A ``KDMV`` extent of ``size`` bytes with an embedded descriptor.  ``tables`` False: the
    directories name no table yet; ``copy`` False: there is no redundant directory."""
    sectors = size // SECTOR
    count = -(-sectors // (grain * entries))
    directory = -(-count * 4 // SECTOR)
    table = -(-entries * 4 // SECTOR)
    at = 21
    rgd = at if copy else 0
    if copy:
        at += directory + count * table
    gd = at
    at += directory + count * table
    overhead = -(-at // grain) * grain
    out = bytearray(overhead * SECTOR)
    flags = 1 | (2 if copy else 0) | (4 if zeroed else 0)
    struct.pack_into(
        "<4sIIQQQQIQQQB4sH", out, 0, b"KDMV", version or 1 + zeroed, flags, sectors, grain, 1, 20,
        entries, rgd, gd, overhead, 0, b"\n \r\n", 0,
    )  # fmt: skip
    text = TEXT.format(
        cid="12345678",
        parent="ffffffff" if parent is None else "87654321",
        hint="" if parent is None else f'parentFileNameHint="{parent}"',
        sectors=sectors,
    ).encode()
    out[SECTOR : SECTOR + len(text)] = text
    for place in (rgd, gd):
        if place and tables:
            first = place + directory
            values = range(first, first + count * table, table)
            struct.pack_into(f"<{count}I", out, place * SECTOR, *values)
    return bytes(out)


def cowd(size: int, grain: int = 1) -> bytes:
    """A ``COWD`` extent of ``size`` bytes."""
    sectors = size // SECTOR
    count = -(-sectors // (grain * 4096))
    free = 4 + -(-count * 4 // SECTOR)
    out = bytearray(free * SECTOR)
    struct.pack_into("<4s7I", out, 0, b"COWD", 1, 3, sectors, grain, 4, count, free)
    return bytes(out)


class Reading:
    """An extent as the specification has it read; ``copy``: through the redundant directory."""

    def __init__(self, file: bytes | bytearray, copy: bool = False) -> None:
        self.file = file
        if file[:4] == b"KDMV":
            values = struct.unpack_from("<4sIIQQQQIQQQB", file)
            self.flags, self.sectors, self.grain = values[2:5]
            self.entries = values[7]
            self.directory = values[8] if copy else values[9]
            self.unclean = values[11]
            self.tables = -(-self.sectors // (self.grain * self.entries))
        else:
            _, _, _, self.sectors, self.grain, self.directory, self.tables, self.free = (
                struct.unpack_from("<4s7I", file)
            )
            self.entries, self.flags = 4096, 0

    def table_place(self, index: int) -> int:
        """The sector of a grain table."""
        place: int = struct.unpack_from("<I", self.file, self.directory * SECTOR + 4 * index)[0]
        return place

    def entry_place(self, grain: int) -> int:
        """Where in the file the entry of a grain is."""
        return self.table_place(grain // self.entries) * SECTOR + 4 * (grain % self.entries)

    def entry(self, grain: int) -> int:
        """The entry of a grain, 0 where there is no table."""
        if not self.table_place(grain // self.entries):
            return 0
        value: int = struct.unpack_from("<I", self.file, self.entry_place(grain))[0]
        return value

    def content(self, base: bytes = b"") -> bytes:
        """The whole disk."""
        unit = self.grain * SECTOR
        out = bytearray()
        for grain in range(-(-self.sectors // self.grain)):
            entry = self.entry(grain)
            if entry == 0:
                part = base[grain * unit : (grain + 1) * unit]
            elif entry == 1 and self.flags & 4:
                part = b""
            else:
                part = bytes(self.file[entry * SECTOR : entry * SECTOR + unit])
                assert len(part) == unit or grain == (self.sectors - 1) // self.grain
            out += part.ljust(unit, b"\0")
        return bytes(out[: self.sectors * SECTOR])
