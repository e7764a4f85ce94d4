"""How large a new image will be."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..engine.kernel import BaseDriver
from ..errors import DiskError, NotSupported, UsageError
from ..graph.create import create_options
from ..graph.node import Node
from ..graph.opener import close_disk
from ..graph.status import all_status
from ..hints import Any
from ..records import NamedTuple
from ..units import SECTOR, align_up
from .create import creatable
from .images import ImageSpec
from .snapshots import Selector, show


class Measured(NamedTuple):
    """Bytes of the image's file: with the data that there are now (``required``), and with
    everything allocated; ``bitmaps``: what copies of the source's persistent bitmaps take in
    addition (None where one side cannot have any)."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None

    def to_dict(self) -> dict[str, int]:
        """The keys of ``qemu-img measure --output=json``, in its order."""
        out = {} if self.bitmaps is None else {"bitmaps": self.bitmaps}
        return out | {"required": self.required, "fully-allocated": self.fully_allocated}


def check(
    fmt: str, options: Mapping[str, Any], secrets: Mapping[str, bytes] | None = None
) -> dict[str, Any]:
    """The creation options complete and typed, with the secrets that they name.  Raises UsageError,
    NotSupported."""
    found = creatable(fmt)
    if found.measure is None:
        raise NotSupported(f"Block driver '{fmt}' does not support size measurement")
    return {**create_options(found, {**options, "size": 0}), "secrets": secrets}


def of_size(fmt: str, options: Mapping[str, Any], size: int, used: int = -1) -> Measured:
    """An image of ``size`` bytes of which ``used`` (-1: none) are stored in whole units."""
    beside, unit = creatable(fmt).measure({**options, "size": size})
    whole = beside + align_up(size, unit)
    everything = options.get("backing_file") or options.get("preallocation") in ("falloc", "full")
    if everything or unit == 1:
        return Measured(whole, whole)
    return Measured(beside + max(used, 0), whole)


async def measure(
    driver: BaseDriver,
    fmt: str,
    options: Mapping[str, Any],
    source: ImageSpec,
    snapshot: Selector | None = None,
) -> Measured:
    """An image that ``source``, or a snapshot of it, is converted into."""
    node = await source.open(driver)
    try:
        if snapshot is not None:
            try:
                await show(node, snapshot)
            except DiskError as error:
                raise UsageError(f"Failed to load snapshot: {error}") from error
        size = align_up(node.size, SECTOR)
        unit = creatable(fmt).measure({**options, "size": size})[1]
        used = 0 if unit == 1 else await _used(node, unit)
        found = of_size(fmt, options, size, used)
        return found._replace(bitmaps=_bitmaps(node, options, unit))
    finally:
        await close_disk(node)


def _bitmaps(node: Node, options: Mapping[str, Any], unit: int) -> int | None:
    """Bytes that persistent bitmaps of a source take in the target: data, a table and a directory,
    each in whole clusters."""
    if options.get("compat") not in ("1.1", "v3") or not hasattr(node, "format"):
        return None
    known = node.format.info()
    if not hasattr(node.format, "can_keep_bitmaps") or known.get("compat") == "0.10":
        return None
    total = directory = 0
    for bitmap in known.get("bitmaps", ()):
        bits = -(-node.size // bitmap["granularity"])
        data = align_up(-(-bits // 8), unit)
        total += data + align_up(data // unit * 8, unit)
        directory += align_up(24 + len(os.fsencode(bitmap["name"])), 8)
    return total + align_up(directory, unit)


async def _used(node: Node, unit: int) -> int:
    """Bytes of the units that hold data."""
    used, behind = 0, 0
    async for part in all_status(node):
        if part.data and not part.zero:
            first = max(part.start // unit, behind)
            end = -(-(part.start + part.length) // unit)
            used += max(0, end - first)
            behind = max(behind, end)
    return used * unit
