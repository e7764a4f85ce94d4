"""One declaration per driver: the options that the CLI's ``-o help``, the ``json:`` names, the
monitors' schema and the documentation are all made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .abilities import StreamWriter, Survey
from .hints import Any
from .records import NamedTuple


class Option(NamedTuple):
    """One option.  ``type``: ``str``, ``int``, ``size`` (bytes, with suffixes), ``bool``
    (on/off), ``enum`` (one of ``choices``) or ``object`` (what only a program can give).  ``own``:
    QEMU has none like it, so it is not listed under the names of its tools."""

    name: str
    type: str
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    own: bool = False


class Driver(NamedTuple):
    """What the registry knows of a driver once its module is imported.

    ``kind`` is ``format``, ``protocol`` or ``filter``.  For a format ``open`` is
    ``open(options: dict) -> (Format, Procedure)``: the procedure fills the format in and returns
    it.  ``create`` is ``create(options: dict) -> Procedure`` over slot ``file``, or None.
    ``stream(options: dict)`` gives the StreamWriter for these creation options, or None where the
    image they describe is not written in one pass.  ``survey(options: dict, compress: bool)``
    gives the Survey that leads to one, for a format that must know before the first byte what the
    image will hold; None where that does not suffice, either.

    ``amend_options`` are those that images which are there can have changed, by
    ``amend(options, force) -> Procedure`` of the format.  ``measure(options: dict)`` tells for an
    image with these creation options how many bytes it has beside its data, and the unit in bytes
    in which those are stored.  ``salvage_options`` are what a caller can say of an image that does
    not say it any more.

    Beside their own options both get what the graph knows: ``file-name`` (the image's path as it
    was given), ``secrets`` (id -> bytes), and to create over a backing file ``backing_identity``
    (see ``abilities.Backed``) and ``backing_sector_size`` (in bytes; both None where its format has
    no such thing).
    """

    name: str
    kind: str
    options: tuple[Option, ...] = ()
    create_options: tuple[Option, ...] = ()
    open: Callable[..., Any] | None = None
    create: Callable[..., Any] | None = None
    stream: Callable[[Mapping[str, Any]], StreamWriter | None] | None = None
    survey: Callable[[Mapping[str, Any], bool], Survey | None] | None = None
    capabilities: frozenset[str] = frozenset()
    amend_options: tuple[Option, ...] = ()
    salvage_options: tuple[Option, ...] = ()
    measure: Callable[[Mapping[str, Any]], tuple[int, int]] | None = None
