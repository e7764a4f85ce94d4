"""What an image is: format, sizes, backing file, and what its format tells of itself."""

from __future__ import annotations

from collections.abc import Mapping

from ..abilities import SnapshotInfo
from ..engine.kernel import BaseDriver
from ..errors import DiskError, ImageError
from ..graph.display import display_name
from ..graph.graph import leaf_of
from ..graph.named import backing_names, located, meaning
from ..graph.node import Node
from ..graph.opener import close_disk
from ..graph.registry import kind
from ..hints import Any
from ..records import NamedTuple
from ..units import SECTOR, align_up
from .images import ImageSpec, OpenFailed


class NodeInfo(NamedTuple):
    """One node.  Sizes in bytes; None and empty: does not apply or is not known.

    ``full_backing_name`` is what the backing file's name means from here, None where that cannot
    be told; ``children`` are (slot, information) without the backing file.
    """

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None
    is_protocol: bool
    cluster_size: int = 0
    dirty: bool | None = None
    encrypted: bool = False
    backing_name: str | None = None
    backing_format: str | None = None
    full_backing_name: str | None = None
    specific: dict[str, Any] | None = None
    snapshots: tuple[SnapshotInfo, ...] = ()
    children: tuple[tuple[str, NodeInfo], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``qemu-img info --output=json``, in its order."""
        return info_dict(self)


async def info(driver: BaseDriver, spec: ImageSpec) -> NodeInfo:
    """Information about one image; its backing file is not opened."""
    node = await spec.open(driver, backing=False, check=True, metadata_only=True)
    try:
        return describe(node)
    finally:
        await close_disk(node)


async def info_chain(driver: BaseDriver, spec: ImageSpec) -> list[NodeInfo]:
    """Information about an image and all below it, each opened by what the one above says.

    Raises ImageError when the chain comes back to itself.
    """
    found: list[NodeInfo] = []
    seen: set[str] = set()
    while True:
        if spec.name in seen:
            raise ImageError(f"Backing file '{spec.name}' creates an infinite loop.")
        seen.add(spec.name)
        node = await spec.open(driver, backing=False, check=True, metadata_only=True)
        try:
            last = describe(node)
            found.append(last)
            if last.backing_name is None:
                return found
            name = _below(spec, node, last)
        finally:
            await close_disk(node)
        spec = spec._replace(name=name, reference=name, format=last.backing_format)


def _below(spec: ImageSpec, node: Node, last: NodeInfo) -> str:
    """The reference of the backing file that ``node`` names.  Raises OpenFailed."""
    if last.full_backing_name is None:
        raise OpenFailed(
            last.filename, ImageError(f"cannot tell what '{last.backing_name}' means from here")
        )
    try:
        return located(spec.gate, node, backing_names(node)).reference
    except DiskError as error:
        raise OpenFailed(last.full_backing_name, error) from error


def describe(node: Node) -> NodeInfo:
    """Information about an open node and its children."""
    # In qemu-img's order and names (measured with 10.0): what was opened last comes first.
    children = tuple(
        (slot.replace("extent.", "extents.", 1), describe(edge.child))
        for slot, edge in reversed(node.children.items())
        if slot != "backing"
    )
    format = getattr(node, "format", None)
    protocol = kind(node.driver_name) == "protocol"
    size = align_up(node.size, SECTOR)
    common = NodeInfo(
        filename=display_name(node),
        format=node.driver_name,
        virtual_size=size,
        actual_size=actual_size(node),
        is_protocol=protocol,
        children=children,
        dirty=_dirty(node),
    )
    if format is None:
        specific: dict[str, Any] | None = (
            {} if node.driver_name in ("file", "host_device") else None
        )
        cluster = children[0][1].cluster_size if kind(node.driver_name) == "filter" else 0
        return common._replace(specific=specific, cluster_size=cluster)
    name = format.backing_file or None
    return common._replace(
        cluster_size=getattr(format, "cluster_size", 0),
        encrypted=bool(getattr(format, "encrypted", False)),
        backing_name=name,
        backing_format=format.backing_format,
        full_backing_name=None if name is None else full_backing_name(node, name),
        specific=format.info() or None,
        snapshots=tuple(getattr(format, "snapshots", ())),
    )


def info_dict(info: NodeInfo) -> dict[str, Any]:
    """The keys of ``qemu-img info --output=json``, in its order (measured with 10.0)."""
    out: dict[str, Any] = {
        "children": [{"name": slot, "info": info_dict(child)} for slot, child in info.children]
    }
    if info.backing_name is not None and info.backing_format:
        out["backing-filename-format"] = info.backing_format
    if info.snapshots:
        out["snapshots"] = [found.to_dict() for found in info.snapshots]
    out["virtual-size"] = info.virtual_size
    out["filename"] = info.filename
    if info.cluster_size:
        out["cluster-size"] = info.cluster_size
    out["format"] = info.format
    if info.actual_size is not None:
        out["actual-size"] = info.actual_size
    if info.specific is not None:
        out["format-specific"] = {"type": info.format, "data": info.specific}
    if info.full_backing_name is not None:
        out["full-backing-filename"] = info.full_backing_name
    if info.encrypted:
        out["encrypted"] = True
    if info.backing_name is not None:
        out["backing-filename"] = info.backing_name
    if info.dirty is not None:
        out["dirty-flag"] = info.dirty
    return out


def full_backing_name(node: Node, name: str) -> str | None:
    """What the backing file's name ``name`` means from ``node``; None where nobody can tell."""
    try:
        return meaning(node, name)
    except DiskError:
        return None


def actual_size(node: Node) -> int | None:
    """Bytes that the host has allocated for all files of a node's own; None where it does not
    say."""
    if node.driver_name == "blkdebug":
        return None
    below = [edge.child for slot, edge in node.children.items() if slot != "backing"]
    if below:
        sizes = [actual_size(child) for child in below]
        return None if None in sizes else sum(filter(None, sizes))
    measure = getattr(node, "disk_size", None)
    if measure is not None:
        found: int | None = measure()
        return found
    return 0 if node.driver_name in ("null-co", "null-aio", "memory") else None


def nested(data: Mapping[str, Any], indent: str) -> list[str]:
    """Facts of a format in lines, as ``qemu-img info`` shows them."""
    lines: list[str] = []
    for key, value in data.items():
        _item(lines, indent, key.replace("-", " "), value)
    return lines


def _item(lines: list[str], indent: str, name: str, value: Any) -> None:
    if isinstance(value, dict):
        lines.append(f"{indent}{name}:")
        lines.extend(nested(value, indent + "    "))
    elif isinstance(value, list):
        lines.append(f"{indent}{name}:")
        for index, part in enumerate(value):
            _item(lines, indent + "    ", f"[{index}]", part)
    else:
        shown = ("true" if value else "false") if isinstance(value, bool) else value
        lines.append(f"{indent}{name}: {shown}")


def _dirty(node: Node) -> bool | None:
    """Whether the image was not closed cleanly; None where its driver cannot tell."""
    known = getattr(getattr(node, "format", None), "dirty", None)
    if isinstance(known, bool):
        return known
    leaf = leaf_of(node)
    if leaf.driver_name in ("file", "host_device"):
        return False
    return None


__all__ = ["NodeInfo", "actual_size", "describe", "full_backing_name", "info", "info_chain"]
