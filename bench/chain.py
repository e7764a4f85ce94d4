"""Random 4 KiB reads through a chain of overlays, beside a chain of one, in one process.

Every layer holds its share of the disk's clusters, spread at random.  The first pass (every window
once) and the memory stand beside; the rounds take turns, medians are compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from diskwright.engine.kernel import Driver
from diskwright.graph.gate import Gate
from diskwright.graph.node import Node
from diskwright.graph.opener import close_disk, create_image, open_disk

CLUSTER = 65536
GATE = Gate("trusted")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the disk")
    parser.add_argument("--reads", type=int, default=1_000_000)
    parser.add_argument("--batches", default="32,1", help="reads that are asked for together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--writable", action="store_true", help="the top layer may be written to")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    return parser.parse_args()


async def make(driver: Driver, folder: Path, layers: int, size: int) -> Path:
    """A chain whose clusters lie in all layers."""
    rng = random.Random(layers)
    clusters = list(range(size // CLUSTER))
    rng.shuffle(clusters)
    below: Path | None = None
    for number in range(layers):
        path = folder / f"{layers}-{number}"
        options = {"backing_file": str(below), "backing_fmt": "qcow2"} if below else {}
        await create_image(driver, str(path), "qcow2", size, options, gate=GATE)
        node = await open_disk(driver, str(path), format="qcow2", writable=True, gate=GATE)
        own = sorted(clusters[number::layers])
        for first in range(0, len(own), 16):
            offsets = [cluster * CLUSTER for cluster in own[first : first + 16]]
            await node.write(offsets, [rng.randbytes(4096) * 16 for _ in offsets])
        await close_disk(node)
        below = path
    assert below is not None
    return below


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def timed(node: Node, size: int, reads: int, batch: int, seed: int) -> float:
    """Seconds for so many reads."""
    rng = random.Random(seed)
    pages = size // 4096
    columns = [[rng.randrange(pages) * 4096 for _ in range(batch)] for _ in range(1000)]
    lengths = [4096] * batch
    views = [memoryview(bytearray(4096)) for _ in range(batch)]
    started = time.perf_counter()
    for turn in range(reads // batch):
        await node.read(columns[turn % 1000], lengths, views)
    return time.perf_counter() - started


async def measure(driver: Driver, options: argparse.Namespace, folder: Path) -> None:
    """Make both chains, read, print."""
    nodes: list[Node] = []
    for layers in (1, options.layers):
        path = await make(driver, folder, layers, options.size)
        before = resident()
        started = time.perf_counter()
        node = await open_disk(
            driver, str(path), format="qcow2", writable=options.writable, gate=GATE
        )
        opened = time.perf_counter()
        for offset in range(0, options.size, CLUSTER):
            await node.read([offset], [4096])
        first = time.perf_counter() - opened
        more = resident() - before
        print(
            f"{layers:3} layers: opened in {1000 * (opened - started):.1f} ms, first pass over "
            f"{options.size // CLUSTER} clusters {first:.2f} s, {more / (1 << 20):+.1f} MiB"
        )
        nodes.append(node)
    for batch in map(int, options.batches.split(",")):
        found: list[list[float]] = [[], []]
        for turn in range(options.rounds):
            for which, node in enumerate(nodes):
                seconds = await timed(node, options.size, options.reads, batch, turn)
                found[which].append(seconds / options.reads * 1e6)
        one, many = (statistics.median(times) for times in found)
        print(
            f"{batch:3} a batch: {one:.2f} us through one, {many:.2f} us through "
            f"{options.layers}: {many / one:.2f}x"
        )
    for node in nodes:
        await close_disk(node)


def main() -> int:
    """Run it."""
    options = arguments()
    driver = Driver()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        driver.run(measure(driver, options, Path(folder)))
    driver.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
