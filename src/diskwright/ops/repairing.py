"""Repairs that are rehearsed: shown, or carried out once their old bytes are safe."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..engine.kernel import BaseDriver
from ..errors import DiskError, UsageError
from ..filters import rehearsal as rh
from ..filters.rehearsal import Rehearsal
from ..graph.closing import discard_disk
from ..graph.mapped import MappedNode
from ..graph.node import Node
from ..graph.opener import close_disk
from ..records import NamedTuple
from .images import ImageSpec

if TYPE_CHECKING:
    from .check import Checked

_MOST_TOLD = 10_000

# What an announced write is about, in the words of any format.
_WORDS = {
    "l1_update": "entries of the first-level table",
    "l1_grow_write_table": "a new first-level table",
    "l2_update": "entries of a mapping table",
    "l2_alloc_write": "a new mapping table",
    "refblock_update": "reference counts",
    "refblock_update_part": "reference counts",
    "refblock_alloc": "a new block of reference counts",
    "refblock_alloc_write_blocks": "new blocks of reference counts",
    "refblock_alloc_write_table": "a new refcount table",
    "refblock_alloc_hookup": "an entry of the refcount table",
    "refblock_alloc_switch_table": "the place of the refcount table",
    "reftable_update": "entries of the refcount table",
    "cow_write": "a copy of data in a place of its own",
    "header_update": "the header",
    "descriptor_update": "the descriptor",
}


class Change(NamedTuple):
    """One change that a repair would make to ``file``, in bytes.

    ``action``: ``write``, ``zero``, or ``resize`` (``offset`` is the new length).  ``what`` says in
    words what stands there, "" where nobody said.
    """

    file: str
    action: str
    offset: int
    length: int
    what: str


class Plan(NamedTuple):
    """All that a repair would write: the first 10,000 ``changes`` in their order, and how many
    ``writes`` and ``bytes`` all of them are.  Changes that continue each other are one."""

    changes: tuple[Change, ...] = ()
    writes: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``diskwright check -r all --dry-run --output=json`` that tell it."""
        return {
            "planned": [change._asdict() for change in self.changes],
            "planned-writes": self.writes,
            "planned-bytes": self.bytes,
        }


def plan_of(rehearsal: Rehearsal) -> Plan:
    """What the rehearsal would do to the files."""
    names = [str(file.options.get("filename", "")) for file in rehearsal.files]
    changes: list[Change] = []
    writes = total = 0
    last: Change | None = None
    for entry in rehearsal.entries():
        if entry.kind == rh.FLUSH:
            continue
        if entry.kind == rh.LENGTH:
            action, what = "resize", "the length of the file"
        else:
            action = "write" if entry.kind == rh.WRITE else "zero"
            what = _WORDS.get(entry.tag, "" if action == "write" else "space that is given back")
        change = Change(names[entry.file], action, entry.offset, entry.length, what)
        if last is not None and _continues(last, change):
            last = last._replace(length=last.length + change.length)
            if writes <= _MOST_TOLD:
                changes[-1] = last
            total += change.length
            continue
        writes += 1
        total += 0 if action == "resize" else change.length
        last = change
        if writes <= _MOST_TOLD:
            changes.append(change)
    return Plan(tuple(changes), writes, total)


def _continues(last: Change, change: Change) -> bool:
    same = (change.file, change.action, change.what) == (last.file, last.action, last.what)
    return same and change.action != "resize" and last.offset + last.length == change.offset


async def rehearse(
    driver: BaseDriver,
    spec: ImageSpec,
    rehearsal: Rehearsal,
    work: Callable[[Node], object],
) -> Checked:
    """Open the disk over the rehearsal, have ``work(node)`` (a coroutine) done and close it."""
    node = await spec.open(
        driver, backing=False, check=True, writable=True, resize=True, stage=rehearsal
    )
    try:
        if isinstance(node, MappedNode):
            node.creations = node.engine.creator = None  # a file that is made stays
        done: Checked = await work(node)  # type: ignore[misc]
    except BaseException:
        await discard_disk(node)
        raise
    await close_disk(node)
    return done


class HalfDone(DiskError):
    """A repair could not be carried out to its end; ``undo_file`` takes it back."""

    def __init__(self, undo_file: str, cause: OSError | DiskError) -> None:
        self.undo_file, self.cause = undo_file, cause
        super().__init__(
            f"the repair was not finished: {cause}; 'check --undo {undo_file}' takes it back, and "
            "repairing again goes on with it"
        )


async def carry_out(rehearsal: Rehearsal, undo_file: str, replace: bool) -> int:
    """Save the old bytes in ``undo_file``, then do to the files what was rehearsed.

    Returns the bytes of the undo file; 0, and it is not made, when nothing would be changed.
    Raises HalfDone when the files could not be written.
    """
    from .undo import save

    if not rehearsal.changed:
        return 0
    size = await save(rehearsal, undo_file, replace)
    try:
        await rehearsal.carry_out()
    except (OSError, DiskError) as error:
        raise HalfDone(undo_file, error) from error
    return size


def check_undo_file(path: str, replace: bool) -> None:
    """Raise UsageError when ``path`` cannot become an undo file."""
    if os.path.lexists(path) and not replace:
        raise UsageError(f"'{path}' exists already; --force lets it be replaced")
