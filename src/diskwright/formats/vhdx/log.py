"""Entries of the log (MS-VHDX 2.3): how they are made, and how they are read.

An entry is a sector of 4 KiB with header and descriptors (more of them with more than 126
descriptors), then a sector for every data descriptor.  A data sector lends its first eight and
last four bytes to a signature and the entry's sequence number, so that a torn one is noticed; what
was there stands in the descriptor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...ondisk import Fields
from ...records import NamedTuple
from .structures import KIB, MIB, sealed

SECTOR = 4 * KIB
HEADER_BYTES = 64
_SIGNATURE = b"loge"
_FIRST, _MORE = 126, 128

ENTRY_HEADER = Fields(
    "<",
    "Signature:4s Checksum:I EntryLength:I Tail:I SequenceNumber:Q DescriptorCount:I Reserved:I "
    "LogGuid:16s FlushedFileOffset:Q LastFileOffset:Q",
)
DESCRIPTOR = Fields(
    "<", "Signature:4s TrailingBytes:4s LeadingBytes:8s FileOffset:Q SequenceNumber:Q"
)
"""Of both kinds; a zero descriptor has its length third."""
DATA_SECTOR = Fields("<", "DataSignature:4s SequenceHigh:I")


class Change(NamedTuple):
    """What an entry changes: ``data`` (4 KiB) at ``offset``, or ``length`` zeroes."""

    offset: int
    length: int
    data: bytes | None


class EntryHeader(NamedTuple):
    """The fields of an entry's first 64 bytes."""

    length: int
    tail: int
    sequence: int
    descriptors: int
    guid: bytes
    flushed: int
    last: int

    @property
    def descriptor_bytes(self) -> int:
        """Length of the sectors with header and descriptors."""
        return descriptor_sectors(self.descriptors) * SECTOR


def descriptor_sectors(count: int) -> int:
    """Sectors that a header and ``count`` descriptors take."""
    return 1 + -(-max(0, count - _FIRST) // _MORE)


def sectors_for(zeroes: int, data: int) -> int:
    """Sectors of an entry with so many descriptors of each kind."""
    return descriptor_sectors(zeroes + data) + data


def encode_entry(
    changes: Sequence[Change], guid: bytes, sequence: int, tail: int, flushed: int, last: int
) -> bytes:
    """An entry.  ``tail`` is an offset in the log, ``flushed`` and ``last`` lengths of the file."""
    descriptors, sectors = [], []
    head = DATA_SECTOR.pack(b"data", sequence >> 32)
    foot = (sequence & 0xFFFFFFFF).to_bytes(4, "little")
    for offset, length, data in changes:
        if data is None:
            size = length.to_bytes(8, "little")
            descriptors.append(DESCRIPTOR.pack(b"zero", bytes(4), size, offset, sequence))
        else:
            descriptors.append(DESCRIPTOR.pack(b"desc", data[-4:], data[:8], offset, sequence))
            sectors += [head, data[8:-4], foot]
    first = descriptor_sectors(len(changes)) * SECTOR
    length = first + len(sectors) // 3 * SECTOR
    header = ENTRY_HEADER.pack(
        _SIGNATURE, 0, length, tail, sequence, len(changes), 0, guid, flushed, last
    )
    whole = (header + b"".join(descriptors)).ljust(first, b"\0")
    return sealed(whole + b"".join(sectors))


def entry_starts(data: bytes) -> list[int]:
    """Where entries may begin in these sectors."""
    return [n * SECTOR for n, byte in enumerate(data[::SECTOR]) if byte == _SIGNATURE[0]]


def parse_entry_header(data: bytes, guid: bytes, log_length: int) -> EntryHeader | None:
    """The header in a sector of the log, when an entry of log ``guid`` can begin with it."""
    if data[:4] != _SIGNATURE:
        return None
    _, _, length, tail, sequence, count, _, found, flushed, last = ENTRY_HEADER.unpack_from(data)
    if found != guid or not sequence or length % SECTOR or tail % SECTOR:
        return None
    if not SECTOR <= length <= log_length or tail >= log_length:
        return None
    if descriptor_sectors(count) * SECTOR > length or flushed % MIB or last % MIB:
        return None
    return EntryHeader(length, tail, sequence, count, found, flushed, last)


class Descriptor(NamedTuple):
    """A descriptor: of data with the bytes that its sector lent, or of zeroes (``lent`` None)."""

    offset: int
    length: int
    lent: tuple[bytes, bytes] | None


def parse_descriptors(data: bytes, header: EntryHeader) -> list[Descriptor] | None:
    """The descriptors in an entry's first sectors; None when one breaks 2.3.1.2, 2.3.1.3."""
    out = []
    data_sectors = (header.length - header.descriptor_bytes) // SECTOR
    for number in range(header.descriptors):
        signature, trailing, leading, offset, sequence = DESCRIPTOR.unpack_from(
            data, HEADER_BYTES + number * DESCRIPTOR.size
        )
        if sequence != header.sequence or offset % SECTOR:
            return None
        if signature == b"desc":
            data_sectors -= 1
            out.append(Descriptor(offset, SECTOR, (leading, trailing)))
        elif signature == b"zero":
            length = int.from_bytes(leading, "little")
            if length % SECTOR:
                return None
            out.append(Descriptor(offset, length, None))
        else:
            return None
    return out if data_sectors >= 0 else None


def sector_of(data: bytes, sequence: int) -> bool:
    """True when ``data`` is a data sector of the entry with this sequence number."""
    signature, high = DATA_SECTOR.unpack_from(data)
    low = int.from_bytes(data[-4:], "little")
    return bool(signature == b"data" and high << 32 | low == sequence)


def restore(data: bytes, descriptor: Descriptor) -> bytes:
    """The sector that ``data`` was made of."""
    assert descriptor.lent is not None
    return descriptor.lent[0] + data[8:-4] + descriptor.lent[1]


def batches(changes: Iterable[Change], most: int) -> list[list[Change]]:
    """``changes`` in entries of at most ``most`` sectors each."""
    out: list[list[Change]] = [[]]
    zeroes = data = 0
    for change in changes:
        is_data = change.data is not None
        if sectors_for(zeroes + (not is_data), data + is_data) > most:
            out.append([])
            zeroes = data = 0
        out[-1].append(change)
        data += is_data
        zeroes += not is_data
    return [batch for batch in out if batch]
