"""What is fuzzed, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from fuzz import inputs, others
from fuzz.samples import FORMATS


class Target(NamedTuple):
    """``run`` does everything to an input, and raises what should not be; ``said`` tells what the
    input means; ``mutate`` is for inputs with a form."""

    run: Callable[[bytes], int]
    seeds: Callable[[], Sequence[bytes]]
    mutate: Callable[..., bytes] | None = None
    said: Callable[[bytes], str] = bytes.hex


def _said(format: str, data: bytes) -> str:
    sample, mode, parts, changes = inputs.decode(format, data)
    lines = [
        f"{change.file} at {change.at:#x}: {(change.data or b'(end)').hex()}" for change in changes
    ]
    return "\n".join([f"{sample}, {mode} {parts}", *lines])


TARGETS = {
    name: Target(
        partial(inputs.run, name), partial(inputs.seeds, name), inputs.mutate, partial(_said, name)
    )
    for name in FORMATS
} | {
    "inspect": Target(others.probe, others.images),
    "nbd": Target(others.serve, others.streams),
}
