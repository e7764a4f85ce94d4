"""Formats made for these tests: one that is written in one pass, one whose check repairs."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from diskwright.codecs.deflate import Deflate
from diskwright.contract import (
    Barrier,
    MetaWrite,
    NeedMeta,
    Plan,
    Procedure,
    Range,
    Read,
    Write,
)
from diskwright.declare import Driver, Option
from diskwright.extents import Extent, Hole
from diskwright.findings import CheckResult
from diskwright.graph import registry
from diskwright.tableless import Tableless

UNIT = 64 << 10


class Listing:
    """Units behind one another, each with its index and length; ``TAIL`` says that it is whole."""

    unit = UNIT

    def __init__(self) -> None:
        self.codec = Deflate(1)

    def head(self) -> Iterable[bytes]:
        yield b"HEAD"

    def put(self, index: int, packed: bytes) -> Iterable[bytes]:
        yield struct.pack("<II", index, len(packed))
        yield packed

    def end(self) -> Iterable[bytes]:
        yield b"TAIL"


def unlisted(image: bytes, size: int) -> bytes:
    """The disk in a listing."""
    assert image[:4] == b"HEAD" and image[-4:] == b"TAIL"
    out, at = bytearray(size), 4
    while at < len(image) - 4:
        index, length = struct.unpack_from("<II", image, at)
        at += 8 + length
        unit = Deflate(1).unpack(image[at - length : at], UNIT)
        out[index * UNIT : (index + 1) * UNIT] = unit
    return bytes(out[:size])


class Flawed(Tableless):
    """A disk of one sector that reads as zeroes.  Byte 0 of the file counts its leaks, byte 1 its
    corruptions, byte 2 corruptions that cannot be repaired."""

    name: ClassVar[str] = "flawed"
    size = 512
    unit = 512
    backing_file: str | None = None
    backing_format: str | None = None

    def info(self) -> dict[str, Any]:
        return {}

    def opening(self) -> Procedure:
        yield Read("file", [(0, 1)])
        return self

    def check(self, fix: str = "") -> Procedure:
        ((leaks, wrong, lost),) = yield Read("file", [(0, 3)])
        found = CheckResult()
        found.leaks, found.corruptions = leaks, wrong + lost
        if leaks and fix:
            found.say("Repairing leaks")
            found.leaks_fixed, leaks = leaks, 0
        if wrong and fix == "all":
            found.say("Repairing corruptions")
            found.corruptions_fixed, wrong = wrong, 0
        if fix:
            yield Write([MetaWrite("file", 0, bytes([leaks, wrong, lost]))])
            yield Barrier()
        return found

    def map(self, ranges: list[Range]) -> tuple[list[Extent], NeedMeta | None]:
        return [Hole(length) for _, length in ranges], None

    def plan(self, ranges: list[Range], kind: str) -> Plan | None:
        return None

def _open(options: Mapping[str, Any]) -> tuple[Flawed, Procedure]:
    format = Flawed()
    return format, format.opening()


def _create(options: Mapping[str, Any]) -> Procedure:
    yield Write([MetaWrite("file", 0, b"not a listing")])
    yield Barrier()


def _stream(options: Mapping[str, Any]) -> Listing | None:
    return Listing() if options.get("subformat") != "plain" else None


LISTING = Driver(
    "listing",
    "format",
    create_options=(
        Option("size", "size", "size"),
        Option("subformat", "str", "'plain': not in one pass", "one-pass"),
        Option("backing_file", "str", "a name"),
        Option("backing_fmt", "str", "its format"),
    ),
    open=_open,
    create=_create,
    stream=_stream,
)
FLAWED = Driver("flawed", "format", open=_open)


@contextmanager
def known(*drivers: Driver) -> Iterator[None]:
    """Make drivers known for a while."""
    for driver in drivers:
        registry.register(driver)
    try:
        yield
    finally:
        for driver in drivers:
            registry.forget(driver.name)
