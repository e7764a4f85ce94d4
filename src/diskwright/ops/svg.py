"""A picture of a disk's layers as SVG 1.1: complete in itself, the same bytes for the same picture.

Each layer is a strip in which every column shows its shares, data at the bottom.  The line below a
strip marks what is read from this layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from ..units import human
from .picture import BEYOND, STATES, UNALLOCATED, Picture, Strip

_WIDTH, _MARGIN = 960, 24
_INNER = _WIDTH - 2 * _MARGIN
_TOP, _STRIP, _LINE, _STEP = 64, 36, 5, 84
"""Heights: of the title, of a strip and the line below it, and from one layer to the next."""
_COLOURS = ("#2f6fb0", "#8d5bb5", "#aab4c0", "#ffffff", "#ececec")
_SERVED, _TEXT, _FAINT = "#e08a1e", "#1d2733", "#5c6873"
_WORDS = {
    "data": "data",
    "compressed": "compressed data",
    "zero": "zeroes",
    "unallocated": "not in this layer",
    "beyond": "behind its end",
}
_TICKS = 4
_CHARACTERS = 46
"""Of a name that is shown whole: what a line has room for beside the numbers."""


def draw(picture: Picture) -> str:
    """The whole drawing."""
    layers = picture.layers
    bottom = _TOP + _STEP * len(layers)
    height = bottom + 66
    many = f"{len(layers)} layers" if len(layers) > 1 else "1 layer"
    title = f"{_shortened(picture.name, 60)}: {_range(picture)}, {many}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="13" fill="{_TEXT}">',
        f"<title>{_escaped(picture.name)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="34" font-size="17" font-weight="bold">{_escaped(title)}</text>',
    ]
    for number, layer in enumerate(layers):
        lines += _layer(picture, layer, number, _TOP + _STEP * number)
    lines += _axis(picture, bottom - 12)
    lines += _legend(height - 20)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _layer(picture: Picture, layer: Strip, number: int, y: int) -> Iterator[str]:
    totals = ", ".join(
        f"{human(count)} {_WORDS[state]}"
        for state, count in zip(STATES[:BEYOND], layer.totals, strict=False)
        if count and state != "unallocated"
    )
    name = _shortened(layer.name, _CHARACTERS)
    yield f"<g><title>{_escaped(layer.name)}</title>"
    yield (
        f'<text x="{_MARGIN}" y="{y + 6}">{number}: {_escaped(name)} '
        f'<tspan fill="{_FAINT}">({_escaped(layer.format)}, {human(layer.size)})</tspan></text>'
    )
    yield (
        f'<text x="{_WIDTH - _MARGIN}" y="{y + 6}" text-anchor="end" fill="{_FAINT}">'
        f"{totals or 'nothing'}</text>"
    )
    top = y + 14
    yield f'<rect x="{_MARGIN}" y="{top}" width="{_INNER}" height="{_STRIP}" fill="#ffffff"/>'
    scale, at = _INNER / picture.columns, 0
    for shares, columns in groupby(zip(layer.columns, layer.served, strict=True), _shares):
        count = len(list(columns))
        *states, served = shares
        x, width = _MARGIN + at * scale, count * scale
        below = float(top + _STRIP)
        for state, share in enumerate(states):
            below -= share * _STRIP
            if share and state != UNALLOCATED:
                high = max(share * _STRIP, 1.0)  # the least of data shows
                yield _rect(x, min(below, top + _STRIP - high), width, high, _COLOURS[state])
        if served:
            opacity = "" if served == 1 else f' fill-opacity="{max(served, 0.25):.2f}"'
            yield _rect(x, top + _STRIP + 2, width, _LINE, _SERVED, opacity)
        at += count
    yield (
        f'<rect x="{_MARGIN}" y="{top}" width="{_INNER}" height="{_STRIP}" fill="none" '
        f'stroke="{_FAINT}" stroke-width="0.75"/></g>'
    )


def _shares(column: tuple[tuple[int, ...], int]) -> tuple[float, ...]:
    """What is shown of a column, as parts of it."""
    states, served = column
    whole = sum(states) or 1
    return tuple(round(count / whole, 3) for count in (*states, served))


def _axis(picture: Picture, y: int) -> Iterator[str]:
    for tick in range(_TICKS + 1):
        x = _MARGIN + _INNER * tick / _TICKS
        anchor = {0: "start", _TICKS: "end"}.get(tick, "middle")
        label = human(picture.start + picture.length * tick // _TICKS)
        yield (
            f'<path d="M{x:g} {y - 6}v6" stroke="{_FAINT}" stroke-width="0.75"/>'
            f'<text x="{x:g}" y="{y + 12}" text-anchor="{anchor}" font-size="11" '
            f'fill="{_FAINT}">{label}</text>'
        )


def _legend(y: int) -> Iterator[str]:
    x = _MARGIN
    entries = [(_COLOURS[state], _WORDS[name]) for state, name in enumerate(STATES)]
    for colour, words in [*entries, (_SERVED, "what is read comes from here")]:
        high = _LINE if colour == _SERVED else 12
        yield (
            f'<rect x="{x}" y="{y - 5 - high / 2:g}" width="18" height="{high}" fill="{colour}" '
            f'stroke="{_FAINT}" stroke-width="0.5"/><text x="{x + 25}" y="{y}">{words}</text>'
        )
        x += 25 + 7 * len(words) + 26


def _rect(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'fill="{fill}"{more}/>'
    )


def _range(picture: Picture) -> str:
    size = human(picture.length)
    return f"{size} from {picture.start:#x}" if picture.start else size


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return text[: most // 3] + "…" + text[len(text) - (most - most // 3 - 1) :]


def _escaped(text: str) -> str:
    """Text of anybody's making as that of an element: without what XML cannot hold."""
    plain = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
