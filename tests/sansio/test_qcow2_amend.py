"""Amending qcow2 by bytes alone: every change of every kind of image keeps the content, checks
clean here and with qemu-img, and leaves a good image wherever it is cut off."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

from diskwright.abilities import SnapshotInfo
from diskwright.contract import (
    DISCARD,
    WRITE_ZERO,
    ZERO_UNMAP,
    Barrier,
    Truncate,
    Write,
)
from diskwright.errors import UsageError
from diskwright.formats import qcow2
from diskwright.formats.qcow2 import header as hd
from sansio.machine import Machine, put
from sansio.oracle import check, needs_qemu, raw
from sansio.test_qcow2_cross import made, own_check

SECTOR = 512
SIZE = 96 * 1024


def worked(rng: random.Random, base: bytes | None, **options: Any) -> tuple[Machine, bytearray]:
    """An image with data, zeroes of both kinds and holes, and its content."""
    machine = made(SIZE, base, **options)
    model = bytearray((base or b"").ljust(SIZE, b"\0"))
    work(machine, model, rng)
    return machine, model


def work(machine: Machine, model: bytearray, rng: random.Random) -> None:
    unit = machine.format.unit
    for _ in range(30):
        count = rng.choice([1, 1, 3])
        offset = rng.randrange(0, SIZE) // unit * unit
        length = min(count * unit, SIZE - offset)
        what = rng.random()
        if what < 0.5:
            data = rng.randbytes(length)
            machine.write(offset, data)
        else:
            data = bytes(length)
            kind = rng.choice([WRITE_ZERO, ZERO_UNMAP, DISCARD])
            if not machine.change(offset, length, kind):
                machine.write(offset, data)
        model[offset : offset + length] = data
    settle(machine)


def settle(machine: Machine) -> None:
    for _ in range(9):
        machine.flush()
        if not machine.store.dirty():
            return
    raise AssertionError("it does not come to rest")


def amended(machine: Machine, **options: Any) -> None:
    machine.run(machine.format.amend(options))


def judge(file: bytes, base: bytes | None, model: bytes) -> Machine:
    """The image opens for writing, has no corruption, and reads as ``model``."""
    again = Machine(file, base)
    again.open(qcow2.DRIVER, writable=True)
    assert again.read(0, len(model)) == model
    result = own_check(bytes(again.slots["file"]))
    assert result.corruptions == 0, result.findings[:3]
    return again


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"cluster_size": 512, "compat": "0.10"}, {"compat": "1.1"}),
    ({"cluster_size": 65536, "compat": "0.10"}, {"compat": "v3", "lazy_refcounts": True}),
    ({"cluster_size": 512}, {"compat": "0.10"}),
    ({"cluster_size": 4096, "lazy_refcounts": True}, {"compat": "0.10"}),
    ({"cluster_size": 16384, "compression_type": "zstd"}, {"compat": "v2"}),
    ({"cluster_size": 512, "lazy_refcounts": True}, {"lazy_refcounts": False}),
    ({"cluster_size": 512}, {"lazy_refcounts": True}),
    ({"cluster_size": 512, "refcount_bits": 8}, {"compat": "0.10", "refcount_bits": 16}),
    ({"cluster_size": 512, "compat": "0.10"}, {"compat": "1.1", "refcount_bits": 1}),
    *(
        ({"cluster_size": 512, "refcount_bits": old}, {"refcount_bits": new})
        for old in (1, 4, 8, 16, 64)
        for new in (1, 2, 16, 32, 64)
        if old != new
    ),
    ({"cluster_size": 65536}, {"refcount_bits": 2}),
    ({"cluster_size": 512}, {"size": 2 * SIZE, "refcount_bits": 32}),
]


@pytest.mark.parametrize(("options", "changes"), CASES, ids=str)
@pytest.mark.parametrize("backing", [False, True])
def test_amend(
    options: dict[str, Any], changes: dict[str, Any], backing: bool, tmp_path: Path
) -> None:
    rng = random.Random(str((options, changes, backing)))
    base = rng.randbytes(SIZE // 3 * 2) if backing else None
    machine, model = worked(rng, base, **options)
    start = bytes(machine.slots["file"])
    machine.log.clear()
    amended(machine, **changes)
    h = machine.format.header
    if changes.get("compat") in ("0.10", "v2"):
        assert h.version == 2
        assert not machine.format.lazy
    if "refcount_bits" in changes:
        assert machine.format.refcount_bits == changes["refcount_bits"]
    if "lazy_refcounts" in changes:
        assert machine.format.lazy == changes["lazy_refcounts"]
    size = changes.get("size", SIZE)
    model.extend(bytes(size - SIZE))
    log = list(machine.log)
    # It is whole, and goes on being written to.
    assert machine.read(0, size) == model
    data = rng.randbytes(min(3 * machine.format.unit, SIZE))
    machine.write(0, data)
    machine.flush()
    again = judge(bytes(machine.slots["file"]), base, data + bytes(model[len(data) :]))
    amended(again)
    for cut in rng.sample(range(len(log) + 1), min(12, len(log) + 1)):
        judge(crashed(start, log, cut, rng), base, bytes(model[:SIZE]))


def crashed(start: bytes, log: list[tuple[Any, ...]], cut: int, rng: random.Random) -> bytes:
    """The file with ``cut`` requests issued: of those that no barrier covers any may be missing,
    and one may be torn."""
    file = bytearray(start)
    last = max((i for i in range(cut) if log[i][0] == "barrier"), default=-1)
    chance = rng.choice([0.0, 0.5, 1.0])
    for i, entry in enumerate(log[:cut]):
        if entry[0] == "truncate":
            file.extend(bytes(max(0, entry[1] - len(file))))
        elif entry[0] == "write":
            _, offset, data = entry
            if i > last:
                if rng.random() < chance:
                    continue
                if rng.random() < 0.5:
                    boundary = rng.randrange(0, len(data) + 1)
                    boundary -= (offset + boundary) % SECTOR
                    data = data[: max(boundary, 0)]
            put(file, offset, data)
    return bytes(file)


class Failing(Machine):
    """A file whose n-th change fails."""

    left = 1 << 30

    def _serve(self, request: Any) -> Any:
        if isinstance(request, Write | Truncate | Barrier):
            self.left -= 1
            if not self.left:
                raise OSError(errno.EIO, "Input/output error")
        return super()._serve(request)


@pytest.mark.parametrize(("options", "changes"), CASES[:9] + CASES[10:20:4], ids=str)
def test_nth_failure(options: dict[str, Any], changes: dict[str, Any]) -> None:
    """It is told, and what is on the disk then is a good image."""
    rng = random.Random(str((options, changes)))
    base = rng.randbytes(SIZE // 3 * 2)
    machine, model = worked(rng, base, **options)
    start = bytes(machine.slots["file"])
    for n in (*range(1, 12), 20, 40, 80):
        failing = Failing(start, base)
        failing.open(qcow2.DRIVER, writable=True)
        failing.left = n
        try:
            amended(failing, **changes)
        except OSError as error:
            assert error.errno == errno.EIO
        else:
            break
        judge(bytes(failing.slots["file"]), base, bytes(model))


@needs_qemu
@pytest.mark.parametrize(("options", "changes"), CASES[::3], ids=str)
def test_qemu_finds_nothing(
    options: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    machine, model = worked(random.Random(str(options)), None, **options)
    amended(machine, **changes)
    path = tmp_path / "amended.qcow2"
    path.write_bytes(machine.slots["file"])
    check(path)
    size = changes.get("size", SIZE)
    assert raw(path, tmp_path / "raw") == bytes(model).ljust(size, b"\0")


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({}, {"compat": "0.5"}, "Unknown compatibility level 0.5"),
        ({}, {"refcount_bits": 3}, "must be a power of two"),
        ({}, {"refcount_bits": 128}, "may not exceed 64 bits"),
        ({}, {"compat": "0.10", "refcount_bits": 8}, "other than 16 bits require"),
        ({"refcount_bits": 8}, {"compat": "0.10"}, "compat=0.10 requires refcount_bits=16"),
        ({"compat": "0.10"}, {"refcount_bits": 8}, "other than 16 bits require"),
        ({"compat": "0.10"}, {"lazy_refcounts": True}, "Lazy refcounts only supported"),
        ({}, {"backing_file": "other"}, "Cannot amend the backing file"),
        ({}, {"backing_fmt": "raw"}, "Cannot amend the backing file"),
        ({}, {"data_file": "other"}, "only be set for images that use an external data file"),
        ({}, {"data_file_raw": True}, "data-file-raw cannot be set"),
        ({}, {"encrypt.state": "active"}, "encryption not present"),
    ],
)
def test_refusals_write_nothing(
    options: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    machine = made(SIZE, None, **options)
    machine.log.clear()
    with pytest.raises(UsageError, match=words):
        amended(machine, **changes)
    assert not machine.log


def test_a_count_that_does_not_fit_is_named_before_anything_is_written() -> None:
    machine, _ = worked(random.Random(5), None, cluster_size=512)
    image = machine.format
    pins: list[Any] = []
    machine.ask(lambda: image.missing_blocks([(3, 4)]), pins)
    ((table, at, stop),) = image.block_spans(3, 4)
    image.block(table).set(at, 5)
    image.touch_block(table, at, stop)
    machine.flush()
    machine.unpin(pins)
    machine.log.clear()
    with pytest.raises(UsageError, match="offset 0x600 has a refcount of 5"):
        amended(machine, refcount_bits=2)
    with pytest.raises(UsageError, match="width to 1 bits"):
        amended(machine, refcount_bits=1, lazy_refcounts=True)
    assert not machine.log


def test_compressed_clusters_of_zstd_keep_the_version() -> None:
    machine = made(SIZE, None, cluster_size=4096, compression_type="zstd")
    machine.write_packed(0, b"x" * 4096)
    machine.flush()
    machine.log.clear()
    with pytest.raises(UsageError, match="zstd compression type and existing compressed"):
        amended(machine, compat="0.10")
    assert not machine.log


@pytest.mark.parametrize("name", ["b", "b" * 300])
def test_a_long_header_is_switched_in_one_step(name: str) -> None:
    """Every state between is the old header or the new one, with all extensions."""
    rng = random.Random(name)
    machine = made(SIZE, bytes(SIZE), cluster_size=4096)
    machine.run(machine.format.change_backing(name, "raw"))
    h = machine.format.header
    assert h.extension(hd.EXT_FEATURE_NAMES) is None
    for kind, size in ((0x1234, 100), (0x1235, 700)):
        machine.log.clear()
        start = bytes(machine.slots["file"])
        old = {k for k, _ in h.extensions}
        h = machine.format.header
        h.extensions.append((kind, rng.randbytes(size)))
        now = {k for k, _ in h.extensions}
        machine.run(machine.format.change_backing(name, "raw"))
        for cut in range(len(machine.log) + 1):
            for _ in range(4):
                again = Machine(crashed(start, machine.log, cut, rng), bytes(SIZE))
                image = again.open(qcow2.DRIVER)
                assert {k for k, _ in image.header.extensions} in (old, now)
                assert image.backing_file == name
        h = machine.format.header


SNAPSHOTS = [
    ({"cluster_size": 512}, {"compat": "0.10"}),
    ({"cluster_size": 4096}, {"compat": "0.10"}),
    ({"cluster_size": 512, "compat": "0.10"}, {"compat": "1.1"}),
    ({"cluster_size": 512}, {"refcount_bits": 64}),
    ({"cluster_size": 512}, {"refcount_bits": 4}),
]


@pytest.mark.parametrize(("options", "changes"), SNAPSHOTS, ids=str)
@pytest.mark.parametrize("backing", [False, True])
def test_snapshots_keep_their_content(
    options: dict[str, Any], changes: dict[str, Any], backing: bool
) -> None:
    rng = random.Random(str((options, changes, backing)))
    base = rng.randbytes(SIZE // 3 * 2) if backing else None
    machine, model = worked(rng, base, **options)
    held = []
    for name in ("one", "two", "three"):
        machine.run(machine.format.create_snapshot(SnapshotInfo("", name)))
        held.append(bytes(model))
        if name != "two":
            work(machine, model, rng)
    start = bytes(machine.slots["file"])
    machine.log.clear()
    amended(machine, **changes)
    log = list(machine.log)
    cuts = rng.sample(range(len(log)), min(8, len(log)))
    states = [crashed(start, log, cut, rng) for cut in cuts]
    for state in [bytes(machine.slots["file"]), *states]:
        again = judge(state, base, bytes(model))
        for number, content in enumerate(held):
            settle(again)
            again.run(again.format.apply_snapshot(str(number + 1), None))
            assert again.read(0, SIZE) == content
        settle(again)
        result = own_check(bytes(again.slots["file"]))
        assert result.corruptions == 0, result.findings[:3]


def test_a_snapshot_of_another_size_keeps_the_version() -> None:
    machine, _ = worked(random.Random(3), None, cluster_size=512)
    machine.run(machine.format.create_snapshot(SnapshotInfo("", "one")))
    machine.run(machine.format.resize(2 * SIZE))
    machine.log.clear()
    with pytest.raises(UsageError, match="Internal snapshots prevent downgrade"):
        amended(machine, compat="0.10")
    assert not machine.log
