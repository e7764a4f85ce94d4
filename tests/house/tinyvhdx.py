"""A small VHDX image written from the specification, byte by byte, without the product.

It holds one of everything that the specification lets an image point at.
"""

from __future__ import annotations

import struct
import uuid

MIB = 1 << 20
HEADERS = (64 << 10, 128 << 10)
REGIONS = (192 << 10, 256 << 10)
LOG, METADATA, BAT = 1 * MIB, 2 * MIB, 3 * MIB
DATA = 4 * MIB

NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULL, PARTIAL = 0, 1, 2, 3, 6, 7


def guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


BAT_REGION = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
DISK_SIZE = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
DISK_ID = guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL = guid("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
LOCATOR_TYPE = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913")

DATA_GUID = uuid.UUID("11111111-2222-4333-8444-555555555555")
LOG_GUID = uuid.UUID("66666666-7777-4888-9999-aaaaaaaaaaaa")


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


_ZERO_64K: dict[int, list[int]] = {}


def crc32c_padded(data: bytes, length: int) -> int:
    """The same of ``data`` followed by zeroes up to ``length`` (so many zero bytes are a linear
    map of the register, which is looked up by byte)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    for bit in range((length - len(data)).bit_length()):
        if (length - len(data)) >> bit & 1:
            crc = _many_zeroes(crc, bit)
    return crc ^ 0xFFFFFFFF


def _many_zeroes(crc: int, bit: int) -> int:
    """``crc`` after 2**bit zero bytes."""
    columns = _ZERO_64K.get(bit)
    if columns is None:
        columns = []
        for place in range(32):
            value = 1 << place
            if bit == 0:
                value = _TABLE[value & 255] ^ value >> 8
            else:
                value = _many_zeroes(_many_zeroes(value, bit - 1), bit - 1)
            columns.append(value)
        _ZERO_64K[bit] = columns
    out = 0
    for place, column in enumerate(columns):
        if crc >> place & 1:
            out ^= column
    return out


def utf16(text: str) -> bytes:
    return text.encode("utf-16-le")


def locator_item(entries: list[tuple[str, str]]) -> bytes:
    at = 20 + 12 * len(entries)
    table, strings = b"", b""
    for key, value in entries:
        k, v = utf16(key), utf16(value)
        table += struct.pack("<IIHH", at, at + len(k), len(k), len(v))
        strings += k + v
        at += len(k) + len(v)
    return LOCATOR_TYPE + struct.pack("<HH", 0, len(entries)) + table + strings


class TinyVhdx:
    """``blocks`` maps block numbers to (state, content); ``bitmap`` of a differencing image says
    which sectors are present (PARTIAL blocks only), a set of sector numbers.

    ``parent``: entries of the parent locator.  ``log``: sectors {file offset: 4096 bytes, None
    for zeroes} that stand in a log which was not replayed; ``data`` has them not yet.
    """

    def __init__(
        self,
        size: int = 4 * MIB,
        block: int = MIB,
        sector: int = 512,
        *,
        blocks: dict[int, tuple[int, bytes]] | None = None,
        parent: list[tuple[str, str]] | None = None,
        bitmap: set[int] | None = None,
        log: dict[int, bytes | None] | None = None,
        fixed: bool = False,
        data_guid: uuid.UUID = DATA_GUID,
        required: int = 1,
    ) -> None:
        self.size, self.block, self.sector = size, block, sector
        self.ratio = (1 << 23) * sector // block
        count = -(-size // block)
        chunks = -(-count // self.ratio)
        self.entries = chunks * (self.ratio + 1) if parent else count + (count - 1) // self.ratio
        self.bat_mib = -(-self.entries * 8 // MIB)
        self.parent = parent
        # What a guest reads of an image without parent; not made for huge ones.
        self.model = bytearray(size if size <= 1 << 30 else 0)
        if blocks is None:
            blocks = {0: (FULL, b"\x11" * block), 2: (ZERO, b"")}
        end = BAT + self.bat_mib * MIB
        placed: list[tuple[int, bytes]] = []
        bat: dict[int, int] = {}
        self.places: dict[int, int] = {}
        for number, (state, content) in blocks.items():
            index = number + number // self.ratio
            bat[index] = state
            if state in (FULL, PARTIAL):
                bat[index] |= end
                self.places[number] = end
                placed.append((end, content.ljust(block, b"\0")))
                end += block
            if state == FULL and self.model:
                at = number * block
                self.model[at : at + block] = content.ljust(block, b"\0")[: size - at]
        self.bitmaps: dict[int, int] = {}
        for chunk in sorted(
            {n // self.ratio for n, (s, _) in blocks.items() if s == PARTIAL}
            | {s * sector // (block * self.ratio) for s in bitmap or ()}
        ):
            index = (chunk + 1) * (self.ratio + 1) - 1
            bits = bytearray(MIB)
            first = chunk * self.ratio * block // sector
            for s in bitmap or ():
                if 0 <= s - first < 8 * MIB:
                    bits[(s - first) // 8] |= 1 << (s - first) % 8
                    number = s * sector // block
                    state, content = blocks.get(number, (0, b""))
                    if state == PARTIAL and self.model:
                        at = s * sector
                        inside = at - number * block
                        piece = content.ljust(block, b"\0")[inside : inside + sector]
                        self.model[at : at + sector] = piece
            bat[index] = end | FULL
            self.bitmaps[chunk] = end
            placed.append((end, bytes(bits)))
            end += MIB
        self.bat = bat
        self.end = end
        data = bytearray(end)
        data[0:8] = b"vhdxfile"
        data[8:22] = utf16("a test\0")
        log_guid = LOG_GUID.bytes_le if log is not None else bytes(16)
        for number, at in enumerate(HEADERS):
            data[at : at + 80] = struct.pack(
                "<4sIQ16s16s16sHHIQ",
                b"head", 0, 7 + number, b"\x01" * 16, data_guid.bytes_le, log_guid, 0, 1, MIB, LOG
            )  # fmt: skip
        for at in REGIONS:
            data[at : at + 16] = struct.pack("<4sIII", b"regi", 0, 2, 0)
            data[at + 16 : at + 48] = BAT_REGION + struct.pack(
                "<QII", BAT, self.bat_mib * MIB, required
            )
            data[at + 48 : at + 80] = METADATA_REGION + struct.pack("<QII", METADATA, MIB, required)
        self._metadata(data, fixed)
        for index, entry in bat.items():
            data[BAT + 8 * index : BAT + 8 * index + 8] = struct.pack("<Q", entry)
        for at, content in placed:
            data[at : at + len(content)] = content
        if log is not None:
            entry = self.log_entry(log, 5, 0, end)
            data[LOG : LOG + len(entry)] = entry
        self.data = bytes(data)
        for at in (*HEADERS, *REGIONS):
            self.data = self._checked(self.data, at)

    def _metadata(self, data: bytearray, fixed: bool) -> None:
        items = [
            (FILE_PARAMETERS, 4, struct.pack("<II", self.block, fixed | bool(self.parent) << 1)),
            (DISK_SIZE, 6, struct.pack("<Q", self.size)),
            (DISK_ID, 6, b"\x02" * 16),
            (LOGICAL, 6, struct.pack("<I", self.sector)),
            (PHYSICAL, 6, struct.pack("<I", 4096)),
        ]
        if self.parent:
            items.append((PARENT_LOCATOR, 4, locator_item(self.parent)))
        data[METADATA : METADATA + 12] = struct.pack("<8sHH", b"metadata", 0, len(items))
        at = 64 << 10
        self.items: list[tuple[int, int]] = []
        for number, (name, flags, content) in enumerate(items):
            entry = METADATA + 32 + 32 * number
            data[entry : entry + 32] = name + struct.pack("<IIII", at, len(content), flags, 0)
            data[METADATA + at : METADATA + at + len(content)] = content
            self.items.append((METADATA + at, len(content)))
            at += len(content) + 7 & ~7

    @staticmethod
    def log_entry(
        sectors: dict[int, bytes | None], sequence: int, tail: int, length: int,
        log_guid: bytes = LOG_GUID.bytes_le,
    ) -> bytes:  # fmt: skip
        """One entry of a log, as it would lie at the beginning of it."""
        descriptors, contents = b"", b""
        for offset, content in sectors.items():
            if content is None:
                descriptors += struct.pack("<4sIQQQ", b"zero", 0, 4096, offset, sequence)
                continue
            descriptors += struct.pack(
                "<4s4s8sQQ", b"desc", content[-4:], content[:8], offset, sequence
            )
            contents += struct.pack("<4sI", b"data", sequence >> 32)
            contents += content[8:-4] + struct.pack("<I", sequence & 0xFFFFFFFF)
        head = 64 + len(descriptors)
        head += -head % 4096
        whole = struct.pack(
            "<4sIIIQII16sQQ", b"loge", 0, head + len(contents), tail, sequence, len(sectors), 0,
            log_guid, length, length,
        )  # fmt: skip
        whole = (whole + descriptors).ljust(head, b"\0") + contents
        return whole[:4] + struct.pack("<I", crc32c(whole)) + whole[8:]

    def with_field(self, offset: int, width: int, value: int) -> bytes:
        """The image with one field set, and its checksum made good (but for the checksum's own
        field)."""
        data = self.data[:offset] + value.to_bytes(width, "little") + self.data[offset + width :]
        for at in (*HEADERS, *REGIONS):
            if at <= offset < at + (64 << 10):
                return self._checked(data, at)
        if LOG <= offset < LOG + MIB and offset != LOG + 4:
            length = int.from_bytes(data[LOG + 8 : LOG + 12], "little")
            if length <= MIB:
                entry = data[LOG : LOG + 4] + bytes(4) + data[LOG + 8 : LOG + length]
                checksum = struct.pack("<I", crc32c(entry))
                data = data[: LOG + 4] + checksum + data[LOG + 8 :]
        return data

    @staticmethod
    def _checked(data: bytes, at: int) -> bytes:
        area = 4096 if at in HEADERS else 64 << 10
        body = (data[at : at + 4] + bytes(4) + data[at + 8 : at + area]).rstrip(b"\0")
        checksum = struct.pack("<I", crc32c_padded(body, area))
        return data[: at + 4] + checksum + data[at + 8 :]
