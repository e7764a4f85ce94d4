"""raw by bytes alone: windows of a file and their borders."""

from __future__ import annotations

import pytest

from diskwright.contract import DISCARD, OP_DISCARD, OP_ZERO, WRITE_ZERO
from diskwright.errors import NotSupported, UsageError
from diskwright.formats import raw
from sansio.machine import Machine


def opened(file: bytes, **options: object) -> Machine:
    machine = Machine(file)
    machine.open(raw.DRIVER, **options)
    return machine


def test_plain() -> None:
    machine = opened(bytes(1024))
    machine.write(100, b"abc")
    assert machine.read(99, 5) == b"\0abc\0"
    plan = machine.format.plan([(0, 512)], WRITE_ZERO)
    assert [(s.op, s.host, s.length) for s in plan.steps] == [(OP_ZERO, 0, 512)]
    assert not machine.format.freeze().groups
    machine.run(machine.format.resize(4096))
    assert machine.format.size == len(machine.slots["file"]) == 4096
    with pytest.raises(UsageError):
        machine.run(machine.format.resize(512))
    machine.run(machine.format.resize(512, shrink=True))
    assert machine.format.size == 512


def test_a_file_that_ends_within_a_sector() -> None:
    machine = opened(b"x" * 1000)
    assert machine.format.size == 1024
    assert machine.read(0, 1024) == b"x" * 1000 + bytes(24)


def test_window() -> None:
    machine = opened(bytes(range(256)) * 16, offset=512, size=1024)
    assert machine.format.size == 1024
    assert machine.read(0, 4) == bytes(range(4))
    machine.write(1020, b"ab")
    assert machine.slots["file"][1532:1534] == b"ab"
    plan = machine.format.plan([(0, 512)], DISCARD)
    assert [(s.op, s.host, s.length) for s in plan.steps] == [(OP_DISCARD, 512, 512)]
    with pytest.raises(NotSupported):
        machine.run(machine.format.resize(4096))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 1000}, "Specified size is not multiple of 512"),
        ({"offset": 4097}, "Offset (4097) cannot be greater than size of the containing file"),
        ({"offset": 3584, "size": 1024}, "The sum of offset (3584) and size (1024) has to be"),
    ],
)
def test_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        opened(bytes(4096), **options)
    assert text in str(caught.value)


def test_create() -> None:
    machine = Machine()
    machine.run(raw.create({"size": 1000}))
    assert machine.slots["file"] == bytes(1024)
    with pytest.raises(UsageError):
        machine.run(raw.create({"size": 1 << 20, "backing_file": "x"}))
