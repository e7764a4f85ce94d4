"""Checking an extent with compressed grains: every entry leads to the header of its own grain."""

from __future__ import annotations

from ....contract import Procedure, Progress, Read
from ....errors import CorruptImage
from ....findings import CheckResult
from ....hints import TYPE_CHECKING
from ....ondisk import little_endian_array
from ....units import SECTOR, align_up
from .part import GRAIN_HEADER, ZERO_ENTRY, check_grain_header

if TYPE_CHECKING:
    from array import array

    from .part import StreamPart


def check_stream(part: StreamPart, result: CheckResult) -> Procedure:
    """Follow all tables and read the header of every grain.

    Grains are not unpacked: their checksums are looked at when they are read.
    """
    entries = part.header.entries
    grains = -(-part.header.capacity // part.header.grain)
    result.total_clusters += grains
    end = 0
    for number in range(len(part.directory)):
        if number % 64 == 0:
            yield Progress(number, len(part.directory))
        try:
            place = part.table_place(number)
        except CorruptImage as error:
            result.corruption(str(error))
            continue
        if place <= ZERO_ENTRY:
            continue
        end = max(end, place + part.table_size)
        (raw,) = yield Read(part.slot, [(place, part.table_size)], "l2_load")
        table = little_endian_array(32, raw)[: grains - number * entries]
        end = max(end, (yield from _check_table(part, result, number * entries, table)))
    if part.header.footer:
        (last,) = yield Read(part.slot, [(align_up(part.file_length, SECTOR) - SECTOR, SECTOR)])
        if any(last):
            result.corruption("the end-of-stream marker behind the footer is missing")
        end = part.file_length
    result.image_end_offset = max(result.image_end_offset, end)


def _check_table(part: StreamPart, result: CheckResult, first: int, table: array[int]) -> Procedure:
    """Check the grains of one table; returns where the last of them ends."""
    end = 0
    found: list[tuple[int, int]] = []
    for index, sector in enumerate(table, first):
        if sector <= part.zeroed:
            continue
        if sector * SECTOR + GRAIN_HEADER.size > part.file_length:
            result.corruption(f"grain {index} is at sector {sector}, behind the end of the file")
            continue
        found.append((index, sector * SECTOR))
    result.allocated_clusters += len(found)
    result.compressed_clusters += len(found)
    if not part.marked or not found:
        return max((host + 1 for _, host in found), default=0)
    raws = yield Read(part.slot, [(host, GRAIN_HEADER.size) for _, host in found])
    for (index, host), raw in zip(found, raws, strict=True):
        sector, size = GRAIN_HEADER.unpack(raw)
        try:
            check_grain_header(index * part.header.grain, sector, size)
        except ValueError as error:
            result.corruption(f"grain {index} at offset {host:#x}: {error}")
            continue
        stop = host + GRAIN_HEADER.size + size
        if stop > part.file_length:
            result.corruption(f"grain {index} at offset {host:#x} ends behind the file")
        end = max(end, align_up(min(stop, part.file_length), SECTOR))
    return end
