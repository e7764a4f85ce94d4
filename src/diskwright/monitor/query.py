"""Commands that tell of nodes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ..engine.node import Node
from ..graph.display import display_name
from ..graph.graph import chain
from ..graph.options import Mode
from ..ops.info import NodeInfo, describe
from ..records import NamedTuple
from .bitmaps import BlockDirtyInfo, listed
from .commands import command
from .session import Monitor
from .snapshots import SnapshotInfo, told
from .types import ANY

Permission = Literal["consistent-read", "write", "write-unchanged", "resize"]
_PERMISSIONS = ("resize", "write-unchanged", "write", "consistent-read")


class ImageInfo(NamedTuple):
    """What an image is.  Sizes in bytes."""

    filename: str
    format: str
    virtual_size: int
    dirty_flag: bool | None = None
    actual_size: int | None = None
    cluster_size: int | None = None
    encrypted: bool | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    snapshots: list[SnapshotInfo] | None = None
    format_specific: Annotated[dict[str, Any], ANY] | None = None
    backing_image: Annotated[Any, ANY] | None = None


class CacheInfo(NamedTuple):
    """How a node uses caches."""

    writeback: bool
    direct: bool
    no_flush: bool


class BlockDeviceInfo(NamedTuple):
    """A node.  There is no throttling, so the limits are 0."""

    file: str
    ro: bool
    drv: str
    backing_file_depth: int
    active: bool
    encrypted: bool
    detect_zeroes: Literal["off", "on", "unmap"]
    bps: int
    bps_rd: int
    bps_wr: int
    iops: int
    iops_rd: int
    iops_wr: int
    image: ImageInfo
    cache: CacheInfo
    write__threshold: int
    node_name: str | None = None
    backing__file: str | None = None
    dirty_bitmaps: list[BlockDirtyInfo] | None = None


class GraphNode(NamedTuple):
    """A node of the graph."""

    id: int
    type: Literal["block-driver", "block-backend"]
    name: str


class GraphEdge(NamedTuple):
    """A parent's use of a child: ``perm`` is what it needs, ``shared-perm`` what it lets others
    do."""

    parent: int
    child: int
    name: str
    perm: list[Permission]
    shared_perm: list[Permission]


class BlockGraph(NamedTuple):
    """All nodes and edges."""

    nodes: list[GraphNode]
    edges: list[GraphEdge]


@command("query-named-block-nodes")
async def query_named_block_nodes(monitor: Monitor, flat: bool = False) -> list[BlockDeviceInfo]:
    """List all nodes, those that were opened last first.  ``flat`` leaves out what is below each
    (``backing-image``), which is in the list for itself."""
    return [
        await _device(node, flat)
        for node in reversed(list(monitor.daemon.graph.nodes.values()))
    ]


async def _device(node: Node, flat: bool) -> BlockDeviceInfo:
    found = describe(node)
    mode = node.mode or Mode()
    return BlockDeviceInfo(
        file=found.filename,
        ro=node.read_only,
        drv=node.driver_name,
        backing_file_depth=0 if flat else sum(1 for _ in chain(node)) - 1,
        active=True,
        encrypted=found.encrypted,
        detect_zeroes=node.detect_zeroes,  # type: ignore[arg-type]
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=_image(node, found, flat),
        cache=CacheInfo(True, mode.direct, mode.no_flush),
        write__threshold=node.watch.threshold if node.watch is not None else 0,
        node_name=node.name,
        backing__file=_backing_name(node) or found.full_backing_name or found.backing_name,
        dirty_bitmaps=await listed(node),
    )


def _backing_name(node: Node) -> str | None:
    below = node.child("backing")
    return None if below is None else display_name(below)


def _image(node: Node, found: NodeInfo, flat: bool) -> ImageInfo:
    keys = found.to_dict()
    del keys["children"]
    snapshots = [told(one) for one in keys.pop("snapshots", ())] or None
    below = node.child("backing")
    image = ImageInfo(
        **{name.replace("-", "_"): value for name, value in keys.items()}, snapshots=snapshots
    )
    if below is not None and not flat:
        image = image._replace(backing_image=_image(below, describe(below), flat))
    return image


class BlockInfo(NamedTuple):
    """An export, as a disk that somebody uses; there are no drives with media and trays."""

    device: str
    type: str
    removable: bool
    locked: bool
    qdev: str | None = None
    inserted: BlockDeviceInfo | None = None


@command("query-block")
async def query_block(monitor: Monitor) -> list[BlockInfo]:
    """List the exports, each with the node that it shows; ``qdev`` is the export's id."""
    return [
        BlockInfo("", "unknown", False, False, export.id, await _device(export.node, False))
        for export in monitor.daemon.exports.values()
    ]


@command("x-debug-query-block-graph", features=("unstable",))
def x_debug_query_block_graph(monitor: Monitor) -> BlockGraph:
    """Tell how all nodes hang together, and what each needs of those below it."""
    daemon = monitor.daemon
    ids: dict[Any, int] = {}
    nodes, edges = [], []
    for node in daemon.graph.nodes.values():
        ids[node] = len(ids) + 1
        nodes.append(GraphNode(ids[node], "block-driver", node.name))
    for node in daemon.graph.nodes.values():
        edges += [
            GraphEdge(ids[node], ids[edge.child], edge.slot, _listed(edge.perms),
                      _listed(edge.shared))
            for edge in node.children.values()
        ]  # fmt: skip
    for export in daemon.exports.values():
        ids[export] = len(ids) + 1
        nodes.append(GraphNode(ids[export], "block-backend", ""))
        use = daemon.use_of(export.node, export.user)
        perms, shared = _listed(use.perms), _listed(use.shared)
        edges.append(GraphEdge(ids[export], ids[export.node], "root", perms, shared))
    return BlockGraph(nodes[::-1], edges[::-1])


def _listed(perms: frozenset[str]) -> list[Permission]:
    return [name for name in _PERMISSIONS if name in perms]  # type: ignore[misc]
