"""A small seSparse extent by itself, which the open procedure of the format would not write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diskwright.contract import Procedure, Quiesce
from diskwright.formats.vmdk.format import Vmdk
from diskwright.formats.vmdk.sesparse.header import Header, Region
from diskwright.formats.vmdk.sesparse.part import open_sesparse

SECTOR = 512
GRAINS = 512  # there is room for


class Alone(Vmdk):
    """A disk of one extent, in slot ``file``."""

    def resize(self, size: int, preallocation: str = "off", shrink: bool = False) -> Procedure:
        """Change the size of the extent."""
        (part,) = self.parts
        yield from part.resize(size // SECTOR)  # type: ignore[attr-defined]
        yield Quiesce()
        self.use_parts([part], [None], ["RW"])


def image(size: int) -> bytes:
    """A new extent whose regions are as small as they may be."""
    sizes = [1, 2, 8, 8, 64, 8, 8]
    places = [1, 2, 8, 16, 24, 88, 96]
    regions = [Region(at, n) for at, n in zip(places, sizes, strict=True)]
    header = Header._make([size // SECTOR, *regions, Region(104, GRAINS * 8), 0])
    return header.encode().ljust(104 * SECTOR, b"\0")


def alone(options: Mapping[str, Any]) -> tuple[Vmdk, Procedure]:
    """(format, opening procedure)."""
    out = Alone(options)
    out.has_backing = options.get("backing") is not None

    def opening() -> Procedure:
        part = yield from open_sesparse(out, "file", 0, None)
        out.use_parts([part], [None], ["RW"])
        return out

    return out, opening()
