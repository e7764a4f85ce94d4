"""The graphs that the races run on: built afresh, or from what a crash left."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from diskwright.contract import Procedure
from diskwright.engine.futures import BaseDriver
from diskwright.engine.node import Node
from diskwright.engine.tables import Tables
from diskwright.filters.compress import CompressNode
from diskwright.formats import qcow2, raw
from diskwright.graph import registry
from diskwright.graph.mapped import MappedNode
from diskwright.testing.composed import Cipher, Concat, Crypt, Part
from diskwright.testing.memory import NEVER, RecordingNode
from diskwright.testing.scheduler import InlineDriver
from diskwright.testing.toy import Toy, create_toy

from . import packed, sesparse

MIB = 1 << 20
SECRETS = {"s0": b"of the tests", "s1": b"another"}
AMENDMENTS: list[dict[str, Any]] = [
    {"refcount_bits": 8}, {"refcount_bits": 64}, {"lazy_refcounts": True},
    {"lazy_refcounts": False}, {"refcount_bits": 1},
]  # fmt: skip
KEYS: list[dict[str, Any]] = [
    {"encrypt.state": "active", "encrypt.new-secret": "s1", "encrypt.iter-time": 1},
    {"encrypt.state": "inactive", "encrypt.old-secret": "s1"},
]


class Graph:
    """One built graph.  ``leaves`` are what a crash hits; ``order`` how the formats open."""

    def __init__(self, driver: BaseDriver, budget: int) -> None:
        self.driver = driver
        self.tables = Tables(budget)
        self.leaves: list[RecordingNode] = []
        self.order: list[tuple[MappedNode, Procedure | None]] = []
        self.read_only: list[Node] = []
        self.top: Node

    def mapped(
        self, name: str, format: Any, opening: Procedure | None, slots: dict[str, Node]
    ) -> MappedNode:
        async def opener(*named: Any) -> None:
            """Every slot is filled."""

        node = MappedNode(self.driver, name, format, slots, self.tables, name, opener)
        self.order.append((node, opening))
        self.top = node
        return node

    async def open(self) -> None:
        for node, opening in self.order:
            if opening is not None:
                await node.run_procedure(opening, whole_image=False)

    async def close(self) -> None:
        """Top down, as the graph does."""
        error: Exception | None = None
        for node, _ in reversed(self.order):
            try:
                await node.close()
            except OSError as failed:
                error = error or failed
        for leaf in self.leaves:
            await leaf.close()
        if error is not None:
            raise error


class Case:
    """How to build a graph; ``params`` are drawn once a seed and kept for reopening."""

    snapshots = False
    withdraws = False
    exact_discard = True
    unit = 256
    faults = True
    resizes = False
    lengths = (1, 7, 64, 100, 256, 300, 512, 1000, 1024, 3000)
    """Of requests."""
    heavy = 1024
    """Where many clients meet: the first bytes of the disk."""
    crashes = 1000
    """Crash states looked at, of one seed; images of megabytes take their time."""
    idle = False
    """Mostly withdrawals and cancelled first writes."""
    amendments: list[dict[str, Any]] = []
    """What the image is changed to meanwhile."""

    def __init__(self, rng: random.Random) -> None:
        self.base = b""
        self.size = 8192
        self.budget = rng.choice([130, 130, 200, 600])
        self.capacity: list[int] = []
        self.images: list[bytes] = []
        self.zeroes = rng.random() < 0.5
        self.alignment = 1

    def build(self, driver: BaseDriver, images: list[bytes] | None = None) -> Graph:
        fresh = images is None
        graph = Graph(driver, self.budget if fresh else 1 << 20)
        for i, image in enumerate(self.images if images is None else images):
            graph.leaves.append(
                RecordingNode(
                    driver,
                    image,
                    name=f"leaf{i}",
                    delay=20 if fresh else 0,
                    capacity=self.capacity[i] if self.capacity and fresh else NEVER,
                    alignment=self.alignment,
                    zeroes_discards=self.zeroes,
                )
            )
        self.compose(graph)
        return graph

    def compose(self, graph: Graph) -> None:
        raise NotImplementedError

    def backing(self, graph: Graph, data: bytes, delay: bool = True) -> RecordingNode:
        fresh = graph.leaves[0].delay
        node = RecordingNode(graph.driver, data, name="base", delay=fresh)
        node.read_only = True
        graph.read_only.append(node)
        return node

    def check_leaks(self) -> bool:
        """True when a clean close leaves no leaks."""
        return True


def random_base(rng: random.Random, size: int) -> bytes:
    return bytes(rng.choices(range(1, 0xDD), k=size))


class ToyCase(Case):
    """The toy alone, over a backing disk, or encrypted; few clusters make it meet a full disk."""

    snapshots = withdraws = True

    def __init__(self, rng: random.Random, kind: str = "") -> None:
        super().__init__(rng)
        self.limit = rng.choice([1 << 20, 1 << 20, 75, 55])
        self.kind = kind
        self.base = random_base(rng, self.size) if "b" in kind else bytes(self.size)
        if "b" in kind and rng.random() < 0.3:  # a backing disk that ends early
            cut = rng.randrange(self.size)
            self.base = self.base[:cut]
        if "a" in kind:
            self.alignment = 64
        self.images = [create_toy(self.size)]
        if "x" in kind:
            self.images = [Crypt.image(create_toy(self.size))]
        if "i" in kind:
            self.idle, self.faults = True, False
            self.limit = 1 << 20
        if "l" in kind:  # the leaf is what is full
            self.limit = 1 << 20
            self.capacity = [rng.choice([70, 60]) * 256]

    def compose(self, graph: Graph) -> None:
        (leaf,) = graph.leaves
        file: Node = leaf
        if "x" in self.kind:
            file = graph.mapped(
                "crypt", Crypt((64 << 10) + len(self.images[0])), None, {"file": leaf}
            )
        slots = {"file": file}
        if "b" in self.kind:
            slots["backing"] = self.backing(graph, self.base)
        xform = (Cipher(5),) if "c" in self.kind else ()
        toy = Toy(self.limit, xform, 64 if xform else 1)
        graph.mapped("toy", toy, toy.open(), slots)


class CryptCase(Case):
    """Encrypted sectors of 64 bytes over the leaf: every smaller write reads first."""

    unit = 64
    exact_discard = False

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.size = 4096
        self.base = random_base(rng, self.size)
        self.images = [Crypt.image(self.base)]

    def compose(self, graph: Graph) -> None:
        graph.mapped("crypt", Crypt(self.size), None, {"file": graph.leaves[0]})


class ExtentsCase(Case):
    """Two extents, a flat one and a toy with a window of the whole disk's parent behind it, and a
    descriptor whose change id is renewed first."""

    exact_discard = False

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.zeroes = True  # a flat extent shows what was discarded
        self.half = 4096
        self.base = random_base(rng, self.size)
        self.images = [b"CID0".ljust(64, b"\0"), self.base[: self.half], create_toy(self.half)]

    def compose(self, graph: Graph) -> None:
        descriptor, flat, image = graph.leaves
        window = Concat([Part(0, self.half, "file", self.half)])
        parent = MappedNode(
            graph.driver, "window", window, {"file": self.backing(graph, self.base)}, graph.tables
        )
        parent.read_only = True
        toy = Toy()
        second = graph.mapped("toy", toy, toy.open(), {"file": image, "backing": parent})
        parts = [Part(0, self.half, "extent.0", 0), Part(self.half, self.half, "extent.1", 0)]
        disk = Concat(parts, 256, "descriptor")
        slots: dict[str, Node] = {"descriptor": descriptor, "extent.0": flat, "extent.1": second}
        graph.mapped("concat", disk, disk.open(), slots)


@lru_cache(maxsize=64)
def new_image(format: str, *options: tuple[str, Any]) -> bytes:
    """An empty image: its own file, whatever is made beside it."""
    driver = InlineDriver()
    leaf = RecordingNode(driver)
    holder = MappedNode(driver, "create", Crypt(64), {"file": leaf})
    create = registry.driver(format).create
    assert create is not None
    given = {"file-name": f"disk.{format}", "secrets": SECRETS, **dict(options)}

    async def beside(slot: str, name: str) -> None:
        holder.attach(slot, RecordingNode(driver))

    holder.engine.creator = beside
    driver.run(holder.run_procedure(create(given), whole_image=False))
    return bytes(leaf.data)


def qcow2_image(*options: tuple[str, Any]) -> bytes:
    """An empty qcow2 image."""
    return new_image("qcow2", *options)


class Qcow2Case(Case):
    """qcow2 with clusters of 512 bytes; by kind over a backing disk (b), with lazy refcounts (l),
    version 2 (2), narrow refcounts (r), at an offset in a raw disk (o), below it an alignment of
    4 KiB (a), on a chain of two overlays (h), full of compressed clusters (p), written through the
    filter that compresses (c), with a data file (e) that may be raw (w), encrypted by AES (k) or
    with LUKS (u), or amended meanwhile (m)."""

    unit = 512
    resizes = True
    secret: dict[str, Any]
    """Options that unlock it."""

    def __init__(self, rng: random.Random, kind: str = "") -> None:
        super().__init__(rng)
        self.kind = kind
        self.size = rng.choice([16384, 100 * 512, 96 << 10, 160 << 10])
        if "x" in kind:
            self.size = rng.choice([75 * 512, 96 << 10, 203 * 512])
        self.budget = rng.choice([600, 1100, 1100, 4000])
        self.base = random_base(rng, self.size) if "b" in kind or "h" in kind else bytes(self.size)
        if "b" in kind and rng.random() < 0.3:
            self.base = self.base[: rng.randrange(self.size)]
        options: dict[str, Any] = {"size": self.size, "cluster_size": 512}
        cluster = 512
        if "x" in kind:
            cluster = 16384
            options |= {"cluster_size": cluster, "extended_l2": True}
            self.budget = rng.choice([17_000, 50_000])
            # Where most meet there are few clusters.
            self.lengths = (1, 100, 512, 700, 1024, 3000, 16384, 20_000)
            self.heavy = 32768
            if "p" in kind:
                self.exact_discard = False  # a part of a compressed cluster stays
        self.snapshots = "s" in kind
        if self.snapshots:
            self.crashes = 4
        self.resizes = not ("s" in kind and "2" in kind)
        if "2" in kind:
            options["compat"] = "0.10"
            # There is no zero flag to hide a backing file with, so a discard does nothing.
            self.exact_discard = "b" not in kind
        if "l" in kind:
            options["lazy_refcounts"] = True
        if "r" in kind:
            options["refcount_bits"] = rng.choice([1, 2, 8, 32, 64])
        if "b" in kind or "h" in kind:
            options["backing_file"] = "base"
            options["backing_fmt"] = "raw"
        if "a" in kind:
            self.alignment = 4096
        self.secret = {}
        if "k" in kind or "u" in kind:
            cipher = "luks" if "u" in kind else "aes"
            options |= {"encrypt.format": cipher, "encrypt.key-secret": "s0"}
            self.secret = {"encrypt.key-secret": "s0", "secrets": SECRETS}
            self.crashes = 3
        if "u" in kind:  # a header of 2 MiB
            options["encrypt.iter-time"] = 1
            self.crashes = 2
        if "m" in kind:
            self.amendments = AMENDMENTS[: 4 if "s" in kind else None]
            if "u" in kind:
                self.amendments = KEYS
        if "e" in kind:
            options["data_file"] = "data"
            options["data_file_raw"] = "w" in kind
        if "p" in kind:
            self.base = packed.dull(rng, self.size)
            image = packed.packed_image(self.base, **options)
        else:
            image = qcow2_image(*sorted(options.items()))
        self.images = [image]
        if "e" in kind:
            self.images.append(bytes(self.size))
        self.offset = 0
        if "o" in kind:
            self.offset = rng.choice([512, 1000, 4096])
            self.images = [(bytes(self.offset) + image).ljust(400 << 10, b"\0")]
        if "h" in kind:
            self.images = [image, image]
        clusters = len(image) // cluster
        few, more = (4, 7) if "x" in kind else (20, 40)
        self.limit = rng.choice(
            [None, None, None, (clusters + more) * cluster, (clusters + few) * cluster]
        )

    def format(self, graph: Graph, slots: dict[str, Node], name: str) -> MappedNode:
        options: dict[str, Any] = {"writable": True, **self.secret}
        if "backing" in slots:
            options["backing"] = "given"
        if "data-file" in slots:
            options["data-file"] = "given"
        if self.limit is not None and graph.leaves[0].delay:
            options["max_file_size"] = self.limit
        format, opening = qcow2.DRIVER.open(options)  # type: ignore[misc]
        return graph.mapped(name, format, opening, slots)

    def compose(self, graph: Graph) -> None:
        file: Node = graph.leaves[0]
        if "o" in self.kind:
            format, opening = raw.DRIVER.open({"offset": self.offset})  # type: ignore[misc]
            file = graph.mapped("raw", format, opening, {"file": file})
        slots = {"file": file}
        if "b" in self.kind:
            slots["backing"] = self.backing(graph, self.base)
        if "e" in self.kind:
            slots["data-file"] = graph.leaves[1]
        if "h" in self.kind:
            below = self.format(
                graph, {"file": file, "backing": self.backing(graph, self.base)}, "middle"
            )
            slots = {"file": graph.leaves[1], "backing": below}
        node = self.format(graph, slots, "qcow2")
        if "c" in self.kind:
            node.format._codec = packed.Recall()  # type: ignore[attr-defined]
            graph.top = CompressNode(graph.driver, node, self.unit)

    def check_leaks(self) -> bool:
        return True


class VhdxCase(Case):
    """VHDX with blocks of 1 MiB; by kind differencing (d) or with sectors of 4 KiB (4)."""

    unit = MIB
    resizes = True
    lengths = (1, 100, 512, 3000, 4096, 9000, 70_000, MIB, MIB + 4096)
    heavy = 2 * MIB
    crashes = 3

    def __init__(self, rng: random.Random, kind: str = "") -> None:
        super().__init__(rng)
        self.size = rng.choice([4 * MIB, 4 * MIB + 24576])
        self.budget = rng.choice([4200, 9000, 20_000])
        self.base = bytes(self.size)
        options: dict[str, Any] = {"size": self.size, "block_size": MIB, "log_size": MIB}
        if "4" in kind:
            options["logical_sector_size"] = 4096
        self.opened: dict[str, Any] = {"writable": True, "file-name": "disk.vhdx"}
        self.parent = "d" in kind
        if self.parent:
            self.base = random_base(rng, self.size - rng.choice([0, 4096 * rng.randrange(300)]))
            options |= {"backing_file": "base.vhdx", "backing_fmt": "vhdx"}
            options["backing_identity"] = "{11111111-2222-3333-4444-555555555555}"
            self.opened["backing"] = "given"
        image = new_image("vhdx", *sorted(options.items()))
        self.images = [image]
        if rng.random() < 0.3:
            self.capacity = [len(image) + rng.choice([2, 3, 4]) * MIB]

    def compose(self, graph: Graph) -> None:
        slots: dict[str, Node] = {"file": graph.leaves[0]}
        if self.parent:
            slots["backing"] = self.backing(graph, self.base)
        format, opening = registry.driver("vhdx").open(self.opened)  # type: ignore[misc]
        graph.mapped("vhdx", format, opening, slots)

    def check_leaks(self) -> bool:
        # Space that a crash or an abort left unused is found by the next check.
        return False


class VmdkCase(Case):
    """A sparse VMDK with grains of 64 KiB; by kind over a parent (b), with zeroed grains (z)."""

    unit = 64 << 10
    resizes = True
    lengths = (1, 100, 512, 3000, 4096, 9000, 70_000, 64 << 10, 130 << 10)
    heavy = 128 << 10
    crashes = 4

    def __init__(self, rng: random.Random, kind: str = "") -> None:
        super().__init__(rng)
        self.size = rng.choice([16 * self.unit, 16 * self.unit + 1536])
        self.budget = rng.choice([2100, 4200, 9000])
        self.base = bytes(self.size)
        options: dict[str, Any] = {"size": self.size}
        # Without zeroed grains nothing hides what the parent holds.
        self.exact_discard = "z" in kind or "b" not in kind
        if "z" in kind:
            options["zeroed_grain"] = True
        self.opened: dict[str, Any] = {"writable": True, "file-name": "disk.vmdk"}
        self.parent = "b" in kind
        if self.parent:
            self.base = random_base(rng, self.size - rng.choice([0, 512 * rng.randrange(900)]))
            options |= {"backing_file": "base.vmdk", "backing_fmt": "vmdk"}
            options["backing_identity"] = "12345678"
            self.opened["backing"] = "given"
        image = new_image("vmdk", *sorted(options.items()))
        self.images = [image]
        if rng.random() < 0.3:
            self.capacity = [len(image) + rng.choice([5, 9, 14]) * self.unit]

    def compose(self, graph: Graph) -> None:
        slots: dict[str, Node] = {"file": graph.leaves[0]}
        if self.parent:
            slots["backing"] = self.backing(graph, self.base)
        format, opening = registry.driver("vmdk").open(self.opened)  # type: ignore[misc]
        graph.mapped("vmdk", format, opening, slots)

    def check_leaks(self) -> bool:
        return False


class SesparseCase(Case):
    """A seSparse extent, its grains of 4 KiB; by kind over a parent (b)."""

    unit = 4096
    lengths = (1, 100, 512, 3000, 4096, 9000, 20_000)
    crashes = 4

    def __init__(self, rng: random.Random, kind: str = "") -> None:
        super().__init__(rng)
        self.size = rng.choice([24 * self.unit, 24 * self.unit + 1536])
        # A discard up to the old end does not reach a part of a grain once the disk has grown.
        self.resizes = self.size % self.unit == 0
        self.budget = rng.choice([4200, 33_000, 50_000])
        self.base = bytes(self.size)
        self.parent = "b" in kind
        self.exact_discard = not self.parent
        self.opened: dict[str, Any] = {"writable": True}
        if self.parent:
            self.base = random_base(rng, self.size - rng.choice([0, 512 * rng.randrange(90)]))
            self.opened["backing"] = "given"
        image = sesparse.image(self.size)
        self.images = [image]
        if rng.random() < 0.3:
            self.capacity = [len(image) + rng.choice([8, 12, 20]) * self.unit]

    def compose(self, graph: Graph) -> None:
        slots: dict[str, Node] = {"file": graph.leaves[0]}
        if self.parent:
            slots["backing"] = self.backing(graph, self.base)
        graph.mapped("vmdk", *sesparse.alone(self.opened), slots)

    def check_leaks(self) -> bool:
        return not self.capacity


class RawCase(Case):
    """Raw with an offset in the middle, on 4 KiB alignment or none."""

    unit = 1
    exact_discard = False

    def __init__(self, rng: random.Random, kind: str = "") -> None:
        super().__init__(rng)
        self.zeroes = True
        self.size = 12288
        self.base = random_base(rng, self.size)
        self.offset = 4096 + 512
        self.alignment = 4096 if "a" in kind else 1
        self.images = [bytes(self.offset) + self.base + bytes(4096 - 512)]

    def compose(self, graph: Graph) -> None:
        format, opening = raw.DRIVER.open({"offset": self.offset, "size": self.size})  # type: ignore[misc]
        graph.mapped("raw", format, opening, {"file": graph.leaves[0]})


CASES: dict[str, Callable[[random.Random], Case]] = {
    "toy": ToyCase,
    "toy-backing": lambda rng: ToyCase(rng, "b"),
    "toy-aligned": lambda rng: ToyCase(rng, "ab"),
    "toy-cipher": lambda rng: ToyCase(rng, "cb"),
    "toy-full": lambda rng: ToyCase(rng, "lb"),
    "toy-idle": lambda rng: ToyCase(rng, "i"),
    "toy-on-cipher": lambda rng: ToyCase(rng, "xb"),
    "cipher": CryptCase,
    "extents": ExtentsCase,
    "raw-offset": RawCase,
    "raw-offset-aligned": lambda rng: RawCase(rng, "a"),
    "qcow2": Qcow2Case,
    "qcow2-backing": lambda rng: Qcow2Case(rng, "b"),
    "qcow2-lazy": lambda rng: Qcow2Case(rng, "lb"),
    "qcow2-v2": lambda rng: Qcow2Case(rng, "2"),
    "qcow2-v2-backing": lambda rng: Qcow2Case(rng, "2b"),
    "qcow2-refcounts": lambda rng: Qcow2Case(rng, "rb"),
    "qcow2-aligned": lambda rng: Qcow2Case(rng, "ab"),
    "qcow2-in-raw": lambda rng: Qcow2Case(rng, "ob"),
    "qcow2-packed": lambda rng: Qcow2Case(rng, "rp"),
    "qcow2-compress": lambda rng: Qcow2Case(rng, "bc"),
    "qcow2-snapshots": lambda rng: Qcow2Case(rng, rng.choice(["s", "sb", "sl", "s2", "sp", "sr"])),
    "qcow2-snapshots-features": lambda rng: Qcow2Case(rng, rng.choice(["sxb", "sxp", "sk", "sm"])),
    "qcow2-aes": lambda rng: Qcow2Case(rng, rng.choice(["k", "kb", "xkb"])),
    "qcow2-luks": lambda rng: Qcow2Case(rng, rng.choice(["xu", "xum", "xsu"])),
    "qcow2-amend": lambda rng: Qcow2Case(rng, rng.choice(["m", "mb", "rm", "xm"])),
    "qcow2-chain": lambda rng: Qcow2Case(rng, "h"),
    "qcow2-subclusters": lambda rng: Qcow2Case(rng, "xb"),
    "qcow2-subclusters-packed": lambda rng: Qcow2Case(rng, "xp"),
    "qcow2-data-file": lambda rng: Qcow2Case(rng, "be"),
    "qcow2-raw-data": lambda rng: Qcow2Case(rng, "ew"),
    "qcow2-extended-data": lambda rng: Qcow2Case(rng, rng.choice(["xe", "xew", "xeb"])),
    "vhdx": VhdxCase,
    "vhdx-4096": lambda rng: VhdxCase(rng, "4"),
    "vhdx-differencing": lambda rng: VhdxCase(rng, "d"),
    "vmdk": VmdkCase,
    "vmdk-zeroed": lambda rng: VmdkCase(rng, "z"),
    "vmdk-backing": lambda rng: VmdkCase(rng, "b"),
    "vmdk-backing-zeroed": lambda rng: VmdkCase(rng, "bz"),
    "vmdk-sesparse": SesparseCase,
    "vmdk-sesparse-backing": lambda rng: SesparseCase(rng, "b"),
}
