"""What is done to an image that may be anything: only errors of ours may come out, in a bounded
number of steps, and nothing may be written where nothing was to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diskwright.abilities import SnapshotInfo
from diskwright.bitmaps import DirtyBitmap
from diskwright.contract import DISCARD, WRITE_ZERO
from diskwright.errors import DiskError, ImageError, NotSupported
from diskwright.graph import registry
from fuzz.machine import MOST_MOVED, Hostile, Sample
from fuzz.pages import Pages

Step = Callable[[], object]
MODES = {
    "raw": ("look", "change"),
    "qcow2": ("look", "change", "repair", "salvage"),
    "luks": ("look", "change"),
    "vhdx": ("look", "change", "repair", "salvage"),
    "vmdk": ("look", "change", "repair"),
}
"""What is done to an image of each format, the most frequent first."""
_OPENED: dict[str, dict[str, Any]] = {
    "look": {"read-only": True, "writable": False},
    "change": {"read-only": False, "writable": True},
    "repair": {"read-only": False, "writable": True, "check": True},
    "salvage": {"read-only": True, "writable": False, "check": True, "unlock": True,
                "salvage": True, "assumed": {}},
}  # fmt: skip
_MAPPED = 1 << 20
_READ = 16 << 10
_GROWN = 256 << 10


def attack(
    sample: Sample,
    files: Mapping[str, Pages | bytes],
    mode: str,
    machine: Hostile | None = None,
    only: Sequence[int] = (),
) -> int:
    """Open ``files`` as ``sample`` is opened, and do all that ``mode`` is about, or ``only`` the
    parts of it with these numbers (of those that the format has), in this order; how many steps
    ended well."""
    machine = machine or Hostile(sample, files, mode in ("look", "salvage"))
    done = 0

    def tried(step: Step) -> bool:
        try:
            step()
        except (DiskError, OSError) as error:
            _plain(error)
            return False
        return True

    options = {"file-name": sample.image, **sample.options, **_OPENED[mode]}
    driver = registry.driver(sample.format)
    if not tried(lambda: machine.open(driver, **options)):
        return 0
    parts = [
        part for part, ability in PARTS[mode].items()
        if getattr(machine.format, ability or "map", None) is not None
    ]  # fmt: skip
    if only:
        parts = [parts[number % len(parts)] for number in only]
    for part in parts:
        for step in part(machine):
            done += tried(step)
            if machine.given_up:
                return 1 + done
    if not machine.read_only:
        done += tried(machine.finish)
    return 1 + done


def _plain(error: DiskError | OSError) -> None:
    assert str(error)
    if isinstance(error, ImageError):
        assert error.detail and (error.offset is None or error.offset >= 0)


def facts(machine: Hostile) -> Iterator[Step]:
    """`info`."""
    yield machine.format.info
    yield getattr(machine.format, "references", list)


def read(machine: Hostile) -> Iterator[Step]:
    """The map, and the bytes at the start, in the middle and at the end of the disk."""
    size = machine.format.size
    yield lambda: machine.extents(0, min(_MAPPED, size))
    for at in sorted({0, size // 2 // 512 * 512, max(size - 512, 0) // 512 * 512}):
        length = min(_READ, size - at)
        yield lambda at=at, length=length: machine.read(at, length)  # type: ignore[misc]


def check(machine: Hostile) -> Iterator[Step]:
    """`check`, and what `commit` and `measure` ask."""
    image = machine.format
    yield lambda: machine.run(image.check())
    if hasattr(image, "referenced_clusters"):
        yield lambda: machine.run(image.referenced_clusters())


def bitmaps(machine: Hostile) -> Iterator[Step]:
    """All that are kept."""
    image = machine.format
    for bitmap in list(image.bitmaps):
        yield lambda bitmap=bitmap: machine.run(image.load_bitmap(bitmap))  # type: ignore[misc]


def shown(machine: Hostile) -> Iterator[Step]:
    """A snapshot instead of the disk."""
    image = machine.format
    if image.snapshots:
        first = image.snapshots[0].id
        yield lambda: machine.run(image.show_snapshot(first, None))
        yield from read(machine)


def write(machine: Hostile) -> Iterator[Step]:
    """At the start, in the middle and at the end of the disk."""
    size = machine.format.size
    for at in sorted({0, size // 3 // 512 * 512, max(size - 512, 0) // 512 * 512}):
        data = b"x" * min(2048, size - at)
        if data:
            yield lambda at=at, data=data: machine.write(at, data)  # type: ignore[misc]


def zero(machine: Hostile) -> Iterator[Step]:
    """Zeroes, nothing, and a compressed unit."""
    image, size, unit = machine.format, machine.format.size, machine.format.unit
    if unit <= min(MOST_MOVED, size):
        yield lambda: machine.change(0, unit, WRITE_ZERO)
        last = (size - 1) // unit * unit
        yield lambda: machine.change(last, size - last, DISCARD)
        if getattr(image, "pack_codec", None) is not None:
            yield lambda: machine.write_packed(size // 2 // unit * unit, bytes(unit))


def snapshots(machine: Hostile) -> Iterator[Step]:
    """One more; one is applied, and deleted."""
    image = machine.format
    yield from _rest(machine)
    yield lambda: machine.run(image.create_snapshot(SnapshotInfo("", "new")))
    for name in ("apply_snapshot", "delete_snapshot"):
        first = image.snapshots[0].id if image.snapshots else None
        yield lambda name=name, first=first: machine.run(getattr(image, name)(first, None))  # type: ignore[misc]


def grow(machine: Hostile) -> Iterator[Step]:
    """By a little."""
    image = machine.format
    yield from _resized(machine, image.size + min(max(_GROWN, image.unit), 1 << 20))


def shrink(machine: Hostile) -> Iterator[Step]:
    """To half the size."""
    yield from _resized(machine, machine.format.size // 2)


def _resized(machine: Hostile, size: int) -> Iterator[Step]:
    yield from _rest(machine)
    yield lambda: machine.run(machine.format.resize(size // 4096 * 4096, "off", True))


def empty(machine: Hostile) -> Iterator[Step]:
    """As after `commit`."""
    yield from _rest(machine)
    yield lambda: machine.run(machine.format.make_empty())


def change_bitmaps(machine: Hostile) -> Iterator[Step]:
    """Load those that are there, change them, keep another one."""
    yield from _rest(machine)
    yield lambda: _change_bitmaps(machine)


def leaks(machine: Hostile) -> Iterator[Step]:
    """`check -r leaks`."""
    yield from _rest(machine)
    yield lambda: machine.run(machine.format.check("leaks"))


def repair(machine: Hostile) -> Iterator[Step]:
    """`check -r all`, then check again, and go on with what is there now."""
    image = machine.format
    yield from _rest(machine)
    yield lambda: machine.run(image.check("all"))
    yield lambda: machine.run(image.check())
    yield from read(machine)


def _rest(machine: Hostile) -> Iterator[Step]:
    """A procedure that needs the whole image begins with nothing dirty."""
    for _ in range(9):
        if machine.store.dirty():
            yield machine.flush


def _change_bitmaps(machine: Hostile) -> None:
    image: Any = machine.format
    if not image.can_keep_bitmaps:
        raise NotSupported("version 2")
    for bitmap in list(image.bitmaps):
        machine.run(image.load_bitmap(bitmap))
        bitmap.check()
        machine.run(image.use_bitmap(bitmap))
    image.check_bitmap("more", 4096)
    more = DirtyBitmap("more", image.size, 4096, persistent=True)
    more.touched = None
    image.bitmaps.add(more)
    image.bitmaps.mark([(0, min(image.size, 9000))])
    machine.run(image.store_bitmaps())


PARTS: dict[str, dict[Callable[[Hostile], Iterator[Step]], str]] = {
    "look": {facts: "", read: "", check: "check", bitmaps: "load_bitmap", shown: "show_snapshot"},
    "change": {write: "", zero: "", change_bitmaps: "bitmaps", snapshots: "create_snapshot",
               grow: "", shrink: "", empty: "make_empty"},
    "repair": {leaks: "check", repair: "check", grow: "", shrink: ""},
    "salvage": {read: ""},
}  # fmt: skip
"""What each mode does, and which ability of the format it is for."""
