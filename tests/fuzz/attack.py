"""What is done to an image that may be anything: only errors of ours may come out, in a bounded
number of steps, and nothing may be written where nothing was to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    "salvage": {"read-only": True, "writable": False, "check": True, "salvage": True,
                "assumed": {}},
}  # fmt: skip
_MAPPED = 1 << 20
_READ = 64 << 10


def attack(
    sample: Sample,
    files: Mapping[str, Pages | bytes],
    mode: str,
    machine: Hostile | None = None,
) -> int:
    """Open ``files`` as ``sample`` is opened, and do all that ``mode`` is about; how many steps
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
    steps: dict[str, Callable[[Hostile], Iterator[Step]]] = {
        "look": look, "change": change, "repair": repair, "salvage": read,
    }  # fmt: skip
    for step in steps[mode](machine):
        done += tried(step)
        if machine.given_up:
            break
    return 1 + done


def _plain(error: DiskError | OSError) -> None:
    assert str(error)
    if isinstance(error, ImageError):
        assert error.detail and (error.offset is None or error.offset >= 0)


def look(machine: Hostile) -> Iterator[Step]:
    """`info`, `map`, `check`, and all that a conversion reads."""
    image = machine.format
    yield image.info
    yield getattr(image, "references", list)
    yield from read(machine)
    if hasattr(image, "check"):
        yield lambda: machine.run(image.check())
    if hasattr(image, "referenced_clusters"):
        yield lambda: machine.run(image.referenced_clusters())
    if hasattr(image, "load_bitmap"):
        for bitmap in list(image.bitmaps):
            yield lambda bitmap=bitmap: machine.run(image.load_bitmap(bitmap))  # type: ignore[misc]
    if getattr(image, "snapshots", ()):
        first = image.snapshots[0].id
        yield lambda: machine.run(image.show_snapshot(first, None))
        yield from read(machine)


def read(machine: Hostile) -> Iterator[Step]:
    """The map and the bytes at the start, in the middle and at the end of the disk."""
    size = machine.format.size
    for at in sorted({0, size // 2 // 512 * 512, max(size - 512, 0) // 512 * 512}):
        mapped = min(_MAPPED, size - at)
        yield lambda at=at, mapped=mapped: machine.extents(at, mapped)  # type: ignore[misc]
        length = min(_READ, size - at)
        yield lambda at=at, length=length: machine.read(at, length)  # type: ignore[misc]


def change(machine: Hostile) -> Iterator[Step]:
    """Writes of every kind, a snapshot, bitmaps, another size, an empty disk; and closing."""
    image, size = machine.format, machine.format.size
    for at in sorted({0, size // 3 // 512 * 512, max(size - 512, 0) // 512 * 512}):
        data = b"x" * min(2048, size - at)
        if data:
            yield lambda at=at, data=data: machine.write(at, data)  # type: ignore[misc]
    unit = image.unit
    if unit <= min(MOST_MOVED, size):
        yield lambda: machine.change(0, unit, WRITE_ZERO)
        yield lambda: machine.change(
            (size - 1) // unit * unit, size - (size - 1) // unit * unit, DISCARD
        )
        if getattr(image, "pack_codec", None) is not None:
            yield lambda: machine.write_packed(size // 2 // unit * unit, bytes(unit))
    yield from _rest(machine)
    if getattr(image, "bitmaps", None) is not None:
        yield lambda: _bitmaps(machine)
    if hasattr(image, "create_snapshot"):
        yield lambda: machine.run(image.create_snapshot(SnapshotInfo("", "new")))
        for name in ("apply_snapshot", "delete_snapshot"):
            first = image.snapshots[0].id if image.snapshots else None
            yield lambda name=name, first=first: machine.run(getattr(image, name)(first, None))  # type: ignore[misc]
        yield from _rest(machine)
    yield from _resized(machine)
    if hasattr(image, "make_empty"):
        yield lambda: machine.run(image.make_empty())
    yield machine.finish


def repair(machine: Hostile) -> Iterator[Step]:
    """Check with every repair, then check again, and go on with what is there now."""
    image = machine.format
    if not hasattr(image, "check"):
        return
    for fix in ("leaks", "all"):
        yield lambda fix=fix: machine.run(image.check(fix))  # type: ignore[misc]
    yield lambda: machine.run(image.check())
    yield from read(machine)
    yield from _resized(machine)
    yield machine.finish


def _resized(machine: Hostile) -> Iterator[Step]:
    image = machine.format
    for size in (image.size + (1 << 20), image.size // 2):
        yield lambda size=size: machine.run(image.resize(size // 4096 * 4096, "off", True))  # type: ignore[misc]
        yield from _rest(machine)


def _rest(machine: Hostile) -> Iterator[Step]:
    """A procedure that needs the whole image begins with nothing dirty."""
    for _ in range(9):
        if machine.store.dirty():
            yield machine.flush


def _bitmaps(machine: Hostile) -> None:
    """Load those that are there, change them, keep another one."""
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
