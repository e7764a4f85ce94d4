"""The luks machine: sectors at an offset, through a cipher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...abilities import Transform
from ...contract import (
    OP_DATA,
    WRITE,
    Compute,
    Length,
    NeedMeta,
    Open,
    Plan,
    Procedure,
    Range,
    Step,
    Truncate,
)
from ...errors import MalformedImage, NotSupported, UnsupportedFeature, UsageError
from ...extents import Data, Extent
from ...hints import Any, ClassVar
from ...secrets import find
from ...tableless import Tableless
from ...units import SECTOR, align_down, align_up
from ..luks1 import Header
from ..luks1_slots import Place, amend, read_header, unlock

SLOT, HEADER_SLOT = "file", "header"
PREALLOCATIONS = ("off", "falloc", "full")


class Luks(Tableless):
    """One open disk (the `Format` of the contract).

    Its map never changes.  There are no zeroes but encrypted ones, so zeroes are written as data;
    what a larger disk shows behind the old end is what the file's zeroes decrypt to.
    """

    name: ClassVar[str] = "luks"
    unit = SECTOR
    cipher_unit = SECTOR
    backing_file: str | None = None
    backing_format: str | None = None
    encrypted = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.size = 0
        self.writable = bool(options.get("writable", not options.get("read-only", False)))
        self.detached = options.get("header") is not None
        self.header: Header | None = None
        self.key = b""
        self.xform: tuple[Transform, ...] = ()

    @property
    def place(self) -> Place:
        """Where the header stands."""
        return Place(HEADER_SLOT if self.detached else SLOT)

    @property
    def payload(self) -> int:
        """Where in the file the disk begins, in bytes."""
        return 0 if self.header is None else self.header.payload

    def info(self) -> dict[str, Any]:
        """The format-specific data, keyed as ``qemu-img info --output=json`` has them."""
        return {} if self.header is None else self.header.info(self.detached)

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        """Encrypted data everywhere.  Raises UnsupportedFeature while the disk is locked."""
        self._unlocked()
        start, xform = self.payload, self.xform
        return [Data(SLOT, start + o, n, self.writable, xform) for o, n in ranges if n], None

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """Writes of parts of sectors, in their places."""
        self._unlocked()
        if kind != WRITE:
            return None
        plan = Plan()
        end = -1
        for offset, length in sorted(ranges):
            start, stop = align_down(offset, SECTOR), align_up(offset + length, SECTOR)
            start = max(start, end)
            if start < stop:
                at = self.payload + start
                plan.steps.append(Step(OP_DATA, start, stop - start, SLOT, at, self.xform))
                end = stop
        return plan

    def _unlocked(self) -> None:
        if not self.xform:
            raise UnsupportedFeature("encrypted guest data of an image opened without its key")

    # -- procedures
    def resize(self, size: int, preallocation: str = "off", shrink: bool = False) -> Procedure:
        """Set the length of the file."""
        if size % SECTOR:
            raise UsageError("The new size must be a multiple of 512")
        if size < self.size and not shrink:
            raise UsageError("Use the --shrink option to perform a shrink operation.")
        if preallocation not in PREALLOCATIONS:
            raise UsageError(f"Unsupported preallocation mode '{preallocation}'")
        yield Truncate(SLOT, self.payload + size, preallocation)
        if self.payload + size < (yield Length(SLOT)):
            raise NotSupported("Cannot resize device files")
        self.size = size

    def amend(self, options: Mapping[str, Any], force: bool = False) -> Procedure:
        """Add or erase key slots; see :func:`diskwright.formats.luks1_slots.amend`."""
        self._unlocked()
        assert self.header is not None
        secrets = self.options.get("secrets")
        self.header = yield from amend(
            self.header, self.place, self.key, options, secrets, force
        )


def open_image(image: Luks) -> Procedure:
    """Read the header, and unlock the disk by ``key-secret``; returns ``image``.

    An image that is opened to be checked stays locked.
    """
    from ..ciphering import SectorTransform

    if image.detached:
        yield Open(HEADER_SLOT, "", None, True)
    room = yield Length(image.place.slot)
    header: Header = yield from read_header(image.place, room)
    image.header = header
    length = yield Length(SLOT)
    if header.payload > length:
        raise MalformedImage(
            f"LUKS header: the disk would begin at {header.payload:#x}, behind the end of the file",
            field="payload-offset",
            offset=104,
        )
    image.size = align_down(length - header.payload, SECTOR)
    if image.options.get("check") and not image.options.get("unlock"):
        return image
    name = image.options.get("key-secret")
    if name is None:
        raise UsageError("Parameter 'key-secret' is required for cipher")
    passphrase = find(image.options.get("secrets"), str(name))
    image.key = yield from unlock(header, image.place, passphrase)
    cipher = yield Compute(header.spec.make, (image.key,))
    image.xform = (SectorTransform(cipher, by_host=False),)
    return image
