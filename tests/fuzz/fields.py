"""Every field that a format decodes, found by watching it decode.

A format declares its structures as module constants (:class:`diskwright.ondisk.Fields`) and decodes
its tables by the functions of that module.  While a sound image goes through everything that
:mod:`fuzz.attack` does, all of them are replaced by ones that note what they decode.  Where those
bytes stand in the image's files, there the fields are: nobody has to write them down again, and
nobody can forget one.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import diskwright.formats
from diskwright import ondisk
from diskwright.ondisk import Fields
from fuzz.attack import MODES, attack
from fuzz.machine import Hostile, Sample

_ARRAYS = ("big_endian_array", "little_endian_array")
_MOST_PLACES = 6
"""Of the same bytes, such as the copies of a header."""
_ENTRIES = 4
"""Of a table, besides the empty ones and the last."""


class Field(NamedTuple):
    """``width`` bytes at ``at`` of ``file``; a number, or (``number`` False) bytes."""

    name: str
    file: str
    at: int
    width: int
    order: str
    number: bool = True

    def value(self, files: dict[str, bytes]) -> int:
        """What it is in these files."""
        return int.from_bytes(files[self.file][self.at : self.at + self.width], self.order)  # type: ignore[arg-type]


def modules() -> list[ModuleType]:
    """All of `formats`."""
    found = pkgutil.walk_packages(diskwright.formats.__path__, "diskwright.formats.")
    return [importlib.import_module(entry.name) for entry in found]


def declared() -> dict[str, struct.Struct]:
    """Every structure that a format declares, by module and name."""
    return {
        f"{module.__name__.removeprefix('diskwright.formats.')}.{name}": value
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, struct.Struct)
    }


class Notes:
    """What was decoded of an image, and where it stands."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.machine: Hostile | None = None
        self.fields: dict[tuple[str, int, int], Field] = {}
        self.seen: set[str] = set()
        """Structures, and modules that decode tables, of which something was found."""

    def places(self, raw: bytes) -> Iterator[tuple[str, int]]:
        """Where these bytes are in the files, within what was read of them."""
        machine = self.machine
        if machine is None or not raw.strip(b"\0"):
            return
        names = {id(data): name for name, data in machine.files.items()}
        found = set()
        for slot, offset, length in reversed(machine.asked):
            name = names.get(id(machine.slots.get(slot)))
            if name is None:
                continue
            data = self.sample.files.get(name, b"")
            at = data.find(raw, offset, offset + length)
            while at >= 0 and len(found) < _MOST_PLACES:
                found.add((name, at))
                at = data.find(raw, at + 1, offset + length)
        yield from sorted(found)

    def structure(self, name: str, layout: struct.Struct, raw: bytes) -> None:
        """``raw`` was decoded as this structure."""
        for file, at in self.places(raw):
            self.seen.add(name)
            order = "big" if layout.format[0] == ">" else "little"
            for field, inside, width, number in parts(layout):
                self.add(Field(f"{name}.{field}", file, at + inside, width, order, number))

    def table(self, name: str, bits: int, order: str, raw: bytes) -> None:
        """``raw`` was decoded as a table of numbers, in module ``name``."""
        width = bits // 8
        for file, at in self.places(raw.rstrip(b"\0")):
            self.seen.add(name)
            filled = [n for n in range(len(raw) // width) if any(raw[n * width : (n + 1) * width])]
            empty = next((n for n in range(len(raw) // width) if n not in filled), None)
            chosen = {*filled[:_ENTRIES], filled[-1], len(raw) // width - 1}
            for number in sorted(chosen if empty is None else {*chosen, empty}):
                place = at + number * width
                if place + width <= len(self.sample.files[file]):
                    self.add(Field(f"{name} entry {number}", file, place, width, order))

    def add(self, field: Field) -> None:
        """The first name of a field stays."""
        if field.number or field.width:
            self.fields.setdefault((field.file, field.at, field.width), field)


def parts(layout: struct.Struct) -> list[tuple[str, int, int, bool]]:
    """(name, offset, width, whether it is a number) of the fields of a structure."""
    if not isinstance(layout, Fields):
        return [("", 0, layout.size, False)]
    kinds = re.findall(r"\d*[a-zA-Z]", layout.format)
    return [
        (name, at, width, kind[-1] != "s")
        for (name, (at, width)), kind in zip(layout.places.items(), kinds, strict=True)
    ]


class _Watched:
    """A structure that notes what it decodes."""

    def __init__(self, name: str, layout: struct.Struct, notes: Notes) -> None:
        self._name, self._layout, self._notes = name, layout, notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layout, name)

    def unpack(self, data: Any) -> Any:
        self._notes.structure(self._name, self._layout, bytes(data))
        return self._layout.unpack(data)

    def unpack_from(self, data: Any, offset: int = 0) -> Any:
        raw = bytes(memoryview(data)[offset : offset + self._layout.size])
        self._notes.structure(self._name, self._layout, raw)
        return self._layout.unpack_from(data, offset)


@contextmanager
def watching(notes: Notes) -> Iterator[None]:
    """What formats decode meanwhile is noted."""
    changed: list[tuple[ModuleType, str, Any]] = []
    for module in modules():
        short = module.__name__.removeprefix("diskwright.formats.")
        for name, value in list(vars(module).items()):
            if isinstance(value, struct.Struct):
                new: Any = _Watched(f"{short}.{name}", value, notes)
            elif name in _ARRAYS and value is getattr(ondisk, name):
                new = _watched_array(value, short, notes)
            else:
                continue
            changed.append((module, name, value))
            setattr(module, name, new)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def _watched_array(function: Any, module: str, notes: Notes) -> Any:
    order = function.__name__.split("_")[0]

    def decode(bits: int, data: Any) -> Any:
        notes.table(module, bits, order, bytes(data))
        return function(bits, data)

    return decode


@cache
def _watched(sample_of: tuple[str, int]) -> Notes:
    from fuzz.samples import samples

    sample = samples(sample_of[0])[sample_of[1]]
    notes = Notes(sample)
    with watching(notes):
        for mode in MODES[sample.format]:
            notes.machine = Hostile(sample, sample.files, mode in ("look", "salvage"))
            attack(sample, sample.files, mode, notes.machine)
    return notes


def watched(sample: Sample) -> Notes:
    """What is decoded of a sample."""
    from fuzz.samples import samples

    return _watched((sample.format, samples(sample.format).index(sample)))


def fields(sample: Sample) -> list[Field]:
    """All fields of a sample, in the order of its files."""
    return [field for _, field in sorted(watched(sample).fields.items())]
