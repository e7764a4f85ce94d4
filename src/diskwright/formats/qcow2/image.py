"""A qcow2 image as it is read: its map, what it tells of itself, and its procedures by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ...abilities import SnapshotInfo
from ...bitmaps import DirtyBitmap
from ...contract import Procedure
from ...hints import TYPE_CHECKING, Any
from . import header as hd
from .machine.encrypted import Encrypted

if TYPE_CHECKING:
    from .format import Qcow2

_MOST_L2 = 32 << 20
_LEAST_TABLES = 6  # two L2 tables and four refcount blocks, in clusters
_CLEAN_INTERVAL = 600


class Image(Encrypted):
    """One open qcow2 image (the `Format` of the contract); without the subclass
    :class:`.format.Qcow2` one that is only read.

    ``backing_file`` and ``backing_format`` are what the header says, None without.
    """

    @property
    def backing_file(self) -> str | None:
        """The name in the header; bytes that are not UTF-8 survive as surrogates."""
        name = self.header.backing_file
        return None if name is None else os.fsdecode(name)

    @property
    def backing_format(self) -> str | None:
        """The backing format extension."""
        name = self.header.extension(hd.EXT_BACKING_FORMAT)
        return None if name is None else name.decode("utf-8", "replace")

    @property
    def data_file(self) -> str | None:
        """The name of the external data file, where one is used and named."""
        name = self.header.extension(hd.EXT_DATA_FILE)
        if name is None or not self.header.incompatible & hd.DATA_FILE:
            return None
        return os.fsdecode(name)

    @property
    def table_budget(self) -> int | None:
        """Bytes of memory that the options ask for; None where they do not.

        The sizes of both kinds are added up, for all tables share one budget; one that is not
        given counts as what QEMU's tools take by default.
        """
        names = ("cache-size", "l2-cache-size", "refcount-cache-size")
        whole, l2, blocks = (self.options.get(name) for name in names)
        if whole is None:
            if l2 is None and blocks is None:
                return None
            cover = len(self.l1) << self.cluster_bits
            whole = (min(_MOST_L2, cover) if l2 is None else l2) + (blocks or 0)
        return max(int(whole), _LEAST_TABLES << self.cluster_bits)

    @property
    def clean_interval(self) -> int:
        """Seconds after which tables that were not used are forgotten; 0: never."""
        return int(self.options.get("cache-clean-interval", _CLEAN_INTERVAL))

    @property
    def dirty(self) -> bool:
        """The dirty bit on disk."""
        return bool(self.header.incompatible & hd.DIRTY)

    @property
    def corrupt(self) -> bool:
        """The corrupt bit on disk."""
        return bool(self.header.incompatible & hd.CORRUPT)

    def info(self) -> dict[str, Any]:
        """The format-specific data, keyed as ``qemu-img info --output=json`` has them."""
        h = self.header
        compression = "zstd" if h.compression_type == 1 else "zlib"
        if h.version == 2:
            out: dict[str, Any] = {
                "compat": "0.10",
                "compression-type": compression,
                "refcount-bits": self.refcount_bits,
                **self._encryption(),
            }
        else:
            out = {
                "compat": "1.1",
                "compression-type": compression,
                "lazy-refcounts": bool(h.compatible & hd.LAZY_REFCOUNTS),
                **self._bitmaps_info(),
                "refcount-bits": self.refcount_bits,
            }
            if self.external:
                if self.data_file is not None:
                    out["data-file"] = self.data_file
                out["data-file-raw"] = self.raw_data
            out |= self._encryption()
            out["corrupt"] = self.corrupt
            out["extended-l2"] = bool(h.incompatible & hd.EXTENDED_L2)
        return out

    @property
    def snapshots(self) -> Sequence[SnapshotInfo]:
        """The internal snapshots, in the order of the table."""
        if not self.snapshot_table:
            return ()
        from .snapshots.table import described

        return [described(snapshot) for snapshot in self.snapshot_table]

    def _bitmaps_info(self) -> dict[str, Any]:
        if self.directory is None:
            return {}
        from .bitmaps.use import describe

        return {"bitmaps": describe(self.directory)}

    def _encryption(self) -> dict[str, Any]:
        if not self.encrypted:
            return {}
        from .encryption import told

        return {"encrypt": told(self)}

    def written(self) -> Qcow2:
        """The image itself, for procedures that change it.  Raises what keeps it from being
        written."""
        self.check_write()
        raise NotImplementedError

    # -- whole-image procedures, each imported when it is asked for
    def check(self, fix: str = "") -> Procedure:
        """Compare the reference counts with the references; returns a CheckResult.

        ``fix``: "leaks" gives back what nothing refers to, "all" mends everything; see
        :mod:`.repair.procedure`.
        """
        if fix:
            from .repair.procedure import repair

            return repair(self.written(), fix)
        from .check.checking import check

        return check(self)

    def resize(self, size: int, preallocation: str = "off", shrink: bool = False) -> Procedure:
        """Change the virtual size to ``size`` bytes; a smaller one only with ``shrink``."""
        from .resizing import resize

        return resize(self.written(), size, preallocation, shrink)

    def create_snapshot(self, info: SnapshotInfo) -> Procedure:
        """Take a snapshot of this name, date and VM state; returns its SnapshotInfo."""
        from .snapshots.view import create

        return create(self.written(), info)

    def apply_snapshot(self, snapshot_id: str | None, name: str | None) -> Procedure:
        """Make the disk what it was when the first snapshot of this id and name was taken."""
        from .snapshots.view import apply

        return apply(self.written(), snapshot_id, name)

    def delete_snapshot(self, snapshot_id: str | None, name: str | None) -> Procedure:
        """Forget the first snapshot of this id and name."""
        from .snapshots.view import delete

        return delete(self.written(), snapshot_id, name)

    def show_snapshot(self, snapshot_id: str | None, name: str | None) -> Procedure:
        """From now on be the disk of that snapshot, for reading alone."""
        from .snapshots.view import show

        return show(self, snapshot_id, name)

    @property
    def vm_state_offset(self) -> int:
        """Guest offset behind the disk at which VM state is kept."""
        return hd.l1_bytes(self.header, self.size) // 8 << self.l1_shift

    @property
    def vm_state_room(self) -> int:
        """Bytes of VM state that the L1 table reaches."""
        return (len(self.l1) << self.l1_shift) - self.vm_state_offset

    def grow_vm_state(self, end: int) -> Procedure:
        """Make room for ``end`` bytes of VM state."""
        from .snapshots.vmstate import grow

        return grow(self.written(), end)

    def make_empty(self) -> Procedure:
        """Drop all guest data, so that the backing file shows through everywhere."""
        from .rewrite import make_empty

        return make_empty(self.written())

    def change_backing(self, name: str | None, fmt: str | None) -> Procedure:
        """Write another backing file name and format (None: none) into the header."""
        from .rewrite import change_backing

        return change_backing(self.written(), name, fmt)

    def amend(self, options: Mapping[str, Any], force: bool = False) -> Procedure:
        """Change creation options in place; see :mod:`.amend.options`."""
        from .amend.options import amend

        return amend(self.written(), options, force)

    @property
    def can_keep_bitmaps(self) -> bool:
        """Images of version 2 cannot."""
        return self.header.version > 2

    def check_bitmap(self, name: str, granularity: int) -> None:
        """Raise BitmapError where a new bitmap like this cannot be kept in the image."""
        from .bitmaps.add import check_bitmap

        check_bitmap(self, name, granularity)

    def load_bitmap(self, bitmap: DirtyBitmap) -> Procedure:
        """Bring all bits of a stored bitmap into memory."""
        from .bitmaps.load import load_bitmap

        return load_bitmap(self, bitmap)

    def use_bitmap(self, bitmap: DirtyBitmap) -> Procedure:
        """What is stored of the bitmap is not to be relied on until it is stored anew."""
        from .bitmaps.use import use_bitmap

        return use_bitmap(self.written(), bitmap)

    def drop_bitmap(self, bitmap: DirtyBitmap) -> None:
        """What is stored of the bitmap goes with the next `store_bitmaps`."""
        if self.directory is not None:
            self.directory.entries.pop(bitmap.name, None)

    def store_bitmaps(self) -> Procedure:
        """Bring all persistent bitmaps to the disk."""
        from .bitmaps.store import store_bitmaps

        return store_bitmaps(self.written())

    def referenced_clusters(self) -> Procedure:
        """How many clusters of the file are in use; see :mod:`.check.usage`."""
        from .check.usage import referenced_clusters

        return referenced_clusters(self)
