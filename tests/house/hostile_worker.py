"""Opens, maps and checks malformed images inside limits; run by test_hostile in its own process.

Argument: a JSON list of kinds.  Prints one JSON object: how many images, the slowest, the peak of
memory, and what went wrong.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from house import featured
from house.tinyqcow2 import Tiny
from house.tinyvhdx import FULL, MIB, PARTIAL, ZERO, TinyVhdx
from house.vmdk_mutants import KINDS as VMDK_KINDS
from house.vmdk_mutants import mutants as vmdk_mutants

LIMIT_BYTES = 512 << 20
LIMIT_SECONDS = 20.0

KINDS = {
    "v3": {},
    "v2": {"version": 2},
    "smallest clusters": {"cluster_bits": 9},
    "largest clusters": {"cluster_bits": 21},
    "packed": {"packed": True},
    "snapshot": {"snapshot": True},
    "backing": {"backing": b"/etc/passwd"},
    "dirty": {"incompatible": 1},
    "corrupt": {"incompatible": 2},
}

_PARENT = [
    ("parent_linkage", "{11111111-2222-4333-8444-555555555555}"),
    ("relative_path", ".\\base.vhdx"),
    ("absolute_win32_path", "C:\\base.vhdx"),
]
VHDX_KINDS: dict[str, dict[str, Any]] = {
    "vhdx": {},
    "vhdx, sectors of 4096": {"sector": 4096},
    "vhdx, the largest blocks": {"size": 9 << 40, "block": 256 * MIB, "blocks": {1: (ZERO, b"")}},
    "vhdx, fixed": {"fixed": True, "blocks": dict.fromkeys(range(4), (FULL, b"f"))},
    "vhdx with a log": {
        "log": {3 * MIB: (4 * MIB | FULL).to_bytes(4096, "little"), 3 * MIB + 4096: None}
    },
    "vhdx over a parent": {
        "parent": _PARENT,
        "blocks": {0: (PARTIAL, b"p"), 1: (FULL, b"f"), 2: (ZERO, b"")},
        "bitmap": {0, 2, 3, 2047},
    },
}
ALL_KINDS = (*KINDS, *VHDX_KINDS, *VMDK_KINDS, *featured.KINDS)


# Of so many mutants one is inspected, which is their opening once more.
_INSPECTED = 3


def mutants(kind: str, pairs: int, first: int = 0, every: int = 1) -> Iterator[tuple[str, bytes]]:
    """Every field at its borders, then pairs of fields, cut-off files, and noise: of all of them
    each ``every``-th from ``first`` on."""
    if kind in VHDX_KINDS:
        for said, make in itertools.islice(vhdx_mutants(kind, pairs), first, None, every):
            yield said, make()
        return
    make_all = vmdk_mutants if kind in VMDK_KINDS else qcow2_mutants
    if kind in featured.KINDS:
        make_all = featured.mutants
    yield from itertools.islice(make_all(kind, pairs), first, None, every)


def qcow2_mutants(kind: str, pairs: int) -> Iterator[tuple[str, bytes]]:
    tiny = Tiny(**KINDS[kind])  # type: ignore[arg-type]
    yield "untouched", tiny.data
    singles = []
    for name, offset, width in tiny.fields:
        now = int.from_bytes(tiny.data[offset : offset + width], "big")
        for value in tiny.borders(width, now):
            singles.append((name, offset, width, value))
    for name, offset, width, value in singles:
        yield f"{name} = {value:#x}", tiny.with_field(offset, width, value)
    rng = random.Random(kind)
    for _ in range(pairs):
        data = bytearray(tiny.data)
        said = []
        for name, offset, width, value in rng.sample(singles, rng.choice((2, 3))):
            data[offset : offset + width] = value.to_bytes(width, "big")
            said.append(f"{name} = {value:#x}")
        yield ", ".join(said), bytes(data)
    for length in (0, 1, 4, 71, 72, 103, 104, 111, 112, 511, 512, tiny.cluster, 3 * tiny.cluster):
        yield f"cut to {length}", tiny.data[:length]
    for _ in range(pairs // 4):
        data = bytearray(tiny.data)
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(5 * tiny.cluster) % len(data)] = rng.randrange(256)
        yield "noise", bytes(data)


def vhdx_mutants(kind: str, pairs: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The same of VHDX; checksums are made good again, for a bad one hides what is behind it.
    That takes a while, so what is given is how to make one."""
    tiny = TinyVhdx(**VHDX_KINDS[kind])
    whole = tiny.data

    def changed(fields: list[tuple[int, int, int]]) -> bytes:
        try:
            for offset, width, value in fields:
                tiny.data = tiny.with_field(offset, width, value)
            return tiny.data
        finally:
            tiny.data = whole

    yield "untouched", partial(changed, [])
    singles = []
    for name, offset, width in tiny.fields:
        now = int.from_bytes(tiny.data[offset : offset + width], "little")
        singles += [(name, offset, width, value) for value in tiny.borders(width, now)]
    rng = random.Random(kind)
    rng.shuffle(singles)  # a run that takes some of them takes some of every field
    for name, offset, width, value in singles:
        yield f"{name} = {value:#x}", partial(changed, [(offset, width, value)])
    for _ in range(pairs):
        some = rng.sample(singles, rng.choice((2, 3)))
        said = ", ".join(f"{name} = {value:#x}" for name, _, _, value in some)
        yield said, partial(changed, [field[1:] for field in some])
    for length in (0, 1, 8, 512, 65536, 65600, 131072, 200000, MIB, MIB + 64, 2 * MIB, 3 * MIB + 8):
        yield f"cut to {length}", partial(whole.__getitem__, slice(length))
    yield "cut in its last block", partial(whole.__getitem__, slice(-1))
    for _ in range(pairs // 4):
        noise = []
        for _ in range(rng.randrange(1, 9)):
            area = rng.choice((64 << 10, 192 << 10, MIB, 2 * MIB, 2 * MIB + 65536, 3 * MIB))
            noise.append((area + rng.randrange(8, 400), 1, rng.randrange(256)))
        yield "noise", partial(changed, noise)


def look(data: bytes, writable: bool, kind: str = "", repair: bool = False) -> None:
    """Open, map and check, with nothing but ``data``; or open what is damaged, repair it, and
    change its size."""
    from diskwright.engine.kernel import Driver
    from diskwright.engine.node import Node
    from diskwright.graph import registry
    from diskwright.graph.mapped import MappedNode
    from diskwright.graph.options import checked
    from diskwright.protocols.memory import MemoryNode
    from diskwright.protocols.null import NullNode

    driver = Driver()

    async def job() -> None:
        # A file would become sparse where a table lies far behind its end; memory cannot.
        leaf = MemoryNode(driver, data, limit=len(data) + (64 << 20))
        name = "vhdx" if kind in VHDX_KINDS else "vmdk" if kind in VMDK_KINDS else "qcow2"
        declared = registry.driver(name)
        assert declared.open is not None
        told = {**checked(declared, {}), "read-only": not writable, "check": repair}
        slots: dict[str, Node] = {"file": leaf}
        if "parent" in kind:
            told["backing"] = "given"
            slots["backing"] = NullNode(driver, 3 * MIB + 512, read_zeroes=True)
        if kind == "with data-file":
            told["data-file"] = "given"
            content = featured.files(kind)["data.raw"]
            slots["data-file"] = MemoryNode(driver, content, limit=len(content) + (64 << 20))
        elif kind == "with luks":
            told |= {"encrypt.key-secret": "s", "secrets": {"s": featured.KEY}}
        format, procedure = declared.open(told)
        node = MappedNode(driver, name, format, slots)
        node.read_only = not writable
        await node.run_procedure(procedure, whole_image=False)
        errors: list[Exception] = []
        steps = ("repair", "check", "grow", "shrink") if repair else ("info", "map", "check")
        if kind == "with bitmaps":
            steps += ("bitmaps",)
        if kind == "snapshot":
            steps += ("take", "apply", "delete") if writable else ("show",)
        for step in (*steps, "read", "close"):
            try:
                if step == "info":
                    format.info()
                elif step == "map":
                    await map_all(node)
                elif step == "check":
                    await node.run_procedure(format.check())
                elif step in ("take", "apply", "delete", "show"):
                    await node.run_procedure(snapshot_step(format, step))
                elif step == "bitmaps":
                    await each_bitmap(node, writable)
                elif step == "repair":
                    await node.run_procedure(format.check("all"))
                elif step in ("grow", "shrink"):
                    size = node.size // 2 if step == "shrink" else node.size + 9 * MIB
                    await node.run_procedure(format.resize(size // 4096 * 4096, "off", True))
                elif step == "read":
                    await node.read([0], [min(node.size, 1 << 16)])
                    if writable:
                        await node.write([0], [b"x" * min(node.size, 700)])
                        await node.flush()
                else:
                    await node.close()
            except Exception as error:
                errors.append(error)
        for error in errors:
            expected(error)

    try:
        driver.run(job())
    except Exception as error:
        expected(error)
    finally:
        driver.close()


async def each_bitmap(node: Any, writable: bool) -> None:
    """Load them, and change what is there."""
    from diskwright.bits import BitmapError
    from diskwright.engine import bitmaps

    for name in [bitmap.name for bitmap in node.engine.bitmaps]:
        try:
            await bitmaps.load(node.engine, name)
            if writable:
                await bitmaps.clear(node.engine, name)
                await bitmaps.add(node.engine, "new", 4096, persistent=True)
                await bitmaps.remove(node.engine, name)
        except BitmapError:
            pass


def snapshot_step(format: Any, step: str) -> Any:
    """The procedure that takes a snapshot, or does this with the first one."""
    from diskwright.abilities import SnapshotInfo

    if step == "take":
        return format.create_snapshot(SnapshotInfo("", "new"))
    first = format.snapshots[0].id if format.snapshots else None
    return getattr(format, f"{step}_snapshot")(first, None)


async def map_all(node: object) -> None:
    offset = 0
    while offset < node.size:  # type: ignore[attr-defined]
        length = node.size - offset  # type: ignore[attr-defined]
        parts = await node.extents(offset, min(length, 1 << 40))  # type: ignore[attr-defined]
        assert parts
        covered = sum(part.length for part in parts)
        assert covered == min(length, 1 << 40)
        offset += covered


def look_from_outside(data: bytes) -> None:
    """What `inspect` says of it, at once and as a stream."""
    from diskwright.engine.budget import Budget
    from diskwright.ops.inspect import Inspector, judge
    from diskwright.ops.inspecting.window import FileWindow

    inspector = Inspector()
    inspector.feed(data)
    found = judge(FileWindow(len(data), lambda at, length: data[at : at + length]), "-", Budget())
    streamed = inspector.finish()
    assert streamed.not_seen or streamed == found
    found.to_dict()


def expected(error: Exception) -> None:
    """Let the two kinds of error pass that a caller can act on."""
    from diskwright.errors import DiskError

    if not isinstance(error, DiskError | OSError):
        raise error


def main() -> None:
    kind, pairs, first, every = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    count = 0
    slowest = (0.0, "")
    wrong: list[str] = []
    for number, (said, data) in enumerate(mutants(kind, pairs, first, every)):
        for mode in ("read-only", "writable", *([] if kind in KINDS else ["repair"])):
            count += 1
            start = time.monotonic()
            try:
                if mode == "read-only" and not number % _INSPECTED:
                    look_from_outside(data)
                look(data, mode != "read-only", kind, mode == "repair")
            except (Exception, RecursionError):
                wrong.append(f"{kind}, {mode}, {said}:\n{traceback.format_exc(limit=-4)}")
            slowest = max(slowest, (time.monotonic() - start, said))
            if len(data) > 1 << 20:
                gc.collect()  # the nodes of a graph know each other
            if len(wrong) > 20:
                break
    found = {"count": count, "slowest": slowest, "peak_mib": peak_mib(), "wrong": wrong}
    print(json.dumps(found))


def peak_mib() -> int:
    """The peak of this program's memory.  (Linux: ``ru_maxrss`` begins with that of whoever
    started it.)"""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) >> 10
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    main()
