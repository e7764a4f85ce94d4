"""Opens, maps and checks malformed images inside limits; run by test_hostile in its own process.

Argument: a JSON list of kinds.  Prints one JSON object: how many images, the slowest, the peak of
memory, and what went wrong.
"""

from __future__ import annotations

import gc
import json
import random
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from house.tinyqcow2 import Tiny

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


def mutants(kind: str, pairs: int) -> Iterator[tuple[str, bytes]]:
    """Every field at its borders, then pairs of fields, cut-off files, and noise."""
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


def look(data: bytes, writable: bool) -> None:
    """Open, map and check, with nothing but ``data``."""
    from diskwright.engine.kernel import Driver
    from diskwright.graph import registry
    from diskwright.graph.mapped import MappedNode
    from diskwright.graph.options import checked
    from diskwright.protocols.memory import MemoryNode

    driver = Driver()

    async def job() -> None:
        # A file would become sparse where a table lies far behind its end; memory cannot.
        leaf = MemoryNode(driver, data, limit=len(data) + (64 << 20))
        declared = registry.driver("qcow2")
        assert declared.open is not None
        format, procedure = declared.open({**checked(declared, {}), "read-only": not writable})
        node = MappedNode(driver, "qcow2", format, {"file": leaf})
        node.read_only = not writable
        await node.run_procedure(procedure, whole_image=False)
        errors: list[Exception] = []
        for step in ("info", "map", "check", "read", "close"):
            try:
                if step == "info":
                    format.info()
                elif step == "map":
                    await map_all(node)
                elif step == "check":
                    await node.run_procedure(format.check())
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


async def map_all(node: object) -> None:
    offset = 0
    while offset < node.size:  # type: ignore[attr-defined]
        length = node.size - offset  # type: ignore[attr-defined]
        parts = await node.extents(offset, min(length, 1 << 40))  # type: ignore[attr-defined]
        assert parts
        covered = sum(part.length for part in parts)
        assert covered == min(length, 1 << 40)
        offset += covered


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
    for number, (said, data) in enumerate(mutants(kind, pairs)):
        if number % every != first:
            continue
        for writable in (False, True):
            count += 1
            start = time.monotonic()
            try:
                look(data, writable)
            except (Exception, RecursionError):
                mode = "writable" if writable else "read-only"
                wrong.append(f"{kind}, {mode}, {said}:\n{traceback.format_exc(limit=-4)}")
            slowest = max(slowest, (time.monotonic() - start, said))
            if len(data) > 1 << 20:
                gc.collect()  # the nodes of a graph know each other
            if len(wrong) > 20:
                break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"count": count, "slowest": slowest, "peak_mib": peak, "wrong": wrong}))


if __name__ == "__main__":
    main()
