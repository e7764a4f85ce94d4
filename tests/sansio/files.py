"""A machine over several files, as a VMDK image has them: each slot writes to its own."""

from __future__ import annotations

from typing import Any

from diskwright.contract import (
    OP_DATA,
    OP_ZERO,
    WRITE,
    Create,
    Groups,
    Open,
    Punch,
    Truncate,
    Write,
)
from diskwright.extents import DATA, Data
from sansio.machine import Machine, put


class Files(Machine):
    """``files`` by name; the image's own is ``image``.  ``fresh``: what is there is not made."""

    def __init__(
        self, files: dict[str, bytes], image: str = "disk.vmdk", backing: bytes | None = None
    ) -> None:
        super().__init__(b"", backing)
        self.files = {name: bytearray(data) for name, data in files.items()}
        self.image = image
        self.slots["file"] = self.files.setdefault(image, bytearray())
        self.fresh = True
        self.fail_after = -1

    def content(self) -> dict[str, bytes]:
        return {name: bytes(data) for name, data in self.files.items()}

    def writes(self, slot: str, offset: int, data: bytes) -> None:
        if self.fail_after == 0:
            raise Crash
        self.fail_after -= 1
        put(self.slots[slot], offset, data)

    def _serve(self, request: Any) -> Any:
        if isinstance(request, Write):
            for write in request.writes:
                self.writes(write.slot, write.offset, write.data)
        elif isinstance(request, Truncate):
            if self.fail_after == 0:
                raise Crash
            self.fail_after -= 1
            file = self.slots[request.slot]
            del file[request.size :]
            file.extend(bytes(request.size - len(file)))
        elif isinstance(request, Punch):
            for part in request.ranges:
                self.writes(part.slot, part.offset, bytes(part.length))
            return True
        elif isinstance(request, Open):
            self.opened.append((request.reference, request.format))
            if request.slot == "backing":
                return None
            if request.reference not in self.files:
                raise FileNotFoundError(2, "No such file or directory", request.reference)
            self.slots[request.slot] = self.files[request.reference]
        elif isinstance(request, Create):
            if self.fresh and request.name in self.files:
                raise FileExistsError(17, "File exists", request.name)
            self.slots[request.slot] = self.files[request.name] = bytearray()
        else:
            return super()._serve(request)
        return None

    def read(self, offset: int, length: int) -> bytes:
        out = b""
        for at, extent in self.extents(offset, length):
            if isinstance(extent, Data):
                assert extent.kind == DATA
                out += self.pread(extent.slot, extent.host, extent.length)
            elif extent.kind == 2 and "backing" in self.slots:
                out += self.pread("backing", at, extent.length)
            else:
                out += bytes(extent.length)
        one = self.format.map_one(offset, length, False)
        assert [one] == self.format.map_batch([offset], [length], False)
        assert one < 0 or self.pread("file", one, length) == out
        return out

    def write(self, offset: int, data: bytes) -> None:
        found = list(self.extents(offset, len(data)))
        if all(isinstance(e, Data) and e.writable for _, e in found):
            for at, e in found:
                assert isinstance(e, Data)
                self.writes(e.slot, e.host, data[at - offset : at - offset + e.length])
            return
        plan = self._plan([(offset, len(data))], WRITE)
        for step in plan.steps:
            if step.op == OP_ZERO:
                self.writes(step.slot, step.host, bytes(step.length))
        for step in plan.steps:
            if step.op == OP_DATA:
                old = bytearray(self.read(step.guest, step.length))
                a = max(offset, step.guest)
                b = min(offset + len(data), step.guest + step.length)
                if a < b:
                    old[a - step.guest : b - step.guest] = data[a - offset : b - offset]
                self.writes(step.slot, step.host, bytes(old))
        self._commit(plan)

    def change(self, offset: int, length: int, kind: str) -> bool:
        plan = self._plan([(offset, length)], kind)
        if plan is None:
            return False
        for step in plan.steps:
            self.writes(step.slot, step.host, bytes(step.length))
        self._commit(plan)
        return True

    def write_groups(self, groups: Groups) -> None:
        for group in groups.groups:
            assert group
            for write in group:
                self.writes(write.slot, write.offset, write.data)

    def flush(self) -> None:
        groups = self.format.freeze()
        for write in groups.lead:
            self.writes(write.slot, write.offset, write.data)
        self.write_groups(groups)
        freed = self.format.settle(groups.token)
        if freed:
            self._serve(Punch(freed))
            self.format.release(freed, True)
        self.store.trim()


class Crash(Exception):
    """The machine stops here."""
