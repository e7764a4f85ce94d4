"""Malformed VMDK images: every field of the headers, the tables and the descriptor at its borders.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

from house import tinyvmdk
from house.tinyvmdk import SECTOR, Reading

SIZE = 400 * 1024
_HOSTED = [
    ("magic", 0, 4), ("version", 4, 4), ("flags", 8, 4), ("capacity", 12, 8), ("grainSize", 20, 8),
    ("descriptorOffset", 28, 8), ("descriptorSize", 36, 8), ("numGTEsPerGT", 44, 4),
    ("rgdOffset", 48, 8), ("gdOffset", 56, 8), ("overHead", 64, 8), ("uncleanShutdown", 72, 1),
    ("newlines", 73, 4), ("compressAlgorithm", 77, 2),
]  # fmt: skip
_ESX = [
    ("magic", 0, 4), ("version", 4, 4), ("flags", 8, 4), ("numSectors", 12, 4),
    ("grainSize", 16, 4), ("gdOffset", 20, 4), ("numGDEntries", 24, 4), ("freeSector", 28, 4),
    ("parent", 32, 8), ("parentGeneration", 1056, 4), ("uncleanShutdown", 1648, 4),
]  # fmt: skip

KINDS: dict[str, dict[str, Any]] = {
    "vmdk": {},
    "vmdk, zeroed grains over a parent": {"zeroed": True, "parent": "base.vmdk"},
    "vmdk, three entries in a table": {"grain": 8, "entries": 3},
    "vmdk, one directory": {"copy": False},
    "vmdk, not closed": {"unclean": True},
    "vmdk, COWD": {"cowd": True},
}


def tiny(kind: str) -> bytearray:
    """The image that the mutants of ``kind`` start from, with data in some grains."""
    options = dict(KINDS[kind])
    unclean = options.pop("unclean", False)
    esx = options.pop("cowd", False)
    file = bytearray(tinyvmdk.cowd(SIZE, 8) if esx else tinyvmdk.hosted(SIZE, **options))
    if esx:
        place = len(file) // SECTOR
        struct.pack_into("<I", file, 4 * SECTOR, place)
        file += bytes(4096 * 4)
    for nth, grain in enumerate((0, 1, 2, 5, 40)):
        while len(file) % 4096:
            file += bytes(SECTOR)
        sector = len(file) // SECTOR
        for copy in (False, True) if Reading(file).flags & 2 else (False,):
            struct.pack_into("<I", file, Reading(file, copy).entry_place(grain), sector)
        file += bytes([0x41 + nth]) * 4096
    if esx:
        struct.pack_into("<I", file, 28, len(file) // SECTOR)
    elif unclean:
        file[tinyvmdk.UNCLEAN] = 1
    return file


def _fields(file: bytearray) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of all that is worth a border."""
    out = list(_HOSTED if file[:4] == b"KDMV" else _ESX)
    for copy in (False, True) if Reading(file).flags & 2 else (False,):
        reading = Reading(file, copy)
        which = "copy of " if copy else ""
        for index in (0, reading.tables - 1):
            place = reading.directory * SECTOR + 4 * index
            out.append((f"{which}directory entry {index}", place, 4))
        for grain in (0, 1, 2, 3):
            out.append((f"{which}table entry {grain}", reading.entry_place(grain), 4))
    return out


def _borders(width: int, now: int, sectors: int) -> set[int]:
    top = (1 << 8 * width) - 1
    values = {0, 1, 2, 3, 7, 8, 127, 128, 512, 513, 4096, 21, 22, sectors - 1, sectors, sectors + 1,
              now - 1, now + 1, now << 1, top, top - 1, top >> 1, (top >> 1) + 1, 1 << 17, 1 << 20,
              1 << 31, 1 << 40, 1 << 54, (1 << 54) + 1}  # fmt: skip
    return {value for value in values if 0 <= value <= top and value != now}


def mutants(kind: str, pairs: int) -> Iterator[tuple[str, bytes]]:
    """Every field at its borders, then pairs of fields, cut-off files, noise, and descriptors."""
    whole = tiny(kind)
    yield "untouched", bytes(whole)
    singles = []
    for name, offset, width in _fields(whole):
        now = int.from_bytes(whole[offset : offset + width], "little")
        for value in sorted(_borders(width, now, len(whole) // SECTOR)):
            singles.append((name, offset, width, value))

    def changed(chosen: list[tuple[str, int, int, int]]) -> tuple[str, bytes]:
        data = bytearray(whole)
        for _, offset, width, value in chosen:
            data[offset : offset + width] = value.to_bytes(width, "little")
        return ", ".join(f"{name} = {value:#x}" for name, _, _, value in chosen), bytes(data)

    rng = random.Random(kind)
    rng.shuffle(singles)  # a run that takes some of them takes some of every field
    for single in singles:
        yield changed([single])
    for _ in range(pairs):
        yield changed(rng.sample(singles, rng.choice((2, 3))))
    for length in (0, 1, 4, 79, 511, 512, 513, 1024, 2048, 8192, 10752, 11776, len(whole) - 1):
        yield f"cut to {length}", bytes(whole[:length])
    for _ in range(pairs // 4):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(min(len(data), 24 * SECTOR))] = rng.randrange(256)
        yield "noise", bytes(data)
    if whole[:4] == b"KDMV":
        yield from _descriptors(whole, rng, pairs)


def _descriptors(whole: bytearray, rng: random.Random, pairs: int) -> Iterator[tuple[str, bytes]]:
    text = bytes(whole[SECTOR : 21 * SECTOR]).rstrip(b"\0")
    lines = text.split(b"\n")
    numbers = [b"0", b"-1", b"1", b"4294967296", b"18446744073709551616", b"9" * 40, b"x", b""]
    texts = []
    for number in numbers:
        for line in (b"RW %s SPARSE \"disk.vmdk\"", b"CID=%s", b"parentCID=%s", b"version=%s"):
            name = line.split(b"=")[0].split(b" ")[0]
            kept = [old for old in lines if not old.startswith(name)]
            texts.append(b"\n".join([*kept, line % number]))
    texts += [
        b"",
        b"#",
        b"\n" * 5000,
        b"#" * 10240,
        text * 9,
        text.replace(b"\n", b"\r\n"),
        text.replace(b"\n", b"\r"),
        text.replace(b"SPARSE", b"FLAT"),
        text.replace(b"SPARSE", b"ZERO"),
        text.replace(b"SPARSE", b"SESPARSE"),
        text.replace(b'"', b""),
        text + b'\nparentFileNameHint="' + b"a" * 6000 + b'"',
        text + b"\nencoding=\"no-such-code\"\n",
        text + b"\xff\xfe\0\0",
        text + b"\nRW 8 SPARSE \"/etc/passwd\"\n",
    ]
    for _ in range(pairs // 2):
        noisy = bytearray(text)
        for _ in range(rng.randrange(1, 6)):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        texts.append(bytes(noisy))
    for changed in texts:
        data = bytearray(whole)
        data[SECTOR : 21 * SECTOR] = changed[: 20 * SECTOR].ljust(20 * SECTOR, b"\0")
        yield f"descriptor {changed[:60]!r}", bytes(data)
        yield f"descriptor alone {changed[:60]!r}", changed
