"""The table of internal snapshots (qcow2 specification, "Snapshots")."""

from __future__ import annotations

from ....abilities import SnapshotInfo
from ....contract import Procedure, Progress, Read
from ....errors import MalformedImage, UsageError
from ....hints import TYPE_CHECKING
from ....ondisk import Fields
from ....records import NamedTuple
from ....units import align_up
from .. import header as hd
from ..machine.core import SLOT

if TYPE_CHECKING:
    from ..image import Image

ENTRY = Fields(
    ">",
    "l1_table_offset:Q l1_size:I id_str_size:H name_size:H date_sec:I date_nsec:I "
    "vm_clock_nsec:Q vm_state_size:I extra_data_size:I",
)
EXTRA_AT = ENTRY.offset_of("extra_data_size")
"""Where an entry has the length of its extra data, of 32 bits."""
EXTRA = Fields(">", "vm_state_size_large:Q disk_size:Q icount:Q")
KNOWN_EXTRA = EXTRA.size
LEAST_EXTRA = 16
"""Bytes of extra data that every entry of version 3 has: VM state size and disk size."""
MAX_EXTRA = 1024
MAX_TABLE_BYTES = hd.MAX_SNAPSHOTS * 1024
_READ = 1 << 20
_NO_ICOUNT = (1 << 64) - 1


class Snapshot(NamedTuple):
    """One entry.  Sizes are bytes, ``l1_size`` is entries; ``id`` and ``name`` as they are stored.

    ``disk_size`` is None where the entry does not say; ``icount`` too, and where it says "none".
    ``extra`` is all extra data as it was read, unknown parts included.
    """

    id: bytes
    name: bytes
    l1_offset: int
    l1_size: int
    date_sec: int = 0
    date_nsec: int = 0
    vm_clock_nsec: int = 0
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int | None = None
    extra: bytes = b""

    def encode(self) -> bytes:
        """The entry with its padding.  What is behind the known extra data stays as it was."""
        extra = self.extra
        if self.disk_size is not None:
            icount = _NO_ICOUNT if self.icount is None else self.icount
            known = EXTRA.pack(self.vm_state_size, self.disk_size, icount)
            if LEAST_EXTRA <= len(extra) < len(known):
                known = known[:LEAST_EXTRA] + extra[LEAST_EXTRA:]
            extra = known + extra[len(known) :]
        small = self.vm_state_size if self.vm_state_size < 1 << 32 else 0
        out = ENTRY.pack(
            self.l1_offset,
            self.l1_size,
            len(self.id),
            len(self.name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            small,
            len(extra),
        )
        out += extra + self.id + self.name
        return out.ljust(align_up(len(out), 8), b"\0")


def damage(h: hd.Header, snapshot: Snapshot) -> tuple[str, str, str] | None:
    """What keeps a snapshot from being used, as (field, what is wrong, what a check says of it);
    None: nothing that its entry says.  The L1 table is aligned, and at most 32 MiB long."""
    offset, size = snapshot.l1_offset, snapshot.l1_size
    if size * 8 > hd.MAX_L1_BYTES:
        found = f"l1_size={size:#x}: L1 table is too large"
        return "l1_size", "Snapshot L1 table too large", found
    if offset % (1 << h.cluster_bits) or offset + 8 * size > hd.MAX_OFFSET:
        found = f"l1_offset={offset:#x}: L1 table is not cluster aligned"
        return "l1_table_offset", "Snapshot L1 table offset invalid", found
    disk = snapshot.disk_size or 0
    if disk >= 1 << 63 or hd.l1_bytes(h, disk) > hd.MAX_L1_BYTES:
        return "disk size", "Snapshot's disk is too large", f"disk_size={disk:#x}: too large"
    return None


def described(snapshot: Snapshot) -> SnapshotInfo:
    """A table entry for callers; bytes that are not UTF-8 survive as surrogates."""
    return SnapshotInfo(
        snapshot.id.decode(errors="surrogateescape"),
        snapshot.name.decode(errors="surrogateescape"),
        snapshot.vm_state_size,
        snapshot.date_sec,
        snapshot.date_nsec,
        snapshot.vm_clock_nsec,
        snapshot.icount,
        snapshot.disk_size,
    )


def encode_table(snapshots: list[Snapshot]) -> bytes:
    """The whole table.  Raises UsageError when it would be too large."""
    data = b"".join(snapshot.encode() for snapshot in snapshots)
    if len(data) > MAX_TABLE_BYTES or len(snapshots) > hd.MAX_SNAPSHOTS:
        raise UsageError("The snapshot table would become too large")
    return data


def read_table(image: Image, found: list[Snapshot] | None = None) -> Procedure:
    """The snapshots of an image and the length of their table in bytes: ``(list, length)``.
    ``found``: a list that gets them one by one, and so has those before an error.

    Raises MalformedImage for a table that breaks a bound: 64 MiB in all, 1 KiB of extra data an
    entry.  What an entry says of its snapshot is looked at when that is used: see `damage`.
    """
    h = image.header
    found = [] if found is None else found
    start = at = h.snapshots_offset
    buffer, base = b"", start
    for number in range(h.nb_snapshots):
        # The longest entry has two names of 64 KiB.
        if len(buffer) < at - base + ENTRY.size + MAX_EXTRA + (1 << 17):
            (buffer,) = yield Read(SLOT, [(at, _READ)])
            base = at
            yield Progress(number, h.nb_snapshots)
        snapshot, length = parse_entry(h, buffer, at - base, at)
        at += length
        if at - start > MAX_TABLE_BYTES:
            raise MalformedImage(
                "Snapshot table is too large", field="nb_snapshots", offset=60
            )
        found.append(snapshot)
    return found, at - start


def parse_entry(h: hd.Header, data: bytes, at: int, place: int) -> tuple[Snapshot, int]:
    """The entry at ``at`` of ``data`` and its length with the padding; ``place``: in the file.

    Raises MalformedImage for more extra data than `MAX_EXTRA`.
    """
    (
        l1_offset,
        l1_size,
        id_length,
        name_length,
        date_sec,
        date_nsec,
        clock,
        state_size,
        extra_length,
    ) = ENTRY.unpack_from(data, at)
    if extra_length > MAX_EXTRA:
        raise MalformedImage(
            "Too much extra metadata in snapshot table entry", field="extra_data_size", offset=place
        )
    first = at + ENTRY.size
    extra = data[first : first + extra_length]
    disk_size = icount = None
    if extra_length >= LEAST_EXTRA:
        state_size, disk_size, count = EXTRA.unpack_from(extra.ljust(KNOWN_EXTRA, b"\0"))
        if extra_length >= KNOWN_EXTRA and count != _NO_ICOUNT:
            icount = count
    names = first + extra_length
    end = names + id_length + name_length
    snapshot = Snapshot(
        data[names : names + id_length],
        data[names + id_length : end],
        l1_offset,
        l1_size,
        date_sec,
        date_nsec,
        clock,
        state_size,
        disk_size,
        icount,
        extra,
    )
    return snapshot, align_up(end - at, 8)
