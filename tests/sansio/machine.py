"""A format driven by bytes alone: an engine of a hundred lines, for one request at a time.

It keeps the order that the contract asks for and nothing else of the real engine, evicts every
table that it may after every request, and logs writes and barriers so that crash states can be
made from any prefix.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

from diskwright.contract import (
    DISCARD,
    OP_DATA,
    OP_PACKED,
    OP_ZERO,
    WRITE,
    WRITE_PACKED,
    WRITE_ZERO,
    ZERO_UNMAP,
    Barrier,
    Compute,
    Groups,
    GuestRead,
    GuestWrite,
    Length,
    NeedMeta,
    Open,
    Plan,
    Procedure,
    Progress,
    Punch,
    Quiesce,
    Read,
    Table,
    Truncate,
    Write,
)
from diskwright.errors import DamagedData
from diskwright.extents import DATA, HOLE, PACKED, ZERO, Data, Extent, Packed


class Store:
    """Tables; `trim` evicts all that may go."""

    def __init__(self) -> None:
        self.map: dict[tuple[str, int], Table] = {}
        self.generation = 0

    def get(self, slot: str, offset: int) -> Table | None:
        return self.map.get((slot, offset))

    def put(self, slot: str, offset: int, data: Any, size: int, dirty: bool = False) -> Table:
        self.drop(slot, offset)
        table = self.map[slot, offset] = Table(0, slot, offset, data, size)
        table.dirty = dirty
        return table

    def drop(self, slot: str, offset: int) -> None:
        if self.map.pop((slot, offset), None) is not None:
            self.generation += 1

    def dirty(self) -> list[Table]:
        return [table for table in self.map.values() if table.dirty]

    def mark(self, table: Table) -> None:
        table.dirty = True

    def clear(self) -> None:
        self.map.clear()
        self.generation += 1

    def trim(self) -> None:
        for key, table in list(self.map.items()):
            if not (table.dirty or table.pins):
                del self.map[key]
                self.generation += 1


class Machine:
    """A format over byte arrays."""

    def __init__(self, file: bytes = b"", backing: bytes | None = None) -> None:
        self.slots = {"file": bytearray(file)}
        if backing is not None:
            self.slots["backing"] = bytearray(backing)
        self.log: list[tuple[Any, ...]] = []
        self.format: Any = None
        self.store = Store()
        self.opened: list[tuple[str, str | None]] = []
        self.limit = 1 << 62
        self.poison = False
        self.requests = 0

    # -- the file
    def pread(self, slot: str, offset: int, length: int) -> bytes:
        return bytes(self.slots[slot][offset : offset + length]).ljust(length, b"\0")

    def pwrite(self, offset: int, data: bytes) -> None:
        if offset + len(data) > self.limit:
            raise OSError(errno.EFBIG, "File too large")
        self.log.append(("write", offset, bytes(data)))
        put(self.slots["file"], offset, data)

    def barrier(self) -> None:
        self.log.append(("barrier",))

    # -- procedures
    def run(self, procedure: Procedure) -> Any:
        answer: Any = None
        error: BaseException | None = None
        while True:
            try:
                request = procedure.throw(error) if error else procedure.send(answer)
            except StopIteration as stop:
                self.store.clear()
                return stop.value
            answer = error = None
            self.requests += 1
            try:
                answer = self._serve(request)
            except Exception as caught:
                error = caught

    def _serve(self, request: Any) -> Any:
        if isinstance(request, Read):
            return [self.pread(request.slot, o, n) for o, n in request.ranges]
        if isinstance(request, Write):
            for write in request.writes:
                self.pwrite(write.offset, write.data)
        elif isinstance(request, Barrier):
            self.barrier()
        elif isinstance(request, Quiesce):
            self.store.clear()
        elif isinstance(request, Length):
            return len(self.slots.get(request.slot, b""))
        elif isinstance(request, Truncate):
            file = self.slots[request.slot]
            del file[request.size :]
            file.extend(bytes(request.size - len(file)))
            if request.slot == "file":
                self.log.append(("truncate", request.size))
        elif isinstance(request, Punch):
            return self._punch(request.ranges)
        elif isinstance(request, Open):
            self.opened.append((request.reference, request.format))
        elif isinstance(request, Compute):
            return request.function(*request.arguments)
        elif isinstance(request, GuestRead):
            return self.read(request.offset, request.length)
        elif isinstance(request, GuestWrite):
            self.write(request.offset, request.data)
        else:
            assert isinstance(request, Progress)
        return None

    def _punch(self, ranges: Any) -> bool:
        for part in ranges:
            self.pwrite(part.offset, (b"\xee" if self.poison else b"\0") * part.length)
        return not self.poison

    def open(self, driver: Any, **options: Any) -> Any:
        """Open with a driver's `open_format`."""
        self.format, procedure = driver.open(options)
        self.format.tables = self.store
        self.run(procedure)
        return self.format

    # -- requests
    def ask(self, question: Callable[[], Any], pins: list[Table]) -> Any:
        for _ in range(10_000):
            answer = question()
            if not isinstance(answer, NeedMeta):
                return answer
            for offset, length in answer.ranges:
                if self.store.get(answer.slot, offset) is None:
                    self.format.load(answer.slot, offset, self.pread(answer.slot, offset, length))
                table = self.store.get(answer.slot, offset)
                assert table is not None
                table.pins += 1
                pins.append(table)
        raise AssertionError("a question that is never answered")

    def unpin(self, pins: list[Table]) -> None:
        for table in pins:
            table.pins -= 1
        pins.clear()
        self.store.trim()

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, Extent]]:
        pins: list[Table] = []
        end = offset + length
        found = []
        try:
            while offset < end:
                extents, miss = self.format.map([(offset, end - offset)])
                for extent in extents:
                    assert extent.length > 0
                    found.append((offset, extent))
                    offset += extent.length
                assert offset <= end
                if offset < end and miss is not None:
                    self.ask(once(miss), pins)
        finally:
            self.unpin(pins)
        return iter(found)

    def read(self, offset: int, length: int) -> bytes:
        out = b""
        for at, extent in self.extents(offset, length):
            if extent.kind == DATA:
                out += self.pread("file", extent.host, extent.length)  # type: ignore[union-attr]
            elif extent.kind == PACKED:
                assert isinstance(extent, Packed)
                raw = self.pread("file", extent.host, extent.host_length)
                try:
                    unit = extent.codec.unpack(raw, extent.unit)
                except ValueError as error:
                    raise DamagedData(str(error)) from error
                out += unit[extent.skip : extent.skip + extent.length]
            elif extent.kind == ZERO or "backing" not in self.slots:
                assert extent.kind in (ZERO, HOLE)
                out += bytes(extent.length)
            else:
                out += self.pread("backing", at, extent.length)
        (batch,) = self.format.map_batch([offset], [length], False)
        one = self.format.map_one(offset, length, False)
        assert batch == one
        if one >= 0:
            assert self.pread("file", one, length) == out
        return out

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        host = self.format.map_one(offset, len(data), True)
        assert [host] == self.format.map_batch([offset], [len(data)], True)
        if host >= 0:
            self.pwrite(host, data)
            return
        extents = list(self.extents(offset, len(data)))
        if all(isinstance(extent, Data) and extent.writable for _, extent in extents):
            for at, extent in extents:
                assert isinstance(extent, Data)
                self.pwrite(extent.host, data[at - offset : at - offset + extent.length])
            return
        plan = self._plan([(offset, len(data))], WRITE)
        for step in plan.steps:
            if step.op == OP_ZERO:
                self.pwrite(step.host, bytes(step.length))
                continue
            assert step.op == OP_DATA
            # What the step covers beyond the request is filled by an ordinary read.
            whole = offset <= step.guest and step.guest + step.length <= end
            try:
                old = bytearray(step.length if whole else self.read(step.guest, step.length))
            except Exception:
                self.abort(plan)
                raise
            a, b = max(offset, step.guest), min(end, step.guest + step.length)
            if a < b:
                old[a - step.guest : b - step.guest] = data[a - offset : b - offset]
            self.pwrite(step.host, bytes(old))
        self._commit(plan)

    def write_packed(self, offset: int, data: bytes, fails: bool = False) -> bool:
        """Store whole units compressed; False when they are allocated.  ``fails``: the data never
        come through."""
        unit = self.format.unit
        units = {
            at: data[at - offset : at - offset + unit].ljust(unit, b"\0")
            for at in range(offset, offset + len(data), unit)
        }
        packed = {at: self.format.pack_codec.pack(plain) for at, plain in units.items()}
        ranges = [(at, len(part)) for at, part in packed.items() if len(part) < unit]
        if ranges:
            plan = self._plan(ranges, WRITE_PACKED)
            if plan is None:
                return False
            for step, (at, length) in zip(plan.steps, ranges, strict=True):
                assert (step.op, step.guest, step.length) == (OP_PACKED, at, length)
                self.pwrite(step.host, packed[at])
            if fails:
                self.abort(plan)
            else:
                self._commit(plan)
        for at, part in packed.items():
            if len(part) >= unit and not fails:
                self.write(at, units[at][: self.format.size - at])
        return True

    def _plan(self, ranges: list[tuple[int, int]], kind: str) -> Plan | Any:
        pins: list[Table] = []
        try:
            plan = self.ask(lambda: self.format.plan(ranges, kind), pins)
            if plan is not None:
                for table in plan.pins:
                    table.pins += 1
                if plan.before is not None:
                    self.write_groups(plan.before)
                    self.format.settle(plan.before.token)
        finally:
            self.unpin(pins)
        return plan

    def _commit(self, plan: Plan) -> None:
        self.format.commit(plan)
        self.unpin(list(plan.pins))

    def abort(self, plan: Plan) -> None:
        self.format.abort(plan)
        self.unpin(list(plan.pins))

    def change(self, offset: int, length: int, kind: str) -> bool:
        """WRITE_ZERO, ZERO_UNMAP or DISCARD of whole units; False when only data would do."""
        plan = self._plan([(offset, length)], kind)
        if plan is None:
            return False
        for step in plan.steps:
            self.pwrite(step.host, bytes(step.length))
        self._commit(plan)
        return True

    def zero(self, offset: int, length: int, unmap: bool = False) -> None:
        if not self.change(offset, length, ZERO_UNMAP if unmap else WRITE_ZERO):
            self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> bool:
        return self.change(offset, length, DISCARD)

    def write_groups(self, groups: Groups) -> None:
        for group in groups.groups:
            assert group
            for write in group:
                self.pwrite(write.offset, write.data)
            self.barrier()

    def flush(self) -> None:
        groups = self.format.freeze()
        for write in groups.lead:
            self.pwrite(write.offset, write.data)
        self.barrier()
        self.write_groups(groups)
        freed = self.format.settle(groups.token)
        if freed:
            self.format.release(freed, self._punch(freed))
        self.store.trim()

    def close(self) -> bytes:
        """Flush until clean, run the closing procedure; the bytes of the file."""
        for _ in range(9):
            self.flush()
            if not self.store.dirty():
                break
        assert not self.store.dirty()
        assert not any(table.pins for table in self.store.map.values())
        closing = getattr(self.format, "close", lambda: None)()
        if closing is not None:
            self.run(closing)
        return bytes(self.slots["file"])


def once(miss: NeedMeta) -> Callable[[], Any]:
    """A question that is answered once its tables are there."""
    answers: list[Any] = [None, miss]
    return answers.pop


def put(file: bytearray, offset: int, data: bytes) -> None:
    if offset > len(file):
        file.extend(bytes(offset - len(file)))
    file[offset : offset + len(data)] = data
