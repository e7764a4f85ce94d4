"""What formats share that keep no tables: their map never changes, and nothing is written back."""

from __future__ import annotations

from collections.abc import Sequence

from .contract import Groups, HostRange, Plan, TableStore
from .hints import Any


class Tableless:
    """The part of the `Format` of the contract that has nothing to do without tables."""

    cipher_unit = 1
    tables: TableStore

    def commit(self, plan: Plan) -> None:
        """Nothing to point at."""

    def abort(self, plan: Plan) -> None:
        """Nothing was reserved."""

    def freeze(self) -> Groups:
        """Nothing is dirty."""
        return Groups([])

    def settle(self, token: Any) -> list[HostRange]:
        """No host space comes free."""
        return []

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None:
        """Never called: no host space comes free."""

    def load(self, slot: str, offset: int, data: bytes) -> None:
        """Never called: `map` and `plan` ask for nothing."""
