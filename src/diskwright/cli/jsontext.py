"""JSON as the tools that scripts know print it: four blanks a level, ASCII only."""

from __future__ import annotations

from collections.abc import Mapping

from ..hints import Any


def dumps(value: Any, level: int = 0) -> str:
    """``value`` as text; characters beyond ASCII become ``\\u`` escapes, bytes of file names
    that are not UTF-8 the replacement character."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(map(_escape, value)) + '"'
    if value is None:
        return "null"
    inner = "\n" + "    " * (level + 1)
    outer = "\n" + "    " * level
    if isinstance(value, Mapping):
        items = (f"{inner}{dumps(key)}: {dumps(item, level + 1)}" for key, item in value.items())
        return "{" + ",".join(items) + outer + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(inner + dumps(item, level + 1) for item in value) + outer + "]"
    return str(value)


def line(value: Mapping[str, Any]) -> str:
    """An object on one line, as ``map`` prints its parts."""
    return "{ " + ", ".join(f"{dumps(key)}: {dumps(item)}" for key, item in value.items()) + "}"


_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b",
          "\f": "\\f"}  # fmt: skip


def _escape(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    code = ord(char)
    if 32 <= code < 127:
        return char
    if 0xD800 <= code < 0xE000:
        code = 0xFFFD
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
    return f"\\u{code:04X}"
