"""One declaration per driver: the options that the CLI's ``-o help``, the ``json:`` names, the
monitors' schema and the documentation are all made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One option.  ``type``: ``str``, ``int``, ``size`` (bytes, with suffixes), ``bool``
    (on/off) or ``enum`` (one of ``choices``)."""

    name: str
    type: str
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()


class Driver(NamedTuple):
    """What the registry knows of a driver once its module is imported.

    ``kind`` is ``format``, ``protocol`` or ``filter``.  For a format ``open`` is
    ``open(options: dict) -> (Format, Procedure)``: the procedure fills the format in and returns
    it.  ``create`` is ``create(options: dict) -> Procedure`` over slot ``file``, or None.
    """

    name: str
    kind: str
    options: tuple[Option, ...] = ()
    create_options: tuple[Option, ...] = ()
    open: Callable[..., Any] | None = None
    create: Callable[..., Any] | None = None
    capabilities: frozenset[str] = frozenset()
