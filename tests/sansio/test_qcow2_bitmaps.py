"""Persistent bitmaps by bytes alone: crash states, failures, damaged tables."""

from __future__ import annotations

import errno
import random
import struct
from typing import Any

import pytest

from diskwright.bitmaps import DirtyBitmap
from diskwright.bits import BitmapError
from diskwright.contract import DISCARD, ZERO_UNMAP
from diskwright.errors import CorruptImage, DiskError, MalformedImage
from diskwright.formats import qcow2
from sansio.machine import Machine
from sansio.test_qcow2_crash import crash
from sansio.test_qcow2_cross import made, own_check

SIZE = 96 * 1024
GRAIN = 512


class Disk:
    """A machine whose writes are followed by its bitmaps, as the engine does it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.marks = True

    @property
    def image(self) -> Any:
        return self.machine.format

    def run(self, procedure: Any) -> None:
        """Procedures run with nothing dirty."""
        while self.machine.store.dirty():
            self.machine.flush()
        self.machine.run(procedure)

    def mark(self, offset: int, length: int) -> None:
        if self.marks:
            self.image.bitmaps.mark([(offset, offset + length)])

    def write(self, offset: int, data: bytes) -> None:
        try:
            self.machine.write(offset, data)
        finally:
            self.mark(offset, len(data))

    def change(self, offset: int, length: int, kind: str) -> None:
        try:
            self.machine.change(offset, length, kind)
        finally:
            self.mark(offset, length)

    def add(self, name: str, granularity: int = GRAIN, enabled: bool = True) -> DirtyBitmap:
        self.image.check_bitmap(name, granularity)
        bitmap = DirtyBitmap(name, self.image.size, granularity, enabled=enabled, persistent=True)
        bitmap.touched = None
        self.image.bitmaps.add(bitmap)
        return bitmap

    def remove(self, name: str) -> None:
        bitmap = self.image.bitmaps.get(name)
        self.image.drop_bitmap(bitmap)
        self.image.bitmaps.remove(bitmap)

    def use(self, name: str) -> DirtyBitmap:
        bitmap: DirtyBitmap = self.image.bitmaps.get(name)
        self.run(self.image.use_bitmap(bitmap))
        return bitmap

    def store(self) -> None:
        self.run(self.image.store_bitmaps())

    def dirty(self, name: str) -> set[int]:
        bitmap = self.image.bitmaps.get(name)
        bitmap.check()
        self.run(self.image.load_bitmap(bitmap))
        return {at for o, n in bitmap.runs() for at in range(o // GRAIN, -(-(o + n) // GRAIN))}


def nothing() -> Any:
    yield from ()


def reopened(file: bytes, **options: Any) -> Disk:
    machine = Machine(file)
    machine.open(qcow2.DRIVER, **options)
    return Disk(machine)


OPTIONS = [
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64, "lazy_refcounts": True},
    {"cluster_size": 4096},
    {"cluster_size": 65536},
]


class Story:
    """Random operations, and what each bitmap was last emptied over: a crash must leave nobody
    with a clean bit where the disk is another than it was then."""

    def __init__(self, options: dict[str, Any], seed: int) -> None:
        self.rng = random.Random(f"{options} {seed}")
        self.disk = Disk(made(SIZE, **options))
        self.content = bytearray(SIZE)
        self.names = 0
        self.bases: dict[str, tuple[int, bytes]] = {}
        """name: (log length when it was emptied, content)"""

    def run(self, steps: int) -> None:
        menu = [self.write] * 6 + [self.change, self.store, self.store, self.add, self.drop]
        menu += [self.clear, self.merge, self.switch]
        for _ in range(steps):
            self.rng.choice(menu)()

    def base(self, name: str) -> None:
        self.bases[name] = (len(self.disk.machine.log), bytes(self.content))

    def write(self) -> None:
        length = self.rng.choice([512, 512, 4096, 9000])
        offset = self.rng.randrange(0, (SIZE - length) // 512) * 512
        data = self.rng.randbytes(length)
        self.content[offset : offset + length] = data
        self.disk.write(offset, data)

    def change(self) -> None:
        unit = self.disk.image.unit
        if unit >= SIZE:
            return
        offset = self.rng.randrange(SIZE // unit) * unit
        length = min(unit * 3, SIZE - offset)
        self.disk.change(offset, length, self.rng.choice([DISCARD, ZERO_UNMAP]))
        self.content[:] = self.disk.machine.read(0, SIZE)

    def store(self) -> None:
        self.disk.store()

    def add(self) -> None:
        self.names += 1
        name = f"b{self.names}" * self.rng.choice([1, 1, 60])
        self.base(name)
        self.disk.add(name, self.rng.choice([512, 1024, 65536]))

    def some(self) -> str | None:
        names = [bitmap.name for bitmap in self.disk.image.bitmaps]
        return self.rng.choice(names) if names else None

    def drop(self) -> None:
        name = self.some()
        if name is not None:
            self.disk.remove(name)

    def clear(self) -> None:
        name = self.some()
        if name is not None and self.disk.image.bitmaps.get(name).enabled:
            self.disk.use(name).clear()
            self.base(name)

    def merge(self) -> None:
        one, other = self.some(), self.some()
        if one is not None and other is not None:
            source = self.disk.image.bitmaps.get(other)
            self.disk.run(self.disk.image.load_bitmap(source))
            self.disk.use(one).merge(source)

    def switch(self) -> None:
        """Off and on again, with nothing written between."""
        name = self.some()
        if name is not None:
            bitmap = self.disk.use(name)
            for enabled in (False, True):
                bitmap.enabled = enabled
                self.disk.image.bitmaps.refresh()

    def judge(self, state: bytes, cut: int) -> int:
        """Look at one crash state; how many bitmaps in it can be relied on."""
        disk = reopened(state)
        assert own_check(bytes(disk.machine.slots["file"])).corruptions == 0
        content = disk.machine.read(0, SIZE)
        good = 0
        for bitmap in disk.image.bitmaps:
            if bitmap.inconsistent or not bitmap.enabled:
                continue
            good += 1
            at, base = self.bases[bitmap.name]
            if at > cut:
                continue  # it was emptied after this crash
            dirty = disk.dirty(bitmap.name)
            for grain in range(SIZE // GRAIN):
                start = grain * GRAIN
                if content[start : start + GRAIN] != base[start : start + GRAIN]:
                    assert grain in dirty, (cut, bitmap.name, grain)
        return good


def explore(options: dict[str, Any], seeds: range, cuts: int) -> int:
    good = 0
    for seed in seeds:
        story = Story(options, seed)
        story.disk.machine.poison = bool(seed % 2)
        start = bytes(story.disk.machine.slots["file"])
        story.disk.machine.log.clear()
        story.run(40)
        story.disk.store()
        log = list(story.disk.machine.log)
        picked = story.rng.sample(range(len(log) + 1), min(cuts, len(log)))
        for cut in [*picked, len(log)]:
            good += story.judge(crash(start, log, cut, story.rng), cut)
    return good


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_crash_leaves_a_bitmap_that_says_too_little(options: dict[str, Any]) -> None:
    assert explore(options, range(3), 25) > 0


def never(self: Any, bitmaps: Any) -> list[Any]:
    return []


def forgotten(self: Any, bitmap: Any, old: Any) -> Any:
    """The mark of use goes, and the bits were not stored."""
    yield from ()


@pytest.mark.parametrize(
    ("where", "name", "mutant"),
    [
        ("bitmaps.use.Directory", "in_use_writes", never),
        ("bitmaps.store.Storing", "_add", forgotten),
    ],
)
def test_mutants_do_not_survive(
    where: str, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"diskwright.formats.qcow2.{where}.{name}", mutant)
    with pytest.raises((AssertionError, KeyError)):
        explore({"cluster_size": 512}, range(20), 60)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_a_model_over_many_openings(options: dict[str, Any]) -> None:
    rng = random.Random(str(options))
    disk = Disk(made(SIZE, **options))
    model: dict[str, tuple[int, bool, set[int]]] = {}
    for step in range(60):
        what = rng.random()
        if what < 0.2 and len(model) < 5:
            granularity = rng.choice([512, 2048, 8192])
            disk.add(f"n{step}", granularity)
            model[f"n{step}"] = (granularity, True, set())
        elif what < 0.3 and model:
            name = rng.choice(list(model))
            disk.remove(name)
            del model[name]
        elif what < 0.4 and model:
            name = rng.choice(list(model))
            disk.use(name).clear()
            model[name][2].clear()
        elif what < 0.5 and model:
            name = rng.choice(list(model))
            granularity, enabled, bits = model[name]
            bitmap = disk.use(name)
            bitmap.enabled = not enabled
            disk.image.bitmaps.refresh()
            model[name] = (granularity, not enabled, bits)
        elif what < 0.6:
            closing = disk.image.close()
            if closing is not None:
                disk.run(closing)
            file = bytes(disk.machine.slots["file"])
            assert own_check(file).findings == []
            disk = reopened(file)
        else:
            length = rng.choice([1, 512, 5000, 20_000])
            offset = rng.randrange(SIZE - length)
            disk.write(offset, rng.randbytes(length))
            for granularity, enabled, bits in model.values():
                if enabled:
                    last = (offset + length - 1) // granularity
                    bits.update(range(offset // granularity, last + 1))
    disk.store()
    disk = reopened(bytes(disk.machine.slots["file"]))
    assert [bitmap.name for bitmap in disk.image.bitmaps] == list(model)
    for name, (granularity, enabled, bits) in model.items():
        bitmap = disk.image.bitmaps.get(name)
        assert bitmap.enabled == enabled and bitmap.granularity == granularity
        wanted = {
            at for bit in bits for at in range(bit * granularity, (bit + 1) * granularity, GRAIN)
        }
        assert {grain * GRAIN for grain in disk.dirty(name)} == {at for at in wanted if at < SIZE}


def test_every_failure_leaves_an_image_that_can_be_stored_again() -> None:
    """The n-th request of storing fails, for every n."""
    start = Disk(made(SIZE, cluster_size=512))
    for name in ("one", "two"):
        start.add(name)
    start.store()
    file = bytes(start.machine.slots["file"])
    n = 0
    while True:
        disk = reopened(file)
        disk.write(1000, b"x" * 9000)
        disk.remove("one")
        disk.add("three")
        disk.run(nothing())
        left = n

        def failing(offset: int, data: bytes, disk: Disk = disk) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.EIO, "Input/output error")
            Machine.pwrite(disk.machine, offset, data)

        disk.machine.pwrite = failing  # type: ignore[method-assign]
        try:
            disk.machine.run(disk.image.store_bitmaps())
        except OSError:
            state = reopened(bytes(disk.machine.slots["file"]))
            assert own_check(bytes(state.machine.slots["file"])).corruptions == 0
            for bitmap in state.image.bitmaps:
                if bitmap.name != "three" and not bitmap.inconsistent:
                    assert {1, 2, 18} <= state.dirty(bitmap.name)
            n += 1
        else:
            break
    assert n > 8


def test_no_space_gives_back_what_was_taken() -> None:
    disk = Disk(made(SIZE, cluster_size=512))
    disk.write(0, bytes(range(256)) * 2)
    disk.run(nothing())
    file = bytes(disk.machine.slots["file"])
    for more in range(4):
        disk = reopened(file, max_file_size=len(file) + 512 * more)
        disk.add("one")
        disk.mark(0, 512)
        try:
            disk.store()
        except OSError as error:
            assert error.errno == errno.ENOSPC and more < 3
            result = own_check(bytes(disk.machine.slots["file"]))
            assert result.corruptions == result.leaks == 0
        else:
            assert reopened(bytes(disk.machine.slots["file"])).dirty("one") == {0}
            assert more
    assert more == 3


def stored() -> tuple[bytearray, int]:
    """An image with one bitmap, and where its directory is."""
    disk = Disk(made(SIZE, cluster_size=512))
    disk.add("one")
    disk.write(4096, b"x" * 700)
    disk.store()
    return bytearray(disk.machine.slots["file"]), disk.image.directory.place.offset


@pytest.mark.parametrize("seed", range(80))
def test_hostile_bytes_in_the_directory_and_the_table(seed: int) -> None:
    rng = random.Random(seed)
    file, directory = stored()
    table = struct.unpack_from(">Q", file, directory)[0]
    at = rng.choice([directory, table]) + rng.randrange(0, 32)
    for _ in range(rng.choice([1, 2, 8])):
        at += rng.randrange(3)
        file[at] = rng.choice([0, 1, 0xFF, rng.randrange(256)])
    try:
        disk = reopened(bytes(file))
    except DiskError:
        shown = reopened(bytes(file), writable=False)
        assert isinstance(shown.image.bitmap_error, MalformedImage)
        assert len(shown.machine.read(0, SIZE)) == SIZE
        return
    disk.write(0, b"y")
    for bitmap in disk.image.bitmaps:
        try:
            disk.dirty(bitmap.name)
        except (CorruptImage, BitmapError):
            pass
    try:
        disk.store()
    except CorruptImage:
        pass
    assert disk.machine.read(4096, 700) == b"x" * 700


def test_bits_outside_the_file_are_not_clean() -> None:
    file, directory = stored()
    table = struct.unpack_from(">Q", file, directory)[0]
    struct.pack_into(">Q", file, table, 1 << 30)
    with pytest.raises(CorruptImage, match="table entry 0 is invalid"):
        reopened(bytes(file)).dirty("one")


def test_a_bitmap_over_metadata_is_not_written() -> None:
    file, directory = stored()
    table = struct.unpack_from(">Q", file, directory)[0]
    disk = reopened(bytes(file))
    struct.pack_into(">Q", file, table, disk.image.header.l1_offset)
    disk = reopened(bytes(file))
    disk.write(0, b"y")
    with pytest.raises(CorruptImage, match="table entry 0 is invalid"):
        disk.store()
    assert disk.image.bitmaps.get("one").inconsistent
    assert disk.machine.read(4096, 700) == b"x" * 700
    again = reopened(bytes(disk.machine.slots["file"]))
    assert again.image.bitmaps.get("one").inconsistent


def test_what_cannot_be_kept() -> None:
    disk = Disk(made(64 << 40, cluster_size=65536))
    disk.image.check_bitmap("ok", 16384)
    with pytest.raises(BitmapError, match="Use larger granularity"):
        disk.image.check_bitmap("b", 8192)
    with pytest.raises(BitmapError, match="Name length exceeds"):
        disk.image.check_bitmap("x" * 1024, 1 << 20)
    old = Disk(made(SIZE, compat="0.10"))
    with pytest.raises(BitmapError, match="v2"):
        old.image.check_bitmap("b", 65536)


def test_a_huge_disk_stores_what_is_set() -> None:
    disk = Disk(made(64 << 40, cluster_size=65536))
    disk.add("b", 65536)
    disk.mark(0, 32 << 40)
    disk.mark(40 << 40, 1)
    disk.store()
    assert len(disk.machine.slots["file"]) < 3 << 20
    disk = reopened(bytes(disk.machine.slots["file"]))
    bitmap = disk.image.bitmaps.get("b")
    disk.machine.run(disk.image.load_bitmap(bitmap))
    assert list(bitmap.runs()) == [(0, 32 << 40), (40 << 40, 65536)]
    assert bitmap.bits.memory < 1 << 20


def test_unknown_kinds_of_bitmaps_are_kept_and_not_relied_on() -> None:
    file, directory = stored()
    file[directory + 16] = 2
    disk = reopened(bytes(file))
    assert disk.image.bitmaps.get("one").inconsistent
    disk.write(0, b"y")
    disk.store()
    after = disk.machine.slots["file"]
    assert after[directory + 16] == 2 and after[directory + 15] & 1
    disk.remove("one")
    disk.store()
    assert own_check(bytes(disk.machine.slots["file"])).findings == []


def test_a_disk_of_no_size() -> None:
    """Its bitmaps have nothing in them, and a table as all have."""
    disk = Disk(made(0, cluster_size=512))
    disk.add("none")
    disk.store()
    file = disk.machine.close()
    again = reopened(file)
    assert [bitmap.name for bitmap in again.image.bitmaps] == ["none"]
    assert not again.dirty("none")
    found = own_check(file)
    assert not found.corruptions and not found.check_errors
