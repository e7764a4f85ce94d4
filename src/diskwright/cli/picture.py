"""The options ``--picture`` and ``--svg``: a disk's layers in the terminal, or as a drawing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..units import human
from .images import run
from .options import Args
from .output import Call, printable

if TYPE_CHECKING:
    from ..engine.kernel import BaseDriver
    from ..ops.images import ImageSpec
    from ..ops.picture import Picture, Strip

_DEPTHS = "0123456789abcdefghijklmnopqrstuvwxyz"
# Of data, compressed data (at least half of a column, less), zeroes, not in this layer.
_BLOCKS = ("█▄", "▓▒", "░░", "··", "  ")
_ASCII = ("#+", "Cc", "00", "..", "  ")
_COLOURS = ("34", "35", "37", "2", "")
_MOST = 400
"""Columns of a very wide terminal that are used."""
_SVG_COLUMNS = 456


def show(
    call: Call, args: Args, image: ImageSpec, start: int = 0, length: int | None = None
) -> None:
    """Print and write the pictures that ``args`` ask for.  Raises UsageError."""
    path = args.get("svg")
    if path is not None:
        _check(path)

    async def look(driver: BaseDriver, columns: int) -> Picture:
        from ..ops.images import close_all
        from ..ops.picture import picture

        node = await image.open(driver)
        try:
            return await picture(node, columns, start, length)
        finally:
            await close_all([node])

    if "picture" in args:
        for line in text(run(lambda driver: look(driver, _width())), *_style()):
            call.out(line)
    if path is not None:
        drawn = run(lambda driver: look(driver, _SVG_COLUMNS)).svg()
        with open(path, "w", encoding="utf-8", newline="\n") as out:
            out.write(drawn)


def _check(path: str) -> None:
    """Nothing but an older picture is overwritten."""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if file.read(5) not in (b"", b"<svg "):
                raise UsageError(f"'{path}' exists already, and is no SVG")


def text(picture: Picture, unicode: bool, colour: bool) -> Iterator[str]:
    """The lines of a picture, which are as wide as its columns."""
    count, layers = picture.columns, picture.layers
    glyphs = _BLOCKS if unicode else _ASCII
    size = human(picture.length) + (f" from {picture.start:#x}" if picture.start else "")
    yield f"{printable(picture.name)}: {size}, {human(picture.length // count)} a column"
    yield ""
    if len(layers) > 1:
        yield "read from layer"
        yield "".join(_served(picture, column) for column in range(count))
    for depth, layer in enumerate(layers):
        size = human(layer.size)
        yield f"{depth}: {printable(layer.name)} ({layer.format}, {size}){_totals(layer)}"
        yield _strip(layer, glyphs, colour)
    yield _axis(picture)
    words = ("data", "compressed", "zeroes", "not in this layer")
    parts = ["".join(dict.fromkeys(both)) for both in glyphs[:4]]
    legend = [f"{part} {word}" for part, word in zip(parts, words, strict=True)]
    yield "  ".join(legend) + "  (the second: less than half)"


def _strip(layer: Strip, glyphs: tuple[str, ...], colour: bool) -> str:
    out, last = "", ""
    for shares in layer.columns:
        state, glyph = _glyph(shares, glyphs)
        if colour and _COLOURS[state] != last:
            last = _COLOURS[state]
            out += f"\33[0;{last}m" if last else "\33[0m"
        out += glyph
    return out + ("\33[0m" if last else "")


def _glyph(shares: tuple[int, ...], glyphs: tuple[str, ...]) -> tuple[int, str]:
    """What a column is: data before all else, so that the least of them shows."""
    data, compressed, zero, hole, _ = shares
    stored, whole = data + compressed, sum(shares)
    if stored:
        state = 0 if data >= compressed else 1
        return state, glyphs[state][0 if 2 * stored >= whole else 1]
    state = 2 if zero else 3 if hole else 4
    return state, glyphs[state][0]


def _served(picture: Picture, column: int) -> str:
    """The layer that most of what a column reads comes from; a dash: none holds any of it."""
    given = [layer.served[column] for layer in picture.layers]
    most = max(given)
    if not most:
        return "-"
    depth = given.index(most)
    return _DEPTHS[depth] if depth < len(_DEPTHS) else "+"


def _totals(layer: Strip) -> str:
    data, compressed, zero, *_ = layer.totals
    words = ((data, "data"), (compressed, "compressed"), (zero, "zeroes"))
    return "".join(f", {human(count)} {word}" for count, word in words if count)


def _axis(picture: Picture) -> str:
    """The ends of the range and its middle, below the strips."""
    first, last = human(picture.start), human(picture.start + picture.length)
    line = first.ljust(max(picture.columns - len(last), len(first) + 1)) + last
    middle = human(picture.start + picture.length // 2)
    at = (picture.columns - len(middle)) // 2
    if line[at - 1 : at + len(middle) + 1].isspace():
        line = line[:at] + middle + line[at + len(middle) :]
    return line


def _width() -> int:
    from shutil import get_terminal_size

    return max(16, min(get_terminal_size().columns, _MOST))


def _style() -> tuple[bool, bool]:
    """Whether standard output takes block characters, and colours."""
    environment = os.environ
    named = next(filter(None, map(environment.get, ("LC_ALL", "LC_CTYPE", "LANG"))), "")
    try:
        "".join(_BLOCKS).encode(sys.stdout.encoding or "ascii")
        unicode = named not in ("C", "POSIX")
    except (UnicodeEncodeError, LookupError):
        unicode = False
    colour = sys.stdout.isatty() and environment.get("TERM") != "dumb"
    return unicode, colour and not environment.get("NO_COLOR")
