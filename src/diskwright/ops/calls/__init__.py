"""Whole-image operations called with plain arguments: what both Python APIs offer.

A disk is given as the graph takes it: a file name, a ``json:`` or ``proto:`` name, or a dict of
options.  ``format`` is that of the image that is named first; None: it is probed.  ``policy`` is
a word or a :class:`~diskwright.ops.gates.Policy`; ``secrets`` are what options such as
``key-secret`` name (id -> bytes or text).  ``progress`` is called with a
:class:`~diskwright.ops.progress.Progress`; the operation stops (OperationCancelled) where it
answers ``False``.  What cannot be opened raises its own error (OSError, ImageError, Refused, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

OPERATIONS = {
    "info": "looking", "info_chain": "looking", "map": "looking", "picture": "looking",
    "measure": "looking", "compare": "looking", "digest": "looking", "inspect": "looking",
    "check": "mending", "plan_repair": "mending", "undo": "mending", "salvage": "mending",
    "create": "making", "overlay": "making", "convert": "making", "commit": "making",
    "rebase": "making", "amend": "making",
}  # fmt: skip
"""The operations, and the module of each, which is imported with the first call."""


def operation(name: str) -> Callable[..., Any]:
    """One of :data:`OPERATIONS`: a coroutine function whose first parameter is the driver."""
    found: Callable[..., Any] = getattr(import_module(f".{OPERATIONS[name]}", __name__), name)
    return found
