"""What both Python APIs offer of internal snapshots: ``disk.snapshots``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..abilities import SnapshotInfo
from ..graph.node import Node
from . import snapshots as ops
from .snapshots import Selector

Buffer = bytes | bytearray | memoryview


class Snapshots:
    """The internal snapshots of an open disk.  One is named by its id or else by its name; those
    that are not there raise NoSuchSnapshot, formats without snapshots NotSupported."""

    def __init__(self, node: Callable[[], Node], call: Any) -> None:
        self._node = node
        self._call = call
        """Runs a coroutine on the disk's driver."""

    def list(self) -> list[SnapshotInfo]:
        """All of them, in the order of the image."""
        return [*ops.listed(self._node())]

    def create(
        self,
        name: str,
        *,
        vm_state_size: int = 0,
        vm_clock_nsec: int = 0,
        icount: int | None = None,
        date: float | None = None,
    ) -> SnapshotInfo:
        """Take one of what the disk is now.  ``vm_state_size`` bytes of VM state that was written
        go with it; ``date`` is seconds since 1970 (None: now)."""
        node = self._node()
        made: SnapshotInfo = self._call(
            lambda: ops.create(
                node,
                name,
                vm_state_size=vm_state_size,
                vm_clock_nsec=vm_clock_nsec,
                icount=icount,
                date=date,
            )
        )
        return made

    def apply(self, snapshot: str) -> None:
        """Make the disk what it was, its size included; what it is now is lost."""
        node = self._node()
        self._call(lambda: ops.apply(node, Selector(either=snapshot)))

    def delete(self, snapshot: str) -> None:
        """Give one up, and the space that nothing else uses."""
        node = self._node()
        self._call(lambda: ops.delete(node, Selector(either=snapshot)))

    def show(self, snapshot: str) -> None:
        """Let this disk, which was opened for reading, be that snapshot until it is closed."""
        node = self._node()
        self._call(lambda: ops.show(node, Selector(either=snapshot)))

    def read_vm_state(self, offset: int, length: int) -> bytes:
        """Bytes of the VM state; zeroes where none were written."""
        node = self._node()
        data: bytes = self._call(lambda: ops.read_vm_state(node, offset, length))
        return data

    def write_vm_state(self, offset: int, data: Buffer) -> None:
        """Write VM state, which the next snapshot takes."""
        node = self._node()
        self._call(lambda: ops.write_vm_state(node, offset, bytes(data)))


class AsyncSnapshots:
    """The internal snapshots of an open disk; see :class:`Snapshots`."""

    def __init__(self, node: Callable[[], Node], call: Any) -> None:
        self._node = node
        self._call = call
        """Runs a coroutine on the disk's driver."""

    def list(self) -> list[SnapshotInfo]:
        """All of them, in the order of the image."""
        return [*ops.listed(self._node())]

    async def create(
        self,
        name: str,
        *,
        vm_state_size: int = 0,
        vm_clock_nsec: int = 0,
        icount: int | None = None,
        date: float | None = None,
    ) -> SnapshotInfo:
        """Take one of what the disk is now."""
        work = ops.create(
            self._node(),
            name,
            vm_state_size=vm_state_size,
            vm_clock_nsec=vm_clock_nsec,
            icount=icount,
            date=date,
        )
        made: SnapshotInfo = await self._call(work)
        return made

    async def apply(self, snapshot: str) -> None:
        """Make the disk what it was, its size included."""
        await self._call(ops.apply(self._node(), Selector(either=snapshot)))

    async def delete(self, snapshot: str) -> None:
        """Give one up."""
        await self._call(ops.delete(self._node(), Selector(either=snapshot)))

    async def show(self, snapshot: str) -> None:
        """Let this disk, which was opened for reading, be that snapshot until it is closed."""
        await self._call(ops.show(self._node(), Selector(either=snapshot)))

    async def read_vm_state(self, offset: int, length: int) -> bytes:
        """Bytes of the VM state; zeroes where none were written."""
        data: bytes = await self._call(ops.read_vm_state(self._node(), offset, length))
        return data

    async def write_vm_state(self, offset: int, data: Buffer) -> None:
        """Write VM state, which the next snapshot takes."""
        await self._call(ops.write_vm_state(self._node(), offset, bytes(data)))
