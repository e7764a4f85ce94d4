"""Internal snapshots of an open disk, and the VM state that goes with them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..abilities import SnapshotInfo, Snapshots
from ..errors import NoSuchSnapshot, NotSupported, UsageError
from ..hints import TYPE_CHECKING, Any
from ..records import NamedTuple

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..graph.node import Node

# Bytes of VM state that are moved at once.
_PIECE = 1 << 20
_PREFIX = "snapshot."


class Selector(NamedTuple):
    """Which snapshot: by id and name (None: any), or ``either``, an id or else a name."""

    id: str | None = None
    name: str | None = None
    either: str | None = None

    @classmethod
    def parse(cls, text: str) -> Selector:
        """``snapshot.id=ID,snapshot.name=NAME`` (one of them may do), or an id or name.

        Raises UsageError.
        """
        if not text.startswith(_PREFIX):
            return cls(either=text)
        found: dict[str, str] = {}
        for part in text.replace(",,", "\0").split(","):
            key, _, value = part.replace("\0", ",").partition("=")
            if key not in ("snapshot.id", "snapshot.name"):
                raise UsageError(f"Invalid parameter '{key}'")
            found[key.removeprefix(_PREFIX)] = value
        return cls(**found)


def ability(node: Node) -> Snapshots | None:
    """What the disk's format can do; None when it has no snapshots."""
    format: Any = getattr(node, "format", None)
    return format if hasattr(format, "create_snapshot") else None


def listed(node: Node) -> Sequence[SnapshotInfo]:
    """All snapshots of a disk; none of one whose format has no such thing."""
    found = ability(node)
    return () if found is None else found.snapshots


def find(node: Node, wanted: Selector) -> SnapshotInfo:
    """The snapshot that is meant.  Raises NoSuchSnapshot."""
    known = listed(node)
    if wanted.either is not None:
        for found in known:
            if found.id == wanted.either:
                return found
        wanted = Selector(name=wanted.either)
    for found in known:
        if wanted.id in (None, found.id) and wanted.name in (None, found.name):
            return found
    raise NoSuchSnapshot


def _needed(node: Node, what: str) -> Snapshots:
    found = ability(node)
    if found is None:
        raise NotSupported(what)
    return found


async def create(
    node: Node,
    name: str,
    *,
    vm_state_size: int = 0,
    vm_clock_nsec: int = 0,
    icount: int | None = 0,
    date: float | None = None,
) -> SnapshotInfo:
    """Take a snapshot.  ``vm_state_size`` bytes that were saved behind the disk go with it;
    ``date`` is seconds since 1970 (None: now)."""
    format = _needed(node, "Operation not supported")
    if not 0 <= vm_state_size < 1 << 63 or not 0 <= vm_clock_nsec < 1 << 64:
        raise UsageError("the VM's state and clock are not negative, and have 64 bits")
    nanoseconds = time.time_ns() if date is None else int(date * 1_000_000_000)
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    if not 0 <= seconds < 1 << 32:
        raise UsageError("a snapshot's date is between 1970 and 2106")
    info = SnapshotInfo("", name, vm_state_size, seconds, rest, vm_clock_nsec, icount)
    made: SnapshotInfo = await _run(node, format.create_snapshot(info))
    return made


async def apply(node: Node, wanted: Selector) -> None:
    """Make the disk what it was when the snapshot was taken; what it is now is lost."""
    format = _needed(node, "Block driver does not support snapshots")
    await _run(node, format.apply_snapshot(find(node, wanted).id, None))


async def delete(node: Node, wanted: Selector) -> None:
    """Give a snapshot up."""
    format = ability(node)
    if format is None:
        raise NoSuchSnapshot
    found = find(node, wanted)
    await _run(node, format.delete_snapshot(found.id, found.name))


async def show(node: Node, wanted: Selector) -> None:
    """Let a node that was opened for reading be the disk of a snapshot."""
    format = _needed(
        node,
        f"Block format '{node.driver_name}' used by device '' does not support temporarily loading "
        "internal snapshots",
    )
    if not node.read_only:
        raise UsageError("a snapshot is shown by a disk that is opened for reading")
    found = find(node, wanted)
    await _run(node, format.show_snapshot(found.id, found.name))


async def read_vm_state(node: Node, offset: int, length: int) -> bytes:
    """Bytes of the VM state; zeroes where none were saved."""
    from ..engine.beyond import read_beyond

    format, engine = _state_of(node, offset)
    stored = max(min(length, format.vm_state_room - offset), 0)
    out = bytearray()
    while len(out) < stored:
        size = min(_PIECE, stored - len(out))
        out += await read_beyond(engine, format.vm_state_offset + offset + len(out), size)
    return bytes(out).ljust(length, b"\0")


async def write_vm_state(node: Node, offset: int, data: bytes) -> None:
    """Save bytes of VM state behind the disk, for the next snapshot to take."""
    format, engine = _state_of(node, offset)
    if node.read_only:
        raise PermissionError(1, "Operation not permitted: the node is read-only")
    for at in range(0, len(data), _PIECE):
        await _write_piece(node, format, engine, offset + at, data[at : at + _PIECE])
    if getattr(node, "writethrough", False):
        await node.flush()


async def _write_piece(
    node: Node, format: Snapshots, engine: Engine, offset: int, data: bytes
) -> None:
    from ..engine.beyond import write_beyond

    def place() -> int | None:
        fits = offset + len(data) <= format.vm_state_room
        return format.vm_state_offset + offset if fits else None

    while not await write_beyond(engine, place, data):
        if place() is None:
            await _run(node, format.grow_vm_state(offset + len(data)))


def _state_of(node: Any, offset: int) -> tuple[Snapshots, Engine]:
    format = _needed(node, "Operation not supported")
    if offset < 0:
        raise UsageError("offsets are not negative")
    return format, node.engine


async def _run(node: Any, procedure: Any) -> Any:
    try:
        return await node.run_procedure(procedure)
    finally:
        node.changed()
