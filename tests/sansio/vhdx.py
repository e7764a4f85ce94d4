"""A VHDX image driven by bytes alone, and what it takes to look into one."""

from __future__ import annotations

import struct
from typing import Any

from diskwright.findings import CheckResult
from diskwright.formats import vhdx as driver
from diskwright.formats.vhdx.format import Vhdx
from house.tinyvhdx import MIB, TinyVhdx, crc32c

from .machine import Machine

DRIVER = driver.DRIVER


def opened(data: bytes | TinyVhdx, backing: bytes | None = None, **options: Any) -> Machine:
    """An open image; writable unless ``read-only`` is told."""
    raw = data.data if isinstance(data, TinyVhdx) else data
    machine = Machine(raw, backing)
    if backing is not None:
        options["backing"] = "given"
    options.setdefault("backing", None)
    machine.open(DRIVER, **options)
    return machine


def image(machine: Machine) -> Vhdx:
    found = machine.format
    assert isinstance(found, Vhdx)
    return found


def created(**options: Any) -> bytes:
    """A new image."""
    machine = Machine()
    assert DRIVER.create is not None
    machine.run(DRIVER.create({o.name: o.default for o in DRIVER.create_options} | options))
    return bytes(machine.slots["file"])


def check(machine: Machine, fix: str = "") -> CheckResult:
    found = machine.run(machine.format.check(fix))
    assert isinstance(found, CheckResult)
    return found


def clean(data: bytes, backing: bytes | None = None) -> CheckResult:
    """Check ``data`` read-only; asserts that nothing is wrong and nothing was written."""
    machine = opened(data, backing, **{"read-only": True})
    found = check(machine)
    assert not found.corruptions and not found.check_errors, found.findings
    assert bytes(machine.slots["file"]) == data
    return found


def content(data: bytes, backing: bytes | None = None) -> bytes:
    """All guest bytes, read-only."""
    machine = opened(data, backing, **{"read-only": True})
    return b"".join(
        machine.read(at, min(MIB, machine.format.size - at))
        for at in range(0, machine.format.size, MIB)
    )


def bat_entry(data: bytes, index: int) -> int:
    """An entry of the BAT, wherever the region table says that it is."""
    (offset,) = struct.unpack_from("<Q", data, (192 << 10) + 16 + 16)
    (entry,) = struct.unpack_from("<Q", data, offset + 8 * index)
    return int(entry)


def header_of(data: bytes) -> tuple[Any, ...]:
    """(sequence, file guid, data guid, log guid) of the header in force."""
    best: tuple[Any, ...] = (-1,)
    for at in (64 << 10, 128 << 10):
        raw = data[at : at + 4096]
        if raw[:4] == b"head" and crc32c(raw[:4] + bytes(4) + raw[8:]) == int.from_bytes(
            raw[4:8], "little"
        ):
            sequence, file, guest, log = struct.unpack_from("<Q16s16s16s", raw, 8)
            best = max(best, (sequence, file, guest, log))
    return best
