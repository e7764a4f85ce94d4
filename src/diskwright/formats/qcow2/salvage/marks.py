"""What is kept of each cluster of a file while it is searched."""

from __future__ import annotations

from collections.abc import Iterator

from ....bits import Bits, Budget

_MOST = 128 << 20
_NO_END = 1 << 56


class Marks:
    """Which clusters of the file are named by something, and which by more than one entry.

    A bit each, but nothing for long runs.  Beyond ``limit`` bytes clusters around are taken for
    named, and shared, too; ``full`` says so."""

    def __init__(self, limit: int = _MOST) -> None:
        self._budget = Budget(limit)
        self._named = Bits(_NO_END, self._budget)
        self._soft = Bits(_NO_END, self._budget)
        self._shared = Bits(_NO_END, self._budget)

    @property
    def full(self) -> bool:
        """Some clusters could not be noted one by one."""
        return self._budget.left <= 0

    def use(self, cluster: int, alone: bool = True, soft: bool = False) -> None:
        """Note a reference to a cluster; see :meth:`use_run`."""
        self.use_run(cluster, cluster + 1, alone, soft)

    def use_run(self, first: int, stop: int, alone: bool = True, soft: bool = False) -> None:
        """Note a reference to each of the clusters [first, stop).  One that is ``alone`` conflicts
        with any before it, but for those of snapshots (``soft``)."""
        if soft:
            self._soft.set(first, stop)
            return
        if alone and self._named.any(first, stop):
            for cluster in range(first, stop):
                if self._named.get(cluster):
                    self._shared.set(cluster, cluster + 1)
        self._named.set(first, stop)

    def used(self, cluster: int) -> bool:
        """Something names it."""
        return self._named.get(cluster) or self._soft.get(cluster)

    def any(self, first: int, stop: int) -> bool:
        """Something names one of these clusters."""
        return self._named.any(first, stop) or self._soft.any(first, stop)

    def shared(self, cluster: int) -> bool:
        """More than one entry names it."""
        return self._shared.get(cluster)

    def any_shared(self, first: int, stop: int) -> bool:
        """More than one entry names one of these clusters."""
        return self._shared.any(first, stop)


class Reasons:
    """A reason for some L1 indexes: a byte for each, so that any number of them costs little."""

    def __init__(self) -> None:
        self._codes = bytearray()
        self._texts: list[str] = [""]

    def __setitem__(self, index: int, text: str) -> None:
        if text not in self._texts:
            self._texts.append(text)
        if index >= len(self._codes):
            self._codes.extend(bytes(index + 1 - len(self._codes)))
        self._codes[index] = self._texts.index(text)

    def get(self, index: int) -> str:
        """The text, empty where there is none."""
        return self._texts[self._codes[index]] if index < len(self._codes) else ""

    def drop(self, index: int) -> None:
        if index < len(self._codes):
            self._codes[index] = 0

    def __iter__(self) -> Iterator[int]:
        return (index for index, code in enumerate(self._codes) if code)

    def __bool__(self) -> bool:
        return self._codes.count(0) != len(self._codes)
