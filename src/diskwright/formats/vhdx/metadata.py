"""The metadata region: its table and the items of the system (MS-VHDX 2.6)."""

from __future__ import annotations

from ...errors import MalformedImage, UnsupportedFeature
from ...ondisk import Fields
from ...records import NamedTuple
from ...units import is_power_of_two
from .structures import KIB, MIB, guid, guid_text

TABLE_BYTES = 64 * KIB
MOST_ITEM = 1 << 20
_MOST_ITEMS = 2047
MAX_SIZE = 64 << 40
MIN_BLOCK, MAX_BLOCK = 1 << 20, 256 << 20
SECTOR_SIZES = (512, 4096)

FILE_PARAMETERS = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
DISK_SIZE = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
DISK_ID = guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR = guid("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")

_NAMES = {
    FILE_PARAMETERS: "file parameters",
    DISK_SIZE: "virtual disk size",
    DISK_ID: "page 83 data",
    LOGICAL_SECTOR: "logical sector size",
    PHYSICAL_SECTOR: "physical sector size",
    PARENT_LOCATOR: "parent locator",
}
IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4
FLAGS = {
    FILE_PARAMETERS: IS_REQUIRED,
    DISK_SIZE: IS_VIRTUAL_DISK | IS_REQUIRED,
    DISK_ID: IS_VIRTUAL_DISK | IS_REQUIRED,
    LOGICAL_SECTOR: IS_VIRTUAL_DISK | IS_REQUIRED,
    PHYSICAL_SECTOR: IS_VIRTUAL_DISK | IS_REQUIRED,
    PARENT_LOCATOR: IS_REQUIRED,
}
"""The flags that the specification gives each item (2.6.2)."""

LEAVE_ALLOCATED, HAS_PARENT = 1, 2

TABLE = Fields("<", "Signature:8s Reserved:H EntryCount:H Reserved2:20s")
ENTRY = Fields("<", "ItemId:16s Offset:I Length:I Flags:I Reserved2:I")
FILE_ITEM = Fields("<", "BlockSize:I Flags:I")
SIZE_ITEM = Fields("<", "VirtualDiskSize:Q")
SECTOR_ITEM = Fields("<", "SectorSize:I")
"""The file parameters."""


class Item(NamedTuple):
    """An entry of the metadata table; ``offset`` counts from the start of the region (0: empty)."""

    kind: bytes
    offset: int
    length: int
    flags: int

    @property
    def name(self) -> str:
        """What it is called."""
        return _NAMES.get(self.kind, guid_text(self.kind))


def parse_table(data: bytes, region_length: int, place: int) -> list[Item]:
    """The items of the table in ``data`` (64 KiB), read from ``place``.

    Raises MalformedImage when it breaks 2.6.1; UnsupportedFeature, with its name, for an item
    that is required and unknown.
    """
    signature, _, count, _ = TABLE.unpack_from(data)
    if signature != b"metadata":
        raise MalformedImage("no metadata table", field="Signature", offset=place)
    if count > _MOST_ITEMS:
        raise MalformedImage(f"{count} metadata items", field="EntryCount", offset=place + 10)
    items: list[Item] = []
    seen: set[tuple[bytes, int]] = set()
    for number in range(count):
        at = TABLE.size + number * ENTRY.size
        kind, offset, length, flags, _ = ENTRY.unpack_from(data, at)
        item = Item(kind, offset, length, flags & 7)
        empty = not offset and not length
        if not empty and (
            length > MOST_ITEM
            or not length
            or offset < TABLE_BYTES
            or offset + length > region_length
        ):
            raise MalformedImage(
                f"metadata item '{item.name}' at {offset:#x}, {length:#x} bytes",
                field=f"metadata item {number}",
                offset=place + at,
            )
        if flags & IS_REQUIRED and (flags & IS_USER or kind not in _NAMES):
            raise UnsupportedFeature(f"required metadata item {item.name}", offset=place + at)
        # System and user items have name spaces of their own.
        if (kind, flags & IS_USER) in seen:
            raise MalformedImage(
                f"metadata item '{item.name}' is there twice",
                field=f"metadata item {number}",
                offset=place + at,
            )
        seen.add((kind, flags & IS_USER))
        items.append(item)
    return items


def encode_table(items: list[Item]) -> bytes:
    """The 64 KiB of a metadata table."""
    data = TABLE.pack(b"metadata", 0, len(items), b"")
    for item in items:
        data += ENTRY.pack(item.kind, item.offset, item.length, item.flags, 0)
    return data.ljust(TABLE_BYTES, b"\0")


class Parameters(NamedTuple):
    """What the system's items say."""

    block_size: int
    leave_allocated: bool
    has_parent: bool
    size: int
    sector_size: int
    physical_sector_size: int
    disk_id: bytes

    def encode(self) -> list[tuple[bytes, bytes]]:
        """(kind, bytes) of every item but the parent locator."""
        flags = LEAVE_ALLOCATED * self.leave_allocated | HAS_PARENT * self.has_parent
        return [
            (FILE_PARAMETERS, FILE_ITEM.pack(self.block_size, flags)),
            (DISK_SIZE, SIZE_ITEM.pack(self.size)),
            (DISK_ID, self.disk_id),
            (LOGICAL_SECTOR, SECTOR_ITEM.pack(self.sector_size)),
            (PHYSICAL_SECTOR, SECTOR_ITEM.pack(self.physical_sector_size)),
        ]


def find(items: list[Item], kind: bytes) -> Item | None:
    """The system's item of a kind; None when it is not there or empty."""
    for item in items:
        if item.kind == kind and not item.flags & IS_USER and item.length:
            return item
    return None


_LENGTHS = {
    FILE_PARAMETERS: 8,
    DISK_SIZE: 8,
    DISK_ID: 16,
    LOGICAL_SECTOR: 4,
    PHYSICAL_SECTOR: 4,
}


def needed(items: list[Item]) -> list[Item]:
    """The items that every image has, in the order in which `parse_items` wants their bytes.

    Raises MalformedImage for one that is missing or too short.
    """
    out = []
    for kind, length in _LENGTHS.items():
        item = find(items, kind)
        if item is None:
            raise MalformedImage(
                f"metadata item '{_NAMES[kind]}' is missing", field="metadata table"
            )
        if item.length < length:
            raise MalformedImage(
                f"metadata item '{item.name}' has {item.length} bytes", field="metadata table"
            )
        out.append(item._replace(length=length))
    return out


def parse_items(parts: list[bytes]) -> Parameters:
    """The values of the items of `needed`.  Raises MalformedImage for one out of its bounds."""
    block_size, flags = FILE_ITEM.unpack(parts[0])
    (size,) = SIZE_ITEM.unpack(parts[1])
    (sector,) = SECTOR_ITEM.unpack(parts[3])
    (physical,) = SECTOR_ITEM.unpack(parts[4])
    if not is_power_of_two(block_size) or not MIN_BLOCK <= block_size <= MAX_BLOCK:
        raise MalformedImage(f"block size {block_size:#x}", field="BlockSize")
    if sector not in SECTOR_SIZES:
        raise MalformedImage(f"logical sectors of {sector} bytes", field="LogicalSectorSize")
    if physical not in SECTOR_SIZES:
        raise MalformedImage(f"physical sectors of {physical} bytes", field="PhysicalSectorSize")
    if size > MAX_SIZE:
        raise MalformedImage(f"disk of {size:#x} bytes", field="VirtualDiskSize")
    if size % sector:
        raise MalformedImage(
            f"disk of {size:#x} bytes is no multiple of its sectors", field="VirtualDiskSize"
        )
    return Parameters(
        block_size,
        flags & (LEAVE_ALLOCATED | HAS_PARENT) == LEAVE_ALLOCATED,  # not if there is a parent
        bool(flags & HAS_PARENT),
        size,
        sector,
        physical,
        parts[2],
    )


def region_bytes(parameters: Parameters, locator: bytes | None) -> bytes:
    """A whole metadata region of 1 MiB or, with a large locator, 2 MiB."""
    contents = parameters.encode()
    if locator is not None:
        contents.append((PARENT_LOCATOR, locator))
    at = TABLE_BYTES
    items, body = [], b""
    for kind, data in contents:
        items.append(Item(kind, at, len(data), FLAGS[kind]))
        room = -(-len(data) // 8) * 8
        body += data.ljust(room, b"\0")
        at += room
    whole = encode_table(items) + body
    return whole.ljust(-(-len(whole) // MIB) * MIB, b"\0")
