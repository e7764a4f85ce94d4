"""Guest data that are encrypted, in whichever file they are: the same map, with a transform on
what it names."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ....abilities import Transform
from ....contract import NeedMeta, Range
from ....extents import Data, Extent
from ....hints import TYPE_CHECKING, Any
from ....units import SECTOR
from .external import External

if TYPE_CHECKING:
    from ...luks1 import Header as Luks


class Encrypted(External):
    """The map of encrypted images; other images pass through.

    Compressed clusters are not encrypted (as in QEMU, which does not refuse to write them), and are
    read as they are.
    """

    luks: Luks | None = None
    """The LUKS header, of crypt method 2."""
    key = b""
    """The disk's key, once the image is unlocked."""
    xform: tuple[Transform, ...] = ()

    def use_cipher(self, transform: Transform, key: bytes) -> None:
        """Unlock the image."""
        self.xform = (transform,)
        self.key = key
        self.cipher_unit = SECTOR

    @property
    def encrypted(self) -> bool:
        """True when guest data are encrypted."""
        return self.header.crypt_method != 0

    def _words(self, l1_index: int, write: bool) -> array[int] | None:
        # The shortcuts answer with places of plain data.
        return None if self.xform else super()._words(l1_index, write)

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        """Extents of ``ranges``; see the contract."""
        found, miss = super().map(ranges)
        if self.xform:
            xform: Any = self.xform
            found = [e._replace(xform=xform) if isinstance(e, Data) else e for e in found]
        return found, miss

    def zeroes(self, guest: int, host: int, length: int) -> bytes:
        """What reads as zeroes at ``guest``, stored at ``host``."""
        data = bytearray(super().zeroes(guest, host, length))
        for transform in self.xform:
            transform.encode([(guest, host, length)], data, memoryview(data))
        return bytes(data)
