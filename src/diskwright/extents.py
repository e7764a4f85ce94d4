"""The currency: what a range of a disk is, told without moving a byte.

A format answers :meth:`~diskwright.contract.Format.map` with these, in guest order and
without gaps; ``length`` is what each one covers.  They are frozen tuples with a ``kind``,
so that a loop can branch on an integer.  The hot path does not build them at all: see
``map_batch`` in :mod:`diskwright.contract`.
"""

from __future__ import annotations

from .hints import Any, ClassVar
from .records import NamedTuple

DATA, ZERO, HOLE, PACKED, INLINE, OPAQUE = range(6)

# Each kind is a tuple type with the constant ``kind`` added: a class body of NamedTuple itself
# takes fields only.


class _Data(NamedTuple):
    slot: str
    host: int
    length: int
    writable: bool = False
    xform: tuple[Any, ...] = ()


class Data(_Data):
    """``length`` bytes at ``host`` of the node in ``slot``.

    ``writable``: may be overwritten in place (not shared, and every `before` group is on disk).
    ``xform``: transforms, innermost first (encryption); empty for plain bytes.
    """

    __slots__ = ()
    kind: ClassVar[int] = DATA


class _Zero(NamedTuple):
    length: int
    explicit: bool = True
    host: int = -1


class Zero(_Zero):
    """Reads as zeroes.  ``explicit``: stored so (hides a backing file).
    ``host`` >= 0: host bytes are reserved there."""

    __slots__ = ()
    kind: ClassVar[int] = ZERO


class _Hole(NamedTuple):
    length: int


class Hole(_Hole):
    """Not in this layer: ask the backing node, or zeroes without one."""

    __slots__ = ()
    kind: ClassVar[int] = HOLE


class _Packed(NamedTuple):
    slot: str
    host: int
    host_length: int
    unit: int
    codec: Any
    length: int
    skip: int = 0


class Packed(_Packed):
    """A compressed unit: ``host_length`` bytes at ``host`` unpack to ``unit`` bytes with ``codec``;
    this extent is ``length`` bytes of them from ``skip``."""

    __slots__ = ()
    kind: ClassVar[int] = PACKED


class _Inline(NamedTuple):
    data: bytes


class Inline(_Inline):
    """The bytes themselves (made-up disks, small tails)."""

    __slots__ = ()
    kind: ClassVar[int] = INLINE

    @property
    def length(self) -> int:
        return len(self.data)


class _Opaque(NamedTuple):
    slot: str
    host: int
    length: int


class Opaque(_Opaque):
    """Only the node in ``slot`` knows: ask it at ``host``."""

    __slots__ = ()
    kind: ClassVar[int] = OPAQUE


Extent = Data | Zero | Hole | Packed | Inline | Opaque


def shorten(extent: Extent, skip: int, length: int) -> Extent:
    """The part of ``extent`` that starts ``skip`` bytes in and is ``length`` long."""
    if isinstance(extent, Data):
        return extent._replace(host=extent.host + skip, length=length)
    if isinstance(extent, Zero):
        return extent._replace(
            length=length, host=extent.host + skip if extent.host >= 0 else extent.host
        )
    if isinstance(extent, Packed):
        return extent._replace(skip=extent.skip + skip, length=length)
    if isinstance(extent, Inline):
        return Inline(extent.data[skip : skip + length])
    if isinstance(extent, Opaque):
        return extent._replace(host=extent.host + skip, length=length)
    return Hole(length)


def merge(extents: list[Extent]) -> list[Extent]:
    """Join neighbours that continue each other."""
    out: list[Extent] = []
    for e in extents:
        if out:
            last = out[-1]
            if isinstance(e, Data) and isinstance(last, Data):
                if (
                    last.slot == e.slot
                    and last.host + last.length == e.host
                    and last.writable == e.writable
                    and last.xform == e.xform
                ):
                    out[-1] = last._replace(length=last.length + e.length)
                    continue
            elif isinstance(e, Zero) and isinstance(last, Zero):
                follows = (last.host < 0 and e.host < 0) or (
                    last.host >= 0 and e.host == last.host + last.length
                )
                if last.explicit == e.explicit and follows:
                    out[-1] = last._replace(length=last.length + e.length)
                    continue
            elif isinstance(e, Hole) and isinstance(last, Hole):
                out[-1] = Hole(last.length + e.length)
                continue
            elif (
                isinstance(e, Opaque)
                and isinstance(last, Opaque)
                and last.slot == e.slot
                and last.host + last.length == e.host
            ):
                out[-1] = last._replace(length=last.length + e.length)
                continue
        out.append(e)
    return out
