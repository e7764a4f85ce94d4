"""Running our commands and QEMU's on the same images, and a model of what must be on them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    **{k: v for k, v in os.environ.items() if not k.startswith("DISKWRIGHT_")},
    "PYTHONPATH": str(ROOT / "src"),
    "LC_ALL": "C",
}
TRUSTED = {**ENV, "DISKWRIGHT_POLICY": "trusted"}
OURS = [sys.executable, "-m", "diskwright"]


def run(
    command: list[str | Path], *, status: int | tuple[int, ...] = 0, env: dict[str, str] = TRUSTED
) -> str:
    """Run it; the exit status must be (one of) ``status``.  Returns what it printed, errors too."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        timeout=60,
    )
    text = done.stdout.decode(errors="replace")
    wanted = (status,) if isinstance(status, int) else status
    assert done.returncode in wanted, f"{command} ended with {done.returncode}:\n{text}"
    assert "Traceback" not in text, text
    return text


class Op(NamedTuple):
    kind: str
    offset: int
    length: int
    pattern: int = 0

    def command(self) -> str:
        """In the language that qemu-io and `diskwright io` share."""
        if self.kind == "write":
            return f"write -q -P {self.pattern:#x} {self.offset} {self.length}"
        if self.kind == "zero":
            return f"write -q -z {self.offset} {self.length}"
        if self.kind == "unmap":
            return f"write -q -z -u {self.offset} {self.length}"
        return f"discard -q {self.offset} {self.length}"


class Geometry(NamedTuple):
    """The create options of one random image."""

    size: int
    cluster_size: int
    compat: str
    refcount_bits: int
    lazy_refcounts: bool
    preallocation: str

    def options(self) -> str:
        return (
            f"cluster_size={self.cluster_size},compat={self.compat},"
            f"refcount_bits={self.refcount_bits},"
            f"lazy_refcounts={'on' if self.lazy_refcounts else 'off'},"
            f"preallocation={self.preallocation}"
        )


def geometry(rng: random.Random, *, backing: bool = False) -> Geometry:
    """Options that are valid together; sizes are sectors, often odd ones."""
    cluster_bits = rng.choice((9, 10, 12, 13, 16, 16, 16, 18, 21))
    cluster = 1 << cluster_bits
    v2 = rng.random() < 0.25
    clusters = rng.randrange(1, 40 if cluster_bits > 13 else 400)
    size = (clusters * cluster + rng.choice((0, 0, 512, -512))) or 512
    if cluster_bits == 21:
        size = rng.randrange(1, 10 << 11) * 512
    preallocation = "off" if backing else rng.choice(("off", "off", "metadata", "falloc", "full"))
    return Geometry(
        size,
        cluster,
        "0.10" if v2 else "1.1",
        16 if v2 else rng.choice((1, 2, 4, 8, 16, 16, 32, 64)),
        not v2 and rng.random() < 0.3,
        preallocation,
    )


def operations(
    rng: random.Random, size: int, cluster: int, count: int, *, discard: bool = True
) -> list[Op]:
    """Writes, zeroes and discards; some aligned, most not."""
    kinds = ["write"] * 6 + ["zero", "unmap"] + (["discard"] * 2 if discard else [])
    out = []
    for _ in range(count):
        kind = rng.choice(kinds)
        offset = rng.randrange(size)
        length = rng.choice((1, 511, 512, 4096, cluster, 2 * cluster + 5, 3 * cluster))
        if rng.random() < 0.4:
            offset -= offset % cluster
        if kind != "write" or rng.random() < 0.5:  # QEMU takes these in sectors only
            offset -= offset % 512
            length = -(-length // 512) * 512
        length = min(length, size - offset)
        if length > 0:
            out.append(Op(kind, offset, length, rng.randrange(1, 256)))
    return out


def apply(model: bytearray, ops: list[Op], cluster: int) -> None:
    """What ``ops`` do to the bytes; a discard zeroes the whole clusters within it."""
    size = len(model)
    for op in ops:
        start, end = op.offset, op.offset + op.length
        if op.kind == "write":
            model[start:end] = bytes([op.pattern]) * op.length
            continue
        if op.kind == "discard":
            start = -(-start // cluster) * cluster
            end = end if end >= size else end - end % cluster
        if start < end:
            model[start:end] = bytes(end - start)


def io_arguments(ops: list[Op]) -> list[str]:
    """``-c`` options for all of ``ops``."""
    return [word for op in ops for word in ("-c", op.command())]


def first_difference(a: bytes, b: bytes) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)


def assert_bytes(found: bytes, model: bytes | bytearray, what: str) -> None:
    if found != model:
        at = first_difference(found, bytes(model))
        raise AssertionError(
            f"{what}: {len(found)} bytes for {len(model)}, first difference at {at:#x}: "
            f"{found[at : at + 8].hex()} for {bytes(model[at : at + 8]).hex()}"
        )
