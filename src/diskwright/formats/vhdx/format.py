"""The VHDX machine: all of its parts, and what it tells about an image."""

from __future__ import annotations

from collections.abc import Sequence

from ...abilities import Reference
from ...contract import Procedure
from ...hints import Any
from .structures import guid_text
from .writeback import Writeback


class Vhdx(Writeback):
    """One open VHDX image (the `Format` of the contract)."""

    @property
    def backing_names(self) -> Sequence[str]:
        """The parent's names in the order in which they are to be tried."""
        return () if self.locator is None else self.locator.names

    def references(self) -> Sequence[Reference]:
        """All names of the parent."""
        return [Reference("backing file", name, "vhdx") for name in self.backing_names]

    @property
    def backing_file(self) -> str | None:
        """The first name of the parent; None for an image without one."""
        return next(iter(self.backing_names), None)

    @property
    def backing_format(self) -> str | None:
        """A parent is a VHDX image."""
        return "vhdx" if self.differencing else None

    @property
    def identity(self) -> str | None:
        """The DataWriteGuid."""
        return guid_text(self.header.data_guid)

    @property
    def parent_identity(self) -> str | None:
        """The first of `parent_identities`."""
        return next(iter(self.parent_identities), None)

    @property
    def parent_identities(self) -> Sequence[str]:
        """The parent's DataWriteGuid must be one of these (2.6.2.6.3)."""
        return () if self.locator is None else self.locator.linkages

    @property
    def subformat(self) -> str:
        """``fixed``, ``dynamic`` or ``differencing``."""
        return "differencing" if self.differencing else "fixed" if self.fixed else "dynamic"

    def info(self) -> dict[str, Any]:
        """The format-specific data."""
        p = self.parameters
        return {
            "subformat": self.subformat,
            "log-size": self.header.log_length,
            "logical-sector-size": p.sector_size,
            "physical-sector-size": p.physical_sector_size,
            "disk-id": guid_text(p.disk_id),
            "data-write-guid": guid_text(self.header.data_guid),
        }

    # -- whole-image procedures, each imported when it is asked for
    def check(self, fix: str = "") -> Procedure:
        """Look for blocks that overlap or lie outside; ``fix`` is "", "leaks" or "all".  Returns
        a CheckResult."""
        if fix:
            from .repair import repair

            return repair(self, fix)
        from .checking import check

        return check(self)

    def resize(self, size: int, preallocation: str = "off", shrink: bool = False) -> Procedure:
        """Change the virtual size to ``size`` bytes; a smaller one only with ``shrink``."""
        from .resizing import resize

        return resize(self, size, preallocation, shrink)

    def make_empty(self) -> Procedure:
        """Drop all guest data, so that the parent shows through everywhere."""
        from .emptying import make_empty

        return make_empty(self)

    def change_backing(
        self, name: str | None, fmt: str | None, identity: str | None = None
    ) -> Procedure:
        """Write another parent (None: none) into the parent locator."""
        from .reparent import change_backing

        return change_backing(self, name, fmt, identity)
