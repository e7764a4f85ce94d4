"""kill -9 at a random moment of `io`: what was flushed is there, and the image is good."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from interop.tools import OURS, TRUSTED, geometry, operations, run

Peer = Callable[[str], str]
UNIT = 512


class Allowed:
    """For every sector the contents that it may have: what was flushed, or written since."""

    def __init__(self, size: int) -> None:
        self.units: list[set[int]] = [{0} for _ in range(-(-size // UNIT))]

    def wrote(self, offset: int, length: int, value: int) -> None:
        for unit in range(offset // UNIT, (offset + length) // UNIT):
            self.units[unit].add(value)

    def flushed(self, writes: list[tuple[int, int, int]]) -> None:
        for offset, length, value in writes:
            for unit in range(offset // UNIT, (offset + length) // UNIT):
                self.units[unit] = {value}

    def check(self, data: bytes) -> None:
        for unit, allowed in enumerate(self.units):
            sector = data[unit * UNIT : unit * UNIT + UNIT]
            first = sector[0]
            assert sector == bytes([first]) * len(sector), f"sector {unit} is torn"
            assert first in allowed, f"sector {unit} holds {first}, allowed {sorted(allowed)}"


class Kind(NamedTuple):
    """What is made: its format, create options, size and cluster size in bytes."""

    format: str
    options: str
    size: int
    cluster_size: int


def qcow2(rng: random.Random) -> Kind:
    g = geometry(rng)._replace(preallocation="off")
    return Kind("qcow2", g.options(), g.size, g.cluster_size)


def vhdx(rng: random.Random) -> Kind:
    size = rng.randrange(1, 20 << 11) * 512
    return Kind("vhdx", f"block_size={rng.choice((1, 1, 2, 8))}M", size, 64 << 10)


def vmdk(rng: random.Random) -> Kind:
    kinds = ("monolithicSparse", "monolithicSparse,zeroed_grain=on", "twoGbMaxExtentSparse")
    size = rng.randrange(1, 20 << 11) * 512
    return Kind("vmdk", f"subformat={rng.choice((*kinds, 'vmfsSparse'))}", size, 64 << 10)


def kill_once(seed: int, peer: Peer, folder: Path, make: Callable[[random.Random], Kind]) -> int:
    """Returns how many flushes were answered before the end."""
    rng = random.Random(seed)
    g = make(rng)
    image = folder / f"disk.{g.format}"
    run([*OURS, "create", "-q", "-f", g.format, "-o", g.options, image, str(g.size)])
    allowed = Allowed(g.size)
    process = subprocess.Popen(
        [*OURS, "io", "-f", g.format, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=TRUSTED,
        bufsize=0,
    )
    assert process.stdin and process.stdout
    answered = 0
    timer: threading.Timer | None = None
    try:
        while answered < 400:
            writes = []
            lines = []
            discard = g.format == "qcow2"  # others discard in other units
            count = rng.randrange(1, 8)
            for op in operations(rng, g.size, g.cluster_size, count, discard=discard):
                offset = op.offset - op.offset % UNIT
                length = min(-(-op.length // UNIT) * UNIT, g.size - offset)
                if op.kind == "discard":  # zero or as it was: both within what is asked here
                    start = -(-offset // g.cluster_size) * g.cluster_size
                    end = offset + length
                    end = end if end >= g.size else end - end % g.cluster_size
                    if start >= end:
                        continue
                    offset, length = start, end - start
                value = op.pattern if op.kind == "write" else 0
                lines.append(op._replace(offset=offset, length=length).command())
                writes.append((offset, length, value))
            for write in writes:
                allowed.wrote(*write)
            process.stdin.write("\n".join([*lines, "flush", "length", ""]).encode())
            seen = b""
            while b" bytes" not in seen and b"iB\n" not in seen:  # what `length` prints
                part = process.stdout.read(4096)
                if not part:
                    raise BrokenPipeError
                seen += part
            allowed.flushed(writes)
            answered += 1
            if timer is None:
                timer = threading.Timer(rng.random() * 0.6, process.kill)
                timer.start()
    except BrokenPipeError:
        pass
    finally:
        if timer is not None:
            timer.join()
        process.kill()
        status = process.wait()
        process.stdin.close()
        process.stdout.close()
    assert status == -signal.SIGKILL
    logged = g.format == "vhdx"  # QEMU looks at one only when its log has been replayed
    if not logged:
        run([peer("qemu-img"), "check", "-q", image], status=(0, 3))
    run([*OURS, "check", "-q", image], status=(0, 3))
    raw = folder / "after.raw"
    run([*OURS, "convert", "-O", "raw", image, raw])
    allowed.check(raw.read_bytes())
    if logged:
        run([peer("qemu-img"), "check", "-q", "-r", "all", image])
    run([peer("qemu-img"), "compare", "-q", "-f", "raw", raw, image])
    # It can be worked with as if nothing had been.
    run([*OURS, "io", "-c", "write -P 0x77 0 512", "-c", "read -P 0x77 0 512", image])
    run([peer("qemu-img"), "check", "-q", image], status=(0, 3))
    return answered


@pytest.mark.parametrize("seed", range(6))
def test_what_was_flushed_is_there(seed: int, peer: Peer, tmp_path: Path) -> None:
    assert kill_once(seed, peer, tmp_path, qcow2) > 0


@pytest.mark.parametrize("make", [vhdx, vmdk])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_of_other_formats(
    seed: int, make: Callable[[random.Random], Kind], peer: Peer, tmp_path: Path
) -> None:
    assert kill_once(seed, peer, tmp_path, make) > 0


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 400))
@pytest.mark.parametrize("make", [qcow2, vhdx, vmdk])
def test_at_many_moments(
    seed: int, make: Callable[[random.Random], Kind], peer: Peer, tmp_path: Path
) -> None:
    kill_once(seed, peer, tmp_path, make)
