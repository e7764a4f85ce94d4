"""References of many clusters in one refcount block: one more, or one less, for all of them."""

from __future__ import annotations

import re
from functools import cache

from .refblock import RefBlock
from .runs import Run

_ONES = re.compile(rb"\x01+")
_LESS = bytes(max(value - 1, 0) for value in range(256))


@cache
def _more(times: int) -> bytes:
    return bytes(value + times & 255 for value in range(256))


def lower(block: RefBlock, start: int, stop: int) -> list[Run]:
    """Take one reference from each of the counts [start, stop), unless it is zero; the runs of
    those that have none left now."""
    counts = block.small(start, stop) if stop - start > 1 else None
    if counts is not None:
        block.put(start, counts.translate(_LESS))
        return [(start + one.start(), start + one.end()) for one in _ONES.finditer(counts)]
    out: list[Run] = []
    for index in range(start, stop):
        count = block.get(index)
        if count:
            block.set(index, count - 1)
        if count == 1:
            if out and out[-1][1] == index:
                out[-1] = (out[-1][0], index + 1)
            else:
                out.append((index, index + 1))
    return out


def lift(block: RefBlock, start: int, stop: int, times: int, most: int) -> int | None:
    """``times`` more references for each of the counts [start, stop); the index of the first one
    for which that is more than ``most``, and nothing has changed then.  None: none."""
    counts = block.small(start, stop) if stop - start > 1 and times < 256 else None
    if counts is not None:
        highest = max(counts)
        if highest + times <= min(most, 255):
            block.put(start, counts.translate(_more(times)))
            return None
    for index in range(start, stop):
        if block.get(index) + times > most:
            return index
    for index in range(start, stop):
        block.set(index, block.get(index) + times)
    return None
