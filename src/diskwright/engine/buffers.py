"""Memory for moving bytes in large pieces, and finding the zeroes in it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from ..units import align_down

_LARGE = 64 << 10
_ZEROES = bytes(256 << 10)


def page_buffer(length: int) -> memoryview:
    """Writable memory of ``length`` bytes (more than none), zeroed, that begins on a page.

    The allocator puts large blocks 16 bytes behind the start of a page, and copies from the page
    cache to just there take four times as long on processors whose string moves stumble over
    addresses that are equal in their low bits.
    """
    return memoryview(mmap.mmap(-1, length))


def is_zero(view: memoryview) -> bool:
    """True when ``view`` holds nothing but zeroes (or nothing)."""
    length = len(view)
    if length <= len(_ZEROES):
        return _ZEROES.startswith(view)
    step = len(_ZEROES)
    return all(_ZEROES.startswith(view[at : at + step]) for at in range(0, length, step))


def zero_runs(view: memoryview, block: int) -> list[tuple[int, int, bool]]:
    """Runs of zero and of other blocks in ``view``: (start, end, zero), in order and alternating.

    ``block`` is a multiple of 8, in bytes, counted from the start of the view; the last one may be
    shorter.  Most data is told by the first word of each block.
    """
    length = len(view)
    whole = align_down(length, block)
    first = view[:whole].cast("Q")[:: block // 8].tolist() if whole else []
    if 0 not in first and whole == length:
        return [(0, length, False)] if length else []
    if is_zero(view):
        return [(0, length, True)]
    if whole < length:
        first.append(0)  # the short one is always looked at
    first.append(1)  # ends the last run
    runs: list[tuple[int, int, bool]] = []
    done = at = end = 0  # blocks told, looked at, and where those that begin with zeroes end
    count = len(first) - 1
    find = first.index
    while at < count:
        try:
            at = find(0, at)
        except ValueError:
            break
        if at >= end:
            end = at + 1
            while not first[end]:
                end += 1
        stop = end
        if not is_zero(view[at * block : stop * block]):
            # Some of them only begin with zeroes: those before the first such one are a run.
            stop = at
            while is_zero(view[stop * block : (stop + 1) * block]):
                stop += 1
            if stop == at:
                at += 1
                continue
        if done < at:
            runs.append((done * block, at * block, False))
        runs.append((at * block, min(stop * block, length), True))
        done = at = stop
    if done < count:
        runs.append((done * block, length, False))
    return runs


def joined(
    held: list[tuple[int, int, memoryview | None]], buffer: memoryview | None
) -> Iterator[tuple[int, int, memoryview | None]]:
    """Parts of a copy, (offset, length, view), with those that continue each other as one: their
    bytes follow each other in ``buffer``.  A view of None, for zeroes, stays as it is."""
    place = 0
    first = length = 0
    for offset, count, view in held:
        if view is not None and length and first + length == offset:
            length += count
            continue
        if length:
            assert buffer is not None
            yield first, length, buffer[place : place + length]
            place += length
            length = 0
        if view is None:
            yield offset, count, None
        else:
            first, length = offset, count
    if length:
        assert buffer is not None
        yield first, length, buffer[place : place + length]
