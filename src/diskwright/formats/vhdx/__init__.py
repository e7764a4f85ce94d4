"""VHDX, Microsoft's virtual hard disk of version 2 (specification: MS-VHDX)."""

from __future__ import annotations

from collections.abc import Mapping

from ...contract import Procedure
from ...declare import Driver, Option
from ...hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .format import Vhdx


def open_format(options: Mapping[str, Any]) -> tuple[Vhdx, Procedure]:
    """A format and the procedure that fills it in; see :func:`.opening.open_image`.

    With ``salvage`` among the options one that reads what is left (:mod:`.salvage`).
    """
    if options.get("salvage"):
        from .salvage import open_salvaged

        return open_salvaged(options)
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
        Option("backing_file", "str", "File name of the parent of a differencing image",
               own=True),
        Option("backing_fmt", "str", "Image format of the parent (vhdx)", own=True),
        Option(
            "block_size",
            "size",
            "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
            0,
        ),
        Option(
            "block_state_zero",
            "bool",
            "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to "
            "'off' when using 'qemu-img convert' with subformat=dynamic.",
            True,
        ),
        Option("log_size", "size", "Log size; min 1MB.", 1 << 20),
        Option("logical_sector_size", "size", "512 or 4096; 0 = the parent's, or 512", 0,
               own=True),
        Option("parent", "str", "The same as backing_file", own=True),
        Option("size", "size", "Virtual disk size; max of 64TB."),
        Option(
            "subformat",
            "enum",
            "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
            None,
            ("dynamic", "fixed", "differencing"),
        ),
        Option(
            "preallocation",
            "enum",
            "Preallocation of what the new file holds (allowed values: off, falloc, full)",
            "off",
            ("off", "falloc", "full"),
            own=True,
        ),
    ),
    open=open_format,
    create=create_new,
    capabilities=frozenset(
        {"backing", "change_backing", "check", "discard"}
        | {"identity", "make_empty", "resize", "zero"}
    ),
)
