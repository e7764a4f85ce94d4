"""What may stand between a disk and the files that it is in."""

from __future__ import annotations

from ..hints import Protocol
from .node import Node


class Stage(Protocol):
    """What keeps the writes to a disk from its files; ``writable``: they are opened for writing
    all the same."""

    writable: bool

    def over(self, leaf: Node) -> Node:
        """What stands in the place of an opened file that would be written to."""
