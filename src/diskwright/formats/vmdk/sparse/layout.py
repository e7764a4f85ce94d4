"""New sparse extents: where header, descriptor, directories and tables go.

Source: "Virtual Disk Format 5.0", "Hosted Sparse Extents" and "ESX Server Sparse Extents"; grain
size, table size and the order of the structures are those of qemu-img.
"""

from __future__ import annotations

from array import array

from ....contract import Barrier, MetaWrite, Procedure, Truncate, Write
from ....errors import UsageError
from ....ondisk import little_endian_bytes
from ....records import NamedTuple
from ....units import align_up
from .header import (
    COWD_ENTRIES,
    COWD_LENGTH,
    MAX_DIRECTORY,
    NEWLINE_TEST,
    REDUNDANT,
    SECTOR,
    ZEROED_GRAIN,
    Esx,
    Hosted,
)

GRAIN = 128  # sectors
ENTRIES = 512
COWD_GRAIN = 1
_MAX_COWD = 1 << 32  # sectors, exclusive
_DESCRIPTOR = 20  # sectors, at least
TAG = "none"


class Plan(NamedTuple):
    """A new ``KDMV`` extent: its header, and the entries of both directories."""

    header: Hosted
    directory: array[int]
    copy: array[int]

    def writes(self, slot: str) -> list[MetaWrite]:
        """Header and directories; the tables are zeroes of the file."""
        out = [MetaWrite(slot, 0, self.header.encode(), TAG)]
        for place, entries in (
            (self.header.redundant, self.copy),
            (self.header.directory, self.directory),
        ):
            if entries:
                out.append(MetaWrite(slot, place * SECTOR, little_endian_bytes(entries), TAG))
        return out


def plan_hosted(
    sectors: int, descriptor: int = 0, zeroed: bool = False, grain: int = GRAIN
) -> Plan:
    """Lay out an extent of ``sectors`` with room for a descriptor of ``descriptor`` bytes.  Raises
    UsageError for one that is too large."""
    tables = -(-sectors // (grain * ENTRIES))
    if tables * 4 > MAX_DIRECTORY:
        raise UsageError(f"A sparse extent of {sectors} sectors is too large")
    directory = -(-tables * 4 // SECTOR)
    size = ENTRIES * 4 // SECTOR
    room = max(-(-descriptor // SECTOR), _DESCRIPTOR)
    redundant = 1 + room
    primary = redundant + directory + tables * size
    header = Hosted(
        2 if zeroed else 1,
        NEWLINE_TEST | REDUNDANT | (ZEROED_GRAIN if zeroed else 0),
        sectors,
        grain,
        1,
        room,
        ENTRIES,
        redundant,
        primary,
        align_up(primary + directory + tables * size, grain),
        False,
        0,
    )
    copies = [
        array("I", range(place + directory, place + directory + tables * size, size))
        for place in (primary, redundant)
    ]
    return Plan(header, *copies)


def new_hosted(
    slot: str, sectors: int, text: bytes | None = None, zeroed: bool = False
) -> Procedure:
    """Write a ``KDMV`` extent into an empty file, with ``text`` as its descriptor if there is
    one."""
    plan = plan_hosted(sectors, len(text or b""), zeroed)
    yield Truncate(slot, 0)
    yield Truncate(slot, plan.header.overhead * SECTOR)
    head, *directories = plan.writes(slot)
    yield Write(directories)
    if text:
        yield Write([MetaWrite(slot, SECTOR, text, TAG)])
    yield Barrier()
    yield Write([head])
    yield Barrier()


def new_cowd(slot: str, sectors: int, grain: int = COWD_GRAIN, parent: bytes = b"") -> Procedure:
    """Write a ``COWD`` extent into an empty file.  Raises UsageError for one of 2 TiB or more."""
    if sectors >= _MAX_COWD:
        raise UsageError(f"A COWD extent of {sectors} sectors is too large (less than 2 TiB)")
    tables = -(-sectors // (grain * COWD_ENTRIES))
    place = COWD_LENGTH // SECTOR
    free = place + -(-tables * 4 // SECTOR)
    header = Esx(3, sectors, grain, place, tables, free, parent, False)
    yield Truncate(slot, 0)
    yield Truncate(slot, free * SECTOR)
    yield Write([MetaWrite(slot, 0, header.encode(), TAG)])
    yield Barrier()
