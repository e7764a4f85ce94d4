"""What is done with the dirty bitmaps of a node.

Each operation runs alone (no write is on its way), so a bitmap has in it either all or nothing of a
write.  What is stored of a persistent bitmap that changes is marked as in use, durably; the bits
are stored when the node is closed, or by :func:`store`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..abilities import KeepsBitmaps
from ..bitmaps import DEFAULT_GRANULARITY, DirtyBitmap, check_granularity
from ..bits import BitmapError
from ..contract import Procedure
from ..hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine


def keeper(engine: Engine) -> KeepsBitmaps | None:
    """The format, where it can keep bitmaps."""
    found: Any = engine.format
    return found if hasattr(found, "store_bitmaps") else None


def default_granularity(engine: Engine) -> int:
    """In bytes: a cluster, but between 4 KiB and 64 KiB; 64 KiB without clusters."""
    cluster: int = getattr(engine.format, "cluster_size", 0)
    return min(max(cluster, 4096), DEFAULT_GRANULARITY) if cluster else DEFAULT_GRANULARITY


async def add(
    engine: Engine,
    name: str,
    granularity: int | None = None,
    *,
    persistent: bool = False,
    enabled: bool = True,
    label: str = "",
) -> DirtyBitmap:
    """A new bitmap, in which nothing is dirty.  ``label``: what errors call the node.

    Raises BitmapError and UsageError.
    """
    if not name:
        raise BitmapError("Bitmap name cannot be empty")
    if granularity is None:
        granularity = default_granularity(engine)
    check_granularity(granularity)
    asked = granularity

    def adding() -> Procedure:
        yield from ()
        if engine.bitmaps.find(name) is not None:
            raise BitmapError(f"Bitmap already exists: {name}")
        if persistent:
            _check_persistent(engine, name, asked, label)
        bitmap = DirtyBitmap(
            name,
            engine.format.size,
            asked,
            enabled=enabled,
            persistent=persistent,
            budget=engine.bitmaps.budget,
        )
        if persistent:
            bitmap.touched = None
        engine.bitmaps.add(bitmap)
        return bitmap

    made: DirtyBitmap = await engine.procedures.run(adding(), whole_image=True)
    return made


def _check_persistent(engine: Engine, name: str, granularity: int, label: str) -> None:
    format = keeper(engine)
    if format is None:
        raise BitmapError(f"Can't store persistent bitmaps to {label}: Operation not supported")
    try:
        format.check_bitmap(name, granularity)
    except BitmapError as error:
        raise BitmapError(
            f"Can't make bitmap '{name}' persistent in '{label}': {error}"
        ) from error


async def remove(engine: Engine, name: str) -> None:
    """Forget a bitmap, also one that is inconsistent."""

    def removing() -> Procedure:
        yield from ()
        bitmap = engine.bitmaps.get(name)
        if bitmap.busy:
            bitmap.check()
        forget(engine, bitmap)

    await engine.procedures.run(removing(), whole_image=True)


def forget(engine: Engine, bitmap: DirtyBitmap) -> None:
    """The same at once, of a bitmap that nobody uses."""
    format = keeper(engine)
    if bitmap.persistent and format is not None:
        format.drop_bitmap(bitmap)
    engine.bitmaps.remove(bitmap)


async def _change(engine: Engine, name: str, change: Callable[[DirtyBitmap], Procedure]) -> None:
    """Do ``change`` to a bitmap of which nothing that is stored is relied on any more."""

    def changing() -> Procedure:
        bitmap = engine.bitmaps.get(name)
        bitmap.check()
        format = keeper(engine)
        if bitmap.persistent and format is not None:
            yield from format.use_bitmap(bitmap)
        yield from change(bitmap)
        engine.bitmaps.refresh()

    await engine.procedures.run(changing(), whole_image=True)


async def clear(engine: Engine, name: str) -> None:
    """Nothing is dirty any more."""

    def change(bitmap: DirtyBitmap) -> Procedure:
        yield from ()
        bitmap.clear()

    await _change(engine, name, change)


async def switch(engine: Engine, name: str, enabled: bool) -> None:
    """Begin or end to follow writes."""

    def change(bitmap: DirtyBitmap) -> Procedure:
        yield from ()
        bitmap.enabled = enabled

    await _change(engine, name, change)


async def merge(engine: Engine, name: str, sources: Sequence[DirtyBitmap]) -> None:
    """Add to a bitmap what is dirty in others, which were loaded (see :func:`load`).

    All of them or, when one of them cannot be, none is.
    """

    def change(bitmap: DirtyBitmap) -> Procedure:
        for source in sources:
            source.check()
            bitmap.check_size(source)
        yield from ()
        for source in sources:
            bitmap.merge(source)

    await _change(engine, name, change)


async def load(engine: Engine, name: str) -> DirtyBitmap:
    """The bitmap with all of its bits in memory."""
    bitmap = engine.bitmaps.get(name)
    bitmap.check()
    format = keeper(engine)
    if not bitmap.loaded and format is not None:
        await engine.procedures.run(format.load_bitmap(bitmap), whole_image=True)
    return bitmap


async def store(engine: Engine) -> None:
    """Bring persistent bitmaps to the disk now, in step with the data that were written."""
    format = keeper(engine)
    if format is not None:
        await engine.procedures.run(format.store_bitmaps(), whole_image=True)
