"""Hypothesis against a bytearray: small disks, every kind of request, closing and opening again."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from diskwright.contract import FUA, MAY_UNMAP, NO_FALLBACK
from diskwright.engine.kernel import Driver
from diskwright.engine.node import Node
from diskwright.engine.tables import Tables
from diskwright.formats import qcow2, raw
from diskwright.graph.mapped import MappedNode
from diskwright.testing.memory import RecordingNode
from diskwright.testing.model import pattern
from races.cases import qcow2_image

SIZE = 60 * 512
BASE = pattern(77, 0, 35 * 512 + 100)
KINDS = ("raw", "plain", "backing", "lazy", "v2", "narrow", "aligned")

places = st.integers(0, SIZE - 1)
lengths = st.sampled_from([0, 1, 100, 512, 513, 2048, 5000])


class Disk(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver()
        self.number = 0

    @initialize(kind=st.sampled_from(KINDS), zeroes=st.booleans())
    def make(self, kind: str, zeroes: bool) -> None:
        self.kind = kind
        self.zeroes = zeroes or kind == "raw"
        options: dict[str, Any] = {"size": SIZE, "cluster_size": 512}
        if kind == "backing":
            options["backing_file"], options["backing_fmt"] = "base", "raw"
        elif kind == "lazy":
            options["lazy_refcounts"] = True
        elif kind == "v2":
            options["compat"] = "0.10"
        elif kind == "narrow":
            options["refcount_bits"] = 1
        image = bytes(SIZE) if kind == "raw" else qcow2_image(*sorted(options.items()))
        self.bytes = bytearray(SIZE)
        if kind == "backing":
            self.bytes[: len(BASE)] = BASE
        self.open(image)

    def open(self, image: bytes) -> None:
        self.leaf = RecordingNode(
            self.driver,
            image,
            zeroes_discards=self.zeroes,
            alignment=4096 if self.kind == "aligned" else 1,
        )
        slots: dict[str, Node] = {"file": self.leaf}
        options: dict[str, Any] = {"writable": True}
        if self.kind == "backing":
            slots["backing"] = RecordingNode(self.driver, BASE)
            options["backing"] = "given"
        opened = (raw if self.kind == "raw" else qcow2).DRIVER.open
        assert opened is not None
        format, opening = opened(options)
        self.node = MappedNode(self.driver, self.kind, format, slots, Tables(700))
        self.driver.run(self.node.run_procedure(opening, whole_image=False))
        assert self.node.size == len(self.bytes)

    def clip(self, offset: int, length: int) -> tuple[int, int]:
        offset = min(offset, len(self.bytes) - 1)
        return offset, min(length, len(self.bytes) - offset)

    @rule(
        ranges=st.lists(st.tuples(places, lengths), min_size=1, max_size=6),
        flags=st.sampled_from([0, FUA]),
    )
    def write(self, ranges: list[tuple[int, int]], flags: int) -> None:
        clipped = [self.clip(*r) for r in ranges]
        buffers = []
        for offset, length in clipped:
            self.number += 1
            buffers.append(pattern(self.number, offset, length))
        self.driver.run(self.node.write([o for o, _ in clipped], buffers, flags))
        for (offset, length), buffer in zip(clipped, buffers, strict=True):
            self.bytes[offset : offset + length] = buffer

    @rule(ranges=st.lists(st.tuples(places, lengths), min_size=1, max_size=6), views=st.booleans())
    def read(self, ranges: list[tuple[int, int]], views: bool) -> None:
        clipped = [self.clip(*r) for r in ranges]
        into = [memoryview(bytearray(b"\xee" * n)) for _, n in clipped] if views else None
        found = self.driver.run(
            self.node.read([o for o, _ in clipped], [n for _, n in clipped], into)
        )
        for (offset, length), data in zip(clipped, found, strict=True):
            assert bytes(data) == self.bytes[offset : offset + length]

    @rule(
        offset=places,
        length=lengths,
        flags=st.sampled_from([0, MAY_UNMAP, NO_FALLBACK, MAY_UNMAP | NO_FALLBACK, FUA]),
    )
    def zero(self, offset: int, length: int, flags: int) -> None:
        offset, length = self.clip(offset, length)
        try:
            self.driver.run(self.node.zero([offset], [length], flags))
        except OSError:
            assert flags & NO_FALLBACK
            (data,) = self.driver.run(self.node.read([offset], [length]))
            for i, byte in enumerate(bytes(data)):
                assert byte in (0, self.bytes[offset + i])
            self.bytes[offset : offset + length] = data
        else:
            self.bytes[offset : offset + length] = bytes(length)

    @rule(offset=places, length=lengths)
    def discard(self, offset: int, length: int) -> None:
        offset, length = self.clip(offset, length)
        self.driver.run(self.node.discard([offset], [length]))
        unit = 1 if self.kind == "raw" else 512
        start, end = -(-offset // unit) * unit, offset + length
        if end < len(self.bytes):
            end -= end % unit
        if start < end:
            self.bytes[start:end] = bytes(end - start)

    @rule(size=st.sampled_from([40 * 512, 60 * 512, 90 * 512, 140 * 512]))
    def resize(self, size: int) -> None:
        self.driver.run(self.node.truncate(size))
        assert self.node.size == size
        if size < len(self.bytes):
            del self.bytes[size:]
        else:
            self.bytes.extend(bytes(size - len(self.bytes)))

    @rule()
    def flush(self) -> None:
        self.driver.run(self.node.flush())

    @rule()
    def reopen(self) -> None:
        self.driver.run(self.node.close())
        image = bytes(self.leaf.data)
        if self.kind == "raw":
            image = image[: len(self.bytes)].ljust(len(self.bytes), b"\0")
        self.open(image)
        check = getattr(self.node.format, "check", None)
        if check is not None:
            result = self.driver.run(self.node.run_procedure(check(), whole_image=False))
            assert (result.corruptions, result.leaks) == (0, 0), result.findings

    @invariant()
    def same(self) -> None:
        if hasattr(self, "node"):
            (data,) = self.driver.run(self.node.read([0], [len(self.bytes)]))
            assert bytes(data) == self.bytes


TestDisk = Disk.TestCase
TestDisk.settings = settings(
    max_examples=120,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
