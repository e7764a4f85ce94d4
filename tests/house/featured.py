"""Mutants of images that qemu-img made with bitmaps, extended L2 entries, a data file or
encryption: every field of what such a feature keeps, at its borders."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

from diskwright.formats.luks1 import MOST_ROUNDS
from sansio.feature_damages import CLUSTER, SECRET, File, base

KINDS = {f"with {kind}": kind for kind in ("bitmaps", "extended", "data-file", "luks")}
KEY = SECRET.rpartition("=")[2].encode()
CRYPTO, BITMAPS, DATA_FILE = 0x0537BE77, 0x23852875, 0x44415441
Field = tuple[str, int, int]


def _fields(kind: str, file: File) -> Iterator[Field]:
    yield from (("incompatible", 72, 8), ("autoclear", 88, 8), ("crypt method", 32, 4))
    if kind == "bitmaps":
        at, entry = file.extension(BITMAPS), file.directory
        yield from (("extension length", at - 4, 4), ("number", at, 4), ("reserved", at + 4, 4))
        yield from (("directory size", at + 8, 8), ("directory", at + 16, 8))
        widths = (("table", 8), ("table size", 4), ("flags", 4), ("type", 1), ("granularity", 1),
                  ("name size", 2), ("extra size", 4))  # fmt: skip
        for name, width in widths:
            yield name, entry, width
            entry += width
        yield from ((f"table entry {n}", file.bitmap_table + 8 * n, 8) for n in range(2))
    elif kind == "luks":
        at = file.extension(CRYPTO)
        yield from (("header length", at - 4, 4), ("header", at, 8), ("header size", at + 8, 8))
        luks = file.luks
        yield from (("version", luks + 6, 2), ("payload", luks + 104, 4), ("key", luks + 108, 4))
        yield from (("iterations", luks + 164, 4), ("state", luks + 208, 4))
        yield from (("slot's iterations", luks + 212, 4), ("material", luks + 248, 4))
        yield from (("stripes", luks + 252, 4), ("cipher", luks + 8, 4), ("mode", luks + 40, 4))
    elif kind == "data-file":
        at = file.extension(DATA_FILE)
        yield from (("extension length", at - 4, 4), ("name", at, 4))
    for guest in (0, 2):
        entry = file.entry(guest)
        yield f"L2 entry {guest}", entry, 8
        if kind == "extended":
            yield f"bitmap {guest}", entry + 8, 8
            yield f"half a bitmap {guest}", entry + 8, 4


def _borders(width: int, now: int, end: int) -> list[int]:
    top = (1 << 8 * width) - 1
    found = {
        0,
        1,
        2,
        7,
        8,
        9,
        63,
        64,
        511,
        512,
        1023,
        1024,
        1025,
        65535,
        65536,
        top,
        top - 1,
        top >> 1,
    }
    for centre in (now, end, CLUSTER, 64 << 20, 512 << 20, 1 << 32, 1 << 56):
        found |= {centre - 1, centre, centre + 1, centre + CLUSTER, centre - CLUSTER}
    found |= {1 << bit for bit in range(8 * width)} | {now ^ 1 << bit for bit in range(8 * width)}
    return sorted(value for value in found if 0 <= value <= top and value != now)


def files(kind: str) -> dict[str, bytes]:
    """The sound image's files."""
    return base(KINDS[kind])


def mutants(kind: str, pairs: int) -> Iterator[tuple[str, bytes]]:
    """In an order that lets a run of some take some of every field."""
    data = files(kind)["image.qcow2"]
    file = File(data, stride=2 if "extended" in kind else 1)
    singles = []
    for name, at, width in _fields(KINDS[kind], file):
        now = int.from_bytes(data[at : at + width], "big")
        for value in _borders(width, now, len(data)):
            if "iterations" in name and 1 << 18 < value < MOST_ROUNDS // 2:
                continue  # allowed, and seconds of hashing; tests/crypto has the worst of them
            singles.append((name, at, width, value))
    rng = random.Random(kind)
    rng.shuffle(singles)
    yield "untouched", data
    for chosen in [[one] for one in singles] + [rng.sample(singles, 2) for _ in range(pairs)]:
        changed = bytearray(data)
        for _, at, width, value in chosen:
            changed[at : at + width] = value.to_bytes(width, "big")
        yield ", ".join(f"{name} = {value:#x}" for name, _, _, value in chosen), bytes(changed)
    # A compressed descriptor at the borders of what it can name.
    entry, shift = file.entry(0), 62 - (file.data[23] - 8)
    for host in (0, 512, len(data) - 1, len(data), (1 << shift) - 1):
        for sectors in (0, 1, (1 << 62 - shift) - 1):
            changed = bytearray(data)
            struct.pack_into(">Q", changed, entry, 1 << 62 | sectors << shift | host)
            yield f"compressed, {sectors} sectors at {host:#x}", bytes(changed)
