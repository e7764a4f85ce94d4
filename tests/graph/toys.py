"""A toy format for what qcow2 and raw do not do: extents, parents by several names, identities.

Its file holds lines of ``key=value``; the disk is its extents, one behind the other, and behind
them what its backing file has.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from diskwright.contract import (
    OP_DATA,
    WRITE,
    Create,
    Length,
    MetaWrite,
    NeedMeta,
    Open,
    Plan,
    Procedure,
    Range,
    Read,
    Step,
    Truncate,
    Write,
)
from diskwright.declare import Driver, Option
from diskwright.errors import ImageError
from diskwright.extents import Data, Extent, Hole
from diskwright.graph import registry
from diskwright.tableless import Tableless

MAGIC = "TOY"


class Toy(Tableless):
    """``lines`` are what the image says; ``told`` what it was opened with."""

    name: ClassVar[str] = "toy"
    unit = 512

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.size = 0
        self.has_backing = False
        self.backing_file: str | None = None
        self.backing_format: str | None = None
        self.backing_names: list[str] = []
        self.identity: str | None = None
        self.parent_identity: str | None = None
        self.extents: list[tuple[str, int, int, str]] = []
        self.sparse_slots: list[str] = []

    def info(self) -> dict[str, Any]:
        return {}

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        out: list[Extent] = []
        for offset, length in ranges:
            end = offset + length
            while offset < end:
                slot, host, left = self._find(offset)
                count = min(left, end - offset)
                out.append(Data(slot, host, count, True) if slot else Hole(count))
                offset += count
        return out, None

    def _find(self, offset: int) -> tuple[str, int, int]:
        start = 0
        for slot, host, length, _ in self.extents:
            if offset < start + length:
                return slot, host + offset - start, start + length - offset
            start += length
        return "", 0, self.size - offset

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        assert kind == WRITE
        plan = Plan()
        for offset, length in ranges:
            slot, host, left = self._find(offset)
            assert slot and length <= left
            plan.steps.append(Step(OP_DATA, offset, length, slot, host))
        return plan

    def resize(self, size: int, preallocation: str = "off", shrink: bool = False) -> Procedure:
        """Grow by one more extent, as the options say how it fails."""
        number, more = len(self.extents), size - self.size
        fail = self.options.get("fail-resize")
        slot, name = f"extent.{number}", self.options.get("next") or f"next-{number}"
        yield Create(slot, name)
        yield Truncate(slot, more)
        if fail == "early":
            raise OSError(errno.EIO, "early")
        text = _text([*self._lines(), ("extent", f"{more} 0 {name}")])
        yield Write([MetaWrite("file", 0, text)])
        if fail == "late":
            raise OSError(errno.EIO, "late")
        self.extents.append((slot, 0, more, name))
        self.size = size

    def _lines(self) -> list[tuple[str, str]]:
        return [("extent", f"{length} {host} {name}") for _, host, length, name in self.extents]


def _text(lines: Sequence[tuple[str, str]]) -> bytes:
    return "".join([MAGIC + "\n", *(f"{key}={value}\n" for key, value in lines)]).encode()


def _open(toy: Toy) -> Procedure:
    length = yield Length("file")
    (raw,) = yield Read("file", [(0, length)])
    if not raw.startswith(MAGIC.encode()):
        raise ImageError("not a toy")
    lines = [line.split("=", 1) for line in raw.decode().splitlines()[1:]]
    for key, value in lines:
        if key == "extent":
            size, host, name = value.split(" ", 2)
            slot = f"extent.{len(toy.extents)}"
            yield Open(slot, name)
            toy.extents.append((slot, int(host), int(size), name))
            if (yield Length(slot)) < int(host) + int(size):
                raise ImageError(f"extent '{name}' is too short")
            toy.size += int(size)
        elif key == "parent":
            toy.backing_names.append(value)
        elif key == "hole":
            toy.size += int(value)
        else:
            setattr(toy, key, value)
    toy.sparse_slots = [slot for slot, *_ in toy.extents]
    if toy.backing_names:
        toy.backing_file, toy.has_backing = toy.backing_names[0], True
        yield Open("backing", toy.backing_names[0], toy.backing_format)
    return toy


created: list[dict[str, Any]] = []
"""What each creation was told."""


def _create(options: Mapping[str, Any]) -> Procedure:
    created.append(dict(options))
    names = [name for name in (options.get("extents") or "").split(":") if name]
    lines = [("extent", f"512 0 {name}") for name in names]
    lines.append(("hole", str(options["size"])))
    step = 0

    def count() -> None:
        nonlocal step
        step += 1
        if step == options.get("fail_at"):
            raise OSError(errno.ENOSPC, "No space left on device")

    for number, name in enumerate(names):
        yield Create(f"extent.{number}", name)
        count()
        yield Truncate(f"extent.{number}", 512)
        count()
        yield Write([MetaWrite(f"extent.{number}", 0, bytes([number + 1]) * 512)])
        count()
    yield Write([MetaWrite("file", 0, _text(lines))])
    count()


DRIVER = Driver(
    name="toy",
    kind="format",
    options=(Option("fail-resize", "str", ""), Option("next", "str", "")),
    create_options=(
        Option("size", "size", ""),
        Option("backing_file", "str", ""),
        Option("backing_fmt", "str", ""),
        Option("parent", "str", ""),
        Option("extents", "str", ""),
        Option("fail_at", "int", ""),
    ),
    open=lambda options: (toy := Toy(options), _open(toy)),
    create=_create,
    capabilities=frozenset({"backing", "identity"}),
)


@contextmanager
def registered() -> Iterator[None]:
    """The format ``toy`` exists meanwhile."""
    registry.register(DRIVER)
    created.clear()
    try:
        yield
    finally:
        registry.forget("toy")


def write_toy(path: str, *lines: str) -> None:
    """An image of these lines."""
    Path(path).write_text("\n".join([MAGIC, *lines, ""]))
