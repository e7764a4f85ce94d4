"""Writing a new VHDX image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...contract import Barrier, Length, MetaWrite, Procedure, Progress, Truncate, Write
from ...errors import DiskError, UsageError
from ...hints import Any
from ...ondisk import little_endian_bytes, zeros
from ...units import align_up, is_power_of_two
from . import locator
from . import structures as st
from .core import ENTRIES, FULL, PART, ZERO, Core
from .metadata import MAX_BLOCK, MAX_SIZE, MIN_BLOCK, SECTOR_SIZES, Parameters, region_bytes
from .structures import MIB, SLOT, Header, Region

SUBFORMATS = ("dynamic", "fixed", "differencing")
PREALLOCATIONS = ("off", "falloc", "full")
CREATOR = "diskwright"
_GIB, _TIB = 1 << 30, 1 << 40
_MOST_LOG = (1 << 32) - MIB


def create_image(options: Mapping[str, Any]) -> Procedure:
    """Write an image of ``size`` bytes (rounded up to its sectors) into slot ``file``.

    The file identifier comes last, so that an interrupted create leaves nothing that looks like
    an image.  What the slot held before is cut off where it can be.  Raises UsageError with the
    words that scripts know from qemu-img.
    """
    layout = Layout(options)
    kept = False
    if (yield Length(SLOT)):
        try:
            yield Truncate(SLOT, 0)
        except (OSError, DiskError):
            kept = True  # a device keeps its length and what it holds
    if not kept:
        yield Truncate(SLOT, layout.data, layout.preallocation)
    if layout.fixed:
        yield from _preallocate(layout, kept)
    if kept:  # what is reserved must be zero
        yield Write([MetaWrite(SLOT, 0, bytes(st.HEADER_SECTION))])
    for offset, data in layout.structures():
        yield Write([MetaWrite(SLOT, offset, data)])
    done = 0
    for offset, data in layout.table(kept):
        yield Write([MetaWrite(SLOT, offset, data)])
        done += len(data)
        yield Progress(done, layout.bat.length)
    yield Barrier()
    yield Write([MetaWrite(SLOT, 0, st.identifier(CREATOR))])
    yield Barrier()


def _preallocate(layout: Layout, kept: bool) -> Procedure:
    """Space for all blocks of a fixed image; on a device that means zeroes."""
    if not kept:
        yield Truncate(SLOT, layout.end, layout.preallocation)
        return
    if (yield Length(SLOT)) < layout.end:
        raise UsageError(f"The device is too small: the image has {layout.end} bytes")
    for at in range(layout.data, layout.end, MIB):
        yield Write([MetaWrite(SLOT, at, bytes(min(MIB, layout.end - at)))])
        yield Progress(at - layout.data, layout.end - layout.data)


def automatic_block_size(size: int) -> int:
    """The block size for a disk of ``size`` bytes where none was asked for, as in qemu-img."""
    if size > 32 * _TIB:
        return 64 * MIB
    if size > 100 * _GIB:
        return 32 * MIB
    return 16 * MIB if size > _GIB else 8 * MIB


class Layout:
    """The checked create options, and where everything goes: log, metadata, BAT, blocks."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        size = options.get("size")
        if size is None or size < 0:
            raise UsageError("Image size must be specified")
        parents = options.get("backing_sector_size")
        sector = int(options.get("logical_sector_size") or parents or 512)
        if sector not in SECTOR_SIZES:
            raise UsageError("Logical sector size must be 512 or 4096")
        if sector != (parents or sector):
            raise UsageError(f"The parent has logical sectors of {parents} bytes, so has its child")
        size = align_up(int(size), sector)
        if size > MAX_SIZE:
            raise UsageError("Image size too large; max of 64TB")
        self.preallocation = str(options.get("preallocation") or "off")
        if self.preallocation not in PREALLOCATIONS:
            raise UsageError(
                f"Parameter 'preallocation' does not accept value '{self.preallocation}'"
            )
        item = self._parent(options)
        self._subformat(options, item is not None)
        self.states_zero = bool(options.get("block_state_zero", True)) and item is None
        self.parameters = Parameters(
            self._block_size(options, size), self.fixed, item is not None, size, sector, 4096,
            st.new_guid(),
        )
        self.geometry = Core({})
        self.geometry.use(self.parameters)
        self.metadata_bytes = region_bytes(self.parameters, item)
        self._places(options)

    def _parent(self, options: Mapping[str, Any]) -> bytes | None:
        """The parent locator for the parent that is asked for; None without one."""
        name = options.get("backing_file") or options.get("parent")
        if not name:
            return None
        fmt = options.get("backing_fmt")
        if fmt not in (None, "vhdx"):
            raise UsageError(f"The parent of a VHDX image must be one, too, not '{fmt}'")
        identity = options.get("backing_identity")
        if identity is None:
            raise UsageError(
                f"The parent '{name}' must be a VHDX image that can be opened, since its "
                "identity is recorded"
            )
        return locator.encode(
            locator.locate(str(name), [str(identity)], options.get("file-name"))
        )

    def _subformat(self, options: Mapping[str, Any], parent: bool) -> None:
        wanted = options.get("subformat") or ("differencing" if parent else "dynamic")
        if wanted not in SUBFORMATS:
            raise UsageError(f"Invalid parameter '{wanted}'")
        if parent and wanted == "fixed":
            raise UsageError("A fixed image cannot have a parent")
        if wanted == "differencing" and not parent:
            raise UsageError("A differencing image needs a parent")
        self.fixed = wanted == "fixed"

    @staticmethod
    def _block_size(options: Mapping[str, Any], size: int) -> int:
        block = int(options.get("block_size") or 0) or automatic_block_size(size)
        if block % MIB:
            raise UsageError("Block size must be a multiple of 1 MB")
        if not is_power_of_two(block):
            raise UsageError("Block size must be a power of two")
        if not MIN_BLOCK <= block <= MAX_BLOCK:
            raise UsageError("Block size must not exceed 268435456")
        return block

    def _places(self, options: Mapping[str, Any]) -> None:
        log = int(options.get("log_size") or MIB)
        if log % MIB or not MIB <= log <= _MOST_LOG:
            raise UsageError("Log size must be a multiple of 1 MB")
        core = self.geometry
        self.entries = core.entries_for(core.blocks)
        at = st.HEADER_SECTION
        self.header = Header(
            0, 1, st.new_guid(), st.new_guid(), st.NO_GUID, 0, 1, log, at
        )
        at += log
        self.metadata = Region(st.METADATA_REGION, at, len(self.metadata_bytes), True)
        at += self.metadata.length
        self.bat = Region(st.BAT_REGION, at, core.table_bytes(core.blocks), True)
        self.data = self.bat.end
        self.end = self.data + (core.blocks * core.block_size if self.fixed else 0)

    def structures(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of everything but the file identifier and the BAT."""
        h = self.header
        # A log that is not in use may hold anything.
        yield self.metadata.offset, self.metadata_bytes
        regions = st.encode_regions([self.bat, self.metadata])
        for place in st.REGION_TABLES:
            yield place, regions
        for number, header in enumerate((h, h._replace(slot=1, sequence=h.sequence + 1))):
            yield st.HEADERS[number], header.encode().ljust(64 * st.KIB, b"\0")

    def table(self, kept: bool) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of the BAT; what is zero is left out unless the file held something."""
        core = self.geometry
        ratio = 1 << core.ratio_bits
        step = MIB // PART * ENTRIES
        end = self.bat.length // 8 if kept else align_up(self.entries, ENTRIES)
        for first in range(0, end, step):
            count = min(step, end - first)
            entries = zeros(64, count)
            if self.fixed or self.states_zero:
                for i in range(min(count, max(0, self.entries - first))):
                    chunk, inside = divmod(first + i, ratio + 1)
                    if inside == ratio:
                        continue  # of a sector bitmap block
                    block = chunk * ratio + inside
                    entries[i] = (
                        self.data + block * core.block_size | FULL if self.fixed else ZERO
                    )
            elif not kept:
                continue
            yield self.bat.offset + 8 * first, little_endian_bytes(entries)
