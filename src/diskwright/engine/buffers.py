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


def zero_runs(view: memoryview, block: int) -> Iterator[tuple[int, int, bool]]:
    """Runs of zero and of other blocks in ``view``: (start, end, zero), in order and alternating.

    ``block`` is a multiple of 8, in bytes, counted from the start of the view; the last one may be
    shorter.  Most data is told by the first word of each block.
    """
    length = len(view)
    whole = align_down(length, block)
    first = view[:whole].cast("Q")[:: block // 8].tolist() if whole else []
    if 0 not in first and whole == length:
        if length:
            yield 0, length, False
        return
    if is_zero(view):
        yield 0, length, True
        return
    if whole < length:
        first.append(0)  # the short one is always looked at
    start, state = 0, None
    for begin, zero in _changes(view, block, first):
        if zero is not state:
            if state is not None:
                yield start, begin * block, state
            start, state = begin * block, zero
    if state is not None:
        yield start, length, state


def _changes(view: memoryview, block: int, first: list[int]) -> Iterator[tuple[int, bool]]:
    """(index of a block, zero) wherever that may change; ``first`` has a word of each block."""
    test = _ZEROES.startswith if block <= len(_ZEROES) else is_zero
    index, count = 0, len(first)
    while index < count:
        begin = index
        if first[index]:
            yield begin, False
            try:
                index = first.index(0, index)
            except ValueError:
                return
            continue
        while index < count and not first[index]:
            index += 1
        if is_zero(view[begin * block : index * block]):
            yield begin, True
            continue
        for at in range(begin, index):
            yield at, test(view[at * block : (at + 1) * block])
