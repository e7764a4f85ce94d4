"""Writing a new VMDK image: its descriptor and its extents."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ...abilities import StreamWriter
from ...contract import Barrier, Create, MetaWrite, Procedure, Progress, Truncate, Write
from ...errors import UsageError
from ...hints import Any
from ...records import NamedTuple
from ...units import SECTOR, align_up
from .backing import parent_cid
from .cid import TAG, new_cid
from .descriptor import (
    MAX_EMBEDDED,
    MAX_EXTENTS,
    NO_CONTENT,
    RW,
    ExtentLine,
    between_quotes,
    format_extent,
)

SLOT = "file"
SPLIT = 1 << 31
"""Bytes of an extent of the split kinds."""
ADAPTERS = ("ide", "buslogic", "lsilogic", "legacyESX")
PREALLOCATIONS = ("off", "falloc", "full")
_TOOLS_VERSION = "2147483647"  # "unknown" to VMware's tools
_SECTORS_PER_TRACK = 63
_HARDWARE = {False: "4", True: "6"}  # by compat6


class Kind(NamedTuple):
    """One subformat: the type in its extent lines, how its files are called (None: the extent is
    in the image file itself), and whether there is one per 2 GiB."""

    type: str
    suffix: str | None
    split: bool = False

    @property
    def flat(self) -> bool:
        """Its extents have no tables."""
        return self.type in ("FLAT", "VMFS")


SUBFORMATS = {
    "monolithicSparse": Kind("SPARSE", None),
    "monolithicFlat": Kind("FLAT", "-flat"),
    "twoGbMaxExtentSparse": Kind("SPARSE", "-s{:03}", True),
    "twoGbMaxExtentFlat": Kind("FLAT", "-f{:03}", True),
    "streamOptimized": Kind("SPARSE", None),
    "vmfs": Kind("VMFS", "-flat"),
    "vmfsSparse": Kind("VMFSSPARSE", "-delta"),
    "seSparse": Kind("SESPARSE", "-sesparse"),
}


class Wanted(NamedTuple):
    """Checked create options; ``size`` in bytes."""

    size: int
    subformat: str
    kind: Kind
    zeroed_grain: bool
    preallocation: str
    extents: list[ExtentLine]
    text: bytes


def check_options(options: Mapping[str, Any]) -> Wanted:
    """Check the create options and make the descriptor.

    Raises UsageError, with the words that scripts know from qemu-img where it has them.
    """
    size = options.get("size")
    if size is None or size < 0:
        raise UsageError("Image size must be specified")
    size = align_up(int(size), SECTOR)
    subformat = str(options.get("subformat") or "monolithicSparse")
    kind = SUBFORMATS.get(subformat)
    if kind is None:
        raise UsageError(f"invalid parameter value: {subformat}")
    backing = options.get("backing_file") or None
    zeroed = bool(options.get("zeroed_grain"))
    if backing is not None and (options.get("backing_fmt") or "vmdk") != "vmdk":
        raise UsageError("backing_file must be a vmdk image")
    if kind.flat and backing is not None:
        raise UsageError("Flat image can't have backing file")
    if kind.flat and zeroed:
        raise UsageError("Flat image can't enable zeroed grain")
    if zeroed and kind.type != "SPARSE":
        raise UsageError(f"{subformat} images have no zeroed grains to enable")
    preallocation = str(options.get("preallocation") or "off")
    if preallocation not in PREALLOCATIONS:
        raise UsageError(f"Parameter 'preallocation' does not accept value '{preallocation}'")
    if preallocation != "off" and not kind.flat:
        raise UsageError(f"Preallocation is not supported for subformat '{subformat}'")
    level = options.get("compression_level")
    if level is not None and subformat != "streamOptimized":
        raise UsageError(f"{subformat} images are not compressed")
    if level is not None and not 1 <= level <= 9:
        raise UsageError(f"Compression level {level} is not between 1 and 9")
    extents = list(split(size // SECTOR, kind, str(options.get("file-name") or "disk.vmdk")))
    if options.get("extents") is not None:
        extents = _named(extents, kind, options["extents"])
    text = new_text(options, subformat, size // SECTOR, extents, backing)
    if kind.suffix is None and len(text) > MAX_EMBEDDED:
        raise UsageError("The descriptor is too large")
    return Wanted(size, subformat, kind, zeroed, preallocation, extents, text)


def split(sectors: int, kind: Kind, file_name: str) -> Iterator[ExtentLine]:
    """The extents of a new image; a disk of size 0 has an empty one."""
    bare = file_name.replace("\\", "/").rpartition("/")[2]
    most = SPLIT // SECTOR if kind.split else max(sectors, 1)
    count = max(-(-sectors // most), 1)
    if count > MAX_EXTENTS:
        raise UsageError(
            f"An image of {sectors * SECTOR} bytes would have more than {MAX_EXTENTS} extents"
        )
    offset = 0 if kind.type == "FLAT" else None
    for index in range(count):
        if kind.suffix is None:  # nobody looks for this file, which is the image itself
            name = re.sub('["\\r\\n\\0]', "_", bare)
        else:
            name = extent_name(bare, kind.suffix, index + 1)
        length = min(most, sectors - index * most)
        yield ExtentLine(RW, length, kind.type, name, offset)


def _named(extents: list[ExtentLine], kind: Kind, names: Sequence[str]) -> list[ExtentLine]:
    """The same in files that the caller has chosen."""
    needed = 0 if kind.suffix is None else len(extents)
    if len(names) < needed:
        raise UsageError(f"Extent [{len(names)}] not specified")
    if len(names) > needed:
        raise UsageError("List of extents contains unused extents")
    if not names:
        return extents
    return [line._replace(name=name) for line, name in zip(extents, names, strict=True)]


def extent_name(bare: str, suffix: str, number: int) -> str:
    """``x.vmdk`` becomes ``x-s001.vmdk``: the suffix stands before the last dot."""
    stem, dot, extension = bare.rpartition(".")
    if not dot:
        stem, extension = bare, ""
    return stem + suffix.format(number) + dot + extension


def new_text(
    options: Mapping[str, Any],
    subformat: str,
    sectors: int,
    extents: list[ExtentLine],
    backing: str | None,
) -> bytes:
    """The text of a new descriptor, laid out as qemu-img has it.  Raises UsageError."""
    adapter = str(options.get("adapter_type") or "ide")
    if adapter not in ADAPTERS:
        raise UsageError(f"invalid parameter value: {adapter}")
    compat6 = bool(options.get("compat6"))
    hardware = options.get("hwversion")
    if hardware in (None, "undefined"):
        hardware = _HARDWARE[compat6]
    elif compat6:
        raise UsageError("compat6 cannot be enabled with hwversion set")
    tools = options.get("toolsversion") or _TOOLS_VERSION
    parent, hint = NO_CONTENT, ""
    if backing is not None:
        identity = options.get("backing_identity")
        parent = parent_cid(None if identity is None else str(identity), NO_CONTENT)
        hint = f"parentFileNameHint={between_quotes(backing)}"
    heads = 16 if adapter == "ide" else 255
    hint_and_names = "\n".join([hint, *map(format_extent, extents)])
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        *([] if hint_and_names.isascii() else ['encoding="UTF-8"']),
        f"CID={new_cid():08x}",
        f"parentCID={parent:08x}",
        f'createType="{subformat}"',
        hint,
        "# Extent description",
        *map(format_extent, extents),
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        f"ddb.virtualHWVersion = {between_quotes(str(hardware))}",
        f'ddb.geometry.cylinders = "{sectors // (heads * _SECTORS_PER_TRACK)}"',
        f'ddb.geometry.heads = "{heads}"',
        f'ddb.geometry.sectors = "{_SECTORS_PER_TRACK}"',
        f'ddb.adapterType = "{adapter}"',
        f"ddb.toolsVersion = {between_quotes(str(tools))}",
        "",
    ]
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def create_image(options: Mapping[str, Any]) -> Procedure:
    """The creation procedure; see `declare.Driver`.

    The extents are written first and the descriptor last: without it there is no image.  Raises
    UsageError before it yields its first request.
    """
    wanted = check_options(options)
    if wanted.kind.suffix is None:
        if wanted.subformat == "streamOptimized":
            yield from _stream(wanted)
        else:
            yield from _sparse(wanted, SLOT, wanted.extents[0].sectors, wanted.text)
        return
    yield Truncate(SLOT, 0)
    for number, extent in enumerate(wanted.extents):
        slot = f"extent.{number}"
        assert extent.name is not None
        yield Create(slot, extent.name)
        yield from new_extent(wanted, slot, extent.sectors)
        yield Progress(number + 1, len(wanted.extents))
    yield Barrier()
    yield Write([MetaWrite(SLOT, 0, wanted.text, TAG)])
    yield Barrier()


def new_extent(wanted: Wanted, slot: str, sectors: int) -> Procedure:
    """Write an extent of ``sectors`` into an empty file."""
    if wanted.kind.flat:
        yield Truncate(slot, sectors * SECTOR, wanted.preallocation)
    elif wanted.kind.type == "SESPARSE":
        from .sesparse.header import new_sesparse

        yield from new_sesparse(slot, sectors)
    else:
        yield from _sparse(wanted, slot, sectors, None)


def _sparse(wanted: Wanted, slot: str, sectors: int, text: bytes | None) -> Procedure:
    from .sparse.layout import new_cowd, new_hosted

    if wanted.kind.type == "VMFSSPARSE":
        yield from new_cowd(slot, sectors)
    else:
        yield from new_hosted(slot, sectors, text, wanted.zeroed_grain)


def stream_writer(options: Mapping[str, Any]) -> StreamWriter | None:
    """The `StreamWriter` of these options; None where the image is not a stream."""
    if (options.get("subformat") or "") != "streamOptimized" or options.get("backing_file"):
        return None
    from .stream.writer import DEFAULT_LEVEL, StreamOptimized

    wanted = check_options(options)
    level = options.get("compression_level") or DEFAULT_LEVEL
    return StreamOptimized(wanted.size, wanted.text, level)


def _stream(wanted: Wanted) -> Procedure:
    from .stream.writer import StreamOptimized

    writer = StreamOptimized(wanted.size, wanted.text)
    yield Truncate(SLOT, 0)
    offset = 0
    for make in (writer.head, writer.end):
        for part in make():
            yield Write([MetaWrite(SLOT, offset, part, TAG)])
            offset += len(part)
    yield Barrier()
