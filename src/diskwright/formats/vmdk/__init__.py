"""VMDK: disks of VMware's programs, of one or several extents (technical note "Virtual Disk
Format 5.0"; ESX's formats by libvmdk's documentation and by measurement)."""

from __future__ import annotations

from collections.abc import Mapping

from ...abilities import StreamWriter
from ...contract import Procedure
from ...declare import Driver, Option
from ...hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .format import Vmdk

_SUBFORMATS = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
    "vmfs",
    "vmfsSparse",
    "seSparse",
)


def open_format(options: Mapping[str, Any]) -> tuple[Vmdk, Procedure]:
    """A format and the procedure that fills it in; see :func:`.opening.open_image`."""
    from .format import Vmdk
    from .opening import open_image

    image = Vmdk(options)
    return image, open_image(image)


def create_new(options: Mapping[str, Any]) -> Procedure:
    """The procedure that writes a new image; see :func:`.creation.create_image`."""
    from .creation import create_image

    return create_image(options)


def stream(options: Mapping[str, Any]) -> StreamWriter | None:
    """How an image of these create options is written in one pass, where it is."""
    from .creation import stream_writer

    return stream_writer(options)


DRIVER = Driver(
    name="vmdk",
    kind="format",
    options=(Option("backing", "str", "Backing file to use instead of the one in the image"),),
    create_options=(
        Option(
            "adapter_type",
            "str",
            "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
        ),
        Option("backing_file", "str", "File name of a base image"),
        Option("backing_fmt", "str", "Must be 'vmdk' if present"),
        Option("compat6", "bool", "VMDK version 6 image", False),
        Option("compression_level", "int", "Level of zlib in streamOptimized images (1 to 9)",
               own=True),
        Option("hwversion", "str", "VMDK hardware version"),
        Option(
            "preallocation",
            "enum",
            "Preallocation mode of flat extents (allowed values: off, falloc, full)",
            "off",
            ("off", "falloc", "full"),
            own=True,
        ),
        Option("size", "size", "Virtual disk size"),
        Option("subformat", "str", f"VMDK format, can be one of {', '.join(_SUBFORMATS)}"),
        Option("toolsversion", "str", "VMware guest tools version"),
        Option("zeroed_grain", "bool",
               "Enable efficient zero writes using the zeroed-grain GTE feature", False),
    ),
    open=open_format,
    create=create_new,
    stream=stream,
    capabilities=frozenset(
        {"backing", "change_backing", "check", "discard"}
        | {"identity", "make_empty", "resize", "zero"}
    ),
)
