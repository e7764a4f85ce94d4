"""What some formats can do beyond the contract, for the rooms that make use of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from .contract import Procedure

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


class Sparse(Protocol):
    """What a format says whose data may well be holes of its files."""

    sparse_slots: Collection[str]
    """The slots whose nodes are asked, so that the status of the disk tells those holes."""


class PartlyReadOnly(Protocol):
    """What a format says whose image names files that it only reads."""

    read_only_slots: Collection[str]
    """Their slots: opened for reading, also when the image is opened anew for writing."""


class Codec(Protocol):
    """Compression of single units.  Both functions are pure, and run in the pool.  Codecs that are
    equal unpack alike."""

    def pack(self, data: Buffer) -> bytes:
        """``data`` as it is stored."""

    def unpack(self, data: bytes, unit: int) -> bytes:
        """The ``unit`` bytes that ``data`` holds (bytes behind its end are ignored).  Raises
        ValueError when they are not there; never makes more than ``unit`` bytes."""


class Packs(Protocol):
    """What a format says that stores single units compressed (WRITE_PACKED)."""

    @property
    def pack_codec(self) -> Codec:
        """What packs them."""


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
