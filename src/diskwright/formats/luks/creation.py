"""Writing a new LUKS disk, or the header of one."""

from __future__ import annotations

from collections.abc import Mapping

from ...contract import Barrier, Length, MetaWrite, Procedure, Truncate, Write
from ...errors import DiskError, UsageError
from ...hints import Any
from ...units import align_up
from ..luks1 import LENGTH
from ..luks1_slots import area, make_keys, plan_header
from .format import PREALLOCATIONS, SLOT


def measure(options: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the header and its key material, which stand before the disk, and 1: the disk has
    every byte.  Raises UsageError."""
    if options.get("detached-header"):
        raise UsageError("Parameter 'detached-header' is unexpected")
    return plan_header(options)[0].payload, 1


def create_image(options: Mapping[str, Any]) -> Procedure:
    """Write an image of ``size`` bytes (rounded up to 512) into slot ``file``; with
    ``detached-header`` its header alone.

    The first bytes come last, so that an interrupted create leaves nothing that looks like an
    image.  Of the disk nothing is written: it reads as what the file's zeroes decrypt to.
    """
    size = options.get("size")
    if size is None or size < 0:
        raise UsageError("Image size must be specified")
    if options.get("backing_file"):
        raise UsageError("Backing file not supported for file format 'luks'")
    preallocation = options.get("preallocation") or "off"
    if preallocation not in PREALLOCATIONS:
        raise UsageError(f"Parameter 'preallocation' does not accept value '{preallocation}'")
    detached = bool(options.get("detached-header"))
    planned, passphrase = plan_header(options, detached)
    header, material, _ = yield from make_keys(planned, passphrase, options)
    end = area(header)
    if not detached:
        end = header.payload + align_up(int(size), 512)
    if (yield Length(SLOT)):
        try:
            yield Truncate(SLOT, 0)
        except (OSError, DiskError):
            # A device keeps what it holds: old key material must not stay.
            yield Write([MetaWrite(SLOT, 0, bytes(area(header)))])
    yield Truncate(SLOT, end, preallocation)
    yield Write([MetaWrite(SLOT, header.slots[0].offset, material)])
    yield Barrier()
    yield Write([MetaWrite(SLOT, 0, header.encode().ljust(LENGTH, b"\0"))])
    yield Barrier()
