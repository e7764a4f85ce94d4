"""What some formats can do beyond the contract, for the rooms that make use of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from .bitmaps import BitmapSet, DirtyBitmap
from .contract import Procedure
from .hints import Protocol
from .records import NamedTuple

Buffer = bytes | bytearray | memoryview


class Backed(Protocol):
    """What a format that can have a backing file may also say of it."""

    backing_file: str | None
    """The name to show; None without a backing file."""
    backing_format: str | None
    backing_names: Sequence[str]
    """All names that the image gives for it, in the order in which they are to be tried."""
    identity: str | None
    """What a child records of this image when it is made; changes with the first write."""
    parent_identity: str | None
    """What this image recorded of its backing file, which must still be so; None: nothing."""
    parent_identities: Sequence[str]
    """All that it recorded, where that may be more than one: the backing file has one of them."""

    def change_backing(
        self, name: str | None, fmt: str | None, identity: str | None = None
    ) -> Procedure:
        """Refer to another backing file (None: to none), whose identity is ``identity`` (None:
        unknown, the recorded one stays)."""


class Reference(NamedTuple):
    """A file that an image names: as what (``backing file``, ``data file``, ``extent``), by which
    name, and in which format where it says so."""

    role: str
    name: str
    format: str | None = None


class NamesFiles(Protocol):
    """What a format says whose opening does not ask for every file that an image names."""

    def references(self) -> Sequence[Reference]:
        """All of them, as far as the image has been read."""


class Sparse(Protocol):
    """What a format says whose data may well be holes of its files."""

    sparse_slots: Collection[str]
    """The slots whose nodes are asked, so that the status of the disk tells those holes."""


class FineZeroes(Protocol):
    """What a format says that stores zeroes by smaller units than it allocates."""

    zero_unit: int
    """In bytes, a divisor of ``unit``: zeroes and discards are planned in multiples of it."""


class PartlyReadOnly(Protocol):
    """What a format says whose image names files that it only reads."""

    read_only_slots: Collection[str]
    """Their slots: opened for reading, also when the image is opened anew for writing."""


class Codec(Protocol):
    """Compression of single units.  Both functions are pure, and run in the pool.  Codecs that are
    equal unpack alike."""

    def pack(self, data: Buffer) -> bytes:
        """``data`` as it is stored."""

    def unpack(self, data: Buffer, unit: int) -> bytes:
        """The ``unit`` bytes that ``data`` holds (bytes behind its end are ignored).  Raises
        ValueError when they are not there; never makes more than ``unit`` bytes."""


Places = Sequence[tuple[int, int, int]]
"""(guest offset, host offset, length) of ranges that follow each other in a buffer."""


class Transform(Protocol):
    """What stands between the bytes of a file and those of the guest (a cipher), as the ``xform``
    of extents and steps.  Pure, and runs in the pool.

    ``places`` are whole units of the format's ``cipher_unit``, ``data`` their bytes; ``into`` is as
    long, and may be the same memory.
    """

    def decode(self, places: Places, data: Buffer, into: memoryview) -> None:
        """Fill ``into`` with the guest's bytes."""

    def encode(self, places: Places, data: Buffer, into: memoryview) -> None:
        """Fill ``into`` with the file's bytes."""


class Packs(Protocol):
    """What a format says that stores single units compressed (WRITE_PACKED)."""

    @property
    def pack_codec(self) -> Codec | None:
        """What packs them; None where this image cannot hold any."""


class SnapshotInfo(NamedTuple):
    """An internal snapshot.  Sizes are bytes; ``date`` is seconds and nanoseconds of the day it was
    taken, since 1970; ``vm_clock_nsec`` how long the guest had run; ``icount`` None: not known."""

    id: str
    name: str
    vm_state_size: int = 0
    date_sec: int = 0
    date_nsec: int = 0
    vm_clock_nsec: int = 0
    icount: int | None = None
    disk_size: int | None = None

    def to_dict(self) -> dict[str, int | str]:
        """The keys of ``qemu-img info --output=json``, in its order."""
        out: dict[str, int | str] = {} if self.icount is None else {"icount": self.icount}
        return out | {
            "vm-clock-nsec": self.vm_clock_nsec % 1_000_000_000,
            "name": self.name,
            "date-sec": self.date_sec,
            "date-nsec": self.date_nsec,
            "vm-clock-sec": self.vm_clock_nsec // 1_000_000_000,
            "id": self.id,
            "vm-state-size": self.vm_state_size,
        }


class Snapshots(Protocol):
    """A format whose images hold snapshots of themselves, and VM state with them.

    Ids and names are those of the image; the first snapshot that fits is taken, None fits all.
    Procedures raise ``errors.NoSuchSnapshot``; all but ``show_snapshot`` need an image that can be
    written.
    """

    @property
    def snapshots(self) -> Sequence[SnapshotInfo]:
        """All of them, in the order of the image."""

    def create_snapshot(self, info: SnapshotInfo) -> Procedure:
        """Take one with the name, date and VM state size of ``info``; returns it with the id that
        it got.  VM state that it says to have goes with it, and from the disk."""

    def apply_snapshot(self, snapshot_id: str | None, name: str | None) -> Procedure:
        """Make the disk what it was then, its size included."""

    def delete_snapshot(self, snapshot_id: str | None, name: str | None) -> Procedure:
        """Give it up, with what nothing else refers to."""

    def show_snapshot(self, snapshot_id: str | None, name: str | None) -> Procedure:
        """Be the disk of that snapshot from now on, for reading alone: in a node of its own."""

    vm_state_offset: int
    """Guest offset, behind the disk, of the VM state."""
    vm_state_room: int
    """Bytes of it that can be stored there before it has to grow."""

    def grow_vm_state(self, end: int) -> Procedure:
        """Make room for ``end`` bytes of VM state."""


class KeepsBitmaps(Protocol):
    """What a format says that keeps dirty bitmaps in its images.

    ``bitmaps`` are also those that the engine tells of writes.  All procedures run alone.
    """

    bitmaps: BitmapSet

    @property
    def can_keep_bitmaps(self) -> bool:
        """This image can."""

    def check_bitmap(self, name: str, granularity: int) -> None:
        """Raise BitmapError where a new bitmap like this cannot be kept."""

    def load_bitmap(self, bitmap: DirtyBitmap) -> Procedure:
        """Bring all bits of a stored bitmap into memory."""

    def use_bitmap(self, bitmap: DirtyBitmap) -> Procedure:
        """What is stored of the bitmap is not to be relied on until it is stored anew; durable
        at the end."""

    def drop_bitmap(self, bitmap: DirtyBitmap) -> None:
        """What is stored of the bitmap goes with the next `store_bitmaps`."""

    def store_bitmaps(self) -> Procedure:
        """Bring all persistent bitmaps to the disk; closing does so, too."""


class StreamWriter(Protocol):
    """An image written in one pass: ordered bytes out, none of them revisited.

    ``unit``: the disk is handed over in units of so many bytes, ascending, without those that
    read as zeroes (and without a backing file).
    """

    unit: int
    codec: Codec

    def head(self) -> Iterable[bytes]:
        """What comes first."""

    def put(self, index: int, packed: bytes) -> Iterable[bytes]:
        """Unit ``index``, packed by ``codec``."""

    def end(self) -> Iterable[bytes]:
        """What comes last."""


class Survey(StreamWriter, Protocol):
    """What is shown a disk before it is written in one pass.

    It takes the disk as a StreamWriter does and only remembers what it has to: it gives no bytes.
    Raises NotSupported where that would be too much.
    """

    def writer(self) -> StreamWriter:
        """What writes the image when it is handed the same disk again.  Raises ImageError for
        another one."""
