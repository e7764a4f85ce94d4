"""VHDX, Microsoft's virtual hard disk of version 2 (specification: MS-VHDX)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...contract import Procedure
from ...declare import Driver, Option

if TYPE_CHECKING:
    from .format import Vhdx


def open_format(options: Mapping[str, Any]) -> tuple[Vhdx, Procedure]:
    """A format and the procedure that fills it in; see :func:`.opening.open_image`."""
    from .format import Vhdx
    from .opening import open_image

    image = Vhdx(options)
    return image, open_image(image)


def create_new(options: Mapping[str, Any]) -> Procedure:
    """The procedure that writes a new image; see :func:`.creation.create_image`."""
    from .creation import create_image

    return create_image(options)


DRIVER = Driver(
    name="vhdx",
    kind="format",
    options=(Option("backing", "str", "Parent to use instead of the one in the image"),),
    create_options=(
        Option("backing_file", "str", "File name of the parent of a differencing image"),
        Option("backing_fmt", "str", "Image format of the parent (vhdx)"),
        Option("block_size", "size", "Block size; min 1MB, max 256MB; 0 = by image size", 0),
        Option("block_state_zero", "bool", "Mark blocks that hold nothing as reading zero", True),
        Option("log_size", "size", "Log size; min 1MB", 1 << 20),
        Option("logical_sector_size", "size", "512 or 4096; 0 = the parent's, or 512", 0),
        Option("parent", "str", "The same as backing_file"),
        Option("size", "size", "Virtual disk size; max of 64TB"),
        Option(
            "subformat",
            "enum",
            "VHDX format type (differencing with a parent)",
            None,
            ("dynamic", "fixed", "differencing"),
        ),
        Option(
            "preallocation",
            "enum",
            "Preallocation of what the new file holds (allowed values: off, falloc, full)",
            "off",
            ("off", "falloc", "full"),
        ),
    ),
    open=open_format,
    create=create_new,
    capabilities=frozenset(
        {"backing", "change_backing", "check", "discard"}
        | {"identity", "make_empty", "resize", "zero"}
    ),
)
