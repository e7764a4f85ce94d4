"""Decoded tables of all formats of a graph, under one soft budget.

Soft, because with a hard limit two askers that each hold half of what they need wait for each
other.  Only this class evicts; a table that is dirty, pinned or in write-back stays.
"""

from __future__ import annotations

from collections import OrderedDict

from ..contract import Table
from ..hints import Any

_Key = tuple[int, str, int]


class Tables:
    """The store.  ``budget`` is in bytes of table weight."""

    def __init__(self, budget: int = 32 << 20) -> None:
        self.budget = budget
        self.weight = 0
        self.evicted = 0
        self._map: OrderedDict[_Key, Table] = OrderedDict()
        self._views: dict[int, View] = {}
        self._default = budget
        self._claims: dict[int, int | None] = {}

    def claim(self, owner: int, size: int | None) -> None:
        """``size`` bytes are meant for the tables of one format; None: it shares what is there by
        default with all that ask for nothing.  The budget is what all ask for together."""
        self._claims[owner] = size
        self._add_up()

    def withdraw(self, owner: int) -> None:
        """A format was closed."""
        self._claims.pop(owner, None)
        self._add_up()

    def _add_up(self) -> None:
        sizes = set(self._claims.values())
        shared = self._default if None in sizes or not sizes else 0
        self.budget = shared + sum(size or 0 for size in self._claims.values())
        self.trim()

    def view(self) -> View:
        """A part of the store for one format."""
        view = View(self, len(self._views))
        self._views[view.owner] = view
        return view

    def trim(self) -> None:
        """Evict the least recently used tables until the budget holds (as far as it can)."""
        if self.weight <= self.budget:
            return
        for key, table in list(self._map.items()):
            if self.weight <= self.budget:
                break
            if table.dirty or table.pins or table.writeback:
                continue
            del self._map[key]
            self.weight -= table.size
            self.evicted += 1
            self._views[table.owner].generation += 1


class View:
    """One format's tables (the ``TableStore`` of the contract)."""

    def __init__(self, store: Tables, owner: int) -> None:
        self.store = store
        self.owner = owner
        self.generation = 0
        self._dirty: dict[int, Table] = {}
        self.dirty_weight = 0
        """Bytes of dirty tables; an upper bound between freezes."""
        self._map = store._map

    def get(self, slot: str, offset: int) -> Table | None:
        key = (self.owner, slot, offset)
        table = self._map.get(key)
        if table is not None:
            self._map.move_to_end(key)
        return table

    def put(self, slot: str, offset: int, data: Any, size: int, dirty: bool = False) -> Table:
        self.drop(slot, offset)
        table = Table(self.owner, slot, offset, data, size)
        self._map[(self.owner, slot, offset)] = table
        self.store.weight += size
        if dirty:
            self.mark(table)
        return table

    def drop(self, slot: str, offset: int) -> None:
        table = self._map.pop((self.owner, slot, offset), None)
        if table is not None:
            self.store.weight -= table.size
            self._dirty.pop(id(table), None)
            self.generation += 1

    def dirty(self) -> list[Table]:
        self._dirty = {key: table for key, table in self._dirty.items() if table.dirty}
        self.dirty_weight = sum(table.size for table in self._dirty.values())
        return list(self._dirty.values())

    def mark(self, table: Table) -> None:
        table.dirty = True
        if id(table) not in self._dirty:
            self._dirty[id(table)] = table
            self.dirty_weight += table.size

    def clear(self) -> None:
        for key in [key for key in self._map if key[0] == self.owner]:
            self.store.weight -= self._map.pop(key).size
        self._dirty.clear()
        self.generation += 1

    def forget_unused(self) -> None:
        """Drop what was not used since the last call of this.

        A mark of no weight goes through the store; what was used lies behind it.  A format that
        keeps shortcuts has to ask for its tables anew, so that those in use are not left before it.
        """
        mark = (self.owner, "", -1)
        if mark in self._map:
            unused = []
            for key, table in self._map.items():
                if key == mark:
                    break
                if key[0] == self.owner and not (table.dirty or table.pins or table.writeback):
                    unused.append(key)
            for key in unused:
                self.store.weight -= self._map.pop(key).size
            self._map.move_to_end(mark)
        else:
            self._map[mark] = table = Table(self.owner, "", -1, None, 0)
            table.pins = 1
        self.generation += 1

    def busy(self) -> bool:
        """True while a table of this format is dirty or in write-back."""
        return any(
            table.dirty or table.writeback
            for key, table in self._map.items()
            if key[0] == self.owner
        )
