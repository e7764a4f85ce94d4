"""JSON as QEMU's programs take it: strings may stand in single quotes, and errors are worded as
theirs.  :class:`Messages` finds the values in a stream of bytes, with bounds on both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MESSAGE_LIMIT = 4 << 20
"""Longest value in bytes; what is longer is refused and dropped."""
DEPTH_LIMIT = 256
"""Deepest nesting of objects and arrays."""

_SPACE = re.compile(rb"[ \t\r\n]+")
_ATOM = re.compile(rb"[-+.0-9A-Za-z]+")
_RECOVERY = re.compile(rb"[{}\[\],:\s]")
_INSIDE = {
    quote: re.compile(rb"(?:[^\\\x00-\x1f\xc0\xc1\xf5-\xff%c]|\\[^\x00-\x1f\x80-\xff])+" % quote)
    for quote in b"\"'"
}
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"' r"|'(?:[^'\\]|\\.)*'", re.DOTALL)
_LARGEST = 20  # digits of 2^64


class JsonError(ValueError):
    """No JSON; the text is QEMU's."""


def loads(text: str) -> Any:
    """The value of a JSON text.  Raises :class:`JsonError`."""
    try:
        return json.loads(
            _STRING.sub(_double_quoted, text) if "'" in text else text,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonError(_words(error)) from None


def _integer(digits: str) -> int | float:
    if len(digits) <= _LARGEST and -(1 << 63) <= int(digits) < 1 << 64:
        return int(digits)
    return _number(digits)


def _number(text: str) -> float:
    found = float(text)
    if found - found:  # there would be no JSON to answer it with
        raise JsonError("JSON parse error, number out of range")
    return found


def _constant(word: str) -> Any:
    raise JsonError(f"JSON parse error, invalid keyword '{word.lstrip('-')}'")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise JsonError("JSON parse error, duplicate key")
    return found


def _words(error: ValueError | RecursionError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "JSON parse error, too deeply nested"
    text, at = error.doc, error.pos
    if not text.strip():
        return "Expecting a JSON value"
    if error.msg.startswith("Extra data"):
        return "Expecting at most one JSON value"
    if error.msg.startswith(("Invalid \\escape", "Invalid \\u")):
        return "JSON parse error, invalid escape sequence in string"
    if error.msg.startswith("Unterminated string"):
        return f"JSON parse error, stray '{text[at:]}'"
    if not text[at:].strip():
        return "JSON parse error, premature EOI"
    word = re.match(r"[A-Za-z]+", text[at:])
    if word is not None:
        return f"JSON parse error, invalid keyword '{word.group()}'"
    if error.msg.startswith("Expecting ':'"):
        return "JSON parse error, missing : in object pair"
    if error.msg.startswith("Expecting ','"):
        kind = "dict" if error.msg == "Expecting ',' delimiter" and _in_object(text, at) else "list"
        return f"JSON parse error, expected separator in {kind}"
    return "JSON parse error, expecting value"


def _in_object(text: str, at: int) -> bool:
    """Whether the innermost bracket that is open at ``at`` is that of an object."""
    depth = 0
    for mark in reversed(re.sub(_STRING, "", text[:at])):
        if mark in "}]":
            depth += 1
        elif mark in "{[":
            if not depth:
                return mark == "{"
            depth -= 1
    return True


def _double_quoted(match: re.Match[str]) -> str:
    word = match.group()
    if word[0] == '"':
        return word
    return '"' + word[1:-1].replace("\\'", "'").replace('"', '\\"') + '"'


class Messages:
    """Values out of a stream.  What is no JSON gives a :class:`JsonError` in the place of a value,
    and what follows it is read again: after a byte that no JSON has (``0xFF``) a value begins
    anew, whatever came before."""

    def __init__(self, limit: int = MESSAGE_LIMIT) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._at = 0  # up to here it was looked at
        self._quote = 0  # of the string in which that is
        self._string = 0  # where that begins
        self._open = {ord("{"): 0, ord("["): 0}
        self._recovering = False

    @property
    def held(self) -> int:
        """Bytes that are kept of a value that has not ended."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Any]:
        """The values (and errors) that end in ``data``."""
        self._buffer += data
        while True:
            end = self._token()
            if end is None:
                break
            found = self._complete(end)
            if found is not None:
                yield found[0]
        if len(self._buffer) > self.limit:
            yield self._fail("JSON token size limit exceeded", len(self._buffer))

    def _token(self) -> int | None:
        """Move on by one token; None when there is no whole one."""
        buffer = self._buffer
        if self._recovering:
            found = _RECOVERY.search(buffer, self._at)
            if found is None:
                self._take(len(buffer))
                return None
            self._take(found.start())
            self._recovering = False
        if self._quote:
            return self._rest_of_string()
        space = _SPACE.match(buffer, self._at)
        if space is not None:
            self._at = space.end()
        if self._at == len(buffer):
            if not self._nested:
                self._take(self._at)
            return None
        if buffer[self._at] in b"\"'":
            self._quote, self._string = buffer[self._at], self._at
            self._at += 1
            return self._rest_of_string()
        atom = _ATOM.match(buffer, self._at)
        if atom is not None:
            return atom.end() if atom.end() < len(buffer) else None
        return self._at + 1

    def _rest_of_string(self) -> int | None:
        inside = _INSIDE[self._quote].match(self._buffer, self._at)
        if inside is not None:
            self._at = inside.end()
        left = len(self._buffer) - self._at
        if not left or (left == 1 and self._buffer[self._at] == ord("\\")):
            return None
        return self._at + 1

    def _complete(self, end: int) -> tuple[Any] | None:
        """What ends with the token that ends at ``end``, in a tuple; None while nothing does."""
        mark = self._buffer[self._at]
        if self._quote:
            if mark != self._quote:
                return (self._stray(self._string, end),)
            self._quote = 0
        elif mark in b"{[":
            self._open[mark] += 1
            if self._nested > DEPTH_LIMIT:
                return (self._fail("JSON token nesting depth limit exceeded", end),)
        elif mark in b"}]":
            self._open[mark - 2] -= 1
        elif mark not in b",:" and not _ATOM.match(self._buffer, self._at):
            return (self._stray(self._at, end),)
        self._at = end
        if self._nested and min(self._open.values()) >= 0:
            return None
        broken = min(self._open.values()) < 0
        text = bytes(self._buffer[:end])
        self._take(end)
        if broken:
            return (JsonError("JSON parse error, expecting value"),)
        try:
            return (loads(text.decode("utf-8", "surrogatepass")),)
        except JsonError as error:
            return (error,)
        except UnicodeDecodeError:
            return (JsonError("JSON parse error, invalid UTF-8 sequence in string"),)

    @property
    def _nested(self) -> int:
        return sum(self._open.values())

    def _stray(self, start: int, end: int) -> JsonError:
        text = bytes(self._buffer[start:end]).decode("utf-8", "replace")
        self._recovering = True
        return self._fail(f"JSON parse error, stray '{text}'", end)

    def _fail(self, text: str, end: int) -> JsonError:
        self._take(end)
        return JsonError(text)

    def _take(self, end: int) -> None:
        """Forget everything before ``end``; a value begins there."""
        del self._buffer[:end]
        self._at = self._quote = self._string = 0
        self._open = dict.fromkeys(self._open, 0)
