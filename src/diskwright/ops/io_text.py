"""The io language's letters: numbers, flags, sizes and dumps, as qemu-io has them (measured with
10.0)."""

from __future__ import annotations

from collections.abc import Sequence

from ..records import NamedTuple

MAX_REQUEST = 2147483136
"""Most bytes that one request moves: what fits into a signed 32-bit number, in sectors."""

INT64_MAX = (1 << 63) - 1
_SUFFIXES = "bkmgtpe"
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


class Complaint(Exception):
    """A command cannot be carried out as it was given; the text says why.

    ``stream``: where it goes, ``out``, ``err`` (a line of its own on standard error) or
    ``report`` (there, with the program's name before it).  ``usage``: the command's synopsis
    follows on standard output.
    """

    def __init__(self, text: str, stream: str = "out", usage: bool = False) -> None:
        super().__init__(text)
        self.text, self.stream, self.usage = text, stream, usage


class Flags:
    """What getopt found: ``letters``, the ``values`` of those that take one, ``operands``."""

    __slots__ = ("letters", "operands", "values")

    def __init__(self, letters: set[str], values: dict[str, str], operands: list[str]) -> None:
        self.letters, self.values, self.operands = letters, values, operands

    def __contains__(self, letter: str) -> bool:
        return letter in self.letters


def getopt(name: str, words: Sequence[str], spec: str) -> Flags:
    """Sort ``words`` into flags and operands; they may be mixed, ``--`` ends the flags.

    ``spec`` lists the letters, those with a value followed by ``:``.
    """
    letters: set[str] = set()
    values: dict[str, str] = {}
    operands: list[str] = []
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        if word == "--":
            operands += reversed(rest)
            break
        if not word.startswith("-") or word == "-":
            operands.append(word)
            continue
        cluster = word[1:]
        while cluster:
            letter, cluster = cluster[0], cluster[1:]
            at = spec.find(letter) if letter != ":" else -1
            if at < 0:
                raise Complaint(f"{name}: invalid option -- '{letter}'", "err", True)
            letters.add(letter)
            if spec[at + 1 : at + 2] == ":":
                if not cluster and not rest:
                    raise Complaint(f"{name}: option requires an argument -- '{letter}'", "err",
                                    True)  # fmt: skip
                values[letter] = cluster or rest.pop()
                cluster = ""
    return Flags(letters, values, operands)


def cvtnum(text: str) -> int:
    """A number of bytes: decimal with an optional suffix of 1024's powers, or hexadecimal.

    Raises :class:`Complaint`.
    """
    value = _parse(text.lstrip(" \t\n\v\f\r").removeprefix("+").lower())
    if value is None:
        raise Complaint(
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- " + text
        )
    if not 0 <= value <= INT64_MAX:
        raise Complaint(f"Parsing error: argument too large -- {text}")
    return value


def _parse(body: str) -> int | None:
    if body.startswith("-"):
        # It wraps around, so it is too large; but no suffix is read then.
        return -1 if body[1:].isascii() and body[1:].isdigit() else None
    if body.startswith("0x"):
        digits = body[2:]
        good = digits and all(c in "0123456789abcdef" for c in digits)
        return min(int(digits, 16), 1 << 64) if good else None
    shift = 0
    if body and body[-1] in _SUFFIXES:
        shift = 10 * _SUFFIXES.index(body[-1])
        body = body[:-1]
    whole, _, fraction = body.partition(".")
    digits = whole + fraction
    if not digits or not digits.isascii() or not digits.isdigit():
        return None
    if len(whole) > 30:
        return 1 << 64
    value = int(whole or "0") << shift
    if fraction.strip("0"):
        if not shift:
            return None
        part = fraction[:30]
        value += ((int(part) << (shift + 1)) // 10 ** len(part) + 1) >> 1
    return value


def integer(text: str) -> int | None:
    """A number as strtol(3) reads it with base 0; None when there is more or nothing."""
    body = text.strip(" \t\n\v\f\r")
    sign = -1 if body[:1] == "-" else 1
    body = body.lstrip("+-") if body[:1] in ("+", "-") else body
    octal = len(body) > 1 and body[0] == "0" and body.isdigit()
    try:
        return sign * int(body, 8 if octal else 0) if "_" not in body else None
    except ValueError:
        return None


def pattern_byte(text: str) -> int:
    """The value of ``-P``: 0 ... 255."""
    value = integer(text)
    if value is None or not 0 <= value <= 255:
        raise Complaint(f"{text} is not a valid pattern byte")
    return value


def size_text(value: float) -> str:
    """A size as ``64 KiB``, ``1.500 MiB``, ``0 bytes``."""
    if value < 1024:
        return f"{value:f}".removesuffix(".000000") + " bytes"
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.3f}".removesuffix(".000") + f" {_UNITS[unit]}"


def clock_text(seconds: float, fixed: bool = False) -> str:
    """A duration: ``00.02 sec``, or ``0:01:30.00`` from a minute on and when ``fixed``."""
    hundredths = int(seconds * 100)
    whole, part = divmod(hundredths, 100)
    if whole < 60 and not fixed:
        return f"{whole:02}.{part:02} sec"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}.{part:02}"


def dump(data: bytes | bytearray | memoryview, offset: int) -> list[str]:
    """Lines of sixteen bytes in hexadecimal and as letters."""
    lines = []
    view = memoryview(data)
    for at in range(0, len(view), 16):
        row = bytes(view[at : at + 16])
        shown = "".join(chr(b) if b < 128 and chr(b).isalnum() else "." for b in row)
        lines.append(f"{offset + at:08x}:  {row.hex(' ')}  {shown}")
    return lines


class Transfer(NamedTuple):
    """What a request moved: ``total`` bytes from ``offset`` in ``seconds``."""

    verb: str
    offset: int
    total: int
    seconds: float

    def lines(self, csv: bool) -> str:
        """The report: two lines, or one of comma-separated values."""
        seconds = max(self.seconds, 1e-9)
        rate, ops = self.total / seconds, 1 / seconds
        if csv:
            return f"{self.total},1,{clock_text(seconds, True)},{rate:.3f},{ops:.3f}"
        return (
            f"{self.verb} {self.total}/{self.total} bytes at offset {self.offset}\n"
            f"{size_text(self.total)}, 1 ops; {clock_text(seconds)} "
            f"({size_text(rate)}/sec and {ops:.4f} ops/sec)"
        )
