"""The disk that the demo works on: a GUID partition table and mixed content."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from uuid import UUID

MIB = 1 << 20
SECTOR = 512
LINUX_DATA = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
EFI_SYSTEM = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
WORDS = b"kernel: eth0 link up sda1 mounted cron session opened accepted publickey for root".split()


def gpt_header(here: int, there: int, last: int, entries_at: int, entries: bytes) -> bytes:
    """A GPT header (UEFI specification, 5.3.2), padded to its sector."""

    def packed(crc: int) -> bytes:
        return b"".join(
            (
                b"EFI PART",
                (0x00010000).to_bytes(4, "little"),
                (92).to_bytes(4, "little"),
                crc.to_bytes(4, "little"),
                bytes(4),
                here.to_bytes(8, "little"),
                there.to_bytes(8, "little"),
                (34).to_bytes(8, "little"),
                last.to_bytes(8, "little"),
                UUID("6f0c3a52-95d6-4d5c-8d2e-0d5c1a7e0001").bytes_le,
                entries_at.to_bytes(8, "little"),
                (128).to_bytes(4, "little"),
                (128).to_bytes(4, "little"),
                zlib.crc32(entries).to_bytes(4, "little"),
            )
        )

    return packed(zlib.crc32(packed(0))).ljust(SECTOR, b"\0")


def partition_table(disk: bytearray, partitions: Sequence[tuple[UUID, int, int, str]]) -> None:
    """Write a protective MBR and both copies of the GPT for (type, first, last, name)."""
    sectors = len(disk) // SECTOR
    entry = bytes((0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF)) + (1).to_bytes(4, "little")
    disk[446:462] = entry + (sectors - 1).to_bytes(4, "little")
    disk[510:512] = b"\x55\xaa"
    entries = b""
    for number, (kind, first, last, name) in enumerate(partitions, 1):
        unique = UUID(int=0x6F0C3A5295D64D5C8D2E0D5C1A7E1000 + number)
        entries += kind.bytes_le + unique.bytes_le + first.to_bytes(8, "little")
        entries += last.to_bytes(8, "little") + bytes(8)
        entries += name.encode("utf-16-le").ljust(72, b"\0")
    entries = entries.ljust(128 * 128, b"\0")
    end = sectors - 34
    disk[SECTOR : 2 * SECTOR] = gpt_header(1, sectors - 1, end, 2, entries)
    disk[2 * SECTOR : 34 * SECTOR] = entries
    disk[-33 * SECTOR : -SECTOR] = entries
    disk[-SECTOR:] = gpt_header(sectors - 1, 1, end, sectors - 33, entries)


def make_disk(size: int, seed: int) -> bytearray:
    """Text that compresses, bytes that do not, short patterns, and long empty stretches."""
    rng = random.Random(seed)
    disk = bytearray(size)
    end = size // SECTOR - 34
    partition_table(
        disk,
        [
            (EFI_SYSTEM, 2048, 2048 + 32767, "EFI System"),
            (LINUX_DATA, 2048 + 32768, end - end // 4, "root"),
            (LINUX_DATA, end - end // 4 + 1, end, "data"),
        ],
    )
    text = b"\n".join(b"%08d " % n + b" ".join(rng.choices(WORDS, k=6)) for n in range(40_000))
    at = 2 * MIB
    while at < size - 8 * MIB:
        kind = rng.randrange(5)
        length = rng.randrange(64 << 10, 3 * MIB)
        if kind == 0:
            disk[at : at + length] = rng.randbytes(length)
        elif kind == 1:
            part = text[: min(length, len(text))]
            disk[at : at + len(part)] = part
        elif kind == 2:
            disk[at : at + 4096] = bytes([rng.randrange(1, 256)]) * 4096
        elif kind == 3:
            part = rng.randbytes(97) * (length // 97)
            disk[at : at + len(part)] = part
        at += length + rng.choice((0, 512, 65536, 5 * MIB))
    return disk
