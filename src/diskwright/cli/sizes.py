"""Numbers and sizes on the command line, read as qemu-img reads them (measured with 10.0)."""

from __future__ import annotations

from ..errors import UsageError

INT64_MAX = (1 << 63) - 1
_SUFFIXES = "bkmgtpe"


class BadNumber(ValueError):
    """Not a number; ``too_large``: a number, but one that no range holds."""

    def __init__(self, too_large: bool = False) -> None:
        super().__init__("not a number")
        self.too_large = too_large


def number(text: str, *, suffixes: bool = True) -> int:
    """A signed number: decimal, or hexadecimal with ``0x``.

    With ``suffixes`` a decimal one may end in b, k, M, G, T, P or E (powers of 1024, either
    case), and with one of those but b it may have a fraction; hexadecimal ones take none.
    Raises :class:`BadNumber`.
    """
    body = text.lstrip(" \t\n\v\f\r")
    sign = 1
    if body[:1] in ("+", "-"):
        sign = -1 if body[0] == "-" else 1
        body = body[1:]
    body = body.lower()
    if not body.isascii():
        raise BadNumber
    if body.startswith("0x"):
        digits = body[2:]
        if not digits or any(char not in "0123456789abcdef" for char in digits):
            raise BadNumber
        return sign * int(digits, 16)
    shift = 0
    suffix = body[-1:]
    if suffixes and suffix and suffix in _SUFFIXES:
        shift = 10 * _SUFFIXES.index(suffix)
        body = body[:-1]
    whole, dot, fraction = body.partition(".")
    if not (whole or fraction) or not (whole + fraction).isdigit() or (dot and not suffixes):
        raise BadNumber
    if len(whole) > 40:
        raise BadNumber(too_large=True)
    value = int(whole or "0") << shift
    if fraction.strip("0"):
        if not shift:
            raise BadNumber
        digits = fraction[:40]
        value += ((int(digits) << shift + 1) // 10 ** len(digits) + 1) >> 1
    return sign * value


def bounded(
    name: str, text: str, low: int = 0, high: int = INT64_MAX, *, suffixes: bool = True
) -> int:
    """The number in ``text``, which must lie in ``low`` ... ``high``; ``name`` is what the message
    calls it.  Raises UsageError."""
    try:
        value = number(text, suffixes=suffixes)
    except BadNumber as error:
        if not error.too_large:
            raise UsageError(f"Invalid {name} specified: '{text}'.") from None
        value = high + 1
    if not low <= value <= high:
        raise UsageError(f"Invalid {name} specified. Must be between {low} and {high}.")
    return value
