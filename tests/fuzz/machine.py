"""A format driven by bytes alone, with a limit on everything: what a hostile image may cost."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from diskwright.contract import (
    OP_DATA,
    OP_ZERO,
    WRITE,
    Create,
    DataRanges,
    Progress,
    Punch,
    Read,
    Table,
    Timed,
    Truncate,
)
from diskwright.errors import CorruptImage, DamagedData, DiskError
from diskwright.extents import DATA, INLINE, PACKED, Data
from fuzz.pages import Pages
from sansio.files import Files
from sansio.machine import Machine

MOST_AT_ONCE = 512 << 20
"""Bytes that one request may ask for: nothing of an image is larger in memory."""
ROOM = 64 << 20
"""Bytes by which a file may grow.  A real one would become sparse; memory cannot."""
MOST_TABLES = 8
"""That stay in memory."""
MOST_MOVED = 8 << 20
"""Bytes of a single step that are moved here."""
MOST_SECONDS = 20
"""Of processor time, for all that is done to one image."""


Seal = Callable[[Mapping[str, Pages], list[tuple[str, int, int]]], None]
"""Makes the checksums good again of what was changed, told as (file, offset, length): a bad one
hides what is behind it.  A checksum that was itself changed stays as it is."""


class Sample(NamedTuple):
    """A sound image: what mutants are made of.  ``files`` by name, of which ``image`` is opened
    with ``options``."""

    format: str
    name: str
    files: dict[str, bytes]
    image: str
    options: dict[str, Any] = {}
    backing: bytes | None = None
    seal: Seal | None = None

    def __str__(self) -> str:
        return f"{self.format}, {self.name}"


class Excess(AssertionError):
    """More was asked for than any image may ask for."""


class Hang(BaseException):
    """It takes too long.  (Nothing that means to go on after an error catches this.)"""


@contextmanager
def watched(seconds: float = MOST_SECONDS) -> Iterator[None]:
    """Raise Hang after so much processor time."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise Hang(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Hostile(Files):
    """``files`` are a mutant of those of ``sample``."""

    files: dict[str, Pages]  # type: ignore[assignment]
    slots: dict[str, Any]

    def __init__(
        self, sample: Sample, files: Mapping[str, bytes | Pages], read_only: bool = False
    ) -> None:
        Machine.__init__(self, b"", None)
        self.files = {
            name: data if isinstance(data, Pages) else Pages(data) for name, data in files.items()
        }
        self.slots["file"] = self.files[sample.image]
        if sample.backing is not None:
            self.slots["backing"] = Pages(sample.backing)
        self.image, self.fresh = sample.image, True
        self.read_only = read_only
        self.changes = 0
        """How often something was written."""
        self.given_up = False
        """A procedure failed half-way: nobody uses what is open any more, and the engine marks the
        image as corrupt."""
        self.most = max(map(len, files.values())) + ROOM
        self.asked: list[tuple[str, int, int]] = []
        """(slot, offset, length) of all that was read."""

    # -- files
    def pread(self, slot: str, offset: int, length: int) -> bytes:
        assert offset >= 0 and length >= 0
        if length > MOST_AT_ONCE:
            raise Excess(f"{length} bytes at {offset:#x} of {slot} at once")
        self.asked.append((slot, offset, length))
        found: bytes = self.slots[slot].read(offset, length)
        return found

    def pwrite(self, offset: int, data: bytes) -> None:
        self.writes("file", offset, data)

    def writes(self, slot: str, offset: int, data: bytes) -> None:
        self._writable(offset, len(data))
        self.slots[slot].write(offset, data)

    def zeroes(self, slot: str, offset: int, length: int) -> None:
        """Write them."""
        self._writable(offset, length)
        self.slots[slot].zero(offset, length)

    def _writable(self, offset: int, length: int) -> None:
        assert not self.read_only, f"{length} bytes at {offset:#x} of a read-only image"
        assert offset >= 0
        if offset + length > self.most:
            raise OSError(errno.EFBIG, "File too large")
        self.changes += 1

    def _serve(self, request: Any) -> Any:
        if isinstance(request, Read):  # what is asked most comes first
            return [self.pread(request.slot, at, length) for at, length in request.ranges]
        elif isinstance(request, Progress):
            return None
        elif isinstance(request, Truncate):
            assert not self.read_only
            if request.size > self.most:
                raise OSError(errno.EFBIG, "File too large")
            self.changes += 1
            self.slots[request.slot].resize(request.size)
            return None
        elif isinstance(request, Create):
            if self.fresh and request.name in self.files:
                raise FileExistsError(17, "File exists", request.name)
            self.slots[request.slot] = self.files[request.name] = Pages()
            return None
        elif isinstance(request, DataRanges):
            end = min(request.offset + request.length, len(self.slots[request.slot]))
            return [(request.offset, end - request.offset)] if end > request.offset else []
        elif isinstance(request, Punch):
            for part in request.ranges:
                self.zeroes(part.slot, part.offset, part.length)
            return True
        elif isinstance(request, Timed):
            return request.function(*request.arguments), 1.0
        return super()._serve(request)

    def run(self, procedure: Any) -> Any:
        before = self.changes
        try:
            return super().run(procedure)
        except (DiskError, OSError) as error:
            met = isinstance(error, CorruptImage) and error.met_by is not None
            self.given_up |= met or self.changes > before
            raise

    # -- requests of a guest
    def unpin(self, pins: list[Table]) -> None:
        for table in pins:
            table.pins -= 1
        pins.clear()
        if len(self.store.map) > MOST_TABLES:
            self.store.trim()

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        for at, extent in self.extents(offset, length):
            if isinstance(extent, Data):
                data = self.pread(extent.slot, extent.host, extent.length)
                for transform in extent.xform:
                    data = self._through(transform.decode, at, extent.host, data)
                parts.append(data)
            elif extent.kind == PACKED:
                packed: Any = extent
                data = self.pread(packed.slot, packed.host, packed.host_length)
                try:
                    data = packed.codec.unpack(data, packed.unit)
                except ValueError as error:
                    raise DamagedData(str(error)) from error
                assert len(data) == packed.unit
                parts.append(data[packed.skip : packed.skip + packed.length])
            elif extent.kind == INLINE:
                parts.append(extent.data)  # type: ignore[union-attr]
            else:
                parts.append(bytes(extent.length))
        out = b"".join(parts)
        assert len(out) == length
        return out

    @staticmethod
    def _through(function: Any, guest: int, host: int, data: bytes) -> bytes:
        into = bytearray(len(data))
        function([(guest, host, len(data))], data, memoryview(into))
        return bytes(into)

    def write(self, offset: int, data: bytes) -> None:
        found = list(self.extents(offset, len(data)))
        if all(extent.kind == DATA and extent.writable for _, extent in found):  # type: ignore[union-attr]
            for at, extent in found:
                assert isinstance(extent, Data)
                part = data[at - offset : at - offset + extent.length]
                self._put(at, extent.slot, extent.host, extent.xform, part)
            return
        plan = self._plan([(offset, len(data))], WRITE)
        try:
            for step in plan.steps:
                if step.length > MOST_MOVED:
                    raise OSError(errno.EFBIG, "File too large")
                if step.op == OP_ZERO:
                    self.zeroes(step.slot, step.host, step.length)
                elif step.op == OP_DATA:
                    inside = max(min(step.length, self.format.size - step.guest), 0)
                    old = bytearray(self.read(step.guest, inside)).ljust(step.length, b"\0")
                    a, b = max(offset, step.guest), min(offset + len(data), step.guest + inside)
                    if a < b:
                        old[a - step.guest : b - step.guest] = data[a - offset : b - offset]
                    self._put(step.guest, step.slot, step.host, step.xform, bytes(old))
        except (DiskError, OSError):
            self.abort(plan)
            raise
        self._commit(plan)

    def _put(self, guest: int, slot: str, host: int, xform: Any, data: bytes) -> None:
        if xform:  # a disk may end inside a sector
            data += bytes(-len(data) % self.format.cipher_unit)
        for transform in reversed(xform):
            data = self._through(transform.encode, guest, host, data)
        self.writes(slot, host, data)

    def finish(self) -> None:
        """Flush until nothing is dirty, and close."""
        for _ in range(9):
            self.flush()
            if not self.store.dirty():
                break
        assert not self.store.dirty()
        closing = getattr(self.format, "close", lambda: None)()
        if closing is not None:
            self.run(closing)
