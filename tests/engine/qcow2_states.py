"""A qcow2 image in memory under the real engine, and all that can be done with it, against a model
of its disk, its snapshots and its bitmaps.

What is done takes a few numbers, which mean something whatever the state is; so a sequence that
fails can be made shorter by leaving steps out.
"""

from __future__ import annotations

import random
from typing import Any

from diskwright.bits import BitmapError
from diskwright.contract import COMPRESSED, MAY_UNMAP
from diskwright.engine import bitmaps
from diskwright.engine.tables import Tables
from diskwright.errors import DiskError, NotSupported
from diskwright.formats import qcow2
from diskwright.graph.mapped import MappedNode
from diskwright.ops import snapshots
from diskwright.testing.memory import RecordingNode
from diskwright.testing.scheduler import InlineDriver

SECRETS = {"s0": b"secret"}
STATE = 5000  # bytes of VM state at most
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"cluster_size": 512},
    "v2": {"cluster_size": 512, "compat": "0.10"},
    "narrow": {"cluster_size": 1024, "refcount_bits": 4},
    "lazy": {"cluster_size": 4096, "lazy_refcounts": True},
    "extended": {"cluster_size": 16384, "extended_l2": True},
    "data-file": {"cluster_size": 512, "data_file": "data"},
    "raw-data": {"cluster_size": 4096, "data_file": "data", "data_file_raw": True},
    "aes": {"cluster_size": 512, "encrypt.format": "aes", "encrypt.key-secret": "s0"},
    "aes-extended": {
        "cluster_size": 16384, "extended_l2": True, "encrypt.format": "aes",
        "encrypt.key-secret": "s0",
    },
    "luks": {
        "cluster_size": 4096, "encrypt.format": "luks", "encrypt.key-secret": "s0",
        "encrypt.iter-time": 1,
    },
    "luks-data-file": {
        "cluster_size": 65536, "encrypt.format": "luks", "encrypt.key-secret": "s0",
        "encrypt.iter-time": 1, "data_file": "data",
    },
}  # fmt: skip


class Bits:
    """What a bitmap may and must call dirty, in granules."""

    def __init__(self, granularity: int, enabled: bool) -> None:
        self.granularity, self.enabled = granularity, enabled
        self.must: set[int] = set()
        self.may: set[int] = set()

    def mark(self, offset: int, length: int, slack: int) -> None:
        """``slack``: what is asked for is carried out in units of this."""
        if not self.enabled or not length:
            return
        g = self.granularity
        self.must |= set(range(offset // g, -(-(offset + length) // g)))
        first, last = offset // slack * slack, -(-(offset + length) // slack) * slack
        self.may |= set(range(first // g, -(-last // g)))

    def truncate(self, size: int) -> None:
        last = -(-size // self.granularity)
        self.must = {n for n in self.must if n < last}
        self.may = {n for n in self.may if n < last}


class Subject:
    """One image of one kind."""

    def __init__(self, kind: str, seed: int) -> None:
        rng = random.Random(f"{kind}{seed}")
        self.driver = InlineDriver()
        self.options = dict(KINDS[kind])
        unit = self.options["cluster_size"]
        size = rng.choice([20 * unit, 60 * unit + 512, 7 * unit + 1024])
        self.base = b""
        if rng.random() < 0.4 and "raw" not in kind:
            self.base = rng.randbytes(max(size + rng.choice([0, -512, 5 * unit, 700]), 512))
            self.options |= {"backing_file": "base", "backing_fmt": "raw"}
        self.model = bytearray(self.base[:size].ljust(size, b"\0"))
        self.held: dict[str, bytes] = {}
        self.states: dict[str, bytes] = {}
        """The VM states that go with ``held``."""
        self.bits: dict[str, Bits] = {}
        self.number = 0
        self.leaves = {"file": RecordingNode(self.driver)}
        self.budget = rng.choice([0, 3 * unit, 1 << 20])
        self.driver.run(self._create(size))
        self.driver.run(self._open())

    async def _create(self, size: int) -> None:
        node = MappedNode(
            self.driver, "qcow2", qcow2.DRIVER.open({"writable": True})[0],  # type: ignore[misc]
            dict(self.leaves), Tables(1 << 20),
        )  # fmt: skip

        async def beside(slot: str, name: str) -> None:
            self.leaves[slot] = RecordingNode(self.driver)
            node.attach(slot, self.leaves[slot])

        node.engine.creator = beside
        given = {**self.options, "size": size, "secrets": SECRETS, "file-name": "disk"}
        assert qcow2.DRIVER.create is not None
        await node.run_procedure(qcow2.DRIVER.create(given), whole_image=False)

    async def _open(self, writable: bool = True) -> None:
        slots: dict[str, Any] = dict(self.leaves)
        options: dict[str, Any] = {"writable": writable, "secrets": SECRETS, "file-name": "disk"}
        if self.base:
            slots["backing"] = RecordingNode(self.driver, self.base)
            slots["backing"].read_only = True
            options["backing"] = "given"
        if "data-file" in slots:
            options["data-file"] = "given"
        if "encrypt.format" in self.options:
            options["encrypt.key-secret"] = "s0"
        assert qcow2.DRIVER.open is not None
        format, opening = qcow2.DRIVER.open(options)

        async def opener(*named: Any) -> None:
            """Every slot is filled."""

        tables = Tables(self.budget)
        node = MappedNode(self.driver, "qcow2", format, slots, tables, "disk", opener)
        node.read_only = not writable
        await node.run_procedure(opening, whole_image=False)
        self.node: Any = node

    async def _close(self) -> None:
        await self.node.close()

    @property
    def unit(self) -> int:
        return int(self.node.format.zero_unit)

    def _range(self, a: int, b: int) -> tuple[int, int]:
        size, cluster = len(self.model), int(self.options["cluster_size"])
        lengths = (1, 511, 512, 700, cluster, 3 * cluster, cluster + 512, 9 * cluster)
        offset = a % size
        if a >> 20 & 1:
            offset -= offset % cluster
        return offset, min(lengths[b % len(lengths)], size - offset)

    def _mark(self, offset: int, length: int, slack: int = 512) -> None:
        for bits in self.bits.values():
            bits.mark(offset, length, slack)

    # -- steps
    async def write(self, a: int, b: int) -> None:
        offset, length = self._range(a, b)
        data = random.Random(a ^ b).randbytes(length)
        await self.node.write([offset], [data])
        self.model[offset : offset + length] = data
        self._mark(offset, length)

    async def zero(self, a: int, b: int) -> None:
        offset, length = self._range(a, b)
        await self.node.zero([offset], [length], MAY_UNMAP if b >> 8 & 1 else 0)
        self.model[offset : offset + length] = bytes(length)
        self._mark(offset, length)

    async def discard(self, a: int, b: int) -> None:
        offset, length = self._range(a, b)
        await self.node.discard([offset], [length])
        (found,) = await self.node.read([0], [len(self.model)])
        end = offset + length
        for at in range(offset, end):
            assert found[at] in (self.model[at], 0), f"{at:#x} after a discard"
        assert found[:offset] == self.model[:offset] and found[end:] == self.model[end:]
        for bits in self.bits.values():
            if bits.enabled:
                g = bits.granularity
                changed = {at // g for at in range(offset, end) if found[at] != self.model[at]}
                bits.must |= changed
                bits.may |= set(range(offset // g, -(-end // g)))
        self.model[:] = found

    async def packed(self, a: int, b: int) -> None:
        cluster = int(self.options["cluster_size"])
        offset = a % len(self.model) // cluster * cluster
        length = min(cluster, len(self.model) - offset)
        data = bytes([b % 256]) * length
        try:
            await self.node.write([offset], [data], COMPRESSED)
        except (OSError, DiskError):  # allocated; encrypted; a data file
            for bits in self.bits.values():
                if bits.enabled:  # it might have been written
                    g = bits.granularity
                    bits.may |= set(range(offset // g, -(-(offset + length) // g)))
            return
        self.model[offset : offset + length] = data
        self._mark(offset, length)

    async def reopen(self, a: int, b: int) -> None:
        await self._close()
        await self._open()

    async def store(self, a: int, b: int) -> None:
        await bitmaps.store(self.node.engine)

    def _snapshot(self, b: int) -> str:
        return sorted(self.held)[b % len(self.held)]

    async def take(self, a: int, b: int) -> None:
        state = random.Random(a).randbytes(b % STATE)
        try:
            await snapshots.write_vm_state(self.node, 0, state)
            made = await snapshots.create(self.node, f"n{self.number}", vm_state_size=len(state))
        except NotSupported:
            return  # a data file; narrow counts
        self.number += 1
        self.held[made.id] = bytes(self.model)
        self.states[made.id] = state

    async def apply(self, a: int, b: int) -> None:
        if self.held:
            wanted = self._snapshot(b)
            try:
                await snapshots.apply(self.node, snapshots.Selector(id=wanted))
            except NotSupported:
                return  # bitmaps; narrow counts
            self.model = bytearray(self.held[wanted])

    async def delete(self, a: int, b: int) -> None:
        if self.held:
            wanted = self._snapshot(b)
            await snapshots.delete(self.node, snapshots.Selector(id=wanted))
            del self.held[wanted]

    async def add(self, a: int, b: int) -> None:
        self.number += 1
        name, granularity = f"b{self.number}", (512, 4096, 65536)[b % 3]
        enabled = b % 5 > 0
        try:
            await bitmaps.add(
                self.node.engine, name, granularity, persistent=True, enabled=enabled
            )
        except BitmapError:
            assert self.options.get("compat") == "0.10"
            return
        self.bits[name] = Bits(granularity, enabled)

    async def bitmap(self, what: str, a: int, b: int) -> None:
        """Remove, clear, switch or merge."""
        if not self.bits:
            return
        engine, names = self.node.engine, sorted(self.bits)
        name, source = names[a % len(names)], names[b % len(names)]
        bits = self.bits[name]
        if what == "remove":
            await bitmaps.remove(engine, name)
            del self.bits[name]
        elif what == "clear":
            await bitmaps.clear(engine, name)
            bits.must, bits.may = set(), set()
        elif what == "switch":
            bits.enabled = not bits.enabled
            await bitmaps.switch(engine, name, bits.enabled)
        else:
            loaded = await bitmaps.load(engine, source)
            await bitmaps.merge(engine, name, [loaded])
            other, g, h = self.bits[source], bits.granularity, self.bits[source].granularity
            size = len(self.model)
            bits.must |= _converted(other.must, h, g, size)
            bits.may |= _converted(other.may, h, g, size)

    async def resize(self, a: int, b: int) -> None:
        cluster = int(self.options["cluster_size"])
        size = max((a % (100 * cluster)) // 512 * 512, 512)
        if b % 3 == 0:
            size = -(-size // cluster) * cluster
        try:
            await self.node.truncate(size)
        except NotSupported:
            assert self.options.get("compat") == "0.10" and self.held
            return
        self.model = bytearray(self.model[:size].ljust(size, b"\0"))
        for bits in self.bits.values():
            bits.truncate(size)

    async def amend(self, a: int, b: int) -> None:
        changes: list[dict[str, Any]] = [
            {"compat": "0.10"}, {"compat": "1.1"}, {"refcount_bits": 1 << b % 7},
            {"lazy_refcounts": True}, {"lazy_refcounts": False},
        ]  # fmt: skip
        change = changes[a % len(changes)]
        try:
            await self.node.run_procedure(self.node.format.amend(change))
        except (NotSupported, DiskError):
            return
        self.node.changed()
        if change.get("compat") == "0.10":
            self.bits = {}
        if "compat" in change:
            self.options["compat"] = change["compat"]

    # -- looking
    async def look(self, thorough: bool) -> None:
        (found,) = await self.node.read([0], [len(self.model)])
        assert self.node.size == len(self.model)
        _same(bytes(found), self.model, "the disk")
        for bitmap in self.node.engine.bitmaps:
            bits = self.bits[bitmap.name]
            assert bitmap.enabled == bits.enabled and not bitmap.inconsistent
            await bitmaps.load(self.node.engine, bitmap.name)
            g = bits.granularity
            dirty = {
                n
                for offset, length, set_ in bitmap.extents()
                if set_
                for n in range(offset // g, -(-(offset + length) // g))
            }
            assert bits.must <= dirty, f"{bitmap.name} misses {sorted(bits.must - dirty)[:5]}"
            assert dirty <= bits.may, f"{bitmap.name} has {sorted(dirty - bits.may)[:5]}"
        assert {bitmap.name for bitmap in self.node.engine.bitmaps} == self.bits.keys()
        if not thorough:
            return
        await self._close()
        await self._open(writable=False)
        result = await self.node.run_procedure(self.node.format.check())
        assert not (result.corruptions or result.leaks or result.check_errors), result.findings
        (found,) = await self.node.read([0], [len(self.model)])
        _same(bytes(found), self.model, "the disk opened again")
        for which, content in self.held.items():
            await snapshots.show(self.node, snapshots.Selector(id=which))
            state = await snapshots.read_vm_state(self.node, 0, len(self.states[which]))
            _same(state, self.states[which], f"the VM state of snapshot {which}")
            (found,) = await self.node.read([0], [self.node.size])
            if self.node.size != len(content):  # version 2 does not say
                assert self.options.get("compat") == "0.10"
                continue
            _same(bytes(found), content, f"snapshot {which}")
            await self._close()
            await self._open(writable=False)
        if self.options.get("data_file_raw"):
            _same(bytes(self.leaves["data-file"].data), self.model, "the data file")
        await self._close()
        await self._open()


def _converted(granules: set[int], old: int, new: int, size: int) -> set[int]:
    out: set[int] = set()
    for n in granules:
        end = min((n + 1) * old, size)
        out |= set(range(n * old // new, -(-end // new)))
    return out


def _same(found: bytes, wanted: bytes | bytearray, what: str) -> None:
    if found != wanted:
        pairs = zip(found, wanted, strict=False)
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), -1)
        raise AssertionError(f"{what}: {len(found)} for {len(wanted)} bytes, differs at {at:#x}")
